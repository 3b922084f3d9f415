"""ONNX files compute what the torch model computes, at every length, with and without the cache."""

from __future__ import annotations

import pytest
import torch

import compressed
from planish.checkpoint import load
from planish.evaluate.verify import OnnxRuntime, verify
from tiny import build

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from planish.export.onnx import export_onnx

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


@pytest.mark.slow  # the exporter alone takes some twenty seconds
def test_a_mixed_model_is_the_same_at_every_length(tmp_path):
    """Forms differ from block to block, one block has no attention and so no cache."""
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", MIXED)
    check(folder, tmp_path / "m.onnx")
    result = verify(folder, "onnx", file=tmp_path / "m.onnx", prompt_len=20, new_tokens=6)
    assert result.passed and result.greedy_equal == 6 and result.tokenizer_equal is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt", "mpt"]
)
def test_every_family(family, tmp_path):
    folder = compressed.make_folder(build(family), tmp_path / "m", [compressed.values(4), None])
    check(folder, tmp_path / "m.onnx")
