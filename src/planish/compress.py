"""From a model and a method to a smaller folder."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.activations import Room
from planish.allocate import BudgetError, CacheCost, spread
from planish.checkpoint import Source, Writer, apply_edits, count_block, is_empty, kv_bytes, open_source, write_config
from planish.core import SUBMODULES, Edit, Frontier, Method, Plan, Progress, Shape, Solver, Unit, Weights
from planish.errors import InputError
from planish.methods import find_method
from planish.modules import Spec, get_linear
from planish.stats import Stats, Tap
from planish.stream import Stream
from planish.version import __version__


@dataclass
class Result:
    """What `compress` reports; counted from the written weights."""

    method: str
    keep_requested: float
    keep: float
    params_before: int
    params_after: int
    block_params_before: int
    block_params_after: int
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int
    format: str
    output: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def removed(self) -> float:
        """The papers' ratio: share of the blocks' weights that is gone."""
        return 1 - self.keep

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed": self.removed, "keep_whole_model": self.params_after / self.params_before}


class Job:
    """One method on one model and one calibration text under one budget: what a method's `plan` can ask."""

    def __init__(
        self,
        stream: Stream,
        method: Method,
        keep: float,
        *,
        kv_keep: float | None = None,
        step: int = 1,
        progress: Progress | None = None,
    ):
        self.stream, self.method, self.keep, self.step, self.progress = stream, method, keep, step, progress
        self.shapes: list[Shape] = [stream.source.shape(i) for i in range(len(stream))]
        self.units: dict[Unit, Solver] = {}
        for solver in method.solvers() if kv_keep is None else map(CacheCost, method.solvers()):
            for shape in self.shapes:
                self.units |= dict.fromkeys(solver.units(shape), solver)
        self.total = self.weights = sum(s.count() for s in self.shapes)
        self.kv_keep = kv_keep
        if kv_keep is not None:  # the budget is then the cache's: numbers per token
            self.keep, self.total = kv_keep, sum(s.kv_heads * (s.qk + s.v) for s in self.shapes)
            if not self.units:
                raise InputError(f"--kv-keep: {find_name(method)} cuts neither keys nor values; use a3, modegpt or flat-llm")
        self.stored: dict[int, Stats] = {}  # statistics that a plan measured and the solve uses again
        self.edits: dict[int, list[Edit]] = {}  # per block, what the plan has worked out itself; not solved again
        self.notes: dict[str, Any] = {}  # what the method wants recorded in the manifest
        self.seconds: dict[str, float] = {}
        self.timers: list[Timer] = []  # running now, the innermost last
        self.errors: dict[str, float] = {}  # predicted loss of the planned rank, per unit

    @property
    def budget(self) -> int:
        """Weights that all units together may have."""
        return int(self.keep * self.total + 1e-6) - (self.total - self.full_cost())

    def full_cost(self, units: list[Unit] | None = None) -> int:
        return sum(self.cost(u, self.full(u)) for u in (self.units if units is None else units))

    def full(self, unit: Unit) -> int:
        return self.units[unit].ranks(unit, self.shapes[unit.block])[-1]

    def cost(self, unit: Unit, rank: int) -> int:
        return self.units[unit].cost(unit, self.shapes[unit.block], rank)

    def count(self, unit: Unit, rank: int) -> int:
        """Weights left in the unit at this rank, whatever the budget counts."""
        solver = self.units[unit]
        solver = solver.solver if isinstance(solver, CacheCost) else solver
        return solver.cost(unit, self.shapes[unit.block], rank)

    def spread(self, share: Callable[[Unit], float]) -> Plan:
        """Ranks in proportion to `share`, within the budget (see `planish.allocate.spread`)."""
        try:
            return spread(self.units, self.shapes, share, self.budget, self.step)
        except BudgetError as error:
            smallest = (error.smallest + self.total - self.full_cost()) / self.total
            raise InputError(
                f"{'keep' if self.kv_keep is None else 'kv-keep'} {self.keep:g} cannot be reached by {find_name(self.method)}: the smallest keep is {ceil4(smallest)}"
            ) from None

    def plan(self) -> Plan:
        """The method's ranks within the budget."""
        return self.method.plan(self) if self.kv_keep is None else self.method.plan_cache(self)

    def measure(
        self,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        edits: dict[int, list[Edit]] | None = None,
    ) -> list[Tensor]:
        """One pass over the uncompressed model, or over the model with `edits` (per block); see `Stream.sweep`."""
        with self.phase("statistics"):
            return self.stream.sweep(taps, use, self.progress, edits=edits)

    def frontiers(self, solver: Solver | None = None) -> dict[Unit, Frontier]:
        """Every unit's frontier from the uncompressed model's statistics, without the factors.

        `solver`: decompose with this one instead of the units' own.
        """
        found: dict[Unit, Frontier] = {}

        def use(i: int, block: nn.Module, stats: Stats) -> None:
            found.update(self.decompose(i, block, stats, solver))

        self.measure(lambda shape: self.taps(self.block_units(shape.block), solver), use)
        return found

    def decompose(self, i: int, block: nn.Module, stats: Stats, solver: Solver | None = None) -> dict[Unit, Frontier]:
        """Frontiers of block i's units, without the factors."""
        weights, found = read_weights(block, self.stream), {}
        for unit in self.block_units(i):
            f = (solver or self.units[unit]).decompose(unit, weights, stats, self.shapes[i])
            found[unit] = Frontier(unit, f.loss, {}, f.nats)
        return found

    def gradients(self, use: Callable[[int, nn.Module, Stats], None]) -> None:
        """One pass forward and back over the uncompressed model for all units' taps; the sums stay in `stored`."""

        def keep(i: int, block: nn.Module, stats: Stats) -> None:
            self.stored[i] = stats
            use(i, block, stats)

        with self.phase("gradients"):
            self.stream.sweep_back(lambda shape: self.stored_taps(shape.block), keep, self.progress)

    def stored_taps(self, i: int) -> list[Tap]:
        """Taps of a block's units that the uncompressed model alone answers."""
        taps = self.taps(self.block_units(i))
        return [t for t in taps if all(s.startswith(("grad:", "dense:")) for s in t.sites)]

    def output_errors(self, plans: list[Plan]) -> list[float]:
        """Mean squared error per token of the last block's output under each plan."""
        dense = self.measure(lambda shape: [], lambda i, block, stats: None)
        errors = []
        for n, plan in enumerate(plans):
            hidden = self.solve(plan, lambda i, block, spec: None, phase=f"search {n + 1}/{len(plans)}")
            squares = [(a.double() - b.double()).square().sum(-1) for a, b in zip(hidden, dense, strict=True)]
            errors.append(float(torch.cat([x.flatten() for x in squares]).mean()))
        return errors

    def block_units(self, i: int) -> list[Unit]:
        return [u for u in self.units if u.block == i]

    def taps(self, units: list[Unit], solver: Solver | None = None) -> list[Tap]:
        return sorted({t for u in units for t in (solver or self.units[u]).taps(u, self.shapes[u.block])})

    def phase(self, name: str) -> Timer:
        return Timer(self.seconds, name, self.timers)

    def solve(self, plan: Plan, emit: Callable[[int, nn.Module, Spec], None], phase: str = "blocks") -> list[Tensor]:
        """Walk the blocks, solve every planned unit, hand each finished block to `emit`; last block's outputs."""
        stream, method = self.stream, self.method
        sequential = method.prefix != "dense"
        hidden = stream.start() if stream.batches and (sequential or not self.stored) else []
        dense_hidden = hidden if method.prefix == "both" else None
        for i, shape in enumerate(self.shapes):
            block = stream.block(i)
            before = count_block(block)
            assert before == shape.count(), f"block {i} has {before} weights, its shape says {shape.count()}"
            edits = list(self.edits.get(i, []))
            done = {SUBMODULES.get(e.target) for e in edits}
            units = [u for u in self.block_units(i) if plan.get(u, self.full(u)) < self.full(u) and u.name not in done]
            outputs = None
            weights = read_weights(block, stream)
            dense = copy.deepcopy(block) if method.prefix == "both" else None
            spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
            for stage in method.stages(units):
                taps = self.taps(stage)
                with self.phase("stream"):
                    current = stream.place(block)
                    pair = (stream.place(dense), dense_hidden) if dense is not None else None
                    known = self.stored.get(i, Stats())
                    taps = [t for t in taps if t not in known.sums]
                    if taps or sequential:
                        stats, outputs = stream.measure(i, current, taps, hidden, pair, outputs=not sequential)
                    else:
                        stats = Stats()
                    stats.merge(known)
                with self.phase("solve"):
                    new = []
                    for unit in stage:
                        solver = self.units[unit]
                        frontier = solver.decompose(unit, weights, stats, shape)
                        if not isnan(loss := float(frontier.loss[plan[unit]])):  # nothing is predicted
                            self.errors[str(unit)] = loss
                        new += solver.truncate(frontier, plan[unit], shape)
                    if edits:  # edits of a block are applied together, to a block as it was
                        block = stream.block(i)
                    edits += new
                    spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
                    del stats
            with self.phase("stream"):
                if sequential or outputs is None:
                    outputs = stream.run(i, stream.place(block), hidden)
                if dense is not None and dense_hidden is not None:
                    dense_hidden = stream.run(i, stream.place(dense), dense_hidden)
                hidden = outputs
            emit(i, block, spec)
            if self.progress:
                self.progress(phase, i + 1, len(self.shapes))
        return hidden


