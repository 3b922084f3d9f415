"""What matrices cost in types: prices against rounding to every type with all that is tried, the choice, what is remembered."""

from __future__ import annotations

import json

import pytest
import torch

import planish
from planish.plan.types import Offer, choose_types
from planish.rounding.prices import price
from planish.rounding.round import Metric, round_matrix
from planish.rounding.types import choose, integer
from planish.walks import prices
from tiny import build, pick, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
IDS = windows(12, 24)


def make_matrix(seed: int, out: int, n: int) -> tuple[torch.Tensor, Metric]:
    """Weights and moments of inputs of which a few channels are large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6 * n, n, generator=g).double() @ torch.randn(n, n, generator=g).double() / n**0.5
    x[:, : n // 16] *= 8
    d = torch.randn(4 * out, out, generator=g).double() @ torch.randn(out, out, generator=g).double() / out**0.5
    return torch.randn(out, n, generator=g) / n**0.5, Metric(x.T @ x / len(x), d.T @ d / len(d))


def round_all(w, kinds, metric, where, read=torch.float32):
    """The naive program: everything that is tried where a matrix is rounded."""
    return [round_matrix(w, k, metric, where=where, dtype=read).nats or 0.0 for k in kinds]


@pytest.mark.parametrize(("target", "asked"), [("any", "3.3"), ("gguf", "4.5")])
@pytest.mark.parametrize(("out", "n"), [(24, 64), (64, 192)])
def test_prices_are_those_of_rounding(target, asked, out, n):
    """Never below what the best of all drafts costs by more than a tenth of it, hardly above; falling with the bits."""
    if target == "gguf":
        pytest.importorskip("xllamacpp")
    kinds = choose(asked, target).ladder(n, "")
    for seed in range(3):
        w, metric = make_matrix(seed, out, n)
        found, whole = price(w, kinds, metric, ""), round_all(w, kinds, metric, "")
        assert found == sorted(found, reverse=True)
        assert all(0.9 * b <= a <= 1.5 * b for a, b in zip(found, whole, strict=True))
        if target == "any":
            assert found[0] == pytest.approx(whole[0], rel=0.02)  # there both orders are tried


def test_a_matrix_on_a_grid_costs_nothing_there():
    kinds = choose("3.3", "any").ladder(64, "")
    w, metric = make_matrix(0, 32, 64)
    lies = round_matrix(w, integer(4, 64, zero=True), metric).value
    found = price(lies, kinds, metric, "")
    assert found[2] == 0 and found[0] > found[1] > 0


@pytest.mark.parametrize("gradient", [None, "diagonal"])
def test_prices_without_moments(gradient):
    kinds = choose("3.3", "any").ladder(64, "")
    w, metric = make_matrix(0, 32, 64)
    known = None if gradient is None else metric.gradient.diagonal()
    assert price(w, kinds, Metric(None, known), "") == round_all(w, kinds, Metric(None, known), "")
    found = price(w, kinds, Metric(metric.moment, known), "")
    assert all(n == 0 for n in found) if gradient is None else found == sorted(found, reverse=True)


@pytest.mark.parametrize("mean", pick([3.3], [2.6, 3.3, 4.5]))
def test_the_choice_is_that_of_rounding_to_every_type(mean):
    """By what rounding with all drafts costs, the types chosen of these few matrices are within two percent of the best ones."""
    cheap, whole = {}, {}
    for seed in range(12):
        w, metric = make_matrix(seed, 32 + 16 * (seed % 3), 64 * (1 + seed % 2))
        metric = Metric(metric.moment, metric.gradient * 4.0 ** (seed % 4))
        kinds = choose("3.3", "any").ladder(w.shape[1], "")
        for found, nats in ((cheap, price(w, kinds, metric, "")), (whole, round_all(w, kinds, metric, ""))):
            found[str(seed)] = [Offer(k, *w.shape, v) for k, v in zip(kinds, nats, strict=True)]

    def cost(types):
        return sum(next(o.nats for o in whole[n] if o.kind == k) for n, k in types.items())

    assert cost(choose_types(cheap, mean)) <= 1.02 * cost(choose_types(whole, mean))


def test_a_model_is_priced_once(tmp_path, monkeypatch):
    """A second mean, and a second command with a cache on disk, round nothing for prices; the result is that of pricing anew. A cut
    model is priced again."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    calls = []

    def count(*args):
        calls.append(args[3])
        return price(*args)

    monkeypatch.setattr(prices, "price", count)
    model = save(build("llama_gqa", hidden_size=32, intermediate_size=64, num_hidden_layers=2), tmp_path / "model")
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24}

    def make(name, **options):
        planish.compress(model, output=tmp_path / name, **text, **options)
        linears = json.loads((tmp_path / name / "planish.json").read_text())["rounding"]
        return {n: entry["type"] for n, entry in linears.items()}

    first = make("first", keep=1, bits="3.6", cache=True)
    assert len(calls) == 14
    assert make("again", keep=1, bits="3.6", cache=True) == first
    other = make("other", keep=1, bits="4.2", cache=True)
    assert len(calls) == 14 and other != first
    assert make("apart", keep=1, bits="4.2") == other
    assert len(calls) == 28
    make("cut", keep=0.8, bits="4.2", method="flat-llm", cache=True)
    assert len(calls) > 28


def test_choices_are_those_of_pricing_everything(tmp_path, monkeypatch):
    """On a tiny model the same types as with the naive program."""
    model = save(build("llama_gqa", hidden_size=64, intermediate_size=128, num_hidden_layers=2), tmp_path / "model")
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24, "keep": 1}
    nats = []
    for name in ("few", "all"):
        done = planish.compress(model, output=tmp_path / name, bits="3.3", **text)
        nats.append(done.rounding["nats"])
        monkeypatch.setattr(prices, "price", round_all)
    assert nats[0] == pytest.approx(nats[1], rel=0.01)
