"""Models that have mixers in place of some attentions, or beside them."""

from __future__ import annotations

import pytest
import torch

import planish
import tiny
from planish.calibrate.losses import compute_logits
from planish.calibrate.measure import sweep_forward
from planish.calibrate.stream import Stream
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.modelling.blocks import read_layout
from planish.modelling.canonical import split_block
from planish.modelling.families import ATTENTION, MLP
from planish.stats import Tap

WINDOWS = tiny.windows(8, 24)
IDS = tiny.windows(1, 2000)[0].numpy()


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_hidden_states_and_what_mixers_read_are_the_models_own(name):
    """Every block's input, the logits, and the moments of the inputs of a mixer's last linear, by transformers' own forward."""
    model = tiny.build(name, torch.float64)
    source = MemorySource(model)
    stream, tap = Stream(source, WINDOWS, dtype=torch.float64), Tap("mixer.out.in", "gram")
    every = sweep_forward(stream, lambda shape: [tap] if shape.state else [])
    found, out = {i: stats for i, _, stats in every if stats.sums}, stream.outputs()
    rows = {}
    for i in found:
        path = source.family.path("mixer.out")
        mixer = model.get_submodule(source.family.blocks)[i].get_submodule(path)
        mixer.register_forward_pre_hook(lambda m, args, i=i: rows.update({i: args[0].flatten(0, 1)}))
    logits = model(WINDOWS, use_cache=False).logits
    assert found and found.keys() == rows.keys()
    for i, stats in found.items():
        torch.testing.assert_close(stats.sums[tap]["sum"], rows[i].T @ rows[i])
    torch.testing.assert_close(torch.cat([compute_logits(stream, h) for h in out]), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_what_mixers_keep_of_a_sequence_is_what_the_cache_holds_beside_keys_and_values(name):
    model = tiny.build(name)
    shapes = [MemorySource(model).shape(i) for i in range(model.config.num_hidden_layers)]
    for length in (5, 20):
        cache = model(WINDOWS[:1, :length], use_cache=True).past_key_values
        held = [
            [
                t
                for kind in ("conv_states", "recurrent_states")
                for t in getattr(layer, kind, {}).values()
                if t is not None
            ]
            for layer in cache.layers
        ]
        assert [sum(t.numel() for t in tensors) for tensors in held] == [s.state for s in shapes]


def test_a_mixer_in_place_of_attention():
    model = tiny.build("lfm2")
    source = MemorySource(model)
    family, config = source.family, source.config
    layouts = [read_layout(split_block(source.block(i), family, config), family, config) for i in range(3)]
    assert [tuple(g.name for g in layout.groups) for layout in layouts] == [
        ("mlp", "mixer"),
        ("attention", "mlp"),
        ("mlp", "mixer"),
    ]
    shapes = [source.shape(i) for i in range(3)]
    assert [s.roles for s in shapes] == [MLP, ATTENTION + MLP, MLP]
    assert shapes[0].further == ("mixer.in", "mixer.out") and shapes[0].linear("mixer.in") == (96, 32)
    plan = planish.forecast(model, keep=0.8, method="svd-llm", calibration=IDS, n_samples=4, seq_len=12)
    assert plan.block_params_before == sum(s.count() for s in shapes)
    assert {u["unit"] for u in plan.units if u["block"] != 1} == {"mixer.in", "mixer.out", *MLP}
    assert plan.warnings[-2:] == [
        "untouched: conv.conv of blocks 0, 2, 192 weights",
        f"mixers of blocks 0, 2 keep {4 * 2 * 32 * 3} bytes of a sequence of any length",
    ]
    assert plan.kv_bytes_per_token_before == 4 * 2 * 2 * 8  # of the one block with attention
    structural = planish.forecast(model, keep=0.8, method="a3", calibration=IDS, n_samples=4, seq_len=12)
    assert [w.partition(",")[0] for w in structural.warnings[-4:-1]] == [
        f"untouched: {what} of blocks 0" for what in ("mixer.in", "mixer.out", "conv.conv")
    ]


@pytest.mark.parametrize("method", ["shortgpt", "blockpruner", "slicegpt", "nbl", "cocurve"])
def test_what_needs_attention_everywhere_refuses_a_mixer_by_name(method, tmp_path):
    with pytest.raises(InputError, match=r"block 0 has (no attention|others)"):
        tiny.compress(tiny.build("lfm2"), output=tmp_path / "m", keep=0.7, method=method, windows=WINDOWS)
    assert not list(tmp_path.iterdir())


def test_a_budget_for_a_cache_that_nothing_cuts_is_refused(tmp_path):
    """Values whose average is gated, keys that are normalised and have several positions."""
    options = {"method": "palu", "kv_keep": 0.7, "windows": WINDOWS}
    with pytest.raises(InputError, match=r"palu cuts neither keys nor values of this model.*; no other method does"):
        tiny.compress(tiny.build("qwen3_5"), output=tmp_path / "m", **options)


@torch.no_grad()
def test_auto_removes_feed_forwards_but_no_attention_of_a_hybrid(tmp_path):
    """Caches count positions by an attention."""
    model = tiny.build("lfm2")
    settings = {"bypass": "true", "units": "structural"}
    tiny.compress(
        model, output=tmp_path / "m", keep=0.45, method="auto", settings=settings, windows=tiny.windows(24, 24)
    )
    small = tiny.load(tmp_path / "m")
    specs = small.config.planish["blocks"]
    assert any("mlp" in spec for spec in specs) and not any("bypass" in str(spec.get("attention")) for spec in specs)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = small.generate(WINDOWS[:2, :13], use_cache=False, **options)
    assert torch.equal(plain, small.generate(WINDOWS[:2, :13], **options))


@torch.no_grad()
@pytest.mark.parametrize("latent", [None, 20])
def test_experts_without_a_gate(latent):
    """down(max(up x, 0)²) of each that a token reaches, between projections to a narrower width where there are any, which are
    listed as untouched."""
    model = tiny.build("nemotron_h_moe", torch.float64, moe_latent_size=latent)
    source, stock = MemorySource(model), model.model.layers[1].mixer
    shape, block = source.shape(1), source.block(1)
    assert shape.experts.roles == ("up", "down") and shape.experts.hidden == (latent or 32)
    projections = {role for role in shape.rest if "latent" in role}
    assert projections == ({"mixer.fc1_latent_proj", "mixer.fc2_latent_proj"} if latent else set())
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, gates, chosen = stock.gate(x)
    narrow, out = stock.fc1_latent_proj(x[0]), []
    for t in range(6):
        parts = [
            g * (stock.experts.down_proj[j] @ (stock.experts.up_proj[j] @ narrow[t]).clamp(min=0).square())
            for j, g in zip(chosen[t], gates[t].double(), strict=True)
        ]
        out.append(sum(parts))
    expected = stock.fc2_latent_proj(torch.stack(out)) + stock.shared_experts(x[0])
    torch.testing.assert_close(block.mixer(x)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_folders_are_read_by_the_names_that_transformers_writes(name, tmp_path):
    model = tiny.build(name)
    source, memory = open_source(tiny.save(model, tmp_path / "m")), MemorySource(model)
    for i in range(source.n_blocks):
        expected = memory.block(i).state_dict()
        assert source.shape(i) == memory.shape(i)
        assert all(torch.equal(t, expected[n]) for n, t in source.block(i).state_dict().items())
