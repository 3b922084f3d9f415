"""What several solvers make: low-rank linears, fewer value or query/key dimensions, latent keys, fewer neurons, bypasses; as
specs (see `planish.modelling.blocks`), and as edits with their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from planish.core import Edit, ExpertShape, Shape, Solver, Spec, Unit, Weights
from planish.shapes import Float, Int
from planish.solvers.pivots import pivot


def input_site(role: str) -> str:
    """Linears that read the same input share its statistics."""
    first = {"q": "q", "k": "q", "v": "q", "attention.gate": "q", "gate": "up"}
    if role.startswith("mixer.") and role != "mixer.out":
        return "mixer.in.in"
    return f"{first.get(role, role)}.in"


def list_ranks(size: tuple[int, int], form: str) -> Sequence[int]:
    """Ranks at which a linear (out, in) in a form holds fewer weights than the dense one, and the full rank, which is dense.

    A pair holds r (out + in), a pivoted linear r (out + in − r).
    """
    out, n = size
    full = min(size)
    if form == "pivoted":
        return range(1, full + 1)
    return [*range(1, min((out * n - 1) // (out + n), full - 1) + 1), full]


def low_rank_spec(role: str, shape: Shape, form: str, rank: int) -> Spec:
    return {"linears": {role: {"kind": form, "rank": rank}}} if rank < min(shape.linear(role)) else {}


def dense(out: int, n: int) -> Spec:
    return {"kind": "dense", "out": out, "in": n}


def value_spec(shape: Shape, rank: int) -> Spec:
    """`rank` value dimensions per head."""
    if rank >= shape.v:
        return {}
    linears = {"v": dense(shape.kv_heads * rank, shape.hidden), "o": dense(shape.hidden, shape.heads * rank)}
    return {"linears": linears, "attention": {"kind": "own", "v": rank}}


def qk_spec(shape: Shape, rank: int, pairs: int = 0) -> Spec:
    """`rank` query/key dimensions per head, the first 2 · `pairs` of them rotary pairs of each kv group's own choice."""
    if rank >= shape.qk:
        return {}
    linears = {r: dense(heads * rank, shape.hidden) for r, heads in (("q", shape.heads), ("k", shape.kv_heads))}
    return {"linears": linears, "attention": {"kind": "own", "qk": rank} | ({"pairs": pairs} if pairs else {})}


def key_spec(shape: Shape, rank: int, heads: int, **more: Any) -> Spec:
    """`rank` numbers cached in place of the keys of every `heads` kv heads."""
    if rank >= heads * shape.qk:
        return {}
    groups = shape.kv_heads // heads
    attention = {"kind": "own", "k_rank": rank, "k_groups": groups} | more
    return {"linears": {"k": dense(groups * rank, shape.hidden)}, "attention": attention}


def neuron_spec(shape: Shape, rank: int) -> Spec:
    if rank >= shape.intermediate:
        return {}
    wide = {r: dense(rank, shape.hidden) for r in ("gate", "up") if r in shape.roles}
    return {"linears": wide | {"down": dense(shape.hidden, rank)}}


def find_experts(shape: Shape) -> ExpertShape:
    assert shape.experts is not None, f"block {shape.block} has no experts"
    return shape.experts


def read_expert(weights: Weights, n: int, experts: ExpertShape) -> dict[str, Tensor]:
    """Weights and biases of expert n, by their roles in it."""
    names = [f"{role}{end}" for role in experts.roles for end in ("", ".bias")]
    return {r: weights[f"expert.{n}.{r}"] for r in names if f"expert.{n}.{r}" in weights}


def narrow_spec(shape: Shape, rank: int) -> Spec:
    """`rank` neurons in every expert."""
    e = find_experts(shape)
    if rank >= e.intermediate:
        return {}
    forms = {r: dense(e.hidden, rank) if r == "down" else dense(rank, e.hidden) for r in e.roles}
    return {"linears": {f"expert.{n}.{r}": f for n in range(e.number) for r, f in forms.items()}}


def of_expert(number: str, edits: Sequence[Edit]) -> list[Edit]:
    """Edits of a feed-forward's linears as those of an expert's."""
    return [replace(edit, target=f"expert.{number}.{edit.target}") for edit in edits]


NOTHING: Spec = {"kind": "bypass", "rank": 0, "gate": False, "shift": False, "raw": True}  # in place of a submodule


def is_factored(rank: int, width: int) -> bool:
    """Whether two factors of this rank are smaller than one (width, width) matrix, which holds the gate as well."""
    return 2 * rank < width


def bypass_form(rank: int, width: int, gate: bool, raw: bool) -> Spec:
    """Of an affine map in place of a submodule: g ⊙ x + b + x U, U of this rank."""
    factored = is_factored(rank, width)
    return {"kind": "bypass", "rank": rank, "gate": gate and factored, "shift": True, "raw": raw, "factored": factored}


