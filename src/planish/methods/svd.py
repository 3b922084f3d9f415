"""Plain truncated SVD of every linear: the baseline of baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from planish.calibrate.measure import Measurements
from planish.calibrate.stream import read_weights
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.threshold import scale_scores, spread_by_threshold
from planish.solvers.linalg import svd
from planish.solvers.linear import LinearSVD


@dataclass(frozen=True)
class SVD(Method):
    """Truncated SVD of the weights: the baseline of baselines, which sees no text.

    Problem: the matrix of rank r nearest to W.

    Equation: W̃ = U_r Σ_r V_rᵀ (Eckart and Young; `planish.solvers.linear.LinearSVD.decompose`).

    `allocation`: "uniform", or "welore" (arXiv 2407.11239): rank = #{i: (σ_i − σ_min) / (σ_max − σ_min) ≥ τ} per matrix, one τ for
    all by bisection on the budget; dense where a pair would not be smaller
    (`planish.plan.threshold.spread_by_threshold`). `form`: "pair" or "pivoted".
    """

    title: ClassVar[str] = "truncated SVD of the weights"
    reference: ClassVar[str] = "Eckart & Young, 1936"

    allocation: Literal["uniform", "welore"] = "uniform"
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="plain", form=self.form)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if self.allocation == "uniform" or problem.keep == 1:
            return self.decide(problem, problem.spread(lambda unit: 1.0))
        scores: dict[Unit, Tensor] = {}
        for i in range(len(problem.shapes)):
            weights = read_weights(measure.stream.block(i), measure.stream)
            scores |= {u: scale_scores(svd(weights[u.name])[1]) for u in problem.block_units(i)}
        return self.decide(problem, spread_by_threshold(problem, scores))
