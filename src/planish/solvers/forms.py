"""Edits that several solvers make: low-rank linears, fewer value dimensions, fewer neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.core import Edit, Weights
from planish.solvers.linalg import pivot


def input_site(role: str) -> str:
    """Linears that read the same input share its statistics."""
    return {"q": "q.in", "k": "q.in", "v": "q.in", "gate": "up.in", "up": "up.in"}.get(role, f"{role}.in")


def low_rank_edit(role: str, b: Tensor, a: Tensor, form: str, orthogonal: bool = False) -> Edit:
    """Edit that gives `role` the weight B A in the given form.

    A pair is stored with orthogonal columns in B (`orthogonal`: they are already), each as long as its row of A:
    rounding either factor to the stored dtype then costs about as much as rounding W would.
    """
    rank = a.shape[0]
    if form == "pair":
        if not orthogonal:
            b, r = torch.linalg.qr(b)
            a = r @ a
        tiny = torch.finfo(a.dtype).tiny
        scale = (a.norm(dim=1).clamp(min=tiny) / b.norm(dim=0).clamp(min=tiny)).sqrt()
        return Edit(role, {"kind": "pair", "rank": rank}, {"B.weight": b * scale, "A.weight": a / scale[:, None]})
    p = pivot(b, a)
    tensors = {"P.weight": p.base, "C.weight": p.coefficients, "order": p.order()}
    return Edit(role, {"kind": "pivoted", "rank": rank}, tensors)


def value_edits(v: Tensor, o: Tensor, bias: Tensor | None, rank: int) -> list[Edit]:
    """Edits that give an attention `rank` value dimensions per head: v (kv·rank, hidden), o (hidden, heads·rank)."""
    tensors = {"weight": v} | ({} if bias is None else {"bias": bias})
    return [
        Edit("v", {"kind": "dense", "out": v.shape[0], "in": v.shape[1]}, tensors),
        Edit("o", {"kind": "dense", "out": o.shape[0], "in": o.shape[1]}, {"weight": o}),
        Edit("attention", {"kind": "own", "v": rank}, {}),
    ]


def qk_edits(weights: Weights, q: Tensor, k: Tensor, rank: int, pairs: Tensor | None = None) -> list[Edit]:
    """Edits that map every head's queries by q (heads, d, rank)ᵀ and keys by k (kv_heads, d, rank)ᵀ, biases included.

    `pairs` (kv_heads, m): which rotary pairs the first 2m channels are, where some were dropped.
    """
    edits = []
    for role, maps in (("q", q), ("k", k)):
        w = (maps.mT @ weights[role].double().unflatten(0, (len(maps), -1))).flatten(0, 1)
        tensors = {"weight": w}
        if f"{role}.bias" in weights:
            tensors["bias"] = (maps.mT @ weights[f"{role}.bias"].double().view(len(maps), -1, 1)).flatten()
        edits.append(Edit(role, {"kind": "dense", "out": w.shape[0], "in": w.shape[1]}, tensors))
    form: dict = {"kind": "own", "qk": rank}
    if pairs is None:
        return [*edits, Edit("attention", form, {})]
    return [*edits, Edit("attention", form | {"pairs": pairs.shape[1]}, {"pairs": pairs})]


def neuron_edits(weights: Weights, kept: Tensor, down: Tensor) -> list[Edit]:
    """Edits that keep these neurons, with the given down projection (hidden, rank)."""
    edits = []
    for role in ("gate", "up"):
        if role in weights:
            w, bias = weights[role][kept], weights.get(f"{role}.bias")
            tensors = {"weight": w} | ({} if bias is None else {"bias": bias[kept]})
            edits.append(Edit(role, {"kind": "dense", "out": w.shape[0], "in": w.shape[1]}, tensors))
    bias = weights.get("down.bias")
    tensors = {"weight": down} | ({} if bias is None else {"bias": bias})
    return [*edits, Edit("down", {"kind": "dense", "out": down.shape[0], "in": down.shape[1]}, tensors)]
