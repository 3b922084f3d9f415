"""Joint reduction of queries and keys that are not rotated: the score matrix at its best rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.solvers.forms import qk_edits, qk_spec
from planish.solvers.linalg import reduce_scores
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class QKJoint(Solver):
    """Per kv group: q_h ← Qᵀ q_h, k ← Pᵀ k with r columns, so that E(q_hᵀ k − q̃_hᵀ k̃)² over independent query and key
    tokens, summed over the group's query heads, is least. The softmax scale stays that of the original head dimension.

    `form` "svd" is the optimum (Eckart–Young of the score matrix), computed from the d × d second moments of q and k
    with their biases (uncentred, so biases are exact) instead of the paper's hidden × hidden roots: equal to 1e-13.
    "select" keeps the channels with the largest E[q_j²] E[k_j²] unchanged (MoDeGPT's CR).
    Predicted loss: that score error, before scaling, summed over heads; exact in both forms.
    Reference: A3 (arXiv 2505.12942) Theorem 2 and its GQA form; MoDeGPT (arXiv 2408.09632) Type II.
    Differs from the papers: biases. Families that normalise q and k, or rotate them, are left to others.
    """

    name: ClassVar[str] = "qk-joint"
    form: Literal["svd", "select"] = "svd"

    @property
    def exempt(self) -> dict[str, str]:
        return {"monotone": "one more channel may undo what cancelled"} if self.form == "select" else {}

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "qk")] if shape.heads and shape.rotary == 0 and not shape.qk_norm else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return range(1, shape.qk + 1)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return qk_spec(shape, rank)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("q.out", "head_gram", heads=shape.heads), Tap("k.out", "head_gram", heads=shape.kv_heads)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        q, k = (stats.mean(tap) for tap in self.taps(unit, shape))
        q = q.unflatten(0, (shape.kv_heads, -1)).sum(1)  # (kv_heads, d, d), over the group
        back, p, loss = reduce_scores(q, k, self.form == "select")
        names = [n for r in "qk" for n in (r, f"{r}.bias") if n in weights]
        return Frontier(unit, loss, {"maps": {"q": back, "k": p}, **{n: weights[n] for n in names}})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.qk:
            return []
        q, k = (frontier.factors["maps"][r][..., :rank] for r in "qk")
        return qk_edits(frontier.factors, q.repeat_interleave(shape.groups, 0), k, rank)
