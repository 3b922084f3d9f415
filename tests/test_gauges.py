"""Free changes of a block's basis: the same logits, and no larger an error of rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import compressed
import tiny
from planish.modelling.blocks import Layout, find_blocks, get_linear, read_layout
from planish.modelling.canonical import split_block
from planish.modelling.families import FAMILIES
from planish.modelling.modules import Pair, Pivoted
from planish.rounding.gauges import balance
from planish.rounding.gauges_factors import refit, round_factors
from planish.rounding.gauges_linears import Linear
from planish.rounding.gauges_maps import mix_channels, round_to_nearest, spread
from planish.solvers.forms import low_rank_edit

IDS = tiny.windows(4, 24)
ALL = tiny.NAMES + tiny.MORE + tiny.SPARSE + tiny.HYBRIDS
QUICK = (*tiny.CORE, "llama_bias", "gpt2", "nemotron", "qwen3", "stablelm", "qwen3_moe", "olmo2")


def read_family(model: nn.Module):
    declared = getattr(model.config, "planish", None)
    return FAMILIES[declared["family"] if declared else model.config.model_type]


def open_blocks(model: nn.Module) -> list[tuple[nn.Module, Layout]]:
    """A model's blocks, made canonical in place, and what they are made of."""
    family = read_family(model)
    blocks = [split_block(b, family, model.config) for b in find_blocks(model, family)]
    return [(b, read_layout(b, family, model.config)) for b in blocks]


def see_inputs(model: nn.Module, block: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Role → inputs (tokens, in) that its linear reads."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for role, path in ((r, p) for g in layout.groups for r, p in g.linears.items()):
        look = lambda module, args, role=role: found.setdefault(role, []).append(args[0].flatten(0, -2))  # noqa: E731
        handles.append(block.get_submodule(path).register_forward_pre_hook(look))
    model(IDS)
    for handle in handles:
        handle.remove()
    return {role: torch.cat(xs) for role, xs in found.items()}


def balance_all(model: nn.Module) -> list[str]:
    told = []
    for block, layout in open_blocks(model):
        grams = {r: x.double().T @ x.double() for r, x in see_inputs(model, block, layout).items()}
        told += balance(block, layout, grams)
    return told


def check_logits(model: nn.Module) -> list[str]:
    with torch.no_grad():
        before = model(IDS).logits
        told = balance_all(model)
        after = model(IDS).logits
    assert (after - before).abs().max() < 1e-6 * before.abs().max()
    return told


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALL])
def test_dense_models_compute_the_same(name):
    told = check_logits(tiny.build(name, torch.float64))
    assert told


@pytest.mark.parametrize("forms", compressed.FORMS, ids=str)
def test_compressed_models_compute_the_same(forms, tmp_path):
    folder = compressed.make_folder(tiny.build("llama_gqa", torch.float64), tmp_path / "out", compressed.FORMS[forms])
    check_logits(tiny.load(folder, dtype=torch.float64))


def round_naively(w: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    out = w.clone()
    for row in out:
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            if step := (high - low) / (2**bits - 1):
                zero = round(-low / step)
                codes = [min(max(round(float(x) / step) + zero, 0), 2**bits - 1) for x in part]
                part.copy_(torch.tensor([(c - zero) * step for c in codes]))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [5, 64, 90])
def test_rounding_is_what_it_says(bits, width):
    w = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    w[1] = w[1].abs() + 1
    w[2] = 0
    assert torch.allclose(round_to_nearest(w, bits), round_naively(w, bits), atol=1e-12)


def read_weight(module: nn.Module, rounded=lambda w: w) -> Tensor:
    if isinstance(module, Pair):
        return rounded(module.B.weight) @ rounded(module.A.weight)
    if isinstance(module, Pivoted):
        p = rounded(module.P.weight)
        return torch.cat([p, rounded(module.C.weight) @ p])[module.order.long()]
    return rounded(module.weight)


