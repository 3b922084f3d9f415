"""Spending one or two budgets over units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

    @property
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

    `budgets`: what all units together may cost of each. A share of infinity leaves a unit whole. Of several budgets the
    one that allows the least t settles the units whose ranks it prices; the others go on with what is left of the rest.
    What rounding leaves over is handed out one rank step at a time, to the unit that lies furthest below its share.
    """
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
        return {u: c.largest(keeps[u], own[u], step) for u, c in units.items()}

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


@dataclass(frozen=True, eq=False)
class Curve:
    """A unit's choices: `ranks` (n,) with `cost` (budgets, n), or (n,) of a single one, and predicted `loss` (n,); the last
    one leaves the unit whole."""

    unit: Unit
    ranks: Tensor
    cost: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Alternative:
    """One way to treat a submodule: curves of units that go together, and the cost of what they leave untouched."""

    curves: tuple[Curve, ...]
    fixed: float | Sequence[float] = 0.0


def choose(groups: Sequence[Sequence[Alternative]], budget: float | Sequence[float]) -> tuple[Plan, float]:
    """One alternative per submodule and one rank per unit, least predicted loss within the budget or budgets; (plan, loss).

    For prices λ per unit of each cost every unit takes argmin(loss + λ · cost) and every submodule its best alternative:
    the optimum for the budgets that this spends (Lagrange; Everett 1963). One λ is bisected to its budget; of two, the
    second within each step of the first, so that both budgets hold. What is left over buys the best affordable upgrades.
    Optimal to one step per budget, whatever the curves' shape: costs may fall with the rank.
    """
    limits = torch.as_tensor(budget, dtype=torch.float64).reshape(-1)
    table = Table(groups, len(limits))
    if len(limits) == 1:
        found = bisect(table, limits)
        upgrade(table, found, limits)
    else:
        found = bisect_both(table, limits)
    at = {c: int(found.at[row]) for row, c in enumerate(table.curves) if found.used[row]}
    return {c.unit: int(c.ranks[i]) for c, i in at.items()}, sum(float(c.loss[i]) for c, i in at.items())


@dataclass
class Pick:
    """Per curve the index of its rank and whether its alternative is chosen; what it all costs and loses."""

    at: Tensor
    used: Tensor
    spent: Tensor
    loss: float
    prices: Tensor

    def fits(self, limits: Tensor) -> bool:
        return bool((self.spent <= limits * (1 + 1e-12)).all())


class Table:
    """All curves side by side, the short ones padded with choices that lose infinitely much."""

    def __init__(self, groups: Sequence[Sequence[Alternative]], budgets: int):
        alternatives = [a for group in groups for a in group]
        self.curves = list({id(c): c for a in alternatives for c in a.curves}.values())
        row = {id(c): n for n, c in enumerate(self.curves)}
        self.lengths = torch.tensor([len(c.ranks) for c in self.curves])
        width = int(self.lengths.max()) if self.curves else 1
        self.loss = torch.full((len(self.curves), width), torch.inf, dtype=torch.float64)
        self.cost = torch.zeros(budgets, len(self.curves), width, dtype=torch.float64)
        for n, c in enumerate(self.curves):
            self.loss[n, : len(c.ranks)] = c.loss
            self.cost[:, n, : len(c.ranks)] = c.cost.reshape(budgets, -1)
        self.member = torch.zeros(len(alternatives), len(self.curves), dtype=torch.float64)
        for n, a in enumerate(alternatives):
            self.member[n, [row[id(c)] for c in a.curves]] = 1
        self.fixed = torch.stack([torch.as_tensor(a.fixed, dtype=torch.float64).expand(budgets) for a in alternatives])
        sizes = [len(group) for group in groups]
        self.group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.sizes = sizes
        self.kept = torch.empty(0, dtype=torch.long)  # of a thinned table: indices in the whole one

    def pick(self, prices: Tensor, weight: float = 1.0) -> Pick:
        """argmin(weight · loss + prices · cost); `weight` 0 looks for what costs least."""
        loss = self.loss if weight else torch.where(self.loss < torch.inf, 0.0, torch.inf)
        value, at = (loss + torch.einsum("b,bcr->cr", prices, self.cost)).min(1)
        total = self.member @ value + self.fixed @ prices
        chosen = [
            start + int(total[start : start + n].argmin()) for start, n in zip(self.starts, self.sizes, strict=True)
        ]
        return self.count(at, self.member[chosen].sum(0) > 0, self.fixed[chosen].sum(0), prices.clone())

    def count(self, at: Tensor, used: Tensor, fixed: Tensor, prices: Tensor) -> Pick:
        rows = used.nonzero().flatten()
        spent = fixed + self.cost[:, rows, at[rows]].sum(1)
        return Pick(at, used, spent, float(self.loss[rows, at[rows]].sum()), prices)

    def thin(self, most: int) -> Table:
        """The same with at most about `most` ranks per curve, evenly spaced, its ends included; itself if it has no more."""
        width = self.loss.shape[1]
        if width <= most:
            return self
        few = copy.copy(self)
        steps = torch.linspace(0, 1, most, dtype=torch.float64)
        few.kept = ((self.lengths - 1)[:, None] * steps).round().long()
        few.loss = self.loss.gather(1, few.kept)
        few.cost = self.cost.gather(2, few.kept.expand(len(self.cost), -1, -1))
        return few

    def widen(self, pick: Pick, table: Table) -> Pick:
        """A pick of a thinned table in the whole one."""
        if self is table:
            return pick
        at = self.kept[torch.arange(len(pick.at)), pick.at]
        return Pick(at, pick.used, pick.spent, pick.loss, pick.prices)


