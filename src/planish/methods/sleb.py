"""SLEB: blocks go one at a time, each time the one whose removal costs the least loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import pick_some, remove, remove_blocks, saving
from planish.plan.search import list_greedy, search_greedily
from planish.solvers.bypass import Bypass, drop_edit


@dataclass(frozen=True)
class SLEB(Method):
    """Blocks go one at a time, each time the one whose removal costs the least loss.

    Problem: which whole blocks can go with the least loss of the language model?

    Equation: repeat: drop the block b with the least NLL(model without those dropped so far and without b)
    (`planish.plan.search.search_greedily`). The result is the stock architecture with fewer blocks.

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

    def count(self, problem: Problem) -> tuple[range, int, dict[str, str]]:
        """(Blocks that may go, how many do, remarks on it)."""
        able = range(1, len(problem.shapes) - 1) if self.protect else range(len(problem.shapes))
        if self.protect and self.sparsity is None:
            every = [Unit(i, name) for i in able for name in ("attention", "ffn")]
            for b in problem.budgets:
                if (least := b.total - saving(problem, every, b)) > b.limit:
                    who = "sleb, which protects the first and the last block (--set protect=false)"
                    raise b.refuse(who, least)
        n, remarks = remove_blocks(problem, self.sparsity)
        if n > len(able):
            raise InputError(
                f"sleb: {n} of {len(problem.shapes)} blocks would have to go, {len(able)} may (--set protect=false)"
            )
        return able, n, remarks

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        able, n, remarks = self.count(problem)
        trials = {i: {i: [drop_edit("attention"), drop_edit("mlp")]} for i in able}
        with measure.phase("search"):
            gone, losses = search_greedily(measure.stream.subset(self.windows), trials, lambda made: len(made) >= n)
        units = [Unit(i, name) for i in gone for name in ("attention", "ffn")]
        notes = {"search": dict(zip(gone, losses, strict=True))}
        return remove(self.decide(problem, {}, notes=notes, remarks=remarks), problem, units, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        _, n, remarks = self.count(problem)
        gone = pick_some(len(problem.shapes), {"attention": n, "ffn": n})
        planned = remove(self.decide(problem, {}, remarks=remarks), problem, gone, self.sparsity)
        trials = [Unit(i, "attention") for i in range(len(problem.shapes))]
        return Foreseen(planned, list_greedy(problem, trials, gone[:n], min(self.windows, windows)))
