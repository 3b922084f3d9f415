"""What is asked of a method: which units may be cut, to which ranks, and what all of them together may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from planish.core import INSIDE, Frontier, Plan, Shape, Solver, Spec, Unit
from planish.errors import InputError
from planish.folder.source import Source
from planish.plan.allocate import Alternative, Curve, choose
from planish.plan.budgets import Budget, CacheNumbers, Latency, make_budget
from planish.plan.footprint import count_weights, cuts_cache
from planish.plan.latency import Table
from planish.plan.planned import Planned
from planish.plan.spread import BudgetError, Choices, spread, spread_by_kind
from planish.plan.targets import Target, constrain, fit_bits, fit_target
from planish.request import Limits
from planish.rounding.types import Choice
from planish.stats import Tap


@dataclass(frozen=True)
class Problem:
    """One model, the units that one method cuts with their solvers, and the budgets.

    `main`: what a method's own rule asks for, of two budgets the one that prices every linear, and of these the tighter.
    `step`: ranks are multiples of it. `cache_only`: only what the KV cache holds is cut. `context`: tokens that FLOPs and
    latency are counted behind. `rounds`: what linears are rounded to once they are cut.
    """

    name: str  # the method's
    shapes: tuple[Shape, ...]
    units: Mapping[Unit, Solver]
    budgets: tuple[Budget, ...]
    main: Budget
    step: int
    target: Target
    cache_only: bool
    context: int
    rounds: Choice | None = None
    _choices: dict[tuple[int, str, Shape], tuple[Solver, Choices]] = field(
        default_factory=dict, repr=False, compare=False
    )  # the same in blocks of the same shape

    @property
    def keep(self) -> float:
        """Share of the main budget that may stay."""
        return self.main.share

    @property
    def table(self) -> Table | None:
        """Measured latencies, where they were asked for."""
        return next((b.table for b in self.budgets if isinstance(b, Latency)), None)

    @property
    def limits(self) -> list[float]:
        """What all units together may cost of every budget."""
        full = [sum(float(self.choices(u).full[n]) for u in self.units) for n in range(len(self.budgets))]
        return [b.limit - (b.total - f) for b, f in zip(self.budgets, full, strict=True)]

    def block_units(self, i: int) -> list[Unit]:
        return [u for u in self.units if u.block == i]

    def cut(self, plan: Plan, i: int) -> list[Unit]:
        """Block i's units that a plan cuts."""
        return [u for u in self.block_units(i) if plan.get(u, self.full(u)) < self.full(u)]

    def taps(self, units: Iterable[Unit]) -> list[Tap]:
        """What solving these units needs to know."""
        return sorted({t for u in units for t in self.units[u].taps(u, self.shapes[u.block])})

    def full(self, unit: Unit) -> int:
        """The rank that leaves a unit whole."""
        return self.units[unit].ranks(unit, self.shapes[unit.block])[-1]

    def cost(self, unit: Unit, rank: int, budget: Budget | None = None, beside: Spec | None = None) -> float:
        """Of the main budget, or another one, in a block with this spec."""
        return (budget or self.main).cost(self.units[unit], unit, self.shapes[unit.block], rank, beside)

    def count(self, unit: Unit, rank: int | None = None) -> int:
        """Weights left in the unit at this rank, by default uncut, whatever the budgets count."""
        rank = self.full(unit) if rank is None else rank
        return count_weights(self.units[unit], unit, self.shapes[unit.block], rank)

    def choices(self, unit: Unit) -> Choices:
        """Admissible ranks of a unit, and what they cost of every budget."""
        solver, shape = self.units[unit], self.shapes[unit.block]
        key = (id(solver), unit.name, replace(shape, block=0))
        if key not in self._choices:
            ranks = list(solver.ranks(unit, shape))
            with torch.device("cpu"):  # whoever asks first may be solving elsewhere
                cost = torch.tensor([[b.cost(solver, unit, shape, r) for r in ranks] for b in self.budgets])
                fixed = torch.tensor([b.fixed(solver, unit, shape) for b in self.budgets])
                self._choices[key] = solver, Choices(torch.tensor(ranks), cost.double(), fixed.double())
        return self._choices[key][1]

    def curve(self, frontier: Frontier, beside: Spec | None = None) -> Curve:
        """Admissible ranks of a unit with their costs, in a block with this spec, and predicted losses; leaving it whole loses
        nothing."""
        choices = self.choices(frontier.unit)
        kept = choices.allowed(1 if frontier.unit.name == "experts" else self.step)  # how many experts is no width
        loss = torch.as_tensor(frontier.loss, dtype=torch.float64)[choices.ranks[kept]]
        ranks, cost = choices.ranks[kept], choices.cost[:, kept]
        if beside:
            cost = cost_beside(self, frontier.unit, ranks, cost, beside)
        return Curve(frontier.unit, ranks, cost, loss)

    def spread(
        self, share: Callable[[Unit], float], by_kind: bool = False, remarks: Mapping[str, str] | None = None
    ) -> Plan:
        """Ranks in proportion to `share`, within the budgets (see `spread`, `spread_by_kind` of `planish.plan.spread`).

        `remarks`: said beside a refusal.
        """
        try:
            rule = spread_by_kind if by_kind else spread
            return rule({u: self.choices(u) for u in self.units}, share, self.limits, self.step)
        except BudgetError as error:
            b = self.budgets[error.which]
            refusal = b.refuse(self.name, error.smallest + b.limit - self.limits[error.which])
            coarse = [f"ranks are multiples of {self.step}, see --round-to"] if self.step > 1 else []
            why = "; ".join([*coarse, *(remarks or {}).values()])
            raise InputError(f"{refusal} ({why})" if why else str(refusal)) from None


