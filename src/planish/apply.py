"""Edits put into a block, and what a block then holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from planish.core import Edit, Shape, Unit, Weights
from planish.errors import InputError
from planish.modelling.blocks import Spec, get_linear, install, read_factor
from planish.modelling.canonical import keep_experts, split_block
from planish.modelling.families import Family
from planish.modelling.modules import Bypass, list_matrices
from planish.stats import is_finite


def merge_forms(shape: Shape, edits: list[Edit]) -> Spec:
    """The block's spec from all its edits."""
    parts = ("attention", "mlp", "experts")
    return merge_specs(
        shape, [{e.target: e.form} if e.target in parts else {"linears": {e.target: e.form}} for e in edits]
    )


def merge_specs(shape: Shape, several: Iterable[Spec]) -> Spec:
    """One spec from several of one block (`Solver.spec`); the attention's q–k and v parts become one module."""
    spec: Spec = {}
    for part in several:
        for target, form in part.items():
            if target == "attention" and form["kind"] == "own" and target not in spec:
                spec[target] = {"kind": "own", "qk": shape.qk, "v": shape.v}
            spec.setdefault(target, {}).update(form)
    if "experts" in spec and "linears" in spec:  # those that stay are numbered anew
        gone = {
            r for r in spec["linears"] if r.startswith("expert.") and int(r.split(".")[1]) >= spec["experts"]["number"]
        }
        spec["linears"] = {r: form for r, form in spec["linears"].items() if r not in gone}
    return spec


def renumber(edits: Sequence[Edit]) -> list[Edit]:
    """Edits of experts' linears as they are numbered once some have gone; without those of these."""
    gone = next((e for e in edits if e.target == "experts"), None)
    if gone is None:
        return list(edits)
    places = {f"expert.{old}": f"expert.{new}" for new, old in enumerate(gone.tensors["kept"].tolist())}
    found = []
    for edit in edits:
        own, _, role = edit.target.rpartition(".")
        if not own.startswith("expert."):
            found.append(edit)
        elif own in places:
            found.append(replace(edit, target=f"{places[own]}.{role}"))
    return found


def apply_edits(block: nn.Module, edits: list[Edit], family: Family, config, shape: Shape) -> Spec:
    """Replace modules of a canonical block in place, in its own dtype; returns its spec (empty when nothing changed).

    Experts' linears are named by the numbers that the experts have in the uncut block.
    """
    edits = renumber(edits)
    spec = merge_forms(shape, edits)
    if not spec:
        return spec
    factor = read_factor(block, family)
    for edit in edits:
        if edit.target == "experts":
            keep_experts(block, family, edit.tensors["kept"].tolist(), edit.form["top"])
    install(block, spec, family, config)
    split_block(block, family, config)
    for edit in edits:
        if not edit.tensors or edit.target == "experts":
            continue
        if edit.target == "attention":
            module = block.get_submodule(family.attention)
        elif edit.target == "mlp":
            module = block.get_submodule(family.mlp or family.path("up"))
        else:
            module = get_linear(block, family, edit.target)
        for name, tensor in share_factor(edit, factor).items():
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


def share_factor(edit: Edit, factor: float) -> dict[str, Tensor]:
    """An edit's tensors; those of a bypass so that what it gives times the block's factor is what it was fitted to."""
    if factor == 1 or edit.form["kind"] != "bypass":
        return edit.tensors
    last = {"gate", "shift", "W.weight" if "W.weight" in edit.tensors else "V.weight"}
    return {name: t / factor if name in last else t for name, t in edit.tensors.items()}


def store(edits: Sequence[Edit], weights: Weights, unit: Unit) -> list[Edit]:
    """A unit's edits in the weights' own dtype, in which they will be applied."""
    kind, where = next(iter(weights.values())).dtype, f"block {unit.block}, {unit.name}"
    return [replace(e, tensors={n: narrow(t, kind, where) for n, t in e.tensors.items()}) for e in edits]


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
    matrices = sum(p.numel() for p in list_matrices(block).values())
    vectors = [v for m in block.modules() if isinstance(m, Bypass) for v in (m.gate, m.shift)]
    return matrices + sum(v.numel() for v in vectors if v is not None)


def is_empty(spec: Spec) -> bool:
    """Whether a block's submodules both contribute nothing: it is left out of the written model."""
    forms = [spec.get("attention", {}), spec.get("mlp", {})]
    return all(f.get("kind") == "bypass" and not (f["rank"] or f["gate"] or f["shift"]) for f in forms)
