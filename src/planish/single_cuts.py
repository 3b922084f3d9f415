"""What single cuts really cost, beside what was predicted: the check of a method's currency."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.calibrate.losses import nll
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, read_weights
from planish.compression import check_windows
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import Source
from planish.methods import pose
from planish.methods.method import Method
from planish.plan.footprint import find_rank
from planish.plan.frontiers import dense_taps
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
    source: Source,
    method: Method,
    windows: Tensor,
    held: Tensor,
    *,
    keeps: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    share: float = 1.0,
    measured_windows: int = 8,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Effect]:
    """Cut one unit at a time of the uncompressed model and measure the loss, for a sample of units and ranks.

    `windows` (n, seq): calibration, by whose statistics units are predicted and solved; the first `measured_windows` of
    them and all of `held` are run through every cut model. `keeps`: shares of a unit's weights; `share` of all (unit,
    keep) pairs are drawn by `seed`, of each kind as many. The method must predict in nats per token from gradients.
    Costs, per pair, those windows through the blocks behind it.
    """
    check_windows(held, source)
    stream = Stream(source, windows, device=device, dtype=dtype)
    problem, measure = pose(method, source, Limits(keep=1.0), length=windows.shape[1]), Measurements(stream)
    if not any(s.startswith("grad:") for t in problem.taps(problem.block_units(0)) for s in t.sites):
        raise InputError(f"{method.name} predicts no nats per token: it measures no gradients; use a method that does")
    points = draw(problem, keeps, share, seed)
    for i, _, stats in measure.backward(lambda shape: dense_taps(problem, shape.block)):
        measure.stored[i] = stats
    texts = [stream.part(windows[:measured_windows]), stream.part(held)]
    hidden = [t.start() for t in texts]
    found: list[tuple[Unit, int, float, list[float]]] = []

    def finish(i: int, inputs: Sequence[Hidden]) -> list[float]:
        outputs = list(inputs)
        for j in range(i, len(stream)):
            placed = stream.place(stream.block(j))
            outputs = [t.run(j, placed, h) for t, h in zip(texts, outputs, strict=True)]
        return [nll(t, h) for t, h in zip(texts, outputs, strict=True)]

    dense = finish(0, hidden)
    for i, shape in enumerate(problem.shapes):
        block, stats = stream.block(i), measure.stored[i]
        weights = read_weights(block, stream)
        for unit in sorted({u for u, _ in points if u.block == i}):
            frontier = problem.units[unit].decompose(unit, weights, stats, shape)
            for rank in sorted(r for u, r in points if u == unit):
                placed = stream.place(stream.block(i, problem.units[unit].truncate(frontier, rank, shape)))
                losses = finish(i + 1, [t.run(i, placed, h) for t, h in zip(texts, hidden, strict=True)])
                added = [a - b for a, b in zip(losses, dense, strict=True)]
                found.append((unit, rank, float(frontier.loss[rank]), added))
        placed = stream.place(block)
        hidden = [t.run(i, placed, h) for t, h in zip(texts, hidden, strict=True)]
    return [
        Effect(
            str(u),
            KINDS.get(u.name, "low-rank linear"),
            r,
            problem.count(u, r) / problem.count(u, problem.full(u)),
            predicted,
            *added,
        )
        for u, r, predicted, added in found
    ]


def draw(problem: Problem, keeps: Sequence[float], share: float, seed: int) -> list[tuple[Unit, int]]:
    """A sample of (unit, rank) with ranks below full, the same share of every kind of unit."""
    kinds: dict[str, set[tuple[Unit, int]]] = {}
    for unit, solver in problem.units.items():
        for keep in keeps:
            rank = find_rank(solver, unit, problem.shapes[unit.block], keep)
            if rank < problem.full(unit):
                kinds.setdefault(KINDS.get(unit.name, "low-rank linear"), set()).add((unit, rank))
    chosen: list[tuple[Unit, int]] = []
    for kind in sorted(kinds):
        pairs = sorted(kinds[kind])
        chosen += random.Random(f"{seed} {kind}").sample(pairs, max(1, round(share * len(pairs))))
    return chosen
