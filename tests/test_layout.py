"""What blocks are made of: groups of linears that differ from block to block, experts among them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SeedOssConfig, SeedOssForCausalLM

import planish
import tiny
from planish.apply import count_block
from planish.calibrate.collect import capture
from planish.calibrate.losses import compute_logits, output_gradient
from planish.calibrate.measure import sweep_back, sweep_forward
from planish.calibrate.stream import Stream, read_weights
from planish.calibrate.taps import Routed, take_windows
from planish.core import list_untouched
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.methods import list_methods
from planish.modelling import families, modelling
from planish.modelling.blocks import get_linear
from planish.modelling.experts import Experts
from planish.modelling.families import ATTENTION, FAMILIES, MLP, Family
from planish.plan.footprint import count_weights
from planish.stats import Stats, Tap

EXPERTS = 8
WINDOWS = tiny.windows(20, 12)  # every eighth is held out
IDS = tiny.windows(1, 2000)[0].numpy()


@pytest.fixture(scope="module")
def sparse() -> nn.Module:
    """Two blocks of eight experts with a dense block between them, in fp64."""
    return tiny.build("qwen3_moe", torch.float64)


def watch(model: nn.Module, block: int, windows: Tensor = WINDOWS) -> list[tuple[int, int, Tensor]]:
    """(window, expert, what the expert reads) for every token and every expert it reaches, by transformers' own forward."""
    found = []

    def look(module, args):
        hidden, index, _ = args
        for token, chosen in enumerate(index.tolist()):
            found.extend((token // windows.shape[1], expert, hidden[token]) for expert in chosen)

    handle = model.model.layers[block].mlp.experts.register_forward_pre_hook(look)
    with torch.no_grad():
        model(windows)
    handle.remove()
    return found


def measure(source, taps: list[Tap], windows: Tensor = WINDOWS) -> tuple[dict[int, Stats], Stream, list[Tensor]]:
    """Statistics of these taps in every block with experts, the stream and its last outputs."""
    stream = Stream(source, windows, dtype=torch.float64)
    every = sweep_forward(stream, lambda shape: taps if shape.experts else [])
    return {i: stats for i, _, stats in every if stats.sums}, stream, list(stream.outputs())


def test_blocks_of_one_model_differ(sparse):
    source = MemorySource(sparse)
    shapes = [source.shape(i) for i in range(3)]
    assert [s.roles for s in shapes] == [ATTENTION, ATTENTION + MLP, ATTENTION]
    assert [s.experts and (s.experts.number, s.experts.top, s.experts.intermediate) for s in shapes] == [
        (8, 2, 12),
        None,
        (8, 2, 12),
    ]
    assert shapes[0].others == (("mlp.gate", 8, 32),)  # the router
    assert shapes[0].linear("expert.7.down") == (32, 12) and shapes[0].linear("expert.0.gate") == (12, 32)
    assert shapes[0].width("expert.5.down.in") == shapes[0].width("dense:expert.5.up.out") == 12
    assert shapes[0].width("expert.5.down.out") == shapes[0].width("expert.5.up.in") == 32
    attention, expert = 2 * 64 * 32 + 2 * 32 * 32, 3 * 12 * 32
    assert shapes[0].count() == attention + 8 * 32 + 8 * expert
    assert shapes[0].working == attention + 8 * 32 + 2 * expert  # with the router, without the six others
    assert shapes[1].working == shapes[1].count() == attention + 3 * 44 * 32


@pytest.mark.parametrize("name", tiny.each([*tiny.NAMES, *tiny.MORE, *tiny.SPARSE, *tiny.HYBRIDS, *tiny.STOCK]))
def test_every_weight_is_a_units_or_untouched(name):
    """Also: a unit's full cost is the weights of the linears it holds."""
    source = MemorySource(tiny.build(name))
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    blocks = [source.block(i) for i in range(source.n_blocks)]
    stored = [count_block(b) for b in blocks]
    assert [s.count() for s in shapes] == stored
    for shape, block in zip(shapes, blocks, strict=True):
        for role in shape.linears:
            assert tuple(get_linear(block, source.family, role).weight.shape) == shape.linear(role)
    planned = 0
    for name_of, method in list_methods().items():
        try:
            units = {u: s for s in method().solvers() for shape in shapes for u in s.units(shape)}
        except InputError:  # needs blocks that are all alike
            assert name in (*tiny.SPARSE, *tiny.HYBRIDS, *tiny.STOCK)
            continue
        planned += bool(units)
        left = [[0, set(s.roles + s.rest)] for s in shapes]
        for block, what, weights in list_untouched(units, shapes):
            left[block][0] += weights
            gone = {r for r in left[block][1] if r == what or (what == "experts" and r.startswith("expert."))}
            assert gone and sum(shapes[block].count(r) for r in gone) == weights
            left[block][1] -= gone
        for (weights, held), shape, total in zip(left, shapes, stored, strict=True):
            assert weights + sum(shape.count(r) for r in held) == total
        for unit, solver in units.items():
            shape = shapes[unit.block]
            held = set(shape.held(unit.name))
            assert held <= left[unit.block][1], f"{name_of}: {unit} holds what is called untouched"
            if unit.name != "stream":
                assert count_weights(solver, unit, shape, solver.ranks(unit, shape)[-1]) == sum(
                    shape.count(r) for r in held
                )
    assert planned > 5


@pytest.mark.parametrize("part", ["all", "fit", "held"])
def test_gram_of_what_an_expert_reads(sparse, part):
    """Against the tokens that transformers' own forward sends it; "held" is every eighth window."""
    taps = [
        Tap(f"expert.{j}.{site}", kind, part=part)
        for j in range(EXPERTS)
        for site in ("up.in", "down.in")
        for kind in ("gram", "squares")
    ]
    found, _, _ = measure(MemorySource(sparse), taps)
    assert set(found) == {0, 2}
    for i, stats in found.items():
        experts = sparse.model.layers[i].mlp.experts
        seen = watch(sparse, i)
        for j in range(EXPERTS):
            rows = [
                x for window, expert, x in seen if expert == j and part in ("all", "held" if window % 8 == 7 else "fit")
            ]
            gate, up = experts.gate_up_proj[j].detach().chunk(2)
            for site, read in (
                ("up.in", lambda x: x),
                ("down.in", lambda x, g=gate, u=up, act=experts.act_fn: act(g @ x) * (u @ x)),
            ):
                tap = Tap(f"expert.{j}.{site}", "gram", part=part)
                expected = sum((torch.outer(read(x), read(x)) for x in rows), torch.zeros_like(stats.sums[tap]["sum"]))
                assert stats.tokens[tap] == len(rows)
                torch.testing.assert_close(stats.sums[tap]["sum"], expected)
                squares = stats.sums[replace(tap, kind="squares")]["sum"]
                torch.testing.assert_close(squares, expected.diagonal())


def test_tokens_do_not_depend_on_batches(sparse, monkeypatch):
    tap = Tap("expert.2.down.in", "gram", part="fit")
    whole, _, _ = measure(MemorySource(sparse), [tap])
    monkeypatch.setattr("planish.calibrate.stream.BATCH", 24)
    split, stream, _ = measure(MemorySource(sparse), [tap])
    assert len(stream.batches) == 10
    for i in whole:
        assert whole[i].tokens == split[i].tokens
        torch.testing.assert_close(whole[i].sums[tap]["sum"], split[i].sums[tap]["sum"])


def test_wide_grams_of_experts(sparse, monkeypatch):
    tap = Tap("expert.2.up.in", "gram", part="held")
    narrow, _, _ = measure(MemorySource(sparse), [tap])
    monkeypatch.setattr("planish.stats.WIDE", 1)
    wide, _, _ = measure(MemorySource(sparse), [tap])
    for i in narrow:
        assert narrow[i].tokens == wide[i].tokens
        torch.testing.assert_close(narrow[i].sums[tap]["sum"], wide[i].sums[tap]["sum"])


@pytest.mark.parametrize("size", [1, 1 << 40], ids=["wide", "narrow"])
def test_an_expert_that_no_token_reaches(sparse, size, monkeypatch):
    monkeypatch.setattr("planish.stats.WIDE", size)
    few = WINDOWS[:1, :2]  # four choices among eight experts
    idle = next(j for j in range(EXPERTS) if all(expert != j for _, expert, _ in watch(sparse, 0, few)))
    tap = Tap(f"expert.{idle}.up.in", "gram")
    stats = measure(MemorySource(sparse), [tap], few)[0][0]
    assert stats.tokens[tap] == 0 and not stats.mean(tap).any() and stats.mean(tap).shape == (32, 32)


def test_gradients_at_an_expert(sparse):
    """Against autograd through the whole block, with the gradient of its output given."""
    source, windows = MemorySource(sparse), WINDOWS[:9]
    taps = [Tap(f"grad:expert.{j}.down.out", "gram") for j in range(EXPERTS)]
    taps += [Tap(f"grad:expert.{j}.up.back", "gram", part="fit") for j in range(EXPERTS)]
    stream = Stream(source, windows, dtype=torch.float64)
    found = {i: s for i, _, s in sweep_back(stream, lambda shape: taps if shape.block == 2 else [])}
    with torch.no_grad():
        last = sparse.model(windows, output_hidden_states=True).hidden_states
    into = output_gradient(stream, stream_outputs(sparse, windows), 0, 0)
    block, inputs = source.block(2), last[2]
    outputs: dict[str, Tensor] = {}
    handles = [
        get_linear(block, source.family, f"expert.{j}.{r}").register_forward_hook(
            lambda m, a, out, key=f"{j}.{r}": outputs.update({key: out})
        )
        for j in range(EXPERTS)
        for r in ("up", "down")
    ]
    with torch.enable_grad():
        block.requires_grad_(True)
        out = block(inputs, **stream.calls[len(windows)][2])
        names = sorted(outputs)
        gradients = dict(zip(names, torch.autograd.grad(out, [outputs[n] for n in names], into), strict=True))
    for handle in handles:
        handle.remove()
    places = [[(w, x) for w, expert, x in watch(sparse, 2, windows) if expert == j] for j in range(EXPERTS)]
    for j in range(EXPERTS):
        g = gradients[f"{j}.down"]
        torch.testing.assert_close(found[2].sums[taps[j]]["sum"], g.T @ g)
        up = get_linear(block, source.family, f"expert.{j}.up").weight.detach()
        back = gradients[f"{j}.up"] @ up
        kept = back[[n for n, (w, _) in enumerate(sorted(places[j], key=lambda p: p[0])) if w % 8 != 7]]
        torch.testing.assert_close(found[2].sums[taps[EXPERTS + j]]["sum"], kept.T @ kept)


def stream_outputs(model: nn.Module, windows: Tensor) -> Tensor:
    """The last block's outputs, by transformers' own forward."""
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return seen[0] if isinstance(seen[0], Tensor) else seen[0][0]


@pytest.mark.parametrize("stacked", [False, True])
def test_folders_are_read_expert_by_expert(sparse, stacked, tmp_path):
    """One tensor per expert, as transformers writes unless told, or stacked: the same block, and the model's own logits."""
    sparse.save_pretrained(tmp_path, save_original_format=not stacked)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("model.layers.0.mlp.experts.gate_up_proj" in stored) is stacked
    source, memory = open_source(tmp_path), MemorySource(sparse)
    assert sum(n for n, _ in source.sizes().values()) == sum(p.numel() for p in sparse.parameters())
    assert source.shape(0) == memory.shape(0)
    weights = read_weights(source.block(0), Stream(source, WINDOWS))
    whole = sparse.model.layers[0].mlp.experts
    for j in range(EXPERTS):
        for role, stock in (
            ("gate", whole.gate_up_proj[j, :12]),
            ("up", whole.gate_up_proj[j, 12:]),
            ("down", whole.down_proj[j]),
        ):
            assert torch.equal(weights[f"expert.{j}.{role}"], stock.detach())
    _, stream, out = measure(source, [])
    with torch.no_grad():
        expected = sparse(WINDOWS).logits
    torch.testing.assert_close(torch.cat([compute_logits(stream, h) for h in out]), expected)


def test_stacked_experts_of_another_shape_are_refused(sparse, tmp_path):
    sparse.save_pretrained(tmp_path, save_original_format=False)
    config = json.loads((tmp_path / "config.json").read_text())
    key = next(k for k in ("num_experts", "num_local_experts") if k in config)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 6}))
    with pytest.raises(InputError, match=r"has shape \(8, (24|32), (32|12)\), expected \(6, .* from config"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(stored | {name: stored[name].flatten(0, 1)}, file)
    with pytest.raises(InputError, match=r"gate_up_proj has shape \(192, 32\), expected \(experts, rows, columns\)"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.mT.contiguous(), r"gate_up_proj has shape \(8, 32, 24\), expected \(8, 24, 32\)"),  # as llama4's
        (lambda t: t[:7].contiguous(), r"gate_up_proj has shape \(7, 24, 32\), expected \(8, 24, 32\)"),
        (lambda t: torch.cat([t, t[:1]]), r"gate_up_proj has shape \(9, 24, 32\), expected \(8, 24, 32\)"),
        (lambda t: t.index_fill(0, torch.tensor(3), torch.nan), r"experts\.3\.gate_proj\.weight .* NaN"),
    ],
)
def test_stacks_of_another_layout_are_refused(change, match, sparse, tmp_path):
    """Transposed, with an expert too few or too many, with one that is no number: in one line, and nothing is written."""
    sparse.save_pretrained(tmp_path / "model", save_original_format=False)
    file = tmp_path / "model" / "model.safetensors"
    stored, name = load_file(file), "model.layers.0.mlp.experts.gate_up_proj"
    save_file(stored | {name: change(stored[name])}, file)
    with pytest.raises(InputError, match=match) as error:
        tiny.compress(tmp_path / "model", output=tmp_path / "out", windows=WINDOWS, method="reap", keep=0.8)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_solving_neurons_of_experts_is_rehearsed():
    """Their weights are among those that are drawn for it."""
    options = {"keep": 0.7, "calibration": IDS, "n_samples": 4, "seq_len": 12}
    assert planish.forecast(tiny.build("qwen3_moe"), measure=True, method="a3", **options).keep <= 0.7


def test_experts_of_a_block_share_its_memory(sparse):
    block = MemorySource(sparse).block(0)
    experts = block.mlp.experts
    assert isinstance(experts, Experts)
    weights = [
        get_linear(block, FAMILIES["qwen3_moe"], f"expert.{j}.{r}").weight
        for j in range(EXPERTS)
        for r in ("gate", "up")
    ]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1


def test_stacked_and_single_experts_compute_the_same(sparse):
    stock = sparse.model.layers[0].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = stock(x)
    block = MemorySource(sparse).block(0)
    torch.testing.assert_close(block.mlp(x), expected.detach())


def test_a_plan_counts_stored_and_working_weights(sparse, tmp_path):
    model = tiny.build("qwen3_moe", torch.bfloat16)
    tiny.save(model, tmp_path / "model")
    found = planish.forecast(tmp_path / "model", keep=0.9, method="svd-llm", calibration=IDS, n_samples=4, seq_len=12)
    params = sum(p.numel() for p in model.parameters())
    assert found.params_before == params
    blocks = sum(MemorySource(model).shape(i).count() for i in range(3))
    assert found.block_params_before == blocks and found.keep <= 0.9
    file = tmp_path / "model" / "model.safetensors"
    assert 0 <= found.bytes_before - 2 * params <= 2 * (file.stat().st_size - 2 * params)  # headers: one file a block
    head, context = model.lm_head.weight.numel(), 12
    idle = 2 * (EXPERTS - 2) * 3 * 12 * 32  # of two blocks, experts that a token does not reach
    attention = 3 * context * 2 * 4 * 16  # scores and sums of values, four heads
    assert found.flops_per_token_before == 2 * (blocks - idle + attention + head)
    assert found.flops_per_token_before - found.flops_per_token_after == 2 * (found.params_before - found.params_after)
    assert found.warnings[-2:] == [
        "untouched: mlp.gate of blocks 0, 2, 512 weights",
        "untouched: experts of blocks 0, 2, 18,432 weights",
    ]
    assert {(u["block"], u["unit"]) for u in found.units} == {
        (i, r) for i in range(3) for r in ATTENTION + (MLP if i == 1 else ())
    }


