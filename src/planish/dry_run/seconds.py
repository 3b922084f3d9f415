"""How long a run takes: this machine's rates, measured on small products, times the work; solves are rehearsed.

There is no formula per solver: solves run on random weights and statistics of blocks of the same proportions, at rising widths
for as long as `PATIENCE` allows, and a + b · width³ through the last two times is continued to the block's own width (nearly
everything in solves is products, factorisations and eigenproblems).
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.calibrate.stream import BATCH
from planish.calibrate.text import count_spare
from planish.core import INSIDE, ExpertShape, Frontier, Plan, Shape, Solver, Unit, Weights, count_sums
from planish.dry_run.passes import Run, count_passes
from planish.folder.stored_linear import StoredLinear, is_apart
from planish.plan.footprint import footprint
from planish.plan.foreseen import Work
from planish.plan.problem import changes
from planish.slices import choose_exact
from planish.solvers.offload import offload
from planish.stats import Stats, Tap, add_gram, is_finite

WIDTH = 1024  # of the widest block that is rehearsed, unless it cannot be halved
NARROW = 64  # no narrower block is
PATIENCE = 1.5  # seconds that rehearsing may take, about
EXPERTS = 4  # with whose insides a block is rehearsed
CPU = torch.device("cpu")
STREAM = ("mlp.raw", "block.out")  # sites of the residual stream


class Phase(NamedTuple):
    """A walk of the run over the blocks, or a part of it: what progress calls it, and the seconds of every step."""

    name: str
    steps: Sequence[float]

    @property
    def seconds(self) -> float:
        return sum(self.steps)


class Rates(NamedTuple):
    """`blocks`, `single`, `double`, `attention`: FLOP/s of the blocks' products, of products in the computing dtype, in fp64, and
    of attention; seconds: `gram` per number of a Gram and token, `element` per channel of a gated activation, `file` per number
    read and written."""

    blocks: float
    single: float
    double: float
    attention: float
    gram: float
    element: float
    file: float

    def sum(self, shape: Shape, tap: Tap) -> float:
        """Seconds per token of the block that a tap's sums take: an expert's tokens are few of these."""
        few = shape.experts.top / shape.experts.number if shape.experts and "expert." in tap.site else 1.0
        return few * count_sums(shape, [tap]) * (self.gram if tap.kind == "gram" else 2 / self.double)


class Calls(NamedTuple):
    """Seconds per token of the block that calling all of its experts takes, forwards, or forwards and back."""

    forward: float
    both: float


class Took(NamedTuple):
    """Seconds of a unit's frontier, and of cutting it to one rank."""

    decompose: float
    truncate: float


@dataclass(frozen=True)
class Costs:
    """What the parts of a run take here. `head`: weights of the output embedding; `unlike`: the device is not this machine's;
    `calls`: of blocks' experts."""

    rates: Rates
    took: Mapping[str, Took]
    head: int
    unlike: bool
    calls: Mapping[ExpertShape, Calls] = field(default_factory=dict)

    def run(self, shape: Shape, seq_len: int, back: bool = False) -> float:
        """Seconds per token of a block, forwards, or forwards and back to the gradients of its inputs (no weight has any)."""
        scores, channels = footprint({}, shape).scores * seq_len / self.rates.attention, shape.inner + 6 * shape.hidden
        e, calls, working = shape.experts, 0.0, shape.working
        if e is not None and e in self.calls:
            channels, working = channels - e.top * e.intermediate, working - e.top * count_expert(e)
            calls = self.calls[e].both if back else self.calls[e].forward
        work = 2 * working / self.rates.blocks
        elements = (3 if back else 1) * channels * self.rates.element
        return (2 * work + 3.5 * scores if back else work + scores) + elements + calls

    def predict(self, shape: Shape, back: bool = False) -> float:
        """Seconds per token of the head and the loss of its predictions."""
        words = self.head / max(shape.hidden, 1)
        return (3 if back else 1) * (2 * self.head / self.rates.single + 3 * words * self.rates.element)

    def solve(self, units: Sequence[Unit], cuts: float = 1.0) -> float:
        """Seconds of these units' frontiers, and of cutting each so many times."""
        return sum(t.decompose + cuts * t.truncate for u in units if (t := self.took.get(u.name)))


