"""Sums of products as exact as fp64 gives them where fp64 is slow: numbers cut into digits that fp32 multiplies exactly.

Cards for graphics multiply in fp64 at 1/32 or 1/64 of their rate in fp32. A number x of a channel whose largest is below 2^e is,
but for 2^(e − 43),

    x = 2^e Σ_{s < LEVELS} d_s 2^(−BITS · (s + 1)),    d_s whole numbers, |d_0| ≤ 2^BITS, |d_s| ≤ 2^(BITS − 1),

and Σ_t x y = 2^(e + f) Σ_l 2^(−BITS · (l + 2)) Σ_{r + s = l} Σ_t d_r d'_s. Of `RUN` tokens the whole numbers on the right stay
within 2^24, so that fp32 adds them up without an error, in any order. A digit has no more bits than TF32 (and bf16) holds, so
that the products may be formed by tensor cores. Only the levels l < `LEVELS` are formed, and only sums of levels are added in
fp64: as many products as `PRODUCTS` of fp64 would be.

Reference: Ozaki et al. 2012 (doi 10.1007/s11075-011-9478-1) for products without errors by cutting. Differs: digits per channel,
the same for both sides of a Gram.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import torch
from torch import Tensor

from planish.shapes import Float

BITS = 7
LEVELS = 6
RUN = 512  # tokens whose digits' products add up within 2^24: in the last level two of 2^13 and four of 2^12 each
PRODUCTS = LEVELS * (LEVELS + 1) // 2
CUTTING = 1.3  # times the products' seconds that numbers are cut and formed in
SLICED: Final = "sliced"
Precision = torch.dtype | Literal["sliced"]  # what the products of a run of tokens are summed in


@dataclass(frozen=True, eq=False)
class Digits:
    """`RUN` tokens or fewer of some channels: digits (levels, tokens, n) in fp32, and 2^e per channel (n,) in fp64."""

    digits: Float[Tensor, "levels tokens n"]
    scale: Float[Tensor, " n"]

    def columns(self, first: int, stop: int | None = None) -> Digits:
        return Digits(self.digits[:, :, first:stop], self.scale[first:stop])

    def add_product(self, other: Digits, into: Float[Tensor, "n m"]) -> None:
        """Add Σ_t x_t y_tᵀ (n, m) to fp64 sums, x (tokens, n) being these and y (tokens, m) the other's numbers."""
        left, right = self.digits, other.digits
        with exact_products():
            for level in range(LEVELS):
                mine = left[: level + 1].flatten(0, 1)
                theirs = right[: level + 1].flip(0).flatten(0, 1)
                found = (mine.T @ theirs).to(into.dtype).mul_(self.scale[:, None] * 2.0 ** (-BITS * (level + 2)))
                into.add_(found.mul_(other.scale))


def cut_digits(x: Float[Tensor, "tokens n"]) -> Digits:
    """The digits of numbers in fp32 or less: no fp64 is needed. Where a channel has infinities or no numbers, its scale is none."""
    rest = x.float()
    largest = rest.abs().amax(0) if len(rest) else rest.new_zeros(rest.shape[1])
    exponent = torch.frexp(largest).exponent  # largest < 2^exponent
    rest = torch.ldexp(rest, -exponent)
    digits = []
    for _ in range(LEVELS):
        rest = rest * 2**BITS
        digits.append(rest.round())
        rest = rest - digits[-1]
    scale = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent)
    return Digits(torch.stack(digits), torch.where(largest.isfinite(), scale, torch.nan))


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the context fp32 products on CUDA may be formed by tensor cores, which hold a digit whole."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_exact(device: torch.device) -> Precision:
    """What sums as exact as fp64's are formed in: digits where that is faster on this device."""
    return SLICED if is_fp64_slow(device) else torch.float64


@cache
def is_fp64_slow(device: torch.device) -> bool:
    """Whether this device forms an fp64 product in more time than `PRODUCTS` ones in fp32 and the cutting take: measured once, on
    products of 2048 × 512 × 2048 numbers. Never on a CPU, nor where there is no fp64 and sums are the CPU's."""
    if device.type != "cuda":
        return False

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 2048, device=device, dtype=dtype)
        return min(clock(lambda: x.T @ x) for _ in range(3))

    def clock(work: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with exact_products():
        return seconds(torch.float64) > CUTTING * PRODUCTS * seconds(torch.float32)
