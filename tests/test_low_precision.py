"""Checkpoints in low precision: every format against a naive dequantiser, the formats' own libraries, and end to end."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import planish
import tiny
from packed_files import E2M1, MAKERS, Case, configure, make, write
from planish.errors import InputError
from planish.folder.packed import reader
from planish.folder.packed.codes import read_e8m0
from planish.folder.packed.declared import METHODS
from planish.folder.packed.reader import PackedWeights
from planish.folder.safetensors import Entry
from planish.folder.source import open_source

FP8 = "fp8 blocks of 8 x 12"
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
QUICK = (
    FP8,
    "ct int4, zeros",
    "gptq act-order",
    "awq",
    "bnb nf4, double",
)


class Held:
    """Stored tensors in memory, in place of a file's."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.names, self.paths = tensors, tensors.keys(), []

    def entry(self, name: str) -> Entry:
        return Entry(self.tensors[name].dtype, tuple(self.tensors[name].shape), 0, 0)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        return self.tensors[name].flatten(0, -2)[first : first + count]


def hold(case: Case, extra: dict[str, Tensor] | None = None) -> PackedWeights:
    tensors = {f"model.layers.0.q_proj{suffix}": t for suffix, t in case.stored.items()} | (extra or {})
    declared = METHODS[case.declared["quant_method"]](case.declared)
    return PackedWeights(Held(tensors), declared, torch.float32, Path("model"))


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 2**32), out=st.sampled_from([8, 16]), width=st.sampled_from([32, 64]), chunk=st.integers(1, 400)
)
def test_weights_are_those_of_the_naive_dequantiser(name, seed, out, width, chunk):
    """All of it and any run of rows, in chunks of any size."""
    rng = random.Random(seed)
    case = make(name, rng, out, width)
    weights = hold(case, {"model.layers.0.q_proj.input_scale": torch.ones(1), "model.norm.weight": torch.ones(4)})
    assert set(weights.names) == {"model.layers.0.q_proj.weight", "model.norm.weight"}
    assert weights.entry("model.layers.0.q_proj.weight").shape == (out, width)
    before, reader.CHUNK = reader.CHUNK, chunk
    try:
        found = weights.read("model.layers.0.q_proj.weight")
        first = rng.randrange(out)
        count = rng.randrange(out - first) + 1
        rows = weights.read_rows("model.layers.0.q_proj.weight", first, count)
    finally:
        reader.CHUNK = before
    np.testing.assert_array_equal(found.numpy(), case.weight)
    np.testing.assert_array_equal(rows.numpy(), case.weight[first : first + count])


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MAKERS])
@torch.no_grad()
def test_a_model_in_each_format_is_compressed_and_loads_plainly(name, tmp_path):
    family = "qwen3" if name == QUICK[0] else "llama_gqa"
    weights = write(tiny.build(family, torch.bfloat16, **SIZES), name, tmp_path / "m")
    plain = AutoModelForCausalLM.from_config(open_source(tmp_path / "m").config)
    loaded = planish.load(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for n, p in loaded.named_parameters():
        assert p.dtype == torch.bfloat16
        expected = weights[n].bfloat16() if n in weights else stored.get(n, stored["model.embed_tokens.weight"])
        assert torch.equal(p, expected), n
    plain.load_state_dict(loaded.state_dict())

    options = {
        "keep": 0.8,
        "method": "svd",
        "calibration": tiny.windows(8, 16).flatten(),
        "n_samples": 8,
        "seq_len": 16,
    }
    result = planish.compress(tmp_path / "m", output=tmp_path / "out", **options)
    assert result.keep <= 0.8 and any("read as BF16" in w for w in result.warnings)
    origin = json.loads((tmp_path / "out" / "planish.json").read_text())["source_file"]
    assert sum(origin["tensor_types"].values()) == len(weights) + sum(
        n not in weights for n in dict(plain.named_parameters())
    )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    same = planish.compress(plain.bfloat16(), output=tmp_path / "same", **options)
    for file in sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")):
        a, b = load_file(tmp_path / "out" / file), load_file(tmp_path / "same" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert same.bytes_after == result.bytes_after
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def drop(*ends: str):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ends)}


