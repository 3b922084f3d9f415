"""gemma4: keys and values that later blocks read, two sizes of heads, values that are keys, embeddings for every block."""

from __future__ import annotations

import json
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import planish
import tiny
import wrapped
from compressed import low_rank, make_folder, neurons
from planish.calibrate.linears import measure_gradients
from planish.calibrate.losses import compute_logits, output_gradient
from planish.calibrate.stream import Stream
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.modelling.families import MLP
from planish.modelling.modules import Pair
from planish.plan.footprint import footprint
from test_experts import masked, read_gone

WINDOWS = tiny.windows(10, 24)
PLAIN = {
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": False, "use_double_wide_mlp": False,
}  # fmt: skip


def split_stream(model: nn.Module) -> Stream:
    """Of batches that are not of one size."""
    stream = Stream(MemorySource(model), WINDOWS, dtype=torch.float64)
    stream.batches = list(WINDOWS.split(4))
    return stream


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, PLAIN], ids=["shared", "plain"])
def test_hidden_states_are_the_models_own(settings):
    """Also where batches of one size hold other tokens, for which every block has other embeddings."""
    model = tiny.build("gemma4", torch.float64, **settings)
    stream = split_stream(model)
    expected = model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True)
    hidden, widths = stream.start(), []
    for i in range(len(stream)):
        widths.append(hidden[0].shape[-1])
        torch.testing.assert_close(torch.cat([h[..., :32] for h in hidden]), expected.hidden_states[i])
        hidden = stream.run(i, stream.block(i), hidden)
    keys = [0, 2 * 2 * 12, 2 * 2 * 12 + 2 * 16, 2 * 16] if not settings else [0] * 4
    assert widths == [32 + n for n in keys]
    torch.testing.assert_close(torch.cat([compute_logits(stream, h) for h in hidden]), expected.logits)


def test_what_comes_back_at_keys_comes_from_all_that_read_them():
    """Moments of the gradient at every linear's output, block by block, against one backward pass through transformers' model."""
    model = tiny.build("gemma4", torch.float64).requires_grad_(False)
    stream, seen = split_stream(model), dict[tuple[int, str], torch.Tensor]()
    found, outputs = measure_gradients(stream)
    into = torch.cat(
        [output_gradient(stream, h, 0, p.first, "signs") for p, h in zip(stream.pieces, outputs, strict=True)]
    )
    for i, block in enumerate(model.model.layers):
        for name in found[i]:
            block.get_submodule(name).register_forward_hook(lambda m, a, out, at=(i, name): seen.update({at: out}))
    embedded = model.model.embed_tokens.register_forward_hook(lambda m, a, out: out.requires_grad_())
    last = list[torch.Tensor]()
    model.model.norm.register_forward_pre_hook(lambda m, args: last.append(args[0]))
    model(WINDOWS, use_cache=False)
    embedded.remove()
    gradients = torch.autograd.grad(last[0], [*seen.values()], into)
    assert {n for i, n in seen if i < 2} >= {"self_attn.k_proj", "mlp.down_proj", "per_layer_input_gate"}
    for (i, name), g in zip(seen, gradients, strict=True):
        torch.testing.assert_close(found[i][name], g.flatten(0, 1).T @ g.flatten(0, 1) / WINDOWS.numel())


@pytest.mark.slow
def test_every_weight_is_a_units_or_listed_as_untouched():
    model = tiny.build("gemma4")
    source = MemorySource(model)
    shapes = [source.shape(i) for i in range(4)]
    assert [s.roles for s in shapes] == [(*r, *MLP) for r in ("qkvo", "qko", "qo", "qo")]
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert sum(s.count() for s in shapes) == blocks
    ids = tiny.windows(1, 600)[0].numpy()
    plan = planish.forecast(model, keep=0.8, method="svd-llm", calibration=ids, n_samples=4, seq_len=12)
    assert plan.block_params_before == blocks
    told = [w for w in plan.warnings if w.startswith("untouched")]
    listed = [f"untouched: per_layer_{n} of blocks 0, 1, 2, 3, 768 weights" for n in ("input_gate", "projection")]
    outside = {"embed_tokens_per_layer": 97 * 4 * 6, "per_layer_model_projection": 32 * 4 * 6}
    assert told == listed + [f"untouched: model.{name}, {n:,} weights" for name, n in outside.items()]
    assert {(u["block"], u["unit"]) for u in plan.units} == {(s.block, r) for s in shapes for r in s.roles}


