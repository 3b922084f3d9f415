"""Selection of rotary pairs; channels that are not rotated are reduced jointly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.shapes import Float
from planish.solvers.forms import qk_edits, qk_spec
from planish.solvers.linalg import reduce_scores
from planish.stats import Stats, Tap

NORMALISED = "queries and keys are left as they are: this family normalises them over all channels of a head"


@dataclass(frozen=True)
class RotaryPairs(Solver):
    """Every kv group keeps its own m rotary pairs (j, j + rotary/2) of q and k, unchanged, and t directions of the
    channels that are not rotated; rank = 2m + t channels per head, the split with the least predicted loss.

    `score` orders pairs, with E over the tokens before rotation and summed over the group's query heads:
    "product" = E[q_a²] E[k_a²] + E[q_b²] E[k_b²] (A3; MoDeGPT's order is the same); "energy" = ½ E|q_f|² E|k_f|², the
    score energy that pair f carries averaged over relative rotations, invariant to rotations within the pair.
    `rest` "svd": unrotated channels by the optimal joint reduction; "select": the largest E[q_j²] E[k_j²].
    Predicted loss: the score error of independent tokens at uniformly spread relative rotations, before scaling.

    Reference: A3 (arXiv 2505.12942), the CUR form for rotary attention, in half-split layout.
    Differs from the paper: "energy"; unrotated channels; models that normalise q and k are left as they are, because
    the norm needs all channels of q and k, and dropping the rows that make them would change it.
    """

    name: ClassVar[str] = "rotary-pairs"
    score: Literal["product", "energy"] = "product"
    rest: Literal["svd", "select"] = "svd"

    @property
    def exempt(self) -> dict[str, str]:
        return {"monotone": "one more channel may undo what cancelled"} if self.rest == "select" else {}

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "qk")] if shape.rotary > 0 and not shape.qk_norm else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return [*range(2, shape.qk, 2), shape.qk]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        """Where only some channels are rotated, statistics decide how many `pairs` are kept: at most so many."""
        return qk_spec(shape, rank, rank // 2)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("q.out", "head_gram", heads=shape.heads), Tap("k.out", "head_gram", heads=shape.kv_heads)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        q, k = (stats.mean(tap) for tap in self.taps(unit, shape))
        q = q.unflatten(0, (shape.kv_heads, -1)).sum(1)  # (kv_heads, d, d), over the group
        half, rotary = shape.rotary // 2, shape.rotary
        qq, kk = (m.diagonal(dim1=1, dim2=2)[:, :rotary].unflatten(1, (2, half)) for m in (q, k))
        energy = qq.sum(1) * kk.sum(1) / 2  # (kv_heads, half)
        order = ((qq * kk).sum(1) if self.score == "product" else energy).argsort(descending=True, stable=True)
        dropped = energy.gather(1, order).sum(0).flip(0).cumsum(0).flip(0)
        pair_loss = torch.cat([dropped, dropped.new_zeros(1)])
        back, p, rest_loss = reduce_scores(q[:, rotary:, rotary:], k[:, rotary:, rotary:], self.rest == "select")
        split, loss = split_ranks(pair_loss, rest_loss, shape.qk)
        names = [n for r in "qk" for n in (r, f"{r}.bias") if n in weights]
        factors = {"order": order, "q.rest": back, "k.rest": p, "split": split}
        return Frontier(unit, loss, {**factors, **{n: weights[n] for n in names}})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.qk:
            return []
        f, half = frontier.factors, shape.rotary // 2
        pairs = f["split"][rank]
        kept = f["order"][:, :pairs].sort(1).values  # (kv_heads, pairs)
        channels = torch.cat([kept, kept + half], 1)
        pick = torch.eye(shape.qk, dtype=torch.float64)[channels].mT  # (kv_heads, qk, 2 · pairs)
        maps = []
        for role in "qk":
            rest = f[f"{role}.rest"][..., : rank - 2 * pairs]
            padded = torch.nn.functional.pad(rest, (0, 0, shape.rotary, 0))
            maps.append(torch.cat([pick, padded], 2))
        q, k = maps
        return qk_edits(f, q.repeat_interleave(shape.groups, 0), k, rank, kept if pairs < half else None)


def split_ranks(
    pairs: Float[Tensor, " m"], rest: Float[Tensor, " r"], full: int
) -> tuple[list[int], Float[Tensor, " ranks"]]:
    """How many pairs to keep at every rank 0 … full with the least pairs[m] + rest[r − 2m], and that loss (full + 1,).

    At least one pair stays. Odd ranks, except full, are not admissible and repeat the even one below.
    """
    split, loss = [0], [pairs[0] + rest[0]]
    for rank in range(1, full + 1):
        even = rank if rank == full else rank - rank % 2
        options = [m for m in range(1, len(pairs)) if 0 <= even - 2 * m < len(rest)]
        if not options:
            split.append(0)
            loss.append(loss[0])
            continue
        best = min(options, key=lambda m: float(pairs[m] + rest[even - 2 * m]))
        split.append(best)
        loss.append(pairs[best] + rest[even - 2 * best])
    return split, torch.stack(loss)
