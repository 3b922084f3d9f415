"""Free choices of a block's basis, made so that rounding its weights costs less. What the block computes does not change.

| free | between | because |
|---|---|---|
| a scale per channel | a norm and the linears that alone read it | both are diagonal |
| any invertible map per kv head | v, and o behind all query heads of it | attention averages values over tokens only |
| a scale per neuron | up and down | their product with the activated gate is linear in up |
| any invertible map | the factors of a low-rank pair | nothing is between them |

Of each a few closed-form choices are rounded for trial, and the best is kept if the error falls: of the output of the linears
that read a norm, each of them; of what v and o make of the attention's input together; of a pair's product. Layouts say where
more happens between two linears (`Layout.fixed`) and which norms others read as well; nothing is changed there.

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
from planish.modelling.families import MLP
from planish.modelling.modules import Pair
from planish.rounding.gauges_linears import Linear, Rounding, apply, fits, read_linear, set_data, write_linear
from planish.rounding.gauges_maps import mix_channels, round_to_nearest, scale_columns

GAIN = 0.99  # an error that is kept is at most so much of the one before
Grams = dict[
    str, Tensor
]  # role → Σ x xᵀ, or its mean, over the linear's inputs (in, in); for all of a block over the same tokens
T = TypeVar("T")


@torch.no_grad()
def balance(
    block: nn.Module, layout: Layout, grams: Grams | None = None, rounding: Rounding = round_to_nearest
) -> list[str]:
    """Choose the basis of a canonical block, in place; a line for everything that changed.

    `layout`: of the block as it is (`planish.modelling.blocks.read_layout`). `grams`: role → second moments of the inputs,
    those that changed are replaced by the new basis's; roles that are missing are taken as if the norm's output before its
    scale, or the attention's input, were white. Of v best those of Σ_t a_t x_t, what attention averages its inputs to: a token
    then counts as much as attention looks at it. `rounding`: what is tried; to nearest with 4 bits in groups of 64 unless told.
    Computed in fp64, stored in the block's dtype. Twice changes little more than once, and never for the worse.
    """
    grams = {} if grams is None else grams
    told = [line for norm in layout.norms for line in scale_inputs(block, norm, layout, grams, rounding)]
    for group in layout.groups:
        if group.name not in layout.fixed:
            change = mix_values if group.name == "attention" else scale_neurons
            told += change(block, group, layout, grams, rounding)
    for role in (r for group in layout.groups for r in group.linears):
        told += mix_pair(block, role, layout, grams, rounding)
    return told


def read_roles(block: nn.Module, layout: Layout, roles: Iterable[str]) -> dict[str, tuple[nn.Module, Linear]]:
    """Role → module and matrices; nothing if one of the roles is missing or no linear."""
    paths = {r: path for group in layout.groups for r, path in group.linears.items()}
    modules = {r: block.get_submodule(paths[r]) for r in roles if r in paths}
    found = {r: (m, linear) for r, m in modules.items() if (linear := read_linear(m)) is not None}
    return found if set(found) == set(roles) else {}


def choose(before: T, candidates: Iterable[T], cost: Callable[[T], list[float]]) -> tuple[T, float]:
    """Of candidates of which no cost is higher than before the one with the least mean ratio, and that; else `before`, 1."""
    best, least = before, GAIN
    old = cost(before)
    for candidate in candidates:
        ratios = [new / c if c > 0 else 1.0 + new for new, c in zip(cost(candidate), old, strict=True)]
        if max(ratios) <= 1 and sum(ratios) / len(ratios) < least:
            best, least = candidate, sum(ratios) / len(ratios)
    return best, least if best is not before else 1.0


def scale_inputs(block: nn.Module, norm: Norm, layout: Layout, grams: Grams, rounding: Rounding) -> list[str]:
    """Norm's channels divided by s, columns of what reads it multiplied by s."""
    module, found = block.get_submodule(norm.path), read_roles(block, layout, norm.roles)
    weight = getattr(module, "weight", None)
    if weight is None or not found:
        return []
    scale = weight.double() + norm.offset
    shared = next((grams[r] for r in norm.roles if r in grams), scale.square().diag())
    seen = {r: grams.get(r, shared).double() for r in norm.roles}
    metrics = {r: weigh_output(block, layout, r, grams, seen[r]) for r in norm.roles}

    def cost(s: Tensor) -> list[float]:
        return [f.read(s).error(seen[r] / s / s[:, None], rounding, metrics[r]) for r, (_, f) in found.items()]

    energy = torch.stack([g.diagonal() / g.diagonal().mean().clamp(min=1e-300) for g in seen.values()]).mean(0)
    candidates = scale_columns([linear.right for _, linear in found.values()], energy)
    s, ratio = choose(torch.ones_like(scale), candidates, cost)
    if ratio == 1 or not all(fits(linear.read(s), m) for m, linear in found.values()):
        return []
    for owner, linear in found.values():
        write_linear(owner, linear.read(s))
    set_data(module, "weight", (scale / s - norm.offset).to(weight.dtype))
    if (bias := getattr(module, "bias", None)) is not None:
        set_data(module, "bias", (bias.double() / s).to(bias.dtype))
    grams.update({r: gram / s / s[:, None] for r, gram in seen.items() if r in grams})
    return [
        f"{norm.path}: channels rescaled for {', '.join(norm.roles)}; their rounding errors × {ratio:.2f} on average"
    ]


