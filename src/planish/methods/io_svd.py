"""IO-SVD: linears whitened by their inputs and by the curvature of the KL at their outputs, ranks by one competition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.calibrate.losses import Probe
from planish.calibrate.measure import Measurements
from planish.core import Solver
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen, survey_back
from planish.plan.frontiers import measure_gradients
from planish.plan.planned import Planned
from planish.plan.problem import Problem, choose_ranks
from planish.solvers.two_sided import TwoSided


@dataclass(frozen=True)
class IOSVD(Method):
    """Every linear is truncated where the model's predictions move least, and the least missed directions of all go first.

    Problem: the W̃ of all linears, within one budget, with the least sum of E[(gᵀ (W − W̃) x)²], g what moves the model's
    predicted distribution.

    Equation: with R = E[x xᵀ] and G = E[g gᵀ], per linear the SVD of G^½ W R^½; keeping r directions loses
    ½ Σ_{i>r} σ_i² (`planish.solvers.two_sided.TwoSided`). G is the curvature of the KL over each token's five likeliest words,
    Σ_k p_k (e_k − p)(e_k − p)ᵀ, sent back through the model (`planish.calibrate.losses.output_gradient`).

    `allocation`: "greedy": directions of all linears compete by what they lose per weight
    (`planish.plan.problem.choose_ranks`), or "uniform". `form`: "pair", or "pivoted", which stores a rank in fewer weights.

    Differs from the paper: the curvature of a token takes one pass back with random signs; the paper's greedy removal scores
    directions by first-order estimates of the calibration loss, here by the second-order one that whitens, and what greedy
    removal looks for is found exactly where a linear's losses fall ever more slowly with its rank; the 8-bit hybrid is left out.
    """

    title: ClassVar[str] = "SVD of every linear whitened on both sides, by the curvature of the KL; ranks compete"
    reference: ClassVar[str] = "IO-SVD, arXiv 2605.15626"
    probe: ClassVar[Probe] = "curvature"

    allocation: Literal["greedy", "uniform"] = "greedy"
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [TwoSided(form=self.form)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if problem.keep == 1:
            return self.decide(problem, {})
        frontiers = measure_gradients(problem, measure, self.probe)
        if self.allocation == "uniform":
            ranks = problem.spread(lambda unit: 1.0)
        else:
            ranks = choose_ranks(problem, {u: problem.curve(f) for u, f in frontiers.items()})
        return self.decide(problem, ranks, frontiers=frontiers)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        return Foreseen(self.decide(problem, problem.spread(lambda unit: 1.0)), [survey_back(problem)])

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)
