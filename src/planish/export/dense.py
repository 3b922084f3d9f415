"""Folders of plain matrices: low-rank linears multiplied back, and on request everything filled up to a stock architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from planish.core import Shape
from planish.errors import InputError
from planish.export.plain import (
    Plain,
    find_module,
    open_plain,
    pad_values,
    pad_width,
    plain_block,
    plain_linear,
    zero_attention,
)
from planish.export.written import (
    DTYPES,
    Written,
    check_apart,
    check_dtype,
    check_finite,
    describe_products,
    keep_dtype,
)
from planish.folder.config import name_head, write_config
from planish.folder.skeleton import set_parameter
from planish.folder.source import FolderSource
from planish.folder.writer import Writer, copy_untouched
from planish.modelling.attentions import Attention
from planish.modelling.blocks import Spec, find_blocks, get_linear, has_linear
from planish.modelling.canonical import split_block
from planish.modelling.modules import Bypass, set_module

LOW_RANK = ("pair", "pivoted", "head_pair")


def export_dense(
    folder: str | Path, output: str | Path, *, pad: bool = False, dtype: str | None = None, overwrite: bool = False
) -> Written:
    """Write a folder without low-rank forms. The logits stay the same up to rounding of the products to fp32.

    `dtype`: f32, f16 or bf16 for everything; None keeps what is stored as it is and products in fp32 (the configuration
    then says float32, so that loading does not round them).

    It loads with nothing of planish where the stock architecture then holds the shapes. `pad`: make it so, by filling up
    value dimensions, rotary pairs, MLP widths and removed submodules with zeros; the notes say what that costs.
    """
    check_dtype(dtype)
    source = open_plain(folder)
    check_apart(Path(output), source.folder)
    writer = Writer(Path(output), source.n_blocks, overwrite, tower=source.tower)
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    specs: list[Spec] = []
    notes: list[str] = []
    back, wide = 0, False
    try:
        width = measure_width(source) if pad else 0
        for i, shape in enumerate(shapes):
            if pad:
                plain = plain_block(source, i)
                back += plain.extra
                block, spec = make_padded(source, plain, width)
            else:
                block = source.block(i)
                spec, grown = make_dense(block, source, copy.deepcopy(source.specs[i]), shape)
                back += grown
            specs.append(spec)
            wide |= any(p.dtype == torch.float32 and p.ndim >= 2 for p in block.parameters())
            block = block if dtype is None else block.to(DTYPES[dtype])
            for name, parameter in block.named_parameters():
                check_finite(f"{source.family.blocks}.{i}.{name}", parameter.data)
            writer.block(i, block, source.family)
        config = copy.deepcopy(source.stock_config)
        if dtype or wide:
            config.dtype = DTYPES[dtype or "f32"]
        kind = write_config(writer.text, config, source.family, specs, shapes, source.tower)
        writer.shard(0, keep_dtype(name_head(source.outside(), source.family, kind), dtype))
        copy_untouched(source, writer)
        source.copy_files(writer.partial)
        size, total = writer.bytes, writer.parameters
        weights, stored = size - writer.index_bytes, source.count() + source.untouched.count
        writer.close()
    except BaseException:
        writer.abort()
        raise
    if back:
        notes.append(f"low-rank forms and removed rotary pairs multiplied back to dense: {back:+,} weights")
    if total - stored != back:
        notes.append(f"filled up with zeros: {total - stored - back:+,} weights")
    if kind != "native":
        notes.append("blocks differ in shape: the folder still needs planish or its own modelling files (or --pad)")
    notes += describe_products(total, weights, source.itemsize) if dtype is None else []
    return Written("dense", str(writer.output), kind, dtype or "as stored", total, stored, size, "copied", notes)


def make_dense(block: nn.Module, source: FolderSource, spec: Spec, shape: Shape) -> tuple[Spec, int]:
    """Replace low-rank linears of a canonical block, in place; its new spec and how many weights that adds."""
    attention = find_module(block, source.family.attention)
    linears = spec.get("linears", {})
    grown = 0
    for role, form in list(linears.items()):
        inside = isinstance(attention, Bypass) if role in "qkvo" else spec.get("mlp", {}).get("kind") == "bypass"
        if inside or form["kind"] not in LOW_RANK:
            continue
        module = get_linear(block, source.family, role)
        weight, bias = plain_linear(module)
        grown += weight.numel() - sum(p.numel() for p in module.parameters() if p.ndim >= 2)
        linear = make_linear(weight, bias)
        if role in "qkvo" and isinstance(attention, Attention):
            setattr(attention, f"{role}_proj", linear)
        else:
            set_module(block, source.family.path(role), linear)
        linears[role] = {"kind": "dense", "out": weight.shape[0], "in": weight.shape[1]}
        if tuple(weight.shape) == shape.linear(role):
            del linears[role]
    if "linears" in spec and not linears:
        del spec["linears"]
    return spec, grown


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def measure_width(source: FolderSource) -> int:
    """The widest MLP of a model that can be filled up."""
    if any(source.shape(i).experts for i in range(source.n_blocks)):
        raise InputError(
            f"a {source.family.model_type} is not filled up to its stock architecture: export without --pad"
        )
    return max(plain_block(source, i).width for i in range(source.n_blocks))


def make_padded(source: FolderSource, plain: Plain, width: int) -> tuple[nn.Module, Spec]:
    """One block with stock shapes and the given MLP width, and its spec; experts are left out."""
    shape, i = plain.shape, plain.shape.block
    if "linear" in (plain.attention, plain.mlp):
        raise InputError(f"block {i} holds a linear map in place of a submodule; no stock block can hold that exactly")
    source.shape(i)
    block = copy.deepcopy(find_blocks(source.empty, source.family)[i])
    split_block(block, source.family, source.stock_config)
    roles = [r for r in source.family.roles if has_linear(block, source.family, r)]
    biases = [r for r in roles if get_linear(block, source.family, r).bias is not None]
    if plain.attention == "none":
        zero_attention(plain, shape.v, biases)
        if "o" in biases:
            plain.tensors["o.bias"] = torch.zeros(shape.hidden, dtype=plain.tensors["o"].dtype)
    if plain.attention != "other":
        pad_values(plain, shape.v)
    pad_width(plain, width)
    for role in roles:
        linear = get_linear(block, source.family, role)
        linear.weight = nn.Parameter(plain.tensors[role], requires_grad=False)
        if linear.bias is not None:
            zeros = plain.tensors[role].new_zeros(len(plain.tensors[role]))
            linear.bias = nn.Parameter(plain.tensors.get(f"{role}.bias", zeros), requires_grad=False)
    original = source.block(i, experts=False).state_dict() | plain.others
    for name, parameter in block.state_dict().items():
        if not parameter.is_meta or (source.family.experts and name.startswith(f"{source.family.experts.path}.")):
            continue
        # what is not there is a norm that a removed submodule left behind
        ones = 0.0 if name.endswith("bias") else 1 - source.family.norm_offset
        left = torch.full(parameter.shape, ones, dtype=next(iter(plain.tensors.values())).dtype)
        set_parameter(block, name, original.get(name, left))
    if width == shape.intermediate:
        return block, {}
    sizes = {"gate": (width, shape.hidden), "up": (width, shape.hidden), "down": (shape.hidden, width)}
    forms = {r: {"kind": "dense", "out": sizes[r][0], "in": sizes[r][1]} for r in source.family.roles if r in sizes}
    return block, {"linears": forms}
