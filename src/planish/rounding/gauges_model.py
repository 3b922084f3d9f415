"""A whole model in memory, block by block in the basis that rounding costs least in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from planish.modelling.blocks import Layout, find_blocks, get_linear, has_linear, read_layout
from planish.modelling.canonical import join_block, split_block
from planish.modelling.families import FAMILIES, Family
from planish.rounding.gauges import Grams, balance
from planish.rounding.gauges_linears import Rounding
from planish.rounding.gauges_maps import round_to_nearest


@torch.no_grad()
def balance_model(model: nn.Module, ids: Tensor, rounding: Rounding = round_to_nearest) -> list[str]:
    """Choose the basis of every block of a causal LM, compressed or not, in place; lines "block: what changed".

    `ids` (n, seq): tokens whose inputs are measured, in one pass: their second moments of all blocks stay in memory, fp32.
    `rounding`: see `planish.rounding.gauges.balance`. The model computes what it did.
    """
    declared = getattr(model.config, "planish", None)
    family = FAMILIES[declared["family"] if declared else model.config.model_type]
    blocks = [split_block(b, family, model.config) for b in find_blocks(model, family)]
    layouts = [read_layout(b, family, model.config) for b in blocks]
    grams: list[Grams] = [{} for _ in blocks]
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # which says where attention looks
    handles = [h for b, layout, g in zip(blocks, layouts, grams, strict=True) for h in watch(b, layout, g)]
    handles += [h for b, g in zip(blocks, grams, strict=True) for h in watch_attention(b, family, g)]
    try:
        for row in ids:
            model(row[None], use_cache=False)
    finally:
        model.set_attn_implementation(attention)
        for handle in handles:
            handle.remove()
    told = []
    for i, block in enumerate(blocks):
        told += [f"block {i}, {line}" for line in balance(block, layouts[i], grams[i], rounding)]
        grams[i].clear()
        join_block(block, family)
    return told


def watch_attention(block: nn.Module, family: Family, grams: Grams) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that sum up, as "v", Σ x̄ x̄ᵀ over tokens and heads, x̄ = Σ_t a_t x_t what attention averages v's inputs to."""
    if not has_linear(block, family, "v") or "attention" in family.fixed:
        return []
    inputs: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def add(module: nn.Module, args: object, outputs: tuple[Tensor, ...]) -> None:
        weights = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
        if weights is not None:
            x = (weights.float() @ inputs.pop().unsqueeze(1).float()).flatten(0, -2)
            grams["v"] = grams.get("v", 0) + x.T @ x / weights.shape[1]

    v = get_linear(block, family, "v")
    return [v.register_forward_pre_hook(look), block.get_submodule(family.attention).register_forward_hook(add)]


def watch(block: nn.Module, layout: Layout, grams: Grams) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that sum up Σ x xᵀ of the inputs of a block's linears; q, k and v read one tensor, gate and up too."""
    paths = {role: path for group in layout.groups for role, path in group.linears.items()}
    leaders = {role: LEADERS.get(role, role) for role in paths}

    def add(role: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            grams[role] = grams[role].addmm_(x.T, x) if role in grams else x.T @ x

        return look

    chosen = {r for r, leader in leaders.items() if leader == r or leader not in paths}
    return [block.get_submodule(paths[r]).register_forward_pre_hook(add(r)) for r in chosen]


LEADERS = {"k": "q", "v": "q", "gate": "up"}  # role → another that reads the same
