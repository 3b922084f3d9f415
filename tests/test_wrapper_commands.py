"""What every command makes of a language model inside a vision-language model, dense and compressed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import compressed
import planish
import tiny
import wrapped
from planish.cli import app
from planish.compression import resume
from planish.errors import InputError
from planish.evaluate import drift
from planish.export import export
from planish.export.verify import verify
from planish.modelling.wrappers import find_language_model
from test_wrappers import WINDOWS, near

SMALL = {"calibration": WINDOWS.flatten(), "n_samples": 8, "seq_len": 24}


def save(name: str, folder: Path) -> Path:
    tiny.save(wrapped.build(name), folder)
    compressed.train_tokenizer(folder, byte_level=True)
    return folder


def test_plan_and_compress_say_what_is_left_untouched(tmp_path):
    folder = save("gemma3", tmp_path / "dense")
    (tmp_path / "t.txt").write_text("the cat sat on the mat, a rat and a bat; " * 60)
    options = [
        "--keep",
        "0.8",
        "--method",
        "a3",
        "--calibration",
        str(tmp_path / "t.txt"),
        "--n-samples",
        "4",
        "--seq-len",
        "16",
    ]
    for command in (["plan", str(folder)], ["compress", str(folder), "-o", str(tmp_path / "out")]):
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        assert "left untouched, copied as it is: multi_modal_projector 2.1 KiB, vision_tower 18.5 KiB" in done.output
    told = json.loads(CliRunner().invoke(app, ["plan", str(folder), *options, "--json"]).stdout)
    assert told["untouched"] == {"multi_modal_projector": 2112, "vision_tower": 18912}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model = AutoModelForImageTextToText.from_pretrained" in card and "`vision_tower`, 18,912 bytes" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", wrapped.NAMES)
def test_evaluation_and_speed(name, tmp_path):
    """Of text alone, as of any model."""
    folder, out = save(name, tmp_path / "dense"), tmp_path / "out"
    compressed.make_folder(wrapped.build(name), out, [compressed.values(5), None])
    found = planish.compare(out, folder, WINDOWS.flatten(), 24)
    model = planish.load(out)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(WINDOWS).logits[:, :-1].transpose(1, 2), WINDOWS[:, 1:])
    assert found.model.nll == pytest.approx(float(nll), rel=1e-4) and found.agreement.kl > 0
    traces = [drift.trace(m, WINDOWS[:2]) for m in (wrapped.build(name), model)]
    apart = drift.compare(*traces)
    assert len(apart.blocks) == 3 and apart.kl > 0 and drift.compare(traces[0], traces[0]).kl == 0
    asked = ["--against", str(folder), "--prompt-len", "6", "--new-tokens", "3", "--json"]
    bench = CliRunner().invoke(app, ["bench", str(out), "--no-compile", *asked])
    assert bench.exit_code == 0, bench.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_run_that_was_stopped_is_taken_up(name, tmp_path):
    folder = save(name, tmp_path / "dense")
    journal = tmp_path / "out.partial" / "resume" / "journal.jsonl"

    def stop(phase: str, done: int, total: int) -> None:
        if journal.exists() and len(journal.read_text().splitlines()) >= 2:
            raise KeyboardInterrupt

    options = {"windows": WINDOWS, "method": "shortgpt" if name == "qwen3_vl" else "flat-llm"}
    options |= {"settings": {"sparsity": 0.6}} if name == "qwen3_vl" else {"keep": 0.7}
    with pytest.raises(KeyboardInterrupt):
        tiny.compress(folder, output=tmp_path / "out", progress=stop, **options)
    resume(tmp_path / "out")
    tiny.compress(folder, output=tmp_path / "whole", **options)
    found, expected = (wrapped.read(tmp_path / n) for n in ("out", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", wrapped.NAMES)
def test_export_to_dense(name, tmp_path):
    """Filled up to stock shapes it loads with nothing of ours, the vision tower as it was."""
    compressed.train_tokenizer(tmp_path, byte_level=True)
    compressed.make_folder(
        wrapped.build(name), tmp_path / "out", [compressed.both(compressed.values(5), compressed.neurons(24)), None]
    )
    written = export(tmp_path / "out", "dense", tmp_path / "dense", pad=True)
    again = planish.load(tmp_path / "dense")
    assert type(again) is type(wrapped.build(name)) and written.architecture == "native"
    assert near(wrapped.see(again, name), wrapped.see(planish.load(tmp_path / "out"), name))
    assert written.parameters == sum(t.numel() for t in wrapped.read(tmp_path / "dense").values())
    low = compressed.make_folder(wrapped.build(name), tmp_path / "low", [compressed.low_rank("pair", 8)])
    export(low, "dense", tmp_path / "back")
    assert near(wrapped.see(planish.load(tmp_path / "back"), name), wrapped.see(planish.load(low), name), 1e-3)
    assert verify(tmp_path / "back", "hf", prompt_len=12, new_tokens=4).passed


@pytest.mark.slow
def test_gguf_holds_the_language_model_alone(tmp_path):
    pytest.importorskip("gguf")
    folder = save("mistral3", tmp_path / "dense")
    written = export(folder, "gguf", tmp_path / "m.gguf", dtype="f32")
    assert "the language model alone: multi_modal_projector, vision_tower of mistral3 are left out" in written.notes
    alone = planish.load(tmp_path / "m.gguf")
    with torch.no_grad():
        assert near(alone(WINDOWS[:2]).logits, wrapped.build("mistral3")(WINDOWS[:2]).logits)


def test_what_is_refused(tmp_path):
    folder = save("mistral3", tmp_path / "dense")
    for to, file in (("mimo", "m"), ("deci", "d")):
        with pytest.raises(InputError, match=rf"a folder for {to} holds a language model alone, and this is mistral3"):
            export(folder, to, tmp_path / file)
    with pytest.raises(InputError, match="what planish runs in vLLM holds a language model alone"):
        verify(folder, "vllm")
    with pytest.raises(InputError, match="a folder that --bits writes holds a language model alone"):
        planish.compress(folder, output=tmp_path / "b", bits=4, keep=0.9, **SMALL)
    pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match="an ONNX graph as planish writes it holds a language model alone"):
        export(folder, "onnx", tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_is_merged(prefix, tmp_path):
    module = f"{prefix}layers.0.self_attn.q_proj"
    folder = save("gemma3", tmp_path / "dense")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=g), torch.randn(48, 4, generator=g)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    factors = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    planish.compress(folder, output=tmp_path / "out", method="a3", keep=1.0, adapter=str(tmp_path / "lora"), **SMALL)
    models = wrapped.build("gemma3"), planish.load(tmp_path / "out")
    was, now = (find_language_model(m).layers[0].self_attn.q_proj.weight for m in models)
    assert near(now.detach(), was.detach() + b @ a, 1e-5)


@pytest.mark.slow
def test_eora_names_modules_of_the_whole_model(tmp_path):
    folder = save("qwen2_5_vl", tmp_path / "dense")
    planish.eora(folder, tmp_path / "lora", rank=4, calibration=WINDOWS.flatten(), n_samples=4, seq_len=24)
    asked = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    inside = {n for n, _ in wrapped.build("qwen2_5_vl").named_modules()}
    assert len(asked) == 21 and set(asked) <= inside


class Processor:
    """What AutoProcessor gives: a tokenizer, and more to save."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        (folder / "processor_config.json").write_text("{}")


