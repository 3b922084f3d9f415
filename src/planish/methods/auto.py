"""auto: every cut competes in predicted nats per token under one budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from planish.allocate import Alternative, BudgetError, Curve, choose
from planish.core import Frontier, Method, Plan, Shape, Solver, Unit
from planish.solvers.fisher_bypass import FisherBypass
from planish.solvers.fisher_structural import FisherNeurons, FisherPairs, FisherValues
from planish.solvers.two_sided import TwoSided
from planish.stats import Stats, Tap

if TYPE_CHECKING:
    from planish.compress import Job

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
WAYS = {  # alternatives for a submodule: units that go together
    "attention": (("q", "k", "v", "o"), ("qk", "vo"), ("q", "k", "vo"), ("attention",)),
    "ffn": (("gate", "up", "down"), ("mlp",), ("ffn",)),
}
# the linears that a unit holds, where it is not one itself
HOLDS = {"qk": ("q", "k"), "vo": ("v", "o"), "mlp": MLP, "attention": ATTENTION, "ffn": MLP}


@dataclass(frozen=True)
class Auto(Method):
    """Low-rank linears in pivoted form, value dimensions, rotary pairs and neurons, ranks from one allocation.

    One pass forward and back measures input moments and gradient moments (labels sampled from the model); every unit's
    frontier is then in nats per token, and each submodule takes the alternative that is best at the budget's price.
    `units`: "any"; "structural" = dense shapes only; "linear" = low-rank linears only; `bypass` adds fitted affine maps
    in place of whole submodules. `anchor`: share of the uncompressed model's activations in the target of each solve
    (0: solve on the uncompressed model's statistics alone, which a sweep can re-use). `rounds`: gradients are measured
    again on the model compressed so far after each equal share of the cut.
    `steep`: ranks are chosen by loss · (1 + steep · loss) of every unit: the second-order prediction saturates, so a cut
    that looks like 0.3 nats costs more than thirty of 0.01; what is reported stays the prediction itself. By default 0,
    or 3 below keep 0.6.
    """

    title: ClassVar[str] = "all cuts compete in predicted nats per token under one budget"
    reference: ClassVar[str] = "planish"

    units: Literal["any", "structural", "linear"] = "any"
    anchor: float = 0.5
    ridge: float = 1e-3
    bypass: bool = False
    rounds: int = 1
    steep: float | None = None

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return "both" if self.anchor else "dense"

    def solvers(self) -> list[Solver]:
        structural: list[Solver] = [FisherValues(self.anchor, self.ridge), FisherNeurons(self.anchor, self.ridge)]
        structural += [FisherPairs(), *([FisherBypass(self.ridge)] if self.bypass else [])]
        linear: list[Solver] = [TwoSided(anchor=self.anchor, ridge=self.ridge)]
        return {"any": linear + structural, "structural": structural, "linear": linear}[self.units]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        if not self.anchor:
            return [units]
        order = (("q", "k", "qk", "v", "attention"), ("o", "vo"), ("gate", "up", "ffn"), ("down", "mlp"))
        return [s for s in ([u for u in units if u.name in names] for names in order) if s]

    def plan(self, job: Job) -> Plan:
        frontiers: dict[Unit, Frontier] = {}
        job.gradients(lambda i, block, stats: frontiers.update(job.decompose(i, block, stats)))
        rounds = max(self.rounds, 1)
        plan: Plan = {}
        for n in range(1, rounds + 1):
            if n > 1:
                frontiers = self.measure_again(job, plan)
            plan = self.allocate(job, frontiers, n / rounds)
        return plan

    def plan_cache(self, job: Job) -> Plan:
        frontiers: dict[Unit, Frontier] = {}
        job.gradients(lambda i, block, stats: frontiers.update(job.decompose(i, block, stats)))
        return self.allocate(job, frontiers)

    def allocate(self, job: Job, frontiers: dict[Unit, Frontier], part: float = 1.0) -> Plan:
        """The cheapest plan in predicted nats within the job's budgets, after this part of the cut."""
        job.known = frontiers
        curves = {u: job.curve(f) for u, f in frontiers.items()}
        steep = self.steep if self.steep is not None else 0.0 if job.keep >= 0.6 else 3.0
        curves = {u: replace(c, loss=c.loss * (1 + steep * c.loss)) for u, c in curves.items()}
        try:
            plan, _ = choose(self.groups(job, curves), [b.part(part) for b in job.budgets])
        except BudgetError as error:
            raise job.budgets[error.which].refuse("auto", error.smallest) from None
        loss = sum(float(frontiers[u].loss[r]) for u, r in plan.items())
        names = sorted({u.name for u in plan})
        cut = {n: sum(u.name == n and r < job.full(u) for u, r in plan.items()) for n in names}
        job.notes |= {"predicted_loss": loss, "units cut": {n: c for n, c in cut.items() if c}}
        return plan

    def measure_again(self, job: Job, plan: Plan) -> dict[Unit, Frontier]:
        """Frontiers of the uncompressed weights with gradients of the model under `plan`, wherever they still exist."""
        gone = {"qk": "qk", "vo": "v", "mlp": ("gate", "up"), "attention": ATTENTION, "ffn": MLP}
        edits = job.solve_stored(plan)
        frontiers: dict[Unit, Frontier] = {}

        def taps(shape: Shape) -> list[Tap]:
            cut = [u.name for u, r in plan.items() if u.block == shape.block and r < job.full(u)]
            missing = {f"grad:{r}.out" for name in cut for r in gone.get(name, ())}
            missing |= {"grad:attention.add"} if "attention" in cut else set()
            missing |= {"grad:mlp.add"} if "ffn" in cut else set()
            return [t for t in job.stored_taps(shape.block) if t.site.startswith("grad:") and t.site not in missing]

        def use(i: int, block: nn.Module, stats: Stats) -> None:
            job.stored[i].replace(stats)
            frontiers.update(job.decompose(i, job.stream.block(i), job.stored[i]))

        job.gradients(use, taps, edits)
        return frontiers

    def groups(self, job: Job, curves: dict[Unit, Curve]) -> list[list[Alternative]]:
        """Per submodule the ways to treat it with the units at hand; what no unit holds costs what it costs."""
        groups = []
        for shape in job.shapes:
            for name, ways in WAYS.items():
                found = {}
                for way in ways:
                    present = tuple(n for n in way if Unit(shape.block, n) in curves)
                    held = {r for n in present for r in HOLDS.get(n, (n,))}
                    rest = [r for r in HOLDS[name] if r in shape.roles and r not in held]
                    chosen = tuple(curves[Unit(shape.block, n)] for n in present)
                    found[present] = Alternative(chosen, [sum(b.uncut(shape, r) for r in rest) for b in job.budgets])
                groups.append(list(found.values()))
        return groups
