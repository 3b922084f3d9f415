"""What compressing would give and take, from shapes alone: a dry run.

Ranks, parameters and KV bytes are exact: they come from the plan that `compress` itself would follow. So are bytes of
weights, but for the headers of cut tensors, which are counted as `max_bytes` counts them: at most. FLOPs count two per
weight and token. Peak memory and time are estimates; `how` says from what.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish import stats as stats_file
from planish.calibrate.cache import Cache
from planish.calibrate.measure import Measurements
from planish.calibrate.reuse import BEHIND, LAST
from planish.calibrate.stream import BATCH, Stream
from planish.calibrate.text import shuffle_windows
from planish.compression import check_tokens, check_windows, pick_dtype
from planish.core import Plan, Progress, Shape, Unit, count_sums, describe_rest
from planish.errors import InputError
from planish.folder.source import ConfigSource, Source
from planish.methods import make_plan, pose
from planish.methods.method import Method
from planish.plan.budgets import Budget, Latency, make_budget
from planish.plan.frontiers import dense_taps, measure_frontiers, stored_taps
from planish.plan.latency import read_table
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.targets import describe_limits
from planish.predict import Prediction, predict
from planish.rehearsal import Stopwatch, rehearse_all
from planish.request import Limits
from planish.solve import find_dense_sites
from planish.solvers.offload import offload
from planish.stats import Tap, add_gram

STATISTICS = 1 << 30  # bytes of statistics that planning without the target's limits may use again


@dataclass
class Forecast:
    """Before and after, per token where it says so; `units`: one row per unit with its rank and weights."""

    method: str
    keep_requested: float
    keep: float
    params_before: int
    params_after: int
    block_params_before: int
    block_params_after: int
    bytes_before: int
    bytes_after: int
    flops_per_token_before: int
    flops_per_token_after: int
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int
    context: int
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_bytes: int
    seconds: float
    needed_statistics: bool
    units: list[dict[str, Any]]
    latency_ms_before: float | None = None
    latency_ms_after: float | None = None
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    target: str = "any"
    limits: list[str] = field(default_factory=list)  # what the target asks of this method's result
    nats: bool = False  # predicted losses are nats per token, else squared errors of the units' outputs
    predicted: dict[str, float] = field(default_factory=dict)  # kind of unit → predicted loss, where it is known
    predicted_any: dict[str, float] = field(default_factory=dict)  # the same without the target's limits
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed": 1 - self.keep, "keep_whole_model": self.params_after / self.params_before}


class TextNeeded(Exception):
    """The method cannot choose its ranks without statistics."""


class Unread(Stream):
    """A stream before its text is read: whoever asks for a batch learns that it is needed. Nothing of the model is read."""

    def _bring_outside(self) -> None:
        pass

    @property  # type: ignore[override]
    def batches(self) -> list[Tensor]:
        raise TextNeeded

    @batches.setter
    def batches(self, value: list[Tensor]) -> None:
        pass


def forecast(
    source: Source,
    *,
    asked: Limits,
    method: Method,
    read: Callable[[], Tensor],
    size: tuple[int, int],
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    round_to: int = 1,
    settings: dict[str, Any] | None = None,
    target: str = "any",
    progress: Progress | None = None,
) -> Forecast:
    """The plan and its consequences. `read` gives the calibration windows, called only if the plan needs statistics.

    `size` (n_samples, seq_len): the calibration that memory and time are estimated for.
    """
    dtype = dtype or pick_dtype(source, device)
    unread = Unread(source, torch.empty(0, 0, dtype=torch.long), device=device, dtype=dtype)
    asked = asked.model_copy(update={"context": asked.context or size[1]})
    table = read_table(source, asked.context or 0, device, dtype, progress) if asked.max_latency is not None else None
    given: dict[str, Any] = {"step": round_to, "measured": table}
    problem = pose(method, source, asked, target=target, **given)
    measure = Measurements(unread, Cache(memory=STATISTICS), progress)
    start = time.perf_counter()
    try:
        planned, measured = make_plan(method, problem, measure), False
    except TextNeeded:
        if (whole := source.whole if isinstance(source, ConfigSource) else source) is None:
            raise InputError(
                f"{method.name} chooses its ranks by statistics, and {source.name} holds no weights to measure them with: "
                "plan from the whole model, or with ranks from shapes alone (--set allocation=uniform, where the method has it)"
            ) from None
        windows = read()
        check_windows(windows, whole)
        size = (windows.shape[0], windows.shape[1])
        stream = Stream(whole, shuffle_windows(windows, method.shuffled), device=device, dtype=dtype)
        measure = Measurements(stream, measure.cache, progress)
        check_tokens(method, problem, windows, settings or {})
        planned, measured = make_plan(method, problem, measure), True
    job = Job(replace(problem, units=planned.solvers), measure, planned)
    found = describe(job, size, measured, time.perf_counter() - start)
    found.target, found.predicted = target, add_losses(job.problem, planned)
    found.nats = bool(planned.frontiers) and all(f.nats for f in planned.frontiers.values())
    free = pose(method, source, asked, **given)
    found.limits = describe_limits(problem.target, free.units, free.shapes)
    if found.limits and found.predicted:
        again = Measurements(measure.stream, measure.cache, progress)
        loose = make_plan(method, free, again)
        free = replace(free, units=loose.solvers)
        known = loose.frontiers or measure_frontiers(free, again)
        found.predicted_any = add_losses(free, replace(loose, frontiers=known))
    return found


class Job(NamedTuple):
    """What is to be described: a plan and what it was made of."""

    problem: Problem
    measure: Measurements
    planned: Planned


def add_losses(problem: Problem, planned: Planned) -> dict[str, float]:
    """Predicted loss of a plan for every kind of unit that it cuts; empty where no frontier is known."""
    losses: dict[str, float] = {}
    for unit, rank in sorted(planned.ranks.items()):
        if unit in planned.frontiers and rank < problem.full(unit):
            losses[unit.name] = losses.get(unit.name, 0.0) + float(planned.frontiers[unit].loss[rank])
    return losses


def describe(job: Job, size: tuple[int, int], measured: bool, planning: float) -> Forecast:
    """Everything that follows from a plan. `planning`: seconds it took."""
    problem, measure, planned = job
    source, shapes, plan = measure.stream.source, problem.shapes, planned.ranks
    itemsize = source.stored.itemsize
    rows: list[dict[str, Any]] = []
    for unit in sorted(problem.units):
        rank = plan.get(unit, full := problem.full(unit))
        before, after = problem.count(unit, full), problem.count(unit, rank)
        rows.append(
            {"block": unit.block, "unit": unit.name, "rank": rank, "full": full, "before": before, "after": after}
        )
    blocks = sum(s.count() for s in shapes)
    blocks_after = blocks - sum(r["before"] - r["after"] for r in rows)
    model = source.empty
    params = sum(p.numel() for p in model.parameters())
    head = source.count_head()
    caches, flops, stored = (
        make_budget(name, 1, source, shapes, problem.context) for name in ("kv_keep", "flops_keep", "max_bytes")
    )
    attend = int(flops.total) - 2 * sum(s.working for s in shapes)
    peaks, seconds, how = estimate(job, size, measured, params, head, itemsize, attend)
    found = Forecast(
        method=problem.name,
        keep_requested=problem.keep if planned.keep is None else planned.keep,
        keep=blocks_after / blocks,
        params_before=params,
        params_after=params - blocks + blocks_after,
        block_params_before=blocks,
        block_params_after=blocks_after,
        bytes_before=int(stored.total + stored.outside),
        bytes_after=int(left(problem, plan, stored) + stored.outside),
        flops_per_token_before=int(flops.total) + 2 * head,
        flops_per_token_after=int(left(problem, plan, flops)) + 2 * head,
        kv_bytes_per_token_before=int(caches.total) * itemsize,
        kv_bytes_per_token_after=int(left(problem, plan, caches)) * itemsize,
        context=problem.context,
        peak_ram_bytes=peaks.ram,
        peak_vram_bytes=peaks.vram,
        disk_bytes=peaks.disk + peaks.spill,
        seconds=seconds + (planning if measured else 0.0),
        needed_statistics=measured,
        units=rows,
        how=how,
        warnings=[*planned.remarks.values(), *describe_rest(problem.units, shapes)],
    )
    for b in problem.budgets if planned.keep is None else ():
        cost = left(problem, plan, b)
        if isinstance(b, Latency):
            found.latency_ms_before, found.latency_ms_after = (
                c / b.scale for c in (b.total + b.outside, cost + b.outside)
            )
        found.budgets[b.name] = {"asked": b.asked, "achieved": b.achieved(cost)}
    return found


def left(problem: Problem, plan: Plan, budget: Budget) -> float:
    """What all blocks cost of a budget under a plan."""
    cut = ((u, r, problem.full(u)) for u, r in plan.items())
    return budget.total - sum(
        problem.cost(u, full, budget) - problem.cost(u, r, budget) for u, r, full in cut if r != full
    )


def estimate(
    job: Job, size: tuple[int, int], measured: bool, params: int, head: int, itemsize: int, attend: int
) -> tuple[Prediction, float, dict[str, str]]:
    """Peak bytes, seconds, and how they were found. `measured`: the plan ran text, gradients where it wants them."""
    tokens = prod(size)
    problem, planned, stream, plan = job.problem, job.planned, job.measure.stream, job.planned.ranks
    shape = max(problem.shapes, key=Shape.count)
    units = problem.block_units(shape.block)
    parts = [problem.taps(stage) for stage in planned.stages(units)]  # measured one after another
    parts.append(dense_taps(problem, shape.block))  # and once more for what the plan needs
    taps = max(parts, key=lambda part: count_sums(shape, part), default=[])
    statistics = count_sums(shape, taps)
    wide = sum(n for t in taps if t.kind == "gram" and 8 * (n := count_sums(shape, [t])) >= stats_file.WIDE)
    found = [[shape.width(s) for s in {s for t in part for s in t.sites}] for part in parts]
    sites = max(found, key=sum, default=[])
    work = max((problem.units[u].memory(u, shape) for u in units), default=0)
    both = 2 if planned.prefix == "both" else 1
    written = params - sum(problem.count(u, problem.full(u)) - problem.count(u, r) for u, r in plan.items())
    kept, shelved = count_kept(job, tokens) if measured else (0, 0)
    peaks = predict(
        list(problem.shapes),
        outside=params - sum(s.count() for s in problem.shapes),
        largest=head,
        statistics=statistics,
        wide=wide,
        sites=sites,
        work=work,
        tokens=tokens,
        written=written,
        stored=itemsize,
        computed=stream.dtype.itemsize,
        streams=both,
        sequential=planned.prefix != "dense",
        between=max(count_between(job, s, size) for s in problem.shapes),
        kept=kept,
        shelved=shelved,
        backward=measured and any(t.site.startswith("grad:") for t in dense_taps(problem, shape.block)),
        accelerator=stream.device.type != "cpu",
        activation_limit=stream.limits.limit,
        near=stream.limits.device_limit,
    )
    here = stream.device if stream.device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    rates = measure_rates(here, torch.float32 if here != stream.device else stream.dtype, shape, size[1])
    passes, forward = 0.0, 2 * shape.working / rates.single + attend / 2 / len(problem.shapes) / rates.attention
    forward += (shape.inner + 6 * shape.hidden) * rates.element
    summing, solving = 0.0, 0.0
    cuts = [[u for u in problem.cut(plan, i) if i not in planned.edits] for i in range(len(problem.shapes))]
    alike = {u.name: u for cut in cuts for u in cut}  # one unit of each kind
    with offload("cpu"):  # elsewhere small solves say nothing about large ones
        took = rehearse_all({u: problem.units[u] for u in alike.values()}, plan, problem.shapes)
    for i, cut in enumerate(cuts):
        through, taps = count_passes(job, i, planned.stages(cut) if cut else [[]], size)
        passes += through
        summing += tokens * sum(time_sums(problem.shapes[i], tap, rates) for tap in taps)
        solving += sum(took[u.name] for u in cut)
    seconds = passes * tokens * forward + summing + solving + (params + written) * rates.file
    how = {
        "peak_ram": f"libraries + one block as stored and as computed + activations of {size[0]} × {size[1]} tokens + one "
        "block's statistics in fp64 + the largest decomposition's working space (planish.predict)",
        "seconds": f"{passes / len(problem.shapes):.2f} forward passes over {tokens} tokens at this machine's "
        f"{rates.single / 1e9:.0f} GFLOP/s, the blocks' statistics in fp64, one block's solves rehearsed on random numbers "
        f"(planish.rehearsal), reading and writing from memory: {passes * tokens * forward:.3g}, {summing:.3g}, {solving:.3g}, "
        f"{(params + written) * rates.file:.3g} s"
        + ("; this machine has no such device: its CPU's rates" if here != stream.device else "")
        + ("; large factorisations run on the device, which is faster" if stream.device.type == "cuda" else ""),
        "flops": f"two per weight of the blocks and the head and token, and attention over {problem.context} tokens of context",
    }
    return peaks, seconds, how


def count_between(job: Job, shape: Shape, size: tuple[int, int]) -> int:
    """Channels per token of these windows that solving this block keeps from within it: what runs of it start from (see
    `planish.calibrate.reuse`), and of the uncompressed block beside the same, or every site that the stages look at."""
    planned = job.planned
    units = job.problem.cut(planned.ranks, shape.block)
    beside = find_dense_sites(job.problem, job.measure, units) if planned.prefix == "both" else set()
    width = {"attention": shape.heads * shape.v, "mlp": shape.intermediate}
    starts = [set[str]().union(*(list_starts(job, shape, size, stage) for stage in planned.stages(units)))]
    if planned.prefix == "both" and not beside:
        starts.append(list_starts(job, shape, size))
    channels = sum(width[n] for names in starts for n in names) + sum(map(shape.width, beside))
    return ceil(channels * planned.refit(size[0]) / size[0])


def list_starts(job: Job, shape: Shape, size: tuple[int, int], stage: Sequence[Unit] = ()) -> set[str]:
    """Submodules whose last linear's inputs are kept where this stage of a block is solved (none: nothing is)."""
    windows, stream = job.planned.refit(size[0]), job.measure.stream
    one_batch = windows <= max(1, BATCH // size[1])
    if job.planned.prefix == "dense" or stream.device.type != "cpu" or one_batch:
        return set()
    number = stream.dtype.itemsize * size[1] * windows
    fits = (
        number * (2 * shape.intermediate + shape.hidden) <= stream.limits.limit
    )  # about: what else is held then varies
    kept = {"attention"} | ({"mlp"} if fits and stream.family.mlp else set())
    return {n for n in kept if {u.name for u in stage} <= BEHIND[n]}


def count_kept(job: Job, tokens: int) -> tuple[int, int]:
    """Bytes that are kept of all blocks at once, in memory and on disk: their inputs and their statistics, where gradients are
    measured."""
    problem, planned, stream = job.problem, job.planned, job.measure.stream
    taps = [t for s in problem.shapes for t in dense_taps(problem, s.block)]
    if not any(t.site.startswith("grad:") for t in taps):
        return 0, 0
    inputs = sum(s.hidden for s in problem.shapes) * tokens * stream.dtype.itemsize
    windows = sum(map(len, stream.batches))
    refit = planned.refit(windows) < windows
    stored = [set(dense_taps(problem, s.block)) & stored_taps(problem, s.block, refit) for s in problem.shapes]
    statistics = sum(8 * count_sums(s, own) for s, own in zip(problem.shapes, stored, strict=True))
    kept = min(inputs + statistics, stream.limits.stored.limit)
    return kept, inputs + statistics - kept


ORDER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # in which a forward pass reaches the linears


def reach(shape: Shape, taps: Iterable[Tap]) -> float:
    """Share of a block's weights that run until all these taps' sites have been seen."""
    depth = 0
    for site in (s.rpartition(":")[2] for tap in taps for s in tap.sites):
        where, _, end = site.rpartition(".")
        at = next((n for n, roles in enumerate(ORDER) if where in roles), len(ORDER) - 1)
        depth = max(depth, at if end == "in" and where in shape.roles else at + 1)
    return sum(shape.count(r) for roles in ORDER[:depth] for r in roles if r in shape.roles) / shape.count()


def count_passes(job: Job, i: int, stages: list[list[Unit]], size: tuple[int, int]) -> tuple[float, list[Tap]]:
    """Forward passes through block i, in shares of its weights, and the taps measured on them, when it is solved."""
    problem, planned, stored = job.problem, job.planned, job.measure.stored
    shape, known = problem.shapes[i], stored.taps(i)
    taps = [[t for t in problem.taps(stage) if t not in known] for stage in stages]
    everything = [t for stage in taps for t in stage]
    if planned.prefix == "dense":
        return 1.0 if everything or not stored else 0.0, everything
    skips = 1 - 1 / ceil(size[0] / max(1, BATCH // size[1]))
    own = [reach(shape, [t for t in stage if any(":" not in s for s in t.sites)]) for stage in taps]
    starts = [list_starts(job, shape, size, stage) for stage in stages]
    passes = count_runs(shape, own, starts, skips)
    if planned.prefix == "both":
        kept = find_dense_sites(job.problem, job.measure, [u for stage in stages for u in stage])
        seen = [reach(shape, [t for t in s if len(t.sites[0].split(":")) > 1]) for s in taps]
        passes += 1.0 if kept else count_runs(shape, seen, [list_starts(job, shape, size) for _ in stages], skips)
    return passes, everything


def count_runs(shape: Shape, shares: list[float], starts: list[set[str]], skips: float) -> float:
    """Passes of runs that end after these shares of a block, and of one to its end; this share of each `skips` what is kept
    of the `starts` (see `planish.calibrate.reuse`)."""
    passes, kept = 0.0, set[str]()
    before = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
    skipped = {n: sum(shape.count(r) for r in roles if r in shape.roles) / shape.count() for n, roles in before.items()}
    ends = {n: reach(shape, [Tap(f"{LAST[n]}.in", "gram")]) for n in before}
    for share, may in [*zip(shares, starts, strict=True), (1.0, set(LAST))]:
        kept &= may
        passes += share - skips * sum(skipped[n] for n in kept if share > ends[n])
        kept |= {n for n in may if share >= ends[n]}
    return passes


def time_sums(shape: Shape, tap: Tap, rates: Rates) -> float:
    """Seconds per token."""
    numbers = count_sums(shape, [tap])
    return numbers * rates.gram if tap.kind == "gram" else 2 * numbers / rates.double


class Rates(NamedTuple):
    """`single`, `double`, `attention`: FLOP/s of products in the computing dtype, in fp64, and of attention; seconds:
    `gram` per number of a Gram and token, `element` per channel of a gated activation, `file` per number read and written."""

    single: float
    double: float
    attention: float
    gram: float
    element: float
    file: float


def measure_rates(device: torch.device, dtype: torch.dtype, shape: Shape, seq_len: int) -> Rates:
    """Of this machine, on products of at most 1024 × 2048 × 1024 numbers."""

    def seconds(run: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(3):
            start, clock = time.perf_counter(), Stopwatch()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, clock.read() if device.type == "cpu" else time.perf_counter() - start)
        return best

    n, m = min(shape.hidden, 1024), min(shape.inner, 2048)
    sums = torch.device("cpu") if device.type == "mps" else device  # it has no fp64
    a, b = torch.ones(1024, n, device=device, dtype=dtype), torch.ones(m, n, device=device, dtype=dtype)
    single = 2 * 1024 * n * m / seconds(lambda: nn.functional.linear(a, b))
    x, y = a.to(sums).double()[:512], b.to(sums).double()
    double = 2 * 512 * n * m / seconds(lambda: x @ y.T)
    wide, total = torch.ones(512, m, device=sums, dtype=dtype), dict[str, Tensor]()
    gram = seconds(lambda: add_gram(total, wide)) / 512 / m**2
    length = max(1, min(seq_len, 1024))
    q = torch.ones(1, 4, length, max(shape.qk, 1), device=device, dtype=dtype)
    attention = seconds(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    g = torch.ones(1024, m, device=device, dtype=dtype)
    element = seconds(lambda: nn.functional.silu(g) * g) / g.numel()
    stored = torch.ones(1 << 20, dtype=torch.bfloat16)

    def check() -> None:
        stored.float().aminmax()
        hashlib.sha256(stored.view(torch.uint8).numpy().data)

    file = seconds(check) / len(stored)
    return Rates(single, double, 4 * 4 * q.shape[-1] * length**2 / 2 / attention, gram, element, file)
