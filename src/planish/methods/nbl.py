"""NBL: the attentions that are most nearly linear become linear maps of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Edit, Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen, survey
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import count_removed, lowest, pick_some, remove
from planish.solvers.bypass import Bypass, compute_correlations
from planish.stats import Tap


@dataclass(frozen=True)
class NBL(Method):
    """The attentions that are most nearly linear become linear maps of the residual stream.

    Problem: some attentions do hardly more than a linear map of their input. Which, and which map?

    Equation: f̂(x) = W x + b by least squares on the raw residual stream, so the norm goes too, W dense; one shot
    (`planish.solvers.bypass.fit`). Score of an attention: Σ_i (1 − ρ_i²) over the canonical correlations ρ of x and x + f;
    those with the least are replaced (`planish.solvers.bypass.compute_correlations`).

    `sparsity`: share of the attentions that goes; otherwise `keep` decides. `ridge`: of the least squares, relative.

    The paper replaces up to 12 of 32 attentions; the smallest `keep` replaces nearly all of them. The embedded model has a
    perplexity of 39.7 with half of them replaced, and of 204 at keep 0.8, where 11 of 12 are (dense 21.4).

    Differs from the public code: sums instead of stored activations; Cholesky with a small ridge, no explicit inverse.
    """

    title: ClassVar[str] = "attentions replaced by least-squares linear maps, chosen by canonical correlation"
    reference: ClassVar[str] = "NBL, arXiv 2505.21077"
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    sparsity: float | None = None
    ridge: float = 1e-9

    def solvers(self) -> list[Solver]:
        return [Bypass(("attention",), attention_rank=1.0, input="raw", gate=False, basis="pca", ridge=self.ridge)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        solver = self.solvers()[0]
        assert isinstance(solver, Bypass)
        gram = Tap("attention.add", "gram")
        scores: dict[Unit, float] = {}
        edits: dict[Unit, list[Edit]] = {}
        for i, _, stats in measure.forward(lambda shape: [gram, *solver.taps(Unit(shape.block, "attention"), shape)]):
            unit, shape = Unit(i, "attention"), problem.shapes[i]
            train, held = solver.moments(unit, stats)
            rho = compute_correlations(train + held, stats.sums[gram]["sum"])
            scores[unit] = float((1 - rho.square()).sum())
            edits[unit] = solver.truncate(solver.decompose(unit, {}, stats, shape), 0, shape)
        counts, remarks = count_removed(problem, ("attention",), self.sparsity)
        gone = lowest(scores, counts["attention"])
        notes = {"scores": {str(u): s for u, s in scores.items()}}
        planned = self.decide(problem, {}, edits={u.block: edits[u] for u in gone}, notes=notes, remarks=remarks)
        return remove(planned, problem, gone, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        counts, remarks = count_removed(problem, ("attention",), self.sparsity)
        gone = pick_some(len(problem.shapes), counts)
        planned = self.decide(problem, {}, edits={u.block: () for u in gone}, remarks=remarks)
        return Foreseen(remove(planned, problem, gone, self.sparsity), [survey(problem)])
