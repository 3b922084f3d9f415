"""Ranks by predicted losses: the least sum within one or two budgets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.core import Plan, Unit
from planish.plan.spread import BudgetError


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