@torch.no_grad()
def test_a_cut_model_is_the_stock_one_with_its_products(tmp_path):
    """Loaded from its folder, with a cache and without; the cache holds what the plan counts: of blocks that give."""
    model = tiny.build("gemma4")
    make_folder(model, tmp_path / "m", [low_rank("pair", 9)])
    small = tiny.load(tmp_path / "m")
    cut = [[n for n, m in b.named_modules() if isinstance(m, Pair)] for b in small.model.layers]
    assert [len(names) for names in cut] == [7, 6, 5, 5]
    for ours, stock, names in zip(small.model.layers, model.model.layers, cut, strict=True):
        for name in names:
            stock.get_submodule(name).weight.copy_(ours.get_submodule(name).dense())
    torch.testing.assert_close(small(WINDOWS).logits, model(WINDOWS).logits, rtol=1e-4, atol=1e-4)
    cache = small(WINDOWS[:1, :6], use_cache=True).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    source = MemorySource(model)
    assert [n // 6 for n in held] + [0, 0] == [footprint({}, source.shape(i)).cache for i in range(4)] == [48, 32, 0, 0]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = small.generate(WINDOWS[:2, :13], use_cache=False, **options)
    assert torch.equal(plain, small.generate(WINDOWS[:2, :13], **options))


@torch.no_grad()
def test_feed_forwards_cut_alike_are_a_stock_model(tmp_path):
    """Those that are twice as wide stay so; the fields of blocks are as they were."""
    model = tiny.build("gemma4")
    make_folder(model, tmp_path / "m", [neurons(30), neurons(30), neurons(60), neurons(60)])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "gemma4_text" and config["intermediate_size"] == 30
    small = tiny.load(tmp_path / "m")
    assert [b.mlp.down_proj.in_features for b in small.model.layers] == [30, 30, 60, 60]
    assert [b.self_attn.head_dim for b in small.model.layers] == [12, 16, 12, 16]
    again = open_source(tmp_path / "m")
    assert [again.shape(i).intermediate for i in range(4)] == [30, 30, 60, 60]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention=all"),
    ],
)
def test_what_is_refused_by_name(settings, match):
    with pytest.raises(InputError, match=f"gemma4_text with {match}.* is not supported"):
        MemorySource(tiny.build("gemma4", **settings))


