"""A result of a size, and beside it what plain rounding of the dense model gives at the same bytes: the ladder.

    --fit, --bits auto: plans of the size compete (`planish.sizes.fit`), the least KL(dense ‖ plan) on windows held out is made
                        again
    --max-bytes alone:  the same where the target's files hold rounded weights wherever they run, else what the method makes
                        of the size in 16 bits, as --bits 16 does
    beside either:      every type of the target, all weights rounded to it, from the same windows, measured on the same others:
                        those that the size holds, types mixed to fill it, and the next larger type

So a user sees what the cuts were worth. Where plain rounding of no more bytes is nearer to the dense model, that is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import hypot, inf
from pathlib import Path
from typing import Any

from planish import lanes
from planish.compression import Calibration
from planish.core import Progress
from planish.errors import InputError, PlanishError
from planish.folder.safetensors import write_text
from planish.folder.source import FolderSource, Source
from planish.manifest import Result
from planish.request import LIMITS, Request, label
from planish.rounding import ggml, integers
from planish.rounding.types import DENSE_NAMES, HELD
from planish.sizes.fit import LADDER, LADDERS, find_floor, find_size, list_choices, list_plans, predict, vary_head
from planish.sizes.trials import HELD as EVERY
from planish.sizes.trials import Choice, Contest, Runner, open_runner, settle
from planish.walks.bits import read_asked

ROUNDED = ("gguf", "hf", "vllm")  # targets for which types compete wherever a size is given
NOISE = 2  # standard errors, within which two plans are alike
FAR = 1.25  # times the least divergence so far: plans beyond one that has more are not made


@dataclass
class Ladder:
    """`rungs`: plain roundings of the dense model, finest first; `result`: what was made, measured as they were, on `windows` held
    out; `size`: bytes that it may have. `why`: the reason where there are no rungs."""

    size: int
    windows: int = 0
    result: Choice | None = None
    rungs: list[Choice] = field(default_factory=list)
    why: str = ""

    @property
    def best(self) -> Choice | None:
        """The rung of the size that is nearest to the dense model."""
        return min((r for r in self.rungs if r.measured and r.bytes <= self.size), key=lambda r: r.kl, default=None)

    @property
    def verdict(self) -> str:
        """Which won: "result", "plain", or "alike" within the noise; "plain" too where the result is such a rung itself."""
        best, result = self.best, self.result
        if best is None or result is None or not result.measured:
            return ""
        if (best.bits, best.keep, best.head) == (result.bits, result.keep, result.head):
            return "plain"
        if abs(gap := result.kl - best.kl) <= NOISE * hypot(result.stderr, best.stderr):
            return "alike"
        return "plain" if gap > 0 else "result"

    def as_dict(self) -> dict[str, Any]:
        rungs = [r.as_dict() | {"fits": 0 < r.bytes <= self.size} for r in self.rungs]
        result = self.result.as_dict() if self.result else None
        return {
            "size": self.size, "windows": self.windows, "result": result, "rungs": rungs, "verdict": self.verdict,
            "why": self.why,
        }  # fmt: skip

    def write(self, folder: Path) -> dict[str, Any]:
        """What ladder.json of a written model says."""
        found = self.as_dict()
        if lanes.is_first():
            write_text(folder / "ladder.json", json.dumps(found, indent=2) + "\n")
        return found


def choose_size(contest: Contest) -> tuple[Request, list[Choice], Ladder | None]:
    """The contest's request with `fit`, or with `bits` "auto" and `max_bytes` → the same with the bits and the keep that are best
    at this size; the plans that competed; the ladder, where there were several. Any other request stays as it is.

    Raises InputError, before any work, where nothing of this size can be reached.
    """
    request, source, progress = contest.request, contest.source, contest.progress
    if request.fit is None and request.bits != "auto":
        return request, [], None
    size = find_size(request, source)
    if request.bits in DENSE_NAMES:
        return request.model_copy(update={"max_bytes": size, "fit": None}), [], None
    if why := refuse_types(request, source) or refuse(source, contest.text):
        raise InputError(f"--bits auto: {why}")
    floor = find_floor(request, contest.method, source, (len(contest.text.windows), contest.text.windows.shape[1]))
    tried = list_plans(request, source, size, floor)
    if len(tried) == 1:
        tried[0].chosen = True
        return settle(request, tried[0]), tried, None
    with open_runner(contest) as runner:
        rungs = list_rungs(request, source, size) if request.ladder else []
        climb(runner, tried, size, len(rungs), progress)
        more = [r for r in rungs if r.bits not in {c.bits for c in tried if c.keep == 1 and c.measured}]
        heads = vary_head(choose_best(tried, size), request, source, size, floor)
        measure_all(runner, heads, size, len(more), progress)
        best = choose_best(tried := [*tried, *heads], size)
        best.chosen = True
        measure_all(runner, more, inf, 0, progress)
    plain = [c for c in tried if c.keep == 1 and c.measured and c.bits != "16"]
    found = Ladder(size, len(runner.held), best, order_rungs([*more, *plain]))
    return settle(request, best), tried, found if request.ladder else None


def make_smaller(contest: Contest, tried: Sequence[Choice], made: Result) -> Request | None:
    """The request for the plan that was chosen, smaller, where what was `made` of all windows is larger than the size after all;
    None where it is not, or nothing of the plan is free."""
    size, best = find_size(contest.request, contest.source), next(c for c in tried if c.chosen)
    if made.bytes_after <= size or not best.shrink(made, size):
        return None
    return settle(contest.request, best)


def leaves_open(request: Request) -> bool:
    """Whether a request asks for a size and says nothing of bits, which compete then: not under `max_bytes` for target "any"."""
    sized = request.fit is not None or (request.max_bytes is not None and request.target in ROUNDED)
    return request.bits is None and sized


def choose_bits(request: Request, source: Source, text: Calibration) -> tuple[Request, list[str]]:
    """A request with the `bits` that it leaves open: "auto", or 16 where types cannot compete, and a line that says why."""
    if not leaves_open(request):
        return request, []
    if not (why := refuse_types(request, source) or refuse(source, text)):
        return request.model_copy(update={"bits": "auto"}), []
    notes = [f"nothing is rounded to reach the size: {why} (--bits 16 asks for that)"] if request.target in HELD else []
    return request.model_copy(update={"bits": "16"}), notes


def refuse_types(request: Request, source: Source) -> str:
    """Why types cannot compete for a size, whatever the text; empty where they can."""
    beside = [n for n in LIMITS if n != "max_bytes" and getattr(request, n) is not None]
    if beside and request.fit is None:
        return f"--{label(beside[0])} holds beside it"
    try:
        open_types(request.target)
        read_asked(settle(request, Choice("8", 1.0)), source)
    except InputError as error:
        return str(error)
    return ""


def open_types(target: str) -> None:
    """InputError that names the extra, where a library that packs or rounds to the target's types is missing."""
    if HELD.get(target) == "ggml":
        ggml.load_gguf()
        ggml.open_library()
    elif target in HELD:
        integers.load_library()


