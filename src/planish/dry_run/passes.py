"""How often a run puts its text through a block, and what it keeps from within the block meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import ceil
from typing import NamedTuple

from planish.calibrate.measure import Measurements
from planish.calibrate.reuse import BEHIND, LAST
from planish.calibrate.stream import BATCH
from planish.core import Shape, Unit
from planish.methods.method import ORDER, find_step
from planish.plan.foreseen import Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.stats import Tap
from planish.walks.bits import Asked
from planish.walks.solve import find_dense_sites

FIRST = {"attention": "q", "mlp": "up"}  # the first linears of a submodule, or one of them


class Run(NamedTuple):
    """What is foretold: a run that follows this plan, on `windows` of `seq_len` tokens, and rounds what is `asked`; `work`: what
    finding the plan takes, where it has not been found by measuring."""

    problem: Problem
    measure: Measurements
    planned: Planned
    windows: int
    seq_len: int
    work: Sequence[Work] = ()
    asked: Asked | None = None

    @property
    def measures(self) -> bool:
        """Whether the plan is, or was, found by measuring."""
        return bool(self.work) or self.measure.started

    def known(self, i: int) -> Collection[Tap]:
        """What the plan has measured of block i and the solve uses again."""
        return {t for w in self.work for t in w.stored(self.problem.shapes[i])} or self.measure.stored.taps(i)

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len

    @property
    def streams(self) -> int:
        """How many prefixes run side by side."""
        return 2 if self.planned.prefix == "both" else 1

    @property
    def largest(self) -> Shape:
        """The block with most weights."""
        return max(self.problem.shapes, key=Shape.count)

    def solved(self, i: int) -> list[Unit]:
        """Block i's units that are left to solve."""
        return [] if i in self.planned.edits else self.problem.cut(self.planned.ranks, i)


def reach(shape: Shape, taps: Iterable[Tap]) -> float:
    """Share of a block's weights that run until all these taps' sites have been seen."""
    depth = 0
    for site in (s.rpartition(":")[2] for tap in taps for s in tap.sites):
        where, _, end = site.rpartition(".")
        at = find_step(where) if where in shape.linears else len(ORDER) - 1
        depth = max(depth, at if end == "in" and where in shape.linears else at + 1)
    return sum(shape.count(r) for r in shape.linears if find_step(r) < depth) / shape.count()


def count_passes(run: Run, i: int, trial: bool = False) -> tuple[float, list[Tap]]:
    """Forward passes through block i while it is solved, in shares of its weights, and the taps measured on them; behind the
    last block that is solved none is run, but of a `trial`, whose outputs are wanted."""
    problem, known = run.problem, run.known(i)
    last = next((s.block for s in reversed(problem.shapes) if trial or run.solved(s.block)), -1)
    if i > last:
        return 0.0, []
    shape = problem.shapes[i]
    units = run.solved(i)
    stages = run.planned.stages(units) if units else [[]]
    taps = [[t for t in problem.taps(stage) if t not in known] for stage in stages]
    everything = [t for stage in taps for t in stage]
    if run.planned.prefix == "dense":
        return 1.0 if everything or not known else 0.0, everything
    skips = 1 - 1 / ceil(run.windows / max(1, BATCH // run.seq_len))
    own = [reach(shape, [t for t in stage if any(":" not in s for s in t.sites)]) for stage in taps]
    end, starts = [1.0] * (trial or i < last), [set(LAST)] * (trial or i < last)
    passes = count_runs(shape, own + end, [list_starts(run, shape, stage) for stage in stages] + starts, skips)
    if run.planned.prefix == "both":
        beside = [reach(shape, [t for t in stage if ":" in t.sites[0]]) for stage in taps]
        once = find_dense_sites(problem, run.measure, [u for stage in stages for u in stage])
        passes += (
            1.0 if once else count_runs(shape, beside + end, [list_starts(run, shape) for _ in stages] + starts, skips)
        )
    return passes, everything


def count_runs(shape: Shape, shares: list[float], starts: list[set[str]], skips: float) -> float:
    """Passes of runs that end after these shares of a block; this share of each `skips` what is kept of the `starts` (see
    `planish.calibrate.reuse`)."""
    passes, kept = 0.0, set[str]()
    ends = {n: reach(shape, [Tap(f"{role}.in", "gram")]) for n, role in LAST.items()}
    skipped = {n: ends[n] - reach(shape, [Tap(f"{role}.in", "gram")]) for n, role in FIRST.items()}
    for share, may in zip(shares, starts, strict=True):
        kept &= may
        passes += share - skips * sum(skipped[n] for n in kept if share > ends[n])
        kept |= {n for n in may if share >= ends[n]}
    return passes


def list_starts(run: Run, shape: Shape, stage: Sequence[Unit] = ()) -> set[str]:
    """Submodules whose last linear's inputs are kept where this stage of a block is solved (none: nothing is)."""
    windows, stream = run.planned.refit(run.windows), run.measure.given
    one_batch = windows <= max(1, BATCH // run.seq_len)
    if run.planned.prefix == "dense" or stream.device.type != "cpu" or one_batch:
        return set()
    size = stream.dtype.itemsize * run.seq_len * windows * (2 * shape.intermediate + shape.hidden)
    fits = size <= stream.limits.limit  # about: what else is held then varies
    kept = {"attention"} | ({"mlp"} if fits and stream.source.family.mlp else set())
    return {n for n in kept if {u.name for u in stage} <= BEHIND[n]}


def count_between(run: Run, shape: Shape) -> int:
    """Channels per token of the windows that solving this block keeps from within it: what runs of it start from (see
    `planish.calibrate.reuse`), and of the uncompressed block beside the same, or every site that the stages look at."""
    planned, both = run.planned, run.planned.prefix == "both"
    units = run.problem.cut(planned.ranks, shape.block)
    beside = find_dense_sites(run.problem, run.measure, units) if both else set()
    width = {"attention": shape.heads * shape.v, "mlp": shape.intermediate}
    starts = [set[str]().union(*(list_starts(run, shape, stage) for stage in planned.stages(units)))]
    if both and not beside:
        starts.append(list_starts(run, shape))
    channels = sum(width[n] for names in starts for n in names) + sum(map(shape.width, beside))
    return ceil(channels * planned.refit(run.windows) / run.windows)
