"""One walk over the blocks: statistics, solve, apply, run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, isnan
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from planish import lanes
from planish.apply import apply_edits, count_block, narrow
from planish.calibrate.reuse import Midway
from planish.calibrate.stream import Stream
from planish.core import SUBMODULES, Edit, Plan, Unit, Weights
from planish.modelling.blocks import Spec, get_linear, read_layout
from planish.stats import Stats, Tap

if TYPE_CHECKING:
    from planish.job import Job

BLEND = 0.6  # share of the uncompressed model's moments where hardly any window is run again


def solve(
    job: Job, plan: Plan, emit: Callable[[int, nn.Module, Spec], None], phase: str = "blocks"
) -> Sequence[Tensor]:
    """Walk the blocks, solve every planned unit, hand each finished block to `emit`; last block's outputs."""
    method, stream = job.method, job.solve_stream()
    sequential = method.prefix != "dense"
    pristine = not sequential and not job.edits  # then all statistics are the uncompressed model's
    missing = any(find_missing(job, s.block, job.planned(s.block, plan))[1] for s in job.shapes)
    ready = phase == "blocks" and pristine and not missing
    hidden = stream.start() if stream.batches and not ready and (sequential or not job.stored) else []
    dense_hidden = hidden if method.prefix == "both" else None
    for i, shape in enumerate(job.shapes):
        if i in job.finished:
            block = stream.block(i)
            with job.phase("stream"):
                job.finished[i](block)
                if dense_hidden is not None:
                    dense_hidden = stream.run(i, stream.place(stream.block(i)), dense_hidden)
                seen = block if sequential else stream.block(i, job.edits.get(i, ()))
                hidden = stream.run(i, stream.place(seen), hidden)
            emit(i, block, {})
            continue
        block = stream.block(i)
        before = count_block(block)
        assert before == shape.count(), f"block {i} has {before} weights, its shape says {shape.count()}"
        edits = list(job.edits.get(i, []))
        done = {SUBMODULES.get(e.target) for e in edits}
        units = [u for u in job.planned(i, plan) if u.name not in done]
        outputs = None
        weights = read_weights(block, stream)
        dense = copy.deepcopy(block) if method.prefix == "both" else None
        spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
        n = len(stream.pieces)
        midway, beside = (
            Midway(stream.room, n) if sequential and n > 1 and stream.device.type == "cpu" else None for _ in range(2)
        )  # copies to another device would take longer than what they save
        captured, dense_outputs = None, None
        sites = find_sites_beside(job, units)
        if dense is not None and dense_hidden is not None and sites:
            with job.phase("stream"):
                captured, dense_outputs = stream.capture(i, stream.place(dense), sites, dense_hidden)
        for stage in method.stages(units):
            with job.phase("stream"):
                pair: Any = captured
                if captured is None and dense is not None and dense_hidden is not None:
                    pair = (stream.place(dense), dense_hidden)
                starts = midway and midway.enter([u.name for u in stage])
                stats, outputs, origin = measure_stage(
                    job, stream, i, block, stage, hidden, pair, pristine and not edits, starts, beside
                )
                del pair, starts
            with job.phase("solve"):
                blend(job, stats, weights)
                new = solve_units(job, stage, plan, weights, stats, origin)
                if edits:  # edits of a block are applied together, to a block as it was
                    block = stream.block(i)
                edits += new
                spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
                del stats
        with job.phase("stream"):
            if sequential or outputs is None:
                outputs = stream.run(i, stream.place(block), hidden, midway=midway and midway.enter())
            if dense is not None and dense_hidden is not None:
                dense_hidden = dense_outputs or stream.run(
                    i, stream.place(dense), dense_hidden, midway=beside and beside.enter()
                )
            del midway, beside
            hidden = outputs
        emit(i, block, spec)
        if job.progress:
            job.progress(phase, i + 1, len(job.shapes))
    return hidden


def count_refit(n: int, share: float) -> int:
    """How many of n calibration windows a solve runs that takes this share of them."""
    return min(n, max(1, ceil(share * n)))


def measure_stage(
    job: Job,
    stream: Stream,
    i: int,
    block: nn.Module,
    stage: list[Unit],
    hidden: Any,
    pair: Any,
    pristine: bool,
    midway: Midway | None = None,
    beside: Midway | None = None,
) -> tuple[Stats, Any, str]:
    """(Statistics that these units of block i need, the block's outputs if they came along, passes the statistics are from).

    `pristine`: they are the uncompressed model's, which the plan or the cache may know; else nothing is known but what the
    plan stored. `pair`: what is captured of the uncompressed block, or that block and its inputs.
    """
    sequential = job.method.prefix != "dense"
    taps, origin, known = job.taps(stage), "", Stats()
    known.merge(job.stored.get(i, Stats()))
    if pristine:
        origin, taps = find_missing(job, i, stage)
        if taps and job.cache.keeps:  # a smaller budget may cut what this one leaves whole
            taps = sorted({*taps, *find_missing(job, i, job.block_units(i))[1]})
        known.merge(job.cache.stats("forward", i, set(job.taps(stage)) - set(taps) - set(known.sums)))
    taps = [t for t in taps if t not in known.sums]
    stats, outputs = Stats(), None
    if taps or sequential:
        stats, outputs = stream.measure(i, stream.place(block), taps, hidden, pair, not sequential, midway, beside)
    if origin:
        job.cache.keep_stats("forward", i, stats)
    stats.merge(known)
    return stats, outputs, origin


