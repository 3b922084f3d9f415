"""SVD-LLM: truncation-aware whitening; V2's loss-based ratios and V1's least-squares update as options."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import log
from typing import ClassVar, Literal

import torch

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.frontiers import measure_frontiers
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.threshold import scale_scores, spread_by_threshold
from planish.solvers.linear import LinearSVD


@dataclass(frozen=True)
class SVDLLM(Method):
    """Every linear is truncated at its least output error on the uncompressed model's inputs.

    Problem: the W̃ of rank r with the least E‖(W − W̃) x‖².

    Equation: with S Sᵀ = E[x xᵀ]: W̃ = [W S]_r S⁻¹; the error is Σ_{i>r} σ_i² of W S, exactly (truncation-aware whitening).
    Here by the eigenproblem of the smaller side, without an inverse (`planish.solvers.linalg.whitened_svd`).

    `allocation`: "uniform", or "v2": within each matrix type the removed share is ∝ 1 / (1 + log(L / L_min)), L the
    truncation loss at the uniform ratio (V2, Alg. 1); or "welore" (arXiv 2407.11239) on the singular values of W S: one threshold
    for all, each matrix's values scaled to [0, 1] (`planish.plan.threshold.spread_by_threshold`). `update`: V1's sequential least
    squares of B on the compressed prefix's inputs. `form`: "pivoted" stores a rank r in r(m + n − r) weights instead of r(m + n):
    the same budget buys
    higher ranks; or "pair".

    Differs from the papers: V2's 1 / log L depends on the number of tokens and breaks for L ≤ 1; ours does neither. V1's
    optional fine-tuning is left out.
    """

    title: ClassVar[str] = "whitened truncated SVD of every linear"
    reference: ClassVar[str] = "SVD-LLM, arXiv 2403.07378; V2, arXiv 2503.12340"

    allocation: Literal["uniform", "v2", "welore"] = "uniform"
    update: bool = False
    form: Literal["pair", "pivoted"] = "pair"

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return "both" if self.update else "dense"

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="whitened", update=self.update, form=self.form)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        uniform = problem.spread(lambda unit: 1.0)
        if self.allocation == "uniform":
            return self.decide(problem, uniform)
        predict: Solver = LinearSVD(metric="whitened", form=self.form)  # whatever the solve updates
        frontiers = measure_frontiers(replace(problem, units=dict.fromkeys(problem.units, predict)), measure)
        if self.allocation == "welore":
            squares = {u: -torch.as_tensor(f.loss).diff() for u, f in frontiers.items()}
            scores = {u: scale_scores(x.clamp(min=0).sqrt()) for u, x in squares.items()}
            return self.decide(problem, spread_by_threshold(problem, scores))
        groups: dict[str, dict[Unit, float]] = defaultdict(dict)
        for unit, frontier in frontiers.items():
            loss = float(frontier.loss[uniform[unit]]) ** 0.5
            if loss > 0:
                groups[unit.name][unit] = loss
        keep: dict[Unit, float] = {}
        for losses in groups.values():
            least = min(losses.values())
            weight = {u: 1 / (1 + log(loss / least)) for u, loss in losses.items()}
            mean = sum(weight.values()) / len(weight)
            keep |= {u: max(0.05, 1 - (1 - problem.keep) * w / mean) for u, w in weight.items()}
        return self.decide(problem, problem.spread(lambda unit: keep.get(unit, 1.0)))
