"""Changes of basis that rounding a product of two matrices costs little in, and a forecast to compare them by."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from planish.rounding.round import DAMPING as FEEDBACK
from planish.rounding.round import upper_root
from planish.rounding.types import StorageType
from planish.solvers.linalg import root, svd

DAMPING = 1e-8
FINE = 32  # weights of a block of llama.cpp that share a scale, or a part of one
EXPONENTS = ((0.25, 0.25), (0.25, 0.5), (0.35, 0.5), (0.5, 0.25), (0.5, 0.5))  # of inputs and of columns
SHARES = (0.0, 0.3, 0.7)  # of the inner factor's own error


def foresee(w: Tensor, energy: Tensor, kind: StorageType) -> Tensor:
    """What rounding each row of w (out, in) with feedback costs, about: Σ_groups step² Σ_j V_jj² / 12, (out,).

    `energy` (in,): V_jj² (`measure_energy`). The step is that of even levels between the least and the largest (and zero) of
    every group, of at most `FINE` weights, since blocks of 256 have scales inside.
    """
    size = kind.group if kind.kind == "integer" else min(kind.group, FINE)
    groups = w.unflatten(1, (-1, size))
    steps = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**kind.bits - 1)
    return steps.square() @ energy.unflatten(0, (-1, size)).sum(1) / 12


def measure_energy(gram: Tensor, damping: float = FEEDBACK) -> Tensor:
    """V_jj² (in,) of R + λI = V Vᵀ, V upper triangular: what an error in column j costs that feedback cannot undo."""
    return upper_root(gram, damping).diagonal().square()


def spread(n: int) -> Tensor:
    """An orthogonal (n, n), no entry larger than √(2/n): Hartley's matrix with random signs, the same every time.

    Hadamard's, whose entries are 1/√n, exist for few n; this one for all.
    """
    at = torch.arange(n, dtype=torch.float64)
    turns = 2 * math.pi * (at[:, None] * at % n) / n
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)).double() * 2 - 1
    return (turns.cos() + turns.sin()) / n**0.5 * signs


def scale_columns(weights: list[Tensor], energy: Tensor) -> Iterator[Tensor]:
    """Scales s (in,) to try for the columns of matrices (out, in) whose inputs, of mean squares `energy` (in,), are divided by s.

    s = x^a / w^b, x the inputs' and w the columns' root mean squares: a column whose input is large becomes longer, one that
    is long itself, and so sets the step of its groups, shorter. For a = b = ½ the product of both sums of squares is least
    (Cauchy–Schwarz); the step follows the largest weight of a row's group, not their mean square, and less is mostly better.

    Reference: AWQ (arXiv 2306.00978), §3.2, which takes mean magnitudes, b = 0 (in its code b = 1 − a), and any scale.
    """
    squares = torch.stack([w.square().mean(0) / w.square().mean().clamp(min=1e-300) for w in weights]).mean(0)
    x = energy.clamp(min=1e-6 * float(energy.mean()) + 1e-300).log2() / 2
    w = squares.clamp(min=1e-6 * float(squares.mean()) + 1e-300).log2() / 2
    for a, b in EXPONENTS:
        s = a * (x - x.mean()) - b * (w - w.mean())
        yield s.exp2()


def mix_channels(outer: Tensor, seen: Tensor, inner: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps (M, M⁻¹) (n, d, d) to try between two factors: U V becomes (U M⁻¹)(M V), for each of n products.

    `outer` Uᵀ U, `seen` the second moments of V's outputs, `inner` V Vᵀ, all (n, d, d). Rounding U costs about tr(M⁻ᵀ outer M⁻¹)
    tr(M seen Mᵀ), which is least, ‖outer^½ seen^½‖_*², where both are one diagonal matrix; rounding V costs Σ_j of the products of
    the diagonals of M⁻ᵀ outer M⁻¹ and M inner Mᵀ, least with these two so, and spread: every channel alike. Tried are
    mixtures of `seen` and `inner`, spread and not. Roots are damped, so that M is invertible where they are not.
    """
    seen, inner = (m / (outer * m).sum((-1, -2), keepdim=True).clamp(min=1e-300) for m in (seen, inner))
    left = root(outer, DAMPING)
    q = spread(outer.shape[-1])
    for share in SHARES:
        right = root((1 - share) * seen + share * inner, DAMPING)
        u, s, vh = svd(left.mT @ right)
        s = s.clamp(min=1e-300).sqrt()
        forth, back = (left @ u).mT / s[..., None], right @ vh.mT / s[..., None, :]
        yield forth, back
        yield q @ forth, back @ q.T