def scale_neurons(block: nn.Module, group: Group, layout: Layout, grams: Grams, rounding: Rounding) -> list[str]:
    """Rows of up divided by s, columns of down multiplied by s, where a gate makes the product linear in up."""
    names = {role.rpartition(".")[2]: role for role in group.linears}
    if not {"gate", "up", "down"} <= names.keys():
        return []
    found = read_roles(block, layout, (names["up"], names["down"]))
    if not found or not (up := found[names["up"]])[1].mixes:
        return []
    down = found[names["down"]]
    energy = up[1].dense().square().sum(1)
    gram = grams.get(names["down"], energy.diag()).double()
    s, ratio = choose(
        torch.ones_like(energy),
        scale_columns([down[1].right], gram.diagonal()),
        lambda s: [down[1].read(s).error(gram / s / s[:, None], rounding)],
    )
    if ratio == 1 or not (fits(up[1].give(1 / s), up[0]) and fits(down[1].read(s), down[0])):
        return []
    write_linear(up[0], up[1].give(1 / s))
    write_linear(down[0], down[1].read(s))
    if names["down"] in grams:
        grams[names["down"]] = gram / s / s[:, None]
    return [f"{group.name}: neurons rescaled; rounding error of {names['down']} × {ratio:.2f}"]


@dataclass(frozen=True)
class Values:
    """Second moments around the values of each kv head: `outer` Σ Oᵀ O over its query heads, `seen` Σ of the inputs of o, both
    (kv, d, d); `averaged` (kv,): the share of its energy that is left of v's output when attention has averaged it over tokens,
    and so of v's rounding error; `gram` of o's inputs (heads · d)²."""

    outer: Tensor
    seen: Tensor
    averaged: Tensor
    gram: Tensor

    @property
    def metric(self) -> Tensor:
        """What an error of v's outputs costs o's output: (kv, d, d)."""
        return self.outer * self.averaged[:, None, None]


