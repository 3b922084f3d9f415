"""From a model and a method to a smaller folder."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import lanes
from planish.apply import count_block, is_empty
from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache, open_cache
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import LARGE, Stream, reuse_memory
from planish.calibrate.text import list_priced, shuffle_windows
from planish.checking import check_apart, check_tokens, check_windows
from planish.core import Progress, Shape
from planish.errors import InputError
from planish.folder.config import write_config
from planish.folder.owner import owning
from planish.folder.safetensors import Shard, hash_file
from planish.folder.source import FolderSource, Source, open_source
from planish.folder.writer import Writer, tidy, unseal, write_outside
from planish.manifest import Result, note_origin, read_result, write_manifest
from planish.methods import find_method, leaves_all, make_plan, note_objective, pose
from planish.methods.method import Method, list_settings
from planish.modelling.blocks import Spec
from planish.plan.experts import find_kept
from planish.plan.footprint import count_headers, footprint
from planish.plan.latency import note_slower, read_table
from planish.plan.planned import Planned
from planish.plan.problem import Problem, changes
from planish.request import Request
from planish.solvers.offload import offload
from planish.walks.bits import read_asked
from planish.walks.loss import measure_loss
from planish.walks.quantise import Report, quantise
from planish.walks.solve import solve


@dataclass
class Calibration:
    """Token windows (n, seq) of a text, what the manifest records of them, seconds of reading; `spare` ones to measure on."""

    windows: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    spare: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))


@dataclass(frozen=True)
class Destination:
    """Where the result goes. `files`: further text files of the folder, by name; `resume`: take up an interrupted run."""

    output: Path
    overwrite: bool = False
    files: dict[str, str] = field(default_factory=dict)
    resume: bool = False


@dataclass(frozen=True)
class Shared:
    """What several runs on the same windows share. `cache`: of statistics (True: the one on disk); `measured`: a table of
    latencies to plan with, instead of this machine's; `known`: remembers prices of types in the place of `cache`."""

    stream: Stream | None = None
    cache: Cache | bool = False
    measured: dict[str, float] | None = None
    known: Cache | None = None

    def recall(self, request: Request, cache: Cache | None) -> Cache | None:
        """Where prices of types are remembered: those of the uncut model."""
        return (self.known or cache) if request.whole else None


def compress(
    request: Request,
    method: Method,
    source: Source,
    text: Calibration,
    place: Destination,
    *,
    shared: Shared = Shared(),
    progress: Progress | None = None,
) -> Result:
    """Compress a model into a folder. Raises InputError for anything wrong with the input.

    Of the request the budgets, device, dtype (what torch calls them), round_to and target count, and which settings were
    given; the method, the model and the text are there already. `kv_keep` alone only cuts what the cache holds.
    """
    start = time.perf_counter()
    reuse_memory()
    device, windows = join_lanes(request.device), text.windows
    source.sizes()  # of a hub id: its weights are fetched here
    asked = read_asked(request, source)
    check_windows(windows, source)
    check_apart(place.output, source)
    writer = Writer(place.output, source.n_blocks, place.overwrite, place.resume, source.tower)
    try:
        kind = getattr(torch, request.dtype) if request.dtype else pick_dtype(source, device)
        measured = shared.measured
        if request.max_latency is not None and measured is None:  # all processes plan with one table
            length = request.context or windows.shape[1]
            measured = lanes.share(read_table(source, length, device, kind, progress) if lanes.rank() == 0 else None)
        if not place.resume and isinstance(source, FolderSource):
            journal = write_journal(request, method, source, text, place) | {"measured": measured}
            writer.keep_request(journal, {"windows": windows, "spare": text.spare})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stream, cache = open_stream(
                source, method, windows, shared, writer.partial, device, kind, bool(request.dtype)
            )
            problem = pose(
                method, source, request, step=request.round_to, measured=measured,
                target=asked.blocks if asked else request.target, length=windows.shape[1] if windows.numel() else 0,
            )  # fmt: skip
            measure, known = Measurements(stream, cache, progress), shared.recall(request, cache)
            measure.seconds |= {"text": text.seconds} if text.seconds else {}
            with offload(stream.device):
                with measure.phase("plan"):
                    planned = decide(method, problem, measure, request, windows)
                done = write(problem, measure, planned, writer, caught, rounds=asked is not None)
                done.rounded = quantise(asked, measure, writer, windows, known) if asked else None
                done.loss = measure_loss(measure, writer, text.spare) if asked or changes(problem, planned) else {}
        result = report(problem, planned, source, writer, done)
        result.warnings = sorted({*read_warnings(caught), *result.warnings})
        result.seconds = measure.seconds | {"total": time.perf_counter() - start + text.seconds}
        write_manifest(writer, method, problem, planned, stream, result, done.details, text.record)
        for name, content in place.files.items():
            writer.text(name, content)
        writer.close()
    except BaseException as error:
        writer.abort(wrong_input=isinstance(error, (InputError, OSError)) and not place.resume)
        raise
    return result


