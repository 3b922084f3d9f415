"""Blocks made canonical, where every role is a linear of its own, and back. (This file travels with compressed models.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attentions import Attention
from .experts import Experts, close_mixture, open_mixture, set_top
from .family import ExpertsRow, Family
from .family import Fused as FusedRow
from .heads import count_heads, head_width, rotary_width
from .modules import Fused, FusedRows, make_linear, set_module


def has_module(block: nn.Module, path: str) -> bool:
    try:
        return block.get_submodule(path) is not None
    except AttributeError:  # another kind of block, or an edit has replaced what held it
        return False


def split_experts(block: nn.Module, family: Family) -> nn.Module:
    """Stacked experts of a stock block become linears, in place, named as most checkpoints store them."""
    row = family.experts
    if row is not None and has_module(block, row.path):
        stock = block.get_submodule(row.path)
        if not isinstance(stock, Experts):
            set_module(block, row.path, Experts(stock, row))
        if row.inside:
            open_mixture(*find_mixture(block, row))
    return block


def find_mixture(block: nn.Module, row: ExpertsRow) -> tuple[nn.Module, nn.Module]:
    """The module that holds a block's experts, and its router."""
    return block.get_submodule(row.path.rpartition(".")[0]), block.get_submodule(row.router_path)


def keep_experts(block: nn.Module, family: Family, kept: Sequence[int], top: int) -> None:
    """Of a canonical block's experts these stay, in place, numbered anew in the given order, with their rows of the router;
    every token reaches `top` of them."""
    row = family.experts
    assert row is not None
    block.get_submodule(row.path).keep(kept)  # type: ignore[operator]
    owners = {row.path.rpartition(".")[0], *(path.rpartition(".")[0] for path in row.router)}
    for path in row.router:
        parent, _, leaf = path.rpartition(".")
        module = block.get_submodule(parent)
        for group in (module._parameters, module._buffers):
            if (old := group.get(leaf)) is not None:
                few = old.detach().index_select(0, torch.as_tensor(list(kept), device=old.device))
                group[leaf] = nn.Parameter(few, requires_grad=False) if isinstance(old, nn.Parameter) else few
    for module in map(block.get_submodule, owners):
        for name, value in (("num_experts", len(kept)), ("out_features", len(kept)), ("top_k", top)):
            if hasattr(module, name):
                setattr(module, name, value)
    set_top(find_mixture(block, row)[1], row, top)


def count_experts(block: nn.Module, family: Family) -> int:
    """Of a canonical block."""
    row = family.experts
    return len(block.get_submodule(row.path).numbers) if row and has_module(block, row.path) else 0  # type: ignore[arg-type]


def split_block(block: nn.Module, family: Family, config) -> nn.Module:
    """Make a stock block canonical, in place: fused linears become `Fused`, stacked experts `Experts`, so that every role is
    a linear of its own."""
    split_experts(block, family)
    attention = block.get_submodule(family.attention) if has_module(block, family.attention) else None
    heads, kv_heads = count_heads(config, attention)
    if family.conv1d:
        swap_linears(block, family, Conv1D, lambda c: make_linear(c.weight.data.T, c.bias.data))
    for row in list_fused(block, family):
        stock = block.get_submodule(row.path)
        if isinstance(stock, Fused):
            continue
        rows = read_rows(block, family, row, heads, kv_heads)
        weights = rows.split(stock.weight.data)
        biases = [None] * len(weights) if stock.bias is None else rows.split(stock.bias.data)
        parts = {r: make_linear(w, b) for r, w, b in zip(row.roles, weights, biases, strict=True)}
        set_module(block, row.path, Fused(parts, rows))
    return block


def list_fused(block: nn.Module, family: Family) -> list[FusedRow]:
    """The family's own linears of several roles, or of other orders of rows, that a block has: our attentions have none."""
    own = has_module(block, family.attention) and isinstance(block.get_submodule(family.attention), Attention)
    return [r for r in family.fused if has_module(block, r.path) and not (own and r.path.startswith(family.attention))]


def read_rows(block: nn.Module, family: Family, row: FusedRow, heads: int, kv_heads: int) -> FusedRows:
    """How one of a stock block's fused linears lays out its rows."""
    out = block.get_submodule(row.path).out_features
    if row.layout == "neighbours":
        attention = block.get_submodule(family.attention)
        return FusedRows(row.layout, [out], heads if row.roles == ("q",) else kv_heads, rotary_width(attention, family))
    if "k" not in row.roles:
        return FusedRows(row.layout, [out // len(row.roles)] * len(row.roles), heads if row.layout == "heads" else 1)
    width = head_width(block.get_submodule(family.attention))  # of queries and keys; values have what is left
    return FusedRows(row.layout, [heads * width, kv_heads * width, out - (heads + kv_heads) * width], kv_heads)


def join_block(block: nn.Module, family: Family, apart: bool = False) -> nn.Module:
    """Undo `split_block` wherever every part of a fused linear is dense and the layout allows it, in place; experts stay apart
    unless checkpoints of the family stack them too, or always (`apart`)."""
    experts = None if apart else family.experts
    if experts is not None and experts.stacked and has_module(block, experts.path):
        split = block.get_submodule(experts.path)
        if isinstance(split, Experts) and split.alike:
            set_module(block, experts.path, split.stack())
            if experts.inside:
                close_mixture(*find_mixture(block, experts))
    for row in list_fused(block, family):
        fused = block.get_submodule(row.path)
        if not isinstance(fused, Fused) or not all(type(getattr(fused, r)) is nn.Linear for r in fused.roles):
            continue
        set_module(block, row.path, make_linear(*fused.join()))
    if family.conv1d:
        swap_linears(block, family, nn.Linear, make_conv1d)
    return block


def swap_linears(block: nn.Module, family: Family, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Replace every module of exactly this kind that stands where the family has a linear, in place."""
    for path in (*family.linears.values(), *(row.path for row in family.fused)):
        if has_module(block, path) and type(module := block.get_submodule(path)) is kind:
            set_module(block, path, make(module))


def make_conv1d(linear: nn.Linear) -> nn.Module:
    """The transposed form in which GPT-2 stores a linear with a bias; one without stays a linear."""
    if linear.bias is None:
        return linear
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv
