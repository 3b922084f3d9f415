"""Noise beside moments: what it is worth in tokens, and that solvers with it do what they would with noisy tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from planish.core import Unit
from planish.folder.source import open_source
from planish.solvers.fisher_structural import FisherNeurons, FisherValues
from planish.solvers.noise import MOST, TOKENS, Noise
from planish.solvers.two_sided import TwoSided
from planish.stats import Stats, Tap

SHAPE = open_source(tiny.build("llama_gqa")).shape(0)
N, LEVELS = (
    700,
    {
        "inputs": min(TOKENS["inputs"] / 700, MOST["inputs"]),
        "gradients": min(TOKENS["gradients"] / 700, MOST["gradients"]),
    },
)


def draw(*size: int, seed: int = 0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def add_rows(x, level: float):
    """Tokens (n, channels) with more that hold `level` times their mean square in every channel alone, as many of each."""
    scale = (level * len(x) * x.square().mean()).sqrt()
    return torch.cat([x, scale * torch.eye(x.shape[1], dtype=x.dtype)])


def second(x, tokens: int):
    return x.T @ x / tokens


@given(tokens=st.integers(1, 10**7), share=st.floats(0, 10))
def test_noise_falls_as_tokens_come_in(tokens, share):
    for site, kind in (("up.in", "inputs"), ("dense:up.in", "inputs"), ("grad:up.out", "gradients")):
        stats, tap = Stats(), Tap(site, "gram")
        stats.tokens[tap] = tokens
        level = Noise(share).find(stats, tap, True)
        assert 0 <= level <= share * MOST[kind]
        stats.tokens[tap] = 2 * tokens
        assert Noise(share).find(stats, tap, True) in (level, pytest.approx(level / 2)) or level == share * MOST[kind]


@pytest.mark.parametrize("role", ["q", "up", "down"])
def test_low_rank_linears_are_those_of_noisy_tokens(role):
    """The truncation of G^½ W R^½ with noisy tokens and gradients written out, also where only Wᵀ G W is measured, and its loss."""
    solver, unit = TwoSided(form="pair", noise=Noise(1)), Unit(0, role)
    out, n = SHAPE.linear(role)
    w, x, g = (
        draw(out, n),
        draw(N, n, seed=1) * torch.linspace(0.1, 3, n),
        draw(N, out, seed=2) * torch.linspace(0.2, 2, out),
    )
    (metric,) = (t for t in solver.taps(unit, SHAPE) if t.site.startswith("grad:"))
    back = metric.site.endswith(".back")
    (site,) = (t for t in solver.taps(unit, SHAPE) if t != metric)
    stats = Stats()
    stats.update({metric.site: g @ w if back else g, site.site: x}, [metric, site])
    frontier = solver.decompose(unit, {role: w}, stats, SHAPE)
    r = second(add_rows(x, LEVELS["inputs"]), N)
    noisy = second(g, N)
    level = LEVELS["gradients"] * (torch.trace(w.T @ noisy @ w) / w.square().sum() if back else noisy.diagonal().mean())
    noisy += level * torch.eye(out, dtype=torch.float64)
    (edit,) = solver.truncate(frontier, 4, SHAPE)
    e = w - edit.tensors["B.weight"] @ edit.tensors["A.weight"]
    priced = float(torch.trace(noisy @ e @ r @ e.T)) / 2
    left, right = torch.linalg.cholesky(noisy), torch.linalg.cholesky(r)
    least = float(torch.linalg.svdvals(left.T @ w @ right)[4:].square().sum()) / 2
    assert priced == pytest.approx(least, rel=1e-6) and float(frontier.loss[4]) == pytest.approx(least, rel=1e-6)


def test_neurons_and_down_are_those_of_noisy_tokens():
    """down is the least squares fit to W x of the tokens and of noise alone, in every neuron; its loss is that fit's."""
    solver, unit = FisherNeurons(noise=Noise(1), damping=1e-12), Unit(0, "mlp")
    wide, hidden = SHAPE.intermediate, SHAPE.hidden
    weights = {"down": draw(hidden, wide), "gate": draw(wide, hidden, seed=3), "up": draw(wide, hidden, seed=4)}
    x, g = draw(N, wide, seed=1) @ (torch.eye(wide) + 0.2 * draw(wide, wide, seed=5)), draw(N, hidden, seed=2)
    stats = Stats()
    stats.update({"dense:down.in": x, "grad:down.out": g}, solver.dense_taps(unit, SHAPE))
    frontier = solver.decompose(unit, weights, stats, SHAPE)
    rank = wide * 2 // 3
    down = next(e for e in solver.truncate(frontier, rank, SHAPE) if e.target == "down").tensors["weight"]
    kept = frontier.factors["order"][:rank].sort().values
    rows, target = add_rows(x, LEVELS["inputs"]), weights["down"].T
    fit = torch.linalg.lstsq(rows[:, kept], rows @ target).solution
    torch.testing.assert_close(down, fit.T, rtol=1e-6, atol=1e-8)
    e = rows @ target - rows[:, kept] @ fit
    noisy = second(add_rows(g, LEVELS["gradients"]), N)
    assert float(frontier.loss[rank]) == pytest.approx(float(torch.trace(noisy @ second(e, N))) / 2, rel=1e-6)