def decide(method: Method, problem: Problem, measure: Measurements, request: Request, windows: Tensor) -> Planned:
    """The method's plan, and what there is to say about the text."""
    if not leaves_all(method, problem):
        check_tokens(method, problem, windows, dict(request.settings))
    if request.bits is None and not bool(list_priced(windows).all()):
        for note in note_objective(method, problem, measure, len(windows)):
            warnings.warn(note, stacklevel=2)
    return make_plan(method, problem, measure)


def join_lanes(device: str) -> str:
    """The device to compute on, after the other processes of the run were joined: each its own accelerator."""
    several = lanes.start(device)
    return f"cuda:{torch.cuda.current_device()}" if several and device == "cuda" else device


def open_stream(
    source: Source,
    method: Method,
    windows: Tensor,
    shared: Shared,
    folder: Path | None,
    device: str,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Stream, Cache | None]:
    """The stream of the windows (n, seq) as the method measures on them, and the cache of their statistics, if any.

    `folder`: where activations go that memory does not hold (None: the system's temporary one). `exact`: products are formed
    in `dtype` and no other.
    """  # fmt: skip
    stream, cache, calibrated = shared.stream, shared.cache, shuffle_windows(windows, method.shuffled)
    products = dtype if exact else pick_products(source, method, device, dtype)
    if stream is None:
        stream = Stream(source, calibrated, device=device, dtype=dtype, limits=MemoryLimits(folder=folder))
    if calibrated is not windows or products != stream.products:
        stream = stream.part(calibrated, products) if len(calibrated) else stream
        cache = cache.sibling(stream) if isinstance(cache, Cache) else cache
    return stream, open_cache(stream) if cache is True else cache or None


def find_lasting(model: Path) -> Path:
    """A model's path without links that may be gone later; a file keeps its own name, by which its format is known."""
    return model.resolve() if model.is_dir() else model.parent.resolve() / model.name


def write_journal(
    request: Request, method: Method, source: FolderSource, text: Calibration, place: Destination
) -> dict[str, Any]:
    """What `resume` needs besides the windows: the request, as it was understood."""
    return {
        "model": str(find_lasting(source.folder)), "name": source.name, "asked": request.limits,
        "adapter": None if request.adapter is None else str(Path(request.adapter).resolve()),
        "method": method.name, "settings": list_settings(method), "given": sorted(request.settings),
        "calibration": text.record, "device": request.device.partition(":")[0], "dtype": request.dtype,
        "round_to": request.round_to, "overwrite": place.overwrite, "target": request.target, "bits": request.bits,
        "head_bits": request.head_bits, "files": place.files,
        "processes": lanes.count(),
    }  # fmt: skip


