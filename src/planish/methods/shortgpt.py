"""ShortGPT: the blocks that hardly turn the residual stream go, one shot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import pick_some, remove, remove_blocks, store_removals, survey_removals
from planish.solvers.bypass import Bypass
from planish.stats import Tap


@dataclass(frozen=True)
class ShortGPT(Method):
    """The blocks that hardly turn the residual stream go, wherever they are, in one shot.

    Problem: which whole blocks can go?

    Equation: block influence BI = 1 − E cos(input, output) over all tokens; the blocks with the least go
    (`planish.plan.removal.lowest`). The result is the stock architecture with fewer blocks.

    `sparsity`: share of the blocks that goes; otherwise `keep` decides.

    Differs from public code: the last block's output is taken before the final norm.
    """

    title: ClassVar[str] = "drop the blocks of least influence"
    reference: ClassVar[str] = "ShortGPT, arXiv 2403.03853"

    sparsity: float | None = None

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        tap = Tap("block.in", "angle", "block.out")
        influence = {
            i: 1 - float(stats.mean(tap, "cosine")) for i, _, stats in store_removals(problem, measure, lambda i: [tap])
        }
        n, remarks = remove_blocks(problem, self.sparsity)
        gone = sorted(influence, key=lambda i: (influence[i], i))[:n]
        units = [Unit(i, name) for i in gone for name in ("attention", "ffn")]
        planned = self.decide(problem, {}, notes={"influence": influence}, remarks=remarks)
        return remove(planned, problem, units, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        n, remarks = remove_blocks(problem, self.sparsity)
        gone = pick_some(len(problem.shapes), {"attention": n, "ffn": n})
        return Foreseen(
            remove(self.decide(problem, {}, remarks=remarks), problem, gone, self.sparsity), [survey_removals(problem)]
        )
