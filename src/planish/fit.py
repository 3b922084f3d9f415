"""The best model of a size: cuts and rounding compete, by measured divergence on calibration windows that none of them saw.

    for bits in the target's types:                       (16, 8, 4, 3, 2 and so on)
        all weights, if they fit in these bits            (plain rounding: the finest that fits, always among the plans)
        else the share of the blocks' weights that fits   (the next finer types, cut by the method and then rounded)
    types that differ among matrices, as many bits on average as fit: all weights; a share between the last two plans'
    each made from three quarters of the windows · KL(dense ‖ plan) on the rest · the least one is made from all of them

So the result is never worse, in that measure, than the finest plain rounding of the size or than cutting alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache
from planish.calibrate.stream import Stream
from planish.compression import Calibration, Destination, Shared, compress, pick_dtype
from planish.core import Progress
from planish.errors import InputError, PlanishError
from planish.evaluate.agreement import compare
from planish.evaluation import load
from planish.folder.source import FolderSource, Source
from planish.folder.writer import check_free
from planish.methods.method import Method
from planish.plan.footprint import count_headers, footprint
from planish.quantise import read_asked
from planish.request import LIMITS, Request, label

LEAST = 0.35  # share of the blocks' weights below which no cut is tried
FINER = 2  # so many types finer than the one that holds all weights are tried with cuts
NEARLY = 1.1  # times the size: predicted bytes at which all weights may still fit
HELD = 4  # every fourth window is held out
AGAIN = 4  # times that a cut which came out too large is made smaller
CONTEXT = 4096  # tokens of the cache unless told, or as many as the model has positions
UBATCH = 512  # tokens that llama.cpp runs at a time
PARTS, ENTRY = 3, 112  # tensors of a rounded linear beside one; bytes of a tensor's entry in a header, but for its name
SUFFIX = 8  # bytes that its name is longer, where it is but one
LADDERS = {"gguf": ("16", "8", "6", "5", "4", "3", "2"), "vllm": ("16", "8", "4")}
LADDER = ("16", "8", "4", "3", "2")


@dataclass
class Choice:
    """A plan that was tried: `bits` of the blocks' weights (with a point: a mean of types that differ) and `keep` of them; what
    it came out as, in `bytes`, and how far it is from the dense model on the windows held out: `kl`, nats per token. `error`:
    why it could not be made."""

    bits: str
    keep: float
    bytes: int = 0
    kl: float = inf
    error: str = ""
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_bits(
    request: Request,
    method: Method,
    source: Source,
    text: Calibration,
    place: Destination,
    progress: Progress | None = None,
) -> tuple[Request, list[Choice]]:
    """`request` with `fit`, or with `bits` "auto" and `max_bytes` → the same with the bits and the keep that are best at this
    size; all that were tried. Raises InputError, before any work, where nothing of this size can be reached.

    Plans are written beside the destination, one at a time, and deleted.
    """  # fmt: skip
    size = find_size(request, source)
    if not isinstance(source, FolderSource):
        raise InputError("--bits auto and --fit compare models that are loaded from folders: save this one first")
    check_free(place.output, place.overwrite)
    tried = list_choices(request, source, size)
    if len(tried) == 1:
        tried[0].chosen = True
        return settle(request, tried[0]), tried
    with tempfile.TemporaryDirectory(prefix=f"{place.output.name}.sizes-", dir=place.output.parent) as scratch:
        runner = Runner(request, method, source, text, Path(scratch), progress)
        for n, choice in enumerate(tried):
            runner.measure(choice, size)
            if progress:
                progress("sizes", n + 1, len(tried))
    best = min(tried, key=lambda c: c.kl)
    if not isfinite(best.kl):
        raise InputError(
            f"nothing of {size:,} bytes could be made: " + "; ".join(f"{c.bits} bits: {c.error}" for c in tried)
        )
    best.chosen = True
    return settle(request, best), tried


def find_size(request: Request, source: Source) -> int:
    """Bytes that the written model may have."""
    if request.fit is None and request.max_bytes is None:
        raise InputError("--bits auto chooses among types by a size: give --max-bytes or --fit")
    if request.fit is not None and request.bits not in (None, "auto"):
        raise InputError(f"--fit chooses the bits itself: --bits {request.bits} cannot hold beside it")
    asked = [n for n in LIMITS if getattr(request, n) is not None]
    if beside := [n for n in asked if n != "max_bytes" or request.fit is not None]:
        raise InputError(
            f"the keep follows from the size: --{label(beside[0])} cannot hold beside --fit or --bits auto"
        )
    if request.fit is None:
        return int(request.max_bytes or 0)
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    context = request.context or min(CONTEXT, positions)
    if (left := request.fit - reserve(source, context)) > 0:
        return left
    raise InputError(
        f"--fit {request.fit:,}: the cache of {context} tokens and running take {request.fit - left:,} bytes; a smaller --context"
        " takes less"
    )


def settle(request: Request, choice: Choice) -> Request:
    """The request that makes a plan."""
    bits = None if choice.bits == "16" else choice.bits
    return request.model_copy(update={"bits": bits, "keep": choice.keep, "max_bytes": None, "fit": None})


def list_choices(request: Request, source: Source, size: int) -> list[Choice]:
    """The finest types that hold all weights, and cuts of finer ones, finest first."""
    found: list[Choice] = []
    smallest: list[float] = []
    for bits in LADDERS.get(request.target, LADDER):
        try:
            outside, blocks = predict(request, source, bits)
        except InputError:  # no type of these bits holds the model's widths
            continue
        if outside + blocks <= size:
            finer = list(dict.fromkeys(c.bits for c in found))[-FINER:]
            return mix([c for c in found if c.bits in finer] + [Choice(bits, 1.0)], request, source, size)
        if outside + blocks <= NEARLY * size:  # what is predicted may be a little too much
            found.append(Choice(bits, 1.0))
        smallest.append(outside + LEAST * blocks)
        if (keep := (size - outside) / blocks) >= LEAST:
            found.append(Choice(bits, int(keep * 1e4) / 1e4))
    if not found:
        raise InputError(
            f"--max-bytes {size:,}: the smallest that can be made for --target {request.target} is about {min(smallest):,.0f}"
        )
    return mix(found, request, source, size)


def mix(found: list[Choice], request: Request, source: Source, size: int) -> list[Choice]:
    """Plans, and those whose types differ: of all weights where the last plan leaves room for finer ones, and of a share
    between the last two plans'."""
    last = found[-1]
    if last.bits == "16":
        return found
    outside, blocks = predict(request, source, last.bits)
    weights = sum(out * n for s in map(source.shape, range(source.n_blocks)) for out, n in map(s.linear, s.roles))
    keeps = [1.0] if last.keep == 1 else []
    if len(found) > 1 and found[-2].bits not in ("16", last.bits):
        keeps.append(int(1e4 * (found[-2].keep + last.keep) / 2) / 1e4)
    means = {keep: int(8e3 * (size - outside) / weights / keep) / 1e3 for keep in keeps}
    finer = len(found) > 1 or last.bits != "8"
    return found + [
        Choice(f"{m:.3f}", k) for k, m in means.items() if finer and (k < 1 or m > 1.01 * 8 * blocks / weights)
    ]


