"""`compress --bits`: what is written, in whose format, and that it loads there and computes the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import planish
from planish.calibrate.linears import list_linears, measure_gradients
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream
from planish.compression import resume
from planish.errors import InputError
from planish.export import export
from planish.export.verify import verify
from planish.folder.gguf_file import GGUF
from planish.folder.source import open_folder
from planish.rounding import blocks
from planish.rounding.round import DAMPING, Metric, round_matrix
from planish.rounding.types import TYPES, find_type
from planish.stats import Tap
from planish.walks.quantise import Quantiser
from tiny import VOCABULARY, build, pick, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
IDS = windows(12, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(build("llama_gqa", **WIDE), tmp_path_factory.mktemp("bits") / "model")


def compress(model, output, **options):
    options = {"keep": 1, "calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24} | options
    return planish.compress(model, output=output, **options)


def read_linears(folder) -> dict[str, torch.Tensor]:
    """Weights of the blocks' linears as planish reads them, by module."""
    source = open_folder(folder)
    prefix = source.family.blocks
    return {
        f"{prefix}.{i}.{n}": m.weight
        for i in range(source.n_blocks)
        for n, m in list_linears(source.stored_block(i)).items()
    }


def count_files(folder) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({"bits": 4}, {"int4-64-asym": 14}),
        pytest.param({"bits": "int3-32"}, {"int3-32": 14}, marks=pytest.mark.slow),
        ({"bits": 8, "keep": 0.8, "method": "a3"}, None),
        ({"bits": 8, "keep": 0.6, "method": "mpifa"}, None),
        pytest.param({"bits": 4, "keep": 0.5, "method": "svd-llm", "round_to": 8}, None, marks=pytest.mark.slow),
        pytest.param({"bits": 8, "keep": 0.8, "method": "flat-llm"}, None, marks=pytest.mark.slow),
        pytest.param({"bits": 4, "target": "vllm"}, {"int4-64-asym": 14}, marks=pytest.mark.slow),
    ],
)
def test_transformers_reads_what_is_packed(model, tmp_path, options, types):
    """compressed-tensors inside transformers makes the same numbers of it as planish; bytes are those of the files."""
    result = compress(model, tmp_path / "out", **options)
    assert types is None or result.rounding["types"] == types
    assert result.bytes_after == count_files(tmp_path / "out") < result.bytes_before / 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized" and config["dtype"] == "float16"
    own = planish.load(tmp_path / "out")(IDS[:2]).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs(IDS[:2]).logits, own)


@pytest.mark.parametrize(
    ("method", "bits", "step"),
    pick([("svd-llm", "int4-64", 64)], [("auto", "4", 32), ("svd-llm", "int4-64", 64), ("mpifa", "3", 32)]),
)
def test_ranks_are_such_that_factors_divide_into_groups(tmp_path, method, bits, step):
    """A model whose ranks would else be any number: rows of second factors hold whole groups, and the budget is kept."""
    wide = save(build("llama_gqa", hidden_size=192, intermediate_size=320, num_hidden_layers=2), tmp_path / "model")
    text = {"calibration": windows(20, 24).flatten().numpy(), "n_samples": 20}
    done = compress(wide, tmp_path / "out", keep=0.7, method=method, bits=bits, **text)
    widths = [w.shape[1] for n, w in read_linears(tmp_path / "out").items() if len(n.rpartition(".")[2]) == 1]
    assert {*widths} - {192, 320} and all(n % step == 0 for n in widths)
    assert 0.6 < done.keep <= 0.7


def test_every_linear_is_recorded(model, tmp_path):
    result = compress(model, tmp_path / "out", bits=3)
    manifest = json.loads((tmp_path / "out/planish.json").read_text())
    linears, weights = manifest["rounding"], read_linears(tmp_path / "out")
    dense = read_linears(model)
    assert linears.keys() == weights.keys() == dense.keys()
    assert (
        sum(e["nats"] for e in linears.values()) == pytest.approx(result.rounding["nats"])
        and result.rounding["nats"] > 0
    )
    bits = 8 * sum(e["bytes"] for e in linears.values()) / sum(w.numel() for w in weights.values())
    assert bits == pytest.approx(result.rounding["bits_per_weight"])
    assert all(e["bytes"] == TYPES[e["type"]].count(*weights[n].shape) for n, e in linears.items())
    assert manifest["result"]["params_after"] == manifest["result"]["params_before"]


def see_queries(model) -> torch.Tensor:
    """What the second block's queries read (tokens, in)."""
    seen = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(IDS)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@torch.no_grad()