def measure(model: nn.Module) -> dict[str, float]:
    """Σ over tokens of squared errors that rounding a role makes: of its output; of v, behind o, head by head; of up, behind
    down, neuron by neuron. What follows v and up shrinks or lengthens errors as it does their outputs."""
    found = {}
    for i, (block, layout) in enumerate(open_blocks(model)):
        inputs = see_inputs(model, block, layout)
        modules = {r: block.get_submodule(p) for g in layout.groups for r, p in g.linears.items()}
        w = {r: read_weight(m) for r, m in modules.items()}
        errors = {r: inputs[r] @ (read_weight(m, round_naively) - w[r]).T for r, m in modules.items()}
        heads, kv = layout.heads, layout.kv_heads
        d = w["o"].shape[1] // heads
        behind = 0.0
        for group in range(kv):
            rows = slice(group * d, group * d + d)
            made = plain = lost = 0.0
            for head in range(group * heads // kv, (group + 1) * heads // kv):
                own = slice(head * d, head * d + d)
                o = w["o"][:, own]
                made += float(((inputs["o"][:, own] @ o.T) ** 2).sum())
                plain += float(((inputs["v"] @ w["v"][rows].T @ o.T) ** 2).sum())
                lost += float(((errors["v"][:, rows] @ o.T) ** 2).sum())
            behind += lost * made / plain
        found[f"{i}.v + o"] = behind + float((errors["o"] ** 2).sum())
        grown = (inputs["down"] ** 2).sum(0) / ((inputs["up"] @ w["up"].T) ** 2).sum(0)
        found[f"{i}.up"] = float(((errors["up"] ** 2).sum(0) * grown * (w["down"] ** 2).sum(0)).sum())
        found |= {f"{i}.{r}": float((errors[r] ** 2).sum()) for r in ("q", "k", "gate", "down")}
    return found


def upset(model: nn.Module) -> None:
    """Spread scales of channels, neurons and value dimensions over two decades, as real models' and refitted ones are."""
    g = torch.Generator().manual_seed(3)
    family = read_family(model)
    with torch.no_grad():
        for block in find_blocks(model, family):
            for role in ("o", "down"):
                m = get_linear(block, family, role)
                w = getattr(m, "A", getattr(m, "P", m)).weight
                w *= 10 ** torch.rand(w.shape[1], generator=g)
            w = block.get_submodule(family.attention_norm).weight
            w *= 10 ** torch.rand(w.shape, generator=g)


FORMS = {
    "dense": [None],
    "reduced heads and neurons": [compressed.both(compressed.values(5), compressed.neurons(24))],
    "pairs": [compressed.low_rank("pair", 8)],
    "pivoted": [compressed.low_rank("pivoted", 8)],
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rounding_never_costs_more(form, tmp_path):
    model = tiny.build("llama_gqa", torch.float64, num_hidden_layers=1)
    folder = compressed.make_folder(model, tmp_path / "out", FORMS[form])
    model = tiny.load(folder, dtype=torch.float64)
    upset(model)
    before = measure(model)
    assert check_logits(model)
    once = measure(model)
    assert all(once[name] <= before[name] * (1 + 1e-6) for name in before)
    assert sum(once.values()) < (1 if form == "pivoted" else 0.7) * sum(before.values())
    check_logits(model)
    twice = measure(model)
    assert all(twice[name] <= once[name] * (1 + 1e-6) for name in before)


@torch.no_grad()
def test_without_moments_too():
    model = tiny.build("llama_gqa", torch.float64, num_hidden_layers=1)
    upset(model)
    (block, layout), before = open_blocks(model)[0], model(IDS).logits
    assert len(balance(block, layout)) == 4
    assert torch.allclose(model(IDS).logits, before)


@torch.no_grad()
def test_moments_follow_the_basis():
    model = tiny.build("llama_gqa", torch.float64, num_hidden_layers=1)
    upset(model)
    block, layout = open_blocks(model)[0]
    grams = {r: x.T @ x for r, x in see_inputs(model, block, layout).items()}
    balance(block, layout, grams)
    for role, x in see_inputs(model, block, layout).items():
        assert torch.allclose(grams[role], x.T @ x, rtol=1e-6, atol=1e-6 * float((x.T @ x).abs().max())), role


@torch.no_grad()
def test_what_is_not_free_stays():
    """A layout that says so; what reads a router's norm; values behind which there is more."""
    model = tiny.build("llama_gqa", torch.float64)
    upset(model)
    block, layout = open_blocks(model)[0]
    stays = {p: block.get_submodule(p).weight.clone() for g in layout.groups for p in g.linears.values()}
    assert balance(block, replace(layout, fixed=("attention", "mlp"), norms=())) == []
    assert all(torch.equal(block.get_submodule(p).weight, w) for p, w in stays.items())
    assert len(balance(block, replace(layout, fixed=("attention",), norms=()))) == 1
    changed = {p.rpartition(".")[2] for p, w in stays.items() if not torch.equal(block.get_submodule(p).weight, w)}
    assert changed == {"up_proj", "down_proj"}


def test_norms_that_others_read_are_known():
    norms = {n: [x.roles for x in open_blocks(tiny.build(n))[0][1].norms] for n in ("qwen3_moe", "gpt_neox", "olmo2")}
    assert norms == {"qwen3_moe": [("q", "k", "v")], "gpt_neox": [("q", "k", "v"), ("up",)], "olmo2": []}
    shared = open_blocks(tiny.build("stablelm", use_parallel_residual=True))[0][1]
    assert [n.roles for n in shared.norms] == [("q", "k", "v", "gate", "up")]
    assert check_logits(tiny.build("stablelm", torch.float64, use_parallel_residual=True))


def test_weights_that_do_not_fit_are_not_written():
    model = tiny.build("llama_gqa", torch.float16, num_hidden_layers=1)
    block, layout = open_blocks(model)[0]
    with torch.no_grad():
        block.mlp.up_proj.weight[3] = 6e4
        block.mlp.down_proj.weight[:, 3] = 1e3
    balance(block, layout)
    assert all(bool(p.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("n", [1, 2, 7, 12, 52, 64])
def test_spreading_is_orthogonal_and_flat(n):
    q = spread(n)
    assert torch.allclose(q @ q.T, torch.eye(n, dtype=q.dtype))
    assert q.abs().max() <= (2 / n) ** 0.5 + 1e-12 and torch.equal(q, spread(n))


@pytest.mark.parametrize("rank", [3, 6])
def test_maps_balance_both_factors(rank):
    """The first is M⁻ᵀ (Uᵀ U) M⁻¹ = M (second moments) Mᵀ, diagonal, and no other map of many has a smaller product of traces."""
    g = torch.Generator().manual_seed(rank)
    u, z = (torch.randn(2, 20, rank, dtype=torch.float64, generator=g) * torch.logspace(0, 2, rank) for _ in range(2))
    outer, seen = u.mT @ u, z.mT @ z
    tries = list(mix_channels(outer, seen, torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)))
    assert all(
        torch.allclose(m @ w, torch.eye(rank, dtype=torch.float64).expand(2, -1, -1), atol=1e-6) for m, w in tries
    )
    m, back = tries[0]
    left, right = back.mT @ outer @ back, m @ (seen / (outer * seen).sum((-1, -2), keepdim=True)) @ m.mT
    assert torch.allclose(left, right * (left[:, :1, :1] / right[:, :1, :1]), atol=1e-5 * float(left.max()))
    trace = lambda t: t.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
    for _ in range(20):
        other = torch.randn(2, rank, rank, dtype=torch.float64, generator=g)
        inverse = torch.linalg.inv(other)
        product = trace(inverse.mT @ outer @ inverse) * trace(other @ seen @ other.mT)
        assert (trace(left) * trace(m @ seen @ m.mT) <= product * (1 + 1e-6)).all()


def make_pivoted(form: str) -> tuple[Linear, Tensor]:
    """A linear of rank 20 in a form, and second moments that a few directions dominate."""
    g = torch.Generator().manual_seed(2)
    b, a = torch.randn(40, 20, generator=g).double(), torch.randn(20, 32, generator=g).double()
    x = torch.randn(400, 32, generator=g).double() * torch.logspace(1, -1, 32)
    edit = low_rank_edit("q", b, a, form)
    if form == "pair":
        return Linear(edit.tensors["A.weight"], edit.tensors["B.weight"]), x.T @ x
    return Linear(edit.tensors["P.weight"], edit.tensors["C.weight"], edit.tensors["order"]), x.T @ x


def test_refit_is_least_squares():
    linear, gram = make_pivoted("pair")
    first = round_to_nearest(linear.right, 3)
    found = refit(first, linear.dense(), gram, 1e-9)
    x = torch.linalg.cholesky(gram)
    naive = torch.linalg.lstsq((first @ x).T, (linear.dense() @ x).T).solution.T
    assert torch.allclose(found, naive, atol=1e-5)


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_second_factor_takes_back_the_first_ones_error(form):
    linear, gram = make_pivoted(form)
    nearest = lambda w: round_to_nearest(w, 4)  # noqa: E731
    cost = lambda w: float(((w - linear.dense()) @ gram * (w - linear.dense())).sum())  # noqa: E731
    found = round_factors(linear, gram, lambda w, gram: nearest(w))
    assert cost(found.dense()) < 0.5 * cost(linear.dense(nearest))
    for w in (found.left, found.right):  # of nothing but 16 levels a row
        assert all(len(row.unique()) <= 16 for row in w)
