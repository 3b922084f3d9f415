"""auto: every cut competes in predicted nats per token under one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from planish.allocate import Alternative, Curve, choose
from planish.core import Frontier, Method, Plan, Solver, Unit
from planish.solvers.two_sided import TwoSided

if TYPE_CHECKING:
    from planish.compress import Job


@dataclass(frozen=True)
class Auto(Method):
    """Low-rank linears in pivoted form, ranks from one allocation over all linears of all blocks.

    One pass forward and back measures input moments R and gradient moments G (labels sampled from the model); every
    linear's frontier is then ½ Σ σ² of G^½ W R^½ in nats per token. `anchor`: see `planish.solvers.two_sided`.
    """

    title: ClassVar[str] = "all cuts compete in predicted nats per token under one budget"
    reference: ClassVar[str] = "planish"

    anchor: float = 0.0
    ridge: float = 1e-3

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return "both" if self.anchor else "dense"

    def solvers(self) -> list[Solver]:
        return [TwoSided(anchor=self.anchor, ridge=self.ridge)]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        if not self.anchor:
            return [units]
        order = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        return [s for s in ([u for u in units if u.name in names] for names in order) if s]

    def plan(self, job: Job) -> Plan:
        frontiers: dict[Unit, Frontier] = {}
        job.gradients(lambda i, block, stats: frontiers.update(job.decompose(i, block, stats)))
        groups = [[Alternative((self.curve(job, f),))] for f in frontiers.values()]
        plan, loss = choose(groups, job.budget)
        job.notes["predicted_loss"] = loss
        return plan

    def curve(self, job: Job, frontier: Frontier) -> Curve:
        unit = frontier.unit
        solver, shape = job.units[unit], job.shapes[unit.block]
        ranks = [r for r in solver.ranks(unit, shape) if r % job.step == 0 or r == job.full(unit)]
        cost = torch.tensor([solver.cost(unit, shape, r) for r in ranks], dtype=torch.float64)
        loss = torch.as_tensor(frontier.loss)[torch.tensor(ranks)]
        return Curve(unit, torch.tensor(ranks), cost, loss)
