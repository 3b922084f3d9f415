"""gpt_oss: scores without tokens beside the others, experts stacked transposed and in turns, with biases, and released as MXFP4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import tiny
from compressed import both, make_folder, rotary_pairs, values
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.folder.weights import Shards
from planish.modelling.blocks import get_linear

WINDOWS = tiny.windows(8, 24)
EXPERTS = "model.layers.0.mlp.experts"


@torch.no_grad()
def test_an_expert_of_the_canonical_block_is_a_loop_over_its_neurons():
    """gate and up are every second channel; min(gate, 7) σ(1.702 min(gate, 7)) (1 + clamp(up, ±7)), biases everywhere."""
    model = tiny.build("gpt_oss", torch.float64)
    stock, source = model.model.layers[1].mlp.experts, MemorySource(model)
    experts = source.block(1).mlp.experts
    x = 6 * torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for j in (0, 5):
        linears = [get_linear(source.block(1), source.family, f"expert.{j}.{r}") for r in ("gate", "up", "down")]
        out, clamped = stock.down_proj_bias[j].repeat(5, 1), 0
        for n in range(stock.intermediate_size):
            gate, up = (x @ stock.gate_up_proj[j, :, 2 * n + k] + stock.gate_up_proj_bias[j, 2 * n + k] for k in (0, 1))
            torch.testing.assert_close(linears[0](x)[:, n], gate)
            torch.testing.assert_close(linears[1](x)[:, n], up)
            clamped += int((gate > 7).sum() + (up.abs() > 7).sum())
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            out += (gate * torch.sigmoid(1.702 * gate) * (1 + up))[:, None] * stock.down_proj[j, n]
        assert clamped > 20
        chosen, weights = torch.full((5, 1), j), torch.full((5, 1), 0.5, dtype=torch.float64)
        torch.testing.assert_close(experts(x, chosen, weights), out / 2)


@torch.no_grad()
@pytest.mark.parametrize("sink", [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (-40.0, 40.0))])
def test_sinks_take_their_share_of_cut_attentions(sink, tmp_path):
    """Fewer pairs and values, against transformers' own attention with what is cut zeroed: sinks that nothing, some and all of
    the attention goes to."""
    model = tiny.build("gpt_oss")
    for block in model.model.layers:
        block.self_attn.sinks.fill_(sink)
    make_folder(model, tmp_path / "m", [both(rotary_pairs(4), values(7)), None])
    small, attention = tiny.load(tmp_path / "m"), model.model.layers[0].self_attn
    assert torch.equal(small.model.layers[0].self_attn.sinks, attention.sinks)
    kept = small.model.layers[0].self_attn.pairs
    for group in range(2):
        rows = [c for p in set(range(6)) - set(kept[group].tolist()) for c in (p, p + 6)]
        for linear, gone in ((attention.k_proj, rows), (attention.v_proj, range(7, 12))):
            at = [12 * group + c for c in gone]
            linear.weight[at] = 0
            linear.bias[at] = 0
    torch.testing.assert_close(small(WINDOWS).logits, model(WINDOWS).logits, rtol=1e-4, atol=1e-4)
    assert sink < 40 or torch.allclose(attention_share(small), torch.zeros(()), atol=1e-6)


def attention_share(model) -> Tensor:
    """How much of the first attention goes to tokens, at most."""
    (weights, *_) = model(WINDOWS, output_attentions=True, attn_implementation="eager").attentions
    return weights.sum(-1).max()


def pack(folder: Path) -> dict[str, Tensor]:
    """Turn a folder's experts into random MXFP4, as the releases store them; the weights that they stand for, by the library."""
    file, g = folder / "model.safetensors", torch.Generator().manual_seed(3)
    stored, expected = load_file(file), {}
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj")) and ".experts." in n]:
        experts, width, out = stored.pop(name).shape
        codes = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=g)
        scales = torch.randint(121, 125, (experts, out, width // 32), dtype=torch.uint8, generator=g)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(codes, scales)
    save_file(stored, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    listed = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": listed}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("released") / "model"
    model = tiny.build("gpt_oss", torch.bfloat16, intermediate_size=64)
    return tiny.save(model, folder), pack(folder)


@torch.no_grad()
def test_a_release_is_read_cut_and_written_as_a_stock_model(released, tmp_path):
    folder, expected = released
    source = open_source(folder)
    blocks = [source.block(i) for i in range(2)]
    for name, whole in expected.items():
        block, leaf = int(name.split(".")[2]), name.rpartition(".")[2]
        for j in range(8):
            mine = [
                get_linear(blocks[block], source.family, f"expert.{j}.{r}").weight.T for r in ("gate", "up", "down")
            ]
            pair = torch.stack(mine[:2], -1).flatten(-2) if leaf == "gate_up_proj" else mine[2]
            assert torch.equal(pair, whole[j])
    settings = {"parts": ("mlp",)}
    result = tiny.compress(folder, output=tmp_path / "out", windows=WINDOWS, method="a3", keep=0.8, settings=settings)
    config, stored = json.loads((tmp_path / "out" / "config.json").read_text()), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    width = config["intermediate_size"]
    assert result.format == "native" and "quantization_config" not in config and width < 64
    for name in [n for n in expected if n.endswith("gate_up_proj")]:  # every second column gate's, beside it up's
        for found, whole in zip(
            stored[name].unflatten(-1, (-1, 2)), expected[name].unflatten(-1, (-1, 2)), strict=True
        ):
            assert found.shape == (32, width, 2)
            assert all((found[:, n, None] == whole).all(0).all(-1).any() for n in range(width))
    assert stored[f"{EXPERTS}.gate_up_proj_bias"].shape == (8, 2 * width)
    assert stored[f"{EXPERTS}.down_proj_bias"].shape == (8, 32)
    eager = {"experts_implementation": "eager", "output_loading_info": True}
    small, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **eager)
    assert type(small).__name__ == "GptOssForCausalLM" and not any(told.values())
    assert small(WINDOWS).logits.isfinite().all()


def test_of_a_stack_one_experts_bytes_are_read(released, monkeypatch):
    """And not the whole stack for each of its linears."""
    read, real = [], Shards.read_rows
    monkeypatch.setattr(Shards, "read_rows", lambda self, *a: read.append((a[0], t := real(self, *a))) or t)
    monkeypatch.setattr(Shards, "read", lambda self, name: pytest.fail(f"{name} is read whole"))
    weight = open_source(released[0]).reader.tensor(f"{EXPERTS}.5.up_proj.weight")
    assert weight.shape == (64, 32) and weight.is_contiguous()
    assert {n.rpartition(".")[2]: t.numel() for n, t in read} == {
        "gate_up_proj_blocks": 128 * 16,
        "gate_up_proj_scales": 128,
    }


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("model.layers.1.self_attn.sinks", lambda t: t.index_fill(0, torch.tensor(2), torch.nan), r"self_attn\.sinks .* NaN"),
        (f"{EXPERTS}.gate_up_proj", lambda t: t.mT, r"gate_up_proj has shape \(8, 24, 32\), expected \(8, 32, 24\)"),
        (f"{EXPERTS}.down_proj_bias", lambda t: t.flatten(), r"has shape \(256,\), expected \(experts, rows\) of stacked"),
        (f"{EXPERTS}.down_proj_bias", None, r"tensor .*experts\.0\.down_proj\.bias is missing"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("model.layers.1.self_attn.sinks", lambda t: t[:3], r"sinks in .* has shape \(3,\), expected \(4,\)"),
            (f"{EXPERTS}.down_proj", lambda t: t.mT, r"down_proj has shape \(8, 32, 12\), expected \(8, 12, 32\)"),
            (f"{EXPERTS}.gate_up_proj", lambda t: t[:7], r"gate_up_proj has shape \(7, 32, 24\), expected \(8, 32, 24\)"),
            (f"{EXPERTS}.gate_up_proj_bias", lambda t: t[:, :12], r"gate_up_proj_bias has shape \(8, 12\), expected \(8, 24\)"),
            (f"{EXPERTS}.down_proj_bias", lambda t: t / 0, r"experts\.\d\.down_proj\.bias of .* NaN or infinity"),
            ("model.layers.0.mlp.router.bias", lambda t: t / 0, r"mlp\.router\.bias .* NaN or infinity"),
        )),
    ],
)  # fmt: skip
def test_what_is_no_gpt_oss_is_refused(name, change, match, tmp_path):
    tiny.save(tiny.build("gpt_oss"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    tensor = stored.pop(name)
    save_file(stored | ({name: change(tensor).contiguous()} if change else {}), file, {"format": "pt"})
    with pytest.raises(InputError, match=match) as error:
        tiny.compress(tmp_path / "model", output=tmp_path / "out", windows=WINDOWS, method="reap", keep=0.8)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_a_release_without_scales_is_refused(released, tmp_path):
    folder = Path(shutil.copytree(released[0], tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    del stored[f"{EXPERTS}.down_proj_scales"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj_scales is missing"):
        open_source(folder)