def change(end: str, make):
    """The first tensor with this ending, changed."""

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = min(n for n in tensors if n.endswith(end))
        return tensors | {name: make(tensors[name].clone()).contiguous()}

    return apply


def put(value: float):
    def apply(t: Tensor) -> Tensor:
        t.view(-1)[-1] = value
        return t

    return apply


UP = "model.layers.0.mlp.up_proj"
BAD = {  # format, what is done to the tensors, words
    "no scale": (FP8, drop("down_proj.weight_scale_inv"), "down_proj.weight .* stored as F8_E4M3, and nothing"),
    "fewer blocks": (FP8, change("_scale_inv", lambda t: t[:-1]), r"down_proj.* scales of shape \(3, 3\), expected \(4, 3\)"),
    "other type": (FP8, change("proj.weight", lambda t: t.view(torch.int8)), "codes of type I8, expected F8_E4M3"),
    "type of scales": (FP8, change("_scale_inv", lambda t: t.to(torch.int32)), "scales of type I32, expected F32"),
    "NaN": (FP8, change("_scale_inv", put(float("nan"))), "NaN or infinity among its scales"),
    "zero": (FP8, change("_scale_inv", put(0.0)), "a scale of zero where its codes are not zero"),
    "NaN code": (FP8, change("proj.weight", lambda t: put(127)(t.view(torch.uint8)).view(torch.float8_e4m3fn)),
                 "holds NaN or infinity"),
    "two weights": ("gptq", lambda t: t | {UP + ".weight": torch.ones(32, 32)}, "stored twice"),
    "no zeros": ("gptq", drop("up_proj.qzeros"), "up_proj.qzeros is missing in .* the zeros of"),
    "groups": ("gptq", change(".g_idx", put(9)), "g_idx from 0 to 9 for 2 groups"),
    "short zeros": ("awq", change(".qzeros", lambda t: t[:, :-1]), r"qzeros of shape \(2, 3\), expected \(2, 4\)"),
    "weight_shape": ("ct int4", change(".weight_shape", put(16)), r"codes of shape \(32, 4\), expected \(32, 2\)"),
    "zero point": ("ct int4, zeros", drop("q_proj.weight_zero_point"), "q_proj.* has no zero point"),
    "act-order": ("ct int4", lambda t: t | {UP + ".weight_g_idx": torch.zeros(32, dtype=torch.int32)}, "weight_g_idx"),
    "global scale": ("ct nvfp4", drop("o_proj.weight_global_scale"), "o_proj.* has no global scale"),
    "global zero": ("modelopt nvfp4", change("_scale_2", put(0.0)), "a global scale of zero"),
    "MXFP4 scales": ("ct mxfp4", change("_scale", lambda t: t[:, :0]), "scales of shape"),
    "MXFP4 NaN": ("ct mxfp4", change("_scale", put(255)), "NaN or infinity among its scales"),
    "absmax": ("bnb nf4", change(".absmax", lambda t: t[:-1]), r"scales of shape \(15,\), expected \(16,\)"),
    "state": ("bnb nf4", change("bitsandbytes__nf4", lambda t: t[:-2]), "a quant_state that is not read"),
    "table": ("bnb nf4", drop("q_proj.weight.quant_map"), "q_proj.weight.quant_map is missing"),
    "nested": ("bnb nf4, double", drop("q_proj.weight.nested_absmax"), "nested_absmax|scales of type U8"),
    "SCB": ("bnb int8", change(".SCB", put(float("inf"))), "NaN or infinity among its scales"),
    "format": ("bnb int8", change(".weight_format", put(1)), "weight_format 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_damaged_checkpoints_are_refused_in_a_line(what, checkpoints, run, tmp_path):
    name, damage, words = BAD[what]
    model, ids = checkpoints(name, tmp_path / "m")
    save_file(damage(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    refuse(run, tmp_path, words, model, ids)


DECLARED = {  # format, what is changed in the declaration, words
    "e5m2": ("fp8 per tensor", {"fmt": "e5m2"}, "fmt 'e5m2' is not read"),
    "blocks": ("fp8 per tensor", {"weight_block_size": [128]}, "weight_block_size .* is not read"),
    "listed": ("fp8 per tensor", {"modules_to_not_convert": ["mlp.up_proj"]}, "up_proj.* is listed as not converted"),
    "bits": ("gptq", {"bits": 5}, "bits 5 is not read; expected 2, 3, 4, 8"),
    "dynamic": ("gptq", {"dynamic": {"-:lm_head": {}}}, "dynamic settings"),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
    "gemv": ("awq", {"version": "gemv"}, "version 'gemv' is not read"),
    "sparse": ("ct int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not read"),
    "rotated": ("ct int4", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not read"),
    "form": ("ct int4", {"format": "marlin-24"}, "format 'marlin-24' is not read"),
    "targets": ("ct int4", {"config_groups": {"g": {"targets": ["re:.*q_proj"], "weights": {"num_bits": 4, "group_size": 16}}}},
                "no target of config_groups"),
    "algorithm": ("modelopt nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not read"),
    "both": ("bnb nf4", {"load_in_8bit": True}, "both true or both false"),
    "unknown": ("bnb nf4", {"quant_method": "aqlm"}, "already quantised .aqlm in its config.*folders are read that declare fp8, "),
    "another": ("bnb nf4", {"quant_method": "gptq", "bits": 4}, "declares gptq weights .*and no tensor is stored that way"),
}  # fmt: skip


@pytest.mark.parametrize("what", DECLARED)
def test_declarations_that_are_not_read_are_named(what, checkpoints, run, tmp_path):
    name, changes, words = DECLARED[what]
    model, ids = checkpoints(name, tmp_path / "m")
    declared = json.loads((model / "config.json").read_text())["quantization_config"] | changes
    configure(model, quantization_config=declared)
    refuse(run, tmp_path, words, model, ids)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Copies of a tiny model's folder in a format, written once, and of token ids."""
    made: dict[str, Path] = {}
    ids = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(ids, tiny.windows(8, 16).flatten().numpy())

    def copy(name: str, place: Path) -> tuple[Path, Path]:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("made") / "m"
            write(tiny.build("llama_gqa", torch.bfloat16, **SIZES), name, made[name])
        return shutil.copytree(made[name], place), ids

    return copy


def refuse(run, tmp_path: Path, words: str, model: Path, ids: Path, *more: str) -> None:
    """compress ends with one line that has the words, and writes nothing."""
    done = run(
        "compress",
        model,
        "--method",
        "svd",
        "--calibration",
        ids,
        "--n-samples",
        8,
        "--seq-len",
        16,
        "-o",
        tmp_path / "out",
        *more,
    )
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and len(lines) == 1 and done.stdout == "", done.output
    assert re.search(words, lines[0]), lines[0]
    assert not list(tmp_path.glob("out*"))


def test_stacked_experts_of_gpt_oss():
    """Blocks and scales as that family stores them: all, and rows across experts."""
    codes = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.randint(118, 126, (3, 8, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = np.zeros((3, 64, 8), dtype=np.float32)
    for e in range(3):
        for out in range(8):
            for j in range(64):
                byte = int(codes[e, out, j // 32, j % 32 // 2])
                code = byte >> 4 if j % 2 else byte & 15
                expected[e, j, out] = E2M1[code] * 2.0 ** (int(scales[e, out, j // 32]) - 127)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": codes, f"{name}_scales": scales, f"{name}_bias": torch.zeros(3, 8)}
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    weights = PackedWeights(Held(tensors), METHODS["mxfp4"](declared), torch.bfloat16, Path("model"))
    assert set(weights.names) == {name, f"{name}_bias"} and weights.entry(name).shape == (3, 64, 8)
    assert torch.equal(weights.read(name).float(), torch.from_numpy(expected))
    for first, count in ((0, 1), (60, 10), (33, 130)):
        found = weights.read_rows(name, first, count).float().numpy()
        np.testing.assert_array_equal(found, expected.reshape(-1, 8)[first : first + count])
    library = convert_moe_packed_tensors(codes, scales)
    assert torch.equal(library, weights.read(name))


def test_stacked_experts_in_fp8():
    """As transformers writes them: a matrix of scales per expert."""
    rng = random.Random(0)
    cases = [make(FP8, rng, 16, 32) for _ in range(3)]
    tensors = {"e.gate_up_proj": torch.stack([c.stored[".weight"] for c in cases]),
               "e.gate_up_proj_scale_inv": torch.stack([c.stored[".weight_scale_inv"] for c in cases])}  # fmt: skip
    weights = PackedWeights(Held(tensors), METHODS["fp8"](cases[0].declared), torch.float32, Path("model"))
    expected = np.stack([c.weight for c in cases])
    np.testing.assert_array_equal(weights.read("e.gate_up_proj").numpy(), expected)
    np.testing.assert_array_equal(weights.read_rows("e.gate_up_proj", 10, 30).numpy(), expected.reshape(-1, 32)[10:40])


def test_powers_of_two_in_a_byte():
    found = read_e8m0(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert found[:255].double().tolist() == [2.0 ** (n - 127) for n in range(255)] and found[255].isnan()


def test_layers_that_predict_further_tokens_are_left_out(tmp_path, checkpoints):
    """Blocks behind the last one, and mtp.…: the result is the one without them, and says so."""
    plain, ids = checkpoints(FP8, tmp_path / "plain")
    with_more = Path(shutil.copytree(plain, tmp_path / "more"))
    tensors = load_file(plain / "model.safetensors")
    more = {n.replace("layers.0.", "layers.1."): t.clone() for n, t in tensors.items() if "layers.0." in n}
    more |= {"model.layers.1.eh_proj.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)}
    save_file(tensors | more, with_more / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="says 1 blocks, the checkpoint holds 2"):
        open_source(with_more)
    configure(with_more, num_nextn_predict_layers=1)
    options = {"keep": 0.8, "method": "svd", "calibration": str(ids), "n_samples": 8, "seq_len": 16}
    planish.compress(plain, output=tmp_path / "a", **options)
    result = planish.compress(with_more, output=tmp_path / "b", **options)
    assert any(re.search(r"1\d tensors of next-token prediction layers are left out", w) for w in result.warnings)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_zero_biases_of_old_gptq_files_are_left_out(tmp_path, checkpoints):
    """Their writers gave every linear a bias; one that is not zero is refused as in any checkpoint."""
    model, _ = checkpoints("gptq", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    for value in (0.0, 1.0):
        save_file(tensors | {UP + ".bias": torch.full((32,), value)}, model / "model.safetensors", {"format": "pt"})
        if not value:
            assert f"{UP}.bias" not in open_source(model).reader.names
            continue
        with pytest.raises(InputError, match=r"unexpected tensor .*up_proj\.bias"):
            open_source(model)


def test_modelopt_may_declare_in_a_file_of_its_own(tmp_path, checkpoints):
    model, _ = checkpoints("modelopt nvfp4", tmp_path / "m")
    expected = open_source(model).weight(f"{UP}.weight")
    raw = json.loads((model / "config.json").read_text())
    own = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    del raw["quantization_config"]
    (model / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"the checkpoint is quantised"):
        open_source(model)
    (model / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": own}))
    assert torch.equal(open_source(model).weight(f"{UP}.weight"), expected)
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": own | {"quant_algo": "MIXED_PRECISION"}}))
    with pytest.raises(InputError, match=r"hf_quant_config\.json declares modelopt weights: quant_algo 'MIXED_"):
        open_source(model)
