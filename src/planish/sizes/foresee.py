"""What `--fit` and `--bits` would make, from shapes alone: bytes, the cache, the types that a target holds, plans that compete."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from planish.dry_run import foresee_peaks
from planish.errors import InputError
from planish.folder.source import Source
from planish.methods.method import Method
from planish.plan.footprint import footprint
from planish.request import Request
from planish.sizes.fit import (
    LADDER,
    LADDERS,
    count_file,
    find_context,
    find_floor,
    find_size,
    list_heads,
    list_plans,
    predict,
    reserve,
)
from planish.sizes.trials import Choice, settle
from planish.walks.bits import list_rounded, read_asked


@dataclass
class SizeForecast:
    """`size`: bytes that weights may have; `cache`: those of the 16-bit KV cache of `context` tokens, `running` those that running
    takes beside it, and `file` those of llama.cpp's file beside its weights, where `fit` counts them. `plans`: those that
    `compress` would compare, each with its predicted bytes; `heads`: bits of embedding and head in which the best of them is made
    again, unless its blocks have 8 bits or more; `types`: bits → what all weights would take (bytes) and in which types
    (`rounded`: name → matrices). `peak_ram_bytes`, `peak_vram_bytes`: of making the plan that takes most."""

    target: str
    size: int
    fit: int | None
    context: int
    cache: int
    running: int
    file: int
    peak_ram_bytes: int = 0
    peak_vram_bytes: int = 0
    plans: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    types: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def foresee_size(request: Request, source: Source, method: Method, windows: tuple[int, int]) -> SizeForecast:
    """What competes for a size, made from calibration windows of this size (n_samples, seq_len); InputError where `compress` would
    raise it."""
    read_asked(settle(request, Choice("8", 1.0)), source)  # a model that is not rounded at all
    size, context = find_size(request, source), find_context(request, source)
    cache = 2 * context * sum(footprint({}, source.shape(i)).cache for i in range(source.n_blocks))
    running, own = (reserve(source, context) - cache, count_file(request, source)) if request.fit else (0, 0)
    found = SizeForecast(request.target, size, request.fit, context, cache, running, own)
    for choice in list_plans(request, source, size, find_floor(request, method, source, windows)):
        outside, blocks = predict(settle(request, choice), source, choice.bits)
        head = choice.head or request.head_bits or ""
        found.plans.append(
            {"bits": choice.bits, "keep": choice.keep, "head": head, "bytes": int(outside + choice.keep * blocks)}
        )
        ram, vram, _, _ = foresee_peaks(settle(request, choice), method, source, windows)
        found.peak_ram_bytes, found.peak_vram_bytes = max(found.peak_ram_bytes, ram), max(found.peak_vram_bytes, vram)
    if len(found.plans) > 1:
        found.heads = [h for h in list_heads(request, source) if h != found.plans[0]["head"]]
    for bits in LADDERS.get(request.target, LADDER):
        try:
            outside, blocks = predict(request, source, bits)
            found.types.append(
                {"bits": bits, "bytes": int(outside + blocks), "rounded": count_types(request, source, bits)}
            )
        except InputError:  # no type of these bits holds the model's widths
            continue
    return found


def count_types(request: Request, source: Source, bits: str) -> dict[str, int]:
    """Types of so many bits → matrices of the blocks that get them, most first; empty where nothing is rounded, and where types
    are chosen by what they cost."""
    asked = read_asked(settle(request, Choice(bits, 1.0)), source)
    if asked is None or asked.blocks.mean is not None:
        return {}
    shapes = map(source.shape, range(source.n_blocks))
    kinds = [
        asked.pick(role, n, f"block {s.block}, {role}", out).name
        for s in shapes for role in list_rounded(s) for out, n in [s.linear(role)]
    ]  # fmt: skip
    return dict(Counter(kinds).most_common())


def count_rounded_bytes(request: Request, source: Source, keep: float) -> tuple[int, dict[str, Any]]:
    """Bytes of a model of which so much of the blocks' linears stays, rounded as the request says; what is rounded to what."""
    assert request.bits is not None
    outside, blocks = predict(request, source, request.bits)
    asked = read_asked(settle(request, Choice(request.bits, 1.0)), source)
    head = asked.head.pick(source.shape(0).hidden, "the embedding").name if asked and asked.head else ""
    return int(outside + keep * blocks), {"types": count_types(request, source, request.bits), "head": head}
