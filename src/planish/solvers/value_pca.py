"""Head-wise PCA of the values, absorbed into V and O (FLAT-LLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from planish.core import Edit, Frontier, Shape, Unit, Weights
from planish.solvers.forms import ValueSolver, value_edits
from planish.solvers.linalg import eigh_descending
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class ValuePCA(ValueSolver):
    """Per kv group g: Q_g = top eigenvectors of E[v vᵀ] (v: v_proj output with its bias); W_v ← Qᵀ W_v, b_v ← Qᵀ b_v,
    W_o^h ← W_o^h Q_g for the group's query heads. Attention mixes tokens, never channels, so the two absorb exactly.

    Predicted loss: Σ of dropped eigenvalues over groups = E‖v − Q Qᵀ v‖².
    Reference: FLAT-LLM (arXiv 2505.23966) §3. Differs from the paper: the V bias is handled (it is part of v).
    """

    name: ClassVar[str] = "value-pca"

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("v.out", "head_gram", heads=shape.kv_heads)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        values, vectors = eigh_descending(stats.mean(self.taps(unit, shape)[0]))
        tails = values.clamp(min=0).flip(-1).cumsum(-1).flip(-1).sum(0)
        loss = torch.cat([tails, tails.new_zeros(1)])
        return Frontier(unit, loss, {"Q": vectors, **{n: weights[n] for n in ("v", "o", "v.bias") if n in weights}})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.v:
            return []
        q = frontier.factors["Q"][..., :rank]  # (kv_heads, v, rank)
        v = frontier.factors["v"].double().unflatten(0, (shape.kv_heads, -1))
        o = frontier.factors["o"].double().unflatten(1, (shape.heads, -1))  # (hidden, heads, v)
        bias = frontier.factors.get("v.bias")
        small_v = (q.transpose(1, 2) @ v).flatten(0, 1)
        small_o = torch.einsum("dhv,hvr->dhr", o, q.repeat_interleave(shape.groups, 0)).flatten(1)
        small_bias = None if bias is None else torch.einsum("gvr,gv->gr", q, bias.double().view(len(q), -1)).flatten()
        return value_edits(small_v, small_o, small_bias, rank)
