"""A3 and MoDeGPT against the formulas as printed, and against models in which part of every head carries nothing."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import tiny
from planish.calibrate.stream import Stream
from planish.core import Solver, Unit
from planish.errors import InputError
from planish.folder.source import MemorySource
from planish.methods.a3 import A3
from planish.methods.method import Method
from planish.methods.modegpt import spread_removal
from planish.methods.palu import Palu
from planish.modelling.blocks import find_blocks, get_linear
from planish.modelling.canonical import join_block, split_block
from planish.modelling.families import FAMILIES
from planish.modelling.heads import has_norms, rotary_width
from planish.plan.footprint import footprint, footprints
from planish.plan.planned import Planned
from planish.request import Limits
from planish.solvers.key_frequency import KeyFrequency
from planish.solvers.key_latent import KeyLatent
from planish.solvers.linalg import balance, reduce_scores
from planish.solvers.neurons import Neurons
from planish.solvers.qk_joint import QKJoint
from planish.solvers.rotary_pairs import RotaryPairs, split_ranks
from planish.solvers.selection import nystrom, selection_losses
from planish.solvers.value_output import ValueOutput
from posed import pose_on
from tiny import compress, load

WINDOWS = tiny.windows(12, 24)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power(m: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values**exponent @ vectors.T


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def truncated(m: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


HIDDEN, D, G, TOKENS, RANK = 12, 4, 3, 200, 2
X = draw(TOKENS, HIDDEN, seed=1) @ draw(HIDDEN, HIDDEN, seed=2)
WQ, WK, WV = draw(G, HIDDEN, D, seed=3), draw(HIDDEN, D, seed=4), draw(HIDDEN, D, seed=5)
WO = draw(G, D, HIDDEN, seed=6)


def test_scores_equal_the_printed_root_form_for_a_group():
    r = moment(X)
    half, inverse = power(r, 0.5), power(r, -0.5)
    stacked = torch.cat([half @ w @ WK.T @ half for w in WQ])
    printed = [inverse @ m @ inverse for m in truncated(stacked, RANK).split(HIDDEN)]
    q, p, loss = reduce_scores(sum(moment(X @ w) for w in WQ)[None], moment(X @ WK)[None])
    ours = [w @ q[0, :, :RANK] @ p[0, :, :RANK].T @ WK.T for w in WQ]
    for a, b in zip(ours, printed):
        assert torch.allclose(a, b, atol=1e-9 * float(b.abs().max()))
    error = sum((X @ (w @ WK.T - m) @ X.T).square().sum() for w, m in zip(WQ, ours)) / TOKENS**2
    assert float(error) == pytest.approx(float(loss[RANK]), rel=1e-10)


def test_scores_with_biases_reach_the_eckart_young_error():
    q, k = X @ WQ[0] + draw(D, seed=7), X @ WK + 3 * draw(D, seed=8)
    a, b, loss = (t[0] if t.ndim == 3 else t for t in reduce_scores(moment(q)[None], moment(k)[None]))
    exact = torch.linalg.svdvals(q @ k.T / TOKENS)
    for rank in range(1, D):
        error = (q @ k.T - q @ a[:, :rank] @ (k @ b[:, :rank]).T).square().mean()
        assert float(error) == pytest.approx(float(exact[rank:D].square().sum()), rel=1e-10)
        assert float(error) == pytest.approx(float(loss[rank]), rel=1e-10)


def test_singular_moments_need_no_damping():
    q, k = X @ WQ[0], X @ WK
    q, k = torch.cat([q, q[:, :1]], 1), torch.cat([k, 0 * k[:, :1]], 1)
    a, b, loss = reduce_scores(moment(q)[None], moment(k)[None])
    assert torch.allclose(q @ a[0, :, :D] @ (k @ b[0, :, :D]).T, q @ k.T)
    assert float(loss[D]) < 1e-12 * float(loss[0])


def test_values_equal_the_printed_form_and_not_the_misprinted_ones():
    """One head: W̃ = R^-½ SVD_r(R^½ Wv Wo). A group: N = [R^½ Wv Wo_1 …] = U S Vᵀ, Wv ← R^-½ U S, Wo_i ← V_iᵀ."""
    r = moment(X)
    half, inverse = power(r, 0.5), power(r, -0.5)

    def error(w: Tensor, i: int = 0) -> float:
        return float((half @ (WV @ WO[i] - w)).square().sum() / (half @ WV @ WO[i]).square().sum())

    p, q, _ = balance(WO[0] @ WO[0].T, moment(X @ WV))
    ours = WV @ p[:, :RANK] @ q[:, :RANK].T @ WO[0]
    printed = inverse @ truncated(half @ WV @ WO[0], RANK)
    assert torch.allclose(ours, printed, atol=1e-10 * float(printed.abs().max()))
    assert error(truncated(half @ WV @ WO[0], RANK) @ inverse) > 5 * error(ours)

    u, s, vh = torch.linalg.svd(torch.cat([half @ WV @ o for o in WO], 1), full_matrices=False)
    p, q, _ = balance(sum(o @ o.T for o in WO), moment(X @ WV))
    for i, o in enumerate(WO):
        part = vh[:RANK, i * HIDDEN : (i + 1) * HIDDEN]
        right = inverse @ (u[:, :RANK] * s[:RANK]) @ part
        assert torch.allclose(WV @ p[:, :RANK] @ q[:, :RANK].T @ o, right, atol=1e-10 * float(right.abs().max()))
        assert error((u[:, :RANK] * s[:RANK]) @ part @ inverse, i) > 5 * error(right, i)


def test_pooled_moments_and_refit_each_help_a_group():
    """R_kv form ≥ moments of what attention makes of the values ≥ least squares of the whole output projection."""
    scores = draw(G, TOKENS, TOKENS, seed=9) * 2
    attention = (scores + torch.full_like(scores[0], -torch.inf).triu(1)).softmax(-1)
    heads = attention @ (X @ WV)
    o, w = torch.cat(list(heads), 1), torch.cat(list(WO))
    left = sum(m @ m.T for m in WO)

    def reduce(right: Tensor, refit: bool) -> float:
        p, q, _ = balance(left, right)
        z = torch.cat([h @ p[:, :RANK] for h in heads], 1)
        new = torch.linalg.lstsq(z, o @ w).solution if refit else torch.cat([q[:, :RANK].T @ m for m in WO])
        return float((o @ w - z @ new).square().sum() / (o @ w).square().sum()) ** 0.5

    pooled = sum(moment(h) for h in heads)
    errors = [reduce(moment(X @ WV), False), reduce(pooled, False), reduce(pooled, True)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.95 * errors[0]


def test_neuron_score_is_the_diagonal_of_the_root_form_and_refit_never_hurts():
    x, w = X.relu(), draw(5, HIDDEN, seed=10)
    r = moment(x)
    printed = power(r, 0.5).square().sum(0) * w.square().sum(0)
    ours = r.diagonal() * w.square().sum(0)
    assert torch.allclose(printed, ours)
    order = ours.argsort(descending=True)
    sliced, refitted = (selection_losses(r, w, order, refit, 1e-12) for refit in (False, True))
    for rank in range(1, HIDDEN):
        kept = order[:rank]
        assert float((x @ w.T - x[:, kept] @ w[:, kept].T).square().sum(1).mean()) == pytest.approx(float(sliced[rank]))
        new = nystrom(r, kept, w, 1e-12)
        assert float((x @ w.T - x[:, kept] @ new.T).square().sum(1).mean()) == pytest.approx(
            float(refitted[rank]), rel=1e-6
        )
        assert refitted[rank] <= sliced[rank] * (1 + 1e-9)


def test_energy_is_the_score_lost_over_all_rotations_and_ignores_rotations_within_a_pair():
    q, k = draw(50, 2, seed=11), draw(60, 2, seed=12)
    angles = torch.arange(360, dtype=torch.float64) * torch.pi / 180
    turn = torch.stack([torch.stack([angles.cos(), -angles.sin()]), torch.stack([angles.sin(), angles.cos()])])
    lost = torch.einsum("na,abt,mb->nmt", q, turn, k).square().mean()
    energy = q.square().sum(1).mean() * k.square().sum(1).mean() / 2
    assert float(lost) == pytest.approx(float(energy), rel=1e-12)
    turned = q @ turn[..., 30]
    product, after = ((m.square().mean(0) * k.square().mean(0)).sum() for m in (q, turned))
    assert float(turned.square().sum(1).mean()) == pytest.approx(float(q.square().sum(1).mean()))
    assert abs(float(product - after)) > 1e-3 * float(product)


def test_ranks_are_split_between_pairs_and_unrotated_channels_at_least_loss():
    pairs, rest = torch.tensor([9.0, 4, 1, 0]), torch.tensor([7.0, 6, 2, 1, 0])
    split, loss = split_ranks(pairs, rest, 10)
    for rank in range(2, 11, 2):
        best = min(float(pairs[m] + rest[rank - 2 * m]) for m in range(1, 4) if 0 <= rank - 2 * m <= 4)
        assert float(loss[rank]) == best == float(pairs[split[rank]] + rest[rank - 2 * split[rank]])
    assert (loss[1:] <= loss[:-1]).all()


# ---------------------------------------------------------------- models in which part of every head carries nothing


@dataclass(frozen=True)
class Cut(Method):
    """Fixed ranks."""

    cuts: tuple[tuple[str, int], ...] = ()
    parts: tuple[Solver, ...] = (QKJoint(), RotaryPairs(), ValueOutput(), Neurons("energy"))

    def solvers(self) -> list[Solver]:
        return list(self.parts)

    def plan(self, problem, measure) -> Planned:
        return self.decide(problem, {u: dict(self.cuts)[u.name] for u in problem.units})


def projector(d: int, rank: int, seed: int) -> Tensor:
    q = torch.linalg.qr(draw(d, rank, seed=seed)).Q
    return q @ q.T


@torch.no_grad()
def hollow(model: nn.Module, qk: int, v: int, mlp: int) -> None:
    """Let only `qk` channels of every key (random pairs where they rotate), `v` value dimensions, `mlp` neurons matter."""
    family = FAMILIES[model.config.model_type]
    for i, block in enumerate(find_blocks(model, family)):
        split_block(block, family, model.config)
        linear = {r: get_linear(block, family, r) for r in family.roles}
        heads = model.config.num_attention_heads
        kv = linear["k"].out_features * heads // linear["q"].out_features
        d = linear["k"].out_features // kv
        stock = block.get_submodule(family.attention)
        half, normed = rotary_width(stock, family) // 2, has_norms(stock, family)
        maps = {"v": torch.stack([projector(d, v, 100 * i + g) for g in range(kv)])}
        if half and not normed:
            pairs = min((d - qk) // 2, half - 1)  # the others go from what is not rotated
            rest = qk - 2 * (half - pairs)
            keep = torch.ones(kv, d, dtype=torch.float64)
            for g in range(kv):
                gone = torch.randperm(half, generator=torch.Generator().manual_seed(10 * i + g))[:pairs]
                keep[g, gone] = keep[g, gone + half] = 0
            maps["k"] = torch.diag_embed(keep)
            for g in range(kv):
                maps["k"][g, 2 * half :, 2 * half :] = projector(d - 2 * half, rest, 100 * i + 50 + g)
        elif not normed:
            maps["k"] = torch.stack([projector(d, qk, 100 * i + 50 + g) for g in range(kv)])
        for role, m in maps.items():
            w = linear[role].weight
            w.copy_((m.to(w) @ w.unflatten(0, (kv, d))).flatten(0, 1))
            if linear[role].bias is not None:
                b = linear[role].bias
                b.copy_((m.to(w) @ b.view(kv, d, 1)).flatten())
        linear["down"].weight[:, torch.randperm(linear["down"].in_features)[mlp:]] = 0
        join_block(block, family)


def compare_answers(small, model, ids, options):
    """With the cache and without the same; and each row what the stock model answers to it alone, without its padding, which
    in fp64 makes the stock eager attention give NaN (the mask's least fp64 is -inf in its fp32 softmax)."""
    cached, fresh = (small.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, fresh)
    for row, mask, found in zip(ids, options["attention_mask"], cached, strict=True):
        dense = model.generate(row[None, mask.bool()], **(options | {"attention_mask": None}))[0]
        answer = found[mask.argmax() :]
        assert torch.equal(answer[: len(dense)], dense) and not answer[len(dense) :].any()  # 0: padding behind the end
    return cached


# every rotation, and none; norms of queries and keys; submodules side by side
DIFFERENT = (*tiny.CORE, "gpt2", "llama_yarn", "llama_dynamic", "qwen3", "phi3_partial", "gemma3", "mpt")
DIFFERENT += ("ministral3", "cohere2", "glm4", "falcon", "nemotron")


@pytest.mark.parametrize("name", tiny.pick(DIFFERENT, tiny.NAMES + tiny.MORE))
def test_what_carries_nothing_goes_without_a_trace(name, tmp_path):
    """Logits, generation and the cache of a model cut to exactly what matters; every rope variant and partial rotary."""
    model = tiny.build(name, torch.float64)
    shape = MemorySource(model).shape(0)
    qk, v, mlp = shape.qk - 2, shape.v - 3, shape.intermediate - 9
    hollow(model, qk, v, mlp)
    method = Cut(cuts=(("qk", qk), ("vo", v), ("mlp", mlp)))
    windows = WINDOWS[:, : min(24, getattr(model.config, "max_position_embeddings", 24))]
    result = compress(model, output=tmp_path / "m", keep=0.99, method=method, windows=windows, dtype=torch.float64)
    small = load(tmp_path / "m", dtype=torch.float64)
    ids = windows[:2, :6]
    with torch.no_grad():
        difference = float((small(windows[:4]).logits - model(windows[:4]).logits).abs().max())
        cache = small(ids, use_cache=True).past_key_values
    assert difference < 1e-4  # stock norms and softmax compute in fp32, the refit is damped
    per_token = shape.kv_heads * ((shape.qk if shape.qk_norm else qk) + v) * 8 * model.config.num_hidden_layers
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == ids.numel() * per_token
    assert result.kv_bytes_per_token_after == per_token < result.kv_bytes_per_token_before
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    compare_answers(small, model, ids, options)


# ---------------------------------------------------------------- methods


def test_families_that_normalise_queries_and_keys_keep_them_and_say_so(tmp_path):
    model = tiny.build("qwen3")
    compress(model, output=tmp_path / "m", keep=0.7, method="a3", windows=WINDOWS)
    small = load(tmp_path / "m")
    for old, new in zip(model.model.layers, small.model.layers):
        for part in ("q_proj", "k_proj"):
            assert torch.equal(getattr(old.self_attn, part).weight, getattr(new.self_attn, part).weight)
    assert "normalises" in json.loads((tmp_path / "m" / "planish.json").read_text())["notes"]["qk"]


@pytest.mark.parametrize("method", ["a3", "modegpt", "flat-llm", "palu"])
def test_kv_budget_cuts_the_cache_and_nothing_else(method, tmp_path):
    model = tiny.build("llama_gqa")
    result = compress(model, output=tmp_path / "m", kv_keep=0.6, method=method, windows=WINDOWS)
    share = result.kv_bytes_per_token_after / result.kv_bytes_per_token_before
    assert 0.5 < share <= 0.6
    small = load(tmp_path / "m")
    for old, new in zip(model.model.layers, small.model.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(getattr(old.mlp, part).weight, getattr(new.mlp, part).weight)


def test_kv_budget_needs_a_method_that_cuts_keys_or_values(tmp_path):
    with pytest.raises(InputError, match="svd-llm cuts neither keys nor values"):
        compress(tiny.build("llama_gqa"), output=tmp_path / "m", kv_keep=0.5, method="svd-llm", windows=WINDOWS)
    with pytest.raises(InputError, match="kv-keep must lie in"):
        compress(tiny.build("llama_gqa"), output=tmp_path / "m", kv_keep=1.5, method="a3", windows=WINDOWS)


def test_mixed_ranks_do_no_worse_on_the_calibration_text(tmp_path):
    result = compress(
        tiny.build("llama_gqa"),
        output=tmp_path / "m",
        keep=0.6,
        method=A3(allocation="mixed", probes=4),
        windows=WINDOWS,
    )
    notes = json.loads((tmp_path / "m" / "planish.json").read_text())["notes"]
    assert set(notes["searched"]) == {"uniform", "mixed", "tempered"}
    assert notes["searched"][notes["chosen"]] == min(notes["searched"].values())
    assert len(notes["rises"]) == 9 and len(set(notes["searched"].values())) == 3
    with torch.no_grad():
        loss = load(tmp_path / "m")(input_ids=WINDOWS, labels=WINDOWS).loss
    assert float(loss) == pytest.approx(notes["searched"][notes["chosen"]], abs=1e-5)
    assert 0.55 < result.keep <= 0.6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=40), st.floats(0, 0.79), st.floats(0.001, 1), st.floats(0.8, 0.99)
)
def test_removal_spreads_under_its_cap(influence, removed, smoothing, cap):
    shares = spread_removal(influence, removed, smoothing, cap)
    assert sum(shares) == pytest.approx(removed * len(shares), abs=1e-9)
    assert all(0 <= s <= cap + 1e-12 for s in shares)
    by_influence = sorted(zip(influence, shares))
    assert all(a[1] >= b[1] - 1e-9 for a, b in itertools.pairwise(by_influence))