def test_blocks_are_rounded_for_the_rounded_prefix(model, tmp_path, monkeypatch):
    """The second block's queries, in the basis that they have, fitted and rounded again for the inputs that the written model gives
    them; fitted to what they make of those of the model as it was, a quarter of the way."""
    monkeypatch.setattr(blocks, "balance", lambda *a: [])
    compress(model, tmp_path / "out", bits=3)
    loaded, before = planish.load(tmp_path / "out").float(), planish.load(model, dtype=torch.float32)
    x, wanted = see_queries(loaded), see_queries(before)
    gradients, _ = measure_gradients(Stream(open_folder(model), IDS))
    assert torch.equal(loaded.model.norm.weight, build("llama_gqa", **WIDE).model.norm.weight.half().float())
    name = "model.layers.1.self_attn.q_proj"
    gram, w = x.T @ x / len(x), read_linears(model)[name].double()
    level = (DAMPING * float(gram.diagonal().mean())) ** 0.5 * torch.eye(len(gram), dtype=torch.float64)
    rows = torch.cat([x / len(x) ** 0.5, level])  # least squares with the ridge as rows of its own, towards w
    aims = torch.cat([(0.75 * x + 0.25 * wanted) / len(x) ** 0.5, level]) @ w.T
    fitted = torch.linalg.lstsq(rows, aims).solution.T
    want = round_matrix(
        fitted.float(), find_type("int3-64-asym"), Metric(gram, gradients[1]["self_attn.q_proj"]), dtype=torch.float16
    )
    got = read_linears(tmp_path / "out")[name]
    assert (
        float((got != want.value).float().mean()) < 0.05
    )  # numbers of other order tip codes; unfitted 82 % are others
    assert float((fitted - w).norm() / w.norm()) > 0.01
    record = json.loads((tmp_path / "out/planish.json").read_text())["rounding"][name]
    assert record["nats"] == pytest.approx(want.nats, rel=0.02) and record["how"] == want.how


def test_gradients_are_those_of_taps(model):
    """By modules' names what `sweep_back` sees at roles."""
    stream = Stream(open_folder(model), IDS)
    found, _ = measure_gradients(stream)
    roles = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    taps = {r: Tap(f"grad:{r}.out", "gram") for r in roles}
    for i, _, stats in sweep_back(stream, lambda shape: sorted(taps.values()), probe="signs"):
        for role, name in roles.items():
            want = stats.mean(taps[role])
            assert torch.allclose(found[i][name], want, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("options", "types"),
    [
        ({"bits": 4}, {"IQ4_NL": 14, "Q8_0": 2}),
        pytest.param({"bits": "q4_1", "head_bits": "q5_0"}, {"Q4_1": 14, "Q5_0": 2}, marks=pytest.mark.slow),
        ({"bits": 8, "head_bits": 16, "keep": 0.6, "method": "flat-llm"}, {"Q8_0": 14, "F16": 2}),
    ],
)
def test_llama_cpp_runs_what_is_stored(model, tmp_path, options, types):
    """The file holds the folder's own bytes of every type, and gives its logits (llama.cpp rounds activations to 8 bits)."""
    result = compress(model, tmp_path / "out", target="gguf", **options)
    assert result.bytes_after == count_files(tmp_path / "out")
    written = export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    file = GGUF(tmp_path / "m.gguf")
    found = file.count_types()
    assert {k: n for k, n in found.items() if k != "F32"} == types and written.bytes < 1.2 * result.bytes_after
    down = file.read("blk.1.ffn_down.weight", torch.float32)
    assert torch.equal(down, read_linears(tmp_path / "out")["model.layers.1.mlp.down_proj"])
    compared = verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf")
    assert compared.passed and compared.max_logit_difference < 0.05 * compared.max_logit


def test_a_folder_for_llama_cpp_is_refused_by_transformers(model, tmp_path):
    """Which would otherwise go on with random weights."""
    compress(model, tmp_path / "out", target="gguf", bits=4)
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits = planish.load(tmp_path / "out", dtype="float32")(input_ids=IDS[:1]).logits
    assert torch.isfinite(logits).all()


def test_asvd_in_the_steps_of_a_target(model, tmp_path):
    assert compress(model, tmp_path / "out", method="asvd", keep=0.8, bits=4, target="hf").rounding


@pytest.mark.slow
def test_a_fused_linear_is_taken_apart_in_its_type(tmp_path):
    """phi3 stores q, k and v in one matrix, llama.cpp's llama in three whose rows it turns round."""
    folder = save(build("phi3", **WIDE, sliding_window=None), tmp_path / "model")
    compress(folder, tmp_path / "out", target="gguf", bits=4)
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    assert GGUF(tmp_path / "m.gguf").count_types()["IQ4_NL"] == 14
    assert verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf").passed


def test_export_rounds_to_nearest_where_nothing_is_rounded(model, tmp_path):
    written = export(model, "gguf", tmp_path / "m.gguf", dtype="q4_K")
    assert GGUF(tmp_path / "m.gguf").count_types()["IQ4_NL"] == 16  # rows of 64 and 128
    assert written.notes[-1].endswith("in rows that are no multiple of 256")


