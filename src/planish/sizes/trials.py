"""Plans of one size, each made from three quarters of the calibration windows and measured on the rest, beside the dense model.

A plan that rounds all weights to one type hangs on no method and no size: what it comes out as is remembered, within a run and,
where statistics are, on disk; and so is what types cost where they differ and nothing is cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache, open_cache
from planish.calibrate.stream import Stream
from planish.calibrate.text import fingerprint
from planish.compression import Calibration, Destination, Shared, compress, pick_dtype
from planish.core import Progress
from planish.errors import InputError, PlanishError
from planish.evaluate.agreement import compare
from planish.evaluate.evaluation import load
from planish.folder.source import Source
from planish.manifest import Result
from planish.methods.method import Method
from planish.request import LIMITS, Request

HELD = 4  # every fourth window is held out
AGAIN = 4  # times that a cut which came out too large is made smaller
STEPS = 10_000  # that a share of the weights is counted in
STEP = 0.005  # share of its weights, or of their bits, that then goes at least


@dataclass
class Choice:
    """A plan that was tried: `bits` of the blocks' weights (with a point: a mean of types that differ) and `keep` of them; what
    it came out as, in `bytes`, and how far it is from the dense model on the windows held out: `kl`, nats per token, and its
    standard error. `error`: why it could not be made. `head`: bits of embedding and head, where they are not the default."""

    bits: str
    keep: float
    bytes: int = 0
    kl: float = inf
    error: str = ""
    chosen: bool = False
    stderr: float = inf
    head: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: None where nothing was measured."""
        return {n: None if isinstance(v, float) and not isfinite(v) else v for n, v in asdict(self).items()}

    @property
    def plain(self) -> bool:
        """Whether all weights stay and are rounded to one type."""
        return self.keep == 1 and self.bits != "16" and "." not in self.bits

    @property
    def measured(self) -> bool:
        return isfinite(self.kl)

    def shrink(self, made: Result, size: float) -> bool:
        """Less of what is free, its bits on average or its keep, for it was `made` larger than `size`; False where neither is free
        or the rest of the model alone is too large."""
        blocks = made.block_params_after * (made.kv_bits if self.bits == "16" else float(self.bits)) / 8
        left = 1 - max(1.1 * (made.bytes_after - size) / blocks, STEP)
        if left > 0 and "." in self.bits:
            self.bits = f"{left * float(self.bits):.3f}"
        elif left > 0 and self.keep < 1:
            self.keep = trim(left * self.keep)
        else:
            return False
        return True


def trim(keep: float) -> float:
    """A share of weights in `STEPS`, rounded down."""
    return int(keep * STEPS) / STEPS


def settle(request: Request, choice: Choice) -> Request:
    """The request that makes a plan."""
    bits = None if choice.bits == "16" else choice.bits
    head = choice.head or request.head_bits
    free = dict.fromkeys((*LIMITS, "fit") if choice.keep == 1 else ("max_bytes", "fit"))  # all weights stay
    return request.model_copy(update=free | {"bits": bits, "keep": choice.keep, "head_bits": head})


@dataclass(frozen=True)
class Contest:
    """What plans of a size are made from, beside which place. `cache`: remember plain types in it, or (True) on disk."""

    request: Request
    method: Method
    source: Source
    text: Calibration
    place: Destination
    progress: Progress | None = None
    cache: Cache | bool = False


class Runner:
    """Makes plans from most of the windows and measures them on the others, beside the dense model."""

    def __init__(self, contest: Contest, folder: Path):
        request, source, text, cache = contest.request, contest.source, contest.text, contest.cache
        self.request, self.method, self.source, self.progress = request, contest.method, source, contest.progress
        self.folder = folder / "plan"
        fit, self.held = hold_out(text.windows)
        self.text = Calibration(fit, text.record)
        kind = getattr(torch, request.dtype) if request.dtype else pick_dtype(source, request.device)
        limits = MemoryLimits(folder=folder)
        stream = Stream(source, fit, device=request.device, dtype=kind, limits=limits)
        on_disk = open_cache(stream) if cache is True else None
        self.known = cache if isinstance(cache, Cache) else on_disk or Cache(memory=1 << 20)
        self.shared = Shared(stream, Cache(memory=limits.limit // 2), known=self.known)
        self.dtype = kind

    def measure(self, choice: Choice, size: float = inf) -> None:
        """Fill in what a plan comes out as; what goes wrong becomes its `error`, and so does that it is larger than `size`."""
        head = choice.head or self.request.head_bits
        record = f"uncut|{self.request.target}|{choice.bits}|{head}|{fingerprint(self.held)}"
        if choice.plain and self.known.has([record]):
            found = self.known.get(record)
            choice.bytes = int(found["bytes"])
            choice.kl, choice.stderr = float(found["kl"]), float(found["stderr"])
        else:
            self.make(choice, size)
            if choice.plain and choice.measured:
                numbers = {"kl": choice.kl, "stderr": choice.stderr}
                found = {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}
                self.known.keep({record: found | {"bytes": torch.tensor(choice.bytes)}})
        if choice.measured and choice.bytes > size:
            choice.error, choice.kl = f"comes out at {choice.bytes:,} bytes", inf

    def make(self, choice: Choice, size: float) -> None:
        """Write a plan, smaller where it comes out too large and can be, and measure it."""
        try:
            for _ in range(AGAIN):
                made = self.write(settle(self.request, choice))
                choice.bytes = made.bytes_after
                if choice.bytes <= size or not choice.shrink(made, size):
                    break
            if choice.bytes <= size or choice.plain:
                choice.kl, choice.stderr = self.compare()
            else:
                choice.error = f"comes out at {choice.bytes:,} bytes"
        except PlanishError as error:
            choice.error, choice.kl = str(error), inf

    def write(self, request: Request) -> Result:
        """Make what is asked for, into the runner's folder."""
        return compress(
            request, self.method, self.source, self.text, Destination(self.folder, overwrite=True),
            shared=self.shared, progress=self.progress,
        )  # fmt: skip

    @torch.no_grad()
    def compare(self) -> tuple[float, float]:
        """KL(dense ‖ what was written) on the windows held out, nats per token, and its standard error."""
        small, dense = (
            load(place, device=self.request.device, dtype=self.dtype) for place in (self.folder, self.source.name)
        )
        found = compare(small, dense, self.held.flatten(), self.held.shape[1])
        return found.kl, found.kl_stderr


@contextmanager
def open_runner(contest: Contest) -> Iterator[Runner]:
    """A runner whose plans are written beside the destination, one at a time, and deleted."""
    place = contest.place
    with tempfile.TemporaryDirectory(prefix=f"{place.output.name}.sizes-", dir=place.output.parent) as scratch:
        yield Runner(contest, Path(scratch))


def hold_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (n, seq) to make plans from, and those to compare them on. Raises InputError where there are too few."""
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[HELD - 1 :: HELD] = True
    if not held.any():
        raise InputError(
            f"--bits auto holds out every fourth calibration window: give {HELD} or more, got {len(windows)}"
        )
    return windows[~held], windows[held]