def find_beside(problem: Problem, unit: Unit, plan: Plan) -> Spec:
    """What a plan makes of a block that changes how much the unit holds: experts that go, if it is inside experts."""
    experts = Unit(unit.block, "experts")
    if unit.name not in INSIDE or experts not in plan:
        return {}
    return problem.units[experts].spec(experts, problem.shapes[unit.block], plan[experts])


def cost_beside(problem: Problem, unit: Unit, ranks: Tensor, cost: Tensor, beside: Spec) -> Tensor:
    """Costs (budgets, ranks) of a unit → those in a block with this spec: straight between the lowest and the highest rank
    below full, as what is inside experts costs."""
    known, rows = [0, len(ranks) - 2] if len(ranks) > 2 else [0], []
    for b, own in zip(problem.budgets, cost, strict=True):
        full, *some = (problem.cost(unit, int(ranks[n]), b, beside) for n in (-1, *known))
        span = float(own[known[-1]] - own[0])
        share = (own[:-1] - own[0]) / span if span else torch.zeros_like(own[:-1])
        rows.append(torch.cat([some[0] + share * (some[-1] - some[0]), own.new_tensor([full])]))
    return torch.stack(rows)


def choose_ranks(problem: Problem, curves: Mapping[Unit, Curve]) -> Plan:
    """One rank per unit, with the least sum of the curves' losses within all budgets (see `planish.plan.allocate.choose`)."""
    try:
        return choose([[Alternative((c,))] for c in curves.values()], problem.limits)[0]
    except BudgetError as error:
        b = problem.budgets[error.which]
        raise b.refuse(problem.name, error.smallest + b.limit - problem.limits[error.which]) from None


def count_left(problem: Problem, plan: Plan, budget: Budget) -> float:
    """What all blocks cost of a budget under a plan; a cut inside experts saves nothing of those that have gone."""
    left = budget.total
    for unit, rank in plan.items():
        beside = find_beside(problem, unit, plan)
        left -= problem.cost(unit, problem.full(unit), budget, beside) - problem.cost(unit, rank, budget, beside)
    return left


def changes(problem: Problem, planned: Planned) -> bool:
    """Whether a plan changes anything of the model."""
    problem = replace(problem, units=planned.solvers)
    cut = any(rank < problem.full(unit) for unit, rank in planned.ranks.items())
    return cut or bool(planned.edits) or planned.make is not None


def make_problem(
    source: Source,
    name: str,
    solvers: Sequence[Solver],
    asked: Limits,
    *,
    step: int = 1,
    target: str | Choice = "any",
    measured: Mapping[str, float] | None = None,
    takes: Callable[[Unit, Mapping[str, float]], bool] = lambda unit, shares: True,
) -> Problem:
    """The problem that limits and a target amount to for the method `name` with these solvers.

    `target` may also say what linears are rounded to for one once they are cut.
    `measured`: latencies, for a limit on them. `takes`: whether the method cuts a unit under budgets, name → share that stays.
    """
    shapes = tuple(source.shape(i) for i in range(source.n_blocks))
    context = asked.context or 0
    budgets = tuple(make_budget(n, value, source, shapes, context, measured) for n, value in asked.given.items())
    cache_only = set(asked.given) == {"kv_keep"}
    shares = {b.name: b.share for b in budgets}
    units: dict[Unit, Solver] = {}
    for solver in solvers:
        for shape in shapes:
            own = [u for u in solver.units(shape) if takes(u, shares)]
            if cache_only:
                own = [u for u in own if cuts_cache(solver, u, shape)]
            units |= dict.fromkeys(own, solver)
    bits = target if isinstance(target, Choice) else None
    stack = fit_bits(fit_target(target if isinstance(target, str) else target.target, source, shapes), bits, shapes)
    units = constrain(stack, name, units, list(shapes))
    main = min(budgets, key=lambda b: (isinstance(b, CacheNumbers), b.share))
    return Problem(name, shapes, units, budgets, main, step, stack, cache_only, context, bits)
