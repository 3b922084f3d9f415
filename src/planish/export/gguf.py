"""GGUF for llama.cpp: the smallest of its architectures that computes exactly what the folder computes.

| architecture | holds | price |
|---|---|---|
| llama, qwen2, qwen3 | equal blocks | smaller value dimensions and unequal MLP widths are filled up with zeros |
| deci | MLP widths per block, removed attention, attention → linear (normed input) | value dimensions are filled up |
| mimo2 | value dimensions below the head size, equal in all blocks | unequal MLP widths are filled up; no biases |

Low-rank linears are multiplied back and removed rotary pairs return as zero channels: no graph of llama.cpp has either.
Blocks of which nothing is left are not written; a constant beside a linear map becomes the bias of an MLP of zeros, in a
block of its own; a linear map for an MLP becomes an MLP whose gate is the constant 1.
What the filling costs is in the report; a model that none of them computes exactly is refused with the reason.

Traps: deci drops the attention of blocks without an MLP (they get 32 neurons of zeros) and reads the head size from
block 0 (which keeps an attention of zeros); llama and deci rotate neighbouring channels, qwen and mimo2 halves; mimo2 asks
for one sliding-window block (the window is set to the context length, so that it is none).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planish.errors import InputError
from planish.export.gguf_architecture import NEIGHBOURS, Rope, Sketch, choose, read_rope, sketch, targets
from planish.export.gguf_blocks import StoredRows, name_file_type
from planish.export.plain import Plain, open_plain, pad_values, pad_width, plain_block, zero_attention
from planish.export.vocabulary import write_vocabulary
from planish.export.written import Written, check_file, check_finite
from planish.folder.source import FolderSource
from planish.plan.targets import refuse_family
from planish.rounding.ggml import quantise
from planish.rounding.types import GGML, STEPS, StorageType
from planish.version import __version__

DTYPES = ("f32", "f16", "bf16", *GGML)


def export_gguf(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: str = "f16",
    architecture: str | None = None,
    vocabulary: bool = True,
) -> Written:
    """Write `output`. `architecture`: force one of llama.cpp's; `vocabulary`: include the folder's tokenizer.

    Matrices that the folder stores in llama.cpp's types (`compress --bits … --target gguf`) keep these to the bit, `dtype` is
    that of the others; where it is a rounded type they are rounded to nearest.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("export to gguf needs the gguf library · pip install 'planish[gguf]'") from None
    if dtype not in DTYPES:
        raise InputError(f"unknown GGUF type {dtype!r}; expected one of {', '.join(DTYPES)}")
    source = open_plain(folder)
    check_file(Path(output), source.folder, ".gguf")
    if reason := refuse_family(source.family.model_type, source.config):
        raise InputError(reason)
    sketches = [sketch(s) for i in range(source.n_blocks) for s in split_slots(plain_block(source, i))]
    if not sketches:
        raise InputError(f"nothing is left of any block of {folder}")
    rope = read_rope(source)
    architecture, reasons = choose(source, sketches, rope, architecture)
    context, notes = context_length(source)

    target = Path(output)
    partial = target.with_name(target.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, architecture, use_temp_file=True)
    tensors = Tensors(writer, gguf, dtype, StoredRows(source))
    try:
        write_metadata(writer, gguf, source, sketches, architecture, context, rope)
        tokenizer, left_out = write_vocabulary(writer, source.folder, source.config, vocabulary)
        for name, tensor in list_tensors(source, sketches, architecture, rope, tensors.known):
            tensors.add(name, tensor)
        writer.add_file_type(gguf.LlamaFileType[tensors.file_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    total, stored = tensors.total, source.count()
    notes = describe_cost(total - stored, sum(s.extra for s in sketches), architecture, reasons) + notes + left_out
    notes += tensors.describe(source.config.hidden_size)
    if source.tower:
        parts, kind = ", ".join(source.untouched.parts), source.tower.wrapper.model_type
        notes.append(f"the language model alone: {parts} of {kind} are left out")
    written = ", ".join(k.name for k in tensors.kinds) or dtype
    return Written("gguf", str(target), architecture, written, total, stored, target.stat().st_size, tokenizer, notes)


@dataclass
class Tensors:
    """Puts tensors into a file in its type. `total` numbers so far, `odd` of them in another type because that cannot hold
    them; `kinds`: numbers in each rounded type; `known`: rows that are rounded already."""

    writer: Any
    gguf: Any
    dtype: str
    known: StoredRows
    total: int = 0
    odd: int = 0
    matrices: int = 0
    kinds: dict[StorageType, int] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        self.total += tensor.numel()
        check_finite(name, tensor)
        if (found := self.known.find(tensor)) is not None:
            self.write(name, *found, tensor.numel())
            return
        data = tensor.float().contiguous().numpy()
        kind = pick_kind(self.dtype, data)
        self.odd += tensor.numel() if data.ndim > 1 and kind != self.dtype else 0
        self.matrices += data.ndim > 1 and self.known.weights is not None
        if kind == "f16" and np.abs(data).max(initial=0) > 65504:
            raise InputError(f"tensor {name} exceeds the range of f16; use --dtype bf16 or f32")
        if kind in ("f32", "f16"):
            self.writer.add_tensor(name, data.astype(np.float16 if kind == "f16" else np.float32))
        elif kind == "bf16":
            raw = self.gguf.GGMLQuantizationType.BF16
            self.writer.add_tensor(name, self.gguf.quantize(data, raw), raw_dtype=raw)
        else:
            self.write(name, GGML[kind], quantise(tensor, GGML[kind]).numpy(), tensor.numel())

    def write(self, name: str, kind: StorageType, blocks: np.ndarray, numbers: int) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + numbers
        self.writer.add_tensor(name, blocks, raw_dtype=self.gguf.GGMLQuantizationType[kind.name.upper()])

    @property
    def file_type(self) -> str:
        """llama.cpp's name of what most of the file is stored in."""
        plain = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
        return name_file_type(self.kinds) if self.kinds else plain[self.dtype if self.dtype in plain else "f16"]

    def describe(self, hidden: int) -> list[str]:
        """What is not stored in the type that was asked for, or that the folder has."""
        notes = []
        if self.odd:
            group, steps = GGML[self.dtype].group, STEPS[GGML[self.dtype].bits]
            cure = "" if hidden % group else f"; compress with --round-to {group}"
            other = "f16" if len(steps) == 1 else "a type with blocks of 32, or f16"
            odd = f"{self.odd:,} of {self.total:,} numbers, in rows that are no multiple of {group}"
            notes.append(f"stored as {other}, not {self.dtype}: {odd}{cure}")
        if self.matrices:
            notes.append(
                f"{self.matrices} matrices that the folder does not store in llama.cpp's types are in {self.dtype}"
            )
        return notes


def list_tensors(
    source: FolderSource, sketches: list[Sketch], architecture: str, rope: Rope, known: StoredRows
) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors of the whole model, one block at a time; `known` is opened at the same."""
    known.open(None)
    outside = source.outside()
    embedding = outside["model.embed_tokens.weight"]
    yield "token_embd.weight", embedding
    yield "output_norm.weight", outside["model.norm.weight"]
    if not source.config.tie_word_embeddings:
        yield "output.weight", outside["lm_head.weight"]
    elif architecture == "mimo2":
        yield "output.weight", embedding
    if architecture in NEIGHBOURS and not rope.plain:
        yield "rope_freqs.weight", rope.factors
    slot = 0
    for i in range(source.n_blocks):
        known.open(i)
        for plain in split_slots(plain_block(source, i)):
            for name, tensor in block_tensors(plain, slot, sketches, architecture, rope):
                yield f"blk.{slot}.{name}", tensor
            slot += 1


def context_length(source: FolderSource) -> tuple[int, list[str]]:
    """The context that llama.cpp may use: no longer than a sliding window, which these graphs do not have."""
    length = source.config.max_position_embeddings
    window = getattr(source.config, "sliding_window", None)
    if not source.family.window or not window or window >= length:
        return length, []
    return window, [f"context limited to the sliding window, {window} of {length} positions"]


def describe_cost(grown: int, back: int, architecture: str, reasons: dict[str, str]) -> list[str]:
    """What the export costs, and why architectures that are looked at first could not be used."""
    notes = []
    if back:
        notes.append(f"low-rank forms and removed rotary pairs multiplied back to dense: {back:+,} weights")
    if grown != back:
        notes.append(f"zeros to fit {architecture}, less norms of removed submodules: {grown - back:+,} weights")
    return notes + [f"{a} cannot hold it: {r}" for a, r in reasons.items()]


def split_slots(plain: Plain) -> list[Plain]:
    """A block as blocks of llama.cpp: none if nothing is left of it; two if its linear attention has a constant."""
    if plain.attention == plain.mlp == "none":
        return []
    t = plain.tensors
    if "linear.bias" not in t:
        return [plain]
    first = {n: t[n] for n in ("attention_norm", "linear")} | {"down.bias": t["linear.bias"]}
    rest = {n: x for n, x in t.items() if n not in ("attention_norm", "linear", "linear.bias")}
    slots = [replace(plain, mlp="none", width=0, tensors=first)]
    if plain.mlp != "none":
        slots.append(replace(plain, attention="none", tensors=rest, extra=0))
    return slots


def block_tensors(
    plain: Plain, slot: int, sketches: list[Sketch], architecture: str, rope: Rope
) -> list[tuple[str, Tensor]]:
    """GGUF names and tensors of one block."""
    shape, has_biases = plain.shape, frozenset("qkv") if architecture == "qwen2" else sketches[slot].biases
    v, width, attention = targets(sketches[slot], sketches, architecture)
    t = plain.tensors
    if plain.mlp == "linear":  # silu(gate) is the constant 1
        like = t["up"]
        t["gate"] = torch.zeros_like(like)
        t["gate.bias"] = like.new_full((len(like),), solve_silu(1.0))
    if attention == "full":
        if plain.attention == "none":
            zero_attention(plain, v, has_biases)
        pad_values(plain, v)
    pad_width(plain, width)
    names = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    names |= {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "linear": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    if attention == "none":
        del names["attention_norm"]
    if architecture in NEIGHBOURS:
        for role, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            for name in (role, f"{role}.bias"):
                if name in t:
                    t[name] = interleave(t[name], heads, rope.width)
    out = []
    for name, tensor in t.items():
        role, _, leaf = name.partition(".")
        if role in names:
            out.append((f"{names[role]}.{leaf or 'weight'}", tensor))
    return out


def interleave(w: Tensor, heads: int, width: int) -> Tensor:
    """Rows of each head: rotated channels j and j + width/2 become neighbours 2j and 2j + 1; the rest stays."""
    x = w.unflatten(0, (heads, -1))
    turned = x[:, :width].unflatten(1, (2, width // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, x[:, width:]], 1).flatten(0, 1)


def solve_silu(y: float) -> float:
    """The x > 0 with x · sigmoid(x) = y."""
    x = 1.0
    for _ in range(60):
        s = 1 / (1 + math.exp(-x))
        x -= (x * s - y) / (s + x * s * (1 - s))
    return x


def pick_kind(dtype: str, data: np.ndarray) -> str:
    """Vectors stay f32; rows that do not fill blocks get the type of a step more, or f16."""
    if data.ndim < 2:
        return "f32"
    if dtype not in GGML:
        return dtype
    names = (dtype, *STEPS[GGML[dtype].bits])
    return next((n for n in names if GGML[n].holds(data.shape[-1])), "f16")


def write_metadata(
    writer: Any,
    gguf: Any,
    source: FolderSource,
    sketches: list[Sketch],
    architecture: str,
    context: int,
    rope: Rope,
) -> None:
    config, first = source.config, sketches[0]
    plans = [targets(s, sketches, architecture) for s in sketches]
    writer.add_name(source.folder.name)
    writer.add_description(f"written by planish {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(sketches))
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    widths = [w for _, w, _ in plans]
    writer.add_feed_forward_length(widths if architecture == "deci" else widths[0])
    heads = [0 if kind == "none" else first.heads for _, _, kind in plans]
    kv = [first.kv_heads if kind == "full" else 0 for _, _, kind in plans]
    writer.add_head_count(heads if architecture == "deci" else heads[0])
    writer.add_head_count_kv(kv if architecture == "deci" else kv[0])
    writer.add_key_length(first.qk)
    writer.add_value_length(max(v for v, _, _ in plans))
    writer.add_rope_dimension_count(first.qk if architecture in NEIGHBOURS else rope.width)
    writer.add_rope_freq_base(rope.base)
    if architecture == "mimo2":
        writer.add_expert_feed_forward_length(widths[0])
        writer.add_sliding_window(context)
        writer.add_sliding_window_pattern([i == len(sketches) - 1 for i in range(len(sketches))])
        writer.add_rope_freq_base_swa(rope.base)
