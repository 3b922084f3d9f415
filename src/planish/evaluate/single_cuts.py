"""Measured loss of single cuts next to the predicted one: whether a method's predictions can be compared across units."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from planish.calibrate.losses import nll
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, read_weights
from planish.checking import check_windows
from planish.core import Unit
from planish.errors import InputError
from planish.methods import pose
from planish.methods.method import Method
from planish.plan.footprint import find_rank
from planish.plan.frontiers import dense_taps, measure_gradients
from planish.plan.problem import Problem
from planish.request import Limits

KINDS = {"vo": "value dimensions", "qk": "rotary pairs", "mlp": "neurons", "attention": "bypass", "ffn": "bypass"}


@dataclass(frozen=True)
class Effect:
    """One unit at one rank, everything else whole: nats per token, predicted and measured.

    `kind`: what is cut; `keep`: kept share of the unit's weights; `measured` on windows of the calibration text, `held`
    on other text.
    """

    unit: str
    kind: str
    rank: int
    keep: float
    predicted: float
    measured: float
    held: float


def measure_effects(
    stream: Stream,
    method: Method,
    held: Tensor,
    *,
    keeps: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    share: float = 1.0,
    measured_windows: int = 8,
    seed: int = 0,
) -> list[Effect]:
    """Cut one unit at a time of the uncompressed model and measure the loss, for a sample of units and ranks.

    Units are predicted and solved by the statistics of the stream's windows; the first `measured_windows` of them and all
    of `held` (n, seq) are run through every cut model. `keeps`: shares of a unit's weights; `share` of all (unit, keep)
    pairs are drawn by `seed`, of each kind as many. The method must predict in nats per token from gradients.
    Costs, per pair, those windows through the blocks behind it.
    """
    check_windows(held, stream.source)
    problem = pose(method, stream.source, Limits(keep=1.0), length=stream.batches[0].shape[1])
    if not any(s.startswith("grad:") for t in problem.taps(problem.block_units(0)) for s in t.sites):
        raise InputError(f"{method.name} predicts no nats per token: it measures no gradients; use a method that does")
    points, measure = draw(problem, keeps, share, seed), Measurements(stream)
    predicted = measure_gradients(problem, measure, method.probe, partial(dense_taps, problem))
    texts = [stream.subset(measured_windows), stream.part(held)]
    hidden = [t.start() for t in texts]
    dense = finish(texts, 0, hidden)
    found: list[Effect] = []
    for i, shape in enumerate(problem.shapes):
        block, stats = stream.block(i), measure.stored[i]
        weights = read_weights(block, stream)
        for unit in sorted({u for u, _ in points if u.block == i}):
            solver = problem.units[unit]
            frontier = solver.decompose(unit, weights, stats, shape)
            for rank in sorted(r for u, r in points if u == unit):
                cut = stream.block(i, solver.truncate(frontier, rank, shape))
                losses = finish(texts, i + 1, run(texts, i, cut, hidden))
                added = [a - b for a, b in zip(losses, dense, strict=True)]
                keep = problem.count(unit, rank) / problem.count(unit, problem.full(unit))
                found.append(Effect(str(unit), find_kind(unit), rank, keep, float(predicted[unit].price[rank]), *added))
        hidden = run(texts, i, block, hidden)
    return found


def run(texts: Sequence[Stream], i: int, block: nn.Module, hidden: Sequence[Hidden]) -> list[Hidden]:
    """Outputs of block i for each text from its inputs."""
    placed = texts[0].place(block)
    return [t.run(i, placed, h) for t, h in zip(texts, hidden, strict=True)]


def finish(texts: Sequence[Stream], i: int, hidden: Sequence[Hidden]) -> list[float]:
    """Each text's loss (nats per token) from the inputs of block i, by the uncompressed blocks from there on."""
    for j in range(i, len(texts[0])):
        hidden = run(texts, j, texts[0].block(j), hidden)
    return [nll(t, h) for t, h in zip(texts, hidden, strict=True)]


def find_kind(unit: Unit) -> str:
    return KINDS.get(unit.name, "low-rank linear")


def draw(problem: Problem, keeps: Sequence[float], share: float, seed: int) -> list[tuple[Unit, int]]:
    """A sample of (unit, rank) with ranks below full, the same share of every kind of unit."""
    kinds: dict[str, set[tuple[Unit, int]]] = {}
    for unit, solver in problem.units.items():
        for keep in keeps:
            rank = find_rank(solver, unit, problem.shapes[unit.block], keep)
            if rank < problem.full(unit):
                kinds.setdefault(find_kind(unit), set()).add((unit, rank))
    chosen: list[tuple[Unit, int]] = []
    for kind in sorted(kinds):
        pairs = sorted(kinds[kind])
        chosen += random.Random(f"{seed} {kind}").sample(pairs, max(1, round(share * len(pairs))))
    return chosen
