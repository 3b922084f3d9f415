"""Models with the blocks of a llama, for llama.cpp's graphs llama, qwen2, qwen3, deci and mimo2 (see `planish.export.gguf`).

Traps: deci drops the attention of blocks without an MLP (they get 32 neurons of zeros) and reads the head size from
block 0 (which keeps an attention of zeros); llama and deci rotate neighbouring channels, qwen and mimo2 halves; mimo2 asks
for one sliding-window block (the window is set to the context length, so that it is none).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from planish.errors import InputError
from planish.export.gguf_architecture import NEIGHBOURS, Rope, Sketch, choose, read_rope, sketch, targets
from planish.export.gguf_blocks import StoredRows
from planish.export.gguf_content import Content
from planish.export.plain import Plain, pad_values, pad_width, plain_block, zero_attention
from planish.folder.source import FolderSource
from planish.plan.graphs import limit_context


def lay_out(source: FolderSource, forced: str | None) -> Content:
    """What a file of the smallest graph that holds the model holds; `forced`: of this one."""
    sketches = [sketch(s) for i in range(source.n_blocks) for s in split_slots(plain_block(source, i))]
    if not sketches:
        raise InputError(f"nothing is left of any block of {source.folder}")
    rope = read_rope(source)
    architecture, reasons = choose(source, sketches, rope, forced)
    return Content(
        architecture,
        describe(source, sketches, architecture, rope),
        lambda known: list_tensors(source, sketches, architecture, rope, known),
        sum(s.extra for s in sketches),
        [f"{a} cannot hold it: {r}" for a, r in reasons.items()],
    )


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


def describe(source: FolderSource, sketches: list[Sketch], architecture: str, rope: Rope) -> dict[str, Any]:
    """Metadata of the graph."""
    config, first = source.config, sketches[0]
    plans = [targets(s, sketches, architecture) for s in sketches]
    widths = [w for _, w, _ in plans]
    heads = [0 if kind == "none" else first.heads for _, _, kind in plans]
    kv = [first.kv_heads if kind == "full" else 0 for _, _, kind in plans]
    found: dict[str, Any] = {"block_count": len(sketches)}
    lists = {"feed_forward_length": widths, "attention.head_count": heads, "attention.head_count_kv": kv}
    found |= {n: x if architecture == "deci" else x[0] for n, x in lists.items()}
    found |= {
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": first.qk,
        "attention.value_length": max(v for v, _, _ in plans),
        "rope.dimension_count": first.qk if architecture in NEIGHBOURS else rope.width,
        "rope.freq_base": rope.base,
    }
    if architecture == "mimo2":
        context = limit_context(source.family, config)
        found |= {
            "expert_feed_forward_length": widths[0],
            "attention.sliding_window": context,
            "attention.sliding_window_pattern": [i == len(sketches) - 1 for i in range(len(sketches))],
            "rope.freq_base_swa": rope.base,
        }
    return found