def choose_best(tried: Sequence[Choice], size: int) -> Choice:
    best = min(tried, key=lambda c: c.kl)
    if not best.measured:
        raise InputError(
            f"nothing of {size:,} bytes could be made: " + "; ".join(f"{c.bits} bits: {c.error}" for c in tried)
        )
    return best


def measure_all(runner: Runner, plans: Sequence[Choice], size: float, more: int, progress: Progress | None) -> None:
    """Plans one after the other; `more` come behind them."""
    for n, choice in enumerate(plans):
        runner.measure(choice, size)
        if progress:
            progress("sizes" if size < inf else "ladder", n + 1, len(plans) + more * (size < inf))


def climb(runner: Runner, plans: Sequence[Choice], size: float, more: int, progress: Progress | None) -> None:
    """Plans from the fewest bits on, each finer one of fewer weights, up to one that is `FAR` behind the best before it.

    Along them what cutting costs rises ever faster, and what rounding costs falls ever slower: beyond that one all that cut are
    worse.
    """
    best, far = Choice("", 1.0), ""
    for n, choice in enumerate(sorted(plans, key=lambda c: (float(c.bits), -c.keep))):
        if far and choice.keep < 1:
            choice.error = f"not made: {far} bits are worse than {best.bits} already"
            continue
        runner.measure(choice, size)
        cut = choice.keep < 1 and choice.measured and best.measured
        if cut and choice.kl > FAR * best.kl + NOISE * hypot(choice.stderr, best.stderr):
            far = choice.bits
        best = min(best, choice, key=lambda c: c.kl)
        if progress:
            progress("sizes", n + 1, len(plans) + more)


def climb_beside(contest: Contest) -> Ladder | None:
    """The ladder beside a cut to `max_bytes` in 16 bits, which is made again from the windows that plain types see. None where
    nothing is asked for, the size holds the dense model, or the target has no rounded weights."""
    request, source, text, progress = contest.request, contest.source, contest.text, contest.progress
    size = int(request.max_bytes or 0)
    asked = request.ladder and size and request.bits in (None, *DENSE_NAMES) and request.target in HELD
    if not asked or sum(predict(request, source, "16")) <= size:
        return None
    if why := refuse(source, text):
        return Ladder(size, why=why)
    rungs, made = list_rungs(request, source, size), Choice("16", 1.0)
    if not rungs:
        return Ladder(size, why="no type of the target holds this model")
    with open_runner(contest) as runner:
        try:
            result = runner.write(request)
            made.bytes, made.keep = result.bytes_after, result.keep
            made.kl, made.stderr = runner.compare()
        except PlanishError as error:
            return Ladder(size, why=f"not from three quarters of the windows: {error}")
        for n, rung in enumerate(rungs):
            runner.measure(rung, inf if rung.plain else size)
            if progress:
                progress("ladder", n + 1, len(rungs))
    return Ladder(size, len(runner.held), made, order_rungs(rungs))


def refuse(source: Source, text: Calibration) -> str:
    """Why plain roundings cannot be measured; empty where they can."""
    if not isinstance(source, FolderSource):
        return "the model is in memory: save it first"
    if lanes.count() > 1:
        return "several processes"
    return f"fewer than {EVERY} calibration windows, none to hold out" if len(text.windows) < EVERY else ""


def list_rungs(request: Request, source: Source, size: int) -> list[Choice]:
    """Plain roundings to measure beside a size: the types that it holds, types mixed to fill it, and the next larger type."""
    held, larger = list[Choice](), list[Choice]()
    for bits in LADDERS.get(request.target, LADDER)[1:]:
        try:
            fits = sum(predict(request, source, bits)) <= size
        except InputError:
            continue
        (held if fits else larger).append(Choice(bits, 1.0))
    try:
        mixed = [c for c in list_choices(request, source, size) if c.keep == 1 and "." in c.bits]
    except InputError:  # nothing, or nothing whole, fits
        mixed = []
    return [*larger[-1:], *mixed, *held]


def order_rungs(rungs: Sequence[Choice]) -> list[Choice]:
    """Finest first: by bits, of which no type has more than 16."""
    return sorted(rungs, key=lambda c: -float(c.bits))
