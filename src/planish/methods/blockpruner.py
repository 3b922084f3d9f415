"""BlockPruner: attentions and feed-forwards go one at a time, each time the one whose removal costs the least loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from planish.core import Method, Plan, Solver, Unit
from planish.errors import InputError
from planish.solvers.bypass import Bypass, drop_edit
from planish.submodules import ceil4, count_removed, make_plan, saving, search_greedily

if TYPE_CHECKING:
    from planish.compress import Job


@dataclass(frozen=True)
class BlockPruner(Method):
    """Greedy search over single submodules on the loss of `windows` calibration sequences.

    `sparsity`: this share of each kind goes; otherwise the numbers are free, until `keep` is reached.
    """

    title: ClassVar[str] = "drop attentions and feed-forwards greedily by measured loss"
    reference: ClassVar[str] = "BlockPruner, arXiv 2406.10594"

    sparsity: float | None = None
    windows: int = 16

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, job: Job) -> Plan:
        kinds = ("attention", "ffn")
        targets = {"attention": "attention", "ffn": "mlp"}
        trials = {u: {u.block: [drop_edit(targets[u.name])]} for u in job.units}
        if self.sparsity is None:
            limits = {"attention": len(job.shapes) - 1, "ffn": len(job.shapes)}
            need = job.total - int(job.keep * job.total + 1e-6)
            whole = [Unit(i, k) for k in kinds for i in range(limits[k])]
            if saving(job, whole) < need:
                smallest = ceil4(1 - saving(job, whole) / job.total)
                raise InputError(
                    f"keep {job.keep:g} cannot be reached by blockpruner: the smallest keep is {smallest:g}"
                )
        else:
            limits, need = count_removed(job, kinds, self.sparsity), job.total

        def enough(made: list[Unit]) -> bool:
            full = {k for k in kinds if sum(u.name == k for u in made) == limits[k]}
            for u in [u for u in trials if u.name in full and u not in made]:
                del trials[u]
            return need <= 0 or full == set(kinds) or (bool(made) and saving(job, made) >= need)

        with job.phase("search"):
            gone, losses = search_greedily(job.stream.subset(self.windows), trials, enough)
        job.notes["search"] = {str(u): loss for u, loss in zip(gone, losses, strict=True)}
        return make_plan(job, gone, self.sparsity)
