"""Edits put into a block, and what a block then holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.core import Edit, Shape
from planish.errors import InputError
from planish.modelling.blocks import Spec, get_linear, install, split_block
from planish.modelling.families import Family
from planish.modelling.modules import Bypass
from planish.stats import is_finite


def merge_forms(shape: Shape, edits: list[Edit]) -> Spec:
    """The block's spec from all its edits; edits of the attention's q–k and v parts become one module."""
    spec: Spec = {}
    for edit in edits:
        if edit.target in ("attention", "mlp"):
            form = spec.setdefault(edit.target, {})
            if edit.form["kind"] == "own" and not form:
                form |= {"kind": "own", "qk": shape.qk, "v": shape.v}
            form |= edit.form
        else:
            spec.setdefault("linears", {})[edit.target] = dict(edit.form)
    return spec


def apply_edits(block: nn.Module, edits: list[Edit], family: Family, config, shape: Shape) -> Spec:
    """Replace modules of a canonical block in place, in its own dtype; returns its spec (empty when nothing changed)."""
    spec = merge_forms(shape, edits)
    if not spec:
        return spec
    install(block, spec, family, config)
    split_block(block, family, config)
    for edit in edits:
        if not edit.tensors:
            continue
        if edit.target == "attention":
            module = block.get_submodule(family.attention)
        elif edit.target == "mlp":
            module = block.get_submodule(family.mlp or family.path("up"))
        else:
            module = get_linear(block, family, edit.target)
        for name, tensor in edit.tensors.items():
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            old = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if old is None or old.shape != tensor.shape:
                raise ValueError(f"edit of {edit.target}: {name} has shape {tuple(tensor.shape)}, form {edit.form}")
            value = narrow(tensor, old.dtype, f"block {shape.block}, {edit.target}").contiguous()
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
    return spec


def narrow(tensor: Tensor, kind: torch.dtype, where: str) -> Tensor:
    """The tensor in the dtype that weights are stored in (whole numbers as they are), or an error where it does not fit."""
    if not tensor.is_floating_point():
        return tensor
    value = tensor.to(kind)
    if not is_finite(value):
        if not is_finite(tensor):
            raise ValueError(f"edit of {where} is not finite")
        raise InputError(
            f"the new weights of {where} do not fit into {str(kind)[6:]}: they reach {float(tensor.abs().max()):.3g}; "
            "store the model in bfloat16 or float32 first"
        )
    return value


def count_block(block: nn.Module) -> int:
    """Weights of a block's linears, as they are: matrices of every form, gates and shifts of bypasses; no norms, no biases."""
    matrices = sum(p.numel() for p in block.parameters() if p.ndim >= 2)
    vectors = [v for m in block.modules() if isinstance(m, Bypass) for v in (m.gate, m.shift)]
    return matrices + sum(v.numel() for v in vectors if v is not None)


def is_empty(spec: Spec) -> bool:
    """Whether a block's submodules both contribute nothing: it is left out of the written model."""
    forms = [spec.get("attention", {}), spec.get("mlp", {})]
    return all(f.get("kind") == "bypass" and not (f["rank"] or f["gate"] or f["shift"]) for f in forms)
