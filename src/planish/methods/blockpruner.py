"""BlockPruner: attentions and feed-forwards go one at a time, each time the one whose removal costs the least loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import count_removed, pick_some, remove, saving
from planish.plan.search import list_greedy, search_greedily
from planish.solvers.bypass import Bypass, drop_edit


@dataclass(frozen=True)
class BlockPruner(Method):
    """Greedy search over single attentions and feed-forwards, by the loss without them.

    Problem: which attentions and feed-forwards can go with the least loss of the language model?

    Equation: repeat: drop the one u that remains with the least NLL(model without those dropped so far and without u)
    (`planish.plan.search.search_greedily`).

    `sparsity`: this share of each kind goes; otherwise the numbers are free, until `keep` is reached. `windows`: calibration
    sequences on which losses are compared.
    """

    title: ClassVar[str] = "drop attentions and feed-forwards greedily by measured loss"
    reference: ClassVar[str] = "BlockPruner, arXiv 2406.10594"

    sparsity: float | None = None
    windows: int = 16

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        kinds = ("attention", "ffn")
        targets = {"attention": "attention", "ffn": "mlp"}
        trials = {u: {u.block: [drop_edit(targets[u.name])]} for u in problem.units}
        if self.sparsity is None:
            limits, remarks = {"attention": len(problem.shapes) - 1, "ffn": len(problem.shapes)}, dict[str, str]()
            whole = [Unit(i, k) for k in kinds for i in range(limits[k])]
            for b in problem.budgets:
                if (least := b.total - saving(problem, whole, b)) > b.limit:
                    raise b.refuse("blockpruner", least)
        else:
            limits, remarks = count_removed(problem, kinds, self.sparsity)

        def enough(made: list[Unit]) -> bool:
            full = {k for k in kinds if sum(u.name == k for u in made) == limits[k]}
            for u in [u for u in trials if u.name in full and u not in made]:
                del trials[u]
            within = self.sparsity is None and all(
                b.total - saving(problem, made, b) <= b.limit for b in problem.budgets
            )
            return within or full == set(kinds)

        with measure.phase("search"):
            gone, losses = search_greedily(measure.stream.subset(self.windows), trials, enough)
        notes = {"search": {str(u): loss for u, loss in zip(gone, losses, strict=True)}}
        return remove(self.decide(problem, {}, notes=notes, remarks=remarks), problem, gone, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        counts, remarks = count_removed(problem, ("attention", "ffn"), self.sparsity)
        gone = pick_some(len(problem.shapes), counts)
        planned = remove(self.decide(problem, {}, remarks=remarks), problem, gone, self.sparsity)
        return Foreseen(planned, list_greedy(problem, problem.units, gone, min(self.windows, windows)))
