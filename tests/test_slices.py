"""Sums of products from digits that fp32 multiplies exactly: against fp64, by their bounds, and in a whole run."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from planish import slices
from planish.calibrate import beside, collect, linears
from planish.slices import BITS, LEVELS, RUN, SLICED, cut_digits, is_fp64_slow
from planish.stats import Stats, Tap, add_cross, add_gram
from tiny import compress, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw_numbers(tokens: int, n: int, spread: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Channels whose sizes differ by up to 2^spread, one massive token, one channel of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) * 2 ** (spread * (torch.rand(n, generator=g) - 0.5))
    x[0] *= 2 ** (spread / 2)
    x[:, -1] = 0
    return x.clamp(-6e4, 6e4).to(dtype)


def limit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    largest = (t.double().abs().amax(0) for t in (x, y))
    return len(x) * 2.0**-38 * torch.outer(*largest)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1300), st.integers(2, 9), st.floats(0, 30), st.integers(0, 9), st.sampled_from(DTYPES))
def test_sums_are_those_of_fp64(tokens, n, spread, seed, dtype):
    x, y = (draw_numbers(tokens, n, spread, seed + k, dtype) for k in (0, 1))
    sums, cross = {}, {}
    add_gram(sums, x, SLICED)
    add_cross(cross, y, x, SLICED)
    upper = (sums["sum"] - x.double().T @ x.double()).triu().abs()
    assert (upper <= limit(x, x)).all()
    assert ((cross["sum"] - y.double().T @ x.double()).abs() <= limit(y, x)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.floats(0, 60), st.integers(0, 9))
def test_digits_are_whole_small_and_give_the_number_back(tokens, spread, seed):
    x = draw_numbers(tokens, 5, spread, seed, torch.float32)
    d = cut_digits(x)
    assert torch.equal(d.digits, d.digits.round())
    assert d.digits[0].abs().max() <= 2**BITS and d.digits[1:].abs().max() <= 2 ** (BITS - 1)
    assert torch.equal(d.digits, d.digits.bfloat16().float())  # so a tensor core holds them
    back = sum(d.digits[s].double() * 2.0 ** (-BITS * (s + 1)) for s in range(LEVELS)) * d.scale
    assert ((back - x.double()).abs() <= 2.0**-43 * d.scale).all()


def test_the_largest_sum_of_a_level_is_a_whole_number_of_fp32():
    first, other = 2**BITS, 2 ** (BITS - 1)
    for level in range(LEVELS):
        sizes = [(first if r == 0 else other) * (first if level - r == 0 else other) for r in range(level + 1)]
        assert RUN * sum(sizes) <= 2**24


def test_no_product_is_in_fp64():
    """Counted by dtype: sums by digits have fp64 additions only, and as many fp32 products as levels allow."""
    counted: dict[torch.dtype, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
                counted[a.dtype] = counted.get(a.dtype, 0) + 2 * a.shape[0] * a.shape[1] * b.shape[1]
            return function(*args, **(kwargs or {}))

    x = torch.randn(2 * RUN, 96)
    for run, dtype, products in ((torch.float64, torch.float64, 1), (SLICED, torch.float32, LEVELS * (LEVELS + 1) / 2)):
        counted.clear()
        with Count():
            add_cross({}, x, x, run)
        assert counted == {dtype: products * 2 * len(x) * 96 * 96}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_none(bad):
    x = torch.randn(4, 3)
    x[1, 1] = bad
    stats = Stats([Tap("o.in", "gram")], SLICED)
    stats.update({"o.in": x[None]})
    found = stats.sums[Tap("o.in", "gram")]["sum"].isfinite()
    assert not found[1].any() and found[[0, 2]][:, [0, 2]].all()


@pytest.mark.parametrize("method", [pytest.param("auto", marks=pytest.mark.slow), "a3", "svd-llm"])
def test_a_run_with_sums_by_digits_chooses_the_same_ranks(method, monkeypatch, tmp_path):
    """Hardly more calibration tokens than neurons: badly conditioned moments are held to the same."""
    model, windows = tiny.build("llama_gqa"), tiny.windows(3, 16)
    found = {}
    for run in (torch.float64, SLICED):
        monkeypatch.setattr(collect, "choose_run", lambda stream, run=run: run)
        folder = tmp_path / str(run)
        compress(model, output=folder, windows=windows, method=method, keep=0.7)
        plan = json.loads((folder / "planish.json").read_text())["plan"]
        with torch.no_grad():
            found[run] = plan, load(folder)(windows).logits
    (plain, a), (digits, b) = found.values()
    assert digits == plain
    assert (a - b).abs().max() <= 1e-3 * a.abs().max()


def test_rounding_sums_by_digits_too(monkeypatch, tmp_path):
    """Moments of inputs, of gradients and across two models: all that is summed, and the same codes but for a few."""
    model, found, formed = tiny.build("llama_gqa"), {}, []
    for slow in (False, True):
        monkeypatch.setattr(slices, "is_fp64_slow", lambda device, slow=slow: slow)
        for module, name in ((linears, "add_gram"), (beside, "add_cross")):
            plain = {"add_gram": add_gram, "add_cross": add_cross}[name]
            monkeypatch.setattr(module, name, lambda *a, plain=plain: [formed.append(a[-1]), plain(*a)])
        folder = tmp_path / str(slow)
        compress(model, output=folder, windows=tiny.windows(8, 16), method="a3", keep=0.8, bits="4", target="hf")
        found[slow] = torch.cat([p.flatten() for p in load(folder).parameters()])
        assert formed and set(formed) == {SLICED if slow else torch.float64}
        formed.clear()
    assert (found[True] != found[False]).double().mean() < 0.01


def test_a_cpu_sums_in_fp64():
    assert not is_fp64_slow(torch.device("cpu"))