def test_auto_plans_a_mixed_model_within_its_budgets(sparse):
    model = tiny.build("qwen3_moe")
    found = planish.forecast(model, keep=0.9, flops_keep=0.9, method="auto", calibration=IDS, n_samples=8, seq_len=12)
    assert 0.8 < found.keep <= 0.9 and found.budgets["flops_keep"]["achieved"] <= 0.9
    cut = {u["block"] for u in found.units if u["rank"] < u["full"]}
    assert cut, "nothing is cut"


@pytest.mark.parametrize("name", ["olmo2", "granite", "gemma2", "gpt_neox"])
def test_what_is_added_is_what_the_residual_stream_gains(name):
    """Norms before or behind a submodule, a factor, submodules side by side: by what the block itself gives."""
    model = tiny.build(name, torch.float64)
    source = MemorySource(model)
    stream = Stream(source, WINDOWS, dtype=torch.float64)
    sites = {"block.in", "block.out", "attention.raw", "attention.add", "mlp.raw", "mlp.add"}
    found, _ = capture(stream, 0, source.block(0), sites, stream.start())
    seen = {site: next(iter(tensors)) for site, tensors in found.items()}
    middle = seen["attention.raw"] + seen["attention.add"]
    torch.testing.assert_close(seen["attention.raw"], seen["block.in"])
    torch.testing.assert_close(seen["mlp.raw"], seen["block.in"] if source.shape(0).parallel else middle)
    torch.testing.assert_close(seen["block.out"], middle + seen["mlp.add"])


