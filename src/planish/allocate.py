"""Spending a budget of weights over units."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planish.core import Plan, Shape, Solver, Unit
from planish.errors import InputError


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


class BudgetError(InputError):
    """The budget is below the smallest that the units can reach."""

    def __init__(self, smallest: int, budget: int):
        super().__init__(f"budget of {budget} weights is below the smallest reachable, {smallest}")
        self.smallest = smallest
