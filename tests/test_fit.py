"""A size for the whole model: cuts and types compete by measured divergence on windows that no plan was made from."""

from __future__ import annotations

import json
import re
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import planish
from compressed import train_tokenizer
from planish.cli import app
from planish.compression import Calibration, Destination
from planish.errors import InputError
from planish.export import export
from planish.folder.safetensors import write_shard
from planish.folder.source import open_source
from planish.manifest import Result
from planish.methods import find_method
from planish.request import Request
from planish.sizes.fit import LEAST, count_file, list_choices, predict, reserve, thin, vary_head
from planish.sizes.ladder import climb, make_smaller
from planish.sizes.trials import Choice, Contest, hold_out
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


@given(st.floats(0.1, 3), st.floats(0.3, 5), st.integers(1, 4))
def test_what_is_not_made_is_worse_than_what_is(rounding, cutting, coarsest):
    """Where rounding's cost falls and cutting's rises convexly, the best of the plans made is the best of all."""
    size = coarsest + 0.5
    plans = [Choice(f"{b:g}", min(1.0, size / b)) for b in (16, 8, 6, 5, 4, 3, 2, 1) if b >= coarsest]

    def cost(plan: Choice) -> float:
        return rounding * 4.0 ** (coarsest - float(plan.bits)) + cutting * (1 / plan.keep - 1)

    class Told:
        made = 0

        def measure(self, plan: Choice, size: float) -> None:
            plan.kl, plan.stderr, self.made = cost(plan), 0.01, self.made + 1

    told = Told()
    climb(told, plans, 1.0, 0, None)
    assert min(plans, key=lambda c: c.kl) is min(plans, key=cost)
    assert all(c.measured != c.error.startswith("not made: ") for c in plans)
    assert told.made < len(plans) or cutting * (16 / size - 1) <= 1.25 * rounding + 2


def test_a_cut_that_fails_ends_no_plan_of_all_weights():
    costs = {"5": 0.01, "6": 1.0, "7.68": 0.001, "8": 2.0}
    plans = [Choice("5", 1.0), Choice("6", 0.9), Choice("7.68", 1.0), Choice("8", 0.7)]

    class Told:
        def measure(self, plan: Choice, size: float) -> None:
            plan.kl, plan.stderr = costs[plan.bits], 0.0

    climb(Told(), plans, 1.0, 0, None)
    assert [c.measured for c in plans] == [True, True, True, False]


def test_types_that_hardly_differ_are_not_all_tried():
    keeps = [0.2, 0.42, 0.44, 0.46, 0.47, 0.48, 0.8, 1.0]
    found = [Choice(str(16 - n), keep) for n, keep in enumerate(keeps)]
    left = [c.keep for c in thin(found)]
    assert left == [0.2, 0.42, 0.46, 0.48, 0.8, 1.0]


def test_a_head_that_is_chosen_is_not_made_again(tmp_path):
    gguf_model = save(build("llama_gqa", **WIDE, tie_word_embeddings=False), tmp_path / "model")
    source, request = open_source(gguf_model), Request.ask(model="", target="gguf")
    for head in ("", "5"):
        found = vary_head(Choice("4", 0.5, head=head), request, source, 60_000, lambda bits: LEAST)
        assert head not in [c.head for c in found] and found


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


def test_plan_names_what_competes(model, tmp_path, run):
    """The plans that compress then makes, and the bytes of every type; nothing is written."""
    source = open_source(model)
    outside, blocks = predict(Request.ask(model=""), source, "4")
    words = {"fit": int(outside + blocks) + reserve(source, 64) + 1, "context": 64}
    told = planish.forecast(model, **words, method="flat-llm")
    done = compress(model, tmp_path / "out", **words)
    wanted, made = ([c["bits"] for c in found if "." not in c["bits"]] for found in (told.plans, done.choices))
    assert wanted == made and len(told.plans) == len(done.choices)
    assert all(c["bytes"] <= told.size for c in told.plans if c["keep"] < 1)
    assert told.cache + told.running == reserve(source, 64) and told.size + told.cache + told.running == words["fit"]
    rounded = {t["bits"]: t["rounded"] for t in told.types}
    assert not rounded["16"] and rounded["3"] == {"int3-32-asym": 12, "int3-64-asym": 2}
    said = run("plan", model, "--fit", words["fit"], "--context", 64)
    assert said.exit_code == 0 and "4 bits" in said.stdout and f"{told.size:,} bytes" in said.stdout
    assert "not rounded" in said.stdout and "embedding and head in" not in said.stdout
    kept = run("plan", model, "--max-bytes", told.size, "--target", "hf", "--method", "flat-llm")
    assert kept.exit_code == 0 and "again with embedding and head in 8 and in 4 bits" in " ".join(kept.stdout.split())


