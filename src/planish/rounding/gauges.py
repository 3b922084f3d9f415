"""Free choices of a block's basis, made so that rounding its weights costs less. What the block computes does not change.

| free | between | because |
|---|---|---|
| a scale per channel | a norm and the linears that alone read it | both are diagonal |
| any invertible map per kv head | v, and o behind all query heads of it | attention averages values over tokens only |
| a scale per neuron | up and down | their product with the activated gate is linear in up |
| any invertible map | the factors of a low-rank pair | nothing is between them |

Of each a few closed-form choices are compared by a forecast of what rounding with feedback will cost in nats
(`planish.rounding.gauges_maps.foresee`), and the best is kept if it falls. Whether the real rounding is better for it is for the
caller to see (`planish.rounding.blocks`). Layouts say where more happens between two linears (`Layout.fixed`) and which norms
others read as well; nothing is changed there.

Left alone: a scale per rotary pair of queries and keys, because scales of rows change no relative error where weights of one row
share a step; neurons without a gate, whose activation is not linear; the rows of pivoted forms; keys' latents and low-rank heads,
whose second factor is no linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from planish.modelling.blocks import Group, Layout, Norm
from planish.modelling.modules import Pair
from planish.rounding.gauges_linears import Linear, apply, fits, read_linear, set_data, write_linear
from planish.rounding.gauges_maps import foresee, measure_energy, mix_channels, scale_columns
from planish.rounding.types import StorageType

GAIN = 0.99  # a cost that is kept is at most so much of the one before
Moments = dict[str, Tensor]  # role → second moments per token
T = TypeVar("T")


@dataclass
class Scene:
    """A canonical block and what is known of its linears, by role.

    `layout`: of the block as it is (`planish.modelling.blocks.read_layout`). `grams`: R (in, in) of the inputs; `attended`: that
    of v is of Σ_t a_t x_t, the mean over heads of what attention averages its inputs to. `gradients`: G (out, out) or its
    diagonal (out,) of the loss's gradient at the outputs; missing ones count as 1. `pick`: width → the type that weights of
    such rows will get. `dtype`: what norms are stored in.
    """

    block: nn.Module
    layout: Layout
    grams: Moments
    gradients: Moments
    pick: Callable[[int], StorageType]
    dtype: torch.dtype = torch.float32
    attended: bool = False

    def path(self, role: str) -> str | None:
        return next((g.linears[role] for g in self.layout.groups if role in g.linears), None)

    def open(self, roles: Iterable[str]) -> dict[str, tuple[nn.Module, Linear]]:
        """Role → module and matrices; nothing if one of the roles is missing, no linear or not measured."""
        paths = {r: path for r in roles if (path := self.path(r)) is not None and r in self.grams}
        modules = {r: self.block.get_submodule(path) for r, path in paths.items()}
        found = {r: (m, linear) for r, m in modules.items() if (linear := read_linear(m)) is not None}
        return found if set(found) == set(roles) else {}

    def price(self, w: Tensor, energy: Tensor, weights: Tensor) -> float:
        """Forecast of what rounding w (out, in) costs, its rows' errors weighed by `weights` (out,)."""
        return float(foresee(w, energy, self.pick(w.shape[1])) @ weights)

    def gradient(self, role: str) -> Tensor | None:
        """G of a role's outputs; that of v, where its inputs are what attention averages, from o's."""
        if role == "v" and self.attended and (values := self.weigh_values()) is not None:
            return torch.block_diag(*values)
        return self.gradients.get(role)

    def weigh(self, role: str, out: int) -> Tensor:
        """G's diagonal (out,)."""
        g = self.gradient(role)
        return torch.ones(out, dtype=torch.float64) if g is None else g if g.ndim == 1 else g.diagonal()

    def weigh_values(self) -> Tensor | None:
        """Σ over a kv head's query heads h of O_hᵀ G O_h (kv, d, d): what errors of values cost behind o."""
        found, heads, kv = self.open("vo"), self.layout.heads, self.layout.kv_heads
        if not found or not kv:
            return None
        o, g = found["o"][1].dense(), self.gradients.get("o")
        if o.shape[1] % heads or len(found["v"][1].dense()) != kv * (o.shape[1] // heads):
            return None
        own = o.unflatten(1, (heads, -1)).transpose(0, 1)
        pulled = own if g is None else g[:, None] * own if g.ndim == 1 else g @ own
        return (own.mT @ pulled).unflatten(0, (kv, heads // kv)).sum(1)


@torch.no_grad()
def balance(scene: Scene, roles: Iterable[str], maps: bool = False) -> list[str]:
    """Choose the basis of these roles, in place, moments included: scales, or with `maps` what mixes values and the factors of
    pairs; a line for everything that changed. Computed in fp64, stored in the block's dtype, norms in `scene.dtype`: scales
    are those that the stored norm has."""
    roles, told = set(roles), list[str]()
    if not maps:
        for norm in scene.layout.norms:
            told += scale_inputs(scene, norm) if set(norm.roles) <= roles else []
    for group in scene.layout.groups:
        if group.name.partition(".")[0] not in scene.layout.fixed and set(group.linears) <= roles:
            attention = group.name == "attention"
            told += [] if attention != maps else mix_values(scene) if maps else scale_neurons(scene, group)
    for role in sorted(roles) if maps else ():
        told += mix_pair(scene, role)
    return told


def choose(before: T, candidates: Iterable[T], cost: Callable[[T], float]) -> tuple[T, float]:
    """The candidate that costs least, and how much of `before`; `before` and 1 where none costs less than `GAIN` of it."""
    best, old = before, cost(before)
    least = GAIN * old
    for candidate in candidates:
        if (found := cost(candidate)) < least:
            best, least = candidate, found
    return best, least / old if best is not before else 1.0


def scale_inputs(scene: Scene, norm: Norm) -> list[str]:
    """Norm's channels divided by s, columns of what reads it multiplied by s."""
    module, found = scene.block.get_submodule(norm.path), scene.open(norm.roles)
    weight = getattr(module, "weight", None)
    if weight is None or not found:
        return []
    scale = weight.detach().cpu().double() + norm.offset
    grams = {r: scene.grams[r].double() for r in found}
    known: dict[int, Tensor] = {}
    for r in found:
        known.setdefault(id(scene.grams[r]), measure_energy(grams[r]))
    energies = {r: known[id(scene.grams[r])] for r in found}
    weights = {r: f.weigh_right(scene.weigh(r, len(f.dense()))) for r, (_, f) in found.items()}

    def cost(s: Tensor) -> float:
        return sum(scene.price(f.right * s, energies[r] / s / s, weights[r]) for r, (_, f) in found.items())

    def candidates() -> Iterable[Tensor]:
        rights = [linear.right for _, linear in found.values()]
        for seen in ({r: g.diagonal() for r, g in grams.items()}, energies):
            level = torch.stack([e / e.mean().clamp(min=1e-300) for e in seen.values()]).mean(0)
            for s in scale_columns(rights, level):
                s = scale / ((scale / s - norm.offset).to(scene.dtype).double() + norm.offset)  # as it is stored
                if bool((s.isfinite() & (s > 0)).all()):
                    yield s

    s, ratio = choose(torch.ones_like(scale), candidates(), cost)
    if ratio == 1 or not all(fits(linear.read(s), next(m.parameters()).dtype) for m, linear in found.values()):
        return []
    for owner, linear in found.values():
        write_linear(owner, linear.read(s))
    set_data(module, "weight", (scale / s - norm.offset).to(weight.device, weight.dtype))
    if (bias := getattr(module, "bias", None)) is not None:
        set_data(module, "bias", (bias.double() / s.to(bias.device)).to(bias.dtype))
    scaled = {id(gram): gram / s / s[:, None] for gram in {id(g): g for g in grams.values()}.values()}
    scene.grams.update({r: scaled[id(gram)] for r, gram in grams.items()})  # one where inputs were one
    return [f"{norm.path}: channels rescaled for {', '.join(norm.roles)}; forecast × {ratio:.2f}"]


def scale_neurons(scene: Scene, group: Group) -> list[str]:
    """Rows of up divided by s, columns of down multiplied by s, where a gate makes the product linear in up."""
    names = {role.rpartition(".")[2]: role for role in group.linears}
    if not {"gate", "up", "down"} <= names.keys():
        return []
    found = scene.open((names["up"], names["down"]))
    if not found or not (up := found[names["up"]])[1].mixes:
        return []
    module, down = found[names["down"]]
    gram = scene.grams[names["down"]].double()
    energy, weights = measure_energy(gram), down.weigh_right(scene.weigh(names["down"], len(down.dense())))
    s, ratio = choose(
        torch.ones_like(energy),
        (s for seen in (gram.diagonal(), energy) for s in scale_columns([down.right], seen)),
        lambda s: scene.price(down.right * s, energy / s / s, weights),
    )
    kind = next(module.parameters()).dtype
    if ratio == 1 or not (fits(up[1].give(1 / s), kind) and fits(down.read(s), kind)):
        return []
    write_linear(up[0], up[1].give(1 / s))
    write_linear(module, down.read(s))
    scene.grams[names["down"]] = gram / s / s[:, None]
    if (g := scene.gradients.get(names["up"])) is not None:
        scene.gradients[names["up"]] = g * s * s if g.ndim == 1 else g * s * s[:, None]
    return [f"{group.name}: neurons rescaled; forecast of {names['down']} × {ratio:.2f}"]


def mix_values(scene: Scene) -> list[str]:
    """Values of every kv head mapped by M, what o does to them by M⁻¹."""
    found, metric = scene.open("vo"), scene.weigh_values()
    if metric is None or not scene.attended or not found["v"][1].mixes:
        return []
    (v_module, v), (o_module, o) = found["v"], found["o"]
    heads, kv = scene.layout.heads, scene.layout.kv_heads
    rows, read, gram = v.right, scene.grams["v"].double(), scene.grams["o"].double()
    if v.left is not None:
        rows, read = v.left, v.right @ read @ v.right.T
    energy, weights = measure_energy(read), o.weigh_right(scene.weigh("o", len(o.dense())))
    per_head = rows.unflatten(0, (kv, -1))
    own = gram.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def spread(m: Tensor) -> Tensor:
        return m.repeat_interleave(heads // kv, 0)

    def move(forth: Tensor) -> Tensor:
        return apply(spread(forth), apply(spread(forth), gram).T)

    def cost(maps: tuple[Tensor, Tensor]) -> float:
        forth, back = maps
        behind = (back.mT @ metric @ back).diagonal(dim1=1, dim2=2).flatten()
        values = scene.price(apply(forth, rows), energy, behind)
        return values + scene.price(o.read(spread(back)).right, measure_energy(move(forth)), weights)

    one = torch.eye(per_head.shape[1], dtype=torch.float64).expand(kv, -1, -1)
    seen = own.unflatten(0, (kv, heads // kv)).sum(1)
    maps, ratio = choose((one, one), mix_channels(metric, seen, per_head @ per_head.mT), cost)
    v, o, kind = v.give(maps[0]), o.read(spread(maps[1])), next(v_module.parameters()).dtype
    if ratio == 1 or not (fits(v, kind) and fits(o, kind)):
        return []
    write_linear(v_module, v)
    write_linear(o_module, o)
    scene.grams["o"] = move(maps[0])
    return [f"attention: value dimensions mixed; forecast of v and o × {ratio:.2f}"]


def mix_pair(scene: Scene, role: str) -> list[str]:
    """A ← M A, B ← B M⁻¹."""
    found = scene.open((role,))
    if not found or not isinstance(found[role][0], Pair):
        return []
    module, pair = found[role]
    a, b, gram = pair.right, pair.left, scene.grams[role].double()
    assert b is not None
    energy, weights, seen = measure_energy(gram), scene.weigh(role, len(b)), a @ gram @ a.T
    outer = b.T @ (weights[:, None] * b)

    def cost(maps: tuple[Tensor, Tensor]) -> float:
        forth, back = maps[0][0], maps[1][0]
        inner = scene.price(forth @ a, energy, (back.T @ outer @ back).diagonal())
        return inner + scene.price(b @ back, measure_energy(forth @ seen @ forth.T), weights)

    one = torch.eye(len(a), dtype=torch.float64)[None]
    maps, ratio = choose((one, one), mix_channels(outer[None], seen[None], (a @ a.T)[None]), cost)
    changed = Linear(maps[0][0] @ a, b @ maps[1][0], bias=pair.bias)
    if ratio == 1 or not fits(changed, next(module.parameters()).dtype):
        return []
    write_linear(module, changed)
    return [f"{role}: its two factors balanced; forecast × {ratio:.2f}"]
