"""What cutting each unit is predicted to cost at every rank, from statistics of the uncompressed model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from torch import nn

from planish import lanes
from planish.calibrate.losses import Probe
from planish.calibrate.measure import Measurements, name_back
from planish.calibrate.stream import read_weights
from planish.core import Frontier, Shape, Solver, Unit, Weights
from planish.plan.problem import Problem
from planish.plan.rough import forecast
from planish.plan.token_prices import choose_aside, level, price_by_tokens, token_taps
from planish.solvers.offload import solve_there
from planish.stats import Stats, Tap

Frontiers = dict[Unit, Frontier]
SCORED = ("q", "k", "qk", "keys")  # units whose cuts change what is attended to
SITE = "o.out"  # where their errors are measured


def measure_frontiers(problem: Problem, measure: Measurements) -> Frontiers:
    """Every unit's frontier, without the factors."""
    found: Frontiers = {}
    for i, block, stats in measure.forward(lambda shape: problem.taps(problem.block_units(shape.block))):
        found |= decompose_block(problem, measure, block, stats, i)
    return found


def measure_gradients(
    problem: Problem, measure: Measurements, probe: Probe, kept: Callable[[int], Iterable[Tap]] | None = None
) -> Frontiers:
    """Every unit's frontier, without the factors, by one pass forward and back of the uncompressed model. Of block i what
    `kept(i)` names is stored: by default what the solve uses again, where it runs all windows (see `stored_taps`)."""
    found: Frontiers = {}
    kept = kept or partial(stored_taps, problem, refit=False)
    aside = choose_aside(problem, sum(map(len, measure.stream.batches)), measure.stream.batches[0].shape[1])
    origin = name_back(probe, aside)
    known = all(measure.cache.losses(origin, s, u) for u, s in problem.units.items() if s.effect_role(u))

    def taps(shape: Shape) -> list[Tap]:
        rows = token_taps(problem, shape.block) if aside and not known else set()
        return sorted({*dense_taps(problem, shape.block), *judging_taps(problem, shape.block), *rows})

    for i, block, stats in measure.backward(taps, probe=probe, aside=aside):
        found |= decompose_block(problem, measure, block, stats, i)
        measure.stored[i] = stats.only({*kept(i), *judging_taps(problem, i)})
    return level(found)


def decompose_block(problem: Problem, measure: Measurements, block: nn.Module, stats: Stats, i: int) -> Frontiers:
    """Frontiers of block i's units, without the factors; several processes share them out."""
    weights, cache = read_weights(block, measure.stream), measure.cache
    new: list[tuple[Solver, Frontier]] = []

    def decompose(unit: Unit) -> Frontier:
        solver, shape = problem.units[unit], problem.shapes[i]
        if known := cache.losses(stats.origin, solver, unit):
            return known

        def price(weights: Weights, stats: Stats) -> Frontier:
            f = solver.decompose(unit, weights, stats, shape)
            rough = forecast(problem, unit, weights, stats)
            return replace(price_by_tokens(problem, f, stats), factors={}, rough=rough)

        with measure.phase("frontiers"):
            taps = {*solver.taps(unit, shape), *solver.dense_taps(unit, shape)}
            new.append((solver, solve_there(price, weights, stats, taps)))
        return new[-1][1]

    units = problem.block_units(i)
    found = lanes.share_out(units, problem.count, decompose)
    cache.keep_losses(stats.origin, new)
    return dict(zip(units, found, strict=True))


def dense_taps(problem: Problem, i: int) -> list[Tap]:
    """Taps of block i's units that the uncompressed model alone answers: those of their frontiers to plan by."""
    return sorted({t for u in problem.block_units(i) for t in problem.units[u].dense_taps(u, problem.shapes[i])})


def judging_taps(problem: Problem, i: int) -> set[Tap]:
    """By what the error of cut queries and keys of block i is weighed (`planish.plan.scores`), where any may be cut."""
    return {Tap(f"grad:{SITE}", "gram")} if any(u.name in SCORED for u in problem.block_units(i)) else set()


def stored_taps(problem: Problem, i: int, refit: bool) -> set[Tap]:
    """Taps of block i's units that the solve uses of what the plan measured.

    `refit`: it runs some of the windows only, and blends what it sees with the uncompressed model's moments.
    """
    taps = set(problem.taps(problem.block_units(i)))
    return taps | ({t.twin for t in taps if t.twin} if refit else set())
