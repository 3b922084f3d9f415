"""HOPE: experts that answer together are counted together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Solver
from planish.methods.method import Method
from planish.plan.experts import count_kept
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.experts import Experts


@dataclass(frozen=True)
class Hope(Method):
    """Whole experts go, as many in every block: the set that gives least together, not those that give least alone.

    Problem: two experts that answer the same tokens can stand in for one another, but not if both go. Which set of a given size
    is missed least?

    Equation: min over sets D of pᵀ F p, p the indicator of D, F_ij the mean of a_i a_j over the tokens that reach both i and j,
    a = g ‖f‖ with g the gate and f the expert's output. By forward selection, then swaps of one that goes for one that stays
    while they help (`planish.solvers.experts.choose_sets`).

    `prior`: tokens by which the diagonal is drawn towards the mean of all experts, and what pairs have in common towards 0.

    Differs from the paper: no relaxation before the swaps.
    """

    title: ClassVar[str] = "drop the set of experts with the least co-activation"
    reference: ClassVar[str] = "HOPE, arXiv 2609.18916"

    prior: float = 4.0

    def solvers(self) -> list[Solver]:
        return [Experts("together", self.prior)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        ranks, remarks = count_kept(problem)
        return self.decide(problem, ranks, remarks=remarks)

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)
