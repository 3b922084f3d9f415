"""Work inside a Gram: the results of the plain formulas, and the Gram as it was."""

from __future__ import annotations

import pytest
import torch

import tiny
from planish import stats
from planish.calibrate.collect import measure_block
from planish.calibrate.stream import Stream
from planish.folder.source import MemorySource
from planish.solvers import grams, linalg, selection
from planish.stats import Stats, Tap
from test_resume import hashes, one_thread  # noqa: F401
from tiny import compress

SIZES = [1, 5, 63, 64, 65, 160]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(grams, "TILE", 64)


def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2 * n + 3, n, dtype=torch.float64, generator=g) * torch.logspace(0, -3, n, dtype=torch.float64)
    return x.T @ x, torch.randn(7, n, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("n", SIZES)
def test_factor_and_restore(n, small_tiles):
    gram, w = draw(n)
    gram = linalg.symmetrise(gram)
    before = gram.clone()
    with grams.factored(gram, 1e-8) as level:
        lower = gram.tril()
        damped = before + level * torch.eye(n, dtype=gram.dtype)
        torch.testing.assert_close(lower @ lower.T, damped, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
        torch.testing.assert_close(lower, linalg.root(before, 1e-8), rtol=1e-6, atol=1e-8 * float(lower.abs().max()))
        torch.testing.assert_close(grams.times_factor(w.clone(), gram), w @ lower)
        torch.testing.assert_close(grams.over_factor(w, gram) @ lower, w)
        torch.testing.assert_close(grams.inverse_diagonal(gram), torch.linalg.inv(damped).diagonal(), rtol=1e-6, atol=0)
    assert torch.equal(gram, before)


def test_factor_of_a_singular_gram_raises_the_damping():
    x = torch.randn(3, 700, dtype=torch.float64)
    gram = linalg.symmetrise(x.T @ x)
    before = gram.clone()
    with pytest.warns(UserWarning, match="damping raised"), grams.factored(gram, 0.0):
        assert torch.isfinite(gram).all()
    assert torch.equal(gram, before)
    with pytest.raises(ValueError, match="NaN"), grams.factored(torch.full((4, 4), float("nan")).double(), 1e-8):
        pass


@pytest.mark.parametrize("n", SIZES)
def test_same_as_the_plain_formulas(n, small_tiles):
    gram, w = draw(n)
    gram = linalg.symmetrise(gram)
    before, order = gram.clone(), torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        grams.ridge_leverage(gram, 1e-2), selection.ridge_leverage(before, 1e-2), rtol=1e-8, atol=1e-10
    )
    assert torch.equal(gram, before)
    scale = float(((w @ before) * w).sum())
    losses = grams.slicing_losses(before.clone(), w, order)
    torch.testing.assert_close(
        losses, selection.selection_losses(before, w, order, False), rtol=1e-9, atol=1e-10 * scale
    )
    refits = grams.Refits(gram, w, order, 1e-12)
    expected = selection.selection_losses(before, w, order, True, 1e-12)
    torch.testing.assert_close(refits.losses(), expected, rtol=1e-7, atol=1e-10 * scale)
    for rank in {1, n // 2, n} - {0}:
        kept, new = refits.at(rank)
        assert kept.tolist() == sorted(order[:rank].tolist())
        error = w.clone()
        error[:, kept] -= new
        found = float(((error @ before) * error).sum())
        assert found == pytest.approx(float(expected[rank]), rel=1e-5, abs=1e-9 * scale)


@pytest.mark.parametrize("part", ["all", "fit", "held"])
def test_wide_gram_has_the_same_bits(part, monkeypatch):
    """Lanes that are added row by row, and lanes that are Grams of their own."""
    stream = Stream(MemorySource(tiny.build("llama_gqa")), tiny.windows(40, 24))
    stream.batches = list(tiny.windows(40, 24).split(4))  # ten batches, eight lanes
    taps = [Tap("down.in", "gram", part=part), Tap("q.in", "gram", part=part)]
    found = []
    for wide in (1 << 30, 0):
        monkeypatch.setattr(stats, "WIDE", wide)
        found.append(measure_block(stream, 0, stream.block(0), taps, stream.start())[0])
    for tap in taps:
        assert torch.equal(found[0].sums[tap]["sum"], found[1].sums[tap]["sum"])
        assert found[0].tokens[tap] == found[1].tokens[tap]


def test_taking_a_wide_sum(monkeypatch):
    held, tap = Stats([Tap("q.in", "gram")]), Tap("q.in", "gram")
    held.update({"q.in": torch.randn(5, 3)})
    copy, tokens = held.take(tap)
    assert tokens == 5 and copy is not held.sums[tap]["sum"]
    monkeypatch.setattr(stats, "WIDE", 0)
    assert torch.equal(held.take(tap)[0], copy) and not held.sums[tap]


SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("a3", "modegpt", "svd-llm", "auto", "mpifa", "slicegpt")]


@pytest.mark.parametrize("method", ["flat-llm", *SLOW])
def test_wide_grams_give_the_same_model(method, tmp_path, monkeypatch):
    model = tiny.save(tiny.build("llama_gqa"), tmp_path / "model")
    windows = torch.randint(0, 90, (300, 64), generator=torch.Generator().manual_seed(0))
    for name, wide in (("narrow", 1 << 30), ("wide", 0)):
        monkeypatch.setattr(stats, "WIDE", wide)
        compress(model, output=tmp_path / name, keep=0.7, method=method, windows=windows)
    assert hashes(tmp_path / "wide") == hashes(tmp_path / "narrow")
