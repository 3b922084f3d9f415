"""SLEB: blocks go one at a time, each time the one whose removal costs the least loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.core import Plan, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.removal import make_plan, remove_blocks, saving, search_greedily
from planish.solvers.bypass import Bypass, drop_edit

if TYPE_CHECKING:
    from planish.job import Job


@dataclass(frozen=True)
class SLEB(Method):
    """Blocks go one at a time, each time the one whose removal costs the least loss.

    Problem: which whole blocks can go with the least loss of the language model?

    Equation: repeat: drop the block b with the least NLL(model without those dropped so far and without b)
    (`planish.plan.removal.search_greedily`). The result is the stock architecture with fewer blocks.

    `sparsity`: share of the blocks that goes; otherwise `keep` decides. `windows`: calibration sequences on which losses are
    compared. `protect`: the first and the last block stay.
    """

    title: ClassVar[str] = "drop blocks greedily by measured loss"
    reference: ClassVar[str] = "SLEB, arXiv 2402.09025"

    sparsity: float | None = None
    windows: int = 16
    protect: bool = True

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, job: Job) -> Plan:
        able = range(1, len(job.shapes) - 1) if self.protect else range(len(job.shapes))
        if self.protect and self.sparsity is None:
            every = [Unit(i, name) for i in able for name in ("attention", "ffn")]
            for b in job.budgets:
                if (least := b.total - saving(job, every, b)) > b.limit:
                    who = "sleb, which protects the first and the last block (--set protect=false)"
                    raise b.refuse(who, least)
        n = remove_blocks(job, self.sparsity)
        if n > len(able):
            raise InputError(
                f"sleb: {n} of {len(job.shapes)} blocks would have to go, {len(able)} may (--set protect=false)"
            )
        trials = {i: {i: [drop_edit("attention"), drop_edit("mlp")]} for i in able}
        with job.phase("search"):
            gone, losses = search_greedily(job.stream.subset(self.windows), trials, lambda made: len(made) >= n)
        job.notes["search"] = dict(zip(gone, losses, strict=True))
        return make_plan(job, [Unit(i, name) for i in gone for name in ("attention", "ffn")], self.sparsity)
