"""Packed checkpoints of which only whole experts go: what stays keeps its released bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mxfp4Config

import planish
import tiny
from packed_files import configure, write
from planish.compression import resume
from planish.folder import stored_linear
from planish.folder.source import open_source

SIZES = {"hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
IDS = tiny.windows(8, 16)
ASKED = {"keep": 0.8, "method": "reap", "calibration": IDS.flatten(), "n_samples": 8, "seq_len": 16}
FORMATS = ("fp8 blocks of 8 x 12", "ct int4", "ct nvfp4", "gptq", "bnb nf4, double")
QUICK = ("fp8 blocks of 8 x 12", "ct int4")


def make(folder: Path, name: str, family: str = "qwen3_moe") -> Path:
    write(tiny.build(family, torch.bfloat16, **SIZES), name, folder)
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def find_kept(model: Path, out: Path) -> dict[int, list[int]]:
    """Which experts stay in each block, by the rows of its router."""
    source, left = open_source(model), load(out)
    path, found = source.family.experts.router[0], {}
    for i in range(source.n_blocks):
        if source.shape(i).experts:
            name = f"model.layers.{i}.{path}"
            rows = source.reader.tensor(name).tolist()
            found[i] = [rows.index(row) for row in left[name].tolist()]
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def dequantise(model: Path, folder: Path) -> Path:
    """The same model in bf16."""
    source = open_source(model)
    source.config.save_pretrained(folder)
    weights = source.reader.weights
    save_file({n: weights.read(n) for n in weights.names}, folder / "model.safetensors", {"format": "pt"})
    return folder


def check(model: Path, out: Path, **asked: Any) -> None:
    """Logits are those of the dequantised model with the same experts dropped; sizes are those of the files."""
    result = planish.compress(model, output=out, **(ASKED | asked))
    assert result.format == "native" and any("as it was released" in w for w in result.warnings)
    assert result.bytes_after == sum(f.stat().st_size for f in out.glob("*.safetensors")) < result.bytes_before
    foreseen = planish.forecast(model, **(ASKED | asked))
    assert (foreseen.bytes_before, foreseen.bytes_after) == (result.bytes_before, result.bytes_after)
    plain = dequantise(model, out.with_name("plain"))
    other = planish.compress(plain, output=out.with_name("other"), **(ASKED | asked))
    assert other.params_after == result.params_after and other.keep == result.keep
    expected = AutoModelForCausalLM.from_pretrained(out.with_name("other"), dtype=torch.float32)
    close(planish.load(out, dtype=torch.float32), expected)


@torch.no_grad()
def close(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS])
def test_what_stays_is_a_slice_of_the_source(name, tmp_path):
    model = make(tmp_path / "m", name)
    check(model, tmp_path / "out")
    before, after, kept = load(model), load(tmp_path / "out"), find_kept(model, tmp_path / "out")
    declared = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (model, tmp_path / "out")]
    assert declared[0] == declared[1]
    seen = set()
    for n, tensor in after.items():
        block, _, inside = n.removeprefix("model.layers.").partition(".")
        source = n
        if inside.startswith("mlp.experts."):
            _, _, number, rest = inside.split(".", 3)
            source = f"model.layers.{block}.mlp.experts.{kept[int(block)][int(number)]}.{rest}"
        expected = before[source]
        if inside == "mlp.gate.weight":
            expected = expected[kept[int(block)]]
        assert same_bytes(tensor, expected), n
        seen.add(source)
    gone = {n for n in before if n not in seen}
    assert gone and all(".experts." in n for n in gone)


def make_gpt_oss(folder: Path) -> Path:
    """Experts in MXFP4, stacked, as that family is released."""
    tiny.build("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=32).save_pretrained(folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        number, n, out = tensors.pop(name).shape
        size = (number, out, n // 32)
        codes = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_blocks"] = codes
        tensors[f"{name}_scales"] = torch.randint(118, 124, size, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    listed = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": listed})


def test_stacks_are_sliced_along_their_first_axis(tmp_path):
    """gpt-oss: blocks, scales, biases and router; transformers dequantises the result to the same model."""
    model = make_gpt_oss(tmp_path / "m")
    check(model, tmp_path / "out", keep=0.7)
    before, after, kept = load(model), load(tmp_path / "out"), find_kept(model, tmp_path / "out")
    assert before.keys() == after.keys()
    for n, tensor in after.items():
        block = n.removeprefix("model.layers.").partition(".")[0]
        cut = ".experts." in n or ".router." in n
        assert same_bytes(tensor, before[n][kept[int(block)]] if cut else before[n]), n
    how = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how).float()
    close(theirs, planish.load(tmp_path / "out", dtype=torch.float32))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """To the same bytes; with experts that stay in their file, too."""
    model = make(tmp_path / "m", "ct int4")
    planish.compress(model, output=tmp_path / "a", **ASKED)
    monkeypatch.setattr(stored_linear, "APART", 0)
    with tiny.stopped():
        planish.compress(model, output=tmp_path / "b", **ASKED)
    resume(tmp_path / "b")
    for file in [*(tmp_path / "a").glob("*.safetensors"), *(tmp_path / "a").glob("*.index.json")]:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_lists_of_modules_have_the_new_numbers(tmp_path):
    """One linear of every expert of block 0 is stored as it was, and listed by name."""
    model = make(tmp_path / "m", "ct int4")
    source, tensors = open_source(model), load(model)
    names = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(8)]
    for name in names:
        tensors[f"{name}.weight"] = source.reader.tensor(f"{name}.weight")
        for end in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{end}"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    declared = json.loads((model / "config.json").read_text())["quantization_config"]
    configure(model, quantization_config=declared | {"ignore": ["lm_head", *names]})
    check(model, tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    kept = find_kept(model, tmp_path / "out")
    assert listed == ["lm_head", *names[: len(kept[0])]]


def test_scales_of_activations_and_a_declaration_in_its_own_file_stay(tmp_path):
    model = make(tmp_path / "m", "modelopt fp8")
    tensors = load(model)
    linears = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    more = {f"{n}.input_scale": torch.tensor(float(k)) for k, n in enumerate(linears)}
    save_file(tensors | more, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    declared = {"quantization": config.pop("quantization_config")}
    (model / "config.json").write_text(json.dumps(config))
    (model / "hf_quant_config.json").write_text(json.dumps(declared))
    check(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == declared
    kept, after = find_kept(model, tmp_path / "out"), load(tmp_path / "out")
    for new, old in enumerate(kept[0]):
        name = "model.layers.0.mlp.experts.{}.up_proj.input_scale"
        assert torch.equal(after[name.format(new)], more[name.format(old)])


@pytest.mark.parametrize("what", ["other bytes are counted", "a packed router", "numbers in an expression"])
def test_everything_else_is_written_in_the_type_it_is_read_in(what, tmp_path):
    model, asked = make(tmp_path / "m", "fp8 blocks of 8 x 12" if what == "a packed router" else "ct int4"), dict(ASKED)
    if what == "other bytes are counted":
        del asked["keep"]
        asked["max_bytes"] = 150_000
    elif what == "a packed router":
        tensors = load(model)
        for n in [n for n in tensors if n.endswith("mlp.gate.weight")]:
            tensors[n] = tensors[n].to(torch.float8_e4m3fn)
            tensors[f"{n}_scale_inv"] = torch.ones(1, 3)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    else:
        declared = json.loads((model / "config.json").read_text())["quantization_config"]
        configure(model, quantization_config=declared | {"ignore": ["lm_head", r"re:.*\.experts\.9\..*"]})
    result = planish.compress(model, output=tmp_path / "out", **asked)
    assert not any("as it was released" in w for w in result.warnings)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(n.endswith(("_packed", "_scale_inv")) for n in load(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
