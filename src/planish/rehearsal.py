"""How long solves take, without a formula per solver: they run once on random weights and statistics of a block of the
same proportions, at most `WIDTH` channels wide, and the time is scaled by the cube of the ratio (nearly everything in them
is products, factorisations and eigenproblems).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from planish.core import Shape, Solver, Unit, Weights
from planish.stats import Stats, Tap

WIDTH = 1024


class Stopwatch:
    """Seconds that a calculation on the CPU takes with nothing beside it: the clock's, or the processor's where these are
    fewer because other work was in the way."""

    def __init__(self) -> None:
        self.start = (time.perf_counter(), time.process_time())

    def read(self) -> float:
        return min(now - then for now, then in zip((time.perf_counter(), time.process_time()), self.start, strict=True))


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

    def draw(*size: int) -> torch.Tensor:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clock = Stopwatch()
            with suppress(TypeError, ValueError, RuntimeError):  # what random numbers do not satisfy
                solver.truncate(solver.decompose(unit, weights, stats, small), rank, small)
            found[unit] = clock.read() * scale**3
    return found


def rehearse_all(
    solvers: Mapping[Unit, Solver], ranks: Mapping[Unit, int], shapes: Sequence[Shape]
) -> dict[str, float]:
    """Unit's name → seconds, for units of different names, whose blocks may differ."""
    alike = {u: replace(shapes[u.block], block=0) for u in solvers}
    took: dict[str, float] = {}
    for shape in dict.fromkeys(alike.values()):
        found = rehearse({u: s for u, s in solvers.items() if alike[u] == shape}, ranks, shape)
        took |= {u.name: seconds for u, seconds in found.items()}
    return took