def test_a_model_on_the_grid_is_left_alone(model, tmp_path):
    compress(model, tmp_path / "once", bits="int4-32-asym")
    again = save(planish.load(tmp_path / "once", dtype=torch.float32), tmp_path / "model")
    result = compress(again, tmp_path / "twice", bits="int4-32-asym")
    assert any(w.startswith("already rounded to that grid: all matrices (int4-32-asym)") for w in result.warnings)
    assert result.rounding["nats"] == 0 and abs(result.rounding["measured"]) < 1e-6
    once, twice = read_linears(tmp_path / "once"), read_linears(tmp_path / "twice")
    assert all(torch.equal(once[n], twice[n]) for n in once)


@pytest.mark.slow
def test_sixteen_bits_round_nothing(model, tmp_path):
    for name, bits in (("a", None), ("b", 16)):
        compress(model, tmp_path / name, keep=0.8, method="flat-llm", bits=bits)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert files and all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)


@pytest.mark.slow
def test_a_run_stopped_while_rounding_is_taken_up(model, tmp_path, monkeypatch):
    """The cut blocks stay, rounding starts again, and the files are those of a run that was never stopped."""
    options = {"bits": 4, "keep": 0.8, "method": "flat-llm"}
    compress(model, tmp_path / "whole", **options)

    def stop(self, i, hidden, gradients):
        if i == 1:
            raise KeyboardInterrupt
        return rounded(self, i, hidden, gradients)

    rounded = Quantiser.round_block
    monkeypatch.setattr(Quantiser, "round_block", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", **options)
    monkeypatch.undo()
    found = resume(tmp_path / "out")
    assert found.rounding["types"]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "q4_K", "target": "gguf"}, "block 0, q: its rows of 64 weights do not divide into the groups of 256"),
        ({"bits": "q4_0"}, "--target any cannot hold q4_0: ask for it with --target gguf"),
        ({"bits": 5}, "--bits 5 --target any: expected 16, 8, 4, 3, 2"),
        ({"bits": 4, "target": "onnx"}, "--target onnx has no rounded weights"),
        (
            {"bits": 4, "head_bits": 4, "target": "vllm"},
            "--head-bits: embedding and head stay in 16 bits for --target vllm",
        ),
        (
            {"bits": 4, "head_bits": 7, "target": "gguf"},
            "--head-bits 7 --target gguf: expected 16, 8, 6, 5, 4, 3, 2 or a type",
        ),
        (
            {"bits": 4, "head_bits": 4.5, "target": "gguf"},
            "--head-bits 4.5 --target gguf: expected 16, 8, 6, 5, 4, 3, 2 or a type",
        ),
        ({"head_bits": 4}, "--head-bits says how embedding and head are rounded beside the blocks: give --bits too"),
        ({"bits": 4, "keep": None, "max_bytes": 10**6}, "--max-bytes cannot hold beside --bits"),
    ],
)
def test_wrong_requests_write_nothing(model, tmp_path, options, words):
    with pytest.raises(InputError) as caught:
        compress(model, tmp_path / "out", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_models_that_cannot_be_rounded_are_said(tmp_path):
    with pytest.raises(InputError, match="gpt2 stores its linears transposed, which --bits does not round"):
        compress(save(build("gpt2"), tmp_path / "gpt2"), tmp_path / "out", bits=4)
    with pytest.raises(InputError, match="gpt2 stores its linears transposed, which --bits does not round"):
        planish.forecast(tmp_path / "gpt2", bits=4)


def test_a_mean_below_the_smallest_types_is_refused_before_any_matrix_is_rounded(model, tmp_path, monkeypatch):
    def round_nothing(*args):
        raise AssertionError("a matrix was rounded")

    monkeypatch.setattr("planish.walks.quantise.round_matrix", round_nothing)
    with pytest.raises(InputError, match="the smallest types take"):
        compress(model, tmp_path / "out", bits="2.01", keep=0.7)
    assert not (tmp_path / "out").exists()


def test_linears_of_another_class_are_rounded_for_llama_cpp(tmp_path):
    """Falcon's; transformers cannot load packed ones of it."""
    dense = save(build("falcon", hidden_size=64, ffn_hidden_size=128, bias=False), tmp_path / "model")
    with pytest.raises(InputError, match="falcon has a class of linears of its own"):
        compress(dense, tmp_path / "out", bits=4)
    result = compress(dense, tmp_path / "out", bits=4, target="gguf")
    assert result.rounding["types"] == {
        "iq4_nl": 4 * open_folder(dense).n_blocks,
        "q8_0": 1,
    }  # queries, keys, values are one


def test_the_command(model, tmp_path, run):
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    text = ["--calibration", tmp_path / "ids.npy", "--n-samples", "12", "--seq-len", "24"]
    done = run("compress", model, "--keep", "1", "--bits", "4", *text, "-o", tmp_path / "out")
    assert "rounded: 14 int4-64-asym · 4.3" in done.stdout
    assert "bits: '4'" in (tmp_path / "out/recipe.yaml").read_text()
    assert int(IDS.max()) < VOCABULARY
