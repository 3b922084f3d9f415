"""One walk over the blocks: measure, solve, apply, run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan

from torch import nn

from planish import lanes
from planish.apply import apply_edits, count_block, store
from planish.calibrate.collect import Run, capture, measure_block
from planish.calibrate.measure import Measurements
from planish.calibrate.reuse import Reuse
from planish.calibrate.stream import Hidden, Stream, read_weights
from planish.core import SUBMODULES, Edit, Unit, Weights
from planish.modelling.blocks import Spec
from planish.plan.cuts import cut_unit
from planish.plan.planned import Emit, Planned
from planish.plan.problem import Problem
from planish.stats import Stats, Tap

BLEND = 0.6  # weight of the uncompressed model's moments where hardly any window is run again

Finish = Callable[[nn.Module], object]  # turns an uncompressed block into the one that an interrupted run has written


def solve(
    problem: Problem,
    measure: Measurements,
    planned: Planned,
    emit: Emit,
    *,
    finished: Mapping[int, Finish] | None = None,
    trial: str = "",
    made: dict[int, list[Edit]] | None = None,
) -> Hidden:
    """Walk the blocks, solve every planned unit, hand each finished block to `emit`; what the last block put out.

    `finished`: blocks that are only run. `trial`: a name where this plan is one of several to compare, whose outputs are
    wanted whatever is known already; `made`: the edits of every block are put in here. Behind an uncompressed prefix
    outputs are those of the uncompressed model, with the edits that the plan has worked out.
    """
    if planned.make is not None:
        planned.make(emit)
        return []
    walk = Walk(replace(problem, units=planned.solvers), measure, planned, bool(trial))
    if measure.progress:
        measure.progress(trial or "blocks", 0, len(problem.shapes))
    for i in range(len(problem.shapes)):
        finish = (finished or {}).get(i)
        block, spec, errors = walk.restore(i, finish) if finish else walk.solve(i)
        emit(i, block, spec, errors)
        if made is not None:
            made[i] = walk.edits
        del block  # or it lies beside the next one
        if measure.progress and not finish:
            measure.progress(trial or "blocks", i + 1, len(problem.shapes))
    return walk.hidden


def run_solved(
    problem: Problem, measure: Measurements, planned: Planned, stream: Stream, trial: str = "search"
) -> Hidden:
    """What the last block puts out, on the windows of `stream`, of the model that a plan makes."""
    hidden = stream.start()

    def emit(i: int, block: nn.Module, spec: Spec, errors: dict[str, float]) -> None:
        nonlocal hidden
        hidden = stream.run(i, stream.place(block), hidden)

    solve(problem, measure, planned, emit, trial=trial)
    return hidden


@dataclass
class Beside:
    """The uncompressed block beside the one being solved: its own inputs, what runs of it reuse, what was captured in one."""

    block: nn.Module
    hidden: Hidden
    reuse: Reuse | None
    seen: dict[str, Hidden] | None = None
    outputs: Hidden | None = None


class Walk:
    """Where a solve is: `hidden`, the inputs of the next block behind the prefix that the method measures on, `dense`, those of
    the uncompressed model beside it, if it runs along, and `edits` of the block that was solved last."""

    def __init__(self, problem: Problem, measure: Measurements, planned: Planned, trial: bool):
        self.problem, self.measure, self.planned, self.trial = problem, measure, planned, trial
        windows = sum(map(len, measure.stream.batches))
        self.stream = stream = measure.stream.spread(planned.refit(windows))
        self.share = planned.refit(windows) / windows if windows else 1.0
        self.sequential = planned.prefix != "dense"
        self.pristine = not self.sequential and not planned.edits  # all statistics are the uncompressed model's
        left = [self.find_left(i) for i in range(len(problem.shapes))]
        missing = any(not self.pristine or find_missing(problem, measure, i, u)[1] for i, u in enumerate(left) if u)
        known = not self.sequential and (bool(measure.stored) or (not missing and not trial))
        # behind the last block that is solved nothing is run, unless what the last one puts out is wanted
        self.last = len(left) - 1 if trial else max((i for i, u in enumerate(left) if u), default=-1)
        self.hidden: Hidden = stream.start() if stream.batches and not known and self.last >= 0 else []
        self.dense: Hidden | None = self.hidden if planned.prefix == "both" else None
        self.edits: list[Edit] = []

    def restore(self, i: int, finish: Finish) -> tuple[nn.Module, Spec, dict[str, float]]:
        """Block i as an interrupted run has written it."""
        block = self.stream.block(i)
        with self.measure.phase("stream"):
            finish(block)
            if self.dense is not None:
                self.dense = self.stream.run(i, self.stream.place(self.stream.block(i)), self.dense)
            self.hidden = self.run_prefix(i, block)
        return block, {}, {}

    def solve(self, i: int) -> tuple[nn.Module, Spec, dict[str, float]]:
        """Block i with its planned units cut, its spec, and the predicted loss of every cut unit."""
        stream, shape, phase = self.stream, self.problem.shapes[i], self.measure.phase
        block, errors = stream.block(i), dict[str, float]()
        assert count_block(block) == shape.count(), f"block {i} has {count_block(block)} weights, not {shape.count()}"
        edits, units = list(self.planned.edits.get(i, ())), self.find_left(i)
        weights = read_weights(block, stream)
        beside = None if self.dense is None else self.run_beside(i, copy.deepcopy(block), self.dense, units)
        spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
        reuse = self.start_reuse()
        outputs: Hidden | None = None
        for stage in self.planned.stages(units):
            with phase("stream"):
                pristine = self.pristine and not edits
                stats, outputs, origin = self.measure_stage(i, block, stage, beside, pristine, reuse)
            with phase("solve"):
                blend(stats, weights, self.share)
                new, predicted = self.solve_units(stage, weights, stats, origin)
                del stats
                errors |= predicted
                if edits:  # edits of a block are applied together, to a block as it was
                    block = stream.block(i)
                edits += new
                spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
        self.edits = edits
        if i >= self.last and not self.trial:
            self.hidden, self.dense = [], None
            return block, spec, errors
        with phase("stream"):
            if self.sequential or outputs is None:
                outputs = self.run_prefix(i, block, reuse and reuse.enter())
            if beside is not None:
                again = beside.reuse and beside.reuse.enter()
                self.dense = beside.outputs or stream.run(i, stream.place(beside.block), beside.hidden, reuse=again)
            self.hidden = outputs
        return block, spec, errors

    def find_left(self, i: int) -> list[Unit]:
        """Block i's units that are cut, and not by the edits that the plan has worked out."""
        done = {SUBMODULES.get(e.target) for e in self.planned.edits.get(i, ())}
        return [u for u in self.problem.cut(self.planned.ranks, i) if u.name not in done]

    def run_prefix(self, i: int, block: nn.Module, reuse: Reuse | None = None) -> Hidden:
        """What block i of the prefix puts out; `block` is the solved one."""
        if not self.sequential and len(self.hidden):
            block = self.stream.block(i, self.planned.edits.get(i, ()))
        return self.stream.run(i, self.stream.place(block), self.hidden, reuse=reuse)

    def start_reuse(self) -> Reuse | None:
        """None where runs of a block reuse nothing: copies to another device would take longer than what they save."""
        n = len(self.stream.pieces)
        saves = self.sequential and n > 1 and self.stream.device.type == "cpu"
        return Reuse(self.stream.limits, n) if saves else None

    def run_beside(self, i: int, block: nn.Module, hidden: Hidden, units: list[Unit]) -> Beside:
        """The uncompressed block i and its inputs; run already where all that solving these units sees of it can be kept."""
        beside = Beside(block, hidden, self.start_reuse())
        if sites := find_dense_sites(self.problem, self.measure, units):
            with self.measure.phase("stream"):
                placed = self.stream.place(block)
                beside.seen, beside.outputs = capture(self.stream, i, placed, sites, hidden)
        return beside

    def measure_stage(
        self, i: int, block: nn.Module, stage: list[Unit], beside: Beside | None, pristine: bool, reuse: Reuse | None
    ) -> tuple[Stats, Hidden | None, str]:
        """(Statistics that these units of block i need, the block's outputs if they came along, passes the statistics are from).

        `pristine`: they are the uncompressed model's, which the plan or the cache may know; else nothing is known but what
        the plan stored.
        """
        problem, cache, stored, stream = self.problem, self.measure.cache, self.measure.stored, self.stream
        dense: Run | dict[str, Hidden] | None = None
        if beside is not None:
            dense = beside.seen or Run(stream.place(beside.block), beside.hidden, beside.reuse)
        reuse = reuse and reuse.enter([u.name for u in stage])
        taps, origin, known = problem.taps(stage), "", Stats()
        known.merge(stored.get(i, Stats()))
        if pristine:
            origin, taps = find_missing(problem, self.measure, i, stage)
            if taps and cache.keeps:  # a smaller budget may cut what this one leaves whole
                taps = sorted({*taps, *find_missing(problem, self.measure, i, problem.block_units(i))[1]})
            known.merge(cache.stats("forward", i, set(problem.taps(stage)) - set(taps) - set(known.sums)))
        taps = [t for t in taps if t not in known.sums]
        stats, outputs = Stats(), None
        if taps or (self.sequential and len(self.hidden)):
            placed = stream.place(block)
            stats, outputs = measure_block(
                stream, i, placed, taps, self.hidden, dense, outputs=not self.sequential, reuse=reuse
            )
        if origin:
            cache.keep_stats("forward", i, stats)
        stats.merge(known)
        return stats, outputs, origin

    def solve_units(
        self, units: list[Unit], weights: Weights, stats: Stats, origin: str
    ) -> tuple[list[Edit], dict[str, float]]:
        """Edits of units of one block, in the order of units, and predicted losses; several processes share the units out."""
        problem, cache = self.problem, self.measure.cache

        def solve(unit: Unit) -> tuple[float, list[Edit]]:
            solver, shape, rank = problem.units[unit], problem.shapes[unit.block], self.planned.ranks[unit]
            if origin and (cache.memory or cache.has_frontier(origin, solver, unit)):  # factors stay, on the CPU
                frontier = cache.frontier(origin, solver, unit, partial(solver.decompose, unit, weights, stats, shape))
                return float(frontier.loss[rank]), store(solver.truncate(frontier, rank, shape), weights, unit)
            return cut_unit(problem, unit, [rank], weights, stats)[rank]

        found = lanes.share_out(units, problem.count, solve)
        errors = {str(unit): loss for unit, (loss, _) in zip(units, found, strict=True) if not isnan(loss)}
        return [edit for _, edits in found for edit in edits], errors  # nan: not predicted