def measure_costs(run: Run) -> Costs:
    """On this machine, for a run: products of a few hundred milliseconds, and its solves on random numbers."""
    problem, given = run.problem, run.measure.given
    here = given.device if given.device.type != "cuda" or torch.cuda.is_available() else CPU
    types = (torch.float32,) * 2 if here != given.device else (given.dtype, given.products)
    rates = measure_rates(here, *types, run.largest, run.seq_len)
    units = {u: s for w in run.work if w.solvers for u, s in w.solvers.items()}
    units |= {u: problem.units[u] for s in problem.shapes for u in run.solved(s.block)}
    ranks = {u: run.planned.ranks.get(u, s.ranks(u, problem.shapes[u.block])[0]) for u, s in units.items()}
    alike: dict[Shape, dict[Unit, Solver]] = {}
    for unit in {u.name: u for u in units}.values():
        alike.setdefault(replace(problem.shapes[unit.block], block=0), {})[unit] = units[unit]
    with offload("cpu"):  # elsewhere small solves say nothing about large ones
        took = {u.name: t for shape, own in alike.items() for u, t in rehearse(own, ranks, shape).items()}
    stored = given.source.stored
    tokens = min(run.windows, max(1, BATCH // run.seq_len)) * run.seq_len
    calls = {e: call_experts(e, tokens, here, given.dtype, stored) for s in problem.shapes if (e := s.experts)}
    return Costs(rates, took, given.source.count_head(), here != given.device, calls)


def count_expert(e: ExpertShape) -> int:
    """Weights of one expert."""
    return len(e.roles) * e.hidden * e.intermediate


@functools.lru_cache(16)
def call_experts(e: ExpertShape, tokens: int, device: torch.device, dtype: torch.dtype, stored: torch.dtype) -> Calls:
    """What calling all experts of a block takes per token, in a batch of so many: each is called once, on few rows, and where a
    block's experts stay in their file its weights are read, checked and brought into the computing dtype for that."""
    rows, reached = max(1, tokens * e.top // e.number), min(e.number, tokens * e.top)
    apart = is_apart(e.number * count_expert(e))

    def make(out: int, n: int) -> nn.Linear:
        weight = torch.ones(out, n, dtype=stored)

        def read() -> Tensor:
            is_finite(found := weight.clone())
            return found

        linear = StoredLinear(read, weight.shape, stored) if apart else nn.Linear(n, out, bias=False)
        return linear.to(device, dtype).requires_grad_(False)

    *wide, down = [make(e.hidden, e.intermediate) if r == "down" else make(e.intermediate, e.hidden) for r in e.roles]
    chosen = torch.arange(tokens * e.top, device=device).view(tokens, e.top) % reached
    nothing = torch.zeros(tokens, e.hidden, device=device, dtype=dtype)
    hidden = nothing.clone().requires_grad_()

    def call() -> Tensor:
        token, _ = torch.where(chosen == 0)
        x = hidden[token[:rows]]
        first, *others = [linear(x) for linear in wide]
        y = down(functools.reduce(torch.mul, others, nn.functional.silu(first)))
        return nothing.index_add(0, token[: len(y)], y)

    def call_back() -> None:
        y = call()
        torch.autograd.grad(y, hidden, y)

    with torch.no_grad():
        forward = min(clock(call, device) for _ in range(3))
    both = min(clock(call_back, device) for _ in range(3))
    return Calls(forward * reached / tokens, both * reached / tokens)


def estimate_phases(run: Run, costs: Costs, moved: int) -> list[Phase]:
    """The walks of a run in their order but rounding, and what each takes. `moved`: numbers that are read and written."""
    found = [phase for work in run.work for phase in list_phases(run, work, costs)]
    blocks = walk(run, costs)
    each = moved * costs.rates.file / max(len(blocks), 1)
    found.append(Phase("blocks", [s + each for s in blocks]))
    if run.asked is None and not changes(run.problem, run.planned):
        return found
    shapes, spare = run.problem.shapes, count_spare(run.windows, run.seq_len) * run.seq_len
    once = spare * (sum(costs.run(s, run.seq_len) for s in shapes) + costs.predict(shapes[0]))
    return [*found, Phase("loss", [once, once])] if spare else found  # of the dense model, of the result


def list_phases(run: Run, work: Work, costs: Costs) -> list[Phase]:
    """Of one walk that finding the plan takes; gradients are a walk there and one back."""
    shapes, windows = run.problem.shapes, run.windows if work.windows is None else work.windows
    tokens, units = windows * run.seq_len, list(work.solvers or ())
    head = tokens * costs.predict(shapes[0], work.gradients)
    if work.solve is not None:
        steps = walk(run._replace(planned=work.solve, windows=windows), costs, trial=True)
        return [Phase(work.name, end(steps, work.heads * head))]
    forward = [tokens * work.passes(s.block) * costs.run(s, run.seq_len) for s in shapes]
    steps = []
    for s in shapes:
        summing = tokens * sum(costs.rates.sum(s, tap) for tap in work.taps(s))
        steps.append(summing + costs.solve([u for u in units if u.block == s.block], work.cuts(s.block)))
    if not work.gradients:
        steps = [a + b for a, b in zip(steps, forward, strict=True)]
        return [Phase(work.name, end(steps, work.heads * head))]
    steps = [a + tokens * costs.run(s, run.seq_len, True) for a, s in zip(steps, shapes, strict=True)][::-1]
    return [Phase("forward", forward), Phase(work.name, [steps[0] + head, *steps[1:]] if steps else [])]


def end(steps: Sequence[float], last: float) -> list[float]:
    """Steps with what comes after the last one."""
    return [*steps[:-1], steps[-1] + last] if steps else []


def walk(run: Run, costs: Costs, trial: bool = False) -> list[float]:
    """Seconds of every block of the walk that solves a run's plan; of a `trial` the outputs are wanted."""
    tokens, found = run.planned.refit(run.windows) * run.seq_len, list[float]()
    whole = run.planned.make is not None  # it makes all blocks itself: measures the stream twice and runs on
    for s in run.problem.shapes:
        passes, taps = (3.0, [Tap(site, "gram") for site in STREAM]) if whole else count_passes(run, s.block, trial)
        running = passes * tokens * costs.run(s, run.seq_len)
        found.append(running + tokens * sum(costs.rates.sum(s, tap) for tap in taps) + costs.solve(run.solved(s.block)))
    return found


def explain(run: Run, costs: Costs, phases: Sequence[Phase]) -> str:
    """How the seconds were found."""
    parts: dict[str, float] = {}
    for p in phases:
        parts[p.name.partition(" ")[0]] = parts.get(p.name.partition(" ")[0], 0.0) + p.seconds
    how = (
        f"{run.windows} × {run.seq_len} tokens at this machine's {costs.rates.blocks / 1e9:.0f} GFLOP/s, statistics in fp64, one "
        "block's solves rehearsed on random numbers (planish.dry_run.seconds), reading and writing from memory: "
        + ", ".join(f"{name} {s:.3g} s" for name, s in parts.items())
    )
    how += "; this machine has no such device: its CPU's rates" if costs.unlike else ""
    cuda = run.measure.given.device.type == "cuda"
    return how + ("; units are solved on the device, which is faster" if cuda else "")


def clock(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds that a calculation takes with nothing beside it: the clock's, or on the CPU the processor's where these are
    fewer because other work was in the way."""
    start, used = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    return min(took, time.process_time() - used) if device.type == "cpu" else took


@functools.lru_cache(16)
def measure_rates(device: torch.device, dtype: torch.dtype, products: torch.dtype, shape: Shape, seq_len: int) -> Rates:
    """Of this machine, on products of at most 1024 × 2048 × 1024 numbers, which are formed in `products`."""

    def seconds(run: Callable[[], Any]) -> float:
        return min(clock(run, device) for _ in range(3))

    n, m = min(shape.hidden, 1024), min(shape.inner or shape.hidden, 2048)
    sums = CPU if device.type == "mps" else device  # it has no fp64
    a, b = torch.ones(1024, n, device=device, dtype=dtype), torch.ones(m, n, device=device, dtype=dtype)
    single = blocks = 2 * 1024 * n * m / seconds(lambda: nn.functional.linear(a, b))
    if products != dtype:
        with torch.autocast(device.type, products):
            blocks = 2 * 1024 * n * m / seconds(lambda: nn.functional.linear(a, b))
    x, y = a.to(sums).double()[:512], b.to(sums).double()
    double = 2 * 512 * n * m / seconds(lambda: x @ y.T)
    wide, total = torch.ones(512, m, device=sums, dtype=products), dict[str, Tensor]()
    in_runs = torch.float32 if products != dtype else choose_exact(sums)  # as `planish.calibrate.collect` does
    gram = seconds(lambda: add_gram(total, wide, in_runs)) / 512 / m**2
    length = max(1, min(seq_len, 1024))
    q = torch.ones(1, 4, length, max(shape.qk, 1), device=device, dtype=dtype)
    attention = seconds(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    g = torch.ones(1024, m, device=device, dtype=dtype)
    element = seconds(lambda: nn.functional.silu(g) * g) / g.numel()
    stored = torch.ones(1 << 20, dtype=torch.bfloat16)

    def check() -> None:
        stored.float().aminmax()
        hashlib.sha256(stored.view(torch.uint8).numpy().data)

    file = seconds(check) / len(stored)
    return Rates(blocks, single, double, 4 * 4 * q.shape[-1] * length**2 / 2 / attention, gram, element, file)


def list_sizes(shape: Shape) -> list[tuple[Shape, int]]:
    """Blocks of the same proportions as far as halving goes, the narrowest first: at most `WIDTH` wide, or as it is where it
    cannot be halved; how many times smaller each is."""
    sizes, scale = [(shape, 1)], 1
    further = [n for r in shape.further for n in shape.linear(r)]
    inside = (shape.experts.intermediate, shape.experts.hidden) if shape.experts else (0, 0)
    while shape.hidden > NARROW and all(
        n % 2 == 0
        for n in (shape.hidden, shape.intermediate, shape.v, shape.qk // 2, *(n // scale for n in (*inside, *further)))
    ):
        scale *= 2
        names = ("hidden", "qk", "v", "intermediate", "rotary")
        others = tuple((r, out // 2, n // 2) if r in shape.further else (r, out, n) for r, out, n in shape.others)
        inner, width = (n // scale for n in inside)
        experts = shape.experts and replace(shape.experts, intermediate=inner, hidden=width)
        shape = replace(shape, others=others, experts=experts, **{n: getattr(shape, n) // 2 for n in names})
        sizes.append((shape, scale))
    return [s for s in sizes if s[0].hidden <= WIDTH][::-1] or sizes[-1:]


def rehearse(solvers: Mapping[Unit, Solver], ranks: Plan, shape: Shape) -> dict[Unit, Took]:
    """Seconds to solve these units of one block at these ranks; what cannot be rehearsed takes none.

    What is inside experts is rehearsed with few of them.
    """
    if (
        (e := shape.experts)
        and e.number > EXPERTS
        and (inside := {u: s for u, s in solvers.items() if u.name in INSIDE})
    ):
        few = replace(shape, experts=replace(e, number=EXPERTS, top=1, groups=1, top_groups=1))
        some, rest = rehearse(inside, ranks, few), {u: s for u, s in solvers.items() if u not in inside}
        return rehearse(rest, ranks, shape) | {u: Took(*(e.number / EXPERTS * s for s in t)) for u, t in some.items()}
    before: dict[Unit, Took] = {}
    found: dict[Unit, Took] = {}
    start, scales = time.process_time(), list[int]()
    for small, scale in list_sizes(shape):
        began = time.process_time()
        before, found = found, rehearse_at(solvers, ranks, shape, small)
        scales.append(scale)
        now = time.process_time()
        if now - start + 8 * (now - began) > PATIENCE:
            break
    return {u: Took(*map(functools.partial(extend, scales), before.get(u, (0.0, 0.0)), t)) for u, t in found.items()}


def list_roles(units: Iterable[Unit], shape: Shape) -> list[str]:
    """Linears that can be cut, with those of experts where these units do."""
    return [*shape.linears, *(shape.held(INSIDE[0]) if any(u.name in INSIDE for u in units) else ())]


def extend(scales: Sequence[int], before: float, last: float) -> float:
    """a + b · width³ through the times at the last two of these scales, at scale 1; one of them alone: b · width³."""
    if len(scales) < 2:
        return last * scales[-1] ** 3
    b = max(0.0, last - before) / (scales[-1] ** -3 - scales[-2] ** -3)
    return last + b * (1 - scales[-1] ** -3)


def rehearse_at(solvers: Mapping[Unit, Solver], ranks: Plan, shape: Shape, small: Shape) -> dict[Unit, Took]:
    """Seconds at another size of the block."""
    generator = torch.Generator().manual_seed(0)

    @functools.cache
    def draw(what: str, scale: float, *size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    def name(what: str) -> str:  # all experts get the same numbers: many take no more memory than one
        return re.sub(r"expert\.\d+", "expert", what)

    roles = list_roles(solvers, small)
    weights: Weights = {r: draw(name(r), small.linear(r)[1] ** -0.5, *small.linear(r)) for r in roles}
    taps: list[Tap] = sorted({t for u, s in solvers.items() for t in s.taps(u, small)})
    sites = sorted({s for t in taps for s in t.sites})
    tokens = max((small.width(s) for s in sites), default=0)
    stats = Stats(taps)
    stats.update({s: draw(name(s), 1.0, 8, tokens // 8 + 1, small.width(s)) for s in sites})
    found: dict[Unit, Took] = {}
    for unit, solver in solvers.items():
        admissible = solver.ranks(unit, small)
        share = ranks[unit] / max(solver.ranks(unit, shape)[-1], 1)
        rank = max((r for r in admissible if r <= share * admissible[-1]), default=admissible[0])
        found[unit] = solve_once(solver, (unit, weights, stats, small), rank)
    return found


def solve_once(solver: Solver, given: tuple[Unit, Weights, Stats, Shape], rank: int) -> Took:
    """Once, without a word; what random numbers do not satisfy stops it early."""
    frontiers: list[Frontier] = []

    def decompose() -> None:
        with suppress(TypeError, ValueError, RuntimeError):
            frontiers.append(solver.decompose(*given))

    def truncate() -> None:
        with suppress(TypeError, ValueError, RuntimeError):
            solver.truncate(frontiers[0], rank, given[-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Took(clock(decompose), clock(truncate) if frontiers else 0.0)
