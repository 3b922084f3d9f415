"""ONNX files compute what the torch model computes, at every length, with and without the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compressed
import tiny
from planish.errors import InputError
from planish.export.verify import OnnxRuntime, verify
from tiny import build, load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from planish.export.onnx import export_onnx  # noqa: E402

MIXED = [
    compressed.both(compressed.values(3), compressed.neurons(24)),
    compressed.both(
        compressed.bypass("attention", 4, gate=True, shift=True, raw=True), compressed.low_rank("pair", 6, "up")
    ),
    compressed.both(compressed.rotary_pairs(2), compressed.low_rank("pivoted", 6, "down")),
]


def check(folder, file) -> None:
    export_onnx(folder, file)
    runner, model = OnnxRuntime(file), load(folder)
    for length in (1, 2, 23):
        ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            want = model(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(runner.logits(ids), want, atol=2e-5 * float(want.abs().max()), rtol=0)
    ids = torch.arange(5, 19)
    logits, past = runner.run(ids[None, :6].numpy(), None)
    for part in (ids[6:7], ids[7:8], ids[8:]):
        logits, past = runner.run(part[None].numpy(), past)
    with torch.no_grad():
        want = model(input_ids=ids[None]).logits[0, 8:]
    torch.testing.assert_close(torch.from_numpy(logits[0]), want, atol=2e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize(("kind", "tolerance"), [("FLOAT", 1e-4), ("FLOAT16", 5e-3), ("DOUBLE", None)])
def test_the_tolerance_is_that_of_the_graphs_type(kind, tolerance, tmp_path):
    """A table of logits per token, in each type."""
    number = getattr(onnx.TensorProto, kind)
    table = np.eye(4).astype({"FLOAT": np.float32, "FLOAT16": np.float16, "DOUBLE": np.float64}[kind])
    make = onnx.helper
    ids = [make.make_tensor_value_info(n, onnx.TensorProto.INT64, [1, "n"]) for n in ("input_ids", "attention_mask")]
    graph = make.make_graph(
        [make.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "m",
        ids,
        [make.make_tensor_value_info("logits", number, [1, "n", 4])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    if tolerance is None:
        with pytest.raises(InputError, match=r"m\.onnx: logits is a tensor\(double\)"):
            OnnxRuntime(tmp_path / "m.onnx")
        return
    runner = OnnxRuntime(tmp_path / "m.onnx")
    assert runner.tolerance == tolerance
    assert torch.equal(runner.logits(torch.tensor([2, 0])), torch.eye(4)[[2, 0]])


@pytest.mark.slow
def test_half_precision_is_judged_as_such(tmp_path):
    """A right f16 graph passes; the graph of a model with one other matrix does not."""
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [compressed.values(4), None])
    export_onnx(folder, tmp_path / "m.onnx", dtype="f16")
    result = verify(folder, "onnx", file=tmp_path / "m.onnx", prompt_len=20, new_tokens=6)
    assert result.tolerance == 5e-3 and result.passed and result.greedy_equal == 6
    model = build("llama_gqa")
    model.model.layers[2].mlp.up_proj.weight.data *= 1.1
    other = compressed.make_folder(model, tmp_path / "other", [compressed.values(4), None])
    assert not verify(other, "onnx", file=tmp_path / "m.onnx", prompt_len=20, new_tokens=6).passed


@pytest.mark.slow  # the exporter alone takes some twenty seconds
def test_a_mixed_model_is_the_same_at_every_length(tmp_path):
    """Forms differ from block to block, one block has no attention and so no cache."""
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", MIXED)
    check(folder, tmp_path / "m.onnx")
    result = verify(folder, "onnx", file=tmp_path / "m.onnx", prompt_len=20, new_tokens=6)
    assert result.passed and result.greedy_equal == 6 and result.tokenizer_equal is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phimoe", "deepseek_v3"])
def test_a_mixture_in_stock_shapes(family, tmp_path):
    check(tiny.save(build(family), tmp_path / "m"), tmp_path / "m.onnx")


@pytest.mark.slow
def test_experts_of_their_own(tmp_path):
    """Planish's own format: each is computed on every token."""
    tiny.compress(build("mixtral"), output=tmp_path / "m", windows=tiny.windows(8, 12), method="flat-llm", keep=0.8)
    check(tmp_path / "m", tmp_path / "m.onnx")


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])  # in place of attention, and beside it
def test_what_a_mixer_keeps_is_refused(family, tmp_path):
    with pytest.raises(InputError, match="holds keys and values alone, not what a mixer keeps of a sequence"):
        export_onnx(tiny.save(build(family), tmp_path / "m"), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt", "mpt", *tiny.MORE]
)
def test_every_family(family, tmp_path):
    folder = compressed.make_folder(build(family), tmp_path / "m", [compressed.values(4), None])
    check(folder, tmp_path / "m.onnx")
