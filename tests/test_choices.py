"""What methods choose, against the papers' rules written out naively: hooks in the model, every candidate model really built
and its loss measured, regressions on stored activations, explicit inverse roots. None of the mathematics under test is used."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.calibrate.collect import Run, measure_block
from planish.calibrate.stream import Stream
from planish.core import Plan
from planish.folder.source import MemorySource
from planish.methods import a3, find_method
from planish.modelling.blocks import find_blocks
from planish.modelling.families import FAMILIES
from planish.plan.planned import Planned
from planish.solvers.bypass import shared_basis
from planish.stats import KINDS, Tap
from planish.walks.solve import run_solved
from posed import pose_on

WINDOWS = tiny.windows(12, 24)
cosine = functools.partial(torch.nn.functional.cosine_similarity, dim=-1)


@functools.cache
def build(name: str = "llama_gqa", blocks: int = 5) -> nn.Module:
    return tiny.build(name, torch.float64, num_hidden_layers=blocks)


def plan(model: nn.Module, method: str, keep: float = 0.8, **settings: Any) -> tuple[Planned, Plan]:
    stream = Stream(MemorySource(model), WINDOWS, dtype=torch.float64)
    planned = pose_on(stream, find_method(method, settings), keep).plan()
    return planned, planned.ranks


def removed(made: Plan, kind: str) -> list[int]:
    return sorted(u.block for u, rank in made.items() if u.name == kind and rank == 0)


@torch.no_grad()
def watch(model: nn.Module, modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Input and output (tokens, width) of every module in one forward over the calibration windows."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = []
    for n, module in enumerate(modules):

        def keep(m, args, kwargs, out, n=n) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[n] = tuple(t.flatten(0, -2) for t in (x, out[0] if isinstance(out, tuple) else out))

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    model(WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[n] for n in sorted(seen)]


def residuals(model: nn.Module) -> list[Tensor]:
    """The residual stream before every block and behind the last one."""
    seen = watch(model, find_blocks(model, FAMILIES[model.config.model_type]))
    return [*(x for x, _ in seen), seen[-1][1]]


@torch.no_grad()
def measure_loss(model: nn.Module) -> float:
    return float(model(input_ids=WINDOWS, labels=WINDOWS, use_cache=False).loss)


def search(candidates: Sequence[Any], change: Callable[[list[Any]], nn.Module], n: int) -> dict[Any, float]:
    """Greedily: build every model with one change more, make the change of the best one; in this order, with the losses."""
    made: dict[Any, float] = {}
    while len(made) < n:
        found = {c: measure_loss(change([*made, c])) for c in candidates if c not in made}
        best = sorted(found.items(), key=lambda item: item[1])[0]
        made |= [best]
    return made


# ---------------------------------------------------------------- what goes, by measured loss


def test_sleb_drops_the_block_whose_model_has_the_least_loss():
    model = build()

    def drop(blocks: list[int]) -> nn.Module:
        small = copy.deepcopy(model)
        small.model.layers = nn.ModuleList(b for i, b in enumerate(small.model.layers) if i not in blocks)
        small.config.num_hidden_layers = len(small.model.layers)
        return small

    for protect, able in ((True, [1, 2, 3]), (False, [0, 1, 2, 3, 4])):
        planned, made = plan(model, "sleb", sparsity=0.4, protect=protect)
        expected = search(able, drop, 2)
        assert list(planned.notes["search"]) == list(expected)
        assert planned.notes["search"] == pytest.approx(expected, abs=1e-5)
        assert removed(made, "attention") == removed(made, "ffn") == sorted(expected)


def test_blockpruner_drops_the_submodule_whose_model_has_the_least_loss():
    model = build(blocks=4)
    paths = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}

    def drop(units: list[tuple[int, str]]) -> nn.Module:
        small = copy.deepcopy(model)
        for i, kind in units:
            small.model.layers[i].get_submodule(paths[kind]).weight.data.zero_()
        return small

    planned, made = plan(model, "blockpruner", keep=0.75)
    able = list(itertools.product(range(4), paths))
    order = list(search(able, drop, 4).items())
    size = {"attention": 32 * 32 * 2 + 32 * 16 * 2, "ffn": 3 * 32 * 44}
    gone, left = 0, 1.0
    while left > 0.75:  # as many as the budget asks for
        left -= size[order[gone][0][1]] / (4 * sum(size.values()))
        gone += 1
    expected = {f"{i}.{kind}": loss for (i, kind), loss in order[:gone]}
    assert list(planned.notes["search"]) == list(expected)
    assert planned.notes["search"] == pytest.approx(expected, abs=1e-5)
    assert {f"{u}" for u, rank in made.items() if rank == 0} == set(expected)


def test_subfit_greedily_replaces_the_feed_forward_whose_model_has_the_least_loss():
    """Every bypass is the ridge regression of what the feed-forward puts out on what it reads, in the dense model."""
    model = build(blocks=4)
    maps = []
    for x, f in watch(model, (b.mlp for b in model.model.layers)):
        x, mean = x - x.mean(0), x.mean(0)
        level = 1e-3 * x.square().mean() * len(x)
        w = torch.linalg.inv(x.T @ x + level * torch.eye(32)) @ x.T @ (f - f.mean(0))
        linear = nn.Linear(32, 32, dtype=torch.float64)
        linear.weight.data, linear.bias.data = w.T.contiguous(), f.mean(0) - mean @ w
        maps.append(linear)

    def change(blocks: list[int]) -> nn.Module:
        small = copy.deepcopy(model)
        for i in blocks:
            small.model.layers[i].mlp = maps[i]
        return small

    how = {"submodules": "ffn", "ffn_score": "greedy", "fit": "once", "gate": False, "ridge": 1e-3}
    planned, made = plan(model, "subfit", sparsity=0.5, **how)
    expected = search(range(4), change, 2)
    assert removed(made, "ffn") == sorted(expected)
    assert planned.notes["ffn_scores"] == pytest.approx({f"{i}.ffn": loss for i, loss in expected.items()}, abs=1e-5)
    for i in expected:
        (edit,) = planned.edits[i]
        assert torch.allclose(edit.tensors["V.weight"], maps[i].weight, atol=1e-6)
        assert torch.allclose(edit.tensors["shift"], maps[i].bias, atol=1e-6)


# ---------------------------------------------------------------- what goes, by activations


def test_shortgpt_drops_the_blocks_of_least_influence():
    model = build()
    planned, made = plan(model, "shortgpt", sparsity=0.4)
    influence = [float((1 - cosine(a, b)).mean()) for a, b in itertools.pairwise(residuals(model))]
    assert [planned.notes["influence"][i] for i in range(5)] == pytest.approx(influence, rel=1e-6)
    gone = sorted(range(5), key=influence.__getitem__)[:2]
    assert removed(made, "attention") == removed(made, "ffn") == sorted(gone)


def test_nbl_replaces_the_attentions_of_least_canonical_residue():
    """Σ (1 − ρ²), ρ the singular values of S_x^-½ C S_y^-½ with y = x + f; least squares on the raw stream in their place."""
    model = build()
    scores, maps = [], []
    outputs = watch(model, (b.self_attn for b in model.model.layers))
    for x, (_, f) in zip(residuals(model), outputs):
        y = x + f
        x, y = x - x.mean(0), y - y.mean(0)
        roots = []
        for m in (x.T @ x, y.T @ y):
            values, vectors = torch.linalg.eigh(m)
            roots.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
        rho = torch.linalg.svdvals(roots[0] @ x.T @ y @ roots[1])
        scores.append(float((1 - rho**2).sum()))
        maps.append(torch.linalg.lstsq(x, f - f.mean(0)).solution)
    planned, made = plan(model, "nbl", sparsity=0.4)
    assert [planned.notes["scores"][f"{i}.attention"] for i in range(5)] == pytest.approx(scores, rel=1e-5)
    gone = sorted(range(5), key=scores.__getitem__)[:2]
    assert removed(made, "attention") == sorted(gone) == sorted(planned.edits)
    for i in gone:
        (edit,) = planned.edits[i]
        assert edit.form["raw"] and torch.allclose(edit.tensors["V.weight"], maps[i].T, atol=1e-5)


def test_replaceme_removes_the_window_of_least_angle():
    model = build()
    h = residuals(model)
    angles = {a: float(cosine(h[a], h[a + 2]).clamp(0, 1).arccos().mean() / torch.pi) for a in (1, 2, 3)}
    planned, made = plan(model, "replaceme", sparsity=0.4)
    first = sorted(angles, key=angles.__getitem__)[0]  # the first block cannot go: nothing would hold the map
    assert removed(made, "attention") == removed(made, "ffn") == [first, first + 1]
    assert {a: planned.notes["window"]["angles"][a] for a in angles} == pytest.approx(angles, rel=1e-5)
    assert list(planned.edits) == [first - 1]


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_streamline_keeps_the_first_block_of_the_most_parallel_window_refitted(name):
    """Its down projection is the least-squares one from what that reads to what the window adds behind its attention."""
    model, family = build(name), FAMILIES[build(name).config.model_type]
    h = residuals(model)
    cosines = {a: float(cosine(h[a], h[a + 3]).mean()) for a in (0, 1, 2)}
    first = sorted(cosines, key=cosines.__getitem__)[-1]
    planned, made = plan(model, "llm-streamline", sparsity=0.4, ridge=1e-12)
    assert planned.notes["window"]["cosines"] == pytest.approx(cosines, rel=1e-6)
    assert removed(made, "attention") == removed(made, "ffn") == [first + 1, first + 2]
    block = find_blocks(model, family)[first]
    down = block.get_submodule(family.path("down"))
    (x, _), (mid, _) = watch(model, [down, block.get_submodule(family.mlp_norm)])
    f = h[first + 3] - mid - (0 if down.bias is None else down.bias.detach())
    expected = torch.linalg.lstsq(x, f).solution.T
    assert list(planned.edits) == [first]
    (edit,) = planned.edits[first]
    assert torch.allclose(edit.tensors["weight"], expected, atol=1e-5 * float(expected.abs().max()))
    assert down.bias is None or torch.equal(edit.tensors["bias"], down.bias)


def test_replaceme_turns_the_feed_forward_towards_the_end_of_the_window():
    """`objective` cosine: Adam from the identity, with the gradient of the mean cosine written out."""
    model = build()
    planned, made = plan(model, "replaceme", sparsity=0.4, objective="cosine", epochs=10, rate=1e-2)
    first = removed(made, "ffn")[0]
    h, block = residuals(model), model.model.layers[first - 1]
    (_, m), (mid, _) = watch(model, [block.mlp, block.post_attention_layernorm])
    f = h[first + 2] - mid
    t, mean, square = torch.eye(32, dtype=torch.float64), torch.zeros(32, 32), torch.zeros(32, 32)
    before = float(cosine(m, f).mean())
    for step in range(1, 11):
        y = m @ t
        size = y.norm(dim=1, keepdim=True)
        turn = (f / f.norm(dim=1, keepdim=True) - cosine(y, f)[:, None] * y / size) / size  # ∂ cos(y, f) / ∂ y
        g = -m.T @ turn / len(m)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        t = t - 1e-2 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    assert float(cosine(m @ t, f).mean()) > before + 0.01
    (edit,) = planned.edits[first - 1]
    assert torch.allclose(edit.tensors["weight"], t.T @ block.mlp.down_proj.weight, atol=1e-4)


def test_bypasses_share_the_eigenvectors_of_the_mean_of_covariances_of_trace_one():
    """On the raw stream, which grows from block to block: without the scaling the last block would decide alone."""
    model = build(blocks=4)
    how = {"submodules": "ffn", "ffn_score": "influence", "input": "raw", "fit": "once", "ffn_rank": 0.25}
    planned, made = plan(model, "subfit", sparsity=0.75, basis="pca", **how)
    gone = removed(made, "ffn")
    inputs = [x for x, _ in watch(model, (model.model.layers[i].post_attention_layernorm for i in gone))]
    covariances = [torch.cov(x.T, correction=0) for x in inputs]

    def project(scales: list[Tensor]) -> Tensor:
        top = torch.linalg.eigh(sum(s / scale for s, scale in zip(covariances, scales)))[1][:, -8:]
        return top @ top.T

    expected = project([s.diagonal().sum() for s in covariances])
    plain = project([torch.tensor(1.0)] * len(gone))
    assert len(gone) == 3 and float((expected - plain).norm()) > 0.2  # it matters here
    for i in gone:
        (edit,) = planned.edits[i]
        v = edit.tensors["V.weight"]
        assert torch.allclose(v.T @ v, expected, atol=1e-6)
    loud = [covariances[0], 1e6 * covariances[1]]
    v, quiet = (shared_basis(s, 8) for s in (loud, covariances[:2]))
    assert torch.allclose(v @ v.T, quiet @ quiet.T, atol=1e-9)


# ---------------------------------------------------------------- how much goes where


def test_modegpt_removes_most_where_the_input_hardly_turns():
    """φ_l = L φ softmax(−s / ε)_l with s_l = 1 − E cos(input, output); L φ = cap here, so no block reaches the cap."""
    model = build(blocks=4)
    planned, made = plan(model, "modegpt", keep=0.8, smoothing=0.15)
    influence = [float((1 - cosine(a, b)).mean()) for a, b in itertools.pairwise(residuals(model))]
    weights = [exp(-s / 0.15) for s in influence]
    shares = [4 * 0.2 * w / sum(weights) for w in weights]
    assert planned.notes["removed_shares"] == pytest.approx(shares, rel=1e-6)
    assert max(shares) - min(shares) > 0.2
    kept = {u.block: rank / 44 for u, rank in made.items() if u.name == "mlp"}
    assert [kept[i] for i in range(4)] == pytest.approx([1 - s for s in shares], abs=0.06)


def test_a3_mixed_ranks_minimise_the_probed_loss(monkeypatch):
    """Neurons of three blocks. Probes: KL of models with masked neurons. Of all plans within the budget the one of least
    Σ rise_u · error_u(rank) / error_u(uniform); then the plan whose model has the least loss."""
    model = build(blocks=3)
    downs = [b.mlp.down_proj for b in model.model.layers]
    inputs = [x for x, _ in watch(model, downs)]
    orders, errors = [], torch.zeros(3, 45, dtype=torch.float64)
    for i, (down, x) in enumerate(zip(downs, inputs)):
        w = down.weight.detach()
        orders.append((x.square().mean(0) * w.square().sum(0)).argsort(descending=True))
        for rank in range(44):
            errors[i, rank] = (x[:, orders[i][rank:]] @ w[:, orders[i][rank:]].T).square().sum(1).mean()

    def cut(ranks: dict[int, int]) -> nn.Module:
        small = copy.deepcopy(model)
        for i, rank in ranks.items():
            small.model.layers[i].mlp.down_proj.weight.data[:, orders[i][rank:]] = 0
        return small

    stream = Stream(MemorySource(model), WINDOWS, dtype=torch.float64)
    how = {"allocation": "mixed", "probes": 4, "refit": False, "parts": ("mlp",)}
    plans: list[Plan] = []

    def record(problem, measure, planned, stream):
        plans.append(planned.ranks)
        return run_solved(problem, measure, planned, stream)

    monkeypatch.setattr(a3, "run_solved", record)
    planned = pose_on(stream, find_method("a3", how), 0.8).plan()
    chosen = planned.ranks
    uniform, mixed, tempered = ([made[u] for u in sorted(made)] for made in plans)
    budget = sum(uniform)  # neurons: all cost the same
    total = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 44)
    assert budget == int((44 * 3) - 0.2 * total / (3 * 32)) and max(uniform) - min(uniform) <= 1

    with torch.no_grad():
        reference = model(WINDOWS[:4], use_cache=False).logits.log_softmax(-1)
        rises = []
        for i in range(3):
            own = cut({i: uniform[i]})(WINDOWS[:4], use_cache=False).logits.log_softmax(-1)
            rises.append(float((reference.exp() * (reference - own)).sum(-1).mean()))
    assert [planned.notes["rises"][f"{i}.mlp"] for i in range(3)] == pytest.approx(rises, rel=1e-4)
    assert min(rises) > 0.02 * sum(rises) / 3  # above the floor of the scales

    every = torch.tensor(list(itertools.product(range(1, 45), repeat=3)))
    for ranks, power in ((mixed, 1.0), (tempered, 0.5)):
        scale = torch.tensor([r**power / float(errors[i, uniform[i]]) for i, r in enumerate(rises)])
        loss = sum(scale[i] * errors[i, every[:, i]] for i in range(3))
        own = float(sum(scale[i] * errors[i, r] for i, r in enumerate(ranks)))
        assert sum(ranks) <= budget
        assert own <= float(loss[every.sum(1) <= budget - 1].min()) * (1 + 1e-9)  # optimal to one step

    losses = [measure_loss(cut(dict(enumerate(ranks)))) for ranks in (uniform, mixed, tempered)]
    assert [planned.notes["searched"][n] for n in ("uniform", "mixed", "tempered")] == pytest.approx(losses, abs=1e-5)
    best = sorted(range(3), key=losses.__getitem__)[0]
    assert [chosen[u] for u in sorted(chosen)] == (uniform, mixed, tempered)[best]


# ---------------------------------------------------------------- what is fitted behind other changes


def test_parallel_submodules_aim_at_the_dense_sum_together():
    """Both read the same stream: attention aims at its dense self, the feed-forward at what is missing besides it."""
    model = build("gpt_neox", 3)
    small = copy.deepcopy(model)
    for p in small.gpt_neox.layers[0].attention.dense.parameters():  # the model before block 1 has changed
        p.data.zero_()
    (_, dense_attention), (_, dense_out) = watch(model, [(b := model.gpt_neox.layers[1]).attention, b])
    b = small.gpt_neox.layers[1]
    (read, attention), (x, _), (mlp_in, _) = watch(small, [b.attention, b, b.mlp])
    assert float((attention - dense_attention).norm() / dense_attention.norm()) > 0.05
    expected = {"attention": (read, dense_attention), "mlp": (mlp_in, dense_out - x - attention)}
    dense, own = (Stream(MemorySource(m), WINDOWS, dtype=torch.float64) for m in (model, small))
    taps = {w: Tap("q.in" if w == "attention" else "up.in", "moments", f"{w}.gap") for w in expected}
    with torch.no_grad():
        hidden, outer = own.run(0, own.block(0), own.start()), dense.run(0, dense.block(0), dense.start())
        stats, _ = measure_block(own, 1, own.block(1), list(taps.values()), hidden, Run(dense.block(1), outer))
    for where, tap in taps.items():
        for name, value in KINDS["moments"](*expected[where]).items():
            assert torch.allclose(stats.sums[tap][name], value, rtol=1e-4, atol=1e-3), (where, name)
