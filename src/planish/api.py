"""What `import planish` offers: compress, forecast, load, evaluate; from names and paths to tensors and back."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import lanes
from planish.calibrate.cache import tokenize
from planish.calibrate.encode import has_template
from planish.calibrate.stream import Stream
from planish.calibrate.text import (
    count_spare,
    cut_windows,
    eval_windows,
    fingerprint,
    interleave,
    list_priced,
    list_windows,
    load_tokens,
    sample_starts,
    share_out,
    spare_windows,
)
from planish.checking import check_place
from planish.compression import Calibration, Destination, Shared, pick_dtype
from planish.compression import compress as run
from planish.core import Progress
from planish.declare import check_number
from planish.dry_run import Forecast
from planish.dry_run import forecast as forecast_windows
from planish.dry_run.seconds import Phase
from planish.dry_run.windows import Chosen, choose_windows, foretell
from planish.errors import InputError
from planish.evaluate import single_cuts
from planish.evaluate.evaluation import (
    DTYPES,
    SEQ_LEN,
    answer_both,
    check_positions,
    compare,
    evaluate,
    evaluate_tasks,
    find_device,
    find_dtype,
    load,
)
from planish.evaluate.own_answers import SILENT, ask
from planish.export.eora import Compensation, compensate, open_linears
from planish.folder.owner import owning
from planish.folder.source import FolderSource, Source, open_shapes, open_source
from planish.folder.tokenizer import load_tokenizer
from planish.manifest import Result
from planish.methods import find_method, list_methods
from planish.methods.method import Method, list_settings
from planish.mixture import join_mixture, split_mixture
from planish.request import (
    LIMITS,
    RECIPE,
    TEXT,
    UNPRICED,
    Request,
    Text,
    label,
    name_beside,
    takes,
)
from planish.rounding.types import DENSE_NAMES
from planish.sizes.fit import find_size
from planish.sizes.foresee import SizeForecast, count_rounded_bytes, foresee_size
from planish.sizes.ladder import choose_bits, choose_size, climb_beside, leaves_open, make_smaller, refuse_types
from planish.sizes.trials import AGAIN, Choice, Contest
from planish.solvers.offload import offload

__all__ = [
    "answer_both", "ask", "compare", "compress", "eora", "evaluate", "evaluate_tasks", "forecast", "load", "measure_effects",
]  # fmt: skip
Begin = Callable[[Sequence[Phase], Mapping[str, float], Sequence[str]], None]  # phases; halving them → seconds; notes
TEXT_AND_DEVICE = ("calibration", *TEXT, "device", "dtype")  # options of what only measures
N_SAMPLES = 128  # unless told; fewer where the text has fewer


@torch.inference_mode(mode=False)  # some methods differentiate
@takes()
@owning
def compress(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path | None = None,
    sparsity: float | None = None,
    overwrite: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
    begin: Begin | None = None,
    **options: Any,
) -> Result | nn.Module:
    """Compress a model into the folder `output` and report what was counted; without `output` return the smaller model.

    `model`: folder, hub id, or causal LM in memory (left untouched; give its `tokenizer`, unless the text is token ids).
    Budgets, one or two together (see docs/budgets.md), by default keep 0.8. `max_params`, `max_bytes`: numbers or texts
    ("1.5B", "800MiB"). `sparsity`: instead of a budget, for methods that remove submodules, the share of each kind that goes.
    `method`: a name, or a method; by default "auto"; `settings`: its hyper-parameters by name.
    `calibration`: a SOURCE of `planish.calibrate.text.load_tokens` (name, file, or token ids) from which `n_samples` windows of
    `seq_len` tokens are taken: text at random by `seed`, ids side by side from the start, unless `sampling` says otherwise.
    `bits` "auto" with `max_bytes`, or `fit` (the size with the KV cache and what running takes): cuts and rounding compete, as they
    do under `max_bytes` alone where `target` is gguf, hf or vllm; `bits` 16 rounds nothing.
    Where neither number is given and a CPU would need more than half an hour, fewer tokens are taken, and a warning says why.
    `cache`: keep the text's token ids and what calibration found in a folder model on disk ($PLANISH_CACHE), and use them
    for the next budget. `progress(phase, done, total)` is called as a phase begins (0) and as blocks are done;
    `begin(phases, shorter, notes)` before, with the predicted seconds of every phase (`planish.dry_run.seconds.Phase`), what would
    halve their sum (both empty where the run is small), and those of the warnings that are known by then.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder:
            inside = Path(folder) / "model"
            compress(
                model, tokenizer, output=inside, sparsity=sparsity, cache=cache, progress=progress, begin=begin, **options,
            )  # fmt: skip
            return load(inside)
    began = time.perf_counter()
    request, method = read_options(options, sparsity)
    source = open_source(model, tokenizer, request.adapter)
    check_place(Path(output), overwrite, source)
    lanes.start(request.device)
    chosen = fit_windows(request, method, source)
    text = read_calibration(source, tokenizer, request.calibration, options.get("calibration"), cache, chosen)
    request, open_bits = choose_bits(request, source, text)
    files = {}
    if isinstance(source, FolderSource) and isinstance(options.get("calibration", ""), str | Path):
        files["recipe.yaml"] = write_recipe(request, method, source, text, Path(output))
    place = Destination(Path(output), overwrite, files)
    contest = Contest(request, method, source, text, place, progress, cache)
    request, choices, beside = choose_size(contest)
    if begin is not None and lanes.is_first():
        begin(*foretell(request, method, source, (*text.windows.shape,), chosen.outlook), text.notes)
    request, result = make(contest, request, place, choices, cache)
    result.warnings = text.notes + open_bits + result.warnings
    result.choices = [c.as_dict() for c in choices]
    beside = beside or climb_beside(replace(contest, request=request))
    result.ladder = beside.write(Path(output)) if beside else {}
    if choices or beside:
        total = time.perf_counter() - began
        result.seconds |= {"sizes": total - result.seconds["total"], "total": total}
    return result


