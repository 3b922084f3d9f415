"""A dense or compressed folder, read one block at a time, and each block as plain matrices."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from planish.core import Shape
from planish.errors import InputError
from planish.folder.files import open_shard
from planish.folder.source import (
    find_folder,
    index_tensors,
    is_finite,
    load_config,
    no_parameters,
    set_parameter,
)
from planish.modelling.attentions import Attention, Frequencies, Latent, count_heads, head_width, rotary_width
from planish.modelling.blocks import Spec, find_blocks, get_linear, split_block
from planish.modelling.families import FAMILIES, Family
from planish.modelling.modules import Bypass


class Folder:
    """Blocks of a model folder, each with the modules that its spec names; one block in memory at a time."""

    def __init__(self, path: str | Path):
        self.path = find_folder(path)
        self.config = load_config(self.path)
        layout = getattr(self.config, "planish", None)
        self.compressed = layout is not None
        self.family: Family = FAMILIES[layout["family"] if layout else self.config.model_type]
        with no_parameters():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config).eval()
        self.blocks = find_blocks(self.model, self.family)
        self.specs: list[Spec] = layout["blocks"] if layout else [{} for _ in self.blocks]
        self.files = index_tensors(self.path)
        if any("slice" in spec for spec in self.specs):
            raise InputError(
                f"{self.path} has a sliced residual stream (slicegpt), which no export target holds; load it in transformers"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def count(self) -> int:
        """Stored parameters, tied ones once; index tables are none."""
        inside = (self.tensor(n) for n in self.files if n.startswith(self.family.blocks + "."))
        return sum(t.numel() for part in (self.outside().values(), inside) for t in part if t.is_floating_point())

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one stored weight."""
        name = next(n for n in self.files if n.startswith(self.family.blocks + ".") and n.endswith("weight"))
        return self.tensor(name).element_size()

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise InputError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        tensor = open_shard(self.files[name]).read(name)
        if not is_finite(tensor):
            raise InputError(f"tensor {name} of {self.path} holds NaN or infinity: no target could compute anything")
        return tensor

    def block(self, i: int) -> nn.Module:
        """A canonical copy of block i (fused linears split) in the stored dtype."""
        return split_block(self.stored_block(i), self.family, self.config)

    def stored_block(self, i: int) -> nn.Module:
        """A copy of block i under its stored names, in the stored dtype."""
        block = copy.deepcopy(self.blocks[i])
        prefix = f"{self.family.blocks}.{i}."
        for name in block.state_dict():
            if prefix + name not in self.files:
                raise InputError(f"tensor {prefix}{name} is missing in {self.path}: the checkpoint is incomplete")
            set_parameter(block, name, self.tensor(prefix + name))
        return block

    def outside(self) -> dict[str, Tensor]:
        """Stored tensors that belong to no block."""
        inside = self.family.blocks + "."
        names = [n for n in self.files if not n.startswith(inside)]
        if self.config.tie_word_embeddings and len(names) > 1:
            names = [n for n in names if n != "lm_head.weight"]  # some checkpoints store the embedding twice
        return {n: self.tensor(n) for n in names}

    @cached_property
    def stock_config(self) -> Any:
        """The original model's configuration."""
        ours = ("planish", "per_layer_config", "auto_map", "architectures", "model_type")
        settings = {k: v for k, v in self.config.to_dict().items() if k not in ours}
        return getattr(transformers, self.family.classes[0])(**settings)

    @cached_property
    def stock(self) -> PreTrainedModel:
        """The original architecture, without weights."""
        with torch.device("meta"):
            return getattr(transformers, self.family.classes[2])(self.stock_config)

    def shape(self, i: int) -> Shape:
        """Sizes of the ORIGINAL block i, before compression."""
        block = split_block(find_blocks(self.stock, self.family)[i], self.family, self.config)
        heads, kv_heads = count_heads(self.config)
        attention = block.get_submodule(self.family.attention)
        down = get_linear(block, self.family, "down")
        return Shape(
            i,
            self.config.hidden_size,
            heads,
            kv_heads,
            head_width(attention),
            get_linear(block, self.family, "v").out_features // kv_heads,
            down.in_features,
            rotary_width(attention, self.family),
            self.family.gated,
            self.family.qk_norm,
            self.family.parallel and bool(getattr(self.config, "use_parallel_residual", True)),
        )


@dataclass
class Plain:
    """One block as plain matrices, whatever forms it was stored in.

    `attention`: "full"; "none" (adds nothing); "linear" (adds `linear` @ normed input + `linear.bias`). `mlp`: "full";
    "none"; "linear" (adds `down` @ (`up` @ normed input) + `down.bias`).
    `tensors`: role → weight (out, in), "role.bias" → (out,), and the norms "attention_norm", "mlp_norm", "q_norm",
    "k_norm". `extra`: weights that multiplying low-rank forms back costs.
    """

    shape: Shape
    attention: str
    mlp: str
    v: int
    width: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
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


def plain_block(folder: Folder, i: int) -> Plain:
    """Block i as plain matrices. Refuses (InputError) what no plain block can hold, with the reason."""
    block, family, shape, spec = folder.block(i), folder.family, folder.shape(i), folder.specs[i]
    plain = Plain(shape, "full", "full", shape.v, shape.intermediate)
    tensors = plain.tensors
    attention = block.get_submodule(family.attention)
    roles = list(family.roles)
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
    mlp = block.get_submodule(family.mlp or family.path("up"))
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
    if plain.mlp == "full":
        plain.width = tensors["down"].shape[1]
    if isinstance(attention, Attention):
        plain.v = attention.v
        if attention.qk != shape.qk or attention.pairs is not None:
            _restore_pairs(plain, attention)
    for name, path in (("attention_norm", family.attention_norm), ("mlp_norm", family.mlp_norm)):
        norm = block.get_submodule(path)
        if not isinstance(norm, nn.Identity):
            tensors[name] = norm.weight.data  # type: ignore[assignment]
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            tensors[name] = getattr(attention, name).weight.data
    return plain


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
    if grow == 0:
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
