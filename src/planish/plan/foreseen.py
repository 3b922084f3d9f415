"""What a plan will be and what it takes to find it, as far as shapes tell.

Where a method measures to choose its ranks, its `foresee` gives ranks as they would be if every unit mattered as typical ones
do, and the walks over the blocks that finding the real ones takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from planish.core import Frontier, Shape, Solver, Unit
from planish.plan.frontiers import dense_taps, stored_taps
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.stats import Tap

Taps = Callable[[Shape], Iterable[Tap]]


def list_none(shape: Shape) -> Iterable[Tap]:
    return ()


@dataclass(frozen=True)
class Work:
    """A walk over the blocks that a plan takes.

    `name`: what progress calls it. `windows`: calibration windows that run, None: all. `passes`: forward passes through
    block i. `taps`: what is summed in a block. `gradients`: the walk goes back as well. `solvers`: units whose frontiers are
    worked out. `cuts`: how often those of block i are cut to a rank. `heads`: how often the windows go through the head.
    `solve`: in the place of all this, the walk that solves this plan. `stored`: what the solve at the end need not measure again.
    """

    name: str = "statistics"
    windows: int | None = None
    passes: Callable[[int], float] = lambda i: 1.0
    taps: Taps = list_none
    gradients: bool = False
    solvers: Mapping[Unit, Solver] | None = None
    cuts: Callable[[int], float] = lambda i: 0.0
    heads: float = 0.0
    solve: Planned | None = None
    stored: Taps = list_none


class Foreseen(NamedTuple):
    """A plan with ranks as they are expected, and what finding the real one takes; nothing where ranks follow from shapes."""

    planned: Planned
    work: Sequence[Work] = ()


def compare_trials(starts: Sequence[int], windows: int) -> Work:
    """A walk in which trials, each beginning to differ at one of these blocks, run side by side to be compared by their loss."""
    return Work("search", windows, lambda i: 1.0 + sum(s <= i for s in starts), heads=len(starts))


def survey(problem: Problem) -> Work:
    """A pass that measures what the frontiers of all units need, and works them out."""
    return Work(taps=lambda shape: problem.taps(problem.block_units(shape.block)), solvers=problem.units)


def survey_back(problem: Problem, refit: bool = False) -> Work:
    """A pass there and back for the frontiers of all units (see `planish.plan.frontiers.measure_gradients`)."""

    def stored(shape: Shape) -> set[Tap]:
        return {*dense_taps(problem, shape.block)} & stored_taps(problem, shape.block, refit)

    return Work("gradients", None, taps=lambda shape: dense_taps(problem, shape.block), gradients=True,
                solvers=problem.units, stored=stored)  # fmt: skip


STEEPNESS = {"k": 3.0, "v": 3.0, "q": 6.0, "o": 6.0}  # p below, other units: 2; so SmolLM2's cuts at keep 0.8 come out


def expect_frontiers(problem: Problem) -> dict[Unit, Frontier]:
    """For every unit a loss that falls with the rank as real ones typically do: w (1 − r / full)^p, w the weights it holds."""
    found = {}
    for unit in problem.units:
        full = problem.full(unit)
        gone = 1 - torch.arange(full + 1, dtype=torch.float64) / full
        loss = problem.count(unit, full) * gone ** STEEPNESS.get(unit.name, 2.0)
        found[unit] = Frontier(unit, loss)
    return found
