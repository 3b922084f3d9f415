"""What a block with a spec costs: weights, bytes, cache, FLOPs, the pieces that take time, what a stack must hold.

Plans ask it for the spec of a unit at a rank (`Solver.spec`), results for the specs that were written: one account for both. The
tests hold it to what the installed modules really contain. A new form of a linear is a row of `KINDS`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from planish.core import SUBMODULES, Shape, Solver, Spec, Unit
from planish.folder.origin import name_stored
from planish.folder.safetensors import make_header
from planish.folder.source import Source
from planish.modelling.families import ATTENTION, MLP
from planish.rounding.types import find_type

Matrix = tuple[int, int]  # (out, in)
INDEX = 4  # bytes of an entry in an order of rows or a table of pairs


class Need(StrEnum):
    """What a stack must be able to hold."""

    LOW_RANK = "low-rank linear"
    VALUES = "fewer value dimensions"
    QK = "fewer query/key dimensions"
    KEYS = "keys"
    NEURONS = "fewer neurons"
    EXPERTS = "fewer experts"
    STREAM = "narrower residual stream"
    NO_ATTENTION = "removed attention"
    NO_MLP = "removed MLP"
    LINEAR_ATTENTION = "linear attention"
    LINEAR_MLP = "linear MLP"
    RAW_ATTENTION = "raw linear attention"
    RAW_MLP = "raw linear MLP"


PARTS = dict.fromkeys(ATTENTION, "attention") | dict.fromkeys(MLP, "mlp")  # role → the submodule that a bypass replaces
BYPASSES = {  # submodule → nothing in its place, a map of the stream before the norm, a map of what the norm gives
    "attention": (Need.NO_ATTENTION, Need.RAW_ATTENTION, Need.LINEAR_ATTENTION),
    "mlp": (Need.NO_MLP, Need.RAW_MLP, Need.LINEAR_MLP),
}


class Kind(NamedTuple):
    """A form of a linear: its matrices, from its spec and the stock size (out, in); `ordered`: with a table of its rows."""

    matrices: Callable[[Spec, int, int], list[Matrix]]
    need: Need | None = Need.LOW_RANK
    ordered: bool = False


KINDS = {
    "dense": Kind(lambda f, out, n: [(f.get("out", out), f.get("in", n))], None),
    "pair": Kind(lambda f, out, n: [(f["rank"], n), (out, f["rank"])]),
    "pivoted": Kind(lambda f, out, n: [(f["rank"], n), (out - f["rank"], f["rank"])], ordered=True),
    "head_pair": Kind(lambda f, out, n: [(f["heads"] * f["rank"], n), (out, f["rank"])]),
}
DENSE: Spec = {"kind": "dense"}


class Piece(NamedTuple):
    """A linear in some form, in the place of a dense one of size (out, in)."""

    form: Spec
    out: int
    n: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.form["kind"]]

    @property
    def matrices(self) -> list[Matrix]:
        return self.kind.matrices(self.form, self.out, self.n)

    def bytes(self, itemsize: int) -> int:
        """`stored` of a form names the type of its matrices (`planish.rounding.types`); others are in the model's own dtype."""
        count = find_type(self.form["stored"]).count if "stored" in self.form else lambda out, n: out * n * itemsize
        return sum(count(*m) for m in self.matrices) + INDEX * self.out * self.kind.ordered


