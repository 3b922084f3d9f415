"""What compressing would give and take, from shapes alone: a dry run.

Ranks, parameters, bytes and KV bytes are exact: they come from the plan that `compress` itself would follow. FLOPs
count two per weight and token. Peak memory and time are estimates; `how` says from what.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from planish import stats as stats_file
from planish.budgets import SHARES, Asked, Budget, Bytes, CacheNumbers, Flops, count_cache, count_flops
from planish.cache import Cache
from planish.checkpoint import ConfigSource, Source
from planish.compress import Job, check_tokens, check_windows, find_name, pick_dtype
from planish.core import Method, Plan, Progress, Shape, count_sums
from planish.errors import InputError
from planish.latency import Latency, read_table
from planish.predict import Prediction, predict
from planish.stream import Stream
from planish.targets import describe_limits

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

    def bring_outside(self) -> None:
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
    asked: Asked,
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
    asked = replace(asked, context=asked.context or size[1])
    table = read_table(source, asked.context or 0, device, dtype, progress) if asked.max_latency is not None else None
    job = Job(unread, method, asked=asked, step=round_to, target=target, measured=table)
    shared = Cache(memory=STATISTICS)
    start = time.perf_counter()
    try:
        plan, measured = job.plan(), False
    except TextNeeded:
        if isinstance(source, ConfigSource):
            raise InputError(
                f"{find_name(method)} chooses its ranks by statistics, and {source.name} holds no weights to measure them with: "
                "plan from the whole model, or with ranks from shapes alone (--set allocation=uniform, where the method has it)"
            ) from None
        windows = read()
        check_windows(windows, source)
        size = (windows.shape[0], windows.shape[1])
        stream = Stream(source, windows, device=device, dtype=dtype)
        arguments: dict[str, Any] = {
            "asked": asked,
            "step": round_to,
            "measured": table,
            "progress": progress,
            "cache": shared,
        }
        job = Job(stream, method, **arguments, target=target)
        check_tokens(job, windows, settings or {})
        plan, measured = job.plan(), True
    found = describe(job, plan, size, measured, time.perf_counter() - start)
    found.target, found.predicted = target, add_losses(job, plan)
    found.nats = bool(job.known) and all(f.nats for f in job.known.values())
    free = Job(unread, method, asked=asked, step=round_to, measured=table)
    found.limits = describe_limits(target, free.units)
    if found.limits and found.predicted:
        free = Job(job.stream, method, **arguments)
        loose = free.plan()
        free.known = free.known or free.frontiers()
        found.predicted_any = add_losses(free, loose)
    return found


def add_losses(job: Job, plan: Plan) -> dict[str, float]:
    """Predicted loss of a plan for every kind of unit that it cuts; empty where no frontier is known."""
    losses: dict[str, float] = {}
    for unit, rank in sorted(plan.items()):
        if unit in job.known and rank < job.full(unit):
            losses[unit.name] = losses.get(unit.name, 0.0) + float(job.known[unit].loss[rank])
    return losses


def describe(job: Job, plan: Plan, size: tuple[int, int], measured: bool, planning: float) -> Forecast:
    """Everything that follows from a plan. `planning`: seconds it took."""
    source, shapes = job.stream.source, job.shapes
    itemsize = source.stored.itemsize
    rows: list[dict[str, Any]] = []
    for unit in sorted(job.units):
        full = job.full(unit)
        rank = plan.get(unit, full)
        before, after = job.count(unit, full), job.count(unit, rank)
        rows.append(
            {"block": unit.block, "unit": unit.name, "rank": rank, "full": full, "before": before, "after": after}
        )
    blocks = job.weights
    blocks_after = blocks - sum(r["before"] - r["after"] for r in rows)
    source.empty_block(0)
    model = source._empty  # type: ignore[attr-defined]
    params = sum(p.numel() for p in model.parameters())
    head = source.count_head()
    caches, full_caches = CacheNumbers("kv_keep", 1, 0, 0), sum(map(count_cache, shapes))
    flops = Flops(
        "flops_keep",
        1,
        0,
        count_flops(shapes, [{}] * len(shapes), [s.count() for s in shapes], job.context),
        context=job.context,
    )
    stored = Bytes("max_bytes", 1, 0, params * itemsize, itemsize=itemsize)
    peaks, seconds, how = estimate(job, plan, size, params, head, itemsize, int(flops.total) - 2 * blocks)
    found = Forecast(
        method=find_name(job.method),
        keep_requested=job.keep,
        keep=blocks_after / blocks,
        params_before=params,
        params_after=params - blocks + blocks_after,
        block_params_before=blocks,
        block_params_after=blocks_after,
        bytes_before=params * itemsize,
        bytes_after=int(left(job, plan, stored)),
        flops_per_token_before=int(flops.total) + 2 * head,
        flops_per_token_after=int(left(job, plan, flops)) + 2 * head,
        kv_bytes_per_token_before=full_caches * itemsize,
        kv_bytes_per_token_after=int(left(job, plan, replace(caches, total=full_caches))) * itemsize,
        context=job.context,
        peak_ram_bytes=peaks.ram,
        peak_vram_bytes=peaks.vram,
        disk_bytes=peaks.disk + peaks.spill,
        seconds=seconds + (planning if measured else 0.0),
        needed_statistics=measured,
        units=rows,
        how=how,
        warnings=list(job.remarks.values()),
    )
    for b in job.kept_budgets:
        cost = left(job, plan, b)
        if isinstance(b, Latency):
            found.latency_ms_before, found.latency_ms_after = (
                c / b.scale for c in (b.total + b.outside, cost + b.outside)
            )
        value = (cost + b.outside) / b.scale if b.name not in SHARES else cost / b.total
        found.budgets[b.name] = {"asked": b.asked, "achieved": value}
    return found


def left(job: Job, plan: Plan, budget: Budget) -> float:
    """What all blocks cost of a budget under a plan."""
    cut = ((u, r, job.full(u)) for u, r in plan.items())
    return budget.total - sum(job.cost(u, full, budget) - job.cost(u, r, budget) for u, r, full in cut if r != full)


def estimate(
    job: Job, plan: Plan, size: tuple[int, int], params: int, head: int, itemsize: int, attend: int
) -> tuple[Prediction, float, dict[str, str]]:
    """Peak bytes, seconds, and how they were found."""
    tokens = prod(size)
    stream = job.stream
    shape = max(job.shapes, key=Shape.count)
    units = [u for u in job.block_units(shape.block) if plan.get(u, job.full(u)) < job.full(u)]
    parts = [job.taps(stage) for stage in job.method.stages(job.block_units(shape.block))]  # measured one after another
    parts.append(job.stored_taps(shape.block))  # and once more for what the plan needs
    taps = max(parts, key=lambda part: count_sums(shape, part), default=[])
    statistics = count_sums(shape, taps)
    wide = sum(n for t in taps if t.kind == "gram" and 8 * (n := count_sums(shape, [t])) >= stats_file.WIDE)
    found = [[shape.width(s) for s in {s for t in part for s in t.sites}] for part in parts]
    sites = max(found, key=sum, default=[])
    work = max((job.units[u].memory(u, shape) for u in job.block_units(shape.block)), default=0)
    both = 2 if job.method.prefix == "both" else 1
    written = params - sum(job.count(u, job.full(u)) - job.count(u, plan.get(u, job.full(u))) for u in job.units)
    peaks = predict(
        job.shapes,
        outside=params - job.weights,
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
        sequential=job.method.prefix != "dense",
        accelerator=stream.device.type != "cpu",
        activation_limit=stream.room.limit,
    )

    here = stream.device if stream.device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    single, double, eigen = measure_rates(here, torch.float32 if here != stream.device else stream.dtype)
    stages = len(job.method.stages(units)) if units else 0
    passes = both * max(stages, 1) + (1 if job.method.prefix != "dense" else 0)
    forward = passes * tokens * (2 * job.weights + attend) / single
    taking = len(job.shapes) * 2 * sum(count_sums(shape, part) for part in parts) * tokens / double
    sides = [min(job.shapes[u.block].linear(u.name)) if u.name in shape.roles else shape.hidden for u in job.units]
    solving = sum(eigen * n**3 for n in sides)
    how = {
        "peak_ram": f"libraries + one block as stored and as computed + activations of {size[0]} × {size[1]} tokens + one "
        "block's statistics in fp64 + the largest decomposition's working space (planish.predict)",
        "seconds": f"{passes} forward passes over {tokens} tokens and one block's statistics at this machine's measured "
        f"{single / 1e9:.0f} and {double / 1e9:.0f} GFLOP/s (fp64), one eigendecomposition per unit; right within a "
        "factor of about 3; reading and writing files not included"
        + ("; this machine has no such device: its CPU's rates" if here != stream.device else ""),
        "flops": f"two per weight of the blocks and the head and token, and attention over {job.context} tokens of context",
    }
    return peaks, forward + taking + solving, how


def measure_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """FLOP/s of a product in `dtype` and in fp64, and seconds / n³ of an fp64 eigendecomposition of side n."""

    def seconds(run: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    n, m = 512, 256
    a = torch.ones(n, n, device=device, dtype=dtype)
    flops = 2 * n**3
    single = flops / seconds(lambda: a @ a)
    b = torch.ones(n, n, device="cpu" if device.type == "mps" else device, dtype=torch.float64)
    double = flops / seconds(lambda: b @ b)
    c = torch.diag(torch.arange(1.0, m + 1, dtype=torch.float64)) + 0.1
    return single, double, seconds(lambda: torch.linalg.eigh(c)) / m**3
