"""One block of a model's folder as plain matrices, whatever forms it is stored in."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.core import Shape
from planish.errors import InputError
from planish.folder.source import FolderSource, open_folder
from planish.modelling.attentions import Attention, Frequencies, Latent
from planish.modelling.blocks import Spec, find_norms, get_linear, has_linear, has_module
from planish.modelling.families import Family
from planish.modelling.modules import Bypass


def open_plain(folder: str | Path) -> FolderSource:
    """A folder whose blocks can be plain matrices."""
    source = open_folder(folder)
    if any("slice" in spec for spec in source.specs):
        raise InputError(
            f"{source.folder} has a sliced residual stream (slicegpt), which no export target holds; "
            "load it in transformers"
        )
    return source


@dataclass
class Plain:
    """One block as plain matrices, whatever forms it was stored in.

    `attention`: "full"; "none" (adds nothing); "linear" (adds `linear` @ normed input + `linear.bias`). `mlp`: "full";
    "none"; "linear" (adds `down` @ (`up` @ normed input) + `down.bias`). Either is "other" where the block has no linears of
    these roles: experts, attention on latents.
    `tensors`: role → weight (out, in), "role.bias" → (out,), and the norms "attention_norm", "mlp_norm", "q_norm",
    "k_norm". `others`: the block's names → tensors of further groups' linears ("mixer.in") that were in another form. `extra`:
    weights that multiplying low-rank forms back costs.
    """

    shape: Shape
    attention: str
    mlp: str
    v: int
    width: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    extra: int = 0


def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear of any form; products are taken in fp64 and rounded once, to fp32 where less is stored."""
    if isinstance(module, nn.Linear):
        return module.weight.data, None if module.bias is None else module.bias.data
    dtype = product_dtype(next(module.parameters()).dtype)
    weight = copy.deepcopy(module).double().dense().data.to(dtype)  # type: ignore[operator]
    bias = module.B.bias if hasattr(module, "B") else module.bias
    return weight, None if bias is None else bias.data  # type: ignore[union-attr, return-value]


def product_dtype(stored: torch.dtype) -> torch.dtype:
    """What products of stored factors are kept in: a product of bf16 numbers needs more digits than bf16 has."""
    return torch.promote_types(stored, torch.float32)


def count_weights(module: nn.Module) -> int:
    """Weights of a linear form or a bypass (its gate included), without what stays a vector in every form."""
    gate = getattr(module, "gate", None)
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2) + (0 if gate is None else gate.numel())


def plain_block(source: FolderSource, i: int, experts: bool = True) -> Plain:
    """Block i as plain matrices; `experts`: read them too. Refuses (InputError) what no plain block can hold, with the reason."""
    block, family, shape, spec = source.block(i, experts=experts), source.family, source.shape(i), source.specs[i]
    plain = Plain(shape, "full", "full", shape.v, shape.intermediate)
    tensors = plain.tensors
    attention = find_module(block, family.attention)  # another mixer may stand in its place
    roles = [r for r in family.roles if has_linear(block, family, r)]
    if isinstance(attention, Bypass):
        plain.attention = (
            "linear" if attention.rank or attention.gate is not None or attention.shift is not None else "none"
        )
        if plain.attention == "linear":
            check_normed(spec["attention"], f"block {i}'s attention")
            tensors["linear"] = bypass_matrix(attention, shape.hidden)
            plain.extra += tensors["linear"].numel() - count_weights(attention)
            if attention.shift is not None:
                tensors["linear.bias"] = attention.shift.data
        plain.v, roles = 0, [r for r in roles if r not in "qkvo"]
    mlp = find_module(block, family.mlp or family.path("up"))
    if isinstance(mlp, Bypass):
        plain.mlp = "linear" if mlp.rank or mlp.gate is not None or mlp.shift is not None else "none"
        plain.width, roles = 0, [r for r in roles if r in "qkvo"]
        if plain.mlp == "linear":
            check_normed(spec["mlp"], f"block {i}'s MLP")
            up, down = bypass_factors(mlp, shape.hidden)
            tensors |= {"up": up, "down": down}
            plain.extra += up.numel() + down.numel() - count_weights(mlp)
            plain.width = len(up)
            if mlp.shift is not None:
                tensors["down.bias"] = mlp.shift.data
    plain.attention = plain.attention if shape.heads else "other"
    plain.mlp = plain.mlp if shape.intermediate else "other"
    for role in roles:
        module = get_linear(block, family, role)
        weight, bias = plain_linear(module)
        if role == "k" and isinstance(attention, (Frequencies, Latent)):
            weight, bias = rebuild_keys(attention, weight), None if bias is None else rebuild_keys(attention, bias)
            plain.extra -= attention.U.numel()
        plain.extra += weight.numel() - count_weights(module)
        tensors[role] = weight
        if bias is not None:
            tensors[f"{role}.bias"] = bias
    multiply_others(plain, block, family)
    if plain.mlp == "full":
        plain.width = tensors["down"].shape[1]
    if isinstance(attention, Attention):
        plain.v = attention.v
        if attention.qk != shape.qk or attention.pairs is not None:
            _restore_pairs(plain, attention)
    for name, path in zip(("attention_norm", "mlp_norm"), find_norms(block, family), strict=True):
        norm = block.get_submodule(path) if path else nn.Identity()
        if getattr(norm, "weight", None) is not None:
            tensors[name] = norm.weight.data  # type: ignore[assignment]
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            tensors[name] = getattr(attention, name).weight.data
    return plain


def multiply_others(plain: Plain, block: nn.Module, family: Family) -> None:
    for path in family.others.values():
        module = find_module(block, path)
        if module is not None and not isinstance(module, nn.Linear):
            weight, bias = plain_linear(module)
            plain.others |= {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})
            plain.extra += weight.numel() - count_weights(module)


