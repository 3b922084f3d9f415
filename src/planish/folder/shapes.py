"""Sizes of a block, read off its modules; the linears of experts in a checkpoint that stores them stacked."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from planish.core import ExpertShape, Shape
from planish.errors import InputError
from planish.modelling.attentions import count_heads, head_width, rotary_width
from planish.modelling.blocks import get_linear, read_layout
from planish.modelling.families import Family


def read_shape(block: nn.Module, family: Family, config, i: int, n_blocks: int) -> Shape:
    """Sizes of block i, a canonical stock block (empty ones will do)."""
    layout = read_layout(block, family, config)
    heads, kv_heads = count_heads(config) if layout.has("attention") else (0, 0)
    attention = block.get_submodule(family.attention) if heads else nn.Module()
    others = [(r, get_linear(block, family, r).weight) for g in layout.groups for r in g.linears if r in family.others]
    others += [(name.removesuffix(".weight"), block.get_parameter(name)) for name in layout.rest]
    return Shape(
        i,
        config.hidden_size,
        heads,
        kv_heads,
        head_width(attention) if heads else 0,
        get_linear(block, family, "v").out_features // kv_heads if heads else 0,
        get_linear(block, family, "down").in_features if layout.has("mlp") else 0,
        rotary_width(attention, family) if heads else 0,
        family.gated,
        family.qk_norm,
        layout.parallel,
        n_blocks,
        read_experts(block, family, config, sum(g.name.startswith("expert.") for g in layout.groups)),
        tuple((role, len(w), w.numel() // len(w)) for role, w in others),
    )


def read_experts(block: nn.Module, family: Family, config, number: int) -> ExpertShape | None:
    if family.experts is None or not number:
        return None
    return ExpertShape(
        number, getattr(config, family.experts.top), get_linear(block, family, "expert.0.down").in_features
    )


def split_names(
    names: dict[str, str], family: Family, read: Callable[[str], tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Where a checkpoint stores experts stacked: name of each linear's weight → which rows (first, count) it is of its stored
    tensor, whose shape is `read` by its name. In `names` (name → stored name) these linears take the place of the whole.
    """
    found: dict[str, tuple[int, int]] = {}
    row = family.experts
    if row is None:
        return found
    for name, stored in list(names.items()):
        where, _, leaf = name.rpartition(".")
        parts = {"gate_up_proj": row.names[:2], "down_proj": row.names[2:]}.get(leaf, ())
        if not parts or not where.endswith(f".{row.path}"):
            continue
        shape = read(stored)
        if len(shape) != 3 or shape[1] % len(parts):
            raise InputError(f"tensor {stored} has shape {shape}, expected (experts, rows, columns) of stacked experts")
        count = shape[1] // len(parts)
        del names[name]
        for n, part in enumerate(f"{where}.{j}.{part}.weight" for j in range(shape[0]) for part in parts):
            names[part], found[part] = stored, (n * count, count)
    return found
