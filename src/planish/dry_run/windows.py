"""Calibration windows that fit the machine, and what would make a run shorter, by predicted seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from planish.checking import count_needed
from planish.dry_run import look_ahead
from planish.dry_run.passes import Run
from planish.dry_run.rounding_seconds import estimate_all
from planish.dry_run.seconds import Costs, Phase, measure_costs
from planish.durations import tell
from planish.errors import InputError
from planish.folder.source import Source
from planish.methods import find_method, list_methods
from planish.methods.method import Method
from planish.request import Request
from planish.rounding.types import DENSE_NAMES

BOUND = 1800.0  # seconds that a run on a CPU may take where nobody chose its windows
SHORT = 512  # tokens: windows are shortened to this before there are fewer of them
FEW = 8  # windows at least
PER_CHANNEL = 4  # tokens at least for every channel of the widest Gram, or it is mostly noise
CAREFUL = 60, 1e9  # passes and FLOP/s by which a run is certainly not longer than it takes
ROUND = 1e-5  # seconds of rounding a weight, as certainly
SMALL = 60.0  # seconds within which a run needs no prediction
HALF = 0.505  # at most that of a run's time is half of it
PARTS = (2, 3, 4)  # windows are divided by these until the run is halved
CHEAPER = ("a3", "flat-llm")  # methods that are looked at

Size = tuple[int, int]  # windows, tokens of each


class Outlook:
    """What a run would take with windows of several sizes. One plan and one rehearsal serve all of them."""

    def __init__(self, request: Request, method: Method, source: Source, size: Size):
        self.request, self.method, self.source = request.model_copy(update={"max_latency": None}), method, source
        self.first = look_ahead(self.request, method, source, size)
        self.costs: Costs = measure_costs(self.first)

    def run(self, size: Size) -> Run:
        """The plan is that of the first size: only where attention's FLOPs or time are limited would another one be found."""
        problem = replace(self.first.problem, context=self.request.context or size[1])
        work = [replace(w, windows=w.windows and min(w.windows, size[0])) for w in self.first.work]
        return self.first._replace(problem=problem, windows=size[0], seq_len=size[1], work=work)

    def serves(self, request: Request) -> bool:
        """Whether that plan is the very one that a request asks for, whatever the size."""
        return not {"flops_keep", "max_latency"} & set(request.given)

    def phases(self, size: Size) -> list[Phase]:
        numbers = 2 * sum(p.numel() for p in self.source.empty.parameters())
        return estimate_all(self.run(size), self.costs, numbers)

    def seconds(self, size: Size) -> float:
        return sum(p.seconds for p in self.phases(size))


class Chosen(NamedTuple):
    """Windows, and why they are not the default ones: empty where they are. `outlook`: what they were chosen by, if anything."""

    size: Size
    why: str = ""
    outlook: Outlook | None = None


def is_small(request: Request, source: Source, size: Size, seconds: float) -> bool:
    """Whether a run is certainly shorter, without measuring anything."""
    passes, rate = CAREFUL
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    rounding = 0.0 if request.bits in (None, *DENSE_NAMES) else ROUND * sum(s.count() for s in shapes)
    return 2 * passes * sum(s.working for s in shapes) * size[0] * size[1] / rate + rounding < seconds


def list_smaller(size: Size, need: int) -> list[Size]:
    """Sizes in the order in which they are tried: shorter windows, then fewer, with at least so many tokens as the widest Gram
    of `need` channels takes."""
    (n, length), found = size, list[Size]()
    while True:
        n, length = (n, max(length // 2, SHORT)) if length > SHORT else (n // 2, length)
        if n < FEW or n * length < PER_CHANNEL * need:
            return found
        found.append((n, length))


def choose_windows(request: Request, method: Method, source: Source, size: Size) -> Chosen:
    """The largest of the sizes with which a run on a CPU is predicted to take at most `BOUND` seconds, or the smallest."""
    if request.device != "cpu" or is_small(request, source, size, BOUND):
        return Chosen(size)
    try:
        outlook = Outlook(request, method, source, size)
    except InputError:  # the run itself will say so
        return Chosen(size)
    sizes = list_smaller(size, count_needed(outlook.first.problem))
    if (default := outlook.seconds(size)) <= BOUND or not sizes:
        return Chosen(size, "", outlook)
    found = next((s for s in sizes if outlook.seconds(s) <= BOUND), sizes[-1])
    took = outlook.seconds(found)
    aim = f"at most {tell(BOUND)}" if took <= BOUND else f"{tell(BOUND)}, but its statistics need so many tokens"
    return Chosen(
        found,
        f"calibration windows: {found[0]} × {found[1]} tokens, chosen for this CPU: about {tell(took)}, where the default "
        f"{size[0]} × {size[1]} would take about {tell(default)} (the aim is {aim}); --n-samples and --seq-len say otherwise",
        outlook,
    )


def list_shorter(outlook: Outlook, size: Size, seconds: float) -> dict[str, float]:
    """Options that would at least halve a run of so many seconds → what it would take with them; of windows the most."""
    (n, length), found = size, dict[str, float]()
    fewer = [(f"--n-samples {n // by}", (n // by, length)) for by in PARTS]
    shorter = [(f"--seq-len {length // by}", (n, length // by)) for by in PARTS]
    for options in (fewer, shorter):
        told = ((flag, outlook.seconds(other)) for flag, other in options if min(other) > 1)
        found |= dict([next((t for t in told if t[1] <= HALF * seconds), ("", seconds))])
    for name in CHEAPER:
        if name != outlook.method.name and name in list_methods():
            try:
                cheaper = Outlook(outlook.request, find_method(name), outlook.source, size)
                found[f"--method {name}"] = cheaper.seconds(size)
            except InputError:
                continue  # that method cannot do it
    return {flag: s for flag, s in found.items() if s <= HALF * seconds}


def foretell(
    request: Request, method: Method, source: Source, size: Size, outlook: Outlook | None = None
) -> tuple[Sequence[Phase], dict[str, float]]:
    """The walks of a run with what each takes, and what would halve a long one; nothing where it is small or cannot be told."""
    if is_small(request, source, size, SMALL):
        return [], {}
    try:
        outlook = outlook or Outlook(request, method, source, size)
    except InputError:
        return [], {}
    phases = outlook.phases(size)
    whole = sum(p.seconds for p in phases)
    return phases, list_shorter(outlook, size, whole) if whole > SMALL else {}