@pytest.mark.parametrize("method", ["shortgpt", "palu"])
def test_what_removes_attention_or_cuts_keys_is_refused(method, tmp_path):
    options = {"kv_keep": 0.7} if method == "palu" else {"keep": 0.7}
    with pytest.raises(InputError, match=r"shares keys and values|cuts neither keys nor values"):
        tiny.compress(tiny.build("gemma4"), output=tmp_path / "m", method=method, windows=WINDOWS, **options)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_inside_its_wrapper(tmp_path):
    """The language model is cut, what is around it is copied bit for bit; for a text with an image in it too, the result is the
    stock model with its products."""
    model = wrapped.build("gemma4")
    folder = tiny.save(model, tmp_path / "dense")
    result = tiny.compress(str(folder), output=tmp_path / "m", keep=0.8, method="svd-llm", windows=WINDOWS[:4])
    before, after = wrapped.read(folder), wrapped.read(tmp_path / "m")
    around = {n for n in before if "language_model" not in n}
    assert around and all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in around)
    assert sum(result.untouched.values()) == sum(before[n].nbytes for n in around)
    assert result.bytes_after == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))
    small = planish.load(tmp_path / "m")
    assert isinstance(small, type(model))
    for ours, stock in zip(*(m.model.language_model.layers for m in (small, model)), strict=True):
        for name in [n for n, m in ours.named_modules() if isinstance(m, Pair)]:
            stock.get_submodule(name).weight.copy_(ours.get_submodule(name).dense())
    torch.testing.assert_close(wrapped.see(small, "gemma4"), wrapped.see(model, "gemma4"), rtol=1e-4, atol=1e-4)
    ids = WINDOWS[:2].clamp(max=80)  # no images
    torch.testing.assert_close(small(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_wrapper_of_which_nothing_is_cut(tmp_path):
    folder = tiny.save(wrapped.build("gemma4"), tmp_path / "dense")
    result = tiny.compress(str(folder), output=tmp_path / "m", keep=1.0, method="a3", windows=WINDOWS[:4])
    before, after = wrapped.read(folder), wrapped.read(tmp_path / "m")
    assert result.format == "native" and before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert type(planish.load(tmp_path / "m")) is type(wrapped.build("gemma4"))


# ---------------------------------------------------------------- experts beside the dense feed-forward


@torch.no_grad()
def test_fewer_experts_than_a_token_reached(tmp_path):
    """Its routers ask the configuration how many they may choose: that of the result, and of each block that runs meanwhile."""
    model = tiny.build("gemma4_moe", top_k_experts=4)
    result = tiny.compress(model, output=tmp_path / "m", windows=WINDOWS, method="reap", keep=0.6)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    kept = config["num_experts"]
    assert result.format == "native" and kept < 4 and config["top_k_experts"] == kept
    assert model.config.top_k_experts == 4 and model.model.layers[0].router.config is model.config
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with masked(model, read_gone(model, tmp_path / "m")):
        torch.testing.assert_close(small(WINDOWS).logits, model(WINDOWS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["auto", pytest.param("flat-llm", marks=pytest.mark.slow)])
def test_both_feed_forwards_are_cut(method, tmp_path):
    """In planish's own format: what is loaded is the stock model with those experts, products and neurons."""
    model = tiny.build("gemma4_moe")
    result = tiny.compress(model, output=tmp_path / "m", windows=tiny.windows(24, 16), method=method, keep=0.6)
    ranks = json.loads((tmp_path / "m" / "planish.json").read_text())["plan"]
    assert {"neurons", "mlp"} & {u.partition(".")[2] for u in ranks} and 0.5 < result.keep <= 0.6
    small = tiny.load(tmp_path / "m")
    assert result.params_after == sum(p.numel() for p in small.parameters())
    logits, cached = small(WINDOWS[:2]).logits, small(WINDOWS[:2, :8], use_cache=True)
    rest = small(WINDOWS[:2, 8:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(torch.cat([cached.logits, rest], 1), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(planish.load(tmp_path / "m")(WINDOWS[:2]).logits, logits)


@torch.no_grad()
def test_experts_go_inside_the_wrapper(tmp_path):
    """The result is the stock wrapper; for a text with an image too, it answers as if its routers did not see what went."""
    text = tiny._COMMON | tiny._ROWS["gemma4_moe"][1]
    model = wrapped.build("gemma4", text_config=text)
    folder = tiny.save(model, tmp_path / "dense")
    result = tiny.compress(str(folder), output=tmp_path / "m", keep=0.8, method="reap", windows=WINDOWS[:4])
    config = json.loads((tmp_path / "m" / "config.json").read_text())["text_config"]
    assert result.format == "native" and 2 <= config["num_experts"] < 8
    before, after = wrapped.read(folder), wrapped.read(tmp_path / "m")
    assert before.keys() == after.keys()
    changed = {n for n in before if before[n].shape != after[n].shape}
    assert {n.partition(".layers.")[2].partition(".")[2] for n in changed} == {
        "experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale",
    }  # fmt: skip
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before.keys() - changed)
    small, gone = planish.load(tmp_path / "m"), {}
    for i, (whole, few) in enumerate(zip(*(m.model.language_model.layers for m in (model, small)), strict=True)):
        rows = few.router.proj.weight.tolist()
        gone[i] = [j for j, row in enumerate(whole.router.proj.weight.tolist()) if row not in rows]
    language = types.SimpleNamespace(config=model.config.text_config, model=model.model.language_model)
    with masked(language, gone):
        expected = wrapped.see(model, "gemma4")
    torch.testing.assert_close(wrapped.see(small, "gemma4"), expected, rtol=1e-4, atol=1e-4)
