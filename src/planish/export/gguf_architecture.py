"""Which of llama.cpp's architectures holds a model exactly, with the fewest weights (see `planish.export.gguf`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import InputError
from planish.export.plain import Plain
from planish.folder.source import FolderSource
from planish.plan.graphs import LLAMAS
from planish.plan.targets import refuse_rotary

ZERO_WIDTH = 32  # neurons of zeros that stand for no MLP
NEIGHBOURS = ("llama", "deci")  # rotate channels 2j and 2j + 1; the others j and j + d/2


@dataclass(frozen=True)
class Sketch:
    """What choosing an architecture needs to know about one block."""

    heads: int
    kv_heads: int
    qk: int
    hidden: int
    attention: str
    mlp: str
    v: int
    width: int
    biases: frozenset[str]
    extra: int
    numbers: int  # in its tensors


def sketch(plain: Plain) -> Sketch:
    s, t = plain.shape, plain.tensors
    biases = frozenset(n.removesuffix(".bias") for n in t if n.endswith(".bias"))
    numbers = sum(x.numel() for x in t.values())
    return Sketch(
        s.heads,
        s.kv_heads,
        s.qk,
        s.hidden,
        plain.attention,
        plain.mlp,
        plain.v,
        plain.width,
        biases,
        plain.extra,
        numbers,
    )


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies as the model uses them: `factors` (d/2,) = base^(−2j/d) / frequency; 1e30 for no rotation."""

    base: float
    width: int  # rotated channels
    head: int
    factors: Tensor

    @property
    def plain(self) -> bool:
        return self.width == self.head and bool((self.factors == 1).all())


def read_rope(source: FolderSource) -> Rope:
    rotary = source.model.get_submodule(source.family.blocks.rpartition(".")[0]).rotary_emb
    parameters = getattr(source.config, "rope_parameters", None) or {}
    if reason := refuse_rotary(source.config, rotary):
        raise InputError(reason)
    shape = source.shape(0)
    base, width = float(parameters["rope_theta"]), shape.rotary
    used = rotary.inv_freq.double()
    if len(used) != width // 2:
        raise InputError(f"rotary table has {len(used)} frequencies, expected {width // 2}")
    factors = torch.full((shape.qk // 2,), 1e30, dtype=torch.float64)
    factors[: width // 2] = base ** (-torch.arange(0, width, 2).double() / shape.qk) / used
    factors[(factors - 1).abs() < 1e-5] = 1.0
    return Rope(base, width, shape.qk, factors.float())


def choose(source: FolderSource, sketches: list[Sketch], rope: Rope, forced: str | None) -> tuple[str, dict[str, str]]:
    """The architecture with the fewest weights, and why the others were refused."""
    kind, tied = source.family.model_type, source.config.tie_word_embeddings
    candidates = [*LLAMAS[kind], "deci", "mimo2"]
    if forced is not None and forced not in candidates:
        raise InputError(f"{kind} can be written as {', '.join(candidates)}; got {forced!r}")
    costs: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name in candidates:
        reason = refuse(name, source, sketches, rope)
        if reason:
            reasons[name] = reason
            continue
        costs[name] = sum(padded(s, sketches, name) for s in sketches)
        costs[name] += source.config.vocab_size * source.config.hidden_size if tied and name == "mimo2" else 0
    if forced is not None:
        if forced in reasons:
            raise InputError(f"{forced} cannot hold this model: {reasons[forced]}")
        return forced, {}
    if not costs:
        raise InputError(
            "no architecture of llama.cpp holds this model: " + "; ".join(f"{a}: {r}" for a, r in reasons.items())
        )
    best = min(costs, key=costs.__getitem__)  # the first of equals
    return best, {a: r for a, r in reasons.items() if candidates.index(a) < candidates.index(best)}


def refuse(architecture: str, source: FolderSource, sketches: list[Sketch], rope: Rope) -> str | None:
    """Why an architecture cannot compute these blocks exactly, or None."""
    linear = [i for i, s in enumerate(sketches) if s.attention == "linear"]
    mlp_linear = [i for i, s in enumerate(sketches) if s.mlp == "linear"]
    biases = frozenset().union(*(s.biases for s in sketches))
    first = sketches[0]
    if architecture != "deci" and linear:
        return f"block {linear[0]} has a linear map for its attention"
    if mlp_linear and architecture not in ("llama", "deci"):
        return f"block {mlp_linear[0]} has a linear map for its MLP, which needs biases in the MLP"
    if source.family.qk_norm and architecture != "qwen3":
        return "it has no norms of queries and keys"
    if architecture not in NEIGHBOURS and not rope.plain:
        return "it has no frequency factors for this rotary scaling"
    allowed = {
        "llama": set("qkvo") | {"gate", "up", "down"},
        "deci": set("qkvo") | {"gate", "up", "down"},
        "qwen2": set("qkv"),
    }.get(architecture, set())
    if biases - allowed:
        return f"it has no bias for {sorted(biases - allowed)[0]}"
    if architecture == "qwen2" and (first.heads * first.qk != first.hidden or not set("qkv") <= biases):
        return "it needs heads × head size = hidden size and biases of q, k and v"
    if architecture == "mimo2" and all(s.v in (0, s.qk) for s in sketches):
        return "no block has fewer value dimensions"
    return None


def padded(s: Sketch, sketches: list[Sketch], architecture: str) -> int:
    """Numbers in a block after filling it up."""
    v, width, attention = targets(s, sketches, architecture)
    was = s.hidden * (s.v * (s.heads + s.kv_heads) + s.qk * (s.heads + s.kv_heads) if s.attention == "full" else 0)
    now = s.hidden * (v + s.qk) * (s.heads + s.kv_heads) if attention == "full" else 0
    matrices = 3 if s.mlp != "linear" else 2
    return s.numbers + now - was + s.hidden * (3 * width - matrices * s.width)


def targets(s: Sketch, sketches: list[Sketch], architecture: str) -> tuple[int, int, str]:
    """(value dimensions, MLP width, attention kind) that a block gets in an architecture."""
    width = s.width if architecture == "deci" else max(x.width for x in sketches)
    v = max(x.v for x in sketches) if architecture == "mimo2" else s.qk
    attention = s.attention
    if attention == "none" and (architecture != "deci" or s is sketches[0]):  # block 0 tells deci the head size
        attention = "full"
    return v, max(width, ZERO_WIDTH if s.mlp == "none" else 0), attention