def blend(job: Job, stats: Stats, weights: Weights) -> None:
    """Where a solve runs a share s of the windows only: moments M behind the compressed prefix → (1 − λ) M + λ D, λ = (1 − s) ·
    `BLEND`, D the same moment of the uncompressed model over all windows. Few tokens make M noisy, and D is near it.
    """
    share = job.solve_share()
    if share >= 1:
        return
    level = (1 - share) * BLEND
    for tap in [t for t in stats.sums if t.twin in stats.sums]:
        assert tap.twin is not None
        dense = stats.mean(tap.twin)
        if tap.site.endswith(".product"):
            dense = weights[tap.other.rpartition(".")[0]].double() @ dense
        stats.sums[tap]["sum"].mul_(1 - level).add_(dense, alpha=level * stats.tokens[tap])


def solve_units(job: Job, units: list[Unit], plan: Plan, weights: Weights, stats: Stats, origin: str) -> list[Edit]:
    """Edits of units of one block, in the order of units; several processes share the units out by cost."""
    found: dict[int, tuple[float, list[Edit]]] = {}
    for n in lanes.own_work([job.count(u, job.full(u)) for u in units]):
        unit, shape = units[n], job.shapes[units[n].block]
        solver = job.units[unit]
        make = partial(solver.decompose, unit, weights, stats, shape)
        frontier = job.cache.frontier(origin, solver, unit, make) if origin else make()
        edits = [
            store(e, weights, f"block {unit.block}, {unit.name}") for e in solver.truncate(frontier, plan[unit], shape)
        ]
        found[n] = (float(frontier.loss[plan[unit]]), edits)
        del frontier, make  # before the next one is made
    found = {n: f for part in lanes.gather(found) for n, f in part.items()}
    for n, unit in enumerate(units):
        if not isnan(found[n][0]):  # nothing is predicted
            job.errors[str(unit)] = found[n][0]
    return [edit for n in range(len(units)) for edit in found[n][1]]


def find_sites_beside(job: Job, units: list[Unit]) -> set[str]:
    """Sites of the uncompressed block that solving these units of one block looks at, if one run beside the stages can
    keep them all: none wider than what flows between submodules. On an accelerator nothing is kept, where running the
    block again takes less time than the copies."""
    if job.stream.device.type != "cpu":
        return set()
    known = job.stored.taps(units[0].block) if units else set()
    seen = {s for t in job.taps(units) if t not in known for s in t.sites}
    sites = {s.removeprefix("dense:") for s in seen if s.startswith("dense:")}
    shape = job.shapes[units[0].block] if units else job.shapes[0]
    narrow = all(shape.width(s) <= max(shape.hidden, shape.heads * shape.v) for s in sites)
    return sites if narrow and not any(s.endswith(".gap") for s in seen) else set()


def find_missing(job: Job, i: int, units: list[Unit]) -> tuple[str, list[Tap]]:
    """For solving block i's units on the uncompressed model's statistics: (the passes they come from, taps to measure).

    The passes' name is empty where something else has been stored.
    """
    stored = job.stored.get(i, Stats())
    origin = "forward" if i not in job.stored else f"{stored.origin}+forward" if stored.origin else ""
    taps = job.taps([u for u in units if not job.cache.holds(origin, job.units[u], u)])
    return origin, job.cache.missing("forward", i, [t for t in taps if t not in stored.sums])


def store(edit: Edit, weights: Weights, where: str) -> Edit:
    """The edit in the weights' own dtype, in which it will be applied."""
    kind = next(iter(weights.values())).dtype
    return replace(edit, tensors={n: narrow(t, kind, where) for n, t in edit.tensors.items()})


def read_weights(block: nn.Module, stream: Stream) -> Weights:
    """Weights and biases of a canonical block's linears, in the stored dtype, on the CPU."""
    weights: Weights = {}
    for role in (r for group in read_layout(block, stream.family, stream.source.config).groups for r in group.linears):
        linear = get_linear(block, stream.family, role)
        weights[role] = linear.weight.detach()
        if linear.bias is not None:
            weights[f"{role}.bias"] = linear.bias.detach()
    return weights
