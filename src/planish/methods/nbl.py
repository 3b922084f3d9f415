"""NBL: the attentions that are most nearly linear become linear maps of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.core import Edit, Plan, Solver, Unit
from planish.methods.method import Method
from planish.plan.removal import count_removed, lowest, make_plan
from planish.solvers.bypass import Bypass, compute_correlations
from planish.stats import Tap

if TYPE_CHECKING:
    from planish.job import Job


@dataclass(frozen=True)
class NBL(Method):
    """The attentions that are most nearly linear become linear maps of the residual stream.

    Problem: some attentions do hardly more than a linear map of their input. Which, and which map?

    Equation: f̂(x) = W x + b by least squares on the raw residual stream, so the norm goes too, W dense; one shot
    (`planish.solvers.bypass.fit`). Score of an attention: Σ_i (1 − ρ_i²) over the canonical correlations ρ of x and x + f;
    those with the least are replaced (`planish.solvers.bypass.compute_correlations`).

    `sparsity`: share of the attentions that goes; otherwise `keep` decides. `ridge`: of the least squares, relative.

    Differs from the public code: sums instead of stored activations; Cholesky with a small ridge, no explicit inverse.
    """

    title: ClassVar[str] = "attentions replaced by least-squares linear maps, chosen by canonical correlation"
    reference: ClassVar[str] = "NBL, arXiv 2505.21077"
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    sparsity: float | None = None
    ridge: float = 1e-9

    def solvers(self) -> list[Solver]:
        return [Bypass(("attention",), attention_rank=1.0, input="raw", gate=False, basis="pca", ridge=self.ridge)]

    def plan(self, job: Job) -> Plan:
        solver = self.solvers()[0]
        assert isinstance(solver, Bypass)
        gram = Tap("attention.add", "gram")
        scores: dict[Unit, float] = {}
        edits: dict[Unit, list[Edit]] = {}

        def use(i, block, stats) -> None:
            unit = Unit(i, "attention")
            train, held = solver.moments(unit, stats)
            rho = compute_correlations(train + held, stats.sums[gram]["sum"])
            scores[unit] = float((1 - rho.square()).sum())
            edits[unit] = solver.truncate(solver.decompose(unit, {}, stats, job.shapes[i]), 0, job.shapes[i])

        job.measure(lambda shape: [gram, *solver.taps(Unit(shape.block, "attention"), shape)], use)
        gone = lowest(scores, count_removed(job, ("attention",), self.sparsity)["attention"])
        job.notes["scores"] = {str(u): s for u, s in scores.items()}
        job.edits = {u.block: edits[u] for u in gone}
        return make_plan(job, gone, self.sparsity)