def test_removal_beyond_the_cap_is_an_error():
    with pytest.raises(InputError, match=r"cap=0\.8"):
        spread_removal([0.1, 0.2], 0.85, 0.15, 0.8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv=6"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("olmo", {"clip_qkv": 6.0}, "clip_qkv=6"),
    ],
)
def test_what_cannot_be_reduced_linearly_is_refused(name, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        compress(tiny.build(name, **change), output=tmp_path / "m", method="a3", windows=WINDOWS)


def test_units_of_the_two_score_solvers_never_meet():
    for name in ("llama_gqa", "opt", "qwen3", "gpt_neox"):
        shape = MemorySource(tiny.build(name)).shape(0)
        found = [u for s in A3().solvers() for u in s.units(shape)]
        assert len(found) == len(set(found))
        assert (Unit(0, "qk") in found) == (not shape.qk_norm)


@pytest.mark.parametrize(
    "name",
    tiny.pick(
        ["llama_gqa", "qwen3", "gpt_neox", "opt", "mpt"],
        ["llama_gqa", "llama_yarn", "mistral", "qwen3", "gemma3", "gpt_neox", "opt", "mpt", "cohere2"],
    ),
)
def test_latent_keys_are_rebuilt_before_norm_and_rotation(name, tmp_path):
    """A model whose keys of all heads lie in a small subspace loses nothing when only that is cached."""
    model = tiny.build(name, torch.float64)
    shape = MemorySource(model).shape(0)
    solver, family = KeyLatent(), FAMILIES[model.config.model_type]
    rank = solver.ranks(Unit(0, "keys"), shape)[-2]
    with torch.no_grad():
        for i, block in enumerate(find_blocks(model, family)):
            linear = get_linear(split_block(block, family, model.config), family, "k")
            p = projector(linear.out_features, rank, i)
            linear.weight.copy_(p @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(p @ linear.bias)
            join_block(block, family)
    method = Cut(cuts=(("keys", rank),), parts=(solver,))
    result = compress(model, output=tmp_path / "m", keep=0.99, method=method, windows=WINDOWS, dtype=torch.float64)
    small, ids = load(tmp_path / "m", dtype=torch.float64), WINDOWS[:2, :6]
    with torch.no_grad():
        assert float((small(WINDOWS[:4]).logits - model(WINDOWS[:4]).logits).abs().max()) < 1e-4
        cache = small(ids, use_cache=True).past_key_values
    for old, new in zip(find_blocks(model, family), find_blocks(small, family)):
        dense = get_linear(split_block(old, family, model.config), family, "k").weight
        rebuilt = new.get_submodule(family.attention).rebuild(get_linear(new, family, "k").weight)
        assert torch.allclose(rebuilt, dense, atol=1e-6)
        join_block(old, family)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == ids.numel() * result.kv_bytes_per_token_after
    assert held == ids.numel() * model.config.num_hidden_layers * (rank + shape.kv_heads * shape.v) * 8
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    compare_answers(small, model, ids, options)
    if shape.rotary:
        check_positions(small, model, ids)


@torch.no_grad()
def check_positions(small: nn.Module, dense: nn.Module, ids: Tensor) -> None:
    """Positions with a gap, and a token behind a right-padded prompt, as in the dense model."""
    outputs = []
    gap, ones = torch.tensor([[0, 1, 2, 3, 9, 10]]).expand_as(ids), torch.ones_like(ids)
    mask = ones.clone()
    mask[0, 4:] = 0  # right padding
    for model in (small, dense):
        far = model(ids, position_ids=gap, attention_mask=ones).logits
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        more = {"attention_mask": torch.cat([mask, ones[:, :1]], 1), "position_ids": torch.tensor([[4], [6]])}
        near = model(ids[:, :1], past_key_values=cache, **more).logits
        outputs.append((far, near))
    for own, other in zip(*outputs, strict=True):
        assert float((own - other).abs().max()) < 1e-4


@torch.no_grad()
def see(model: nn.Module, *paths: str) -> list[Tensor]:
    """What modules put out, (tokens, width), on the calibration windows."""
    seen: dict[str, Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda m, x, out, path=path: seen.update({path: out.flatten(0, 1)})
        )
    model(WINDOWS)
    for path in paths:
        model.get_submodule(path)._forward_hooks.clear()
    return [seen[path] for path in paths]


@pytest.mark.parametrize("score", ["product", "energy"])
@torch.no_grad()
def test_rotary_pairs_that_stay_are_those_of_the_highest_score(score, tmp_path):
    """The same logits as a model in which the other pairs of q and k are zero. Loud queries of the first channel of a pair
    meet quiet keys, and the other way round: much energy and little product."""
    model = tiny.build("llama_gqa", torch.float64)
    for layer in model.model.layers:
        for rows, first, second in ((layer.self_attn.q_proj, 4, 0.05), (layer.self_attn.k_proj, 0.05, 4)):
            w = rows.weight.unflatten(0, (-1, 2, 4))  # heads, halves of a head, pairs
            w[:, 0, 1:3] *= first
            w[:, 1, 1:3] *= second
    naive = copy.deepcopy(model)
    for i, layer in enumerate(naive.model.layers):
        q, k = see(model, f"model.layers.{i}.self_attn.q_proj", f"model.layers.{i}.self_attn.k_proj")
        q = q.square().mean(0).view(2, 2, 2, 4).sum(1)  # kv heads, halves, pairs; added over a group's query heads
        k = k.square().mean(0).view(2, 2, 4)
        scores = {"product": (q * k).sum(1), "energy": q.sum(1) * k.sum(1) / 2}
        best = {n: s.topk(2).indices.sort().values for n, s in scores.items()}
        assert not torch.equal(best["product"], best["energy"])
        for group, pairs in enumerate(best[score]):
            gone = [j for j in range(4) if j not in pairs]
            for rows, heads in (
                (layer.self_attn.q_proj, (2 * group, 2 * group + 1)),
                (layer.self_attn.k_proj, (group,)),
            ):
                for head in heads:
                    rows.weight.view(-1, 2, 4, 32)[head][:, gone] = 0
    method = Cut(cuts=(("qk", 4),), parts=(RotaryPairs(score),))
    compress(model, output=tmp_path / "m", keep=0.99, method=method, windows=WINDOWS, dtype=torch.float64)
    small = load(tmp_path / "m", dtype=torch.float64)
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert torch.allclose(small(WINDOWS).logits, naive(WINDOWS).logits, atol=1e-4)
    assert float((small(WINDOWS).logits - model(WINDOWS).logits).abs().max()) > 1e-2


@torch.no_grad()
def test_values_are_cut_by_the_moments_of_what_they_read(tmp_path):
    """`moments` "values": N = R^½ Wv [Wo_1 …] = U S Vᵀ per group; the same logits as with Wv ← R^-½ U_r U_rᵀ R^½ Wv."""
    model = tiny.build("llama_gqa", torch.float64)
    naive = copy.deepcopy(model)
    for i, layer in enumerate(naive.model.layers):
        (x,) = see(model, f"model.layers.{i}.input_layernorm")
        half, inverse = power(moment(x), 0.5), power(moment(x), -0.5)
        o = layer.self_attn.o_proj.weight.unflatten(1, (2, 2, 8))  # hidden, groups, their heads, channels
        for group, w in enumerate(layer.self_attn.v_proj.weight.view(2, 8, 32)):
            n = torch.cat([half @ w.T @ o[:, group, h].T for h in range(2)], 1)
            u = torch.linalg.svd(n, full_matrices=False).U[:, :4]
            w.copy_((inverse @ u @ u.T @ half @ w.T).T)
    method = Cut(cuts=(("vo", 4),), parts=(ValueOutput("values", refit=False),))
    compress(model, output=tmp_path / "m", keep=0.99, method=method, windows=WINDOWS, dtype=torch.float64)
    small = load(tmp_path / "m", dtype=torch.float64)
    assert small.model.layers[0].self_attn.v_proj.weight.shape == (8, 32)
    assert torch.allclose(small(WINDOWS).logits, naive(WINDOWS).logits, atol=1e-4)
    assert float((small(WINDOWS).logits - model(WINDOWS).logits).abs().max()) > 1e-2


@torch.no_grad()
def share_keys(model: nn.Module, group: int) -> int:
    """Let the keys of every frequency lie in a random complex subspace of the heads; pairs that a set of heads needs."""
    family, needed = FAMILIES[model.config.model_type], 0
    for i, block in enumerate(find_blocks(model, family)):
        linear = get_linear(split_block(block, family, model.config), family, "k")
        kv = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
        d = linear.out_features // kv
        w = linear.weight.double()
        columns = w if linear.bias is None else torch.cat([w, linear.bias.double()[:, None]], 1)
        k = torch.view_as_complex(columns.view(kv // group, group, 2, d // 2, -1).movedim(2, -1).contiguous())
        needed = 0
        for f in range(d // 2):
            rank = 1 + f % max(group - 1, 1)
            needed += rank
            for g in range(len(k)):
                basis = torch.linalg.qr(torch.complex(draw(group, rank, seed=i + f), draw(group, rank, seed=50 + g))).Q
                k[g, :, f] = basis @ basis.mH @ k[g, :, f]
        columns = torch.view_as_real(k).movedim(-1, 2).reshape(kv * d, -1).to(linear.weight.dtype)
        linear.weight.copy_(columns[:, : w.shape[1]])
        if linear.bias is not None:
            linear.bias.copy_(columns[:, -1])
        join_block(block, family)
    return needed


SHARING = [("llama_mha", 4), ("llama_dynamic", 2), ("qwen2", 2), ("phi3", 2), ("gemma2", 2), ("cohere", 2)]


@pytest.mark.parametrize(
    ("name", "group"),
    tiny.pick(
        SHARING,
        [
            ("llama_gqa", 2),
            ("llama_mha", 2),
            ("llama_rope3", 2),
            ("llama_yarn", 2),
            ("llama_bias", 2),
            ("mistral", 2),
            *SHARING,
        ],
    ),
)
def test_a_low_rank_within_a_frequency_commutes_with_rotation(name, group, tmp_path):
    """Keys whose heads share channels within each frequency: only those are cached, rotated, and nothing changes."""
    model = tiny.build(name, torch.float64)
    shape = MemorySource(model).shape(0)
    rank = 2 * share_keys(model, group)
    method = Cut(cuts=(("keys", rank),), parts=(KeyFrequency(group),))
    result = compress(model, output=tmp_path / "m", keep=0.99, method=method, windows=WINDOWS, dtype=torch.float64)
    small, ids = load(tmp_path / "m", dtype=torch.float64), WINDOWS[:2, :6]
    with torch.no_grad():
        assert float((small(WINDOWS[:4]).logits - model(WINDOWS[:4]).logits).abs().max()) < 1e-4
        cache = small(ids, use_cache=True).past_key_values
    per_token = (rank * (shape.kv_heads // group) + shape.kv_heads * shape.v) * 8 * model.config.num_hidden_layers
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == ids.numel() * per_token == ids.numel() * result.kv_bytes_per_token_after
    assert result.kv_bytes_per_token_after < result.kv_bytes_per_token_before
    family = FAMILIES[model.config.model_type]
    for old, new in zip(find_blocks(model, family), find_blocks(small, family)):
        dense = get_linear(split_block(old, family, model.config), family, "k").weight
        rebuilt = new.get_submodule(family.attention).rebuild(get_linear(new, family, "k").weight)
        assert torch.allclose(rebuilt, dense, atol=1e-6)
        join_block(old, family)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = compare_answers(small, model, ids, options)
    if name != "llama_dynamic":  # its frequencies change with the length
        static = small.generate(ids, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, cached)


def test_keys_shared_within_frequencies_lose_no_more_than_dropped_pairs():
    """At equal cache the eigenvectors of all heads of a set are never worse than whole pairs of each head."""
    from test_laws import cases

    ((_, pairs, shape),) = cases("llama_mha", RotaryPairs("energy"))
    ((_, shared, _),) = cases("llama_mha", KeyFrequency())
    losses = [(float(shared.loss[shape.kv_heads * r]), float(pairs.loss[r])) for r in range(2, shape.qk, 2)]
    assert all(a < b for a, b in losses)
    ((_, single, _),) = cases("llama_mha", KeyFrequency(group=1))  # heads on their own: the same pairs
    for r in range(2, shape.qk, 2):
        assert float(single.loss[r]) == pytest.approx(float(pairs.loss[r]), rel=1e-9)


def test_shared_keys_compile_without_graph_breaks(tmp_path):
    compress(
        tiny.build("llama_gqa"), output=tmp_path / "m", kv_keep=0.6, method=Palu(keys="frequency"), windows=WINDOWS
    )
    small, ids = load(tmp_path / "m"), WINDOWS[:2]
    with torch.no_grad():
        compiled = torch.compile(small, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(ids).logits, small(ids).logits, atol=1e-5)


def test_palu_ranks_follow_the_gradients_of_the_weights(tmp_path):
    """F = the mean over W of √E[(∂L/∂W)²] by autograd through the whole model, labels as sampled; ranks are in its
    proportion."""
    model = tiny.build("llama_gqa", torch.float64)
    stream = Stream(MemorySource(model), WINDOWS, dtype=torch.float64)
    job = pose_on(stream, Palu(), asked=Limits(kv_keep=0.6))
    planned = job.plan()
    plan, found = planned.ranks, planned.notes["fisher"]
    sums = dict.fromkeys(found, torch.zeros(()))
    weights = {}
    for i, layer in enumerate(model.model.layers):
        weights |= {f"{i}.keys": layer.self_attn.k_proj.weight, f"{i}.vo": layer.self_attn.v_proj.weight}
    for n, ids in enumerate(WINDOWS):
        logits = model(ids[None]).logits[0]
        noise = torch.rand(len(ids), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        labels = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), noise[:, None]).squeeze(1)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            sums[name] = sums[name] + g.square()
    for name, f in found.items():
        assert f == pytest.approx(float((sums[name] / WINDOWS.numel()).sqrt().mean()), rel=1e-5)
    ranked = sorted(plan, key=lambda u: found[str(u)])
    share = {u: job.problem.cost(u, r) / job.problem.cost(u, job.problem.full(u)) for u, r in plan.items()}
    assert share[ranked[0]] < share[ranked[-1]]
    for a, b in itertools.pairwise(ranked):
        assert share[a] <= share[b] + max(
            job.problem.cost(u, 1) / job.problem.cost(u, job.problem.full(u)) for u in (a, b)
        )


def test_keys_shared_within_frequencies_have_their_values_share():
    """However little gradients say of a block's keys."""
    model = tiny.build("llama_gqa", torch.float64, head_dim=16)
    model.model.layers[0].self_attn.q_proj.weight.data *= 0.01
    stream, shares = Stream(MemorySource(model), WINDOWS, dtype=torch.float64), {}
    for keys in ("rebuild", "frequency"):
        job = pose_on(stream, Palu(keys=keys), asked=Limits(kv_keep=0.6))
        shares[keys] = {u: r / job.problem.full(u) for u, r in job.plan().ranks.items()}
    for i in range(len(model.model.layers)):
        assert shares["frequency"][Unit(i, "keys")] == pytest.approx(shares["frequency"][Unit(i, "vo")], abs=2 / 16)
    assert shares["rebuild"][Unit(0, "keys")] < shares["rebuild"][Unit(0, "vo")] / 2  # by their own gradients


def test_a_part_with_coarse_steps_keeps_its_share_as_a_whole():
    """Narrow heads: some blocks keep all rotary pairs, others three of four, instead of all of them three."""
    model = tiny.build("llama_gqa", num_hidden_layers=5)
    job = pose_on(Stream(MemorySource(model), WINDOWS), A3(), 0.9)
    plan = job.plan().ranks
    for part in ("qk", "vo", "mlp"):
        units = [u for u in plan if u.name == part]
        kept = sum(job.problem.cost(u, plan[u]) for u in units) / sum(
            job.problem.cost(u, job.problem.full(u)) for u in units
        )
        assert kept == pytest.approx(0.9, abs=0.03), part
    assert {plan[u] for u in plan if u.name == "qk"} == {6, 8}


def test_parts_can_be_cut_alone(tmp_path):
    model = tiny.build("llama_gqa")
    compress(model, output=tmp_path / "m", keep=0.95, method=A3(parts=("vo",)), windows=WINDOWS)
    small = load(tmp_path / "m")
    for old, new in zip(model.model.layers, small.model.layers):
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        assert torch.equal(old.mlp.down_proj.weight, new.mlp.down_proj.weight)
        assert old.self_attn.v_proj.weight.shape != new.self_attn.v_proj.weight.shape
    with pytest.raises(InputError, match="parts=head; expected some of qk,vo,mlp"):
        compress(model, output=tmp_path / "n", keep=0.9, method=A3(parts=("head",)), windows=WINDOWS)


@pytest.mark.parametrize(
    "method", [A3(), Palu(allocation="uniform"), Palu(allocation="uniform", keys="frequency")], ids=str
)
def test_planned_work_is_what_attention_multiplies(method, tmp_path):
    """One more token in the cache costs the planned number of multiplications, counted while decoding."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.build("llama_gqa")
    job = pose_on(Stream(MemorySource(model), WINDOWS), method, asked=Limits(kv_keep=0.6))
    plan, work = job.plan().ranks, 0
    for unit, rank in plan.items():
        solver, shape = job.problem.units[unit], job.problem.shapes[unit.block]
        work += sum(found.scores for _, found in footprints(solver, unit, shape, rank))
    compress(model, output=tmp_path / "m", kv_keep=0.6, method=method, windows=WINDOWS)
    config = load(tmp_path / "m").config
    specs = config.planish["blocks"]
    planned = sum(footprint(spec, shape).scores for spec, shape in zip(specs, job.problem.shapes, strict=True))
    if getattr(method, "keys", "") == "frequency":
        assert work >= planned  # values of a set lie side by side, and may be fewer than the keys' solver can know
    else:
        assert work == planned
    small = load(tmp_path / "m", attn_implementation="eager")
    counted = []
    for length in (10, 11):
        with torch.no_grad():
            cache = small(WINDOWS[:1, :length], use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                small(WINDOWS[:1, length : length + 1], past_key_values=cache)
        counted.append(counter.get_total_flops())
    shape = job.problem.shapes[0]
    rotates_again = getattr(method, "keys", "") == "rebuild"  # then every block makes the angles of all positions
    assert counted[1] - counted[0] == 2 * planned + rotates_again * shape.rotary * shape.blocks


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights_compose_with_compression(bits, tmp_path):
    """The same with bitsandbytes, whose kernels are run on CUDA here."""
    if not torch.cuda.is_available():
        pytest.skip("bitsandbytes needs CUDA, and there is none")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    compress(tiny.build("llama_gqa"), output=tmp_path / "m", keep=0.8, method="a3", windows=WINDOWS)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    small, ids = load(tmp_path / "m").cuda(), WINDOWS[:4].cuda()
    small_int = load(tmp_path / "m", quantization_config=config, device_map={"": 0})
    with torch.no_grad():
        a, b = small(ids).logits.float(), small_int(ids).logits.float()
    assert 0 < float((a - b).norm() / a.norm()) < {8: 0.1, 4: 0.6}[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_weights_compose_with_compression(bits, tmp_path):
    """A compressed folder loads with integer weights, computes nearly the same and generates."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'planish[quant]'")
    from transformers import TorchAoConfig

    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        axis = quantization.PerAxis(0)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=axis)
    compress(tiny.build("llama_gqa"), output=tmp_path / "m", keep=0.8, method="a3", windows=WINDOWS)
    small, ids = load(tmp_path / "m"), WINDOWS[:4]
    small_int = load(tmp_path / "m", quantization_config=TorchAoConfig(config))
    linear = small_int.model.layers[0].self_attn.v_proj
    assert (
        type(linear.weight.data) is not torch.Tensor
        and linear.weight.shape == small.model.layers[0].self_attn.v_proj.weight.shape
    )
    later = load(tmp_path / "m")
    quantization.quantize_(later, config, lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    with torch.no_grad():
        a, b = small(ids).logits, small_int(ids).logits
        assert torch.equal(later(ids).logits, b)  # the same weights, whether they are made while loading or afterwards
    assert 0 < float((a - b).norm() / a.norm()) < {8: 0.05, 4: 0.6}[bits]
    assert small_int.generate(ids[:1, :4], max_new_tokens=4, pad_token_id=0).shape[1] > 4


@torch.no_grad()
def test_queries_of_zero_want_no_keys(tmp_path):
    """A block whose queries are all zero gets weights that fit, and nothing else changes."""
    model = tiny.build("llama_gqa")
    model.model.layers[1].self_attn.q_proj.weight.zero_()
    compress(model, output=tmp_path / "m", kv_keep=0.6, method="palu", windows=WINDOWS, settings={"keys": "frequency"})
    assert torch.isfinite(load(tmp_path / "m")(WINDOWS[:2]).logits).all()


@torch.no_grad()
def test_mixed_ranks_may_cut_what_uniform_ones_leave_whole(tmp_path):
    """Heads so narrow that a share of 0.9 rounds to all of their pairs: those that do nothing go all the same."""
    model = tiny.build("llama_gqa", num_hidden_layers=3, head_dim=8, intermediate_size=64)
    for name in ("q_proj", "k_proj"):
        getattr(model.model.layers[0].self_attn, name).weight.unflatten(0, (-1, 8))[:, [2, 3, 6, 7]] *= 1e-4
    plans = {}
    for allocation in ("uniform", "mixed"):
        out = tmp_path / allocation
        compress(model, output=out, keep=0.93, method="a3", windows=WINDOWS, settings={"allocation": allocation})
        manifest = json.loads((out / "planish.json").read_text())
        plans[allocation] = manifest["plan"]
        if allocation == "mixed":
            assert manifest["notes"]["rises"]["0.qk"] < 1e-3
    assert plans["uniform"]["0.qk"] == 8
    assert plans["mixed"]["0.qk"] < 8
