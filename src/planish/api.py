"""What `import planish` offers: compress, forecast, load, evaluate; from names and paths to tensors and back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from planish import single_cuts
from planish.calibrate.cache import tokenize
from planish.calibrate.text import fingerprint, load_tokens, sample_windows
from planish.compression import compress as compress_windows
from planish.compression import pick_dtype
from planish.core import Progress
from planish.dry_run import Forecast
from planish.dry_run import forecast as forecast_windows
from planish.errors import InputError
from planish.evaluate import perplexity
from planish.evaluate import tasks as tasks_file
from planish.evaluate.tasks import Score
from planish.export.eora import Blocks, Compensation, compensate
from planish.folder import load as loading
from planish.folder.source import (
    FolderSource,
    Source,
    find_folder,
    load_config,
    load_tokenizer,
    open_shapes,
    open_source,
)
from planish.manifest import Result
from planish.methods import find_method, list_methods
from planish.methods.method import Method
from planish.plan.budgets import check_number, read_asked
from planish.recipe import Recipe, Text
from planish.solvers.offload import offload

N_SAMPLES, SEQ_LEN = 128, 2048  # unless told; fewer where the text or the model has fewer

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip

Sampling = Literal["contiguous", "random"]


@dataclass
class Calibration:
    """Token windows (n, seq) of a SOURCE, and what the manifest records about them."""

    windows: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation(perplexity.Perplexity):
    """Perplexity, and the text it was measured on."""

    source: str
    bos: bool


def compress(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    keep: float | None = None,
    kv_keep: float | None = None,
    flops_keep: float | None = None,
    max_params: int | float | str | None = None,
    max_bytes: int | float | str | None = None,
    max_latency: float | None = None,
    context: int | None = None,
    method: str | Method | None = None,
    calibration: Any = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    round_to: int = 1,
    overwrite: bool = False,
    settings: dict[str, Any] | None = None,
    target: str = "any",
    cache: bool = False,
    progress: Progress | None = None,
) -> Result | nn.Module:
    """Compress a model into the folder `output` and report what was counted; without `output` return the smaller model.

    `model`: folder, hub id, or causal LM in memory (left untouched; give its `tokenizer`, unless the text is token ids).
    Budgets, one or two together (see docs/budgets.md): `keep` (by default 0.8): share of the decoder blocks' linear weights
    that stays; `kv_keep`: of the KV cache's bytes per token (alone it cuts only what the cache holds); `flops_keep`: of the
    blocks' FLOPs per token; `max_params`, `max_bytes`: of the whole model ("1.5B", "800MiB"); `max_latency`: milliseconds per
    decoded token on this machine. `context`: tokens that the last ones count attention over.
    `method`: a name of `planish methods`, by default "auto" where it exists, else "flat-llm"; `settings`: its
    hyper-parameters.
    `calibration`: a SOURCE of `planish.calibrate.text.load_tokens` (name, file, or token ids) from which `n_samples` windows
    (128) of `seq_len` tokens (2048, or as many as the model has positions) are taken: text at random by `seed`, ids
    side by side from the start, unless `sampling` says otherwise.
    `device`: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "mps"; `dtype`: what to compute in.
    `target`: where the result has to run: any, hf, vllm, gguf, onnx (see `planish.plan.targets`).
    `cache`: keep the text's token ids and what calibration found in a folder model on disk ($PLANISH_CACHE), and use them
    for the next budget.
    `round_to`: ranks are multiples of it. `progress(phase, done, total)` is called as blocks are done.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder:
            compress(
                model, tokenizer, keep=keep, kv_keep=kv_keep, flops_keep=flops_keep, max_params=max_params,
                max_bytes=max_bytes, max_latency=max_latency, context=context, method=method, calibration=calibration,
                n_samples=n_samples, seq_len=seq_len, seed=seed, sampling=sampling, output=Path(folder) / "model",
                device=device, dtype=dtype, round_to=round_to, settings=settings, target=target, cache=cache,
                progress=progress,
            )  # fmt: skip
            return load(Path(folder) / "model")
    asked = read_asked(
        keep=keep, kv_keep=kv_keep, flops_keep=flops_keep, max_params=max_params, max_bytes=max_bytes,
        max_latency=max_latency, context=context,
    )  # fmt: skip
    check_round(round_to)
    chosen = find_method(method or default_method(), settings or {})
    place = find_device(device)
    source = open_source(model, tokenizer)
    start = time.perf_counter()
    text = read_calibration(source, tokenizer, calibration, n_samples, seq_len, seed, sampling, cache)
    spent = {"text": time.perf_counter() - start}
    recipe = None
    if isinstance(source, FolderSource) and isinstance(calibration, str | Path):
        recipe = Recipe(
            model=source.name, method=chosen.name, settings=chosen.settings(), **asked.as_dict(),
            calibration=Text(source=str(calibration), **{n: text.record[n] for n in ("n_samples", "seq_len", "seed", "sampling")}),
            device=cast(Literal["cpu", "cuda", "mps"], place.partition(":")[0]),
            dtype=dtype if isinstance(dtype, str) else None, round_to=round_to, target=target,
        )  # fmt: skip
    result = compress_windows(
        source,
        output=output,
        asked=asked,
        method=chosen,
        windows=text.windows,
        calibration=text.record,
        settings=settings,
        device=place,
        dtype=find_dtype(dtype),
        round_to=round_to,
        overwrite=overwrite,
        target=target,
        cache=cache,
        progress=progress,
        files={"recipe.yaml": recipe.text()} if recipe else None,
        spent=spent,
    )
    result.warnings = text.notes + result.warnings
    return result


