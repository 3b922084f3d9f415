"""Types of embedding and head: what packed folders hold, and which type a size is best spent on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import planish
from planish.errors import InputError
from planish.folder.source import open_source
from planish.request import Request
from planish.sizes.fit import LEAST, list_heads, list_plans, predict, vary_head
from planish.sizes.trials import Choice
from planish.walks.bits import find_heads
from tiny import build, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
IDS = windows(16, 24)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its head is a matrix of its own."""
    return save(build("llama_gqa", **WIDE), tmp_path_factory.mktemp("heads") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save(build("llama_tied", **WIDE), tmp_path_factory.mktemp("heads") / "tied")


def compress(model, output, **options):
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 16, "seq_len": 24, "method": "flat-llm", "ladder": False}
    return planish.compress(model, output=output, **text | options)


def test_a_packed_head_loads_without_planish(model, tmp_path):
    """transformers multiplies by it; the embedding stays in 16 bits; bytes are those predicted, or a few less."""
    request = Request.ask(model="", bits="4", keep=1.0, head_bits="8")
    done = compress(model, tmp_path / "out", keep=1, bits=4, head_bits=8)
    assert {n: h["type"] for n, h in done.rounding["heads"].items()} == {
        "lm_head.weight": "int8-64-asym", "model.embed_tokens.weight": "float16",
    }  # fmt: skip
    predicted = sum(predict(request, open_source(model), "4"))
    assert 0.9 * predicted < done.bytes_after <= predicted
    plain = compress(model, tmp_path / "plain", keep=1, bits=4)
    assert plain.bytes_after - done.bytes_after > 0.4 * plain.rounding["heads"]["lm_head.weight"]["bytes"]
    stock, ours = (load(tmp_path / "out") for load in (AutoModelForCausalLM.from_pretrained, planish.load))
    with torch.no_grad():
        logits = ours(IDS[:2]).logits
        assert torch.equal(stock(IDS[:2]).logits, logits)
        assert not torch.equal(planish.load(tmp_path / "plain")(IDS[:2]).logits, logits)


def test_heads_that_cannot_be_packed_are_refused(model, tied, tmp_path):
    for folder, options, words in (
        (tied, {"head_bits": 8}, "they are one matrix here"),
        (model, {"head_bits": 8, "target": "vllm"}, "reads no packed head"),
    ):
        with pytest.raises(InputError, match=words):
            compress(folder, tmp_path / "out", keep=1, bits=4, **options)
    assert compress(tied, tmp_path / "out", keep=1, bits=4, head_bits=16).rounding["heads"] == {
        "model.embed_tokens.weight": {"type": "float16", "bytes": 97 * 64 * 2}
    }


def test_which_heads_compete(model, tied):
    """Those of another type than the default; nowhere where the user has chosen, or the loader reads none."""
    source, shared = open_source(model), open_source(tied)
    assert len(find_heads(source)) == 2 and len(find_heads(shared)) == 1
    gguf = Request.ask(model="", bits="auto", target="gguf")
    assert list_heads(gguf, source) == ["5", "4"]  # rows of 64: q5_0, iq4_nl; 6 bits would be q8_0 again
    assert list_heads(Request.ask(model="", bits="auto", target="hf"), source) == ["8", "4"]
    assert list_heads(Request.ask(model="", bits="auto", target="hf"), shared) == []
    assert list_heads(Request.ask(model="", bits="auto"), source) == []
    assert list_heads(Request.ask(model="", bits="auto", target="gguf", head_bits="6"), source) == []


def test_what_a_smaller_head_leaves_goes_to_the_blocks(model):
    source, request = open_source(model), Request.ask(model="", bits="auto", target="hf")
    size = int(sum(predict(request, source, "3")))
    for best in (Choice("3", 1.0), Choice("4", 0.8)):
        for other in vary_head(best, request, source, size, lambda bits: LEAST):
            like = request.model_copy(update={"head_bits": other.head})
            outside, blocks = predict(like, source, other.bits)
            assert 0.99 * size < outside + other.keep * blocks <= 1.001 * size or other.bits == "8.000"
    assert [float(c.bits) > 3.3 for c in vary_head(Choice("3", 1.0), request, source, size, lambda bits: LEAST)] == [
        True,
        True,
    ]
    assert vary_head(Choice("8", 1.0), request, source, size, lambda bits: LEAST) == []


def test_a_size_that_only_a_smaller_head_reaches(model):
    source, request = open_source(model), Request.ask(model="", bits="auto", target="hf")
    least = predict(request, source, "2")
    size = int(least[0] + 0.3 * least[1])
    with pytest.raises(InputError, match="smallest that can be made"):
        list_plans(request.model_copy(update={"head_bits": "16"}), source, size, lambda bits: LEAST)
    assert {c.head for c in list_plans(request, source, size, lambda bits: LEAST)} == {"8"}


def test_widths_that_no_type_of_llama_cpp_holds(tmp_path):
    """The message is about the size that 16 bits reach, whatever heads could be."""
    odd = open_source(save(build("llama_gqa"), tmp_path / "model"))  # 44 neurons
    with pytest.raises(InputError, match="smallest that can be made for --target gguf"):
        list_plans(Request.ask(model="", bits="auto", target="gguf"), odd, 1000, lambda bits: LEAST)


def test_the_head_is_chosen_by_measuring(model, tmp_path):
    """Every type of the head has a plan within the size; the least divergence is written."""
    source, request = open_source(model), Request.ask(model="", bits="auto", target="hf")
    size = int(1.01 * sum(predict(request, source, "3")))
    done = compress(model, tmp_path / "out", max_bytes=size, bits="auto", target="hf")
    tried = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert {c["head"] for c in tried} == {"", "8", "4"}
    assert all(c["bytes"] <= size for c in tried if not c["error"])
    best = min((c for c in tried if not c["error"]), key=lambda c: c["kl"])
    assert best["chosen"] and sum(c["chosen"] for c in tried) == 1 and done.bytes_after <= size
    kinds = {"8": "int8-64-asym", "4": "int4-64-asym", "": "float16"}
    assert done.rounding["heads"]["lm_head.weight"]["type"] == kinds[best["head"]]
