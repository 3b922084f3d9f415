"""Mixtures of experts: whole experts go, and what is left is the stock architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import planish
import tiny
from planish.calibrate.collect import measure_block
from planish.calibrate.losses import compute_logits, output_gradient
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream, read_weights
from planish.calibrate.taps import tap_sites
from planish.compression import resume
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.modelling.families import FAMILIES
from planish.plan.allocate import Alternative, Curve
from planish.plan.experts import choose_with_experts
from planish.plan.spread import BudgetError
from planish.solvers.experts import Experts, choose_sets
from planish.stats import KINDS
from planish.walks import solve as planish_solve
from posed import pose_on
from tiny import compress

WINDOWS = tiny.windows(20, 12)
IDS = tiny.windows(1, 2000)[0].numpy()
# every kind of checkpoint and of router
QUICK = ("qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "phimoe", "gpt_oss", "llama4")


def find_moe(model: nn.Module, i: int) -> nn.Module:
    """The stock module of transformers that routes block i's tokens."""
    path = FAMILIES[model.config.model_type].experts.path.rpartition(".")[0]
    return model.model.layers[i].get_submodule(path)


@contextmanager
def masked(model: nn.Module, gone: dict[int, list[int]]) -> Iterator[None]:
    """The naive reference: a model of transformers whose routers' logits are −∞ for these experts."""
    row, rows, biases = FAMILIES[model.config.model_type].experts, [], []
    for i, experts in gone.items():
        block = model.model.layers[i]
        for path in row.router:
            parent, _, leaf = path.rpartition(".")
            tensor = getattr(block.get_submodule(parent), leaf)
            if path.endswith(".weight"):
                rows.append((tensor, experts))
            elif "bias" in path:
                biases.append((tensor, tensor.clone()))
                tensor.data[experts] = -torch.inf  # what the choice goes by
    real = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = real(x, weight, bias)
        for own, experts in rows:
            if own.shape == weight.shape and torch.equal(own.to(weight.dtype), weight):
                y = y.index_fill(-1, torch.tensor(experts), -torch.inf)
        return y

    nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = real
        for tensor, whole in biases:
            tensor.data.copy_(whole)


def read_gone(model: nn.Module, folder: Path) -> dict[int, list[int]]:
    """Which experts are missing in a folder, by the rows of its routers."""
    family, (stored,) = FAMILIES[model.config.model_type], [load_shards(folder)]
    gone = {}
    for i, block in enumerate(model.model.layers):
        name = family.store_name(f"{family.blocks}.{i}.{family.experts.router[0]}")
        if name in stored:
            rows = dict(block.named_parameters())[family.experts.router[0]].tolist()
            gone[i] = [j for j, row in enumerate(rows) if row not in stored[name].tolist()]
    return gone


