"""What a model costs: bytes of headers, numbers and bytes in the cache, FLOPs per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.core import Shape
from planish.folder.safetensors import make_header
from planish.folder.source import Source
from planish.modelling.blocks import Spec


def count_headers(source: Source) -> int:
    """Bytes of the headers of the files that the uncut model is written in: one per block, one for the rest."""
    files: dict[str, dict[str, Tensor]] = {}
    prefix = f"{source.family.blocks}."
    for name, (count, dtype) in source.sizes().items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        files.setdefault(block, {})[name] = torch.empty(
            count, 1, dtype=dtype, device="meta"
        )  # as many digits as any shape
    return sum(8 + len(make_header(tensors)[0]) for tensors in files.values())


def count_cache(shape: Shape) -> int:
    """Numbers that an uncut block caches per token."""
    return shape.kv_heads * (shape.qk + shape.v)


def count_attention(shape: Shape, spec: Spec | None = None) -> int:
    """Multiplications of attention per query token and cached token: scores and sums of values, keys that
    are rebuilt."""
    form = (spec or {}).get("attention", {})
    if form.get("kind") == "bypass":
        return 0
    qk, v = form.get("qk", shape.qk), form.get("v", shape.v)
    if form.get("k_form") == "frequency":  # every head meets its set's keys and values
        return shape.heads * (form["k_rank"] + shape.kv_heads // form["k_groups"] * v)
    return shape.heads * (qk + v) + (shape.kv_heads * qk * form["k_rank"] if "k_rank" in form else 0)


def count_flops(shapes: Sequence[Shape], specs: Sequence[Spec], weights: Sequence[int], context: int) -> int:
    """Of blocks with these specs and weights, per token behind `context` others."""
    return sum(2 * (n + context * count_attention(h, s)) for h, s, n in zip(shapes, specs, weights, strict=True))


def kv_bytes(specs: list[Spec], shapes: list[Shape], itemsize: int) -> int:
    """Bytes the KV cache grows by per token and sequence."""
    total = 0
    for spec, shape in zip(specs, shapes, strict=True):
        form = spec.get("attention", {})
        if form.get("kind") == "bypass":
            continue
        keys = form["k_rank"] * form["k_groups"] if "k_rank" in form else shape.kv_heads * form.get("qk", shape.qk)
        total += (keys + shape.kv_heads * form.get("v", shape.v)) * itemsize
    return total