def blend(stats: Stats, weights: Weights, share: float) -> None:
    """Where a solve runs a share s of the windows only: moments M behind the compressed prefix → (1 − λ) M + λ D, λ = (1 − s) ·
    `BLEND`, D the same moment of the uncompressed model over all windows but those set aside. Few tokens make M
    noisy, and D is near it.
    """
    if share >= 1:
        return
    level = (1 - share) * BLEND
    for tap in [t for t in stats.sums if t.twin in stats.sums]:
        assert tap.twin is not None
        dense = stats.mean(tap.twin)
        if tap.site.endswith(".product"):
            dense = weights[tap.other.rpartition(".")[0]].double() @ dense
        stats.sums[tap]["sum"].mul_(1 - level).add_(dense, alpha=level * stats.tokens[tap])


def find_dense_sites(problem: Problem, measure: Measurements, units: Sequence[Unit]) -> set[str]:
    """Sites of the uncompressed block that solving these units of one block looks at, if one run beside the stages can
    keep them all: none wider than what flows between submodules. On an accelerator nothing is kept, where running the
    block again takes less time than the copies."""
    if measure.given.device.type != "cpu":
        return set()
    known = measure.stored.taps(units[0].block) if units else set()
    seen = {s for t in problem.taps(units) if t not in known for s in t.sites}
    sites = {s.removeprefix("dense:") for s in seen if s.startswith("dense:")}
    shape = problem.shapes[units[0].block if units else 0]
    narrow = all(shape.width(s) <= max(shape.hidden, shape.heads * shape.v) for s in sites)
    return sites if narrow and not any(s.endswith(".gap") for s in seen) else set()


def find_missing(problem: Problem, measure: Measurements, i: int, units: Sequence[Unit]) -> tuple[str, list[Tap]]:
    """For solving block i's units on the uncompressed model's statistics: (the passes they come from, taps to measure).

    The passes' name is empty where something else has been stored.
    """
    stored, cache = measure.stored.get(i, Stats()), measure.cache
    origin = "forward" if i not in measure.stored else f"{stored.origin}+forward" if stored.origin else ""
    taps = problem.taps([u for u in units if not cache.has_frontier(origin, problem.units[u], u)])
    return origin, cache.missing("forward", i, [t for t in taps if t not in stored.sums])
