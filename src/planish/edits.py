"""Edits that several solvers make: low-rank linears, fewer value dimensions, fewer neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.core import Edit, Weights
from planish.linalg import pivot, svd


def input_site(role: str) -> str:
    """Linears that read the same input share its statistics."""
    return {"q": "q.in", "k": "q.in", "v": "q.in", "gate": "up.in", "up": "up.in"}.get(role, f"{role}.in")


def low_rank_edit(role: str, b: Tensor, a: Tensor, form: str) -> Edit:
    """Edit that gives `role` the weight B A in the given form."""
    rank = a.shape[0]
    if form == "pair":
        u, r = torch.linalg.qr(b)  # balance the factors: Uᵀ U = I up to √σ on both sides
        left, s, vh = svd(r @ a)
        return Edit(
            role,
            {"kind": "pair", "rank": rank},
            {"B.weight": (u @ left) * s.sqrt(), "A.weight": s.sqrt()[:, None] * vh},
        )
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
