"""From a model and a method to a smaller folder."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import lanes
from planish.apply import count_block, is_empty
from planish.calibrate.activations import Room
from planish.calibrate.cache import Cache, open_cache
from planish.calibrate.stream import Stream, reuse_memory
from planish.calibrate.text import shuffle_windows
from planish.core import Plan, Progress, Shape, Unit
from planish.errors import InputError
from planish.folder.config import write_config
from planish.folder.safetensors import Shard, hash_file
from planish.folder.source import FolderSource, Source, open_source
from planish.folder.writer import Writer, tidy, unseal
from planish.job import Job
from planish.manifest import Result, note_origin, read_result, write_manifest
from planish.methods import find_method
from planish.methods.method import Method
from planish.modelling.blocks import Spec
from planish.plan.budgets import Asked, read_asked
from planish.plan.footprint import count_flops, count_headers, kv_bytes
from planish.plan.latency import read_table
from planish.plan.targets import find_target
from planish.solvers.offload import offload


def compress(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    keep: float | None = None,
    asked: Asked | None = None,
    method: str | Method = "flat-llm",
    windows: Tensor,
    calibration: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    round_to: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    stream: Stream | None = None,
    cache: Cache | bool = False,
    resume: bool = False,
    target: str = "any",
    files: dict[str, str] | None = None,
    measured: dict[str, float] | None = None,
    spent: dict[str, float] | None = None,
    **limits: Any,
) -> Result:
    """Compress a model into a folder. `windows` (n, seq): calibration token ids (see `planish.calibrate.text`).

    `model`: folder, hub id or causal LM in memory (left untouched). `settings`: the method's hyper-parameters by name.
    `asked`, or `keep` and other `limits` by name: the budgets (see `planish.plan.budgets.Asked`). `kv_keep` alone only cuts what
    the cache holds. `measured`: the latency table to plan with, instead of this machine's.
    `calibration`: what to record about the text in the manifest. Raises InputError for anything wrong with the input.
    `cache`: the one that several runs share, or whether to use the one on disk; `stream`: what several runs on these windows
    share.
    `resume`: take up an interrupted run with these same arguments (see `planish.resume`).
    `files`: further text files for the folder, by name. `spent`: seconds of phases before this call, counted in the result.
    """
    start = time.perf_counter()
    reuse_memory()
    if lanes.start(device):
        device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    asked = asked or read_asked(keep=keep, **limits)
    find_target(target)
    method = find_method(method, settings or {})
    source = open_source(model, tokenizer)
    check_windows(windows, source)
    calibrated = shuffle_windows(windows, method.shuffled)
    check_apart(Path(output), source)
    writer = Writer(Path(output), source.n_blocks, overwrite, resume)
    try:
        kind = dtype or pick_dtype(source, device)
        if asked.max_latency is not None and measured is None:
            first = lanes.rank() == 0  # all plan with one table
            measured = lanes.share(
                read_table(source, asked.context or windows.shape[1], device, kind, progress) if first else None
            )
        if not resume and isinstance(source, FolderSource):
            request = {
                "model": str(source.folder.resolve()), "name": source.name, "asked": asdict(asked),
                "method": method.name, "settings": method.settings(), "given": sorted(settings or {}),
                "calibration": calibration or {}, "device": device.partition(":")[0], "dtype": dtype and str(dtype)[6:],
                "round_to": round_to, "overwrite": overwrite, "target": target, "files": files or {},
                "processes": lanes.count(), "measured": measured,
            }  # fmt: skip
            writer.keep_request(request, windows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if stream is None:
                room = Room(folder=writer.partial)
                stream = Stream(source, calibrated, device=device, dtype=kind, room=room)
            elif calibrated is not windows:
                stream = stream.part(calibrated)
            if calibrated is not windows and isinstance(cache, Cache):
                cache = cache.beside(stream)
            shared = open_cache(stream) if cache is True else cache or None
            job = Job(
                stream,
                method,
                asked=asked,
                step=round_to,
                progress=progress,
                cache=shared,
                target=target,
                measured=measured,
            )
            job.caught = caught
            job.seconds |= spent or {}
            check_tokens(job, windows, settings or {})
            with offload(stream.device):
                with job.phase("plan"):
                    plan = job.plan()
                result = write(job, plan, writer)
        earlier = {w for entry in writer.finished.values() for w in entry["warnings"]}
        result.warnings = sorted({*read_warnings(caught), *job.remarks.values(), *earlier, *note_origin(source)})
        result.seconds["total"] = time.perf_counter() - start + sum((spent or {}).values())
        write_manifest(writer, job, plan, result, calibration or {})
        for name, content in (files or {}).items():
            writer.text(name, content)
        writer.close()
    except BaseException as error:
        writer.abort(wrong_input=isinstance(error, (InputError, OSError)) and not resume)
        raise
    return result


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
        request = unseal(json.loads((state / "request.json").read_text(encoding="utf-8")))
        if hash_file(state / "windows.safetensors") != request["windows"]:
            raise ValueError("the calibration windows are not what was written")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in request["settings"].items()}
        method = find_method(find_method(request["method"]).__class__(**values))
        dtype = getattr(torch, request["dtype"]) if request["dtype"] else None
        if request["processes"] != lanes.world():
            warnings.warn(f"started with {request['processes']} processes, resumed with {lanes.world()}", stacklevel=2)
        source = open_source(request["model"])
        source.name = request["name"]
        asked, measured = Asked(**request["asked"]), request["measured"]
        round_to, overwrite = request["round_to"], request["overwrite"]
        target, files = request["target"], request["files"]
        calibration, given, device = request["calibration"], dict.fromkeys(request["given"]), request["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {state / 'request.json'}: {error!r}; compress again with --overwrite") from None
    return compress(
        source, output=output, asked=asked, measured=measured, method=method,
        windows=Shard(state / "windows.safetensors").read("windows"), calibration=calibration, settings=given,
        device=device, dtype=dtype, round_to=round_to, overwrite=overwrite, progress=progress, resume=True,
        target=target, files=files,
    )  # fmt: skip


def write(job: Job, plan: Plan, writer: Writer) -> Result:
    """Solve and write every block, then what is outside the blocks and the configuration."""
    source = job.stream.source
    specs: list[Spec] = []
    shapes: list[Shape] = []  # of the blocks that are left
    counted: list[int] = []
    itemsize = 2

    def emit(i: int, block: nn.Module, spec: Spec) -> None:
        nonlocal itemsize
        spec = writer.finished[i]["spec"] if i in writer.finished else spec
        errors = {u: e for u, e in job.errors.items() if Unit.parse(u).block == i}
        entry = {"spec": spec, "errors": errors, "warnings": read_warnings(job.caught)}
        if is_empty(spec):
            writer.block(i, None, source.family, len(specs), entry)
            return
        counted.append(count_block(block))
        specs.append(spec)
        shapes.append(job.shapes[i])
        itemsize = next(block.parameters()).element_size()
        with job.phase("write"):
            writer.block(i, block, source.family, len(specs) - 1, entry)

    for i, entry in writer.finished.items():
        job.errors |= entry["errors"]
        job.finished[i] = partial(writer.restore, i, source=source)
    job.method.solve(job, plan, emit)
    kind = write_config(writer, source, specs, shapes)
    outside = drop_tied(source.outside(), source)
    outer = sum(t.numel() for t in outside.values())
    head = source.family.head if kind == "native" else "lm_head"
    writer.shard(
        0, {n.replace("lm_head.", f"{head}.", 1) if n.startswith("lm_head.") else n: t for n, t in outside.items()}
    )
    if writer.active:
        source.copy_files(writer.partial)
    blocks = sum(p.numel() for i in range(source.n_blocks) for p in source.empty_block(i).parameters())
    before, dense = job.weights, [dict[str, Any]()] * len(job.shapes)
    flops = [
        count_flops(job.shapes, dense, [s.count() for s in job.shapes], job.context),
        count_flops(shapes, specs, counted, job.context),
    ]
    result = Result(
        job.method.name,
        job.keep,
        sum(counted) / before,
        outer + blocks,
        writer.parameters,
        before,
        sum(counted),
        kv_bytes(dense, job.shapes, itemsize),
        kv_bytes(specs, shapes, itemsize),
        kind,
        str(writer.output),
        job.seconds,
        peak_rss(),
        bytes_before=sum(n * dtype.itemsize for n, dtype in source.sizes().values()) + count_headers(source),
        bytes_after=writer.bytes + writer.headers,
        flops_per_token_before=flops[0] + 2 * source.count_head(),
        flops_per_token_after=flops[1] + 2 * source.count_head(),
        context=job.context,
        submodules=job.notes.get("removed", {}),
    )
    if job.table is not None:
        result.latency_ms_before = job.table.predict(dense, job.shapes) * 1e3
        result.latency_ms_after = job.table.predict(specs, shapes) * 1e3
    achieved = {
        "keep": result.keep,
        "max_params": result.params_after,
        "max_bytes": result.bytes_after,
        "kv_keep": result.kv_bytes_per_token_after / result.kv_bytes_per_token_before,
        "flops_keep": flops[1] / flops[0],
        "max_latency": result.latency_ms_after,
    }
    result.budgets = {b.name: {"asked": b.asked, "achieved": achieved[b.name]} for b in job.kept_budgets}
    return result


def drop_tied(outside: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Tied checkpoints store one matrix, under the embedding's name."""
    if not source.config.tie_word_embeddings or "lm_head.weight" not in outside:
        return outside
    rest = {n: t for n, t in outside.items() if n != "lm_head.weight"}
    embedding = source.embedding_name()
    return rest if embedding in rest else {embedding: outside["lm_head.weight"], **rest}