def forecast(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    keep: float | None = None,
    kv_keep: float | None = None,
    flops_keep: float | None = None,
    max_params: int | float | str | None = None,
    max_bytes: int | float | str | None = None,
    max_latency: float | None = None,
    context: int | None = None,
    method: str | Method | None = None,
    calibration: Any = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    round_to: int = 1,
    settings: dict[str, Any] | None = None,
    target: str = "any",
    cache: bool = False,
    progress: Progress | None = None,
) -> Forecast:
    """What `compress` with the same arguments would give and take; nothing is changed or written.

    The calibration text is read only where the method needs statistics to choose its ranks; elsewhere a config.json alone
    will do for `model`, and "cuda" for `device` on a machine without. `cache`: keep its token ids on disk.
    """
    asked = read_asked(
        keep=keep, kv_keep=kv_keep, flops_keep=flops_keep, max_params=max_params, max_bytes=max_bytes,
        max_latency=max_latency, context=context,
    )  # fmt: skip
    check_round(round_to)
    chosen = find_method(method or default_method(), settings or {})
    place = device if device == "cuda" else find_device(device)  # may be planned for elsewhere
    source = open_shapes(model, tokenizer)
    seq_len, _ = fit_seq_len(source, seq_len)
    notes: list[str] = []

    def read() -> Tensor:
        find_device(device)
        text = read_calibration(source, tokenizer, calibration, n_samples, seq_len, seed, sampling, cache)
        notes.extend(text.notes)
        return text.windows

    with offload(place):
        found = forecast_windows(
            source,
            asked=asked,
            method=chosen,
            read=read,
            size=(n_samples or N_SAMPLES, seq_len),
            device=place,
            dtype=find_dtype(dtype),
            round_to=round_to,
            settings=settings,
            target=target,
            progress=progress,
        )
    found.warnings = notes + found.warnings
    return found