def predict(request: Request, source: Source, bits: str) -> tuple[float, float]:
    """Bytes of the written model outside its blocks' linears, and of all these, in so many bits: at least what it is, and
    hardly more."""
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    sizes = {n: count for n, (count, dtype) in source.sizes().items() if dtype.is_floating_point}
    rest = sum(sizes.values()) - sum(s.count() for s in shapes)
    asked = read_asked(settle(request, Choice(bits, 1.0)), source)
    if asked is None:
        itemsize = next(d.itemsize for _, d in source.sizes().values() if d.is_floating_point)
        return itemsize * rest + count_headers(source), float(
            sum(footprint({}, s, itemsize=itemsize).bytes for s in shapes)
        )
    linears = [shape.linear(role) for shape in shapes for role in shape.linears]
    blocks = sum(asked.blocks.pick(n, "").count(out, n) for out, n in linears)
    if asked.blocks.mean is not None:
        blocks = int(asked.blocks.mean * sum(out * n for out, n in linears) / 8)
    outside = 2.0 * rest
    if asked.head is not None:
        hidden, words = shapes[0].hidden, source.config.get_text_config().vocab_size
        heads = [c for n, c in sizes.items() if c == hidden * words]
        outside = 4.0 * (rest - sum(heads)) + len(heads) * asked.head.pick(hidden, "").count(words, hidden)
    named = PARTS * (ENTRY + max(map(len, sizes))) if asked.packed else SUFFIX  # a rounded linear is several tensors
    parts = len(linears) * named
    return outside + count_headers(source) + parts, float(blocks)


