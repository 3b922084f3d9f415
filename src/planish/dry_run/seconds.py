"""How long a run takes: this machine's rates, measured on small products, times the work; solves are rehearsed.

There is no formula per solver: solves run once on random weights and statistics of a block of the same proportions, at most
`WIDTH` channels wide, and the time is scaled by the cube of the ratio (nearly everything in them is products, factorisations
and eigenproblems).
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.core import Plan, Shape, Solver, Unit, Weights, count_sums
from planish.dry_run.passes import Run, count_passes
from planish.plan.footprint import footprint
from planish.plan.problem import Problem
from planish.solvers.offload import offload
from planish.stats import Stats, Tap, add_gram

WIDTH = 1024
CPU = torch.device("cpu")


def estimate_seconds(run: Run, moved: int) -> tuple[float, str]:
    """Seconds, and how they were found. `moved`: numbers that are read and written."""
    problem, stream, shape = run.problem, run.measure.given, run.largest
    here = stream.device if stream.device.type != "cuda" or torch.cuda.is_available() else CPU
    rates = measure_rates(here, torch.float32 if here != stream.device else stream.dtype, shape, run.seq_len)
    blocks, passes, summing = len(problem.shapes), 0.0, 0.0
    for s in problem.shapes:
        through, taps = count_passes(run, s.block)
        passes += through
        summing += run.tokens * sum(rates.sum(s, tap) for tap in taps)
    scores = problem.context * sum(footprint({}, s).scores for s in problem.shapes) / blocks
    forward = 2 * shape.working / rates.single + scores / rates.attention
    running = passes * run.tokens * (forward + (shape.inner + 6 * shape.hidden) * rates.element)
    cut = [u for s in problem.shapes for u in run.solved(s.block)]
    with offload("cpu"):  # elsewhere small solves say nothing about large ones
        took = rehearse_all(problem, cut, run.planned.ranks)
    solving, moving = sum(took[u.name] for u in cut), moved * rates.file
    how = (
        f"{passes / blocks:.2f} forward passes over {run.tokens} tokens at this machine's {rates.single / 1e9:.0f} GFLOP/s, "
        "the blocks' statistics in fp64, one block's solves rehearsed on random numbers (planish.dry_run.seconds), reading "
        f"and writing from memory: {running:.3g}, {summing:.3g}, {solving:.3g}, {moving:.3g} s"
    )
    how += "; this machine has no such device: its CPU's rates" if here != stream.device else ""
    how += "; large factorisations run on the device, which is faster" if stream.device.type == "cuda" else ""
    return running + summing + solving + moving, how


class Rates(NamedTuple):
    """`single`, `double`, `attention`: FLOP/s of products in the computing dtype, in fp64, and of attention; seconds:
    `gram` per number of a Gram and token, `element` per channel of a gated activation, `file` per number read and written."""

    single: float
    double: float
    attention: float
    gram: float
    element: float
    file: float

    def sum(self, shape: Shape, tap: Tap) -> float:
        """Seconds per token that a tap's sums take."""
        return count_sums(shape, [tap]) * (self.gram if tap.kind == "gram" else 2 / self.double)


def clock(run: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds that a calculation takes with nothing beside it: the clock's, or on the CPU the processor's where these are
    fewer because other work was in the way."""
    start, used = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    return min(took, time.process_time() - used) if device.type == "cpu" else took


def measure_rates(device: torch.device, dtype: torch.dtype, shape: Shape, seq_len: int) -> Rates:
    """Of this machine, on products of at most 1024 × 2048 × 1024 numbers."""

    def seconds(run: Callable[[], Any]) -> float:
        return min(clock(run, device) for _ in range(3))

    n, m = min(shape.hidden, 1024), min(shape.inner, 2048)
    sums = CPU if device.type == "mps" else device  # it has no fp64
    a, b = torch.ones(1024, n, device=device, dtype=dtype), torch.ones(m, n, device=device, dtype=dtype)
    single = 2 * 1024 * n * m / seconds(lambda: nn.functional.linear(a, b))
    x, y = a.to(sums).double()[:512], b.to(sums).double()
    double = 2 * 512 * n * m / seconds(lambda: x @ y.T)
    wide, total = torch.ones(512, m, device=sums, dtype=dtype), dict[str, Tensor]()
    gram = seconds(lambda: add_gram(total, wide)) / 512 / m**2
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
    return Rates(single, double, 4 * 4 * q.shape[-1] * length**2 / 2 / attention, gram, element, file)


def shrink(shape: Shape) -> tuple[Shape, int]:
    """A block of the same proportions at most `WIDTH` wide, as far as halving goes; how many times smaller it is."""
    scale = 1
    while shape.hidden > WIDTH and all(n % 2 == 0 for n in (shape.hidden, shape.intermediate, shape.v, shape.qk // 2)):
        scale *= 2
        sizes = ("hidden", "qk", "v", "intermediate", "rotary")
        shape = replace(shape, **{n: getattr(shape, n) // 2 for n in sizes})
    return shape, scale


def rehearse(solvers: Mapping[Unit, Solver], ranks: Mapping[Unit, int], shape: Shape) -> dict[Unit, float]:
    """Seconds to solve these units of one block at these ranks; what cannot be rehearsed takes none."""
    small, scale = shrink(shape)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weights: Weights = {r: draw(*small.linear(r)) / small.linear(r)[1] ** 0.5 for r in small.roles}
    taps: list[Tap] = sorted({t for u, s in solvers.items() for t in s.taps(u, small)})
    sites = sorted({s for t in taps for s in t.sites})
    tokens = max((small.width(s) for s in sites), default=0)
    stats = Stats(taps)
    stats.update({s: draw(8, tokens // 8 + 1, small.width(s)) for s in sites})
    found: dict[Unit, float] = {}
    for unit, solver in solvers.items():
        admissible = solver.ranks(unit, small)
        share = ranks[unit] / max(solver.ranks(unit, shape)[-1], 1)
        rank = max((r for r in admissible if r <= share * admissible[-1]), default=admissible[0])
        found[unit] = clock(partial(solve_once, solver, (unit, weights, stats, small), rank)) * scale**3
    return found


def solve_once(solver: Solver, given: tuple[Unit, Weights, Stats, Shape], rank: int) -> None:
    """Once, without a word; what random numbers do not satisfy stops it early."""
    with warnings.catch_warnings(), suppress(TypeError, ValueError, RuntimeError):
        warnings.simplefilter("ignore")
        solver.truncate(solver.decompose(*given), rank, given[-1])


def rehearse_all(problem: Problem, units: Iterable[Unit], ranks: Plan) -> dict[str, float]:
    """Unit's name → seconds that one unit of this name takes."""
    alike: dict[Shape, dict[Unit, Solver]] = {}
    for unit in {u.name: u for u in units}.values():
        alike.setdefault(replace(problem.shapes[unit.block], block=0), {})[unit] = problem.units[unit]
    return {u.name: took for shape, own in alike.items() for u, took in rehearse(own, ranks, shape).items()}
