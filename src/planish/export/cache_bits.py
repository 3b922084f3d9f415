"""A KV cache in fewer bits, as the stacks that round one hold it, for measuring what that costs.

    8 bits     a scale per 32 numbers of a token: llama.cpp's q8_0                                   8.5 bits per number
    fewer      a scale and a least number per 32 numbers of a token: llama.cpp's q4_1 at 4 bits      bits + 1
    channel    the same, but keys by channel: 32 tokens share a scale (KIVI, arXiv 2402.02750)        bits + 1

What a model caches is rounded as it is cached, latents as well as keys and values, and attention sees nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from planish.errors import InputError

GROUP = 32  # numbers that share a scale
FINE = 8  # bits without a least number
HALF = 2  # bytes of a scale, and of a least number


@dataclass(frozen=True)
class CacheBits:
    """`bits` of a number, 16 rounds nothing; `channel`: keys by channel."""

    bits: int
    channel: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8, 16):
            raise InputError(f"a cache of {self.bits} bits: expected 16, 8, 6, 5, 4, 3 or 2")

    def count(self, row: int) -> float:
        """Bytes of `row` numbers of one token, scales included; a group that is not full has a scale too."""
        if self.bits == 16:
            return HALF * row
        return row * self.bits / 8 + -(-row // GROUP) * HALF * (1 + (self.bits < FINE))

    def round(self, x: Tensor, keys: bool = False) -> Tensor:
        """Keys or values (batch, heads, tokens, width) as they are read back: groups run over all heads of a token."""
        if self.bits == 16:
            return x
        if keys and self.channel:
            return round_rows(x.transpose(2, 3), self.bits).transpose(2, 3)
        rows = x.transpose(1, 2)
        return round_rows(rows.flatten(2), self.bits).view(rows.shape).transpose(1, 2)


def round_rows(x: Tensor, bits: int) -> Tensor:
    """x (…, n) in groups of up to 32 along the last axis, to nearest; scales in fp16."""
    n = x.shape[-1]
    full = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], -n % GROUP)], -1)
    groups = full.float().unflatten(-1, (-1, GROUP))
    if bits >= FINE:
        step, least = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1), torch.zeros(())
    else:
        least, most = groups.aminmax(dim=-1, keepdim=True)
        step = (most - least) / (2**bits - 1)
    codes = torch.where(step > 0, (groups - least) / step, 0.0).round()
    found = codes * step.half().float() + least.half().float()
    return found.flatten(-2)[..., :n].to(x.dtype)


class RoundedCache(DynamicCache):
    """Rounds what it is given."""

    def __init__(self, kind: CacheBits):
        super().__init__()
        self.kind = kind

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.kind.round(key_states, keys=True), self.kind.round(value_states)
        return super().update(keys, values, layer_idx, *args, **kwargs)


@contextmanager
def caching(model: nn.Module, kind: CacheBits) -> Iterator[None]:
    """Within the context every call of the model attends to keys and values that went through such a cache."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"past_key_values": RoundedCache(kind), "use_cache": True}

    hook = model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
