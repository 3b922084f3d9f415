"""Spending a budget over units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.core import Frontier, Shape, Solver, Unit
from planish.errors import InputError
from planish.plan.footprint import count_weights, find_rank
from planish.plan.spread import BudgetError, Choices
from planish.plan.spread import spread as spread_choices
from planish.plan.spread import spread_by_kind as spread_choices_by_kind
from planish.solvers.linear import LinearSVD
from planish.solvers.neurons import Neurons
from planish.solvers.rotary_pairs import RotaryPairs
from planish.solvers.value_pca import ValuePCA

settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("quick")


def shapes(n: int, hidden: int = 24, intermediate: int = 56) -> list[Shape]:
    return [Shape(i, hidden, 4, 2, 6, 6, intermediate, 6, True) for i in range(n)]


def cover(solvers: list[Solver], blocks: list[Shape]) -> dict[Unit, Solver]:
    return {u: s for s in solvers for shape in blocks for u in s.units(shape)}


def spent(units: dict[Unit, Solver], blocks: list[Shape], plan: dict[Unit, int]) -> int:
    return sum(count_weights(s, u, blocks[u.block], plan[u]) for u, s in units.items())


def spread(units, blocks, share, budget, step=1, rule=spread_choices):
    """Of one budget that counts weights."""
    choices = {}
    for u, s in units.items():
        ranks = list(s.ranks(u, blocks[u.block]))
        cost = torch.tensor([[float(count_weights(s, u, blocks[u.block], r)) for r in ranks]], dtype=torch.float64)
        choices[u] = Choices(torch.tensor(ranks), cost)
    return rule(choices, share, [budget], step)


def spread_by_kind(*arguments):
    return spread(*arguments, rule=spread_choices_by_kind)


@given(st.lists(st.floats(0.02, 1), min_size=2, max_size=7), st.floats(0.15, 0.98), st.sampled_from([1, 2, 3]))
def test_every_kind_keeps_its_own_share(importance, keep, step):
    """What a kind of unit spends is what its shares ask for, within one of its own steps and what others hand on."""
    blocks = shapes(len(importance))
    units = cover([ValuePCA(), Neurons(), RotaryPairs()], blocks)
    full = {u: count_weights(s, u, blocks[u.block], s.ranks(u, blocks[u.block])[-1]) for u, s in units.items()}
    budget = int(keep * sum(full.values()))
    smallest = {
        u: count_weights(s, u, blocks[u.block], find_rank(s, u, blocks[u.block], 0.0, step)) for u, s in units.items()
    }
    if sum(smallest.values()) > budget:
        with pytest.raises(BudgetError):
            spread_by_kind(units, blocks, lambda u: importance[u.block], budget, step)
        return
    plan = spread_by_kind(units, blocks, lambda u: importance[u.block], budget, step)
    assert spent(units, blocks, plan) <= budget
    wanted = dict(zip(range(len(importance)), iterative_clipping(importance, keep)))
    coarse = max(max(u_step(units[u], u, blocks, step) for u in units if u.name == n) for n in ("qk", "vo", "mlp"))
    if all(wanted[u.block] * full[u] >= smallest[u] for u in units):
        for name in ("qk", "vo", "mlp"):
            kind = [u for u in units if u.name == name]
            asked = sum(wanted[u.block] * full[u] for u in kind)
            got = sum(count_weights(units[u], u, blocks[u.block], plan[u]) for u in kind)
            assert abs(got - asked) <= 2 * coarse + 1e-3 * sum(full.values())


def u_step(solver: Solver, unit: Unit, blocks: list[Shape], step: int) -> int:
    """The largest difference in cost of two neighbouring admissible ranks."""
    shape = blocks[unit.block]
    ranks = [r for r in solver.ranks(unit, shape) if r % step == 0 or r == solver.ranks(unit, shape)[-1]]
    costs = [count_weights(solver, unit, shape, r) for r in ranks]
    return max((b - a for a, b in pairwise(costs)), default=0)


def iterative_clipping(importance: list[float], keep: float) -> list[float]:
    """FLAT-LLM's Algorithm 1: w_l = B t_l / Σ t over the active blocks; whatever exceeds 1 is fixed there."""
    active, fixed = set(range(len(importance))), {}
    budget = keep * len(importance)
    while True:
        total = sum(importance[i] for i in active)
        w = {i: budget * importance[i] / total for i in active}
        over = [i for i in active if w[i] > 1]
        if not over:
            return [fixed.get(i, w.get(i, 1.0)) for i in range(len(importance))]
        for i in over:
            fixed[i] = 1.0
            active.remove(i)
            budget -= 1


