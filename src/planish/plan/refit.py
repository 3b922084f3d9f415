"""Bypasses fitted again on the model that has all of them, and down projections that make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from planish.calibrate.collect import Run, measure_block
from planish.calibrate.measure import Measurements
from planish.core import SUBMODULES, Edit, Shape, Solver, Unit
from planish.modelling.blocks import get_linear
from planish.plan.problem import Problem
from planish.solvers.moments import Moments
from planish.solvers.window import down_edit, fit_correction
from planish.stats import Stats, Tap


def fit_units(problem: Problem, measure: Measurements, units: Sequence[Unit]) -> dict[Unit, list[Edit]]:
    """The units' bypasses, each by its own solver, from the uncompressed model's statistics."""
    fits: dict[Unit, list[Edit]] = {}
    own = {s.block: [u for u in units if u.block == s.block] for s in problem.shapes}
    for i, _, stats in measure.forward(lambda shape: problem.taps(own[shape.block])):
        fits |= {u: fit_unit(problem.units[u], u, stats, problem.shapes[i]) for u in own[i]}
    return fits


def refit_jointly(problem: Problem, measure: Measurements, edits: Mapping[int, list[Edit]]) -> dict[int, list[Edit]]:
    """All bypasses fitted again, to what each submodule would add to the stream that the model with `edits` has."""
    found: dict[int, list[Edit]] = {}
    stream = measure.stream
    with measure.phase("statistics"):
        hidden = stream.start()
        for i, shape in enumerate(problem.shapes):
            before: list[Edit] = []
            for edit in sorted(edits.get(i, ()), key=lambda e: e.target):  # attention, then mlp
                unit = Unit(i, SUBMODULES[edit.target])
                solver, block = problem.units[unit], stream.place(stream.block(i, before))
                stats, _ = measure_block(stream, i, block, solver.taps(unit, shape), hidden, outputs=False)
                found.setdefault(i, []).extend(fit_unit(solver, unit, stats, shape))
                before.append(edit)
            hidden = stream.run(i, stream.place(stream.block(i, edits.get(i, ()))), hidden)
    return found


def refit_and_repair(
    problem: Problem, measure: Measurements, edits: Mapping[int, list[Edit]], again: bool, ridge: float
) -> dict[int, list[Edit]]:
    """From the first block to the last: bypasses fitted again, if asked for, and down projections that stay."""
    found: dict[int, list[Edit]] = {}
    stream = measure.stream
    taps = [Tap("down.in", "moments", "mlp.gap", part=part) for part in ("fit", "held")]
    with measure.phase("statistics"):
        hidden = dense_hidden = stream.start()
        for i, shape in enumerate(problem.shapes):
            dense, new = Run(stream.place(stream.block(i)), dense_hidden), list[Edit]()
            for edit in sorted(edits.get(i, ()), key=lambda e: e.target):
                if not again:
                    new.append(edit)
                    continue
                unit = Unit(i, SUBMODULES[edit.target])
                solver, block = problem.units[unit], stream.place(stream.block(i, new))
                stats, _ = measure_block(stream, i, block, solver.taps(unit, shape), hidden, dense, outputs=False)
                new += fit_unit(solver, unit, stats, shape)
            if (found or new) and not any(e.target == "mlp" for e in new):
                block = stream.block(i, new)
                stats, _ = measure_block(stream, i, stream.place(block), taps, hidden, dense, outputs=False)
                train, held = (Moments.read(stats, tap) for tap in taps)
                new.append(repair_edit(get_linear(block, stream.family, "down"), train, held, ridge))
            if new:
                found[i] = new
            hidden = stream.run(i, stream.place(stream.block(i, new)), hidden)
            dense_hidden = stream.run(i, dense.block, dense_hidden)
    return found


def repair_edit(down: nn.Linear, train: Moments | None, held: Moments | None, ridge: float) -> Edit:
    """The down projection nearest to the one it was that gives what the moments' f asks for."""
    assert train is not None
    bias = None if down.bias is None else down.bias.detach()
    if bias is not None:  # it stays
        train, held = train.shift(bias.double()), held and held.shift(bias.double())
    w = fit_correction(train, held, down.weight.detach().double().T, ridge)
    return down_edit({"down": down.weight.detach()}, w.T, bias)


def fit_unit(solver: Solver, unit: Unit, stats: Stats, shape: Shape) -> list[Edit]:
    """A unit's bypass from its block's statistics."""
    return solver.truncate(solver.decompose(unit, {}, stats, shape), 0, shape)
