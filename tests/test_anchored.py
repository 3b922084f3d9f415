"""Linears fitted, before they are rounded, to what they made of the inputs of unrounded blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from planish.calibrate.beside import measure_beside
from planish.calibrate.linears import list_experts, list_seen, measure_grams
from planish.calibrate.stream import Stream
from planish.folder.source import open_source
from planish.modelling.blocks import read_layout
from planish.solvers.linalg import anchor
from planish.walks.anchored import anchor_block

IDS = tiny.windows(6, 16)


@given(st.integers(0, 1 << 16), st.floats(0, 1), st.sampled_from([1e-3, 1e-2, 0.3]))
def test_the_fit_is_least_squares(seed, share, ridge):
    """W K is what rows of x̂, and of the ridge, make nearest to the mixture of W x̂ and W x, and to W."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    gram, moved = y.T @ y / 40, x.T @ y / 40
    level = (ridge * float(gram.diagonal().mean())) ** 0.5 * torch.eye(6, dtype=torch.float64)
    aims = torch.cat([((1 - share) * y + share * x) / 40**0.5, level]) @ w.T
    want = torch.linalg.lstsq(torch.cat([y / 40**0.5, level]), aims).solution.T
    assert torch.allclose(w @ anchor(gram, moved, share, ridge), want, atol=1e-9)


@torch.no_grad()
def open_beside(name):
    """A stream, its second block, its fitted linears, and inputs of it beside others."""
    stream = Stream(open_source(tiny.build(name)), IDS)
    block = stream.place(stream.block(1))
    experts = {n for own in list_experts(block, stream.family) for n in own}
    names = [n for n in list_seen(block, read_layout(block, stream.family, stream.source.config)) if n not in experts]
    beside = stream.run(0, stream.place(stream.block(0)), stream.start())
    generator = torch.Generator().manual_seed(1)
    hidden = [h + 0.1 * torch.randn(h.shape, generator=generator) for h in beside]
    return stream, block, names, hidden, beside


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "phi3", "gpt_neox", "qwen3_moe"])
@torch.no_grad()
def test_sums_of_both_inputs_are_those_of_hooks(name):
    """Σ x x̂ᵀ, x and x̂ what plain hooks see in two runs of the block, and what it makes of the inputs beside."""
    stream, block, names, hidden, beside = open_beside(name)
    found, after = measure_beside(stream, 1, block, names, hidden, beside)
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    handles = [block.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: seen[n].append(a[0])) for n in names]
    outputs = [[stream.forward(1, block, h, n) for n, h in enumerate(run)] for run in (beside, hidden)]
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(after, outputs[0], strict=True))
    assert set(found) == set(names)
    for n in names:
        x, y = (torch.cat(part).flatten(0, -2).double() for part in (seen[n][: len(beside)], seen[n][len(beside) :]))
        want = x.T @ y
        assert torch.allclose(found[n], want, atol=1e-9 * float(want.abs().max()))
    assert not any(m._forward_pre_hooks for m in block.modules())


@torch.no_grad()
def test_the_same_inputs_change_nothing():
    stream, block, names, hidden, _ = open_beside("llama_gqa")
    before = {n: t.clone() for n, t in block.state_dict().items()}
    grams = measure_grams(stream, 1, block, names, hidden)
    after = anchor_block(stream, 1, block, grams, hidden, [h.clone() for h in hidden], lambda name, w: False)
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(after, stream.run(1, block, hidden), strict=True))


@torch.no_grad()
def test_fitted_linears_come_nearer_and_others_stay():
    """Each output of a fitted linear is nearer to the mixture that it is fitted to; what is to be left is left."""
    stream, block, names, hidden, beside = open_beside("llama_gqa")
    before = {n: block.get_submodule(n).weight.clone() for n in names}
    count = sum(h.shape[0] * h.shape[1] for h in hidden)
    grams = {n: g / count for n, g in measure_grams(stream, 1, block, names, hidden).items()}
    moved, _ = measure_beside(stream, 1, block, names, hidden, beside)
    stays = names[0]
    anchor_block(stream, 1, block, grams, hidden, beside, lambda name, w: name == f"{stays}.weight")
    assert torch.equal(block.get_submodule(stays).weight, before[stays])
    for n in names[1:]:
        w, new = before[n].double(), block.get_submodule(n).weight.double()
        gram, aim = grams[n], 0.75 * w @ grams[n] + 0.25 * w @ moved[n] / count  # E[aim x̂ᵀ]

        def miss(v: torch.Tensor, gram: torch.Tensor = gram, aim: torch.Tensor = aim) -> float:
            return float(((v @ gram) * v).sum() - 2 * (aim * v).sum())  # E|aim − V x̂|² but for a constant

        assert miss(new) < miss(w)
