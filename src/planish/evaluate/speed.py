"""Tokens per second and memory of models in one process, measured in turns."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from planish.compression import peak_rss
from planish.errors import InputError
from planish.folder.load import make_cache


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeats of one measurement."""

    median: float
    low: float  # smallest
    high: float  # largest
    values: tuple[float, ...]  # in the order measured: the i-th values of two models lie next to each other in time


@dataclasses.dataclass(frozen=True)
class Speed:
    """One model at one batch size. Rates count the tokens of the whole batch."""

    model: str
    batch_size: int
    prompt_len: int
    new_tokens: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    time_to_first_token_s: Spread
    prefill_cpu_s: Spread  # seconds of all processors in this process: what other processes do hardly disturbs them
    decode_cpu_s: Spread
    weight_bytes: int  # parameters and buffers
    kv_bytes: int  # storage that the cache holds after the last token
    peak_bytes: int  # weight_bytes and what the process grew by while running: resident memory (cpu), allocated (cuda)
    device: str
    dtype: str
    compiled: bool
    compile_s: float | None = None  # seconds until the first decoded token was there, without prefill
    note: str = ""  # why it was not compiled, where that was asked for


@torch.no_grad()
def bench(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_len: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    device: torch.device | str | None = None,
    compile: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Measure models in turns (A B A B …), so that a machine that slows down slows all of them.

    One run is: the model reads (batch, prompt_len) random ids into an empty cache and chooses the first token (prefill;
    its duration is the time to first token), then new_tokens single-token forward passes, greedy, with that cache
    (decode). A loop over ``model(...)``, not ``generate()``. For every batch size each model first runs twice
    unmeasured: once to warm up (and to compile), once for its memory.

    ``compile``: as ``generate()`` does it, decode steps are one graph by torch.compile over a cache of fixed size, and prefill
    is run as it is. What cannot be compiled (no compiler, a cache that has to grow) is measured as it is, and ``note`` says why.
    ``device``: models are moved there first; None: they stay where they are. ``progress(done, total)`` counts runs.
    """
    check_lengths(models, batch_sizes, prompt_len, new_tokens, repeats)
    for model in models.values() if device is not None else ():
        model.to(device)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (max(batch_sizes), prompt_len), generator=torch.Generator().manual_seed(seed))
    total, count = len(batch_sizes) * len(models) * (repeats + 2), itertools.count()

    def ran() -> None:
        if progress is not None:
            progress(next(count), total)

    ran()
    results = []
    # models share their classes' code, and graphs are counted by it
    with (
        evaluating(models.values()),
        torch._dynamo.config.patch(recompile_limit=2 * total, fail_on_recompile_limit_hit=True),
    ):
        calls = {name: Runner(model, compile) for name, model in models.items()}
        for batch_size in batch_sizes:
            prompts = {name: ids[:batch_size].to(_device(model)) for name, model in models.items()}
            runs = measure_in_turns(calls, prompts, new_tokens, repeats, ran)
            results += [summarise(n, calls[n], prompts[n], new_tokens, runs[n]) for n in models]
    return results


def check_lengths(
    models: Mapping[str, nn.Module], batch_sizes: Sequence[int], prompt_len: int, new_tokens: int, repeats: int
) -> None:
    """Every number is at least 1 and every model has the positions for it, or InputError."""
    if not models:
        raise InputError("no model to measure · expected at least one")
    numbers = [("prompt_len", prompt_len), ("new_tokens", new_tokens), ("repeats", repeats)]
    numbers += [("batch_sizes", b) for b in batch_sizes] or [("number of batch_sizes", 0)]
    for name, value in numbers:
        if value < 1:
            raise InputError(f"cannot measure speed · got {name} {value} · expected 1 or more")
    for name, model in models.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and prompt_len + new_tokens > positions:
            raise InputError(
                f"prompt and new tokens exceed the model's context · {name} · got {prompt_len} + {new_tokens} · "
                f"expected at most max_position_embeddings {positions} · use a shorter prompt or fewer new tokens"
            )


@contextlib.contextmanager
def evaluating(models: Collection[nn.Module]) -> Iterator[None]:
    """The models in evaluation mode; those that were in training mode are so again afterwards."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


class Runner:
    """A model as it runs at one batch size: as it is, or with compiled decode steps. `note`: why not, where that was asked for."""

    def __init__(self, model: nn.Module, compiled: bool):
        self.model, self.step, self.compiled = model, model, False
        self.asked, self.note = compiled, ""
        self.compile_s: float | None = None

    def prepare(self, prompt: Tensor, new_tokens: int) -> None:
        """The first run."""
        self.step, self.compiled, self.compile_s, self.note = self.model, self.asked, None, ""
        if self.asked:
            self.step = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
            try:
                self.compile_s = self.run(prompt, new_tokens).decode_s
                return
            except Exception as error:  # whatever is missing
                self.step, self.compiled = self.model, False
                self.note = str(error).strip().partition("\n")[0] or type(error).__name__
        self.run(prompt, new_tokens)

    def run(self, prompt: Tensor, new_tokens: int) -> Run:
        """Prefill of a prompt (batch, tokens) and new_tokens steps; the cache has as many positions afterwards."""
        cache = make_cache(self.model, prompt.shape[1] + new_tokens) if self.compiled else None  # type: ignore[arg-type]
        start = _now(prompt.device)
        out = self.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = _now(prompt.device)
        for _ in range(new_tokens):
            out = self.step(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        end = _now(prompt.device)
        return Run(first[0] - start[0], first[1] - start[1], end[0] - first[0], end[1] - first[1], out.past_key_values)


@dataclasses.dataclass(frozen=True)
class Run:
    """Seconds of one run, of the clock and of this process's processors, and its cache."""

    prefill_s: float
    prefill_cpu_s: float
    decode_s: float
    decode_cpu_s: float
    cache: Any


@dataclasses.dataclass
class Runs:
    """One model at one batch size, as measured: bytes that a run adds at its peak, bytes of its cache, the runs."""

    grown: int
    kv_bytes: int
    runs: list[Run] = dataclasses.field(default_factory=list)


def measure_in_turns(
    calls: Mapping[str, Runner],
    prompts: Mapping[str, Tensor],
    new_tokens: int,
    repeats: int,
    ran: Callable[[], None],
) -> dict[str, Runs]:
    """Each model's two unmeasured runs, then `repeats` rounds of one run each; `ran` is called after every run."""
    found = {}
    for name, call in calls.items():
        call.prepare(prompts[name], new_tokens)
        ran()
        found[name] = Runs(*_memory(call, prompts[name], new_tokens))
        ran()
    for _ in range(repeats):
        for name, call in calls.items():
            run = call.run(prompts[name], new_tokens)
            found[name].runs.append(dataclasses.replace(run, cache=None))
            del run  # and its cache, before the next model's
            ran()
    return found


def summarise(name: str, call: Runner, prompt: Tensor, new_tokens: int, found: Runs) -> Speed:
    """Rates and bytes of one model's runs on a prompt (batch, prompt_len)."""
    batch_size, prompt_len = prompt.shape
    weights = _weight_bytes(call.model)
    return Speed(
        model=name,
        batch_size=batch_size,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        prefill_tokens_per_s=_spread(batch_size * prompt_len / r.prefill_s for r in found.runs),
        decode_tokens_per_s=_spread(batch_size * new_tokens / r.decode_s for r in found.runs),
        time_to_first_token_s=_spread(r.prefill_s for r in found.runs),
        prefill_cpu_s=_spread(r.prefill_cpu_s for r in found.runs),
        decode_cpu_s=_spread(r.decode_cpu_s for r in found.runs),
        weight_bytes=weights,
        kv_bytes=found.kv_bytes,
        peak_bytes=weights + found.grown,
        device=str(_device(call.model)),
        dtype=str(next(p for p in call.model.parameters() if p.is_floating_point()).dtype)[6:],
        compiled=call.compiled,
        compile_s=call.compile_s,
        note=call.note,
    )


def kv_bytes(cache: Any) -> int:
    """Bytes of storage that a Hugging Face cache holds; storage shared by several tensors counts once."""
    layers = getattr(cache, "layers", None)
    tensors = [t for layer in (layers if layers is not None else [cache]) for t in _tensors(vars(layer))]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _memory(call: Runner, prompt: Tensor, new_tokens: int) -> tuple[int, int]:
    """Bytes that one run adds at its peak, and bytes of the cache it leaves."""
    gc.collect()
    if prompt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(prompt.device)
        before = torch.cuda.memory_allocated(prompt.device)
        cache = call.run(prompt, new_tokens).cache
        return torch.cuda.max_memory_allocated(prompt.device) - before, kv_bytes(cache)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory of earlier runs hides this one's
    before = _forget_peak()
    cache = call.run(prompt, new_tokens).cache
    return max(0, peak_rss() - before), kv_bytes(cache)


def _forget_peak() -> int:
    """Resident bytes now; on Linux, later peaks count from here. Elsewhere the peak is the process's own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


def _weight_bytes(model: nn.Module) -> int:
    storages = (t.untyped_storage() for t in [*model.parameters(), *model.buffers()])
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


def _spread(values: Any) -> Spread:
    values = tuple(values)
    return Spread(statistics.median(values), min(values), max(values), values)


def _now(device: torch.device) -> tuple[float, float]:
    """Of the clock, and of this process's processors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device