def find_module(block: nn.Module, path: str) -> nn.Module | None:
    return block.get_submodule(path) if has_module(block, path) else None


def rebuild_keys(attention: Frequencies | Latent, t: Tensor) -> Tensor:
    """k_proj's weight or bias as that of the keys themselves; fp64 product, kept like other products."""
    wide = copy.deepcopy(attention).double().rebuild(t.double())
    return wide.to(product_dtype(t.dtype))


def check_normed(form: Spec, what: str) -> None:
    if form["raw"]:
        raise InputError(
            f"{what} is replaced by a linear map of the residual stream before the norm; no stock architecture computes "
            "that. It runs in transformers and vLLM (the compressed folder itself)"
        )


def bypass_factors(module: Bypass, hidden: int) -> tuple[Tensor, Tensor]:
    """(up, down) with down @ up = the bypass's matrix."""
    if module.gate is None and module.V is not None and module.W is not None:
        return module.V.weight.data, module.W.weight.data
    matrix = bypass_matrix(module, hidden)
    return matrix, torch.eye(hidden, dtype=matrix.dtype)


def bypass_matrix(module: Bypass, hidden: int) -> Tensor:
    """diag(gate) + W V."""
    dtype = product_dtype(next(module.parameters()).dtype)
    m = torch.zeros(hidden, hidden, dtype=torch.float64)
    if module.gate is not None:
        m += module.gate.data.double().diag()
    if module.V is not None:
        v = module.V.weight.data.double()
        m += v if module.W is None else module.W.weight.data.double() @ v
    return m.to(dtype)


def _restore_pairs(plain: Plain, attention: Attention) -> None:
    """Give q and k their original head size back: kept channels at their old places, zeros elsewhere (scores are equal)."""
    shape, t = plain.shape, plain.tensors
    if "q_norm" in t:
        raise InputError(
            "query and key channels were removed under a norm over the head; no stock architecture holds that"
        )
    half = shape.rotary // 2
    before = sum(t[r].numel() for r in "qk")
    if attention.pairs is None:
        at = torch.arange(attention.qk).repeat(shape.kv_heads, 1)
    else:
        pairs = attention.pairs.long()  # (kv_heads, p)
        rest = torch.arange(shape.rotary, shape.rotary + attention.qk - 2 * pairs.shape[1]).repeat(shape.kv_heads, 1)
        at = torch.cat([pairs, pairs + half, rest], dim=1)
    for role, heads in (("q", shape.heads), ("k", shape.kv_heads)):
        rows = at.repeat_interleave(heads // shape.kv_heads, dim=0)  # (heads, qk)
        for name in (role, f"{role}.bias"):
            if name in t:
                small = t[name].unflatten(0, (heads, attention.qk))
                full = small.new_zeros(heads, shape.qk, *small.shape[2:])
                full.scatter_(1, rows.view(*rows.shape, *[1] * (small.ndim - 2)).expand_as(small), small)
                t[name] = full.flatten(0, 1)
    plain.extra += sum(t[r].numel() for r in "qk") - before


def pad_values(plain: Plain, v: int) -> None:
    """Give every head `v` value dimensions: the new rows of V and columns of O are zero, so nothing changes."""
    t, shape = plain.tensors, plain.shape
    if plain.v == v:
        return
    for name in ("v", "v.bias"):
        if name in t:
            small = t[name].unflatten(0, (shape.kv_heads, plain.v))
            t[name] = torch.cat([small, small.new_zeros(shape.kv_heads, v - plain.v, *small.shape[2:])], 1).flatten(
                0, 1
            )
    small = t["o"].unflatten(1, (shape.heads, plain.v))
    t["o"] = torch.cat([small, small.new_zeros(shape.hidden, shape.heads, v - plain.v)], 2).flatten(1)
    plain.v = v


def pad_width(plain: Plain, width: int) -> None:
    """Give the MLP `width` neurons: the new ones are zero, so nothing changes."""
    t, grow = plain.tensors, width - plain.width
    if grow == 0 or plain.mlp == "other":
        return
    like = next(iter(t.values()))
    hidden = plain.shape.hidden
    for role in ("gate", "up") if plain.shape.gated else ("up",):
        t[role] = torch.cat([t.get(role, like.new_zeros(0, hidden)), like.new_zeros(grow, hidden)])
        if f"{role}.bias" in t:
            t[f"{role}.bias"] = torch.cat([t[f"{role}.bias"], like.new_zeros(grow)])
    t["down"] = torch.cat([t.get("down", like.new_zeros(hidden, 0)), like.new_zeros(hidden, grow)], 1)
    t.setdefault("mlp_norm", like.new_ones(hidden))
    plain.width = width


def zero_attention(plain: Plain, v: int, biases: Any = ()) -> None:
    """Give a block without attention one that adds nothing."""
    shape, like = plain.shape, next(iter(plain.tensors.values()))
    sizes = {"q": shape.heads * shape.qk, "k": shape.kv_heads * shape.qk, "v": shape.kv_heads * v}
    for role, out in sizes.items():
        plain.tensors[role] = like.new_zeros(out, shape.hidden)
        if role in biases:
            plain.tensors[f"{role}.bias"] = like.new_zeros(out)
    plain.tensors["o"] = like.new_zeros(shape.hidden, shape.heads * v)
    plain.tensors.setdefault("attention_norm", like.new_ones(shape.hidden))
    if shape.qk_norm:
        plain.tensors |= {"q_norm": like.new_ones(shape.qk), "k_norm": like.new_ones(shape.qk)}
    plain.attention, plain.v = "full", v
