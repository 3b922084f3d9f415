"""BlockPruner: attentions and feed-forwards go one at a time, each time the one whose removal costs the least loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.core import Method, Plan, Solver, Unit
from planish.solvers.bypass import Bypass, drop_edit
from planish.submodules import make_plan, remove_blocks, saving, search_greedily

if TYPE_CHECKING:
    from planish.compress import Job


@dataclass(frozen=True)
class BlockPruner(Method):
    """Greedy search over single submodules on the loss of `windows` calibration sequences; their numbers are free.

    `sparsity`: go on until as many weights are gone as that share of the blocks has; otherwise until `keep` is reached.
    """

    title: ClassVar[str] = "drop attentions and feed-forwards greedily by measured loss"
    reference: ClassVar[str] = "BlockPruner, arXiv 2406.10594"

    sparsity: float | None = None
    windows: int = 16

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, job: Job) -> Plan:
        if self.sparsity is None:
            need = job.total - int(job.keep * job.total + 1e-6)
        else:
            need = remove_blocks(job, self.sparsity) * saving(job, [Unit(0, "attention"), Unit(0, "ffn")])
        targets = {"attention": "attention", "ffn": "mlp"}
        trials = {u: {u.block: [drop_edit(targets[u.name])]} for u in job.units}
        last = len(job.shapes) - 1

        def enough(made: list[Unit]) -> bool:
            if sum(u.name == "attention" for u in made) == last:  # one attention stays
                for u in [u for u in trials if u.name == "attention" and u not in made]:
                    del trials[u]
            return saving(job, made) >= need if made else need <= 0

        with job.phase("search"):
            gone, losses = search_greedily(job.stream.subset(self.windows), trials, enough)
        job.notes["search"] = {str(u): loss for u, loss in zip(gone, losses, strict=True)}
        return make_plan(job, gone, self.sparsity)