def measure_values(layout: Layout, v: Linear, o: Linear, grams: Grams, read: Tensor) -> Values | None:
    """`read`: second moments of v's inputs. Without those of o attention is taken to average nothing."""
    heads, kv = layout.heads, layout.kv_heads
    v_dense, o_dense = v.dense(), o.dense()
    d = o_dense.shape[1] // heads if heads else 0
    if not kv or len(v_dense) != kv * d:
        return None
    rows, share = v_dense.unflatten(0, (kv, d)), heads // kv
    made = (rows @ read) @ rows.mT
    gram = grams["o"].double() if "o" in grams else torch.block_diag(*made.repeat_interleave(share, 0))
    own = o_dense.unflatten(1, (heads, d)).transpose(0, 1)
    outer, seen = own.mT @ own, gram.view(heads, d, heads, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    pool = lambda m: m.unflatten(0, (kv, share)).sum(1)  # noqa: E731 — over the query heads of a kv head
    whole = (pool(outer) * made).sum((1, 2)).clamp(min=1e-300)
    return Values(pool(outer), pool(seen), pool((outer * seen).sum((1, 2))) / whole, gram)


def weigh_output(block: nn.Module, layout: Layout, role: str, grams: Grams, read: Tensor) -> Tensor | None:
    """What squared errors of v's output cost behind o, of up's behind down, as `Linear.error` takes it; None for other roles.

    `read`: second moments of the role's inputs.
    """
    if role == "v" and "attention" not in layout.fixed and (found := read_roles(block, layout, "vo")):
        values = measure_values(layout, found["v"][1], found["o"][1], grams, read)
        return None if values is None else values.metric
    if role == "up" and "mlp" not in layout.fixed and (found := read_roles(block, layout, MLP)):
        up, down = (found[r][1].dense() for r in MLP[1:])
        made = ((up @ read) * up).sum(1).clamp(min=1e-300)
        seen = grams["down"].diagonal().double() if "down" in grams else made
        return down.square().sum(0) * seen / made
    return None


def mix_values(block: nn.Module, group: Group, layout: Layout, grams: Grams, rounding: Rounding) -> list[str]:
    """Values of every kv head mapped by M, what o does to them by M⁻¹."""
    found = read_roles(block, layout, "vo")
    if not found or not found["v"][1].mixes:
        return []
    (v_module, v), (o_module, o) = found["v"], found["o"]
    eye = torch.eye(v.right.shape[1], dtype=torch.float64)
    read = next((grams[r] for r in "vqk" if r in grams), eye).double()
    values = measure_values(layout, v, o, grams, read)
    if values is None:
        return []
    kv, share = layout.kv_heads, layout.heads // layout.kv_heads
    rows = v.dense().unflatten(0, (kv, -1))

    def change(maps: tuple[Tensor, Tensor]) -> tuple[Linear, Linear, Tensor]:
        forth, back = (m.repeat_interleave(share, 0) for m in maps)
        return v.give(maps[0]), o.read(back), apply(forth, apply(forth, values.gram).T)

    def cost(maps: tuple[Tensor, Tensor]) -> list[float]:
        new_v, new_o, seen = change(maps)
        metric = maps[1].mT @ values.metric @ maps[1]
        return [new_o.error(seen, rounding) + new_v.error(read, rounding, metric)]

    one = torch.eye(rows.shape[1], dtype=torch.float64).expand(kv, -1, -1)
    maps, ratio = choose((one, one), mix_channels(values.outer, values.seen, rows @ rows.mT), cost)
    v, o, gram = change(maps)
    if ratio == 1 or not (fits(v, v_module) and fits(o, o_module)):
        return []
    write_linear(v_module, v)
    write_linear(o_module, o)
    if "o" in grams:
        grams["o"] = gram
    return [f"{group.name}: value dimensions mixed; rounding error of v and o × {ratio:.2f}"]


def mix_pair(block: nn.Module, role: str, layout: Layout, grams: Grams, rounding: Rounding) -> list[str]:
    """A ← M A, B ← B M⁻¹."""
    found = read_roles(block, layout, (role,))
    if not found or not isinstance(found[role][0], Pair):
        return []
    module, pair = found[role]
    a, b = pair.right, pair.left
    assert b is not None
    leader = {"k": "q", "v": "q", "gate": "up"}.get(role, role)
    gram = next((grams[r] for r in (role, leader) if r in grams), torch.eye(a.shape[1], dtype=torch.float64)).double()
    metric = weigh_output(block, layout, role, grams, gram)

    def change(maps: tuple[Tensor, Tensor]) -> Linear:
        return Linear(maps[0][0] @ a, b @ maps[1][0], bias=pair.bias)

    one = torch.eye(len(a), dtype=torch.float64)[None]
    outer = b.T @ (b if metric is None else apply(metric, b))
    candidates = mix_channels(outer[None], (a @ gram @ a.T)[None], (a @ a.T)[None])
    maps, ratio = choose((one, one), candidates, lambda maps: [change(maps).error(gram, rounding, metric)])
    if ratio == 1 or not fits(change(maps), module):
        return []
    write_linear(module, change(maps))
    return [f"{role}: its two factors balanced; their rounding error × {ratio:.2f}"]