@pytest.mark.slow
def test_a_processor_in_the_place_of_a_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    processor = Processor(AutoTokenizer.from_pretrained(save("gemma3", tmp_path / "dense")))
    text = ["the cat sat on the mat, a rat and a bat; " * 60]
    planish.compress(
        wrapped.build("gemma3"),
        processor,
        output=tmp_path / "out",
        method="a3",
        keep=0.8,
        calibration=text,
        n_samples=4,
        seq_len=16,
    )
    assert (tmp_path / "out" / "processor_config.json").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()


def as_fp8(folder: Path) -> dict[str, Tensor]:
    """Store the linears of the language model's blocks in FP8 with a scale for each, in place; what they then stand for."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if ".layers." in n and n.endswith("proj.weight") and "language_model" in n]:
        scale = tensors[name].abs().max() / 400
        small = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {name: small, f"{name}_scale_inv": scale}
        meant[name] = small.float() * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.slow
def test_low_precision(tmp_path):
    """mistral3 as it is released in FP8: read tensor by tensor, the vision tower as it is."""
    folder = save("mistral3_ministral3", tmp_path / "dense")
    meant = as_fp8(folder)
    model = wrapped.build("mistral3_ministral3")
    state = {n.replace("language_model.model.", "model.language_model."): t for n, t in meant.items()}
    assert len(state) == 21 and not model.load_state_dict(state, strict=False).unexpected_keys
    assert near(wrapped.see(planish.load(folder, dtype="float32"), "mistral3"), wrapped.see(model, "mistral3"))
    result = planish.compress(folder, output=tmp_path / "out", method="a3", keep=1.0, **SMALL)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sum(result.untouched.values()) == 10304 + 19264
    assert near(
        wrapped.see(planish.load(tmp_path / "out", dtype="float32"), "mistral3"), wrapped.see(model, "mistral3"), 2e-2
    )
