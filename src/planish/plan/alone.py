"""How far each unit alone, cut to one rank, moves what the whole model predicts."""

from __future__ import annotations

from collections.abc import Callable

from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, read_weights
from planish.core import Plan, Unit
from planish.plan.cuts import cut_unit
from planish.plan.problem import Problem


def measure_alone(
    problem: Problem, measure: Measurements, plan: Plan, few: Stream, lost: Callable[[Hidden], float]
) -> dict[Unit, float]:
    """For every unit that a plan cuts, `lost` of what the last block puts out where it alone has its rank, on the windows of
    `few`.

    Cuts are solved from the statistics in `measure.stored`. Costs, per unit, the windows through the blocks behind it.
    """
    hidden, found = few.start(), dict[Unit, float]()
    for i in range(len(problem.shapes)):
        block, stats, outputs = few.block(i), measure.stored[i], dict[Unit, Hidden]()
        weights = read_weights(block, few)
        for unit in problem.cut(plan, i):
            with measure.phase("frontiers"):
                _, edits = cut_unit(problem, unit, [plan[unit]], weights, stats)[plan[unit]]
            outputs[unit] = few.run(i, few.place(few.block(i, edits)), hidden)
        hidden = few.run(i, few.place(block), hidden)
        for j in range(i + 1, len(few)):  # all of them side by side, so that a block is read once
            behind = few.place(few.block(j))
            outputs = {u: few.run(j, behind, h) for u, h in outputs.items()}
        found |= {u: lost(h) for u, h in outputs.items()}
        if measure.progress:
            measure.progress("single cuts", i + 1, len(problem.shapes))
    return found