def make(
    contest: Contest, request: Request, place: Destination, choices: Sequence[Choice], cache: bool
) -> tuple[Request, Result]:
    """What is asked for; where a plan that was chosen comes out too large of all windows, again and smaller."""
    for _ in range(AGAIN):
        files = place.files | (
            {"choices.json": json.dumps([c.as_dict() for c in choices], indent=2) + "\n"} if choices else {}
        )
        result = run(
            request, contest.method, contest.source, contest.text, replace(place, files=files),
            shared=Shared(cache=cache), progress=contest.progress,
        )  # fmt: skip
        if not choices or (smaller := make_smaller(contest, choices, result)) is None:
            break
        request, place = smaller, replace(place, overwrite=True)
    return request, result


def read_options(
    options: Mapping[str, Any], sparsity: float | None = None, device: Callable[[str], str] | None = None
) -> tuple[Request, Method]:
    """A request, its device and dtype as torch names them, and the method with its settings, `sparsity` among them."""
    method, settings = options.get("method"), options.get("settings") or {}
    beside = [label(n) for n in LIMITS if options.get(n) is not None]
    if sparsity is not None and beside:
        raise InputError(f"sparsity says how much goes, {beside[0]} cannot hold beside it: give one of them")
    settings = settings if sparsity is None else {**settings, "sparsity": sparsity}
    named = {n: v for n, v in options.items() if n not in ("method", "settings")}
    request = Request.ask(model="", **named)
    chosen = find_method(method or default_method(), settings)
    place = (device or find_device)(request.device)
    dtype = find_dtype(options.get("dtype"))
    changes = {
        "method": chosen.name, "settings": settings, "device": place, "dtype": dtype and str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return request.model_copy(update=changes), chosen


def write_recipe(request: Request, method: Method, source: FolderSource, text: Calibration, output: Path) -> str:
    """recipe.yaml: the request with every default filled in, and files named as from the output folder."""
    filled = {
        "model": source.name, **request.given, "settings": list_settings(method), "device": request.device.partition(":")[0],
        "calibration": request.calibration.model_dump() | {n: text.record[n] for n in TEXT},
        "dtype": request.dtype if request.dtype in DTYPES else None,
    }  # fmt: skip
    return Request(**({n: getattr(request, n) for n in RECIPE} | filled)).moved(partial(name_beside, output)).text()


@torch.inference_mode(mode=False)  # some methods differentiate
@takes()
def forecast(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    sparsity: float | None = None,
    measure: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Forecast | SizeForecast:
    """What `compress` with the same arguments would give and take; no model is changed or written.

    With `fit`, or `max_bytes` and `bits` "auto" or left open for a target that rounds: the plans that would compete for the size.

    From shapes alone, so that a config.json will do for `model`, and "cuda" for `device` on a machine without: where the method
    chooses its ranks by statistics, these and what follows from them are what is expected (`Forecast.measured` is False).
    `measure`: find them as `compress` would, on the calibration text. `cache`: keep its token ids on disk, and what was
    measured, for further plans and for `compress`; `seconds` are then those of what is left to do.
    """
    request, method = read_options(options, sparsity, lambda name: name if name == "cuda" else find_device(name))
    source = open_shapes(model, tokenizer, request.adapter)
    free = leaves_open(request)
    why = refuse_types(request, source) if free else ""
    if not why and (free or request.bits == "auto" or (request.fit is not None and request.bits not in DENSE_NAMES)):
        return foresee_size(request, source, method, fit_windows(request, method, source).size)
    if request.fit is not None:
        request = request.model_copy(update={"max_bytes": find_size(request, source), "fit": None})
    chosen = fit_windows(request, method, source)
    notes = [chosen.why] if chosen.why else []
    if why:
        notes.append(f"nothing would be rounded to reach the size: {why}")

    def read() -> Tensor:
        find_device(request.device)
        text = read_calibration(source, tokenizer, request.calibration, options.get("calibration"), cache, chosen)
        notes.extend(text.notes)
        return text.windows

    known, outlook = None, chosen.outlook
    if outlook and not measure and outlook.serves(request):
        known = outlook.run(chosen.size), outlook.costs
    with offload(request.device):
        found = forecast_windows(
            request, method, source, chosen.size, read if measure else None, progress, known, cache
        )
    if request.bits not in (None, *DENSE_NAMES):
        found.bytes_after, found.rounding = count_rounded_bytes(request, source, found.keep)
        found.disk_bytes += found.bytes_after  # beside what was cut, until it is complete
    found.warnings = [*dict.fromkeys(notes), *found.warnings]
    return found


@takes("calibration", *UNPRICED, "device", "dtype")
@owning
def eora(
    folder: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    rank: int = 32,
    quantiser: str = "round",
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Compensation:
    """Write a LoRA adapter that gives a dense or compressed folder back what integer weights take; nothing is trained.

    `quantiser`: "torchao" for a model that torchao will quantise, "round" for plain rounding (see `planish.export.eora`).
    Calibration as in `compress`.
    """
    request = Request.ask(model="", **options)
    source = open_linears(folder)
    place = find_device(request.device)
    text = read_calibration(source, load_tokenizer(source.folder), request.calibration, options.get("calibration"))
    return compensate(
        source, text.windows, output, bits=bits, rank=rank, quantiser=quantiser, device=place,
        dtype=find_dtype(options.get("dtype")) or pick_dtype(source, place), overwrite=overwrite, progress=progress,
    )  # fmt: skip


@torch.inference_mode(mode=False)  # some methods differentiate
@takes("method", "settings", *TEXT_AND_DEVICE)
def measure_effects(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    held: Any = "builtin",
    keeps: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    share: float = 1.0,
    windows: int = 8,
    **options: Any,
) -> list[single_cuts.Effect]:
    """Predicted and measured loss of single cuts, one unit at a time (see `planish.evaluate.single_cuts.measure_effects`).

    `held`: a SOURCE whose evaluation split is not calibrated on; `windows` of it and of the calibration text are measured.
    """
    request, method = read_options({"method": "auto"} | options)
    source = open_source(model, tokenizer)
    if tokenizer is None and isinstance(source, FolderSource):
        tokenizer = load_tokenizer(source.folder)
    text = read_calibration(source, tokenizer, request.calibration, options.get("calibration"))
    length = text.windows.shape[1]
    other = load_tokens(
        held, tokenizer, split="evaluation", vocab_size=source.config.vocab_size, bos=request.calibration.bos
    )
    if len(other.tokens) < length:
        raise InputError(
            f"held-out text has {len(other.tokens)} tokens, fewer than one window of {length}; use a longer text"
        )
    dtype = find_dtype(options.get("dtype")) or pick_dtype(source, request.device)
    return single_cuts.measure_effects(
        Stream(source, text.windows, device=request.device, dtype=dtype), method,
        eval_windows(other.tokens, length, other.begin)[:windows],
        keeps=keeps, share=share, measured_windows=windows, seed=request.calibration.seed,
    )  # fmt: skip


def default_method() -> str:
    return "auto" if "auto" in list_methods() else "flat-llm"


def fit_windows(request: Request, method: Method, source: Source) -> Chosen:
    """The calibration windows that are asked for; where none are, the default ones, or such that fit the machine: of several
    processes the first one chooses."""
    asked = request.calibration
    size = asked.n_samples or N_SAMPLES, fit_seq_len(source, asked.seq_len)[0]
    if asked.n_samples or asked.seq_len:
        return Chosen(size)
    chosen = choose_windows(request, method, source, size) if lanes.rank() == 0 else Chosen(size)
    return chosen if lanes.count() == 1 else lanes.share(chosen._replace(outlook=None))


def read_calibration(
    source: Source, tokenizer: Any, asked: Text, ids: Any = None, cache: bool = False, chosen: Chosen | None = None
) -> Calibration:
    """Windows of a SOURCE, of several with weights, or of `ids` (a SOURCE in memory) for a model: tokens checked against its
    vocabulary, lengths against its positions. `chosen`: other windows than the default ones, where none are asked for. And
    spare ones, if the text holds any that share no token with these."""
    start = time.perf_counter()
    most, length, why = (*chosen.size, chosen.why) if chosen and chosen.why else (N_SAMPLES, asked.seq_len, "")
    seq_len, notes = fit_seq_len(source, length)
    notes += [why] if why else []
    if tokenizer is None and source.folder is not None:
        tokenizer = load_tokenizer(source.folder)
    read = partial(load_tokens, tokenizer=tokenizer, vocab_size=source.config.vocab_size, bos=asked.bos,
                   tokenize=tokenize if cache else None, objective=asked.objective)  # fmt: skip
    parts = split_mixture(str(ids if isinstance(ids, str | Path) else asked.source))
    counts: list[int | None] = [asked.n_samples]
    if len(parts) > 1:
        counts = [*share_out([*parts.values()], asked.n_samples or most)]
    windows, spare, record = list[Tensor](), list[Tensor](), dict[str, Any]()
    silent = has_template(tokenizer)  # a chat model, and nobody speaks
    for name, count in zip(parts, counts, strict=True):
        text = read(name if ids is None or isinstance(ids, str | Path) else ids)
        how, silent = asked.sampling or text.sampling, silent and not (text.turns or text.is_ids)
        if count is None:
            held = len(text.tokens) // seq_len if how == "contiguous" else len(text.tokens) - seq_len + 1
            count = min(most, max(min(held, len(list_windows(text.tokens, seq_len, how, text.begin))), 1))
            if count < most:
                notes.append(f"n_samples {count}: the text holds no more {how} windows of {seq_len} tokens")
        starts = sample_starts(text.tokens, count, seq_len, asked.seed, how, text.begin)
        windows.append(cut_windows(text.tokens, starts, seq_len, text.begin))
        few = count_spare(count, seq_len, len(parts))
        spare.append(spare_windows(text.tokens, starts, few, seq_len, text.begin))
        record = {"source": text.source, "sampling": how, "begins": text.policy}
    mixed = interleave(windows)
    notes += [SILENT] if silent else []
    if len(parts) > 1:
        record["source"] = join_mixture(parts)
    record |= {
        "n_samples": len(mixed),
        "seq_len": seq_len,
        "seed": asked.seed,
        "bos": asked.bos,
        "objective": asked.objective,
        "fingerprint": fingerprint(mixed),
    }
    record |= {"chosen": why} if why else {}
    if asked.objective == "answers":
        record["priced"] = round(float(list_priced(mixed).double().mean()), 4)
    return Calibration(mixed, record, notes, time.perf_counter() - start, torch.cat(spare))


def fit_seq_len(source: Source, seq_len: int | None) -> tuple[int, list[str]]:
    """The window length, by default as long as the model's positions allow, and a note where that is shorter."""
    limit = getattr(source.config, "max_position_embeddings", None) or SEQ_LEN
    check_positions(limit)
    if seq_len is not None:
        check_number(seq_len, "seq-len", whole=True)
        if seq_len > limit:
            raise InputError(f"--seq-len {seq_len} is longer than the model's {limit} positions; use --seq-len {limit}")
        return seq_len, []
    notes = [f"seq_len {limit}: the model has no more positions"] if limit < SEQ_LEN else []
    return min(SEQ_LEN, limit), notes