def check_tokens(job: Job, windows: Tensor, settings: dict[str, Any]) -> None:
    """Fewer calibration tokens than a Gram's dimension make it singular: an error unless damping is asked for."""
    own = job.method.dampings
    if set(own) & set(settings):
        return
    grams = [t for t in job.taps(job.block_units(0)) if t.kind in ("gram", "moments")]
    need = max((job.shapes[0].width(t.site) for t in grams), default=0)
    if 0 < windows.numel() < need:
        hint = f", or ask for damping (--set {own[0]}=0.01)" if own else ""
        raise InputError(
            f"calibration has {windows.numel()} tokens, fewer than the largest Gram's dimension {need}: "
            f"use at least {need} tokens (--n-samples × --seq-len){hint}"
        )


def check_apart(output: Path, source: Source) -> None:
    """The output must not replace the model that it is made from."""
    if isinstance(source, FolderSource):
        model, place = source.folder.resolve(), output.resolve()
        if place == model or place in model.parents:
            raise InputError(f"output {output} would replace the model {source.folder}; choose another folder")


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


def pick_dtype(source: Source, device: str) -> torch.dtype:
    """What to compute in: the stored dtype on an accelerator, fp32 on a CPU."""
    stored = getattr(source.config, "dtype", None)
    if device == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


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
