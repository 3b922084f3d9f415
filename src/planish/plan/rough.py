"""What rounding costs beside a cut, forecast, so that a plan for few bits leaves what rounds well.

A dense linear rounded to b bits with feedback costs about D = ½ Σ_i G_ii step_i² V_jj² / 12 nats per token
(`planish.rounding.gauges_maps.foresee`), 5 to 20 % less in what was tried of SmolLM2. What a cut leaves of it costs D times

    neurons, value and query dimensions      the share r that stays: dense matrices of fewer rows and columns
    pivoted linears of attention             1 + 2 (1 − r), whatever they save: pivots' errors are multiplied by coefficients
    pivoted linears of feed-forwards         2.2 + 2 (1 − r)

as real roundings of three blocks of SmolLM2 to 3 bits came out (1.2 to 2.3 and 2.3 to 4.1 where half to three quarters of the rank
stayed). So in 3 bits low rank hardly pays in a feed-forward, and neurons go in its place. SmolLM2 in 3 bits of 68 % of its
weights is at a KL of .981 so, at 1.005 where rounding counts half (12 × 512 tokens, 20 windows of held-out C4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from planish.core import Frontier, Solver, Unit, Weights
from planish.modelling.families import ATTENTION, MLP
from planish.plan.allocate import Curve
from planish.plan.problem import Problem
from planish.plan.targets import Rounded
from planish.rounding.gauges_maps import foresee, measure_energy
from planish.rounding.types import Choice, integer
from planish.solvers.forms import input_site
from planish.solvers.two_sided import TwoSided
from planish.stats import Stats, Tap

FINE = 8  # bits from which rounding costs nothing
GROUP = 64  # weights that share a scale, or as many as divide the width
SLOPE = 2.0  # of the factor above, in the share of the rank that goes
START = {True: 1.0, False: 2.2}  # where nearly all of it stays: in attention, in feed-forwards


def forecast(problem: Problem, unit: Unit, weights: Weights, stats: Stats) -> float:
    """D of a linear's dense weights, times (2^b − 1)², also where nothing is rounded: it is kept for plans that round. 0 for what
    is no linear that competes.

    Where G is only known as Wᵀ G W every output is weighed alike.
    """
    solver: Solver = problem.units[unit]
    solver = solver.solver if isinstance(solver, Rounded) else solver
    if not isinstance(solver, TwoSided) or not solver.by_tokens:
        return 0.0
    w, metric = weights[unit.name].double(), solver.metric_tap(unit, problem.shapes[unit.block])
    group = next(g for g in range(min(GROUP, w.shape[1]), 0, -1) if w.shape[1] % g == 0)
    energy = measure_energy(stats.mean(Tap(f"dense:{input_site(unit.name)}", "gram")))
    rows, gradient = foresee(w, energy, integer(1, group)), stats.mean(metric).diagonal()
    if metric.site.endswith(".back"):
        return float(gradient.sum() / w.square().sum().clamp(min=1e-300) * rows.sum()) / 2
    return float(rows @ gradient) / 2


def is_priced(rounds: Choice | None) -> bool:
    return rounds is not None and rounds.bits < FINE


def add_rounding(
    problem: Problem, curves: Mapping[Unit, Curve], frontiers: Mapping[Unit, Frontier]
) -> dict[Unit, Curve]:
    """Curves with what rounding what is left costs beside the cut."""
    if not is_priced(problem.rounds):
        return dict(curves)
    assert problem.rounds is not None
    step = (2 ** float(problem.rounds.mean or problem.rounds.bits) - 1) ** -2
    found = {}
    for unit, curve in curves.items():
        linears = [Unit(unit.block, r) for r in problem.shapes[unit.block].held(unit.name)]
        whole = step * sum(frontiers[u].rough for u in linears if u in frontiers)
        found[unit] = replace(curve, loss=curve.loss + whole * scale(unit, curve.ranks / problem.full(unit)))
    return found


def scale(unit: Unit, left: Tensor) -> Tensor:
    """Of what rounding a unit costs uncut, how much it costs where these shares of its rank are left."""
    if unit.name in ("attention", "ffn"):  # a bypass has next to no weights
        return (left == 1).double()
    if unit.name not in ATTENTION + MLP:
        return left.double()
    return torch.where(left == 1, 1.0, START[unit.name in ATTENTION] + SLOPE * (1 - left.double()))