def load_shards(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in tiny.SPARSE + tiny.MIXED]
)
def test_logits_are_those_of_a_model_whose_router_is_masked(name, tmp_path):
    """Loaded by transformers alone; the router chooses as if the experts had never been there."""
    model = tiny.build(name)
    family = FAMILIES[model.config.model_type]
    result = compress(model, output=tmp_path / "out", windows=WINDOWS, method="reap", keep=0.85)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = config[family.experts.count]
    assert result.format == "native" and not list((tmp_path / "out").glob("*.py"))
    assert config["model_type"] == model.config.model_type and 2 <= kept < 8
    small, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert result.params_after == sum(p.numel() for p in small.parameters()) and result.keep <= 0.85
    gone = read_gone(model, tmp_path / "out")
    groups = config.get("n_group", 1)
    for experts in gone.values():
        assert len(experts) == 8 - kept
        assert {sum(j // (8 // groups) == g for j in experts) for g in range(groups)} == {(8 - kept) // groups}
    assert len(gone) == sum(
        s.experts is not None for s in map(MemorySource(model).shape, range(len(model.model.layers)))
    )
    before = model(WINDOWS).logits
    with masked(model, gone):
        expected = model(WINDOWS).logits
    torch.testing.assert_close(small(WINDOWS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-2)


def route(model: nn.Module, i: int, windows: Tensor = WINDOWS) -> list[tuple[int, int, float, Tensor]]:
    """(token, expert, gate, what the expert puts out) of block i, one token after the other."""
    experts, found = find_moe(model, i).experts, []

    def look(module, args):
        for token, (x, chosen, weights) in enumerate(zip(*args, strict=True)):
            for j, gate in zip(chosen.tolist(), weights.tolist(), strict=True):
                a, b = experts.gate_up_proj[j].chunk(2)
                found.append((token, j, gate, experts.down_proj[j] @ (experts.act_fn(a @ x) * (b @ x))))

    handle = experts.register_forward_pre_hook(look)
    with torch.no_grad():
        model(windows)
    handle.remove()
    return found


def naive_scores(routed: list[tuple[int, int, float, Tensor]], criterion: str, prior: float) -> list[float]:
    mine = [[(g, float(f.norm())) for _, k, g, f in routed if k == j] for j in range(8)]
    if criterion == "frequency":
        return [len(m) for m in mine]
    values = {"mass": lambda g, f: g, "man": lambda g, f: f}.get(criterion, lambda g, f: g * f)
    sums = [sum(values(g, f) for g, f in m) for m in mine]
    if criterion in ("mass", "gated"):
        return sums
    mean = sum(sums) / len(routed)
    return [(total + prior * mean) / (len(m) + prior) for total, m in zip(sums, mine, strict=True)]


def measure(solver: Experts, model: nn.Module, i: int, windows: Tensor = WINDOWS):
    """(frontier, shape) of block i's experts, measured by the stream."""
    source = MemorySource(model)
    stream, shape = Stream(source, windows, dtype=torch.float64), source.shape(i)
    unit, taps = Unit(i, "experts"), solver.taps(Unit(i, "experts"), shape)
    if any("grad:" in t.other for t in taps):
        stats = next(s for j, _, s in sweep_back(stream, lambda s: taps if s.block == i else []) if j == i)
    else:
        hidden = stream.start()
        for j in range(i):
            hidden = stream.run(j, stream.block(j), hidden)
        stats, _ = measure_block(stream, i, stream.block(i), taps, hidden)
    return solver.decompose(unit, read_weights(stream.block(i), stream), stats, shape), shape


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "glm4_moe"])
def test_scores_are_those_of_a_loop_over_tokens(name):
    """Softmax of the chosen, softmax of all, and sigmoid with a factor and groups; the worst go."""
    model = tiny.build(name, torch.float64)
    i = len(model.model.layers) - 1
    routed = route(model, i)
    for criterion in ("frequency", "mass", "gated", "reap", "man"):
        solver = Experts(criterion, prior=3.0)
        frontier, shape = measure(solver, model, i)
        worth = naive_scores(routed, criterion, 3.0)
        size = 8 // shape.experts.groups
        for rank in solver.ranks(Unit(i, "experts"), shape)[:-1]:
            (edit,) = solver.truncate(frontier, rank, shape)
            best = [sorted(range(g, g + size), key=lambda j: (-worth[j], j)) for g in range(0, 8, size)]
            assert edit.tensors["kept"].tolist() == sorted(j for g in best for j in g[: rank // shape.experts.groups])


@torch.no_grad()
def test_gates_that_multiply_what_experts_read(tmp_path):
    """llama4: f_j(σ(l_j) x) of the experts with the largest logits, and the shared one; an expert is worth the length of what it
    adds, per gate, and is narrowed for inputs that are multiplied already."""
    model = tiny.build("llama4", torch.float64)
    moe, source, seen = find_moe(model, 2), MemorySource(model), []
    moe.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    model(WINDOWS)
    (x,), experts, total = seen, moe.experts, torch.zeros_like(seen[0])
    added = [[] for _ in range(8)]
    for t, row in enumerate(x):
        for l, j in zip(*(x[t] @ moe.router.weight.T).topk(2), strict=True):
            g = torch.sigmoid(l.float()).double()
            gate, up = (g * row @ experts.gate_up_proj[j]).chunk(2)
            y = (up * torch.nn.functional.silu(gate)) @ experts.down_proj[j]
            total[t] += y
            added[j].append(float(y.norm()))
    block = source.block(2)
    torch.testing.assert_close(block.feed_forward(x[None])[0], total + moe.shared_expert(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moe(x)[0], total + moe.shared_expert(x), rtol=1e-5, atol=1e-6)
    frontier, _ = measure(Experts("reap", prior=0.0), model, 2)
    worth = [sum(a) / max(len(a), 1) for a in added]
    assert frontier.factors["order"].tolist() == sorted(range(8), key=lambda j: -worth[j])
    settings = {"parts": ("mlp",)}
    result = compress(
        model.float(), output=tmp_path / "out", windows=WINDOWS, method="a3", keep=0.85, settings=settings
    )
    assert result.format == "planish"  # the shared one is as wide as an expert of the stock class
    assert tiny.load(tmp_path / "out")(WINDOWS).logits.isfinite().all()


def naive_pairs(routed: list[tuple[int, int, float, Tensor]]) -> Tensor:
    """Mean of a_i a_j over the tokens that reach both; here every pair is drawn to 0 by no further token."""
    found, count = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8)
    for t in {t for t, *_ in routed}:
        for (_, i, g, f), (_, j, h, e) in ((a, b) for a in routed for b in routed if a[0] == b[0] == t):
            found[i, j] += g * float(f.norm()) * h * float(e.norm())
            count[i, j] += 1
    return found / count.clamp(min=1)


def test_experts_that_answer_together_are_counted_together():
    model = tiny.build("qwen3_moe", torch.float64)
    windows = WINDOWS[:4]
    pairs, solver = naive_pairs(route(model, 0, windows)), Experts("together", prior=0.0)
    frontier, shape = measure(solver, model, 0, windows)
    for rank in (3, 5):
        (edit,) = solver.truncate(frontier, rank, shape)
        gone = [j for j in range(8) if j not in edit.tensors["kept"].tolist()]
        loss = sum(float(pairs[i, j]) for i in gone for j in gone)
        for out in gone:  # no swap does better
            for j in edit.tensors["kept"].tolist():
                other = [j, *(k for k in gone if k != out)]
                assert sum(float(pairs[a, b]) for a in other for b in other) >= loss * (1 - 1e-9)


def test_small_sets_are_chosen_as_trying_all_would():
    """Where swaps suffice, of which no example here needs more; of two groups equal parts."""
    shape = MemorySource(tiny.build("glm4_moe")).shape(1).experts
    for seed in range(5):
        x = torch.rand(20, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pairs = x.T @ x
        sets, loss = choose_sets(pairs, shape)
        for m, gone in sets.items():
            able = [c for c in combinations(range(8), m) if sum(j < 4 for j in c) == m // 2]
            best = min(float(pairs[list(c)][:, list(c)].sum()) for c in able)
            mine = gone.nonzero().flatten()
            assert tuple(mine.tolist()) in able
            assert best * (1 - 1e-9) <= float(loss[8 - m]) <= best * 1.05
            assert float(loss[8 - m]) == pytest.approx(float(pairs[mine][:, mine].sum()))


@torch.no_grad()
def watch_removals(model: nn.Module, i: int, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What block i's experts put out (tokens, hidden), and what that changes by (experts, tokens, hidden) if transformers' router
    is told not to choose one of them, so that the next comes in its place."""
    experts, seen = find_moe(model, i).experts, []
    handle = experts.register_forward_hook(  # llama4's give what each adds, one after the other
        lambda m, a, out: seen.append(out.view(-1, windows.numel(), out.shape[-1]).sum(0))
    )
    model(windows)
    for j in range(len(experts.down_proj)):
        with masked(model, {i: [j]}):
            model(windows)
    handle.remove()
    y, *others = seen
    return y, torch.stack(others) - y


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_nats_of_a_removal_are_those_of_a_masked_router(name):
    """½ mean (Σ uᵀ(y′ − y))² over those that go: u by autograd at what the experts put out."""
    model, windows = tiny.build(name, torch.float64), WINDOWS[:6]
    i = len(model.model.layers) - 1
    frontier, _ = measure(Experts("nats", prior=0.0), model, i, windows)
    gradient = sampled_gradient(model, windows)
    _, changes = watch_removals(model, i, windows)
    seen, last = [], []
    find_moe(model, i).experts.register_forward_hook(lambda m, a, out: seen.append(out))
    model.model.layers[i].requires_grad_(True)
    model.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
    model(windows)
    (u,) = torch.autograd.grad(last[0] if isinstance(last[0], Tensor) else last[0][0], seen[0], gradient)
    for m in (1, 3):
        gone = frontier.factors["sets"][m].nonzero().flatten()
        expected = (u * changes[gone].sum(0)).sum(1).square().mean() / 2
        assert float(frontier.loss[8 - m]) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "all_reached"),
    [
        (n, a) for n in (*tiny.SPARSE, "gemma4_moe") for a in (False, True) if n != "phimoe" or not a
    ],  # its router reaches two
)
def test_what_goes_with_an_expert_is_what_goes_where_the_router_is_masked(name, all_reached):
    """u · (y′ − y) of every token and expert. Among all groups, since a masked expert may change which of them are chosen."""
    groups = {"topk_group": 2} if "glm" in name or "deepseek" in name else {}
    jitter = {"router_jitter_noise": 1e-9} if name == "phimoe" else {}  # no two logits count as equal
    if all_reached:
        groups |= {"num_experts_per_tok": 8}
    model = tiny.build(name, torch.float64, **groups, **jitter)
    i, family, windows = len(model.model.layers) - 1, FAMILIES[model.config.model_type], WINDOWS[:4]
    y, changes = watch_removals(model, i, windows)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    expected = (u * changes).sum(-1)

    stream, shape, hidden = Stream(MemorySource(model), windows, dtype=torch.float64), MemorySource(model).shape(i), []
    model.model.layers[i].register_forward_pre_hook(lambda m, a, k: hidden.append(a[0]), with_kwargs=True)
    model(windows)
    stream.start()
    block, seen = stream.block(i).requires_grad_(False), []
    block.get_submodule(family.experts.path).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.enable_grad(), tap_sites(block, family, {"experts.shares"}) as sites:
        stream.forward(i, block, hidden[0].requires_grad_(True), 0)
        (d,) = torch.autograd.grad(seen[0], sites["experts.shares"], u)
        found = KINDS[f"{shape.experts.gates}_removals"](sites["experts.shares"].detach(), d)["sum"]
    torch.testing.assert_close(seen[0], y, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found, expected @ expected.T, rtol=1e-4, atol=1e-6 * float(expected.square().sum()))


def sampled_gradient(model: nn.Module, windows: Tensor) -> Tensor:
    stream = Stream(MemorySource(model), windows, dtype=torch.float64)
    return output_gradient(stream, stream.outputs()[0], 0, 0)


def test_few_tokens_neither_crash_nor_condemn(tmp_path):
    """Four choices among eight experts: those that nothing reached are named, and are not the first to go."""
    model = tiny.build("qwen3_moe", torch.float64)
    few = WINDOWS[:1, :2]
    with pytest.warns(UserWarning, match=r"block 0: no calibration token reaches experts .* of 8"):
        frontier, shape = measure(Experts("reap"), model, 0, few)
    reached = {j for _, j, *_ in route(model, 0, few)}
    (edit,) = Experts("reap").truncate(frontier, 7, shape)
    assert set(range(8)) - set(edit.tensors["kept"].tolist()) <= reached
    result = compress(tiny.build("qwen3_moe"), output=tmp_path / "out", windows=few, method="reap", keep=0.8)
    assert any("no calibration token reaches" in w for w in result.warnings)


def test_experts_that_no_token_reached_are_not_free():
    """Predicted nats of dropping one of them are those of `prior` tokens; of several, of so many times more."""
    model, few = tiny.build("qwen3_moe", torch.float64), WINDOWS[:1, :2]
    idle = [j for j in range(8) if j not in {k for _, k, *_ in route(model, 0, few)}]
    assert len(idle) >= 4
    with pytest.warns(UserWarning, match="no calibration token reaches"):
        (frontier, _), (double, _) = (measure(Experts("nats", prior=p), model, 0, few) for p in (2.0, 4.0))
    assert set(frontier.factors["sets"][4].nonzero().flatten().tolist()) <= set(idle)
    losses = torch.as_tensor(frontier.loss)
    assert losses[7] > 0 and torch.allclose(losses[[6, 5, 4]], losses[7] * torch.tensor([2.0, 3.0, 4.0]).double())
    assert torch.allclose(torch.as_tensor(double.loss)[4:8], 2 * losses[4:8])


def test_a_configuration_that_asks_for_router_logits(tmp_path):
    """As of models that were trained with a loss that balances experts: gradients are measured all the same."""
    model = tiny.build("mixtral", output_router_logits=True)
    result = compress(
        model, output=tmp_path / "out", windows=WINDOWS, method="reap", keep=0.8, settings={"criterion": "nats"}
    )
    assert result.keep <= 0.8 and model.config.output_router_logits
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_router_logits"]
    compress(model, output=tmp_path / "own", windows=tiny.windows(12, 24), method="auto", keep=0.6)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["planish"]
    own = planish.load(tmp_path / "own")
    with torch.no_grad():
        assert own(tiny.windows(2, 12), labels=tiny.windows(2, 12)).loss.isfinite()


@torch.no_grad()
def test_fewer_experts_than_a_token_reached(tmp_path):
    model = tiny.build("qwen3_moe", num_experts_per_tok=4)
    result = compress(model, output=tmp_path / "out", windows=WINDOWS, method="reap", keep=0.68)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = config["num_experts"]
    assert kept < 4 and config["num_experts_per_tok"] == kept
    assert f"it reaches {kept} of them instead of 4" in " ".join(result.warnings)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with masked(model, read_gone(model, tmp_path / "out")):
        torch.testing.assert_close(small(WINDOWS).logits, model(WINDOWS).logits, rtol=1e-4, atol=1e-4)
    head, attention = model.lm_head.weight.numel(), 2 * 64 * 32 + 2 * 32 * 32
    blocks = 3 * attention + 3 * 44 * 32 + 2 * (kept * 32 + kept * 3 * 12 * 32)
    assert result.flops_per_token_after == 2 * (blocks + head + 3 * 12 * 2 * 4 * 16)


def test_a_folder_gives_what_a_model_in_memory_gives(tmp_path):
    model = tiny.build("mixtral")
    compress(model, output=tmp_path / "a", windows=WINDOWS, method="reap", keep=0.8)
    for stacked in (False, True):
        model.save_pretrained(tmp_path / f"m{stacked}", save_original_format=not stacked)
        compress(tmp_path / f"m{stacked}", output=tmp_path / f"b{stacked}", windows=WINDOWS, method="reap", keep=0.8)
        assert load_shards(tmp_path / "a").keys() == load_shards(tmp_path / f"b{stacked}").keys()
        for name, t in load_shards(tmp_path / "a").items():
            assert torch.equal(t, load_shards(tmp_path / f"b{stacked}")[name])
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_shards(tmp_path / "a")


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_attention_of_a_mixture_is_cut_in_our_own_format(name, tmp_path):
    """Checkpoints with other names, stacked ones, shared experts: what is loaded computes what was solved."""
    stream = Stream(open_source(tiny.save(tiny.build(name), tmp_path / "model")), WINDOWS)
    job, hidden = pose_on(stream, "flat-llm", 0.8), stream.start()

    def emit(i: int, block: nn.Module, *_: object) -> None:
        nonlocal hidden
        hidden = stream.run(i, block, hidden)

    planish_solve.solve(job.problem, job.measure, job.method.plan(job.problem, job.measure), emit)
    result = compress(tmp_path / "model", output=tmp_path / "out", windows=WINDOWS, method="flat-llm", keep=0.8)
    loaded = tiny.load(tmp_path / "out")
    assert result.format == "planish" and result.params_after == sum(p.numel() for p in loaded.parameters())
    torch.testing.assert_close(loaded(WINDOWS).logits, compute_logits(stream, hidden[0]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_narrower_experts_are_a_stock_model(tmp_path):
    """Equal widths everywhere; the squared error predicted for a block is what all experts' outputs lose, gates counted."""
    model, windows = tiny.build("qwen3_moe"), tiny.windows(60, 12)  # every expert is reached often enough
    settings = {"parts": ("mlp",)}
    result = compress(model, output=tmp_path / "out", windows=windows, method="a3", keep=0.8, settings=settings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert result.format == "native" and config["moe_intermediate_size"] < 12 and config["num_experts"] == 8
    small, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()) and result.params_after == sum(p.numel() for p in small.parameters())
    width, predicted = (
        config["moe_intermediate_size"],
        json.loads((tmp_path / "out" / "planish.json").read_text())["errors"],
    )
    experts, few, lost = (m.model.layers[0].mlp.experts for m in (model, small, model))
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    lost.register_forward_pre_hook(lambda m, a: rows.append(a))
    model(windows)
    ((hidden, chosen, weights),) = rows
    total = 0.0
    for x, js, gates in zip(hidden, chosen.tolist(), weights, strict=True):
        for j, g in zip(js, gates, strict=True):
            y = [
                e.down_proj[j] @ (e.act_fn(a @ x) * (b @ x))
                for e in (experts, few)
                for a, b in [e.gate_up_proj[j].chunk(2)]
            ]
            total += float((g * (y[0] - y[1])).square().sum())
    assert few.down_proj.shape == (8, 32, width)
    assert predicted["0.neurons"] == pytest.approx(total / len(hidden), rel=1e-3)


@torch.no_grad()
def test_all_cuts_compete_with_experts(tmp_path):
    """auto: equal numbers of experts in all blocks, and their widths, in nats beside what else it cuts; loaded as solved."""
    model = tiny.build("qwen3_moe")
    result = compress(model, output=tmp_path / "out", windows=tiny.windows(40, 12), method="auto", keep=0.7)
    plan = json.loads((tmp_path / "out" / "planish.json").read_text())["plan"]
    kept = {r for u, r in plan.items() if u.endswith(".experts")}
    narrow = {r for u, r in plan.items() if u.endswith(".neurons")}
    assert len(kept) == 1 and (max(kept) < 8 or min(narrow) < 12) and 0.6 < result.keep <= 0.7
    loaded = tiny.load(tmp_path / "out")
    assert result.params_after == sum(p.numel() for p in loaded.parameters())
    assert torch.isfinite(loaded(WINDOWS).logits).all()


@pytest.mark.parametrize(("method", "criterion"), [("hope", None), ("reap", "nats"), ("reap", "frequency")])
def test_other_ways_to_choose_run(method, criterion, tmp_path):
    settings = {"criterion": criterion} if criterion else {}
    result = compress(
        tiny.build("olmoe"), output=tmp_path / "out", windows=WINDOWS, method=method, keep=0.8, settings=settings
    )
    assert result.format == "native" and 0.65 < result.keep <= 0.8


@pytest.mark.slow
def test_prices_tell_which_experts_of_a_trained_mixture_go(mixture_dir, tmp_path):
    """Half of the experts: by their prices hardly anything is lost; by the means of their outputs much more."""

    def lose(**settings: str) -> float:
        out = tmp_path / settings["criterion"]
        asked = {"keep": 0.6, "calibration": "builtin", "n_samples": 32, "seq_len": 128, "settings": settings}
        planish.compress(mixture_dir, output=out, method="reap", **asked)
        return planish.evaluate(out, "builtin", 128, max_windows=32).nll

    dense = planish.evaluate(mixture_dir, "builtin", 128, max_windows=32).nll
    nats, means = lose(criterion="nats"), lose(criterion="man")
    assert nats < dense + 0.05 and nats + 0.1 < means


@pytest.mark.parametrize(("name", "method"), [("mixtral", "reap"), ("granitemoe", "flat-llm")])
def test_an_interrupted_run_goes_on(name, method, tmp_path):
    """After its first block: names of the checkpoint, experts numbered anew, stacks; the same bytes."""
    model = tiny.save(tiny.build(name), tmp_path / "model")
    compress(model, output=tmp_path / "a", windows=WINDOWS, method=method, keep=0.8)
    with tiny.stopped():
        compress(model, output=tmp_path / "b", windows=WINDOWS, method=method, keep=0.8)
    resume(tmp_path / "b")
    for file in [*(tmp_path / "a").glob("*.safetensors"), tmp_path / "a" / "config.json"]:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_plan_says_how_many_tokens_an_expert_sees():
    found = planish.forecast(
        tiny.build("qwen3_moe"), keep=0.8, method="reap", calibration=IDS, n_samples=20, seq_len=12
    )
    assert found.warnings[0].startswith("each of 8 experts sees about 60 of the 240 calibration tokens; that is few")
    assert found.keep <= 0.8 and not found.needed_statistics
    assert {u["rank"] for u in found.units} == {4} and found.units[0]["full"] == 8


def test_a_targets_steps_leave_a_budget_spent():
    """Widths of experts below a step of the target are cut freely, or a plan would fall far below what was asked."""
    asked = {"keep": 0.8, "target": "gguf", "calibration": IDS, "n_samples": 20, "seq_len": 12}
    assert planish.forecast(tiny.build("minimax_m2"), method="auto", measure=True, **asked).keep > 0.7


# ---------------------------------------------------------------- bad input


def refuse(match: str, out: Path, model: object, **more) -> None:
    with pytest.raises(InputError, match=match) as error:
        planish.compress(model, calibration=IDS, n_samples=8, seq_len=12, output=out, **({"keep": 0.9} | more))
    assert "\n" not in str(error.value)
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "qwen3_moe",
            {"num_experts_per_tok": 9},
            "config.json: a token cannot reach num_experts_per_tok 9 of num_experts 8",
        ),
        ("glm4_moe", {"n_group": 3}, "config.json: n_group 3 does not divide n_routed_experts 8"),
        ("glm4_moe", {"topk_group": 3}, "is below topk_group 3"),
    ],
)
def test_routing_that_does_not_fit(name, change, match, tmp_path):
    tiny.save(tiny.build(name), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refuse(match, tmp_path / "out", tmp_path / "model", method="reap")


def test_llama4s_experts_stacked_as_others_stack_them(tmp_path):
    tiny.save(tiny.build("llama4"), tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.feed_forward.experts.gate_up_proj"
    stored = load_file(file)
    save_file(stored | {name: stored[name].mT.contiguous()}, file, {"format": "pt"})
    match = r"gate_up_proj has shape \(8, 24, 32\), expected \(8, 32, 24\) from config"
    refuse(match, tmp_path / "out", tmp_path / "model", method="reap")


def test_a_router_with_nan_is_named(tmp_path):
    tiny.save(tiny.build("qwen3_moe"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.2.mlp.gate.weight"][3, 1] = torch.nan
    save_file(stored, file, {"format": "pt"})
    refuse(r"tensor model\.layers\.2\.mlp\.gate\.weight .* NaN", tmp_path / "out", tmp_path / "model", method="reap")


@pytest.mark.parametrize(
    ("name", "method", "keep", "match"),
    [
        ("llama_gqa", "reap", 0.9, "reap drops experts; this model's blocks have none that could go"),
        ("qwen3_moe", "reap", 0.3, r"reap, which only drops experts: the smallest keep is .*; auto also cuts"),
        ("qwen3_moe", "shortgpt", 0.9, "whole submodules are removed where every block has them; block 0 has no dense"),
        ("qwen3_moe", "slicegpt", 0.9, "slicegpt"),
    ],
)
def test_what_a_method_cannot_do(name, method, keep, match, tmp_path):
    refuse(match, tmp_path / "out", tiny.build(name), method=method, keep=keep)


@pytest.mark.parametrize("budget", [6.0, 9.0, 11.0, 14.0])
def test_the_number_of_experts_is_the_best_of_all(budget):
    """Where the loss of dropping more and more of them is concave, so that no price would choose a number in between."""
    ranks = torch.arange(1, 9)
    experts = {
        Unit(b, "experts"): Curve(Unit(b, "experts"), ranks, ranks.double(), (1 + b) * (8 - ranks).double().sqrt())
        for b in (0, 1)
    }
    other = Curve(Unit(0, "qk"), torch.arange(5), torch.arange(5).double(), (4 - torch.arange(5).double()) ** 2)
    plan, loss = choose_with_experts([[Alternative((other,))]], experts, [budget])
    naive = [
        (sum(float(c.loss[r - 1]) for c in experts.values()) + float(other.loss[k]), r, k)
        for r in range(1, 9)
        for k in range(5)
        if 2 * r + k <= budget
    ]
    best, r, k = min(naive)
    assert loss == pytest.approx(best)
    assert plan == {Unit(0, "experts"): r, Unit(1, "experts"): r, Unit(0, "qk"): k}
    with pytest.raises(BudgetError):
        choose_with_experts([[Alternative((other,))]], experts, [1.0])


def test_a_router_that_takes_two_keeps_two():
    """phimoe's looks for a second expert whatever the configuration says; of one it makes NaN."""
    source = MemorySource(tiny.build("phimoe"))
    assert Experts("nats").ranks(Unit(0, "experts"), source.shape(0))[0] == 2


def test_the_number_of_experts_is_no_width(tmp_path):
    """Steps of widths leave it alone."""
    plain, stepped = (
        compress(tiny.build("mixtral"), output=tmp_path / f"{n}", method="reap", keep=0.75, windows=WINDOWS, round_to=n)
        for n in (1, 8)
    )
    assert plain.keep == stepped.keep < 0.8
