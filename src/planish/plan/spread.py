"""Ranks by shares of the budgets: every unit u keeps the share min(1, t s_u) of its cost.

With rank_u(t) the largest rank that costs no more than that (`Choices.largest`),

    t* = max {t : Σ_u cost(u, rank_u(t)) ≤ budget}        (`fill`, by bisection),

and what rounding leaves over raises the units furthest below their share by one rank step each (`top_up`). FLAT-LLM's
importance-preserving ranks are this with s_u the importance of the unit's block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from planish.core import Plan, Unit
from planish.errors import InputError


@dataclass(frozen=True, eq=False)
class Choices:
    """A unit's admissible ranks (n,), rising, and what each costs of every budget: (budgets, n).

    `fixed` (budgets,): the part of every cost that no rank changes, such as the scores of an attention whose key
    projection becomes low-rank; shares are shares of the rest. None: nothing.
    """

    ranks: Tensor
    cost: Tensor
    fixed: Tensor | None = None

    @property
    def full(self) -> Tensor:
        return self.cost[:, -1]

    @cached_property
    def free(self) -> Tensor:
        """What the ranks decide about: the costs without what is fixed, (budgets, n)."""
        return self.cost if self.fixed is None else self.cost - self.fixed[:, None]

    def share(self, index: int, b: int = 0) -> float:
        """What this choice keeps of the full cost of budget b, as far as ranks decide about it."""
        return float(self.free[b, index] / self.free[b, -1])

    def at(self, rank: int) -> int:
        return int(torch.searchsorted(self.ranks, rank))

    def largest(self, keep: float, budgets: Sequence[int], step: int) -> int:
        """Index of the largest rank (a multiple of `step`, or full) that costs at most `keep` of the full cost of each of
        these budgets, beyond what is fixed; where none does, of the one that costs least of the first."""
        allowed, at = self.allowed(step), list(budgets)
        free = self.free[at]
        fits = allowed & (free <= keep * free[:, -1:] * (1 + 1e-12)).all(0)
        if fits.any():
            return int(fits.nonzero()[-1])
        return int(torch.where(allowed, self.cost[at[0]], torch.inf).argmin())

    def only(self, b: int) -> Choices:
        """The same choices under budget b alone."""
        fixed = None if self.fixed is None else self.fixed[b : b + 1]
        return Choices(self.ranks, self.cost[b : b + 1], fixed)

    def prices(self, b: int) -> bool:
        """Whether the cost of budget b depends on the rank."""
        return bool((self.cost[b] != self.cost[b, -1]).any())

    def allowed(self, step: int) -> Tensor:
        allowed = self.ranks % step == 0
        allowed[-1] = True
        return allowed


def spread(
    units: Mapping[Unit, Choices], share: Callable[[Unit], float], budgets: Sequence[float], step: int = 1
) -> Plan:
    """Ranks with keep(unit) = min(1, t · share(unit)) and t as large as the budgets allow.

    `budgets`: what all units together may cost of each. A share of infinity leaves a unit whole. Of several budgets one whose
    plan is within all others decides alone. Else the one that allows the least t settles the units whose ranks it prices, each
    within its share of all; the others go on with what is left of the rest.
    What rounding leaves over is handed out one rank step at a time, to the unit that lies furthest below its share.
    """
    if len(budgets) > 1 and (alone := spread_alone(units, share, budgets, step)):
        return alone
    limits = torch.tensor([float(b) for b in budgets], dtype=torch.float64)
    shares = {u: share(u) for u in units}
    top = max((s for s in shares.values() if s < float("inf")), default=1.0)
    if 0 < top < 1e-9:  # their proportions count
        shares = {u: s / top for u, s in shares.items()}
    shares = {u: max(s, 1e-9) if s > 0 else s for u, s in shares.items()}
    plan: dict[Unit, int] = {}  # unit → index of its rank
    reached: dict[Unit, float] = {}
    governs: dict[Unit, int] = {}
    active = list(range(len(limits)))
    while active:
        found = []
        for b in active:
            mine = [u for u in units if u not in plan and units[u].prices(b)]
            others = sum(float(c.cost[b, plan.get(u, -1)]) for u, c in units.items() if u not in mine)
            every = [b, *(a for a in active if a != b)]
            filled = fill({u: units[u] for u in mine}, shares, float(limits[b]), every, step, others)
            found.append((*filled, b, mine))
        t, chosen, b, mine = min(found, key=lambda f: f[0])
        plan |= chosen
        reached |= {u: 1.0 if shares[u] == float("inf") else min(1.0, t * shares[u]) for u in mine}
        governs |= dict.fromkeys(mine, b)
        active.remove(b)
    for u in units:  # no budget prices it
        if u not in plan:
            plan[u], reached[u], governs[u] = len(units[u].ranks) - 1, 1.0, 0
    left = limits - sum((units[u].cost[:, i] for u, i in plan.items()), torch.zeros_like(limits))
    if (left < -1e-9 * limits.abs()).any():
        b = int((left < -1e-9 * limits.abs()).nonzero()[0])
        raise BudgetError(float(limits[b] - left[b]), float(limits[b]), b)
    return {u: int(units[u].ranks[i]) for u, i in top_up(units, plan, left, step, reached, governs).items()}


def spread_alone(
    units: Mapping[Unit, Choices], share: Callable[[Unit], float], budgets: Sequence[float], step: int
) -> Plan | None:
    """The ranks that one of the budgets gives, where the others hold too: it is the only one that binds."""
    for b, limit in enumerate(budgets):
        once = {id(c): c.only(b) for c in units.values()}
        try:
            plan = spread({u: once[id(c)] for u, c in units.items()}, share, [limit], step)
        except BudgetError as error:
            raise BudgetError(error.smallest, float(limit), b) from None
        spent = torch.stack([units[u].cost[:, units[u].at(r)] for u, r in plan.items()]).sum(0)
        if all(s <= x * (1 + 1e-12) for s, x in zip(spent.tolist(), budgets, strict=True)):
            return plan
    return None


def fill(
    units: Mapping[Unit, Choices],
    shares: Mapping[Unit, float],
    limit: float,
    budgets: Sequence[int],
    step: int,
    others: float,
) -> tuple[float, dict[Unit, int]]:
    """The largest t, and each unit's index at it, with which units and `others` cost at most `limit` of the first budget.

    No unit costs more than its share of any of the budgets.
    """
    b = budgets[0]
    own = {u: [a for a in budgets if c.prices(a)] for u, c in units.items()}

    def plan_at(t: float) -> dict[Unit, int]:
        keeps = {u: 1.0 if shares[u] == float("inf") else min(1.0, t * shares[u]) for u in units}
        # blocks of one shape have one `Choices`
        alike = {(id(c), keeps[u]): (c, keeps[u], own[u]) for u, c in units.items()}
        found = {key: c.largest(keep, priced, step) for key, (c, keep, priced) in alike.items()}
        return {u: found[id(c), keeps[u]] for u, c in units.items()}

    def cost(plan: dict[Unit, int]) -> float:
        return others + sum(float(units[u].cost[b, i]) for u, i in plan.items())

    positive = [s for u in units if 0 < (s := shares[u]) < float("inf")]
    low, high = 0.0, 1.0 / min(positive) if positive else 1.0
    best = plan_at(low)
    if cost(best) > limit:
        raise BudgetError(cost(best), limit, b)
    if cost(plan_at(high)) <= limit:
        return high, plan_at(high)
    for _ in range(60):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if cost(plan) <= limit:
            low, best = middle, plan
        else:
            high = middle
    return low, best


def spread_by_kind(
    units: Mapping[Unit, Choices], share: Callable[[Unit], float], budgets: Sequence[float], step: int = 1
) -> Plan:
    """`spread` with a budget of its own for every kind of unit ("qk", "vo", "mlp"): what its shares ask for, unrounded.

    Where one kind has coarse steps (whole rotary pairs of narrow heads) its units then take turns on either side of
    their share, and the kind as a whole keeps it; otherwise all of them would be rounded down and others raised
    instead. Kinds with the coarsest steps go first, what rounding leaves over goes to the next one. With several
    budgets it is `spread`.
    """
    if len(budgets) > 1:
        return spread(units, share, budgets, step)
    shares = {u: share(u) for u in units}

    def wanted(u: Unit, t: float) -> float:
        whole, free = float(units[u].full[0]), float(units[u].free[0, -1])
        uncut = shares[u] == float("inf") or not units[u].prices(0)
        return whole if uncut else whole - free * (1 - min(1.0, t * shares[u]))

    def least(u: Unit) -> float:
        c = units[u]
        return float(c.cost[0, c.largest(0.0, [0], step) if c.prices(0) else -1])

    def coarseness(name: str) -> float:
        costs = [c.cost[0] for u, c in units.items() if u.name == name and len(c.ranks) > 1]
        return max((float((c[-1] - c[-2]) / c[-1]) for c in costs), default=0.0)

    positive = [s for s in shares.values() if 0 < s < float("inf")]
    low, high = 0.0, 1.0 / min(positive) if positive else 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(u, middle) for u in units) <= budgets[0] else (low, middle)
    names = sorted({u.name for u in units}, key=lambda n: (-coarseness(n), n))
    kinds = [[u for u in units if u.name == n] for n in names]
    smallest = [sum(map(least, kind)) for kind in kinds]
    if sum(smallest) > budgets[0]:
        raise BudgetError(sum(smallest), float(budgets[0]))
    plan: Plan = {}
    left, carry = float(budgets[0]), 0.0
    for n, kind in enumerate(kinds):
        asked = sum(wanted(u, low) for u in kind)
        own = left if n == len(kinds) - 1 else asked + carry + 1e-6
        own = min(max(own, smallest[n]), left - sum(smallest[n + 1 :]))
        new = spread({u: units[u] for u in kind}, shares.__getitem__, [own], step)
        spent = sum(float(units[u].cost[0, units[u].at(r)]) for u, r in new.items())
        carry, left = carry + asked - spent, left - spent
        plan |= new
    at = {u: units[u].at(r) for u, r in plan.items()}
    target = {u: 1.0 if shares[u] > 0 else 0.0 for u in units}
    raised = top_up(units, at, torch.tensor([left], dtype=torch.float64), step, target, dict.fromkeys(units, 0))
    return {u: int(units[u].ranks[i]) for u, i in raised.items()}


def top_up(
    units: Mapping[Unit, Choices],
    plan: dict[Unit, int],
    left: Tensor,
    step: int,
    target: Mapping[Unit, float],
    governs: Mapping[Unit, int],
) -> dict[Unit, int]:
    """Raise units to their next admissible rank, furthest below `target` first, each at most once, while it fits."""
    plan = dict(plan)

    def gap(u: Unit) -> float:
        return target[u] - units[u].share(plan[u], governs[u])

    for u in sorted(units, key=lambda u: (-gap(u), u)):
        higher = units[u].allowed(step).nonzero().flatten()
        higher = higher[higher > plan[u]]
        if target[u] <= 0 or not len(higher):
            continue
        extra = units[u].cost[:, higher[0]] - units[u].cost[:, plan[u]]
        if (extra <= left).all():
            plan[u], left = int(higher[0]), left - extra
    return plan


class BudgetError(InputError):
    """Budget number `which` is below the smallest that the units can reach."""

    def __init__(self, smallest: float, budget: float, which: int = 0):
        super().__init__(f"budget of {budget:g} is below the smallest reachable, {smallest:g}")
        self.smallest, self.which = smallest, which
