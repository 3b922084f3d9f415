"""What `--bits` and `--head-bits` ask for, checked against a model before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from torch import nn

from planish import lanes
from planish.core import Shape
from planish.errors import InputError
from planish.folder.source import Source
from planish.folder.towers import refuse_wrapped
from planish.modelling.modules import is_dense
from planish.plan.targets import find_target
from planish.request import Request
from planish.rounding.types import WORD, Choice, StorageType, choose

EXPERT = "expert."  # roles of one expert
SHARED = "shared."  # roles of the feed-forward that every token reaches beside its experts
HEAD = "8"  # bits of embedding and head in llama.cpp's types unless told


@dataclass(frozen=True)
class Asked:
    """What is rounded to what: the blocks' linears, and embedding and head (None: these stay). `experts`: the one type of all of
    them in packed folders."""

    blocks: Choice
    head: Choice | None = None
    experts: StorageType | None = None

    def pick(self, role: str, n: int, where: str, out: int = WORD) -> StorageType:
        """The type of a role's matrix of `out` rows of n weights."""
        own = self.experts if role.startswith(EXPERT) else None
        return own or self.blocks.pick(n, where, out)

    @property
    def packed(self) -> bool:
        """Whether integers are packed, or blocks of llama.cpp stored."""
        return self.blocks.target != "gguf"


def read_asked(request: Request, source: Source) -> Asked | None:
    """What `--bits` and `--head-bits` ask for; None where nothing is rounded. InputError, before any work, where it cannot be."""
    head, target = request.head_bits, find_target(request.target).name
    blocks = None if request.bits is None else choose(request.bits, target)
    if blocks is None and head is not None:
        raise InputError("--head-bits says how embedding and head are rounded beside the blocks: give --bits too")
    if blocks is None:
        return None
    if head is None:
        head = HEAD if target == "gguf" else None
    kind = None if head is None else choose(head, target, "--head-bits")
    if kind is not None and (why := refuse_head(target, source)):
        raise InputError(f"--head-bits: embedding and head stay in 16 bits{why}")
    asked = Asked(blocks, kind, find_experts(blocks, source))
    check_asked(asked, source, request.given)
    return asked


def find_experts(blocks: Choice, source: Source) -> StorageType | None:
    """The one type of all experts; None where there are none, or each of their linears has its own."""
    found = {s.experts for s in map(source.shape, range(source.n_blocks)) if s.experts}
    if not found:
        return None
    if blocks.target == "vllm":
        raise InputError(
            f"{source.name} has experts, and packed ones have not been tried in vLLM: --bits rounds them for --target hf and gguf"
        )
    if blocks.target != "gguf" and source.family.experts and source.family.experts.stacked:
        raise InputError(
            f"{source.family.model_type} stores its experts stacked, where transformers reads no packed integers: --bits rounds "
            "them for --target gguf"
        )
    return blocks.pick_experts(gcd(*(n for e in found for n in (e.hidden, e.intermediate))), "experts")


def refuse_head(target: str, source: Source) -> str:
    """Why embedding and head stay in 16 bits; empty where both, or the head of a packed folder, can be rounded."""
    if target == "gguf":
        return ""
    if target == "vllm":
        return " for --target vllm, which reads no packed head"
    tied = source.config.get_text_config().tie_word_embeddings or len(find_heads(source)) < 2
    return (
        f" for --target {target}: they are one matrix here, and transformers reads no packed embedding" if tied else ""
    )


def find_heads(source: Source) -> list[str]:
    """Names of the embedding and, where it is another matrix, of the head, among `source.sizes()`."""
    hidden, words = source.shape(0).hidden, source.config.get_text_config().vocab_size
    return [n for n, (count, _) in source.sizes().items() if count == hidden * words and n.endswith(".weight")]


def list_rounded(shape: Shape) -> list[str]:
    """Roles of a block's linears that `--bits` rounds: not routers."""
    return [*shape.roles, *(r for r in shape.rest if r.startswith((SHARED, EXPERT)))]


def check_asked(asked: Asked, source: Source, limits: Mapping[str, float]) -> None:
    """InputError for a model that cannot be rounded this way, or a budget that is planned without rounding."""
    if "max_bytes" in limits:
        raise InputError(
            "--max-bytes cannot hold beside --bits: ranks are planned by the bytes of unrounded weights; give --keep"
        )
    if source.tower:
        refuse_wrapped(
            source.tower.config, "a folder that --bits writes", "leave it out, or export --to gguf with a type"
        )
    if lanes.count() > 1:
        raise InputError("--bits rounds in one process: run it without torchrun")
    if source.family.conv1d:
        raise InputError(f"{source.family.model_type} stores its linears transposed, which --bits does not round")
    if asked.packed and any(is_dense(m) and type(m) is not nn.Linear for m in source.empty_block(0).modules()):
        raise InputError(
            f"{source.family.model_type} has a class of linears of its own, into which transformers reads no packed integers: "
            "--bits rounds it for --target gguf"
        )
    for i in range(source.n_blocks):
        shape = source.shape(i)
        if other := [
            role for role, _, _ in shape.others if role in source.family.others and not role.startswith(SHARED)
        ]:
            kind = other[0].partition(".")[0]
            raise InputError(
                f"block {i} of {source.name} has linears of its own ({kind}): --bits rounds attention, feed-forwards and "
                "experts, no mixers and no attention on latents"
            )
        for role in list_rounded(shape):
            asked.pick(role, shape.linear(role)[1], f"block {i}, {role}")
    if asked.head is not None:
        asked.head.pick(source.shape(0).hidden, "the embedding")
