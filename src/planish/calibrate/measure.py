"""Measuring a model on its calibration text, block by block, with what is remembered from earlier passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, fetch
from planish.calibrate.cache import Cache
from planish.calibrate.collect import collect, measure_block
from planish.calibrate.losses import Probe, output_gradients
from planish.calibrate.store import Store
from planish.calibrate.stream import Awaited, Hidden, Stream
from planish.calibrate.taps import Values, tap_sites
from planish.core import Edit, Progress, Shape
from planish.folder.source import Source
from planish.stats import Stats, Tap

Taps = Callable[[Shape], list[Tap]]  # what to measure in a block
Edits = Mapping[int, Sequence[Edit]]  # per block
Measured = Iterator[tuple[int, nn.Module, Stats]]


class Measurements:
    """What can be measured of one model on one calibration text, and what has been.

        for i, block, stats in measure.forward(taps): ...

    Block and statistics belong to the loop's body: both are emptied when the loop asks for the next ones, so that those of
    one block at a time are in memory. What is to stay is copied out (`Stats.only`) or put into `stored`.

    Where the stream is `Awaited`, it is made when it is first asked for: a plan that needs no statistics reads no text. What
    then opens the cache is given in its place.
    """

    def __init__(
        self,
        stream: Stream | Awaited,
        cache: Cache | Callable[[Stream], Cache] | None = None,
        progress: Progress | None = None,
    ):
        self.given, self.progress = stream, progress
        self._cache = cache or Cache()
        self.stored = Store(stream.limits)  # per block, what a plan has measured and the solve uses again
        self.shapes: list[Shape] = [self.source.shape(i) for i in range(self.source.n_blocks)]
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # per running phase: seconds of the phases inside it
        if isinstance(stream, Stream):
            self._watch(stream)

    @property
    def started(self) -> bool:
        """Whether the text has been read: not before something of an awaited stream was asked for."""
        return isinstance(self.given, Stream)

    @property
    def stream(self) -> Stream:
        if isinstance(self.given, Awaited):
            self.given = self.given.make()
            self._watch(self.given)
        return self.given

    @property
    def cache(self) -> Cache:
        """Of the uncompressed model's statistics and predictions, across runs."""
        if not isinstance(self._cache, Cache):
            self._cache = self._cache(self.stream)
        return self._cache

    def _watch(self, stream: Stream) -> None:
        stream.clock = self.phase
        if self.progress:
            stream.report = self.progress

    @property
    def source(self) -> Source:
        """The model. Asking for it reads no text."""
        return self.given.source

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of a with-block, less those of phases inside it, to `seconds`."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def part(self, windows: Tensor) -> Measurements:
        """The same model on other windows (n, seq): what is stored stays, nothing is taken from the cache."""
        other = Measurements(self.stream.part(windows), progress=self.progress)
        other.stored = self.stored
        return other

    def forward(self, taps: Taps, edits: Edits | None = None) -> Measured:
        """(i, block, statistics) of every block of the uncompressed model, or the one that `edits` make, first to last."""
        with self.phase("statistics"):
            yield from self._walk("forward", taps, edits)

    def backward(self, taps: Taps, probe: Probe = "sampled", aside: int = 0) -> Measured:
        """The same of the uncompressed model from the last block to the first, gradients included (see `sweep_back`)."""
        with self.phase("gradients"):
            yield from self._walk(name_back(probe, aside), taps, probe=probe, aside=aside)

    def _walk(
        self, origin: str, taps: Taps, edits: Edits | None = None, probe: Probe | None = None, aside: int = 0
    ) -> Measured:
        """One sweep for what the cache lacks, none where it lacks nothing; all of it is kept there, unless of `edits`.

        `origin`: the name under which the cache keeps it. `probe`: what the sweep sends back; None: it goes forward.
        """
        sweep = partial(sweep_back, probe=probe, aside=aside) if probe else partial(sweep_forward, edits=edits)
        label = "gradients" if probe else "statistics"
        wanted = {s.block: taps(s) for s in self.shapes}
        missing = wanted if edits else {i: self.cache.missing(origin, i, t) for i, t in wanted.items()}
        if any(missing.values()) or not any(wanted.values()):
            found = sweep(self.stream, lambda shape: missing[shape.block])
        else:
            order = reversed(range(len(self.shapes))) if probe else range(len(self.shapes))
            found, label = ((i, self.stream.block(i), Stats()) for i in order), f"cached {label}"
        for n, (i, block, stats) in enumerate(found):
            if not edits:
                self.cache.keep_stats(origin, i, stats)
                stats.merge(self.cache.stats(origin, i, set(wanted[i]) - set(missing[i])))
                stats.origin = origin
            yield i, block, stats
            empty(block, stats)
            del block, stats
            if self.progress:
                self.progress(label, n + 1, len(self.shapes))