LOW, HIGH = 1e-18, 1e6  # prices between which everything changes; a high one buys little
COARSE = 256  # ranks per curve among which the prices of two budgets are found
NEAR = 12  # of the picks that keep to both, so many of the best are upgraded


def bisect(table: Table, limits: Tensor, b: int = 0, other: Tensor | None = None, steps: int = 100) -> Pick:
    """The pick at the least price of budget b that keeps to it, whatever the others' prices are."""
    prices = torch.zeros(len(limits), dtype=torch.float64) if other is None else other.clone()

    def pick(price: float) -> Pick:
        prices[b] = price
        return table.pick(prices)

    def holds(found: Pick) -> bool:
        return bool(found.spent[b] <= limits[b] * (1 + 1e-12))

    low, high = LOW, HIGH
    best = pick(high)
    if not holds(best):  # beyond reach, or losses are so large that more must be paid for them
        best = table.pick(torch.eye(len(limits), dtype=torch.float64)[b], 0)
        if not holds(best):
            raise BudgetError(float(best.spent[b]), float(limits[b]), b)
        high *= 1e30
    if holds(found := pick(low)):
        return found
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if holds(found := pick(middle)):
            high, best = middle, found
        else:
            low = middle
    return best


def bisect_both(table: Table, limits: Tensor, steps: int = 32) -> Pick:
    """The best pick that keeps to both budgets, upgraded. Prices are found on at most `COARSE` ranks per curve."""
    coarse = table.thin(COARSE)
    found: list[tuple[float, Tensor, Pick]] = []

    def at(price: float) -> Pick | None:
        """The pick of the first budget at this price of the second; None where it cannot keep to the first."""
        prices = torch.tensor([0.0, price], dtype=torch.float64)
        try:
            pick = bisect(coarse, limits, 0, prices, steps)
        except BudgetError:
            return None
        if pick.fits(limits):
            found.append((pick.loss, pick.prices, coarse.widen(pick, table)))
        return pick

    first = at(LOW)
    if first is not None and not first.fits(limits):
        low, high = LOW, HIGH
        at(high)
        for _ in range(steps):
            middle = (low * high) ** 0.5
            pick = at(middle)
            if pick is None or pick.fits(limits):
                high = middle
            else:
                low = middle
    found.sort(key=lambda f: f[0])
    unlike = {(loss, *pick.spent.tolist()): pick for loss, _, pick in found}
    candidates = list(unlike.values())[:NEAR] or [find_feasible(table, limits)]
    if found and coarse is not table:
        low, high = 0.25, 4.0  # the same prices, scaled, on all ranks
        for _ in range(30):
            middle = (low * high) ** 0.5
            pick = table.pick(found[0][1] * middle)
            if pick.fits(limits):
                high = middle
                candidates.append(pick)
            else:
                low = middle
    for pick in candidates[:NEAR] + candidates[NEAR:][-2:]:
        upgrade(table, pick, limits)
    return min(candidates, key=lambda p: p.loss)


def find_feasible(table: Table, limits: Tensor) -> Pick:
    """A pick within both budgets that costs as little as possible, or BudgetError."""
    low, high = 0.0, 1.0
    best: Pick | None = None
    for _ in range(60):
        middle = (low + high) / 2
        found = table.pick(torch.tensor([1 - middle, middle], dtype=torch.float64) / limits.clamp(min=1e-300), 0)
        if found.fits(limits):
            return found
        if found.spent[0] <= limits[0] * (1 + 1e-12):
            best, low = found, middle
        else:
            high = middle
    if best is None:
        alone = table.pick(torch.tensor([1.0, 0.0], dtype=torch.float64), 0)
        if alone.spent[0] > limits[0]:
            raise BudgetError(float(alone.spent[0]), float(limits[0]), 0)
        best = alone
    raise BudgetError(float(best.spent[1]), float(limits[1]), 1)


def upgrade(table: Table, found: Pick, limits: Tensor) -> None:
    """Spend what is left on the steps that save most loss for the share of what is left they take, in place."""
    rows = found.used.nonzero().flatten()
    cost, loss = table.cost[:, rows], table.loss[rows]
    inside = torch.arange(len(rows))
    while len(rows):
        at = found.at[rows]
        left = limits - found.spent
        extra = cost - cost[:, inside, at].unsqueeze(-1)
        gain = loss[inside, at].unsqueeze(-1) - loss
        usable = (extra <= left[:, None, None]).all(0) & (gain > 0)
        if not usable.any():
            return
        if len(limits) == 1:
            price = extra[0].clamp(min=1e-9)
        else:
            price = (extra.clamp(min=0) / left.clamp(min=1e-9)[:, None, None]).amax(0).clamp(min=1e-12)
        slope = torch.where(usable, gain / price, -1.0)
        row, column = divmod(int(slope.argmax()), slope.shape[1])
        found.spent = found.spent + extra[:, row, column]
        found.loss -= float(gain[row, column])
        found.at[rows[row]] = column
