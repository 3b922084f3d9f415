"""Head-wise PCA of pre-rotary queries and keys, kept as one low-rank pair per head (FLAT-LLM's later option)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.solvers.linalg import eigh_descending
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class HeadPCA(Solver):
    """q_h ≈ Q_h Q_hᵀ q_h with Q_h the top eigenvectors of E[q_h q_hᵀ] before rotation, biases included; k likewise.

    Costs r · heads · (hidden + d) and one small product per head; the key cache does not shrink.
    Predicted loss: Σ of dropped eigenvalues. Reference: the FLAT-LLM repository's head-wise Q–K support.
    """

    name: ClassVar[str] = "head-pca"

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, role) for role in "qk" if role in shape.roles]

    def heads(self, unit: Unit, shape: Shape) -> int:
        return shape.heads if unit.name == "q" else shape.kv_heads

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        below = (shape.qk * shape.hidden - 1) // (shape.hidden + shape.qk)
        return [*range(1, min(below, shape.qk - 1) + 1), shape.qk]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        if rank >= shape.qk:
            return {}
        return {"linears": {unit.name: {"kind": "head_pair", "rank": rank, "heads": self.heads(unit, shape)}}}

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap(f"{unit.name}.out", "head_gram", heads=self.heads(unit, shape))]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        values, vectors = eigh_descending(stats.mean(self.taps(unit, shape)[0]))
        tails = values.clamp(min=0).flip(-1).cumsum(-1).flip(-1).sum(0)
        keys = [n for n in (unit.name, f"{unit.name}.bias") if n in weights]
        return Frontier(unit, torch.cat([tails, tails.new_zeros(1)]), {"Q": vectors, **{n: weights[n] for n in keys}})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.qk:
            return []
        role, heads = frontier.unit.name, self.heads(frontier.unit, shape)
        q = frontier.factors["Q"][..., :rank]
        a = (q.transpose(1, 2) @ frontier.factors[role].double().unflatten(0, (heads, -1))).flatten(0, 1)
        tensors = {"A.weight": a, "U": q.contiguous()}
        if f"{role}.bias" in frontier.factors:
            bias = frontier.factors[f"{role}.bias"].double().view(heads, -1, 1)
            tensors["bias"] = (q @ (q.transpose(1, 2) @ bias)).flatten()
        return [Edit(role, self.spec(frontier.unit, shape, rank)["linears"][role], tensors)]