def test_gradients_of_what_is_added_behind_a_factor():
    """The last block's output is residual + contribution: both have the gradient of the output."""
    source = MemorySource(tiny.build("granite", torch.float64))
    stream = Stream(source, WINDOWS, dtype=torch.float64)
    taps = [Tap(f"grad:{site}", "gram") for site in ("mlp.add", "block.out")]
    found = {i: stats for i, _, stats in sweep_back(stream, lambda shape: taps if shape.block == 1 else [])}
    torch.testing.assert_close(*(found[1].sums[tap]["sum"] for tap in taps))


def test_the_page_on_families_is_true(monkeypatch, tmp_path):
    """Its row, and a tiny configuration: read, compressed, loaded by transformers."""
    page = (Path(__file__).parent.parent / "docs" / "extend" / "family.md").read_text(encoding="utf-8")
    row = eval(page.partition("```python")[2].partition("```")[0], vars(families))
    monkeypatch.setitem(FAMILIES, row.model_type, row)
    torch.manual_seed(0)
    model = SeedOssForCausalLM(
        SeedOssConfig(**tiny.configure("llama_gqa").to_diff_dict() | {"model_type": row.model_type})
    ).eval()
    source = MemorySource(model)
    assert [source.shape(i).count() for i in range(3)] == [count_block(source.block(i)) for i in range(3)]
    for name, made in modelling._build(row.model_type).items():  # a row of the table has its classes from the start
        monkeypatch.setattr(modelling, name, made, raising=False)
    modelling.register()
    out = tmp_path / "out"
    result = planish.compress(model, keep=0.8, method="svd-llm", calibration=IDS, n_samples=8, seq_len=12, output=out)
    small = planish.load(out)
    assert 0.75 < result.keep <= 0.8 and small.config.model_type == "planish1_seed_oss"
    assert sum(map(count_block, small.model.layers)) == result.block_params_after
    assert small(WINDOWS).logits.isfinite().all()
    assert not [f.name for f in fields(Family) if f"`{f.name}`" not in page]


def test_take_windows():
    x = torch.arange(12.0).view(2, 3, 2)
    routed = Routed(torch.arange(8.0).view(4, 2), torch.tensor([0, 0, 1, 1]))
    mask = torch.tensor([False, True])
    assert torch.equal(take_windows(x, mask), x[1:]) and torch.equal(take_windows(x, slice(None)), x)
    assert torch.equal(take_windows(routed, mask), routed.rows[2:])
    assert torch.equal(take_windows(routed, slice(None)), routed.rows)
