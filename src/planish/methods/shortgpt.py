"""ShortGPT: the blocks that hardly turn the residual stream go, one shot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.core import Plan, Solver, Unit
from planish.methods.method import Method
from planish.plan.removal import make_plan, remove_blocks
from planish.solvers.bypass import Bypass
from planish.stats import Tap

if TYPE_CHECKING:
    from planish.job import Job


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

    def plan(self, job: Job) -> Plan:
        tap = Tap("block.in", "angle", "block.out")
        influence: dict[int, float] = {}
        job.measure(
            lambda shape: [tap], lambda i, block, stats: influence.update({i: 1 - float(stats.mean(tap, "cosine"))})
        )
        job.notes["influence"] = influence
        n = remove_blocks(job, self.sparsity)
        gone = sorted(influence, key=lambda i: (influence[i], i))[:n]
        return make_plan(job, [Unit(i, name) for i in gone for name in ("attention", "ffn")], self.sparsity)
