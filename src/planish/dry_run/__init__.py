"""What compressing would give and take, from shapes alone: a dry run.

Ranks, parameters and KV bytes are exact: they come from the plan that `compress` itself would follow. So are bytes of
weights, but for the headers of cut tensors and the norms of blocks that go whole, which are counted as `max_bytes` counts
them: at most. FLOPs count two per weight and token. Peak memory and time are estimates; `how` says from what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from planish.apply import is_empty, merge_forms, merge_specs
from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache, open_cache
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Awaited, NothingMeasuredError, Stream
from planish.checking import check_tokens, check_windows
from planish.compression import Shared, open_stream, pick_dtype, pick_products
from planish.core import WHOLE, Plan, Progress, Unit, describe_experts, describe_rest, describe_state
from planish.dry_run.memory import Peaks
from planish.dry_run.passes import Run
from planish.dry_run.rounding import count_all
from planish.dry_run.rounding_seconds import estimate_all
from planish.dry_run.seconds import Costs, explain, measure_costs
from planish.errors import InputError
from planish.folder.origin import list_changes
from planish.folder.skeleton import find_embedding
from planish.folder.source import HEAD, ConfigSource, Source
from planish.methods import foresee_plan, make_plan, note_objective, pose
from planish.methods.method import Method
from planish.modelling.blocks import install
from planish.plan.budgets import Budget, Latency, make_budget
from planish.plan.experts import find_kept
from planish.plan.foreseen import Work
from planish.plan.frontiers import SCORED, measure_frontiers
from planish.plan.latency import note_slower, read_table
from planish.plan.planned import Planned
from planish.plan.problem import Problem, count_left
from planish.plan.targets import describe_limits
from planish.request import Request
from planish.walks.bits import Asked, read_asked

ROUNDED = (
    "; rounding: one block as computed and rounded + second moments of all its inputs and gradients in fp64 + the largest matrix's "
    "working space (planish.dry_run.rounding)"
)
STATISTICS = 1 << 30  # bytes of statistics that planning without the target's limits may use again


@dataclass
class Forecast:
    """Before and after, per token where it says so; `units`: one row per unit with its rank and weights; `blocks`: one row per
    block that has units, with the weights of all its linears, each counted once however many units share it."""

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
    elsewhere: bool  # the device that was asked for is not this machine's: seconds are those of its CPU
    needed_statistics: bool  # ranks depend on measuring
    measured: bool  # ranks and what follows from them are as `compress` will find them, else as they are expected
    phases: list[dict[str, Any]]  # walks over the blocks: name, seconds, steps (seconds of each)
    n_samples: int
    seq_len: int
    units: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    latency_ms_before: float | None = None
    latency_ms_after: float | None = None
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    target: str = "any"
    limits: list[str] = field(default_factory=list)  # what the target asks of this method's result
    nats: bool = False  # predicted losses are nats per token, else squared errors of the units' outputs
    predicted: dict[str, float] = field(default_factory=dict)  # kind of unit → predicted loss, where it is known
    predicted_any: dict[str, float] = field(default_factory=dict)  # the same without the target's limits
    untouched: dict[str, int] = field(default_factory=dict)  # part of a wrapper that is copied as it is → bytes
    warnings: list[str] = field(default_factory=list)
    kv_bits: int = 0  # of a number of the cache, as the bytes count it
    rounding: dict[str, Any] = field(
        default_factory=dict
    )  # `types` of the blocks' matrices as wide as they are, and that of the `head`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed": 1 - self.keep, "keep_whole_model": self.params_after / self.params_before}


def look_ahead(
    request: Request,
    method: Method,
    source: Source,
    size: tuple[int, int],
    read: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
    cache: bool = False,
) -> Run:
    """The plan on calibration windows of this `size` (n_samples, seq_len): with `read`, which gives the windows themselves,
    the one that is found by measuring on them as `compress` would; else as far as shapes tell it, the text not read and no
    weight. `cache`: what is measured is kept on disk, and taken from there.

    Of the request count what `compress` counts. Raises InputError where no plan meets it, or the plan needs weights that are
    not there.
    """
    device, limits = request.device, MemoryLimits()
    dtype = getattr(torch, request.dtype) if request.dtype else pick_dtype(source, device)
    asked = request.model_copy(update={"context": request.context or size[1]})
    table = read_table(source, asked.context or 0, device, dtype, progress) if asked.max_latency is not None else None
    rounded = read_asked(request, source)
    problem = pose(
        method, source, asked, step=request.round_to, measured=table,
        target=rounded.blocks if rounded else request.target,
    )  # fmt: skip

    def make_stream() -> Stream:
        if read is None:
            raise NothingMeasuredError
        whole = source.whole if isinstance(source, ConfigSource) else source
        if whole is None:
            raise InputError(
                f"{method.name} chooses its ranks by statistics, and {source.name} holds no weights to measure them with: "
                "plan from the whole model, with ranks from shapes alone (--set allocation=uniform, where the method has it), or "
                "without --measure"
            )
        windows = read()
        check_windows(windows, whole)
        check_tokens(method, problem, windows, dict(request.settings))
        return open_stream(whole, method, windows, Shared(), None, device, dtype, bool(request.dtype))[0]

    def find_cache(stream: Stream) -> Cache:
        return (open_cache(stream, STATISTICS) if cache else None) or Cache(memory=STATISTICS)

    products = dtype if request.dtype else pick_products(source, method, device, dtype)
    awaited = Awaited(source, torch.device(device), dtype, limits, make_stream, products)
    measure = Measurements(awaited, find_cache, progress)
    work: Sequence[Work] = ()
    if read is None:
        planned, work = foresee_plan(method, problem, measure, size[0])
    else:
        with measure.phase("plan"):
            planned = make_plan(method, problem, measure)
    if measure.started:
        size = sum(map(len, measure.stream.batches)), measure.stream.batches[0].shape[1]
    return Run(replace(problem, units=planned.solvers), measure, planned, *size, work, rounded)


def forecast(
    request: Request,
    method: Method,
    source: Source,
    size: tuple[int, int],
    read: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
    known: tuple[Run, Costs] | None = None,
    cache: bool = False,
) -> Forecast:
    """The plan that `look_ahead` gives, and its consequences. `known`: what it gave already, with the costs measured for it."""
    run, costs = known or (look_ahead(request, method, source, size, read, progress, cache), None)
    problem, planned, measure = run.problem, run.planned, run.measure
    found = describe(run, costs, read_asked(request, source))
    if request.bits is None and (sizes := count_released(run)):
        found.bytes_before, found.bytes_after = sizes
    if measure.started and not measure.cache.files.folder:  # or `compress` finds it there
        took = sum(measure.seconds.values())
        found.phases.insert(0, {"name": "plan", "seconds": took, "steps": [took]})
        found.seconds += took
    if request.calibration.objective == "answers" and request.bits is None:
        found.warnings += note_objective(method, problem, measure, run.windows)
    found.target, found.predicted = request.target, add_losses(problem, planned)
    found.untouched, found.kv_bits = source.untouched.parts, 8 * source.stored.itemsize
    found.nats = bool(planned.frontiers) and all(f.nats for f in planned.frontiers.values())
    asked = request.model_copy(update={"context": problem.context})
    table = problem.table.seconds if problem.table else None
    free = pose(method, source, asked, step=request.round_to, measured=table)
    found.limits = describe_limits(problem.target, free.units, free.shapes)
    if found.limits and found.predicted:
        again = Measurements(measure.stream, measure.cache, progress)
        unlimited = make_plan(method, free, again)
        free = replace(free, units=unlimited.solvers)
        frontiers = unlimited.frontiers or measure_frontiers(free, again)
        found.predicted_any = add_losses(free, replace(unlimited, frontiers=frontiers))
        # Both plans by the same prices, but what is measured where a plan cuts it.
        alike = {u: f if u.name in SCORED else frontiers.get(u, f) for u, f in planned.frontiers.items()}
        found.predicted = add_losses(problem, replace(planned, frontiers=alike))
    return found


def foresee_peaks(request: Request, method: Method, source: Source, size: tuple[int, int]) -> Peaks:
    """What the plan for a request takes at most, on windows of this `size`; nothing is measured and no time told."""
    run = look_ahead(request, method, source, size)
    weights = make_budget("keep", 1, source, run.problem.shapes)
    keep = int(count_left(run.problem, run.planned.ranks, weights)) / sum(s.count() for s in run.problem.shapes)
    params = sum(p.numel() for p in source.empty.parameters())
    return count_all(read_asked(request, source), run, keep, (params, count_written(run)))


def add_losses(problem: Problem, planned: Planned) -> dict[str, float]:
    """Predicted loss of a plan for every kind of unit that it cuts; empty where no frontier is known."""
    problem, losses = replace(problem, units=planned.solvers), dict[str, float]()
    for unit, rank in sorted(planned.ranks.items()):
        if unit in planned.frontiers and rank < problem.full(unit):
            losses[unit.name] = losses.get(unit.name, 0.0) + float(planned.frontiers[unit].loss[rank])
    return losses


def describe(run: Run, costs: Costs | None = None, asked: Asked | None = None) -> Forecast:
    """Everything that follows from a plan, and of what is `asked` to be rounded the peaks."""
    problem, planned, source = run.problem, run.planned, run.measure.source
    shapes, itemsize, head = problem.shapes, source.stored.itemsize, source.count_head()
    params, blocks = sum(p.numel() for p in source.empty.parameters()), sum(s.count() for s in shapes)
    weights = make_budget("keep", 1, source, shapes)
    left = int(count_left(problem, planned.ranks, weights))
    params_after, rest = count_written(run), source.untouched.count
    budgets = (make_budget(n, 1, source, shapes, problem.context) for n in ("kv_keep", "flops_keep", "max_bytes"))
    caches, flops, stored = ((b.total + b.outside, count_left(problem, planned.ranks, b) + b.outside) for b in budgets)
    peaks = count_all(asked, run, left / blocks, (params, params_after))
    costs = costs or measure_costs(run)
    phases = estimate_all(run, costs, params + params_after + 2 * rest)
    found = Forecast(
        method=problem.name,
        keep_requested=problem.keep if planned.keep is None else planned.keep,
        keep=left / blocks,
        params_before=params + rest,
        params_after=params_after + rest,
        block_params_before=blocks,
        block_params_after=left,
        bytes_before=int(stored[0]),
        bytes_after=int(stored[1]),
        flops_per_token_before=int(flops[0]) + 2 * head,
        flops_per_token_after=int(flops[1]) + 2 * head,
        kv_bytes_per_token_before=int(caches[0]) * itemsize,
        kv_bytes_per_token_after=int(caches[1]) * itemsize,
        context=problem.context,
        peak_ram_bytes=peaks.ram,
        peak_vram_bytes=peaks.vram,
        disk_bytes=peaks.disk + peaks.spill + source.untouched.bytes,
        seconds=sum(p.seconds for p in phases),
        elsewhere=costs.unlike,
        needed_statistics=run.measures,
        measured=not run.work,
        phases=[{"name": p.name, "seconds": p.seconds, "steps": list(p.steps)} for p in phases],
        n_samples=run.windows,
        seq_len=run.seq_len,
        units=[*count_units(problem, planned.ranks)],
        blocks=[*count_blocks(problem, planned.ranks, weights)],
        how={
            "peak_ram": f"libraries + one block as stored and as computed + activations of {run.windows} × {run.seq_len} "
            "tokens + one block's statistics in fp64 + the largest decomposition's working space (planish.dry_run.memory)"
            + (ROUNDED if asked else ""),
            "seconds": explain(run, costs, phases),
            "flops": f"two per weight of the blocks and the head and token, and attention over {problem.context} tokens of context",
        },
        warnings=[
            *planned.remarks.values(),
            *describe_experts(problem.units, shapes, run.tokens),
            *describe_untouched(problem, source),
            *describe_state(shapes, itemsize),
            *list_changes(source),
        ],
    )
    add_budgets(found, problem, planned)
    return found


def describe_untouched(problem: Problem, source: Source) -> list[str]:
    """What no unit holds: of blocks, and beside them where they are given more of a token than the stream."""
    lines = describe_rest(problem.units, problem.shapes)
    inside, known = f"{source.family.blocks}.", (find_embedding(source.empty), HEAD)
    for name, (n, _) in source.sizes().items() if source.family.per_token else ():
        if not name.startswith(inside) and name not in known and n > source.config.hidden_size:
            lines.append(f"untouched: {name.removesuffix('.weight')}, {n:,} weights")
    return lines


def add_budgets(found: Forecast, problem: Problem, planned: Planned) -> None:
    """What the plan makes of every budget that was asked for."""
    for b in problem.budgets if planned.keep is None else ():
        achieved = found.params_after if b.name == "max_params" else b.achieved(count_left(problem, planned.ranks, b))
        found.budgets[b.name] = {"asked": b.asked, "achieved": achieved}
        if isinstance(b, Latency):
            found.latency_ms_before, found.latency_ms_after = b.achieved(b.total), achieved
            found.warnings += note_slower(b.achieved(b.total), achieved)


def count_units(problem: Problem, plan: Plan) -> Iterator[dict[str, Any]]:
    """Rank and weights of every unit, before and after."""
    for unit in sorted(problem.units):
        rank = plan.get(unit, full := problem.full(unit))
        sizes = {"before": problem.count(unit, full), "after": problem.count(unit, rank)}
        yield {"block": unit.block, "unit": unit.name, "rank": rank, "full": full, **sizes}


def count_blocks(problem: Problem, plan: Plan, weights: Budget) -> Iterator[dict[str, int]]:
    """Weights of every block with units, before and after; all blocks in one row where a unit is of all of them."""
    for block in sorted({u.block for u in problem.units}):
        whole = any(u.block == block and u.name in WHOLE for u in problem.units)
        before = sum(s.count() for s in problem.shapes if whole or s.block == block)
        mine = {u: r for u, r in plan.items() if u.block == block}
        gone = int(weights.total - count_left(problem, mine, weights))
        yield {"block": block, "before": before, "after": before - gone}


def count_released(run: Run) -> tuple[int, int] | None:
    """Bytes before and after where what stays is written as it was released (see `planish.plan.experts.find_kept`)."""
    found = find_kept(run.problem, run.planned, run.measure.source)
    if found is None:
        return None
    experts = {s.block: s.experts.number for s in run.problem.shapes if s.experts}
    return found.size, found.count_bytes({i: run.planned.ranks.get(Unit(i, "experts"), n) for i, n in experts.items()})


def count_written(run: Run) -> int:
    """Parameters of the result: those outside the blocks, and what the blocks hold with the modules that the plan makes."""
    problem, ranks, source = run.problem, run.planned.ranks, run.measure.source
    total = sum(p.numel() for p in source.empty.parameters())
    for shape in problem.shapes:
        cut = [u for u in problem.units if u.block == shape.block or u.name in WHOLE]
        specs = [
            problem.units[u].spec(u, shape, r) for u in cut if (r := ranks.get(u, problem.full(u))) < problem.full(u)
        ]
        spec = merge_specs(shape, [*specs, merge_forms(shape, list(run.planned.edits.get(shape.block, ())))])
        if not spec:
            continue
        block = source.empty_block(shape.block)
        total -= sum(p.numel() for p in block.parameters())
        if not is_empty(spec) or (source.tower and shape.block < source.tower.pinned):
            made = install(copy.deepcopy(block), spec, source.family, source.config)
            total += sum(p.numel() for p in made.parameters())
    return total