class Timer:
    """Adds the seconds of a with-block, less those of timers running inside it, to a dict entry."""

    def __init__(self, seconds: dict[str, float], name: str, running: list[Timer]):
        self.seconds, self.name, self.running = seconds, name, running
        self.inner = 0.0

    def __enter__(self) -> None:
        self.running.append(self)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.start
        self.running.pop()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + took - self.inner
        if self.running:
            self.running[-1].inner += took


def read_weights(block: nn.Module, stream: Stream) -> Weights:
    """Weights and biases of a canonical block's linears, in the stored dtype, on the CPU."""
    weights: Weights = {}
    for role in stream.family.roles:
        linear = get_linear(block, stream.family, role)
        weights[role] = linear.weight.detach()
        if linear.bias is not None:
            weights[f"{role}.bias"] = linear.bias.detach()
    return weights


def find_name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2].replace("_", "-")


def ceil4(x: float) -> float:
    return -(-x * 10_000 // 1) / 10_000


def check_keep(keep: float, name: str = "keep", share: str = "of the blocks' weights") -> None:
    if not 0 < keep <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {keep:g} (the share {share} that stays)")


DAMPINGS = ("damping", "ridge")  # settings with which a method makes a singular Gram invertible


def check_tokens(job: Job, windows: Tensor, settings: dict[str, Any]) -> None:
    """Fewer calibration tokens than a Gram's dimension make it singular: an error unless damping is asked for."""
    own = [n for n in DAMPINGS if n in job.method.settings()]
    if set(own) & set(settings):
        return
    grams = [t for t in job.taps(job.block_units(0)) if t.kind in ("gram", "moments")]
    need = max((channels(job.shapes[0], t.site) for t in grams), default=0)
    if 0 < windows.numel() < need:
        hint = f", or ask for damping (--set {own[0]}=0.01)" if own else ""
        raise InputError(
            f"calibration has {windows.numel()} tokens, fewer than the largest Gram's dimension {need}: "
            f"use at least {need} tokens (--n-samples × --seq-len){hint}"
        )


def channels(shape: Shape, site: str) -> int:
    """Width of the tensor at a tap's site."""
    where, end = site.rpartition(":")[2].split(".")
    if where not in shape.roles:
        return shape.hidden
    out, n = shape.linear(where)
    return out if end == "out" else n


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compress(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    keep: float = 0.8,
    kv_keep: float | None = None,
    method: str | Method = "flat-llm",
    windows: Tensor,
    calibration: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    round_to: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Compress a model into a folder. `windows` (n, seq): calibration token ids (see `planish.text`).

    `model`: folder, hub id or causal LM in memory (left untouched). `settings`: the method's hyper-parameters by name.
    `kv_keep`, instead of `keep`: kept share of the KV cache's bytes per token; only what the cache holds is then cut.
    `calibration`: what to record about the text in the manifest. Raises InputError for anything wrong with the input.
    """
    start = time.perf_counter()
    check_keep(keep)
    if kv_keep is not None:
        check_keep(kv_keep, "kv-keep", "of the KV cache")
    method = find_method(method, settings or {})
    source = open_source(model, tokenizer)
    check_windows(windows, source)
    writer = Writer(Path(output), source.n_blocks, overwrite)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            room = Room(folder=writer.partial)
            stream = Stream(source, windows, device=device, dtype=dtype or pick_dtype(source, device), room=room)
            job = Job(stream, method, keep, kv_keep=kv_keep, step=round_to, progress=progress)
            check_tokens(job, windows, settings or {})
            with job.phase("plan"):
                plan = job.plan()
                method.finish(job, plan)
            result = write(job, plan, writer)
        result.warnings = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
        result.seconds["total"] = time.perf_counter() - start
        write_manifest(writer, job, plan, result, calibration or {})
        writer.close()
    except BaseException:
        writer.abort()
        raise
    return result


def pick_dtype(source: Source, device: str) -> torch.dtype:
    """What to compute in: the stored dtype on an accelerator, fp32 on a CPU."""
    stored = getattr(source.config, "dtype", None)
    if device == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def check_windows(windows: Tensor, source: Source) -> None:
    limit = getattr(source.config, "max_position_embeddings", None)
    rope = getattr(source.config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "dynamic":  # tables that grow with the sequence
        limit = int(limit * rope.get("factor", 1.0))
    if limit and windows.shape[-1] > limit:
        raise InputError(f"--seq-len {windows.shape[-1]} is longer than the model's {limit} positions")
    vocabulary = source.config.vocab_size
    if windows.numel() and not (int(windows.min()) >= 0 and int(windows.max()) < vocabulary):
        raise InputError(f"calibration holds token id {int(windows.max())}, the model's vocabulary has {vocabulary}")


def write(job: Job, plan: Plan, writer: Writer) -> Result:
    """Solve and write every block, then what is outside the blocks and the configuration."""
    source = job.stream.source
    specs: list[Spec] = []
    shapes: list[Shape] = []  # of the blocks that are left
    counted: list[int] = []
    itemsize = 2

    def emit(i: int, block: nn.Module, spec: Spec) -> None:
        nonlocal itemsize
        if is_empty(spec):
            return
        counted.append(count_block(block))
        specs.append(spec)
        shapes.append(job.shapes[i])
        itemsize = next(block.parameters()).element_size()
        with job.phase("write"):
            writer.block(len(specs) - 1, block, source.family)

    job.method.solve(job, plan, emit)
    kind = write_config(writer, source, specs, shapes)
    outside = drop_tied(source.outside(), source)
    outer = sum(t.numel() for t in outside.values())
    head = source.family.head if kind == "native" else "lm_head"
    writer.shard(0, {n.replace("lm_head.", f"{head}.", 1) if n.startswith("lm_head.") else n: t for n, t in outside.items()})
    source.copy_files(writer.partial)
    blocks = sum(p.numel() for i in range(source.n_blocks) for p in source.empty_block(i).parameters())
    before = job.weights
    return Result(
        find_name(job.method),
        job.keep,
        sum(counted) / before,
        outer + blocks,
        writer.parameters,
        before,
        sum(counted),
        kv_bytes([{}] * len(job.shapes), job.shapes, itemsize),
        kv_bytes(specs, shapes, itemsize),
        kind,
        str(writer.output),
        job.seconds,
        peak_rss(),
    )


def drop_tied(outside: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Tied checkpoints store one matrix, under the embedding's name."""
    if not source.config.tie_word_embeddings or "lm_head.weight" not in outside:
        return outside
    rest = {n: t for n, t in outside.items() if n != "lm_head.weight"}
    embedding = source.embedding_name()
    return rest if embedding in rest else {embedding: outside["lm_head.weight"], **rest}


def write_manifest(writer: Writer, job: Job, plan: Plan, result: Result, calibration: dict[str, Any]) -> None:
    """planish.json: everything needed to understand and to repeat the run."""
    manifest = {
        "planish": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "source": job.stream.source.name,
        "method": result.method,
        "settings": job.method.settings(),
        "round_to": job.step,
        "calibration": calibration,
        "dtype": str(job.stream.dtype).removeprefix("torch."),
        "result": result.as_dict(),
        "plan": {str(u): r for u, r in sorted(plan.items())},
        "full": {str(u): job.full(u) for u in sorted(job.units)},
        "errors": job.errors,
        "notes": job.notes,
    }
    writer.text("planish.json", json.dumps(manifest, indent=2, default=str) + "\n")
    writer.text("README.md", make_card(manifest))


def make_card(manifest: dict[str, Any]) -> str:
    """The folder's model card."""
    r = manifest["result"]
    name = manifest["source"]
    base = f"base_model: {name}\n" if name.count("/") == 1 and not name.startswith((".", "/")) else ""
    load = "from transformers import AutoModelForCausalLM\n"
    if r["format"] != "native":
        load = "import planish  # or trust_remote_code=True: the folder carries the modelling files\n" + load
    kv = (r["kv_bytes_per_token_before"], r["kv_bytes_per_token_after"])
    return f"""---
{base}library_name: transformers
tags: [planish, compressed, {manifest["method"]}]
---

# Compressed with planish: {manifest["method"]}, keep {r["keep"]:.4f}

| | before | after |
|---|---|---|
| parameters | {r["params_before"]:,} | {r["params_after"]:,} |
| parameters of the blocks' linears | {r["block_params_before"]:,} | {r["block_params_after"]:,} |
| KV cache, bytes per token | {kv[0]:,} | {kv[1]:,} |

```python
{load}model = AutoModelForCausalLM.from_pretrained("this folder")
```

Calibration: {json.dumps(manifest["calibration"], default=str)}. Hyper-parameters: {json.dumps(manifest["settings"], default=str)}.
The plan, per-unit errors and versions are in `planish.json`.
"""
