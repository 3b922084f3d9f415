"""cocurve against a naive program: models with zeros where a part was, effects token by token, every greedy step searched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.calibrate import losses
from planish.calibrate.stream import Stream
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import MemorySource
from planish.methods.cocurve import fit_gains, list_parts, pick, split_windows
from planish.modelling.blocks import find_blocks, get_linear
from planish.plan import ablations
from planish.plan.ablations import Part, measure_interactions
from planish.walks.solve import run_solved
from posed import Posed, pose_on
from tiny import compress

WINDOWS = tiny.windows(12, 24)


def stream(name: str = "llama_gqa") -> Stream:
    return Stream(MemorySource(tiny.build(name, torch.float64)), WINDOWS, dtype=torch.float64)


def without(s: Stream, parts: Iterable[Part]) -> nn.Module:
    small = copy.deepcopy(s.source.model)
    for p in parts:
        block = find_blocks(small, s.family)[p.block]
        linear = get_linear(block, s.family, "down" if p.last else "o")
        linear.weight.data[:, p.first : p.last if p.last else None] = 0
        if not p.last and linear.bias is not None:
            linear.bias.data.zero_()
    return small


@torch.no_grad()
def logits(model: nn.Module, windows: Tensor) -> Tensor:
    return model(windows, use_cache=False).logits.flatten(0, 1)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt_neox", "opt"])
def test_interactions_are_those_of_models_without_the_parts(name, monkeypatch):
    monkeypatch.setattr(ablations, "WORDS", 20)
    monkeypatch.setattr(ablations, "TOKENS", 17)
    s, few = stream(name), WINDOWS[:3]
    parts = [Part(0), Part(1), Part(0, 0, 7), Part(0, 7, 44), Part(1, 3, 9)]
    part = s.part(few)
    part.batches = list(few.split(2))
    found = measure_interactions(pose_on(s, "cocurve", 0.7).measure, part, parts)
    dense = logits(s.source.model, few)
    changes = [dense - logits(without(s, [p]), few) for p in parts]
    expected = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for t in range(len(dense)):
        words = dense[t].argsort(descending=True)[:20]
        p = dense[t, words].exp() / dense[t, words].exp().sum()
        phi = [p.sqrt() * (d[t, words] - (p * d[t, words]).sum()) for d in changes]
        expected += torch.tensor([[float(a @ b) for b in phi] for a in phi], dtype=torch.float64) / len(dense)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))  # norms are fp32


def job(keep: float, **settings: str) -> Posed:
    return pose_on(stream(), "cocurve", keep, settings={"windows": "2", "held": "2"} | settings)


def weights(p: Part) -> int:
    return 3 * 32 * (p.last - p.first) if p.last else 32 * 32 * 2 + 32 * 16 * 2


@pytest.mark.parametrize("coupling", [0.0, 0.6])
def test_the_next_part_loses_least_per_weight(coupling):
    j = job(0.6)
    parts = list_parts(j.problem)
    assert len(parts) == 3 + 3 * 16 and sum(map(weights, parts)) == j.problem.main.total
    sizes = [p.last - p.first for p in parts if p.last and p.block == 1]
    assert sum(sizes) == 44 and max(sizes) - min(sizes) == 1
    g = torch.randn(len(parts), 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = g @ g.T
    gone: list[int] = []
    need = 0.4 * j.problem.main.total
    while sum(weights(parts[n]) for n in gone) < need:
        best, least = -1, float("inf")
        for n, p in enumerate(parts):
            others = [
                m for m, q in enumerate(parts) if bool(q.last) == bool(p.last) and (q.block == p.block or not p.last)
            ]
            if n in gone or not set(others) - {n} - set(gone):
                continue
            loss = (float(h[n, n]) / 2 + coupling * sum(float(h[n, m]) for m in gone)) / weights(p)
            best, least = (n, loss) if loss < least else (best, least)
        gone.append(best)
    found = pick(j.problem, parts, h, coupling)
    back = {parts[n] for n in gone} - set(found)
    assert set(found) <= {parts[n] for n in gone}
    left = sum(map(weights, found)) - need
    assert left >= 0 and all(weights(p) > left for p in found)  # nothing more can be put back
    assert sum(map(weights, back)) <= sum(weights(parts[n]) for n in gone) - need


@torch.no_grad()
def test_the_plan_is_the_coupling_of_least_divergence():
    """Every plan's model built with zeros; the one that is made gives the same logits with smaller matrices."""
    j = job(0.6)
    s, planned = j.measure.stream, j.plan()
    few, held = split_windows(s, 2, 2)
    assert torch.equal(torch.cat(few.batches), WINDOWS[[0, 6]]) and torch.equal(
        torch.cat(held.batches), WINDOWS[[3, 9]]
    )
    parts = list_parts(j.problem)
    h = measure_interactions(j.measure, few, parts)
    plans = {c: pick(j.problem, parts, h, c) for c in (0.0, 0.25, 0.5, 0.75, 1.0)}
    dense = logits(s.source.model, WINDOWS[[3, 9]]).log_softmax(-1)
    kls = {}
    for c, gone in plans.items():
        own = logits(without(s, gone), WINDOWS[[3, 9]]).log_softmax(-1)
        kls[c] = float((dense.exp() * (dense - own)).sum(-1).mean())
        assert planned.notes["divergences"][str(c)] == pytest.approx(kls[c], rel=1e-4)
    best = planned.notes["coupling"]
    assert kls[best] <= min(kls.values()) * (1 + 1e-4) and max(kls.values()) > min(kls.values()) * 1.001
    at = [parts.index(p) for p in plans[best]]
    assert planned.notes["together"] == pytest.approx(float(h[at][:, at].sum() / 2))
    assert j.left(planned.ranks) >= 0
    outputs = run_solved(j.problem, j.measure, planned, s)
    small = torch.cat([losses.compute_logits(s, x).flatten(0, 1) for x in outputs])
    torch.testing.assert_close(small, logits(without(s, plans[best]), WINDOWS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gains_minimise_what_is_left_of_the_effect():
    """(H_KK + γ I) c = H_KS 1 is the ridge regression of the effects that went on those of the groups that stay."""
    phi = torch.randn(6, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    phi[3] = -0.2 * phi[1] + 0.02 * phi[3]
    parts = [Part(0), *(Part(0, a, a + 2) for a in (0, 2, 4)), *(Part(1, a, a + 2) for a in (0, 2))]
    gone = [parts[3], parts[0]]
    found = fit_gains(parts, phi @ phi.T, gone)
    own, target = phi[1:3], phi[3] + phi[0]
    level = 0.1 * own.square().sum(1).mean().sqrt() ** 2
    stacked = torch.cat([own.T, level.sqrt() * torch.eye(2)])
    c = torch.linalg.lstsq(stacked, torch.cat([target, torch.zeros(2)])[:, None]).solution.flatten().clamp(-0.35, 0.35)
    assert [found[p] for p in parts[1:3]] == pytest.approx(c.tolist()) and set(found) == set(parts[1:3])


@torch.no_grad()
def test_gains_multiply_the_groups_that_stay(monkeypatch):
    """Taken where they lower the loss (made sure of here), with the same logits as columns of down multiplied in place."""
    values = itertools.count(2, -1)
    monkeypatch.setattr("planish.methods.cocurve.nll", lambda *a: next(values))
    j = job(0.6, gains="true")
    planned = j.plan()
    parts, s = list_parts(j.problem), j.measure.stream
    assert planned.notes["gains"] == {"without": 2, "with": 1}
    h = measure_interactions(j.measure, split_windows(s, 2, 2)[0], parts)
    gone = pick(j.problem, parts, h, planned.notes["coupling"])
    small = without(s, gone)
    for p, c in fit_gains(parts, h, gone).items():
        small.model.layers[p.block].mlp.down_proj.weight.data[:, p.first : p.last] *= 1 + c
    outputs = run_solved(j.problem, j.measure, planned, s)
    made = torch.cat([losses.compute_logits(s, x).flatten(0, 1) for x in outputs])
    torch.testing.assert_close(made, logits(small, WINDOWS), rtol=1e-4, atol=1e-4)
    assert float((made - logits(without(s, gone), WINDOWS)).abs().max()) > 1e-2


def test_gains_that_do_not_help_are_left_out():
    planned = job(0.6, gains="true").plan()
    unit = next(u for u in planned.ranks if u.name == "mlp" and planned.ranks[u] < 44)
    better = planned.notes["gains"]["with"] < planned.notes["gains"]["without"]
    assert any(g != 1 for g in planned.solvers[unit].gains) == better


def test_one_size_for_all_blocks_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="cocurve leaves blocks with different numbers of neurons, and gguf holds one size"
    ):
        compress(
            tiny.build("llama_gqa"), output=tmp_path / "m", method="cocurve", keep=0.7, windows=WINDOWS, target="gguf"
        )
    assert not (tmp_path / "m").exists()


def test_windows_are_split_whatever_their_number():
    s = stream()
    for count, n, held in ((12, 8, 8), (12, 2, 1), (3, 8, 8), (2, 5, 1), (12, 1, 3)):
        few, other = (torch.cat(x.batches) for x in split_windows(s.part(WINDOWS[:count]), n, held))
        assert len(few) + len(other) == min(n + held, count) and min(len(few), len(other)) >= 1
        assert not {tuple(w.tolist()) for w in few} & {tuple(w.tolist()) for w in other}
    few, other = split_windows(s.part(WINDOWS[:1]), 8, 8)
    assert torch.equal(few.batches[0], other.batches[0])


def test_too_little_is_refused(tmp_path):
    with pytest.raises(InputError, match="smallest"):
        compress(tiny.build("llama_gqa"), output=tmp_path / "m", method="cocurve", keep=0.1, windows=WINDOWS)
    assert Unit(0, "ffn") not in job(0.7).problem.units


def test_ranks_are_multiples_of_what_is_asked_for():
    """Of 44 neurons in steps of 8 the last four go with whichever others do."""
    j = pose_on(stream(), "cocurve", 0.6, settings={"windows": "2", "held": "2"}, step=8)
    planned = j.plan()
    ranks = {u: r for u, r in planned.ranks.items() if u.name == "mlp"}
    cut = {u: r for u, r in ranks.items() if r < 44}
    assert cut and all(r % 8 == 0 for r in cut.values()) and j.left(planned.ranks) >= 0
    assert all(len(planned.solvers[u].kept) == r and max(planned.solvers[u].kept) < 40 for u, r in cut.items())
