"""How long rounding (`planish.walks.quantise`) takes: its passes by this machine's rates, its matrices rehearsed on random numbers.

A matrix of o rows of n weights takes n (c + o (a + b n)) seconds, a, b and c from three small ones of its type: columns are rounded
one after the other, and the errors of all columns go on to those behind. Of every block

running    `RUNS` or `FINE_RUNS` times the block, and attention once for every head's width of channels that values read
sums       second moments of all inputs, below 8 bits as many again beside unrounded inputs, of attention's averages one more
rounding   every matrix once; below 8 bits again in each other basis that is tried (`TRIES`)

and before the first one the gradients of a sample and, where they are rounded, the embedding and the head. Where types may differ
every matrix is priced in each before.
"""

from __future__ import annotations

import functools
from math import ceil
from typing import NamedTuple

import torch

from planish.calibrate.linears import ROWS
from planish.calibrate.stream import BATCH
from planish.core import Shape
from planish.dry_run.passes import Run
from planish.dry_run.rounding import sum_moments
from planish.dry_run.seconds import Costs, Phase, clock, estimate_phases
from planish.plan.budgets import make_budget
from planish.plan.problem import count_left
from planish.rounding.blocks import FINE
from planish.rounding.round import Metric, round_matrix
from planish.rounding.types import StorageType
from planish.walks.bits import Asked, list_rounded
from planish.walks.quantise import SAMPLE, WINDOWS

RUNS, FINE_RUNS = 4, 2  # of a block: for moments, beside unrounded inputs, for those behind it
TRIES = {"v": 3, "o": 3}  # bases in which a matrix is rounded; of others 2
PRICED = 0.7  # of rounding to a type takes pricing it
SIZES = ((4, 256), (256, 256), (512, 1024))  # (out, in) of the matrices that are rehearsed


class Pace(NamedTuple):
    """Seconds of a column, of a weight, and of a weight for every column behind which it is."""

    column: float
    weight: float
    behind: float

    def take(self, out: int, n: int) -> float:
        """Of a matrix (out, in)."""
        return n * (self.column + out * (self.weight + n * self.behind))


@functools.lru_cache(32)
def rehearse_type(kind: StorageType, known: bool = True) -> Pace:
    """Of rounding to a type on the CPU, with moments of the inputs where they are `known`."""
    generator, per = torch.Generator().manual_seed(0), list[float]()
    sizes = [(out, ceil(n / kind.group) * kind.group) for out, n in SIZES]
    for out, n in sizes:
        w, x = torch.randn(out, n, generator=generator) / n**0.5, torch.randn(2 * n, n, generator=generator).double()
        metric = Metric(x.T @ x / len(x), torch.eye(out).double()) if known else Metric()
        per.append(clock(functools.partial(round_matrix, w, kind, metric)) / n)
    _, small, large = (max(p - per[0], 0.0) / out for p, (out, _) in zip(per, sizes, strict=True))
    behind = max(large - small, 0.0) / (sizes[2][1] - sizes[1][1])
    return Pace(per[0], max(small - sizes[1][1] * behind, 0.0), behind)


def estimate_all(run: Run, costs: Costs, moved: int) -> list[Phase]:
    """The walks of a run in their order, and what each takes. `moved`: numbers that are read and written."""
    found = estimate_phases(run, costs, moved)
    if run.asked is None:
        return found
    weights = make_budget("keep", 1, run.measure.source, run.problem.shapes)
    keep = count_left(run.problem, run.planned.ranks, weights) / weights.total
    at = [p.name for p in found].index("blocks") + 1
    return [*found[:at], *estimate_rounding(run, costs, run.asked, keep), *found[at:]]


def estimate_rounding(run: Run, costs: Costs, asked: Asked, keep: float) -> list[Phase]:
    """The walks of rounding what a plan leaves, this share of the blocks' weights."""
    shapes, few = run.problem.shapes, min(run.tokens, max(SAMPLE, WINDOWS * run.seq_len))
    before = few * sum(
        costs.run(s, run.seq_len) + costs.run(s, run.seq_len, True)
        + costs.rates.gram * sum_moments(s, False).gradients for s in shapes
    ) + few * (costs.predict(shapes[0], True) + 2 * costs.predict(shapes[0]))  # fmt: skip
    if asked.head:
        out, n = costs.head // shapes[0].hidden, shapes[0].hidden
        before += rehearse_type(asked.head.pick(n, "the embedding", out), False).take(out, n)
    moving = [keep * count_moving(run, costs, s, asked) for s in shapes]
    found = []
    if asked.blocks.mean is not None:
        found.append(Phase("types", [m + PRICED * keep * price(s, asked) for m, s in zip(moving, shapes, strict=True)]))
    found.append(Phase("rounding", [m + keep * count_matrices(s, asked) for m, s in zip(moving, shapes, strict=True)]))
    first = found[0]
    return [Phase(first.name, [first.steps[0] + before, *first.steps[1:]]), *found[1:]]


def count_moving(run: Run, costs: Costs, shape: Shape, asked: Asked) -> float:
    """Seconds of a block's runs and sums."""
    anchored, tokens = asked.blocks.bits < FINE, run.tokens
    seconds = (RUNS if anchored else FINE_RUNS) * tokens * costs.run(shape, run.seq_len)
    dense, experts = sum_moments(shape, False), sum_moments(shape, True)
    alike = dense.inputs - shape.hidden**2 * (shape.heads > 0 and shape.averages)
    few = shape.experts.top / shape.experts.number if shape.experts else 0.0
    seconds += tokens * costs.rates.gram * ((3 if anchored else 1) * alike + few * experts.inputs)
    if shape.averages and shape.v:
        reads = shape.count(*(r for r in ("q", "k") if r in shape.attends))
        scores = shape.heads * (shape.qk + shape.v) * run.seq_len
        again = 2 * reads / costs.rates.single + scores / costs.rates.attention
        rows = min(tokens * shape.heads, ceil(tokens / BATCH) * ROWS)
        seconds += ceil(shape.hidden / shape.v) * tokens * again + rows * costs.rates.gram * shape.hidden**2
    return seconds


def count_matrices(shape: Shape, asked: Asked) -> float:
    """Seconds in which all matrices of a block are rounded."""
    total = 0.0
    for role in list_rounded(shape):
        out, n = shape.linear(role)
        kind = asked.pick(role, n, role, out)
        tries = 1 if kind.bits >= FINE else TRIES.get(role, 2)
        total += tries * rehearse_type(kind).take(out, n)
    return total


def price(shape: Shape, asked: Asked) -> float:
    """Seconds in which all matrices of a block are rounded to every type that they may have, once."""
    sizes = [shape.linear(r) for r in list_rounded(shape)]
    return sum(rehearse_type(k).take(out, n) for out, n in sizes for k in asked.blocks.ladder(n, "a matrix", out))