def name_back(probe: Probe, aside: int = 0) -> str:
    """Under which the cache keeps what a pass back finds."""
    name = "gradients" if probe == "sampled" else f"gradients of {probe}"
    return f"{name}, one in {aside} aside" if aside else name


def empty(block: nn.Module, stats: Stats) -> None:
    """Let go of what somebody may still hold: a block's parameters, its statistics."""
    stats.sums = {}
    for module in block.modules():
        module._parameters.clear()


def sweep_forward(stream: Stream, taps: Taps, edits: Edits | None = None) -> Measured:
    """Every block of the uncompressed model, or the one that `edits` make, with the statistics of its taps."""
    hidden = stream.start()
    stream.report("statistics", 0, len(stream))
    for i in range(len(stream)):
        block = stream.block(i, (edits or {}).get(i, ()))
        stats, hidden = measure_block(stream, i, stream.place(block), taps(stream.source.shape(i)), hidden)
        yield i, block, stats
        del block, stats  # or they lie beside the next block's


def sweep_back(stream: Stream, taps: Taps, seed: int = 0, probe: Probe = "sampled", aside: int = 0) -> Measured:
    """Forwards keeping every block's inputs, then backwards from what `probe` sends back (see
    `planish.calibrate.losses.output_gradients`): the last block comes first.

    Each block is recomputed from its kept inputs (in memory up to the limit of what is stored, then on disk); forward sites and
    "grad:" sites are measured together. `aside`: one window in so many is in no sum of taps of part "all", but in those of part
    "aside".
    """
    inputs = [stream.start()]
    stream.report("forward", 0, len(stream))
    for i in range(len(stream)):
        inputs.append(stream.run(i, stream.place(stream.block(i)), inputs[-1], stream.limits.stored))
        stream.report("forward", i + 1, len(stream))
    gradients: Hidden = Activations(stream.limits, output_gradients(stream, inputs.pop(), seed, probe, aside))
    stream.release()
    for i in reversed(range(len(stream))):
        block = stream.block(i)
        ends = inputs.pop(), gradients
        stats, gradients = measure_back(stream, i, block, taps(stream.source.shape(i)), ends, aside)
        del ends  # or they lie beside the next block's
        yield i, block, stats
        del block, stats


def measure_back(
    stream: Stream, i: int, block: nn.Module, taps: list[Tap], ends: tuple[Hidden, Hidden], aside: int = 0
) -> tuple[Stats, Hidden]:
    """Statistics of block i from its inputs and the gradients at its outputs (`ends`); the gradients at its inputs."""
    hidden, into = ends
    placed, earlier = stream.place(block).requires_grad_(False), Activations(stream.limits)
    forward = {s.removeprefix("dense:") for t in taps for s in t.sites if not s.startswith("grad:")}
    backward = sorted({s.removeprefix("grad:") for t in taps for s in t.sites if s.startswith("grad:")})

    def run(n: int) -> Values:
        leaf = fetch(hidden, n, stream.device).detach().requires_grad_(True)
        with torch.enable_grad(), tap_sites(placed, stream.family, forward | set(backward)) as seen:
            out = stream.forward(i, placed, leaf, n)
            leaves = [leaf, *(seen[s] for s in backward)]
            found = torch.autograd.grad(out, leaves, fetch(into, n, stream.device), allow_unused=True)
        earlier.append(found[0])
        values = {p + s: seen[s].detach() for s in forward for p in ("", "dense:")}
        values |= {f"grad:{s}": g for s, g in zip(backward, found[1:], strict=True) if g is not None}
        return seen.fold(values, len(leaf))

    return collect(stream, taps, run, stream.source.shape(i), aside), earlier