def eora(
    folder: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    rank: int = 32,
    quantiser: str = "round",
    calibration: Any = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compensation:
    """Write a LoRA adapter that gives a dense or compressed folder back what integer weights take; nothing is trained.

    `quantiser`: "torchao" for a model that torchao will quantise, "round" for plain rounding (see `planish.export.eora`).
    Calibration as in `compress`.
    """
    source = Blocks(folder)
    place = find_device(device)
    text = read_calibration(source, load_tokenizer(source.folder), calibration, n_samples, seq_len, seed, sampling)
    return compensate(
        folder, text.windows, output, bits=bits, rank=rank, quantiser=quantiser, device=place,
        dtype=find_dtype(dtype) or pick_dtype(source, place), overwrite=overwrite, progress=progress,
    )  # fmt: skip


def load(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None, **kwargs: Any) -> Any:
    """A causal LM from a dense or compressed folder or a hub id, in its stored dtype unless told."""
    kind = find_dtype(dtype)
    place = find_device(device)
    model = loading.load(folder, **({} if kind is None else {"dtype": kind}), **kwargs)
    return model.to(place)


def evaluate(
    model: str | Path | nn.Module,
    text: Any = "builtin",
    seq_len: int | None = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a folder, hub id or model in memory over a SOURCE (its evaluation split, where it has splits).

    Windows of `seq_len` tokens (2048, or as many as the model has positions) do not overlap, the tail is dropped;
    `max_windows` stops early; `cache` keeps the text's token ids on disk. A model from a folder goes to `device` ("auto"
    unless told) in `dtype` (fp32 on the CPU, the stored one elsewhere); one in memory stays as it is.
    """
    if seq_len is not None:
        check_number(seq_len, "seq-len", whole=True)
        if seq_len < 2:
            raise InputError(f"seq-len must be 2 or more, got {seq_len}: every token is predicted from those before it")
    for name, value in (("batch-size", batch_size), ("max-windows", max_windows)):
        if value is not None:
            check_number(value, name, whole=True)
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise InputError(f"batch size and windows must be 1 or more, got {batch_size} and {max_windows}")
    place, read = None, partial(load_tokens, text, split="evaluation", tokenize=tokenize if cache else None)
    if isinstance(model, nn.Module):
        lm: Any = model
        place = None if device is None else find_device(device)
    else:
        place = find_device(device or "auto")
        folder = find_folder(model)
        config = load_config(folder)  # before the weights: wrong text is found at once
        tokenizer = tokenizer or load_tokenizer(folder)
        found = read(tokenizer, vocab_size=config.vocab_size)
        lm = load(model, device=place, dtype=dtype or ("float32" if place == "cpu" else None))
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
    if isinstance(model, nn.Module):
        found = read(tokenizer, vocab_size=lm.config.get_text_config().vocab_size)
    check_positions(limit)
    seq_len = seq_len or min(SEQ_LEN, limit, max(2, len(found.tokens)))
    tokens = found.tokens if max_windows is None else found.tokens[: max_windows * seq_len]
    measured = perplexity.evaluate(lm, tokens, seq_len, batch_size=batch_size, device=place, progress=progress)
    return Evaluation(**asdict(measured), source=found.source, bos=found.bos)


def measure_effects(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    method: str | Method = "auto",
    settings: dict[str, Any] | None = None,
    calibration: Any = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    held: Any = "builtin",
    keeps: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    share: float = 1.0,
    windows: int = 8,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
) -> list[single_cuts.Effect]:
    """Predicted and measured loss of single cuts, one unit at a time (see `planish.single_cuts.measure_effects`).

    `held`: a SOURCE whose evaluation split is not calibrated on; `windows` of it and of the calibration text are measured.
    """
    place = find_device(device)
    source = open_source(model, tokenizer)
    if tokenizer is None and isinstance(source, FolderSource):
        tokenizer = load_tokenizer(source.folder)
    text = read_calibration(source, tokenizer, calibration, n_samples, seq_len, seed, sampling)
    length = text.windows.shape[1]
    tokens = load_tokens(held, tokenizer, split="evaluation", vocab_size=source.config.vocab_size).tokens
    count = min(windows, len(tokens) // length)
    if count < 1:
        raise InputError(
            f"held-out text has {len(tokens)} tokens, fewer than one window of {length}; use a longer text"
        )
    return single_cuts.measure_effects(
        source, find_method(method, settings or {}), text.windows, tokens[: count * length].view(count, length),
        keeps=keeps, share=share, measured_windows=windows, seed=seed, device=place,
        dtype=find_dtype(dtype) or pick_dtype(source, place),
    )  # fmt: skip


def default_method() -> str:
    return "auto" if "auto" in list_methods() else "flat-llm"


def read_calibration(
    source: Source,
    tokenizer: Any,
    calibration: Any,
    n_samples: int | None,
    seq_len: int | None,
    seed: int,
    sampling: Sampling | None,
    cache: bool = False,
) -> Calibration:
    """Windows of a SOURCE for a model: tokens checked against its vocabulary, lengths against its positions."""
    seq_len, notes = fit_seq_len(source, seq_len)
    if tokenizer is None and isinstance(source, FolderSource):
        tokenizer = load_tokenizer(source.folder)
    text = load_tokens(
        calibration, tokenizer, vocab_size=source.config.vocab_size, tokenize=tokenize if cache else None
    )
    how = sampling or text.sampling
    if n_samples is not None:
        check_number(n_samples, "n-samples", whole=True)
    else:
        held = len(text.tokens) // seq_len if how == "contiguous" else len(text.tokens) - seq_len + 1
        n_samples = min(N_SAMPLES, max(held, 1))
        if n_samples < N_SAMPLES:
            notes.append(f"n_samples {n_samples}: the text holds no more {how} windows of {seq_len} tokens")
    windows = sample_windows(text.tokens, n_samples, seq_len, seed, how)
    record = {
        "source": text.source,
        "n_samples": n_samples,
        "seq_len": seq_len,
        "seed": seed,
        "sampling": how,
        "bos": text.bos,
        "fingerprint": fingerprint(windows),
    }
    return Calibration(windows, record, notes)


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


def check_positions(limit: int) -> None:
    if limit < 2:
        raise InputError(f"the model has max_position_embeddings {limit}: windows of 2 tokens or more do not fit it")


def evaluate_tasks(
    model: str | Path | nn.Module,
    tasks: list[str],
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Zero-shot accuracies on local .jsonl files and lm_eval's tasks (see `planish.evaluate.tasks`)."""
    if not isinstance(model, nn.Module):
        tokenizer = tokenizer or load_tokenizer(find_folder(model))
        place = find_device(device)
        model = load(model, device=place, dtype=dtype or ("float32" if place == "cpu" else None))
    show = None if progress is None else lambda done, total: progress("examples", done, total)
    return tasks_file.evaluate_tasks(model, tokenizer, tasks, limit=limit, progress=show)


def find_device(name: str) -> str:
    """ "auto" is CUDA where there is one, else the CPU; anything else must be present."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present:
        raise InputError(f"unknown device {name!r}; expected auto, cpu, cuda or mps")
    if not present[kind]:
        raise InputError(f"this machine has no {kind} device that torch {torch.__version__} can use; use --device cpu")
    return name


def find_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_round(round_to: int) -> None:
    check_number(round_to, "round-to", whole=True)
    if round_to < 1:
        raise InputError(f"round-to must be 1 or more, got {round_to}")