def low_rank_edit(
    role: str, b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], form: str, orthogonal: bool = False
) -> Edit:
    """Edit that gives `role` the weight B A in the given form.

    A pair is stored with orthogonal columns in B (`orthogonal`: they are already), each as long as its row of A:
    rounding either factor to the stored dtype then costs about as much as rounding W would.
    """
    rank = a.shape[0]
    if form == "pair":
        if not orthogonal:
            b, r = torch.linalg.qr(b)
            a = r @ a
        tiny = torch.finfo(a.dtype).tiny
        scale = (a.norm(dim=1).clamp(min=tiny) / b.norm(dim=0).clamp(min=tiny)).sqrt()
        return Edit(role, {"kind": "pair", "rank": rank}, {"B.weight": b * scale, "A.weight": a / scale[:, None]})
    p = pivot(b, a)
    tensors = {"P.weight": p.base, "C.weight": p.coefficients, "order": p.order()}
    return Edit(role, {"kind": "pivoted", "rank": rank}, tensors)


def value_edits(
    v: Float[Tensor, "values hidden"],
    o: Float[Tensor, "hidden heads_values"],
    bias: Float[Tensor, " values"] | None,
    rank: int,
) -> list[Edit]:
    """Edits that give an attention `rank` value dimensions per head: v (kv·rank, hidden), o (hidden, heads·rank)."""
    tensors = {"weight": v} | ({} if bias is None else {"bias": bias})
    return [
        Edit("v", dense(*v.shape), tensors),
        Edit("o", dense(*o.shape), {"weight": o}),
        Edit("attention", {"kind": "own", "v": rank}, {}),
    ]


def qk_edits(
    weights: dict[str, Any],
    q: Float[Tensor, "heads d rank"],
    k: Float[Tensor, "kv_heads d rank"],
    rank: int,
    pairs: Int[Tensor, "kv_heads m"] | None = None,
) -> list[Edit]:
    """Edits that map every head's queries by q (heads, d, rank)ᵀ and keys by k (kv_heads, d, rank)ᵀ, biases included.

    `pairs` (kv_heads, m): which rotary pairs the first 2m channels are, where some were dropped.
    """
    edits = []
    for role, maps in (("q", q), ("k", k)):
        w = (maps.mT @ weights[role].double().unflatten(0, (len(maps), -1))).flatten(0, 1)
        tensors = {"weight": w}
        if f"{role}.bias" in weights:
            tensors["bias"] = (maps.mT @ weights[f"{role}.bias"].double().view(len(maps), -1, 1)).flatten()
        edits.append(Edit(role, dense(*w.shape), tensors))
    form: dict = {"kind": "own", "qk": rank}
    if pairs is None:
        return [*edits, Edit("attention", form, {})]
    return [*edits, Edit("attention", form | {"pairs": pairs.shape[1]}, {"pairs": pairs})]


def keep_neurons(factors: Mapping[str, Any], rank: int) -> tuple[Int[Tensor, " rank"], Float[Tensor, "hidden rank"]]:
    """The first `rank` neurons of an order, and down's columns for them: refitted if `factors` have refits, else as they are."""
    if "refits" in factors:
        return factors["refits"].at(rank)
    kept = factors["order"][:rank].sort().values
    return kept, factors["down"].double()[:, kept]


def neuron_edits(weights: Weights, kept: Int[Tensor, " rank"], down: Float[Tensor, "hidden rank"]) -> list[Edit]:
    """Edits that keep these neurons, with the given down projection (hidden, rank)."""
    edits = []
    for role in ("gate", "up"):
        if role in weights:
            w, bias = weights[role][kept], weights.get(f"{role}.bias")
            tensors = {"weight": w} | ({} if bias is None else {"bias": bias[kept]})
            edits.append(Edit(role, dense(*w.shape), tensors))
    bias = weights.get("down.bias")
    tensors = {"weight": down} | ({} if bias is None else {"bias": bias})
    return [*edits, Edit("down", dense(*down.shape), tensors)]


class NeuronSolver(Solver):
    """Cuts the neurons of an MLP."""

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "mlp")] if shape.intermediate else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return range(1, shape.intermediate + 1)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return neuron_spec(shape, rank)


class ValueSolver(Solver):
    """Cuts the value dimensions of an attention."""

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "vo")] if shape.averages else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return range(1, shape.v + 1)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return value_spec(shape, rank)


class ExpertSolver(Solver):
    """Cuts the neurons of every expert, to one width."""

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "neurons")] if shape.experts else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return range(1, find_experts(shape).intermediate + 1)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return narrow_spec(shape, rank)