class Runner:
    """Makes plans from most of the windows and measures them on the others, beside the dense model."""

    def __init__(
        self,
        request: Request,
        method: Method,
        source: Source,
        text: Calibration,
        folder: Path,
        progress: Progress | None,
    ):
        self.request, self.method, self.source, self.progress = request, method, source, progress
        self.folder = folder / "plan"
        fit, self.held = hold_out(text.windows)
        self.text = Calibration(fit, text.record)
        kind = getattr(torch, request.dtype) if request.dtype else pick_dtype(source, request.device)
        limits = MemoryLimits(folder=folder)
        stream = Stream(source, fit, device=request.device, dtype=kind, limits=limits)
        self.shared = Shared(stream, Cache(memory=limits.limit // 2))
        self.dtype = kind

    def measure(self, choice: Choice, size: int) -> None:
        """Fill in what a plan comes out as; what goes wrong becomes its `error`."""
        try:
            for keep in self.shrink(choice, size):
                choice.keep = keep
                result = compress(
                    settle(self.request, choice), self.method, self.source, self.text, Destination(self.folder, overwrite=True),
                    shared=self.shared, progress=self.progress,
                )  # fmt: skip
                choice.bytes = result.bytes_after
            if choice.bytes > size:
                raise InputError(f"comes out at {choice.bytes:,} bytes")
            with torch.no_grad():
                small, dense = (self.load(place) for place in (self.folder, self.source.name))
                choice.kl = compare(small, dense, self.held.flatten(), self.held.shape[1]).kl
        except PlanishError as error:
            choice.error, choice.kl = str(error), inf

    def shrink(self, choice: Choice, size: int) -> Iterator[float]:
        """Its keep, and smaller ones, or fewer bits on average, as long as what comes out is too large and either is free."""
        keep = choice.keep
        for _ in range(AGAIN):
            yield keep
            if choice.bytes <= size or (keep >= 1 and "." not in choice.bits):
                return
            if "." in choice.bits:
                choice.bits = f"{float(choice.bits) * (1 - 1.1 * (choice.bytes / size - 1)):.3f}"
                continue
            keep = int(1e4 * keep * (1 - 1.1 * (choice.bytes / size - 1))) / 1e4

    def load(self, place: Path | str) -> Any:
        return load(place, device=self.request.device, dtype=self.dtype)


def hold_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (n, seq) to make plans from, and those to compare them on. Raises InputError where there are too few."""
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[HELD - 1 :: HELD] = True
    if not held.any():
        raise InputError(
            f"--bits auto holds out every fourth calibration window: give {HELD} or more, got {len(windows)}"
        )
    return windows[~held], windows[held]


def reserve(source: Source, context: int) -> int:
    """Bytes that running the model takes beside its weights: a 16-bit KV cache of `context` tokens, and for one batch of llama.cpp
    the widest activations and one token's logits."""
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    cache = 2 * context * sum(footprint({}, s).cache for s in shapes)
    widest = max(2 * s.intermediate + 4 * s.hidden for s in shapes)
    return cache + 4 * (UBATCH * widest + source.config.get_text_config().vocab_size)
