"""Spending a budget of weights over units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Plan, Shape, Solver, Unit, Weights
from planish.errors import InputError
from planish.stats import Stats, Tap


def spread(
    units: Mapping[Unit, Solver],
    shapes: list[Shape],
    share: Callable[[Unit], float],
    budget: int,
    step: int = 1,
) -> Plan:
    """Ranks with keep(unit) = min(1, t · share(unit)) and t as large as the budget allows.

    `budget`: weights that all units together may have. A share of infinity leaves a unit whole. What rounding leaves
    over is handed out one rank step at a time, to the unit that lies furthest below its share.
    """
    shares = {u: share(u) for u in units}

    def keep_at(u: Unit, t: float) -> float:
        return 1.0 if shares[u] == float("inf") else min(1.0, t * shares[u])

    def plan_at(t: float) -> Plan:
        return {u: s.rank_at(u, shapes[u.block], keep_at(u, t), step) for u, s in units.items()}

    def cost(plan: Plan) -> int:
        return sum(units[u].cost(u, shapes[u.block], r) for u, r in plan.items())

    positive = [s for s in shares.values() if 0 < s < float("inf")]
    low, high = 0.0, 1.0 / min(positive) if positive else 1.0
    best = plan_at(low)
    if cost(best) > budget:
        raise BudgetError(cost(best), budget)
    if cost(plan_at(high)) <= budget:
        return plan_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if cost(plan) <= budget:
            low, best = middle, plan
        else:
            high = middle
    return top_up(units, shapes, best, budget - cost(best), step, lambda u: keep_at(u, low))


def top_up(
    units: Mapping[Unit, Solver],
    shapes: list[Shape],
    plan: Plan,
    left: int,
    step: int,
    target: Callable[[Unit], float],
) -> Plan:
    """Raise units to their next admissible rank, furthest below `target` first, each at most once, while it fits."""
    plan = dict(plan)

    def gap(u: Unit) -> float:
        shape, solver = shapes[u.block], units[u]
        full = solver.cost(u, shape, solver.ranks(u, shape)[-1])
        return min(1.0, target(u)) - solver.cost(u, shape, plan[u]) / full

    for u in sorted(units, key=lambda u: (-gap(u), u)):
        solver, shape = units[u], shapes[u.block]
        ranks = solver.ranks(u, shape)
        higher = [r for r in ranks if r > plan[u] and (r % step == 0 or r == ranks[-1])]
        if target(u) <= 0 or not higher:
            continue
        extra = solver.cost(u, shape, higher[0]) - solver.cost(u, shape, plan[u])
        if extra <= left:
            plan[u], left = higher[0], left - extra
    return plan


@dataclass(frozen=True)
class CacheCost(Solver):
    """Another solver, costed by what the KV cache holds per token instead of by weights; only units that the cache holds."""

    solver: Solver
    name: ClassVar[str] = "cache-cost"

    def units(self, shape: Shape) -> list[Unit]:
        units = self.solver.units(shape)
        return [u for u in units if self.solver.cache(u, shape, self.solver.ranks(u, shape)[-1]) > 0]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return self.solver.ranks(unit, shape)

    def cost(self, unit: Unit, shape: Shape, rank: int) -> int:
        return self.cache(unit, shape, rank)

    def cache(self, unit: Unit, shape: Shape, rank: int) -> int:
        return self.solver.cache(unit, shape, rank)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return self.solver.taps(unit, shape)

    def work(self, unit: Unit, shape: Shape) -> int:
        return self.solver.work(unit, shape)

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        return self.solver.decompose(unit, weights, stats, shape)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        return self.solver.truncate(frontier, rank, shape)


class BudgetError(InputError):
    """The budget is below the smallest that the units can reach."""

    def __init__(self, smallest: int, budget: int):
        super().__init__(f"budget of {budget} weights is below the smallest reachable, {smallest}")
        self.smallest = smallest


@dataclass(frozen=True, eq=False)
class Curve:
    """A unit's choices: `ranks` (n,) with `cost` (n,) and predicted `loss` (n,); the last one leaves the unit whole."""

    unit: Unit
    ranks: Tensor
    cost: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Alternative:
    """One way to treat a submodule: curves of units that go together, and the cost of what they leave untouched."""

    curves: tuple[Curve, ...]
    fixed: float = 0.0


def choose(groups: Sequence[Sequence[Alternative]], budget: float) -> tuple[Plan, float]:
    """One alternative per submodule and one rank per unit, least predicted loss within the budget; (plan, loss).

    For a price λ per unit of cost every unit takes argmin(loss + λ cost) and every submodule its best alternative:
    the optimum for the budget that this spends (Lagrange). λ is bisected to the budget; what is left over buys
    the best affordable upgrades. Optimal to one step, whatever the curves' shape.
    """

    def pick(price: float) -> tuple[list[Alternative], list[dict[Curve, int]], float]:
        chosen, picks, spent = [], [], 0.0
        for alternatives in groups:
            best = None
            for alternative in alternatives:
                at = {c: int((c.loss + price * c.cost).argmin()) for c in alternative.curves}
                cost = alternative.fixed + sum(float(c.cost[i]) for c, i in at.items())
                value = price * cost + sum(float(c.loss[i]) for c, i in at.items())
                if best is None or value < best[0]:
                    best = (value, alternative, at, cost)
            assert best is not None
            chosen.append(best[1])
            picks.append(best[2])
            spent += best[3]
        return chosen, picks, spent

    low, high = 1e-18, 1e6  # a high price buys little
    if pick(high)[2] > budget * (1 + 1e-12):
        raise BudgetError(int(pick(high)[2]), int(budget))
    if pick(low)[2] <= budget:
        high = low
    for _ in range(100):
        middle = (low * high) ** 0.5
        if pick(middle)[2] <= budget:
            high = middle
        else:
            low = middle
    _, picks, spent = pick(high)
    at = {c: i for group in picks for c, i in group.items()}
    upgrade(at, budget - spent)
    plan = {c.unit: int(c.ranks[i]) for c, i in at.items()}
    return plan, sum(float(c.loss[i]) for c, i in at.items())


def upgrade(at: dict[Curve, int], left: float) -> None:
    """Spend what is left on the steps that save most loss per cost, in place."""
    while True:
        best = None
        for curve, i in at.items():
            extra, gain = curve.cost[i + 1 :] - curve.cost[i], curve.loss[i] - curve.loss[i + 1 :]
            usable = (extra > 0) & (extra <= left) & (gain > 0)
            if usable.any():
                slope = torch.where(usable, gain / extra.clamp(min=1e-9), -1)
                j = int(slope.argmax())
                if best is None or float(slope[j]) > best[0]:
                    best = (float(slope[j]), curve, i + 1 + j, float(extra[j]))
        if best is None:
            return
        at[best[1]] = best[2]
        left -= best[3]