@given(st.lists(st.floats(0.02, 1), min_size=2, max_size=8), st.floats(0.1, 0.95))
def test_spread_is_iterative_clipping(importance, keep):
    """Shares in proportion, clipped at 1, the rest raised until the budget is spent."""
    blocks = shapes(len(importance), hidden=1, intermediate=1_000)
    units = cover([Neurons()], blocks)
    budget = int(keep * spent(units, blocks, dict.fromkeys(units, 1_000)))
    plan = spread(units, blocks, lambda u: importance[u.block], budget)
    got = [plan[Unit(i, "mlp")] / 1_000 for i in range(len(importance))]
    assert got == pytest.approx(iterative_clipping(importance, keep), abs=3e-3)


SOLVERS = [
    [Neurons(), ValuePCA()],
    [LinearSVD()],
    [LinearSVD(form="pivoted")],
    [ValuePCA(), LinearSVD(roles=("gate", "up", "down"))],
]


@given(
    st.sampled_from(SOLVERS),
    st.lists(st.one_of(st.floats(0, 3), st.just(float("inf"))), min_size=3, max_size=3),
    st.floats(0.05, 1),
    st.sampled_from([1, 2, 4, 8]),
)
def test_budget_is_met_and_never_exceeded(solvers, shares, keep, step):
    blocks = shapes(3)
    units = cover(solvers, blocks)
    full = {u: s.ranks(u, blocks[u.block])[-1] for u, s in units.items()}
    budget = int(keep * spent(units, blocks, full))
    try:
        plan = spread(units, blocks, lambda u: shares[u.block], budget, step)
    except BudgetError as error:
        plan, smallest = None, error.smallest
    if plan is None:
        assert smallest > budget
        return
    assert set(plan) == set(units) and spent(units, blocks, plan) <= budget
    left = budget - spent(units, blocks, plan)
    for u, s in units.items():
        ranks = s.ranks(u, blocks[u.block])
        assert plan[u] in ranks and (plan[u] % step == 0 or plan[u] in (full[u], min(ranks)))
        if shares[u.block] == float("inf"):
            assert plan[u] == full[u]
    steps = []
    for u, s in units.items():
        higher = [r for r in s.ranks(u, blocks[u.block]) if r > plan[u] and (r % step == 0 or r == full[u])]
        if higher and shares[u.block] > 0:
            steps.append(
                count_weights(s, u, blocks[u.block], higher[0]) - count_weights(s, u, blocks[u.block], plan[u])
            )
    assert not steps or left < max(steps)


def test_more_budget_is_not_less_rank():
    blocks = shapes(3)
    units = cover([Neurons(), ValuePCA()], blocks)
    full = spent(units, blocks, {u: s.ranks(u, blocks[u.block])[-1] for u, s in units.items()})
    totals = [
        spent(units, blocks, spread(units, blocks, lambda u: 1.0 + u.block, int(k * full / 50))) for k in range(5, 51)
    ]
    assert totals == sorted(totals) and totals[-1] == full


def test_what_cannot_be_reached_is_named():
    blocks = shapes(2)
    units = cover([LinearSVD()], blocks)
    with pytest.raises(InputError, match="smallest reachable"):
        spread(units, blocks, lambda u: 1.0, 10)


@dataclass(frozen=True)
class Coarse(Neurons):
    """Ranks in steps of ten, so that the largest multiple of `step` matters."""

    def ranks(self, unit, shape):
        return [*range(10, shape.intermediate, 10), shape.intermediate]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("step", [1, 4, 16])
@pytest.mark.parametrize("solver", [Neurons(), Coarse(), ValuePCA(), LinearSVD(), LinearSVD(form="pivoted")], ids=repr)
def test_rank_at_is_the_largest_that_fits(solver, step, keep):
    (shape,) = shapes(1)
    for unit in solver.units(shape):
        ranks = list(solver.ranks(unit, shape))
        allowed = [r for r in ranks if r % step == 0 or r == ranks[-1]]
        full = count_weights(solver, unit, shape, ranks[-1])
        fits = [r for r in allowed if count_weights(solver, unit, shape, r) <= keep * full * (1 + 1e-9)]
        assert find_rank(solver, unit, shape, keep, step) == (max(fits) if fits else allowed[0])


def test_frontiers_end_whole():
    """The last admissible rank costs what the stock linears cost."""
    for blocks in (shapes(1), shapes(1, hidden=10, intermediate=7)):
        for solver in (Neurons(), ValuePCA(), LinearSVD(), LinearSVD(form="pivoted")):
            for unit in solver.units(blocks[0]):
                roles = {"mlp": ("gate", "up", "down"), "vo": ("v", "o")}.get(unit.name, (unit.name,))
                assert count_weights(solver, unit, blocks[0], solver.ranks(unit, blocks[0])[-1]) == blocks[0].count(
                    *roles
                )
    assert float(torch.as_tensor(Frontier(Unit(0, "q"), [1.0, 0.0]).loss)[-1]) == 0