@pytest.mark.parametrize("keep", [1, 0.6])
def test_plan_counts_rounded_bytes(keep, tmp_path):
    model = save(build("llama_gqa", **WIDE), tmp_path / "model")
    told = planish.forecast(model, keep=keep, bits=4, method="flat-llm", calibration=IDS.flatten().numpy(), seq_len=24)
    done = compress(model, tmp_path / "out", keep=keep, bits=4)
    assert 0.9 * told.bytes_after < done.bytes_after <= told.bytes_after
    assert told.block_params_after == done.block_params_after
    assert keep < 1 or told.rounding == {"types": done.rounding["types"], "head": ""}


def test_fit_leaves_room_for_the_cache(model, tmp_path):
    source = open_source(model)
    room = reserve(source, 64)
    per_token = sum(2 * 2 * s.kv_heads * s.qk for s in (source.shape(i) for i in range(source.n_blocks)))
    assert room - reserve(source, 0) == 64 * per_token
    outside, blocks = predict(Request.ask(model=""), source, "8")
    size = int(outside + blocks) + 1 + room
    done = compress(model, tmp_path / "out", fit=size, context=64)
    assert done.bytes_after + room <= size and done.choices


def test_a_gguf_file_fits_with_its_tokenizer(tmp_path):
    """File, cache and running; what is taken off for the file is what it has more than the folder, and hardly more (kilobytes)."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    model = save(build("llama_gqa", **WIDE), tmp_path / "model")
    train_tokenizer(model, byte_level=True)
    source, request = open_source(model), Request.ask(model="", target="gguf")
    outside, blocks = predict(request, source, "4")
    own = count_file(request, source)
    size = int(outside + blocks) + own + reserve(source, 64)
    done = compress(model, tmp_path / "out", fit=size, context=64, target="gguf")
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    more = (tmp_path / "m.gguf").stat().st_size - done.bytes_after
    assert own - 8192 < more <= own and done.bytes_after + own + reserve(source, 64) <= size
    told = planish.forecast(model, fit=size, context=64, target="gguf")
    room = reserve(source, 64)
    assert (told.file, told.size) == (own, size - own - room) and told.cache + told.running == room
    assert count_file(Request.ask(model=""), source) == 0
    (model / "tokenizer.json").write_text("{")
    assert 0 < count_file(request, open_source(model)) < own


def pair_tensors(*folders):
    """Every tensor of two folders, which have the same."""
    first, second = ({k: t for p in f.glob("*.safetensors") for k, t in load_file(p).items()} for f in folders)
    assert first.keys() == second.keys() != set()
    return [(first[n], second[n]) for n in first]


@pytest.fixture(scope="module")
def half(model) -> int:
    """A size that only rounded or cut weights reach."""
    return int(0.7 * sum(p.stat().st_size for p in model.glob("*.safetensors")))


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_types_compete_where_a_target_holds_them_and_nothing_is_said(model, half, tmp_path, target):
    """What is written is what `--bits auto` writes, and the recipe says auto; `--bits 16` rounds nothing."""
    if target == "gguf":
        pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    asked = {"max_bytes": half, "target": target, "calibration": str(tmp_path / "ids.npy")}
    found = [compress(model, tmp_path / n, **asked, **more) for n, more in (("open", {}), ("auto", {"bits": "auto"}))]
    assert found[0].choices == found[1].choices != [] and found[0].rounding and not found[0].warnings
    assert all(torch.equal(*pair) for pair in pair_tensors(tmp_path / "open", tmp_path / "auto"))
    first, second = ((tmp_path / n / "recipe.yaml").read_text() for n in ("open", "auto"))
    assert first == second
    assert "bits: auto" in first
    plain = compress(model, tmp_path / "plain", **asked, bits=16)
    assert not plain.rounding and not plain.choices and not plain.warnings and plain.bytes_after <= half


def test_any_target_is_cut_in_16_bits_unless_told(model, half, tmp_path, capsys):
    """The same with --bits 16, but for the line that says what may do better."""
    words = ["compress", str(model), "--max-bytes", str(half), "--method", "flat-llm", "--n-samples", "4", "--seq-len", "24",
             "--no-cache", "--no-ladder", "--calibration", str(tmp_path / "ids.npy")]  # fmt: skip
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    said = {}
    for name, more in (("open", []), ("told", ["--bits", "16"])):
        assert app([*words, "-o", str(tmp_path / name), *more], standalone_mode=False) in (0, None)
        said[name] = " ".join(capsys.readouterr().out.split())
    assert "--bits auto lets rounding compete" in said["open"] and "--bits auto" not in said["told"]
    assert all(torch.equal(*pair) for pair in pair_tensors(*(tmp_path / n for n in said)))


def test_without_the_library_the_size_is_cut_in_16_bits(model, half, tmp_path, monkeypatch):
    """With a note that names the extra; `--bits auto` names it and stops before any work."""

    def miss():
        raise InputError("packed integers need compressed-tensors · pip install 'planish[pack]'")

    monkeypatch.setattr("planish.rounding.integers.load_library", miss)
    done = compress(model, tmp_path / "out", max_bytes=half, target="hf")
    assert not done.rounding and done.bytes_after <= half and done.keep < 1
    assert len(done.warnings) == 1 and "planish[pack]" in done.warnings[0] and "--bits 16" in done.warnings[0]
    fitted = compress(model, tmp_path / "fit", fit=half + reserve(open_source(model), 8), context=8)
    assert not fitted.rounding and fitted.bytes_after <= half and "planish[pack]" in fitted.warnings[0]
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 16, "seq_len": 24, "method": "flat-llm"}
    foreseen = planish.forecast(model, fit=half + reserve(open_source(model), 8), context=8, **text)
    assert foreseen.keep < 1 and "planish[pack]" in foreseen.warnings[0]
    with pytest.raises(InputError, match=r"planish\[pack\]"):
        compress(model, tmp_path / "auto", max_bytes=half, target="hf", bits="auto")
    assert not (tmp_path / "auto").exists()


def test_where_types_cannot_compete_a_note_says_why(model, half, tmp_path):
    """Another budget, a model in memory, too few windows, a block that is not rounded: the size holds, in 16 bits."""
    for n, (subject, options, words) in enumerate([
        (model, {"kv_keep": 0.7, "method": "a3"}, "--kv-keep holds beside it"),
        (build("llama_gqa", **SMALL), {}, "in memory"),
        (model, {"calibration": IDS[:3].flatten().numpy(), "n_samples": 3}, "none to hold out"),
    ]):  # fmt: skip
        done = compress(subject, tmp_path / str(n), max_bytes=half, target="hf", **options)
        assert not done.rounding and done.bytes_after <= half and words in done.warnings[0], words


def test_what_a_size_was_and_took_is_told(model, half, tmp_path, run, monkeypatch):
    """What was asked is the size, the seconds are those of all plans, and rounding is part of what is foretold."""
    monkeypatch.setattr("planish.dry_run.windows.SMALL", 0.0)
    monkeypatch.setattr("planish.cli.run.LONG", 0.0)
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    text = [
        "--calibration",
        tmp_path / "ids.npy",
        "--n-samples",
        16,
        "--seq-len",
        24,
        "--method",
        "flat-llm",
        "--no-ladder",
    ]
    size = half + reserve(open_source(model), 8)
    began = time.perf_counter()
    done = run("compress", model, "-o", tmp_path / "out", "--fit", size, "--context", 8, *text)
    took = time.perf_counter() - began
    assert done.exit_code == 0 and f"(asked fit {size:,})" in done.output
    parts = [float(s) for s in re.findall(r"([\d.]+) s \(text", done.output)]
    assert 0.7 * took < parts[0] <= round(took, 1), "as it is printed, to a tenth"
    rounded = run("compress", model, "-o", tmp_path / "8", "--keep", 0.9, "--bits", 8, *text)
    told = next(line for line in rounded.output.splitlines() if line.startswith("this takes about"))
    assert re.search(r"\(.*blocks \d+ s, rounding \d+ s, loss", told), told


def test_fit_in_16_bits(model, half, tmp_path):
    room = reserve(open_source(model), 8)
    done = compress(model, tmp_path / "out", fit=half + room, context=8, bits=16)
    assert not done.rounding and not done.choices and 0.9 * half < done.bytes_after <= half
    told = compress(model, tmp_path / "told", max_bytes=half, context=8, bits=16)
    assert told.bytes_after == done.bytes_after


def test_a_forecast_is_of_plans_where_types_compete(model, half):
    asked = {"method": "flat-llm", "n_samples": 4, "seq_len": 24, "max_bytes": half}
    said = {t: planish.forecast(model, target=t, **asked) for t in ("hf", "any")}
    assert not hasattr(said["any"], "plans") and not any("--bits" in w for w in said["any"].warnings)
    assert said["hf"].plans and said["hf"].heads == ["8", "4"], (
        "as planish.sizes.fit.vary_head makes the best one again"
    )
    assert planish.forecast(model, target="hf", head_bits="4", **asked).heads == []
    assert not any("--bits" in w for w in planish.forecast(model, target="hf", bits=16, **asked).warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_bytes": 1000, "bits": "auto"}, "smallest that can be made"),
        ({"bits": "auto"}, "give --max-bytes or --fit"),
        ({"bits": "auto", "keep": 0.5}, "give --max-bytes or --fit"),
        ({"bits": "auto", "max_bytes": "1MB", "kv_keep": 0.5}, "--kv-keep cannot hold"),
        ({"fit": "10MB", "bits": "4"}, "--bits 4 cannot hold"),
        ({"fit": "10MB", "keep": 0.5}, "--keep cannot hold"),
        ({"fit": "1KB"}, "nearly all of it with any --context"),
        ({"fit": "1500KB", "context": 9000}, "a smaller --context"),
        ({"bits": "auto", "max_bytes": 60_000, "n_samples": 3}, "none to hold out"),
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


def make_result(size: int, params: int, bits: int = 16) -> Result:
    """A result of so many bytes, whose blocks have `params` weights."""
    counts = dict.fromkeys([f.name for f in fields(Result)][3:9], 0) | {"block_params_after": params}
    return Result("auto", 0.5, 0.5, **counts, format="", output="", bytes_after=size, kv_bits=bits)


@given(
    outside=st.integers(10_000, 10**9), params=st.integers(100_000, 10**9), over=st.floats(1e-6, 0.9), rounded=st.booleans()
)  # fmt: skip
def test_what_comes_out_too_large_shrinks_by_what_is_free(outside, params, over, rounded):
    """However much of the file is not: the next try has the size, if bytes follow the keep or the bits; never less than half of
    what the size leaves."""
    each = 3.4 / 8 if rounded else 2.0
    choice = Choice("3.400" if rounded else "16", 1.0 if rounded else 0.5)
    size = int(outside + (1 - 0.5 * over) * each * params)
    assert choice.shrink(make_result(int(outside + each * params), params), size)
    left = float(choice.bits) / 3.4 if rounded else choice.keep / 0.5
    assert left * each * params + outside <= size + 1e-3 * each * params
    assert left * each * params >= 0.5 * (size - outside) - 0.01 * each * params


def test_nothing_shrinks_that_is_not_free():
    """Plain types, the whole model, and blocks that would have to have fewer than no bytes."""
    for choice in (Choice("4", 1.0), Choice("16", 1.0)):
        assert not choice.shrink(make_result(1000, 100), 900)
    assert not Choice("4", 0.5).shrink(make_result(10_000, 100), 5_000)


def test_a_size_that_is_mostly_embedding_holds(tmp_path):
    """Of a model whose blocks are a twentieth of the file; and what was made too large of all windows is made again, smaller."""
    model = save(build("llama_gqa", **SMALL, vocab_size=12_000, tie_word_embeddings=True), tmp_path / "model")
    source = open_source(model)
    outside, blocks = predict(Request.ask(model="", target="hf"), source, "8")
    size = int(outside + 0.6 * blocks)
    done = compress(model, tmp_path / "out", max_bytes=size, target="hf")
    assert done.bytes_after <= size and any(not c["error"] for c in done.choices)
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) == done.bytes_after
    request = Request.ask(model="", target="hf", max_bytes=size, bits="auto")
    text = Calibration(IDS, {})
    contest = Contest(request, find_method("flat-llm"), source, text, Destination(tmp_path / "out"))
    chosen = Choice("4", 0.8, chosen=True)
    assert make_smaller(contest, [chosen], replace(done, bytes_after=size)) is None and chosen.keep == 0.8
    smaller = make_smaller(contest, [chosen], replace(done, bytes_after=size + 1))
    assert smaller is not None and smaller.keep == chosen.keep < 0.8 and smaller.max_bytes is None
    assert make_smaller(contest, [Choice("4", 1.0, chosen=True)], replace(done, bytes_after=size + 1)) is None
