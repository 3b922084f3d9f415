"""A written model rounded: one walk over its blocks, each for the inputs that the rounded blocks before it give.

    G of every linear, by one pass back through the model as it is         (what an error costs in nats)
    where types may differ: every matrix rounded to each · the least sum of nats within a mean of bits per weight
    for block: R of every linear's inputs · weights fitted to what the unrounded prefix gave (`planish.walks.anchored`) · basis ·
               rounded matrices · outputs                                          (of the prefix that is rounded so far)

What a cut has made of the blocks is rounded as it is stored: factors of a pair are matrices of their own, the second solved again
for the first. Errors of v are weighed by what attention averages its inputs to: a token counts as much as it is looked at, which
in the moments of single tokens the first one, with its massive activations, does not. Embedding and head
are rounded for llama.cpp; in packed folders a head of its own can be, the embedding not, and everything else that is no linear of a
block is written in 16 bits. The walk runs in one process.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache
from planish.calibrate.linears import (
    damp_experts,
    list_experts,
    list_linears,
    list_seen,
    measure_attended,
    measure_gradients,
    measure_grams,
)
from planish.calibrate.losses import nll
from planish.calibrate.measure import Measurements
from planish.calibrate.store import Named
from planish.calibrate.stream import Hidden, Stream, return_memory
from planish.core import Progress
from planish.errors import InputError
from planish.folder.config import name_head
from planish.folder.skeleton import find_embedding, set_parameter
from planish.folder.source import FolderSource, open_folder
from planish.folder.stored_linear import find_experts
from planish.folder.writer import Writer
from planish.modelling.blocks import find_blocks, read_layout
from planish.modelling.canonical import find_mixture, join_block
from planish.modelling.experts import read_top
from planish.plan.types import check_mean, choose_types
from planish.rounding.blocks import FINE, round_block
from planish.rounding.gauges import Scene
from planish.rounding.gauges_linears import set_data
from planish.rounding.round import GGML, Metric, Rounded, join_rows, lies_on, round_matrix
from planish.rounding.types import StorageType
from planish.walks.anchored import anchor_block
from planish.walks.bits import Asked
from planish.walks.joined import Joined, Rounding, find_joined, stack_experts
from planish.walks.prices import price_types

PACKED = "pack-quantized"  # compressed-tensors' format of integers
EXPERTS = r"re:.*\.experts\.\d+\."  # targets in its configuration
SAMPLE, WINDOWS = 4096, 4  # tokens, and at least so many windows, that gradients and the measured loss are taken on
UNKNOWN = Metric()


@dataclass
class Report:
    """What was rounded. `types`: name of the type → matrices; `linears`: name of the module → its type, bytes, how it was
    rounded, share of the output's energy that is lost, predicted nats.

    `bits_per_weight`: of these matrices together. `nats`: predicted loss per token, the sum of ½ tr(G E R Eᵀ); `measured`: mean
    NLL after less before rounding, on `windows` calibration windows. `heads`: type and bytes of the embedding and the head.
    """

    asked: str
    target: str
    types: dict[str, int]
    bits_per_weight: float
    nats: float
    measured: float
    windows: int
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    linears: dict[str, dict[str, Any]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What a user should know: nothing was rounded where a model lay on the grid already."""
        exact = [entry["type"] for entry in self.linears.values() if entry["how"] == "exact"]
        if not exact:
            return []
        kinds, whole = ", ".join(sorted(set(exact))), len(exact) == len(self.linears)
        count = "all matrices" if whole else f"{len(exact)} of {len(self.linears)} matrices"
        return [f"already rounded to that grid: {count} ({kinds}) lie on it, and rounding changed nothing there"]

    def summary(self) -> dict[str, Any]:
        return {n: v for n, v in asdict(self).items() if n != "linears"}


