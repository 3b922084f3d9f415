"""Rounding's price beside that of a cut: forecast, and what it makes `auto` leave."""

from __future__ import annotations

import json

import pytest
import torch

import planish
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream, read_weights
from planish.core import Unit
from planish.folder.source import open_source
from planish.methods import find_method, pose
from planish.plan.frontiers import dense_taps, measure_gradients
from planish.plan.rough import START, add_rounding, forecast, scale
from planish.request import Limits
from planish.rounding.round import Metric, round_matrix
from planish.rounding.types import choose
from planish.solvers.forms import input_site
from planish.stats import Tap
from tiny import build, save, windows

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
IDS = windows(16, 32)
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize("bits", ["2", "3", "4"])
def test_the_forecast_is_what_rounding_costs(bits):
    """Within a factor of two of ½ tr(G E R Eᵀ) of each matrix really rounded, G of what is known from the input as its mean."""
    source = open_source(build("llama_gqa", **WIDE))
    problem = pose(find_method("auto"), source, Limits(keep=0.5), target=choose(bits, "any"))
    measure = Measurements(Stream(source, IDS))
    stored = {}
    for i, block, stats in measure.backward(lambda shape: dense_taps(problem, shape.block), probe="signs"):
        weights = read_weights(block, measure.stream)
        for role in ROLES:
            unit = Unit(i, role)
            metric = problem.units[unit].solver.metric_tap(unit, problem.shapes[i])
            w, g = weights[role], stats.mean(metric).diagonal()
            g = g if metric.site.endswith(".out") else torch.full((len(w),), float(g.sum() / w.double().square().sum()))
            kind = choose(bits, "any").pick(w.shape[1], role, len(w))
            real = round_matrix(w, kind, Metric(stats.mean(Tap(f"dense:{input_site(role)}", "gram")), g.double()))
            stored[unit] = forecast(problem, unit, weights, stats) / (2 ** int(bits) - 1) ** 2 / real.nats
    assert len(stored) == 2 * len(ROLES)
    assert all(0.5 < ratio < 2 for ratio in stored.values()), stored


def test_rounding_costs_nothing_where_nothing_is_rounded():
    """It is forecast in any case, the same for every target, and counts below 8 bits."""
    source, forecasts = open_source(build("llama_gqa", **WIDE)), []
    for target in ("any", choose("8", "any"), choose("4", "any")):
        problem = pose(find_method("auto"), source, Limits(keep=0.5), target=target)
        found = measure_gradients(problem, Measurements(Stream(source, IDS)), "signs")
        forecasts.append({u: f.rough for u, f in found.items()})
        curves = {u: problem.curve(f) for u, f in found.items()}
        rounded = add_rounding(problem, curves, found)
        cost = {u: float((rounded[u].loss - c.loss).max()) for u, c in curves.items()}
        held = {u for u in cost if any(found[Unit(u.block, r)].rough for r in problem.shapes[u.block].held(u.name))}
        assert held and {u for u, c in cost.items() if c > 0} == (held if target == choose("4", "any") else set())
    assert forecasts[0] == forecasts[1] == forecasts[2]


def test_what_stays_is_rounded():
    """Dense shapes by their share, bypasses not at all, pivoted linears more than whole ones; whole units as they are."""
    left = torch.tensor([0.25, 0.5, 0.999, 1.0], dtype=torch.float64)
    assert torch.equal(scale(Unit(0, "mlp"), left), left)
    assert scale(Unit(0, "ffn"), left).tolist() == [0, 0, 0, 1]
    for name, first in (("q", START[True]), ("up", START[False])):
        factor = scale(Unit(0, name), left)
        assert factor[-1] == 1 and bool((factor[:-1] >= first).all()) and bool((factor[:-2] > factor[1:-1]).all())


def test_fewer_bits_leave_fewer_low_rank_linears(tmp_path):
    """In 2 bits rounding is most of the loss, and pivoted linears round worst."""
    pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
    model, cut = save(build("llama_gqa", **WIDE), tmp_path / "model"), {}
    for bits in (8, 2):
        out = tmp_path / str(bits)
        planish.compress(
            model,
            output=out,
            keep=0.8,
            method="auto",
            bits=bits,
            calibration=IDS.flatten().numpy(),
            n_samples=16,
            seq_len=32,
        )
        cut[bits] = json.loads((out / "planish.json").read_text())["notes"]["units cut"]
    low = {bits: sum(n for name, n in found.items() if name in ROLES) for bits, found in cut.items()}
    assert low[2] < low[8], cut
