"""Keys and values that later blocks read, carried from block to block behind the residual stream's own channels.

So a block's input is all that it depends on but its tokens: several walks with other cuts need not know of each other, and what
comes back at the keys and values that others read reaches the block that gave them.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.modelling.canonical import has_module
from planish.modelling.families import Family
from planish.modelling.heads import count_heads, head_width


class Shared(NamedTuple):
    """Keys and values of one `kind` of attention, (batch, kv_heads, tokens, width) each: 2 · kv_heads · width channels."""

    kind: str
    kv_heads: int
    width: int


def list_shared(blocks: Sequence[nn.Module], family: Family, config: Any) -> list[tuple[Shared, ...]]:
    """For every block, what its input carries: what an earlier one gives and it, or a later one, reads."""
    found = [m.get_submodule(family.attention) if has_module(m, family.attention) else None for m in blocks]
    attentions = [a if hasattr(a, "store_full_length_kv") else None for a in found]
    reads = {a.layer_type: i for i, a in enumerate(attentions) if a is not None and a.is_kv_shared_layer}
    every = list[tuple[Shared, ...]]()
    given = dict[str, Shared]()
    for i, a in enumerate(attentions):
        every.append(tuple(s for kind, s in given.items() if reads.get(kind, -1) >= i))
        if a is not None and a.store_full_length_kv:
            kind: str = a.layer_type  # type: ignore[assignment]
            given[kind] = Shared(kind, count_heads(config, a)[1], head_width(a))
    return [*every, ()]


def unpack(hidden: Tensor, shared: Sequence[Shared], width: int) -> tuple[Tensor, UserDict]:
    """The stream (batch, tokens, width) and kind → keys and values, of what a block is given."""
    found = UserDict[str, tuple[Tensor, ...]]()
    own, *rest = hidden.split([width, *(s.kv_heads * s.width for s in shared for _ in "kv")], -1)
    for n, s in enumerate(shared):
        parts = (t.unflatten(-1, (s.kv_heads, s.width)).transpose(1, 2) for t in rest[2 * n : 2 * n + 2])
        found[s.kind] = tuple(parts)
    return own, found


def pack(hidden: Tensor, states: UserDict, shared: Sequence[Shared]) -> Tensor:
    """The inverse: what the next block is given."""
    if not shared:
        return hidden
    parts = (t.transpose(1, 2).flatten(2).to(hidden.dtype) for s in shared for t in states[s.kind])
    return torch.cat([hidden, *parts], -1)
