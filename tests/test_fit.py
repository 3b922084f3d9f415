"""A size for the whole model: cuts and types compete by measured divergence on windows that no plan was made from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import planish
from planish.errors import InputError
from planish.folder.safetensors import write_shard
from planish.folder.source import open_source
from planish.request import Request
from planish.sizes.fit import list_choices, predict, reserve
from planish.sizes.trials import hold_out
from tiny import build, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
IDS = windows(16, 24)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(build("llama_gqa", **SMALL), tmp_path_factory.mktemp("fit") / "model")


def compress(model, output, **options):
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 16, "seq_len": 24, "method": "flat-llm", "ladder": False}
    return planish.compress(model, output=output, **text | options)


def measure(folder, dense) -> float:
    """KL(dense ‖ folder) on the held-out windows, in nats per token, by the definition."""
    _, held = hold_out(IDS)
    with torch.no_grad():
        p, q = (
            planish.load(f, dtype="float32")(input_ids=held).logits[:, :-1].double().log_softmax(-1)
            for f in (dense, folder)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("target", ["any", "gguf"])
def test_predicted_bytes_are_those_written(tmp_path, target):
    """Of every type, and within what names in headers take not less."""
    model = save(build("llama_gqa", **WIDE), tmp_path / "model")
    if target == "gguf":
        pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    source = open_source(model)
    for bits in ("8", "4", "3", "2") if target == "any" else ("8", "6", "4"):
        outside, blocks = predict(Request.ask(model="", target=target), source, bits)
        done = compress(model, tmp_path / bits, keep=1, bits=bits, target=target)
        assert 0.9 * (outside + blocks) < done.bytes_after <= outside + blocks


def test_the_least_divergence_within_the_size_is_taken(model, tmp_path):
    """All plans are within it; the chosen one is the best of them, as measured here; it is made from all windows."""
    outside, blocks = predict(Request.ask(model=""), open_source(model), "4")
    size = int(outside + blocks) + 1
    done = compress(model, tmp_path / "out", max_bytes=size, bits="auto", ladder=True)
    tried = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert tried == done.choices and done.bytes_after <= size
    made = [c for c in tried if not c["error"]]
    assert all(c["bytes"] <= size for c in made)
    plain = [c for c in tried if c["keep"] == 1]
    assert [c["bits"] for c in plain] == ["4"] and any("." in c["bits"] and c["keep"] < 1 for c in tried)
    best = min(made, key=lambda c: c["kl"])
    assert best["chosen"] and sum(c["chosen"] for c in tried) == 1
    rungs = {r["bits"]: r for r in done.ladder["rungs"]}
    assert done.ladder["result"] == best and {"8", "4", "3", "2"} <= rungs.keys()
    assert rungs["8"]["kl"] < rungs["4"]["kl"] and not rungs["8"]["fits"]
    assert all(rungs[c["bits"]] == c | {"fits": True} for c in made if c["keep"] == 1)
    asked = {"keep": best["keep"]} | ({} if best["bits"] == "16" else {"bits": best["bits"]})
    again = compress(model, tmp_path / "again", **asked)
    assert again.bytes_after == done.bytes_after
    fit, _ = hold_out(IDS)
    few = {"calibration": fit.flatten().numpy(), "n_samples": len(fit)}
    compress(model, tmp_path / "few", **asked | few)
    assert measure(tmp_path / "few", model) == pytest.approx(best["kl"], rel=1e-3)
    assert not [p for p in tmp_path.iterdir() if ".sizes-" in p.name]


def test_room_above_a_type_is_offered_to_finer_ones(model):
    """Types that differ, as many bits on average as fit; and between the two coarsest plans."""
    source = open_source(model)
    request = Request.ask(model="", target="any")
    sizes = {b: sum(predict(request, source, b)) for b in ("4", "3")}
    size = int((sizes["4"] + sizes["3"]) / 2)
    choices = list_choices(request, source, size)
    plain = next(c for c in choices if c.keep == 1 and c.bits == "3")
    mixed = [c for c in choices if "." in c.bits]
    assert mixed[0].keep == 1 and 3.3 < float(mixed[0].bits) < 4.3 and choices.index(plain) < choices.index(mixed[0])
    for c in mixed:
        outside, blocks = predict(request, source, c.bits)
        assert outside + c.keep * blocks <= size * 1.001
    least = int(predict(request, source, "2")[0] + 0.8 * predict(request, source, "2")[1])
    assert all(c.keep < 1 for c in list_choices(request, source, least) if "." in c.bits)


def test_a_size_that_holds_the_model_leaves_it_as_it_is(model, tmp_path):
    whole = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    done = compress(model, tmp_path / "out", max_bytes=2 * whole, bits="auto")
    assert done.rounding == {} and done.keep == 1 and [c["bits"] for c in done.choices] == ["16"]


@pytest.mark.slow
def test_exactly_the_bytes_of_a_type_are_enough_for_it(model, tmp_path):
    plain = compress(model, tmp_path / "plain", keep=1, bits="8")
    done = compress(model, tmp_path / "out", max_bytes=plain.bytes_after, bits="auto")
    whole = [c for c in done.choices if (c["bits"], c["keep"]) == ("8", 1.0)]
    assert [c["bytes"] for c in whole] == [plain.bytes_after] and not whole[0]["error"]
    assert done.bytes_after <= plain.bytes_after
    worse = compress(model, tmp_path / "less", max_bytes=plain.bytes_after - 8, bits="auto")
    assert all(c["error"] or c["bytes"] < plain.bytes_after for c in worse.choices)


def test_fit_leaves_room_for_the_cache(model, tmp_path):
    source = open_source(model)
    room = reserve(source, 64)
    per_token = sum(2 * 2 * s.kv_heads * s.qk for s in (source.shape(i) for i in range(source.n_blocks)))
    assert room - reserve(source, 0) == 64 * per_token
    outside, blocks = predict(Request.ask(model=""), source, "8")
    size = int(outside + blocks) + 1 + room
    done = compress(model, tmp_path / "out", fit=size, context=64)
    assert done.bytes_after + room <= size and done.choices


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_bytes": 1000, "bits": "auto"}, "smallest that can be made"),
        ({"bits": "auto"}, "give --max-bytes or --fit"),
        ({"bits": "auto", "keep": 0.5}, "give --max-bytes or --fit"),
        ({"bits": "auto", "max_bytes": "1MB", "kv_keep": 0.5}, "--kv-keep cannot hold"),
        ({"fit": "10MB", "bits": "4"}, "--bits 4 cannot hold"),
        ({"fit": "10MB", "keep": 0.5}, "--keep cannot hold"),
        ({"fit": "1KB"}, "a smaller --context"),
        ({"bits": "auto", "max_bytes": 60_000, "n_samples": 3}, "every fourth calibration window"),
    ],
)
def test_what_cannot_be_chosen_is_refused(model, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        compress(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_single_number_is_written_whatever_its_stride(tmp_path):
    """Factors of rank 1 give matrices of one code per row."""
    path = tmp_path / "one.safetensors"
    one = torch.arange(8, dtype=torch.int32)[3:4].as_strided((1, 1), (8, 8))
    write_shard(path, {"one": one, "flat": one.reshape(-1), "row": torch.arange(6.0).view(2, 3).T})
    assert load_file(path)["one"].tolist() == [[3]] and load_file(path)["flat"].tolist() == [3]
    assert load_file(path)["row"].tolist() == [[0, 3], [1, 4], [2, 5]]
