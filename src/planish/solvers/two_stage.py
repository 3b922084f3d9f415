"""Truncation compensated by a second SVD of its residual (ResSVD / ERC-SVD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Unit, Weights
from planish.linalg import LowRank, whitened_svd
from planish.solvers.linear import LinearSVD, low_rank_edit
from planish.stats import Stats


@dataclass(frozen=True)
class TwoStageSVD(LinearSVD):
    """W ≈ [W]_{r − r_r} + [W − [W]_{r − r_r}]_{r_r} with r_r = β · mn/(m + n), stored as one pair of rank r.

    The first stage minimises the output error; `residual_metric` "plain" compensates in weight space, which trades
    calibration error for robustness; "whitened" is provably one truncation at rank r (a test shows it).
    Reference: ERC-SVD (arXiv 2505.20112) Alg. 2, Eq. 5; β is a share of the break-even rank, not of r.
    """

    name: ClassVar[str] = "two-stage-svd"
    beta: float = 0.05
    residual_metric: Literal["plain", "whitened"] = "plain"

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w = weights[unit.name].double()
        gram = stats.mean(self.gram_tap(unit))
        losses = _Losses(self, w, gram, shape.linear(unit.name))
        return Frontier(unit, losses, {"losses": losses})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["losses"].factors(rank)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]


class _Losses(Sequence[float]):
    """Output error of every rank, computed when asked for: each rank has a residual of its own."""

    def __init__(self, solver: TwoStageSVD, w: Tensor, gram: Tensor, size: tuple[int, int]):
        self.solver, self.w, self.gram = solver, w, gram
        self.full = min(size)
        self.residual_rank = round(solver.beta * size[0] * size[1] / sum(size))
        self.low: LowRank = whitened_svd(w, gram)

    def __len__(self) -> int:
        return self.full + 1

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (out, rank), A (rank, in)."""
        second = min(self.residual_rank, rank - 1) if rank > 0 else 0
        b, a = self.low.B[:, : rank - second], self.low.A[: rank - second]
        if not second:
            return b, a
        rest = whitened_svd(self.w - b @ a, self.gram if self.solver.residual_metric == "whitened" else None)
        return torch.cat([b, rest.B[:, :second]], 1), torch.cat([a, rest.A[:second]])

    def __getitem__(self, rank):  # type: ignore[override]
        if not 0 <= rank <= self.full:
            raise IndexError(rank)
        if rank == self.full:
            return 0.0
        b, a = self.factors(rank)
        error = self.w - b @ a
        return float(((error @ self.gram) * error).sum().clamp(min=0))
