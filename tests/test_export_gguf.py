"""GGUF files hold what the torch model computes: read back tensor by tensor, and run by llama.cpp where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import compressed
import tiny
from compressed import train_tokenizer
from planish.errors import InputError
from planish.export.plain import open_plain
from planish.folder.tokenizer import load_tokenizer
from tiny import build, load

gguf = pytest.importorskip("gguf")
from planish.export.gguf import export_gguf  # noqa: E402
from planish.export.gguf_llama import solve_silu  # noqa: E402
from planish.export.same_tensors import measure_rounding  # noqa: E402
from planish.export.vocabulary import merge_scores  # noqa: E402

REFUSED = "submodules → linear before the norm"
EXACT = [n for n in compressed.FORMS if n != REFUSED]
ARCHITECTURES = {  # which of llama.cpp's graphs a compressed llama ends up in
    "dense": "llama", "narrow MLP": "llama", "MLP widths per block": "deci", "fewer value dimensions": "mimo2",
    "low-rank pairs": "llama", "fewer rotary pairs": "llama", "attention removed": "deci", "attention → linear": "deci",
    "MLP → linear": "deci", "MLP removed": "deci", "attention → linear with a constant": "deci", "blocks removed": "llama",
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    return tensors, {k: f.contents() for k, f in reader.fields.items()}


class Graph:
    """What llama.cpp's graphs of these architectures compute, from a GGUF file, in a few lines of torch (fp64)."""

    def __init__(self, path: Path):
        tensors, self.meta = read(path)
        self.t = {n: x.double() for n, x in tensors.items()}
        self.arch = self.meta["general.architecture"]

    def get(self, key: str, block: int | None = None):
        value = self.meta[f"{self.arch}.{key}"]
        return value[block] if isinstance(value, list) and block is not None else value

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.t[f"{name}.weight"].T
        return y + self.t[f"{name}.bias"] if f"{name}.bias" in self.t else y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        eps = self.get("attention.layer_norm_rms_epsilon")
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.t[f"{name}.weight"]

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        d = self.get("rope.dimension_count")
        base = self.get("rope.freq_base")
        factors = self.t.get("rope_freqs.weight", torch.ones(d // 2, dtype=torch.float64))
        angle = torch.arange(x.shape[0])[:, None] * base ** (-torch.arange(0, d, 2).double() / d) / factors
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.arch in ("llama", "deci"):
            a, b = x[..., 0:d:2], x[..., 1:d:2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        else:
            a, b = x[..., : d // 2], x[..., d // 2 : d]
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.cat([turned, x[..., d:]], -1)

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        heads, kv = self.get("attention.head_count", i), self.get("attention.head_count_kv", i)
        name = f"blk.{i}.attn_"
        if kv == 0:
            return self.linear(f"{name}output", x)
        q, k = (self.linear(name + r, x).unflatten(-1, (h, -1)) for r, h in (("q", heads), ("k", kv)))
        v = self.linear(name + "v", x).unflatten(-1, (kv, -1))
        assert q.shape[-1] == self.get("attention.key_length") and v.shape[-1] == self.get("attention.value_length")
        if self.arch == "qwen3":
            q, k = self.norm(name + "q_norm", q), self.norm(name + "k_norm", k)
        q, k = self.rope(q), self.rope(k)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(len(x), len(x)).triu(1).bool()
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        return self.linear(f"{name}output", torch.einsum("hqk,khv->qhv", weights, v).flatten(1))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.t["token_embd.weight"][ids]
        for i in range(self.get("block_count")):
            blk = f"blk.{i}."
            assert self.get("feed_forward_length", i) > 0, "deci would drop the attention of a block without an MLP"
            if self.get("attention.head_count", i) > 0:
                x = x + self.attention(i, self.norm(blk + "attn_norm", x))
            else:
                assert i > 0, "llama.cpp reads the head size from block 0"
            h = self.norm(blk + "ffn_norm", x)
            hidden = torch.nn.functional.silu(self.linear(blk + "ffn_gate", h)) * self.linear(blk + "ffn_up", h)
            x = x + self.linear(blk + "ffn_down", hidden)
        head = "output.weight" if "output.weight" in self.t else "token_embd.weight"
        return self.norm("output_norm", x) @ self.t[head].T


def expect(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, dtype=torch.float64)(input_ids=ids[None]).logits[0]


def ids_for(folder: Path, seed: int = 0) -> torch.Tensor:
    config = open_plain(folder).config
    length = min(12, getattr(config, "sliding_window", None) or 12)
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", EXACT)
def test_every_form_of_llama_is_exact(form, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS[form])
    written = export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    ids = ids_for(folder)
    torch.testing.assert_close(Graph(tmp_path / "m.gguf").logits(ids), expect(folder, ids), atol=2e-4, rtol=0)
    assert written.architecture == ARCHITECTURES.get(form, written.architecture)
    tensors, _ = read(tmp_path / "m.gguf")
    assert sum(t.numel() for t in tensors.values()) == written.parameters
    grown = [int(n.split(":")[1].split()[0].replace(",", "")) for n in written.notes if "weights" in n]
    assert written.parameters - written.stored_parameters == sum(grown), "the report says what the export costs"


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llama_mha", "llama"), ("llama_head_dim", "llama"), ("llama_bias", "llama"), ("llama_tied", "llama"),
        ("llama_rope3", "llama"), ("mistral", "llama"), ("qwen2", None), ("qwen3", "qwen3"), ("phi3_partial", "llama"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["dense", "value dimensions and MLP widths per block"])
def test_every_family_is_exact(family, architecture, form, tmp_path):
    model = build(family, **({"use_sliding_window": False} if family == "qwen2" else {}))
    folder = compressed.make_folder(model, tmp_path / "m", compressed.FORMS[form])
    written = export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    ids = ids_for(folder)
    torch.testing.assert_close(Graph(tmp_path / "m.gguf").logits(ids), expect(folder, ids), atol=2e-4, rtol=0)
    if form == "dense" and architecture:
        assert written.architecture == architecture


def test_the_smallest_architecture_is_chosen_and_others_can_be_forced(tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [compressed.values(5)])
    sizes = {
        a: export_gguf(folder, tmp_path / f"{a}.gguf", dtype="f32", architecture=a).parameters
        for a in ("llama", "deci", "mimo2")
    }
    assert export_gguf(folder, tmp_path / "best.gguf").parameters == min(sizes.values()) == sizes["mimo2"]
    with pytest.raises(InputError, match="llama can be written as llama, deci, mimo2"):
        export_gguf(folder, tmp_path / "x.gguf", architecture="gemma2")


@pytest.mark.parametrize(
    ("family", "form", "message"),
    [
        (
            "llama_gqa",
            REFUSED,
            "block 0's attention is replaced by a linear map of the residual stream before the norm",
        ),
        (
            "qwen3",
            "attention → linear",
            "no architecture of llama.cpp holds this model: qwen3: block 0 has a linear map",
        ),
        ("llama_yarn", "dense", "rotary embedding of type 'yarn'"),
        ("llama_dynamic", "dense", "rotary embedding of type 'dynamic'"),
        ("opt", "dense", "llama.cpp has no graph of opt, or none that GGUF export writes"),
        ("gemma2", "attention → linear", "block 0 holds a linear map in place of a submodule"),
    ],
)
def test_what_would_be_lossy_is_refused(family, form, message, tmp_path):
    folder = compressed.make_folder(build(family), tmp_path / "m", compressed.FORMS[form])
    with pytest.raises(InputError, match=message):
        export_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_values_beyond_half_precision_are_refused(tmp_path):
    model = build("llama_gqa")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight exceeds the range of f16"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f16")


@pytest.mark.parametrize(("dtype", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_types_round_as_they_should(dtype, error, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS["MLP widths per block"])
    export_gguf(folder, tmp_path / "a.gguf", dtype="f32")
    export_gguf(folder, tmp_path / "b.gguf", dtype=dtype)
    exact, rounded = read(tmp_path / "a.gguf")[0], read(tmp_path / "b.gguf")[0]
    for name, x in exact.items():
        y = rounded[name].float()
        assert (x - y).abs().max() <= error * x.abs().max()
        assert x.ndim > 1 or torch.equal(x, y), "vectors stay in f32"


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("how", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(where, how, tmp_path):
    model = build("llama_gqa")
    model.get_parameter(where).data[0] = how
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=rf"tensor {where} of .*holds NaN or infinity"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_rows_that_no_q8_block_fills_are_counted(tmp_path):
    """32 channels: rows of the MLP's 24 neurons alone are f16; where the model's own width is odd, rounding helps nobody."""
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [compressed.neurons(24)])
    written = export_gguf(folder, tmp_path / "m.gguf", dtype="q8_0")
    odd = 3 * 32 * 24
    note = f"stored as f16, not q8_0: {odd:,} of {written.parameters:,} numbers, in rows that are no multiple of 32"
    assert written.notes == [f"{note}; compress with --round-to 32"]
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    f16 = [t for t in stored.values() if t.tensor_type == gguf.GGMLQuantizationType.F16]
    assert sum(int(t.n_elements) for t in f16) == odd and {t.name[6:] for t in f16} == {"ffn_down.weight"}
    assert export_gguf(folder, tmp_path / "m.gguf", dtype="f16").notes == []
    build("llama_gqa", hidden_size=40, head_dim=8).save_pretrained(tmp_path / "n")
    notes = export_gguf(tmp_path / "n", tmp_path / "n.gguf", dtype="q8_0").notes
    assert len(notes) == 1 and notes[0].endswith("no multiple of 32")


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_file_of_the_model_is_never_replaced(target, tmp_path):
    """Whatever the way to it; an earlier export beside the model may be."""
    from planish.export import export

    folder = tmp_path / "m"
    build("llama_gqa").save_pretrained(folder)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (tmp_path / f"x.{target}").symlink_to(folder / "model.safetensors")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    names = [
        "m/model.safetensors",
        "link/model.safetensors",
        "m/config.json",
        "m/../m/model.safetensors",
        f"x.{target}",
    ]
    if target == "onnx":
        pytest.importorskip("onnxscript")
    for name in names:
        with pytest.raises(InputError, match="would replace a file of the model"):
            export(folder, target, tmp_path / name)
    with pytest.raises(InputError, match="is a folder; give the file"):
        export(folder, target, folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    if target == "gguf":
        for _ in range(2):
            export_gguf(folder, folder / "m.gguf")
        assert (folder / "m.gguf").is_file()


def test_a_window_limits_the_context(tmp_path):
    written = export_gguf(compressed.make_folder(build("mistral"), tmp_path / "m", [None]), tmp_path / "m.gguf")
    assert written.notes == [f"context limited to the sliding window, {tiny.WINDOW} of {tiny.POSITIONS} positions"]
    assert read(tmp_path / "m.gguf")[1]["llama.context_length"] == tiny.WINDOW


def test_silu_of_the_constant_gate_is_one():
    assert float(torch.nn.functional.silu(torch.tensor(solve_silu(1.0), dtype=torch.float64))) == pytest.approx(
        1, abs=1e-14
    )


# ------------------------------------------------------------------ tokenizers


def test_bytes_that_have_no_token(tmp_path):
    """llama.cpp ends the process where it looks for one in vain: for a line's end as soon as it loads a file."""
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS["dense"])
    train_tokenizer(folder, byte_level=False)
    written = export_gguf(folder, tmp_path / "m.gguf")
    assert any(re.search(r"no token for \d+ of 256 bytes", n) for n in written.notes), written.notes
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<0x0A>", "<0xZZ>"))
    with pytest.raises(InputError, match=r"falls back to bytes and has no token <0x0A>; llama.cpp aborts"):
        export_gguf(folder, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("byte_level", [True, False])
def test_tokenizer_is_written(byte_level, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [None])
    train_tokenizer(folder, byte_level)
    written = export_gguf(folder, tmp_path / "m.gguf")
    meta = read(tmp_path / "m.gguf")[1]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert written.tokenizer == ("gpt2 (gpt-2)" if byte_level else "llama")
    assert meta["tokenizer.ggml.model"] == ("gpt2" if byte_level else "llama")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 97
    for text, i in tokenizer.get_vocab().items():
        assert tokens[i] == text
    assert types[tokenizer.bos_token_id] == 3 and types[96] == 5, (
        "special ids are control, ids beyond the tokenizer unused"
    )
    assert meta["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert meta["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert meta["tokenizer.chat_template"] == tokenizer.chat_template
    assert meta["tokenizer.ggml.add_bos_token"] is False
    for text in ("the cat sat", "then that rat and the bat"):
        assert encode_like_llama_cpp(meta, text) == tokenizer(text, add_special_tokens=False).input_ids


def encode_like_llama_cpp(meta: dict, text: str) -> list[int]:
    """llama.cpp's two merging rules: by rank for "gpt2", by the score of the result for "llama" (plain words only)."""
    index = {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"])}
    if meta["tokenizer.ggml.model"] == "gpt2":
        ranks = {tuple(m.split(" ")): r for r, m in enumerate(meta["tokenizer.ggml.merges"])}
        words = [w.replace(" ", "Ġ") for w in [text.split(" ")[0], *(f" {w}" for w in text.split(" ")[1:])]]
    else:
        scores = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]))
        words = ["▁" * bool(meta["tokenizer.ggml.add_space_prefix"]) + text.replace(" ", "▁")]
    out = []
    for word in words:
        parts = list(word)
        while True:
            pairs = list(pairwise(parts))
            if meta["tokenizer.ggml.model"] == "gpt2":
                found = [(ranks[p], n) for n, p in enumerate(pairs) if p in ranks]
            else:
                found = [(-scores[a + b], n) for n, (a, b) in enumerate(pairs) if a + b in index]
            if not found:
                break
            n = min(found)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        out += [index[p] for p in parts]
    return out


def test_scores_follow_the_first_merge():
    model = {"merges": ["a b", ["ab", "c"], ["a", "bc"], ["b", "c"]]}
    assert merge_scores(model, ["a", "ab", "abc", "bc"]) == [-4.0, 0.0, -1.0, -3.0]


def test_unknown_splitting_is_refused(tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [None])
    train_tokenizer(folder, True)
    file = folder / "tokenizer.json"
    file.write_text(
        file.read_text()
        .replace('"use_regex":true', '"use_regex":false')
        .replace('"use_regex": true', '"use_regex": false')
    )
    with pytest.raises(InputError, match="splits text in a way"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert export_gguf(folder, tmp_path / "m.gguf", vocabulary=False).tokenizer == "none"


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("size", [97, 40, 12])
def test_ids_beyond_the_embedding_are_left_out(byte_level, size, tmp_path):
    """The tokenizer's ids are no positions in the embedding: neither tokens nor merges nor special ids beyond it are written."""
    folder = compressed.make_folder(build("llama_gqa", vocab_size=size), tmp_path / "m", [None])
    train_tokenizer(folder, byte_level)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "unk_token": "<s>"})
    tokenizer.save_pretrained(folder)
    written = export_gguf(folder, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ids = {n: fields[f"tokenizer.ggml.{n}_token_id"].contents() for n in ("bos", "eos", "padding", "unknown")
           if f"tokenizer.ggml.{n}_token_id" in fields}  # fmt: skip
    assert len(tokens) == size == len(fields["tokenizer.ggml.token_type"].contents())
    assert all(i < size for i in ids.values())
    inside = {i: t for t, i in tokenizer.get_vocab().items() if i < size}
    assert [tokens[i] for i in inside] == [*inside.values()]
    merges = fields.get("tokenizer.ggml.merges")  # an empty list is not written
    for merge in merges.contents() if merges else ():
        assert merge.replace(" ", "") in tokens
    gone = len(tokenizer) - len(inside)
    assert bool(gone) == any("beyond the embedding" in n for n in written.notes)
    assert ("padding" in ids) == (tokenizer.pad_token_id < size)
    assert any(f"pad token {tokenizer.pad_token_id}" in n for n in written.notes) == ("padding" not in ids)


# ------------------------------------------------------------------ in llama.cpp itself


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is absent: pip install 'planish[gguf]'"
)


@needs_llama_cpp
@pytest.mark.parametrize("form", EXACT)
def test_llama_cpp_computes_the_same(form, tmp_path):
    from planish.export.verify import verify

    model = build("llama_gqa", hidden_size=64, head_dim=32, intermediate_size=96)
    folder = compressed.make_folder(model, tmp_path / "m", compressed.FORMS[form])
    train_tokenizer(folder, True)
    result = verify(folder, "gguf", prompt_len=24, new_tokens=8)
    assert result.passed and result.greedy_equal == 8 and result.tokenizer_equal
    assert result.max_logit_difference < 1e-4 * result.max_logit


@needs_llama_cpp
@pytest.mark.parametrize(
    "family", ["llama_bias", "llama_rope3", "llama_tied", "mistral", "qwen2", "qwen3", "phi3_partial"]
)
@pytest.mark.parametrize("form", ["dense", "value dimensions and MLP widths per block"])
def test_llama_cpp_computes_the_same_for_every_family(family, form, tmp_path):
    from planish.export.verify import verify

    model = build(family, **({"use_sliding_window": False} if family == "qwen2" else {}))
    folder = compressed.make_folder(model, tmp_path / "m", compressed.FORMS[form])
    result = verify(folder, "gguf", prompt_len=24, new_tokens=8)
    assert result.passed and result.greedy_equal == result.greedy_tokens


def save_model(folder: Path, seed: int, **sizes: int) -> None:
    model, draw = build("llama_gqa", **sizes), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = p.data + p.data.std() * torch.randn(p.shape, generator=draw)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_0", "q4_0", "q4_K", "q2_K"])
def test_a_rounded_file_holds_the_same_tensors(kind, tmp_path):
    """No type loses more than it may, and another model's tensors, or one's in another order, are not explained by any."""
    paths = {}
    for n, name in enumerate(("own", "other")):
        save_model(tmp_path / name, n, hidden_size=256, head_dim=64, intermediate_size=256)
        paths[name] = tmp_path / f"{name}.gguf"
        export_gguf(tmp_path / name, paths[name], dtype="f32")
    export_gguf(tmp_path / "own", tmp_path / "rounded.gguf", dtype=kind)
    assert 0 < measure_rounding(tmp_path / "rounded.gguf", paths["own"])[0] <= 0.8
    assert measure_rounding(tmp_path / "rounded.gguf", paths["other"])[0] > 1.3
    turned = {t.name: t for t in gguf.GGUFReader(paths["own"], "r+").tensors}["blk.1.attn_q.weight"]
    turned.data[:] = turned.data[::-1].copy()
    turned.data.base.flush()
    error, name = measure_rounding(tmp_path / "rounded.gguf", paths["own"])
    assert error > 1.3 and name == "blk.1.attn_q.weight"


@needs_llama_cpp
def test_a_file_whose_logits_differ_by_rounding_alone_passes(tmp_path, monkeypatch):
    from planish.export import verify as module

    for n, name in enumerate(("own", "other")):
        save_model(tmp_path / name, n, hidden_size=64, head_dim=32, intermediate_size=96)
    export_gguf(tmp_path / "own", tmp_path / "m.gguf", dtype="q8_0")
    monkeypatch.setattr(module, "GGUF_TOLERANCES", {"0": 1e-4, "7": 1e-7})
    found = module.verify(tmp_path / "own", "gguf", file=tmp_path / "m.gguf")
    assert found.passed and not found.close and found.tensor_error <= 1
    wrong = module.verify(tmp_path / "other", "gguf", file=tmp_path / "m.gguf")
    assert not wrong.passed and wrong.tensor_error > 1
    with monkeypatch.context() as patched:  # the right file, and a program that computes something else of it
        real = module.LlamaCpp.logits
        patched.setattr(module.LlamaCpp, "logits", lambda self, ids: real(self, ids).roll(1, -1))
        strange = module.verify(tmp_path / "own", "gguf", file=tmp_path / "m.gguf")
    assert not strange.passed and strange.tensor == "logits"
    field = gguf.GGUFReader(tmp_path / "m.gguf", "r+").get_field("llama.rope.freq_base")
    field.parts[field.data[0]][0] *= 2  # the same tensors, and other positions
    field.parts[field.data[0]].base.flush()
    turned = module.verify(tmp_path / "own", "gguf", file=tmp_path / "m.gguf")
    assert not turned.passed and turned.tensor == "llama.rope.freq_base"


@needs_llama_cpp
def test_llama_cpp_reads_both_tokenizers(stories_dir, tmp_path):
    from planish.export.verify import verify

    result = verify(stories_dir, "gguf", prompt_len=24, new_tokens=8)
    assert result.passed and result.tokenizer_equal


@needs_llama_cpp
def test_a_name_does_not_change_how_llama_cpp_reads_the_tokenizer(tmp_path):
    """llama.cpp takes a file whose name says Phi-3 for one with Phi-3's tokens, and does not load it where they lack."""
    from transformers import AutoTokenizer

    from planish.export.llama_cpp import LlamaCpp

    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "my-Phi-3 copy", compressed.FORMS["dense"])
    train_tokenizer(folder, True)
    export_gguf(folder, tmp_path / "m.gguf")
    assert LlamaCpp(tmp_path / "m.gguf", 16).metadata("general.name") == "my-phi copy"
    data = json.loads((folder / "tokenizer.json").read_text())
    first, plain = len(data["model"]["vocab"]), dict.fromkeys(("lstrip", "normalized", "single_word"), False)
    for i, (text, strips) in enumerate((("<unk>", False), ("<|endoftext|>", False), ("<|user|>", True))):
        data["added_tokens"].append({"id": first + i, "content": text, "rstrip": strips, "special": True, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    folder.rename(tmp_path / "small")
    export_gguf(tmp_path / "small", tmp_path / "m.gguf")
    text = "<|user|> the cat<s> the cat"
    asked = AutoTokenizer.from_pretrained(tmp_path / "small")(text, add_special_tokens=False).input_ids
    assert LlamaCpp(tmp_path / "m.gguf", 16).encode(text, special=True) == asked
    assert load_tokenizer(tmp_path / "m.gguf")(text, add_special_tokens=False).input_ids == asked


@needs_llama_cpp
def test_why_llama_cpp_does_not_load_a_file(tmp_path):
    from planish.export.llama_cpp import LlamaCpp

    (tmp_path / "m.gguf").write_text("a text")
    with pytest.raises(InputError, match=r"llama.cpp cannot load .*m.gguf: .*invalid magic"):
        LlamaCpp(tmp_path / "m.gguf", 16)


def test_a_disk_that_is_full_is_said_with_the_file(tmp_path, monkeypatch):
    import gguf

    def full(self) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [None])
    with pytest.raises(InputError, match=r"cannot write .*m\.gguf: No space left"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not [*tmp_path.glob("*.gguf*")]
