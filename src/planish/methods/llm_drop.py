"""LLM-Drop: whole attentions and feed-forwards that hardly turn the residual stream go, one shot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import count_removed, lowest, pick_some, remove, store_removals, survey_removals
from planish.solvers.bypass import Bypass
from planish.stats import Tap


@dataclass(frozen=True)
class LLMDrop(Method):
    """Attentions and feed-forwards that hardly turn the residual stream go, in one shot.

    Problem: a layer whose output points where its input points adds little. Which are these?

    Equation: similarity of an attention or feed-forward f: S = E cos(x, x + f(x)) over all tokens, x the residual stream;
    those with the largest S go (`planish.plan.removal.lowest`, on 1 − S).

    `submodules`: "both": as many attentions as feed-forwards; or one kind. `sparsity`: share of each kind; otherwise `keep`
    decides.
    """

    title: ClassVar[str] = "drop attentions and feed-forwards with the highest input–output cosine"
    reference: ClassVar[str] = "LLM-Drop, arXiv 2406.15786"

    submodules: Literal["both", "attention", "ffn"] = "both"
    sparsity: float | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("attention", "ffn") if self.submodules == "both" else (self.submodules,)

    def solvers(self) -> list[Solver]:
        return [Bypass(self.kinds, kind="zero")]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        taps = {k: Tap(f"{w}.raw", "influence", f"{w}.add") for k, w in (("attention", "attention"), ("ffn", "mlp"))}
        turned: dict[Unit, float] = {}
        for i, _, stats in store_removals(problem, measure, lambda i: [taps[k] for k in self.kinds]):
            turned |= {Unit(i, k): float(stats.mean(taps[k], "rotation")) for k in self.kinds}
        counts, remarks = count_removed(problem, self.kinds, self.sparsity)
        gone = [u for k in self.kinds for u in lowest({u: s for u, s in turned.items() if u.name == k}, counts[k])]
        notes = {"rotation": {str(u): s for u, s in turned.items()}}
        return remove(self.decide(problem, {}, notes=notes, remarks=remarks), problem, gone, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        counts, remarks = count_removed(problem, self.kinds, self.sparsity)
        gone = pick_some(len(problem.shapes), counts)
        return Foreseen(
            remove(self.decide(problem, {}, remarks=remarks), problem, gone, self.sparsity), [survey_removals(problem)]
        )
