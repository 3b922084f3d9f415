"""What a model does: perplexity, agreement with the dense model, tasks and answers; from names and paths to tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.calibrate.cache import tokenize
from planish.calibrate.text import Text, load_tokens, thin
from planish.core import Progress
from planish.declare import check_number
from planish.errors import InputError
from planish.evaluate import agreement, perplexity
from planish.evaluate import tasks as tasks_file
from planish.evaluate.tasks import Score
from planish.folder import load as loading
from planish.folder.config import load_config
from planish.folder.hub import find_folder
from planish.folder.tokenizer import load_tokenizer
from planish.request import Bos

SEQ_LEN = 2048  # by default; fewer where the model has fewer positions

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation(perplexity.Perplexity):
    """Perplexity, and the text it was measured on."""

    source: str
    bos: bool  # the text, or every window of it, begins with the beginning-of-sequence token
    begins: str  # which windows do: every, once (at most the first), never
    thinned: bool  # no text was asked for: these are windows of `builtin`, evenly spaced


def evaluate(
    model: str | Path | nn.Module,
    text: Any = None,
    seq_len: int | None = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    bos: Bos = "auto",
    cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a folder, hub id or model in memory over a SOURCE (its evaluation split, where it has splits); without
    one over 32,768 tokens of `builtin`, in windows that are evenly spaced.

    Windows of `seq_len` tokens (2048, or as many as the model has positions) do not overlap, the tail is dropped;
    `bos`: where the beginning-of-sequence token stands (see `planish.calibrate.text.load_tokens`; the papers' protocol is
    "once"). `max_windows` stops early; `cache` keeps the text's token ids on disk. A model from a folder goes to `device` ("auto"
    by default) in `dtype` (fp32 on the CPU, the stored one elsewhere); one in memory stays as it is.
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
    place, read = None, partial(read_text, text, cache=cache, bos=bos)
    if isinstance(model, nn.Module):
        lm: Any = model
        place = None if device is None else find_device(device)
    else:
        place = find_device(device or "auto")
        folder = find_folder(model, weights=False)
        config = load_config(folder)  # before the weights: wrong text is found at once
        tokenizer = tokenizer or load_tokenizer(folder)
        found = read(tokenizer, vocab_size=config.get_text_config().vocab_size)
        lm = load_to_measure(model, device, dtype)
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or SEQ_LEN
    if isinstance(model, nn.Module):
        found = read(tokenizer, vocab_size=lm.config.get_text_config().vocab_size)
    check_positions(limit)
    seq_len = seq_len or min(SEQ_LEN, limit, max(2, len(found.tokens)))
    few = text is None and max_windows is None
    tokens = thin(found.tokens, seq_len, found.begin) if few else found.tokens
    measured = perplexity.evaluate(
        lm, tokens, seq_len, begin=found.begin, max_windows=max_windows, batch_size=batch_size, device=place,
        progress=progress,
    )  # fmt: skip
    thinned = len(tokens) < len(found.tokens)
    return Evaluation(**asdict(measured), source=found.source, bos=found.bos, begins=found.policy, thinned=thinned)


def read_text(
    text: Any, tokenizer: Any, vocab_size: int | None = None, *, cache: bool = False, bos: Bos = "auto"
) -> Text:
    """What is measured on."""
    source = "builtin" if text is None else text
    return load_tokens(
        source, tokenizer, split="evaluation", vocab_size=vocab_size, tokenize=tokenize if cache else None, bos=bos
    )


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one on the same text."""

    model: Evaluation
    dense: Evaluation
    agreement: agreement.Agreement


def compare(
    model: str | Path | nn.Module,
    dense: str | Path | nn.Module,
    text: Any = None,
    seq_len: int | None = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Perplexity of a model and of the dense one, and how far their predictions agree (see `planish.evaluate.agreement`).

    Both are in memory at once. Arguments as in `evaluate`; the text is split by the first model's tokenizer.
    """
    tokenizer = tokenizer or (
        None if isinstance(model, nn.Module) else load_tokenizer(find_folder(model, weights=False))
    )
    lm, other = (m if isinstance(m, nn.Module) else load_to_measure(m, device, dtype) for m in (model, dense))

    def watch(phase: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(phase, done, total)

    found = evaluate(lm, text, seq_len, tokenizer=tokenizer, progress=watch("windows"), **options)
    beside = evaluate(other, text, found.seq_len, tokenizer=tokenizer, progress=watch("dense model"), **options)
    held = read_text(text, tokenizer, cache=options.get("cache", False), bos=options.get("bos", "auto"))
    tokens = thin(held.tokens, found.seq_len, held.begin) if found.thinned else held.tokens
    agreed = agreement.compare(
        lm, other, tokens, found.seq_len, begin=held.begin, max_windows=options.get("max_windows"),
        progress=watch("agreement"),
    )  # fmt: skip
    return Comparison(found, beside, agreed)


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
        tokenizer = tokenizer or load_tokenizer(find_folder(model, weights=False))
        model = load_to_measure(model, device, dtype)
    show = None if progress is None else lambda done, total: progress("examples", done, total)
    return tasks_file.evaluate_tasks(model, tokenizer, tasks, limit=limit, progress=show)


def answer_both(
    model: str | Path | nn.Module,
    dense: str | Path | nn.Module,
    prompts: str | Path | Sequence[str],
    tokenizer: Any = None,
    *,
    new_tokens: int = 64,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> list[agreement.Answer]:
    """What both models write greedily to prompts (texts, or a .txt or .jsonl file of them), side by side."""
    asked = agreement.read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else [*prompts]
    tokenizer = tokenizer or (
        None if isinstance(model, nn.Module) else load_tokenizer(find_folder(model, weights=False))
    )
    if tokenizer is None:
        raise InputError("answers need a tokenizer, and the model has none beside it")
    lm, other = (m if isinstance(m, nn.Module) else load_to_measure(m, device, dtype) for m in (model, dense))
    return agreement.answer_both(lm, other, tokenizer, asked, new_tokens)


def load(folder: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None, **kwargs: Any) -> Any:
    """A causal LM from a dense or compressed folder or a hub id, by default in its stored dtype.

    Further keywords go to transformers' `from_pretrained`; with `device_map` it decides where the model lies, not `device`.
    """
    kind = dtype if dtype == "auto" else find_dtype(dtype)
    place = find_device(device)
    model = loading.load(folder, **({} if kind is None else {"dtype": kind}), **kwargs)
    return model if kwargs.get("device_map") is not None else model.to(place)


def load_to_measure(folder: str | Path, device: str | None, dtype: str | torch.dtype | None) -> nn.Module:
    """A model on a device (by default "auto"), by default in fp32 on the CPU and in the stored dtype elsewhere."""
    place = find_device(device or "auto")
    return load(folder, device=place, dtype=dtype or ("float32" if place == "cpu" else None))


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
    if name == "auto":  # as stored, as transformers says it
        return None
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_positions(limit: int) -> None:
    if limit < 2:
        raise InputError(f"the model has max_position_embeddings {limit}: windows of 2 tokens or more do not fit it")