@owning
def resume(output: str | Path, progress: Progress | None = None) -> Result:
    """Finish an interrupted `compress` into `output`: the same weights as if it had never been interrupted.

    The plan is worked out again (it is deterministic); finished blocks are read back and only run, not solved.
    """
    output = Path(output)
    state = output.with_name(output.name + ".partial") / "resume"
    if not (state / "request.json").is_file():
        if (output / "planish.json").is_file() and tidy(output):  # stopped after the last rename
            return read_result(output)
        hint = ": it is complete" if (output / "planish.json").is_file() else ""
        raise InputError(f"nothing to resume at {output}{hint} (no {state / 'request.json'})")
    try:
        journal = unseal(json.loads((state / "request.json").read_text(encoding="utf-8")))
        if hash_file(state / "windows.safetensors") != journal["windows"]:
            raise ValueError("the calibration windows are not what was written")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in journal["settings"].items()}
        method = find_method(find_method(journal["method"]).__class__(**values))
        if journal["processes"] != lanes.world():
            warnings.warn(f"started with {journal['processes']} processes, resumed with {lanes.world()}", stacklevel=2)
        source = open_source(journal["model"], adapter=journal.get("adapter"))
        source.name = journal["name"]
        dtype = journal["dtype"] and str(getattr(torch, journal["dtype"])).removeprefix("torch.")
        request = Request(
            **journal["asked"], model=source.name, method=journal["method"], settings=dict.fromkeys(journal["given"]),
            device=journal["device"], dtype=dtype, round_to=journal["round_to"], target=journal["target"],
            bits=journal.get("bits"), head_bits=journal.get("head_bits"),
        )  # fmt: skip
        place = Destination(output, journal["overwrite"], journal["files"], resume=True)
        measured, kept = journal["measured"], Shard(state / "windows.safetensors")
        text = Calibration(kept.read("windows"), journal["calibration"])
        text.spare = kept.read("spare") if "spare" in kept.entries else text.spare  # old runs have none
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {state / 'request.json'}: {error!r}; compress again with --overwrite") from None
    return compress(request, method, source, text, place, shared=Shared(measured=measured), progress=progress)


@dataclass
class Written:
    """The blocks that are left, as they were written: spec, shape before, weights; `itemsize` of a weight, `kind` of the
    configuration, `outer` weights outside the blocks; predicted loss per cut unit."""

    specs: list[Spec] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    itemsize: int = 2
    kind: str = ""
    outer: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    rounded: Report | None = None
    loss: dict[str, Any] = field(default_factory=dict)  # see `planish.walks.loss.measure_loss`
    stays: list[str] = field(default_factory=list)  # to say about tensors that are written as they are stored

    @property
    def details(self) -> dict[str, Any]:
        return {"errors": self.errors} | ({"rounding": self.rounded.linears} if self.rounded else {})

    @property
    def notes(self) -> list[str]:
        return self.rounded.notes() if self.rounded else self.stays


def write(
    problem: Problem,
    measure: Measurements,
    planned: Planned,
    writer: Writer,
    caught: list[warnings.WarningMessage],
    rounds: bool,
) -> Written:
    """Solve and write every block, then what is outside the blocks and the configuration. `rounds`: all of it is rounded then."""
    source, done = measure.stream.source, Written()
    writer.released = None if rounds else find_kept(problem, planned, source)
    done.stays = [writer.released.describe()] if writer.released else []
    pinned = source.tower.pinned if source.tower else 0
    for entry in writer.finished.values():
        done.errors |= entry["errors"]

    def emit(i: int, block: nn.Module, spec: Spec, errors: dict[str, float]) -> None:
        done.errors |= errors
        if i in writer.finished:
            spec, errors = writer.finished[i]["spec"], writer.finished[i]["errors"]
        entry = {"spec": spec, "errors": errors, "warnings": read_warnings(caught)}
        if is_empty(spec) and i >= pinned:
            writer.block(i, None, source.family, len(done.specs), entry)
            return
        done.counted.append(count_block(block))
        done.specs.append(spec)
        done.shapes.append(problem.shapes[i])
        done.itemsize = next((p.element_size() for p in block.parameters()), done.itemsize)
        with measure.phase("write"):
            writer.block(i, block, source.family, len(done.specs) - 1, entry)

    finished = {i: partial(writer.restore, i, source=source) for i in writer.finished}
    if writer.active:  # first: what cannot be copied or saved is found before the work
        source.copy_files(writer.partial)
    solve(problem, measure, planned, emit, finished=finished)
    declared, files = writer.released.declare(writer.kept) if writer.released else ({}, {})
    done.kind = write_config(writer.text, source.config, source.family, done.specs, done.shapes, source.tower, declared)
    for name, text in files.items():
        writer.text(name, text)
    done.outer = write_outside(source, writer, done.kind)
    return done