def test_values_and_o_are_those_of_noisy_tokens():
    """o, on the value dimensions that are left, is the least squares fit to the tokens and to noise alone."""
    solver, unit = FisherValues(noise=Noise(1), damping=1e-12), Unit(0, "vo")
    width, hidden = SHAPE.heads * SHAPE.v, SHAPE.hidden
    weights = {"o": draw(hidden, width), "v": draw(SHAPE.kv_heads * SHAPE.v, hidden, seed=3)}
    x, g = draw(N, width, seed=1) @ (torch.eye(width) + 0.2 * draw(width, width, seed=5)), draw(N, hidden, seed=2)
    stats = Stats()
    stats.update({"dense:o.in": x, "grad:o.out": g}, solver.dense_taps(unit, SHAPE))
    frontier = solver.decompose(unit, weights, stats, SHAPE)
    rank = SHAPE.v // 2
    edits = {e.target: e.tensors for e in solver.truncate(frontier, rank, SHAPE)}
    rows = add_rows(x, LEVELS["inputs"])
    p = torch.block_diag(*frontier.factors["P"][..., :rank].repeat_interleave(SHAPE.groups, 0))
    fit = torch.linalg.lstsq(rows @ p, rows @ weights["o"].T).solution
    torch.testing.assert_close(edits["o"]["weight"], fit.T, rtol=1e-5, atol=1e-7)
    e = rows @ weights["o"].T - rows @ p @ fit
    noisy = second(add_rows(g, LEVELS["gradients"]), N)
    assert float(frontier.loss[rank]) == pytest.approx(float(torch.trace(noisy @ second(e, N))) / 2, rel=1e-5)


def test_predictions_hold_on_other_text():
    """Of tokens from one distribution a cut costs on as many others what is predicted with noise rather than without;
    and less than the one chosen without."""
    unit, role = Unit(0, "down"), "down"
    out, n = SHAPE.linear(role)
    w, spread = draw(out, n), torch.linspace(0.05, 2, n)

    def tokens(seed: int):
        return draw(150, n, seed=seed) * spread, draw(150, out, seed=seed + 50)

    ratios, prices = {0.0: [], 1.0: []}, {0.0: 0.0, 1.0: 0.0}
    for seed in range(1, 7):
        (x, g), (other, way) = tokens(seed), tokens(seed + 100)
        for noise in ratios:
            solver, stats = TwoSided(form="pair", noise=Noise(noise)), Stats()
            stats.update({"dense:down.in": x, "grad:down.out": g}, solver.taps(unit, SHAPE))
            frontier = solver.decompose(unit, {role: w}, stats, SHAPE)
            rank = min(out, n) // 2
            (edit,) = solver.truncate(frontier, rank, SHAPE)
            e = w - edit.tensors["B.weight"] @ edit.tensors["A.weight"]
            price = float(torch.trace(second(way, 150) @ e @ second(other, 150) @ e.T)) / 2
            ratios[noise].append(float(frontier.loss[rank]) / price)
            prices[noise] += price
    low, honest = (sum(r) / len(r) for r in (ratios[0.0], ratios[1.0]))
    assert low < 0.8 and abs(honest - 1) < abs(low - 1)
    assert prices[1.0] < prices[0.0]


@pytest.mark.parametrize("kind", [TwoSided, FisherNeurons])
def test_prices_hold_a_share_of_the_noise_and_solves_all_of_it(kind):
    """On the uncompressed model's moments, and behind the compressed prefix."""
    unit = Unit(0, "down" if kind is TwoSided else "mlp")
    wide, hidden = SHAPE.intermediate, SHAPE.hidden
    weights = {"down": draw(hidden, wide), "gate": draw(wide, hidden, seed=3), "up": draw(wide, hidden, seed=4)}
    x = draw(N, wide, seed=1)
    values = {"dense:down.in": x, "down.in": x, "dense:down.product": x @ weights["down"].T}
    values["grad:down.out"] = draw(N, hidden, seed=2)
    dense, behind = Stats(), Stats()
    dense.update(values, kind(noise=Noise(1), anchor=0.5).dense_taps(unit, SHAPE))
    behind.update(values, kind(noise=Noise(1), anchor=0.5).taps(unit, SHAPE))

    def lose(stats, noise: float, priced: float = 1.0):
        return kind(noise=Noise(noise, priced), anchor=0.5).decompose(unit, weights, stats, SHAPE).loss

    assert torch.equal(lose(dense, 1.0, 0.25), lose(dense, 0.25))
    assert torch.equal(lose(behind, 1.0, 0.25), lose(behind, 1.0))