class Quantiser:
    """The walk, and what it has written. `dtype`: of everything that is not rounded; `reads`: in which the rest is read; `known`:
    where prices of types are remembered, if this is the model that it is of."""

    def __init__(
        self, source: FolderSource, open_stream: Callable[[], Stream], asked: Asked, writer: Writer,
        known: Cache | None = None,
    ):  # fmt: skip
        self.source, self.open_stream, self.asked, self.writer = source, open_stream, asked, writer
        narrow = source.stored in (torch.float16, torch.bfloat16)
        self.dtype = source.stored if narrow or not asked.packed else torch.float16
        self.reads, self.known = self.dtype if asked.packed else torch.float32, known
        self.linears: dict[str, dict[str, Any]] = {}
        self.chosen: dict[str, StorageType] = {}  # matrix's name → its type, where each has its own
        self.kinds: dict[str, StorageType] = {}
        self.experts = asked.blocks.pick_experts(gcd(*widths), "experts") if (widths := list_widths(source)) else None
        self.left: dict[str, None] = {}  # linears that stay as they are
        self.weights = 0
        self.beside: Hidden | None = None  # what the next block gets where nothing is rounded
        self.outer: dict[str, int] = {}  # bytes of the embedding and the head, by name

    def run(self, progress: Progress | None = None) -> Report:
        """Round and write what is outside the blocks, every block, and the configuration."""
        stream = self.open_stream()
        count = sum(map(len, stream.batches))
        length = stream.batches[0].shape[1] if count else 1
        few = stream.spread(min(max(SAMPLE // length, WINDOWS), count))
        gradients, outputs = measure_gradients(few)
        before = nll(few, outputs)
        del outputs
        self.write_outside(stream.limits.stored)
        self.stream = self.open_stream()  # with the embedding as it is written
        if self.asked.blocks.mean is not None:
            self.chosen = choose_types(price_types(self, gradients, self.known, progress), self.asked.blocks.mean)
        hidden = self.stream.start()
        self.beside = self.stream.start() if self.asked.blocks.bits < FINE else None
        for i in range(len(self.stream)):
            hidden = self.round_block(i, hidden, gradients[i])
            gradients[i] = {}
            if progress:
                progress("rounding", i + 1, len(self.stream))
        after = nll(self.stream.spread(sum(map(len, few.batches))), self.pick_windows(hidden, few, count))
        self.write_config()
        size = sum(entry["bytes"] for entry in self.linears.values())
        nats = sum(entry.get("nats", 0.0) for entry in self.linears.values())
        types = dict(Counter(kind.name for kind in self.kinds.values()).most_common())
        asked, windows = self.asked.blocks, sum(map(len, few.batches))
        return Report(
            asked.name, asked.target, types, 8 * size / self.weights, nats, after - before, windows, self.describe_heads(),
            self.linears,
        )  # fmt: skip

    def describe_heads(self) -> dict[str, dict[str, Any]]:
        """Type and bytes of the embedding and the head."""
        kinds = {n: self.kinds.get(n.removesuffix(".weight")) for n in self.outer}
        return {n: {"type": k.name if k else str(self.dtype)[6:], "bytes": self.outer[n]} for n, k in kinds.items()}

    def round_block(self, i: int, hidden: Hidden, gradients: Mapping[str, Tensor]) -> Hidden:
        """Round block i for these inputs and write it; its outputs."""

        def rounding(name: str, weight: Tensor, metric: Metric, whole: Joined | None) -> Rounded:
            return self.round(name, weight, self.pick(name, weight, whole), metric)

        family, stream = self.source.family, self.stream
        block, found, joined = self.visit(i, hidden, gradients, rounding)
        prefix = f"{family.blocks}.{i}."
        for name, rounded in found.items():
            set_data(block, name, rounded.value.to(stream.device, stream.dtype))
        self.settle(block, found)
        hidden = stream.run(i, block, hidden)
        for whole in joined:
            own = whole.name.removeprefix(prefix)
            found[own] = join_rows([found.pop(part) for part in whole.parts], whole.order)
        left = join_block(block, family, apart=True).state_dict()
        tensors = self.narrow({n: t for n, t in left.items() if n not in found})
        for name, rounded in found.items():
            self.note(prefix + name.removesuffix(".weight"), rounded)
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}{end}": t for end, t in name_parts(rounded).items()}
        self.writer.shard(i + 1, {family.store_name(prefix + n): t for n, t in tensors.items()})
        return hidden

    def visit(
        self, i: int, hidden: Hidden, moments: Mapping[str, Tensor], rounding: Rounding
    ) -> tuple[nn.Module, dict[str, Rounded], list[Joined]]:
        """Block i, canonical and in the basis chosen for these inputs; its matrices as `rounding` makes them, by name; those that
        are stored as one."""
        family, stream, gradients = self.source.family, self.stream, dict(moments)
        block = stream.place(stream.block(i, whole=True))
        layout = read_layout(block, family, self.source.config)
        seen, others = list_seen(block, layout), {role for role, _, _ in self.source.shape(i).others}
        names = [n for n in seen if n not in others]  # no routers, and no gates of shared experts
        left = [n for n in seen if n in others]
        self.settle(block, {f"{n}.weight" for n in list_linears(block) if n not in left})
        paths = {r: p for g in layout.groups for r, p in g.linears.items()}
        tokens = max(sum(h.shape[0] * h.shape[1] for h in hidden), 1)
        grams = measure_grams(stream, i, block, names, hidden) if names else {}
        if experts := list_experts(block, family):
            assert family.experts is not None
            damp_experts(grams, experts, tokens * read_top(find_mixture(block, family.experts)[1], family.experts))
        for gram in {id(g): g for g in grams.values()}.values():
            gram /= tokens
        prefix = f"{family.blocks}.{i}."
        joined = find_joined(block, family, prefix)
        wholes = joined + [stack_experts(block, own, prefix) for own in experts]

        def find_whole(name: str) -> Joined | None:
            return next((j for j in wholes if name in j.parts), None)

        if self.beside is not None:

            def leave(name: str, w: Tensor) -> bool:
                kind = self.pick(prefix + name, w, find_whole(name))
                return kind.bits >= FINE or lies_on(w, kind, name, self.reads)

            alike = {n: grams[n] for n in names if not any(n in own for own in experts)}
            self.beside = anchor_block(stream, i, block, alike, hidden, self.beside, leave)
        attended = measure_attended(stream, i, block, layout, hidden)
        scene = Scene(
            block, layout, {r: grams.pop(p) for r, p in paths.items()},
            {r: gradients.pop(p) for r, p in paths.items() if p in gradients},
            lambda n: self.asked.blocks.pick(n, f"block {i}"), self.dtype, attended is not None,
        )  # fmt: skip
        if attended is not None:
            scene.grams["v"] = attended
        self.left |= dict.fromkeys(f"{prefix}{n}" for n in left)

        def named(name: str, weight: Tensor, metric: Metric) -> Rounded:
            return rounding(prefix + name, weight, metric, find_whole(name))

        found, _ = round_block(scene, named)
        for name in names:
            if name not in paths.values():
                weight = block.get_submodule(name).weight.detach().cpu()  # type: ignore[union-attr, operator]
                found[f"{name}.weight"] = named(f"{name}.weight", weight, Metric(grams[name], gradients.get(name)))
        return block, found, joined

    def pick(self, name: str, weight: Tensor, whole: Joined | None) -> StorageType:
        """The type of a matrix, or of what it is stored in."""
        rows, own = (whole.rows, whole.name) if whole else (len(weight), name)
        one = self.experts if whole and whole.experts else None
        return self.chosen.get(own) or one or self.asked.blocks.pick(weight.shape[1], name, rows)

    def settle(self, block: nn.Module, but: Collection[str]) -> None:
        """Everything in a block but these tensors as it is written."""
        rest = {n: t for n, t in block.state_dict().items() if n not in but}
        for name, tensor in self.narrow(rest).items():
            kind = self.stream.dtype if tensor.is_floating_point() else tensor.dtype
            set_parameter(block, name, tensor.to(self.stream.device, kind))

    def round(self, name: str, weight: Tensor, kind: StorageType, metric: Metric = UNKNOWN) -> Rounded:
        """One matrix."""
        return_memory(weight.numel())  # what the one before took: its sizes are others, and much larger than its result
        return round_matrix(weight, kind, metric, where=name, dtype=self.reads)

    def note(self, name: str, found: Rounded) -> None:
        """What a module's matrix was rounded to."""
        self.kinds[name], self.weights = found.kind, self.weights + found.value.numel()
        entry = {
            "type": found.kind.name,
            "bytes": found.bytes,
            "how": "exact" if found.exact else found.how,
            "error": found.error,
        }
        self.linears[name] = entry | ({} if found.nats is None else {"nats": found.nats})

    def narrow(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the dtype of what is not rounded."""
        found = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        for name, tensor in found.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"tensor {name} does not fit into {str(self.dtype)[6:]}: store the model in bfloat16 first"
                )
        return found

    def pick_windows(self, hidden: Hidden, few: Stream, count: int) -> Hidden:
        """Of the last block's outputs those of the windows that `few` has, in its batches."""
        n, size = sum(map(len, few.batches)), len(self.stream.batches[0])
        at = [k * count // n for k in range(n)] if n < count else list(range(count))
        rows = torch.stack([hidden[w // size][w % size] for w in at])
        return list(rows.split([len(b) for b in few.batches]))

    def write_outside(self, limits: MemoryLimits) -> None:
        source, kind = self.source, "planish" if self.source.reader.compressed else "native"
        tensors = self.narrow(name_head(source.outside(), source.family, kind))
        heads = {"lm_head.weight", f"{source.family.head}.weight"}
        matrices = (heads if self.asked.packed else heads | {find_embedding(source.empty)}) & tensors.keys()
        whole = heads | {find_embedding(source.empty)}
        written = Named(limits)  # most of it on disk until it is needed: at the start, and by the head
        self.outer = {n: t.nbytes for n, t in tensors.items() if n in whole}
        for name in sorted(matrices) if self.asked.head else ():
            assert self.asked.head is not None
            weight, module = tensors.pop(name), name.removesuffix(".weight")
            found = self.round(module, weight, self.asked.head.pick(weight.shape[1], name, len(weight)))
            self.note(module, found)
            self.outer[name] = found.bytes
            tensors |= {f"{module}.{end}": t for end, t in name_parts(found).items()}
            written.put(name, found.value)
        for name in (n for n in tensors if n in source.reader):
            written.put(name, tensors[name])
        source.replaced = written
        self.writer.shard(0, tensors)

    def write_config(self) -> None:
        path = self.writer.partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(self.dtype if self.asked.packed else torch.float32).removeprefix("torch.")
        config.pop("torch_dtype", None)
        kinds = {self.source.family.store_name(n): kind for n, kind in self.kinds.items()}
        config["quantization_config"] = (
            describe_integers(kinds, self.experts, [*self.left]) if self.asked.packed else describe_blocks(kinds)
        )
        self.writer.text("config.json", json.dumps(config, indent=2) + "\n")


def list_widths(source: FolderSource) -> set[int]:
    """Of the rows of all experts' linears, as they are left."""
    found = filter(None, (find_experts(block, source.family) for block in find_blocks(source.model, source.family)))
    return {linear.in_features for e in found for n in e.numbers for linear in e.linears(n)}  # type: ignore[misc]


def name_parts(found: Rounded) -> dict[str, Tensor]:
    """Tensors by the ends of their names behind the module's."""
    return {"weight_ggml" if end == GGML else end: t for end, t in found.stored.items()}


def describe_blocks(kinds: dict[str, StorageType]) -> dict[str, Any]:
    """What planish reads (`planish.folder.packed.ggml`). No `quant_method`: transformers would go on with random weights where it
    does not know one, and refuses a configuration that has none."""
    return {"format": "ggml", "types": {name: kind.name for name, kind in kinds.items()}}


def describe_integers(kinds: dict[str, StorageType], experts: StorageType | None, left: list[str]) -> dict[str, Any]:
    """compressed-tensors' configuration: a group for every type, of all linears where there is but one. That of `experts`, which
    are no linears in transformers' modules, is known there by an expression. `left`: linears that stay as they are."""
    groups = {}
    by_type: dict[StorageType, list[str]] = {}
    for name, kind in kinds.items():
        by_type.setdefault(kind, []).append(EXPERTS if kind == experts and re.match(EXPERTS[3:], name) else name)
    for n, (kind, names) in enumerate(by_type.items()):
        groups[f"group_{n}"] = {
            "targets": ["Linear"] if len(by_type) == 1 else [*dict.fromkeys(names)],
            "weights": {
                "num_bits": kind.bits, "type": "int", "symmetric": not kind.zero, "strategy": "group",
                "group_size": kind.group, "dynamic": False,
            },
            "input_activations": None, "output_activations": None, "format": PACKED,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": PACKED, "quantization_status": "compressed", "config_groups": groups,
        "ignore": [*left, *([] if "lm_head" in kinds else ["lm_head"])],
    }  # fmt: skip


def quantise(
    asked: Asked, measure: Measurements, writer: Writer, windows: Tensor, known: Cache | None = None
) -> Report:
    """Round the model that `writer` has written, in its place; `windows` (n, seq) are the calibration text. `known`: remembers what
    types cost, of this model alone."""
    source, limits = open_folder(writer.again()), MemoryLimits(folder=writer.partial)
    check_mean(asked.blocks, source)

    def open_stream() -> Stream:
        like = measure.stream
        return Stream(source, windows, device=str(like.device), dtype=like.dtype, limits=limits)

    with measure.phase("rounding"):
        return Quantiser(source, open_stream, asked, writer, known).run(measure.progress)