@dataclass(eq=False)
class Footprint:
    """Of a block with this spec, or of its linears `roles` with what attention does for k (keys, scores) and v (values, sums).

    `context`: tokens of attention that FLOPs count; `itemsize`: bytes of a number in the model's own dtype.
    """

    spec: Spec
    shape: Shape
    roles: tuple[str, ...]
    context: int = 0
    itemsize: int = 2

    def __post_init__(self) -> None:
        forms = {part: self.spec[part] for part in SUBMODULES if part in self.spec}
        self.bypasses = {part: form for part, form in forms.items() if form["kind"] == "bypass"}
        self.attention: Spec | None = forms.get("attention", {})  # None where there is none
        if "attention" in self.bypasses:
            self.attention = None

    @property
    def linears(self) -> list[Piece]:
        forms, gone = self.spec.get("linears", {}), self.bypasses
        roles: Sequence[str] = [r for r in self.roles if PARTS.get(r) not in gone] if gone else self.roles
        if "experts" in self.spec and self.shape.experts:
            number = self.spec["experts"]["number"]
            forms = forms | {r: {"kind": "dense", "out": number} for r in self.shape.experts.router}
            roles = [r for r in roles if not r.startswith("expert.") or int(r.split(".")[1]) < number]
        return [Piece(forms.get(r, DENSE), *self.shape.linear(r)) for r in roles]

    @property
    def pieces(self) -> list[Piece]:
        """All linears that run for every token, those of bypasses included."""
        width, maps = self.shape.hidden, []
        for form in self.bypasses.values():
            if form["rank"]:
                pair = form.get("factored", True)
                maps.append(Piece({"kind": "pair", "rank": form["rank"]} if pair else DENSE, width, width))
        return maps + self.linears

    @property
    def others(self) -> list[Matrix]:
        """Matrices beside the linears: what rebuilds keys, the shortcuts of a sliced stream, gates and shifts."""
        form, shape = self.attention or {}, self.shape
        found = [(form["gate"] + form["shift"], shape.hidden) for form in self.bypasses.values()]
        if "k_rank" in form and "k" in self.roles:
            per_head = 1 if form.get("k_form") == "frequency" else shape.qk
            found.append((shape.kv_heads * per_head, form["k_rank"]))
        if slices := self.spec.get("slice"):
            found += [(slices["mid"], slices["in"]), (slices["out"], slices["mid"])]
        return found

    @property
    def weights(self) -> int:
        """Weights that are stored: matrices, gates and shifts; no norms, no biases."""
        matrices = chain(self.others, *(KINDS[form["kind"]].matrices(form, out, n) for form, out, n in self.pieces))
        return sum(out * n for out, n in matrices)

    @property
    def working(self) -> int:
        """Weights that one token meets: all of them, but for those of experts that it does not reach."""
        experts = self.shape.experts
        if experts is None:
            return self.weights
        top = self.spec["experts"]["top"] if "experts" in self.spec else experts.top
        shape = replace(self.shape, experts=replace(experts, top=top))
        return replace(self, roles=tuple(filter(shape.works, self.roles))).weights

    @property
    def bytes(self) -> int:
        """Of stored weights and index tables (orders of rows, kept rotary pairs, frequencies); no headers, no biases."""
        form, tables = self.attention or {}, 0
        if "k" in self.roles:
            tables += self.shape.kv_heads * form.get("pairs", 0)
            tables += form["k_groups"] * (form["k_rank"] // 2) if form.get("k_form") == "frequency" else 0
        linears = sum(piece.bytes(self.itemsize) for piece in self.pieces)
        return linears + self.itemsize * sum(out * n for out, n in self.others) + INDEX * tables

    @property
    def cache(self) -> int:
        """Numbers that the KV cache holds per token."""
        form, shape = self.attention, self.shape
        if shape.cached:
            return sum(shape.linear(r)[0] for r in shape.cached if r in self.roles)
        if form is None:
            return 0
        keys = form["k_rank"] * form["k_groups"] if "k_rank" in form else shape.kv_heads * form.get("qk", shape.qk)
        return keys * ("k" in self.roles) + shape.kv_heads * form.get("v", shape.v) * (self.gives in self.roles)

    @property
    def gives(self) -> str:
        """The linear that values come from."""
        return "v" if "v" in self.shape.attends else "k"

    @property
    def scores(self) -> int:
        """Multiplications of attention per query token and cached token: scores, keys that are rebuilt, sums of values."""
        form, shape = self.attention, self.shape
        if form is None:
            return 0
        qk, v = form.get("qk", shape.qk), form.get("v", shape.v)
        keys = shape.heads * qk
        if form.get("k_form") == "frequency":  # every head meets its set's keys, and the set's values beside its own
            keys = shape.heads * (form["k_rank"] + (shape.kv_heads // form["k_groups"] - 1) * v)
        elif "k_rank" in form:
            keys += shape.kv_heads * qk * form["k_rank"]
        asks = "k" if "k" in shape.attends else "q"  # of another block's keys and values
        gives = self.gives if self.gives in shape.attends else "q"
        return keys * (asks in self.roles) + shape.heads * v * (gives in self.roles)

    @property
    def flops(self) -> int:
        """Per token behind `context` others: two per weight that it meets, and attention."""
        return 2 * (self.working + self.context * self.scores)

    @property
    def halves(self) -> list[tuple[str, int]]:
        """Halves of attention, "qk" and "v", and their dimensions per head."""
        form, shape = self.attention, self.shape
        if form is None:
            return []
        found = {"k": ("qk", form.get("qk", shape.qk)), "v": ("v", form.get("v", shape.v))}
        return [half for role, half in found.items() if role in self.roles]

    @property
    def needs(self) -> set[Need]:
        """What a stack must be able to hold."""
        form, shape = self.attention or {}, self.shape
        found = {need for piece in self.linears if (need := piece.kind.need)}
        found |= {Need.VALUES} if form.get("v", shape.v) < shape.v else set()
        found |= {Need.QK} if form.get("qk", shape.qk) < shape.qk else set()
        found |= {Need.KEYS} if "k_rank" in form else set()
        found |= {Need.STREAM} if "slice" in self.spec else set()
        neurons = self.spec.get("linears", {}).get("down", DENSE).get("in", shape.intermediate)
        found |= {Need.NEURONS} if neurons < shape.intermediate else set()
        found |= {Need.EXPERTS} if "experts" in self.spec else set()
        for part, form in self.bypasses.items():
            nothing, raw, normed = BYPASSES[part]
            adds = form["rank"] or form["gate"] or form["shift"]
            found.add(nothing if not adds else raw if form["raw"] else normed)
        return found


def footprint(spec: Spec, shape: Shape, context: int = 0, itemsize: int = 2) -> Footprint:
    """Of a whole block."""
    return Footprint(spec, shape, shape.roles + shape.rest, context, itemsize)


def footprints(
    solver: Solver, unit: Unit, shape: Shape, rank: int, context: int = 0, itemsize: int = 2, beside: Spec | None = None
) -> Iterator[tuple[int, Footprint]]:
    """Of what a unit holds, at a rank: one for each kind of block that it cuts, with how many of these there are.

    `beside`: what else the block is made of, where that changes how much the unit holds.
    """
    for block, count in solver.blocks(unit, shape):
        spec = {**(beside or {}), **solver.spec(unit, block, rank)}
        yield count, Footprint(spec, block, block.held(unit.name), context, itemsize)


def count_weights(solver: Solver, unit: Unit, shape: Shape, rank: int) -> int:
    """Weights left in a unit at a rank."""
    return sum(count * found.weights for count, found in footprints(solver, unit, shape, rank))


def cuts_cache(solver: Solver, unit: Unit, shape: Shape) -> bool:
    """Whether an attention stays when the unit is cut, with fewer numbers in its cache."""
    return solver.spec(unit, shape, solver.ranks(unit, shape)[0]).get("attention", {}).get("kind") == "own"


def find_rank(solver: Solver, unit: Unit, shape: Shape, keep: float, step: int = 1) -> int:
    """Largest admissible rank (a multiple of `step`, or full) that leaves at most `keep` of the unit's weights."""
    ranks = solver.ranks(unit, shape)
    full = ranks[-1]
    budget = keep * count_weights(solver, unit, shape, full) * (1 + 1e-12)
    fits = bisect_right(ranks, budget, key=lambda r: count_weights(solver, unit, shape, r))  # they rise with the rank
    falling = (ranks[i] for i in reversed(range(fits)))
    return next(r for r in chain(falling, ranks) if r == full or r % step == 0)  # the smallest, where none fits


def count_headers(source: Source) -> int:
    """Bytes of the headers of the files that the uncut model is written in: one per block, one for the rest, and those of what
    is left untouched."""
    files: dict[str, dict[str, Tensor]] = {}
    prefix = f"{source.family.blocks}."
    for name, (count, dtype) in source.sizes().items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        files.setdefault(block, {})[name_stored(source, name)] = torch.empty(
            count, 1, dtype=dtype, device="meta"
        )  # as many digits as any shape
    for n, names in enumerate(source.untouched.chunks()):
        sizes = {name: source.untouched.sizes[name] for name in names}
        files[f"untouched {n}"] = {k: torch.empty(c, 1, dtype=d, device="meta") for k, (c, d) in sizes.items()}
    return sum(8 + len(make_header(tensors)[0]) for tensors in files.values())
