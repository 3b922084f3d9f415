"""Units cut to given ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from planish.apply import store
from planish.core import Edit, Unit, Weights
from planish.plan.problem import Problem
from planish.solvers.offload import solve_there
from planish.stats import Stats


class Cut(NamedTuple):
    """What a unit is predicted to lose at a rank, and the edits that cut it to that, in the weights' own dtype."""

    loss: float
    edits: list[Edit]


def cut_unit(problem: Problem, unit: Unit, ranks: Iterable[int], weights: Weights, stats: Stats) -> dict[int, Cut]:
    """Its cuts to these ranks, from one decomposition, solved on the accelerator where there is one."""
    solver, shape = problem.units[unit], problem.shapes[unit.block]

    def solve(weights: Weights, stats: Stats) -> dict[int, Cut]:
        frontier = solver.decompose(unit, weights, stats, shape)
        return {r: Cut(float(frontier.loss[r]), solver.truncate(frontier, r, shape)) for r in sorted(set(ranks))}

    found = solve_there(solve, weights, stats, solver.taps(unit, shape))
    return {rank: Cut(cut.loss, store(cut.edits, weights, unit)) for rank, cut in found.items()}