def report(problem: Problem, planned: Planned, source: Source, writer: Writer, done: Written) -> Result:
    """What was asked and what came out, counted from what was written."""
    blocks = sum(p.numel() for i in range(source.n_blocks) for p in source.empty_block(i).parameters())
    uncut, dense = [s.count() for s in problem.shapes], [dict[str, Any]()] * len(problem.shapes)
    models = [
        [footprint(spec, shape, problem.context) for spec, shape in zip(*model, strict=True)]
        for model in ((dense, problem.shapes), (done.specs, done.shapes))
    ]
    flops = [sum(f.flops for f in found) for found in models]
    caches = [sum(f.cache for f in found) for found in models]
    result = Result(
        method=problem.name,
        keep_requested=problem.keep if planned.keep is None else planned.keep,
        keep=sum(done.counted) / sum(uncut),
        params_before=done.outer + blocks,
        params_after=writer.parameters,
        block_params_before=sum(uncut),
        block_params_after=sum(done.counted),
        kv_bytes_per_token_before=caches[0] * done.itemsize,
        kv_bytes_per_token_after=caches[1] * done.itemsize,
        kv_bits=8 * done.itemsize,
        format=done.kind,
        output=str(writer.output),
        peak_rss_bytes=peak_rss(),
        bytes_before=count_before(source) if writer.released is None else writer.released.size,
        bytes_after=writer.bytes + writer.headers,
        flops_per_token_before=flops[0] + 2 * source.count_head(),
        flops_per_token_after=flops[1] + 2 * source.count_head(),
        context=problem.context,
        submodules={name: dict(gone) for name, gone in planned.removed.items()},
        rounding=done.rounded.summary() if done.rounded else {},
        loss=done.loss,
        untouched=source.untouched.parts,
        warnings=[*planned.remarks.values(), *note_origin(source), *done.notes, *writer.warned],
    )
    if problem.table is not None:
        result.latency_ms_before = problem.table.predict(dense, problem.shapes) * 1e3
        result.latency_ms_after = problem.table.predict(done.specs, done.shapes) * 1e3
        result.warnings += note_slower(result.latency_ms_before, result.latency_ms_after)
    written: dict[str, float | None] = {
        "keep": result.keep,
        "max_params": result.params_after,
        "max_bytes": result.bytes_after,
        "max_latency": result.latency_ms_after,
    }
    for b in problem.budgets if planned.keep is None else ():  # counted in the files, or as the plan counts
        by_plan = b.achieved(sum(map(b.measure, models[1])))
        result.budgets[b.name] = {"asked": b.asked, "achieved": written.get(b.name, by_plan)}
    return result


def count_before(source: Source) -> int:
    """Bytes of the uncompressed model in the type that it is read in, headers included."""
    sizes = source.sizes().values()
    return sum(n * dtype.itemsize for n, dtype in sizes) + source.untouched.bytes + count_headers(source)


def pick_dtype(source: Source, device: str) -> torch.dtype:
    """What to compute in: the stored dtype on an accelerator, fp32 on a CPU."""
    stored = getattr(source.config, "dtype", None)
    if device == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def pick_products(source: Source, method: Method, device: str, dtype: torch.dtype) -> torch.dtype:
    """What the blocks' products are formed in where no dtype is asked for: bf16 where a method's statistics bear it, the
    processor multiplies in it, and blocks are large enough for the time to matter; else what is computed in."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    large = source.n_blocks and source.shape(0).count() > LARGE
    return torch.bfloat16 if device == "cpu" and method.coarse and fast and large else dtype


def read_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes. (getrusage also counts what its parent had before.)"""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        found = next((line for line in file if line.startswith("VmHWM:")), None)
        if found:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
