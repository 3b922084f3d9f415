"""REAP and its relatives: whole experts go, those that are asked least, or give least when they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.core import Solver
from planish.methods.method import Method
from planish.plan.experts import count_kept
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.experts import Experts


@dataclass(frozen=True)
class Reap(Method):
    """Whole experts go, as many in every block; what is left is a smaller model of the same family.

    Problem: a router sends every token to a few of many feed-forwards. Which of these can the model best do without, if
    their tokens go to the others instead?

    Equation: S_j = (1/N_j) Σ g_j ‖f_j‖ (eq. 9) over the N_j calibration tokens that reach expert j, g_j the gate as the model
    uses it (renormalised where it renormalises), f_j the expert's output; those with the least S_j go
    (`planish.solvers.experts.Experts`). The router's rows, biases and correction biases go with them.

    `criterion`: "reap"; "frequency" N_j; "mass" Σ g_j; "gated" Σ g_j ‖f_j‖; "man" (1/N_j) Σ ‖f_j‖; or "nats", predicted loss: half
    the mean of (uᵀe_j)², u the gradient at the mixture's output, e_j what that changes by without j and with the expert that
    takes its place (`planish.solvers.experts.removals`), counted together for all that go. `prior`: tokens by which means
    are drawn towards the mean of all experts.

    All blocks with experts keep the same number: stock programs hold nothing else. Where a router chooses among groups, each
    keeps the same number. If fewer are left than a token reaches, it reaches all of them.

    Differs from the paper: `prior`, without which an expert that no token reached has no score.
    """

    title: ClassVar[str] = "drop whole experts by frequency, routing mass, REAP, gated mass or output norms"
    reference: ClassVar[str] = "REAP, arXiv 2510.13999"

    criterion: Literal["reap", "frequency", "mass", "gated", "man", "nats"] = "reap"
    prior: float = 4.0

    def solvers(self) -> list[Solver]:
        return [Experts(self.criterion, self.prior)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        ranks, remarks = count_kept(problem)
        if self.criterion == "nats" and any(problem.full(u) > r for u, r in ranks.items()):
            for i, _, stats in measure.backward(lambda shape: problem.taps(problem.block_units(shape.block))):
                measure.stored[i] = stats
        return self.decide(problem, ranks, remarks=remarks)

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)
