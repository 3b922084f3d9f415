"""Sums behind taps: one pass, many batches and several processes give the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from planish.stats import CHUNK, KINDS, LEAF, TILE, Stats, Tap

SITES = ("o.in", "dense:o.in", "v.out")
TAPS = [
    Tap("o.in", "gram"), Tap("o.in", "cross", "v.out"), Tap("o.in", "head_gram", heads=4), Tap("o.in", "squares"),
    Tap("o.in", "magnitudes"), Tap("o.in", "angle", "dense:o.in"), Tap("o.in", "moments", "dense:o.in"),
    Tap("o.in", "gram", part="held"),
]  # fmt: skip


def batch(n: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.randn(n, 5, 8, generator=generator).to(dtype) for s in SITES}


def one_pass(batches: list[dict[str, Tensor]], taps=TAPS) -> Stats:
    stats = Stats(taps)
    for values in batches:
        stats.update(values)
    return stats


def assert_same(a: Stats, b: Stats) -> None:
    assert a.tokens == b.tokens and set(a.sums) == set(b.sums)
    for tap, sums in a.sums.items():
        for name, t in sums.items():
            torch.testing.assert_close(b.sums[tap][name], t, rtol=1e-12, atol=1e-12)


def test_every_kind_against_a_loop():
    values = batch(3, 0)
    stats = one_pass([values])
    x, y, z = (values[s].flatten(0, 1).double() for s in SITES)
    assert stats.tokens[TAPS[0]] == 15
    torch.testing.assert_close(stats.mean(TAPS[0]), sum(torch.outer(t, t) for t in x) / 15)
    torch.testing.assert_close(stats.sums[TAPS[1]]["sum"], sum(torch.outer(a, b) for a, b in zip(x, z)))
    heads = torch.stack([sum(torch.outer(t, t) for t in x[:, 2 * h : 2 * h + 2]) for h in range(4)])
    torch.testing.assert_close(stats.sums[TAPS[2]]["sum"], heads)
    torch.testing.assert_close(stats.sums[TAPS[3]]["sum"], (x * x).sum(0))
    torch.testing.assert_close(stats.sums[TAPS[4]]["sum"], x.abs().sum(0))
    cosines = torch.stack([(a @ b) / a.norm() / b.norm() for a, b in zip(x, y)])
    torch.testing.assert_close(stats.sums[TAPS[5]]["cosine"], cosines.sum())
    torch.testing.assert_close(stats.mean(TAPS[5], "angle"), (cosines.clamp(0, 1).arccos() / torch.pi).mean())
    moments = stats.sums[TAPS[6]]
    torch.testing.assert_close(moments["xf"], sum(torch.outer(a, b) for a, b in zip(x, y)))
    torch.testing.assert_close(moments["ff"], (y * y).sum(0))
    torch.testing.assert_close(moments["x"], x.sum(0))


def test_batches_merge_and_save(tmp_path):
    batches = [batch(n, n) for n in (3, 1, 4)]
    whole = one_pass([{s: torch.cat([b[s] for b in batches]) for s in SITES}])
    assert_same(whole, one_pass(batches))
    total = Stats()
    for values in reversed(batches):
        total.merge(one_pass([values]))
    assert_same(whole, total)
    assert_same(whole, Stats.load(load(save(whole.state()))))
    again = Stats.load(load(save(one_pass(batches[:2]).state())))
    again.merge(one_pass(batches[2:]))
    assert_same(whole, again)


@pytest.mark.parametrize("kind", [k for k in ("gram", "cross") if k in KINDS])
def test_tiles_and_chunks(kind):
    """Sizes that fill no tile and no chunk evenly."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(CHUNK + 37, n, generator=generator, dtype=torch.float64) for n in (2 * TILE + LEAF + 19, 23))
    tap = Tap("a", "gram") if kind == "gram" else Tap("b", "cross", "a")
    stats = Stats([tap])
    stats.update({"a": x, "b": y})
    stats.update({"a": x[:5], "b": y[:5]})
    left, right = (torch.cat([t, t[:5]]) for t in ((x if kind == "gram" else y), x))
    torch.testing.assert_close(stats.sums[tap]["sum"], left.T @ right, rtol=1e-10, atol=1e-10)
    if kind == "gram":
        assert torch.equal(stats.sums[tap]["sum"], stats.sums[tap]["sum"].T)


def test_low_precision_activations_are_summed_in_fp64():
    values = batch(64, 1, torch.bfloat16)
    exact = one_pass([{s: t.double() for s, t in values.items()}])
    assert_same(exact, one_pass([values]))


@given(
    tokens=st.integers(1, 3 * CHUNK),
    large=st.dictionaries(st.integers(0, 39), st.floats(1e-4, 3e4), max_size=4),
    shift=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_rounding_of_a_run_is_bounded(tokens, large, shift, seed):
    """Summed in fp32: of every entry, relative to the two channels' norms; massive channels spoil none but themselves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 40, generator=generator) + shift
    for channel, scale in large.items():
        x[:, channel] *= scale
    taps = [Tap("a", "gram"), Tap("a", "cross", "b")]
    stats = Stats(taps, run=torch.float32)
    stats.update({"a": x, "b": x[:, :7]})
    exact, norms = x.double().T @ x.double(), x.double().norm(dim=0)
    for tap, n in zip(taps, (40, 7), strict=True):
        error = (stats.sums[tap]["sum"] - exact[:, :n]).abs()
        assert bool((error <= 3e-6 * norms[:, None] * norms[:n]).all())
