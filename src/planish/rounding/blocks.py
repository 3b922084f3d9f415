"""A block rounded in the basis that costs least: its own, rescaled, or rescaled and mixed, whichever really does.

    for roles that share a basis (attention; the feed-forward; both where they read one norm):
        as it is · with scales (`balance`) · with scales and maps  →  all their matrices rounded, Σ ½ tr(G E R Eᵀ)
        the least one stays in the block

So no block costs more than without. What lies on the grid already is left as it is, and so is what gets `FINE` bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from planish.rounding.gauges import Moments, Scene, balance
from planish.rounding.gauges_factors import round_linear
from planish.rounding.gauges_linears import find_matrices, find_tensor, read_linear, set_data
from planish.rounding.round import Metric, Rounded

EXPERT = "expert."  # roles of one expert
FINE = 8  # bits whose errors are not worth a choice of basis
Round = Callable[[str, Tensor, Metric], Rounded]  # matrix's name in the block, (out, in), its metric
Found = dict[str, Rounded]  # by the matrix's name


@dataclass
class State:
    """A basis of some roles: their tensors, moments, and what rounding makes of them at what cost."""

    tensors: dict[str, Tensor]
    grams: Moments
    gradients: Moments
    roles: dict[str, tuple[Found, float]] = field(default_factory=dict)  # each role's matrices, and their cost

    @property
    def cost(self) -> float:
        return sum(cost for _, cost in self.roles.values())


@torch.no_grad()
def round_block(scene: Scene, rounding: Round) -> tuple[Found, list[str]]:
    """Every matrix of a canonical block's roles rounded, by name, in the basis chosen, which is in `scene` then (of experts without
    moments); lines for what changed."""
    found, told = Found(), list[str]()
    for roles in share_basis(scene):
        state, lines = choose_basis(scene, roles, rounding)
        for own, _ in state.roles.values():
            found |= own
        told += lines
        for role in roles if roles[0].startswith(EXPERT) else ():  # of all experts they are most of a block's memory
            scene.grams.pop(role)
            scene.gradients.pop(role, None)
    return found, told


def share_basis(scene: Scene) -> list[list[str]]:
    """Roles in sets no two of which share anything that is free."""
    sets = [set(g.linears) for g in scene.layout.groups]
    for norm in scene.layout.norms:
        touched = [s for s in sets if s & set(norm.roles)]
        if len(touched) > 1:
            sets = [s for s in sets if s not in touched] + [set().union(*touched)]
    order = [r for g in scene.layout.groups for r in g.linears if r in scene.grams]
    return [own for s in sets if (own := [r for r in order if r in s])]


def choose_basis(scene: Scene, roles: list[str], rounding: Round) -> tuple[State, list[str]]:
    best = keep_state(scene, roles)
    best.roles = round_roles(scene, roles, rounding, best)
    rounded = [r for own, _ in best.roles.values() for r in own.values()]
    if all(r.exact or r.kind.bits >= FINE for r in rounded):
        return best, []
    told, lines, last = list[str](), list[str](), best
    for maps in (False, True):
        changed = balance(scene, roles, maps)
        if not changed:
            continue
        lines += changed
        state = keep_state(scene, roles)
        state.roles = round_roles(scene, roles, rounding, last)
        last = state
        if state.cost < best.cost:
            best, told = state, list(lines)
    set_state(scene, best)
    return best, told


def round_roles(scene: Scene, roles: list[str], rounding: Round, last: State) -> dict[str, tuple[Found, float]]:
    """Each role as it is now; those that are what they were in `last` are not rounded again."""
    found = {}
    for role in roles:
        path = scene.path(role)
        assert path is not None
        names = [n for n in last.tensors if n.startswith(f"{path}.")]
        if role in last.roles and all(torch.equal(find(scene, n), last.tensors[n]) for n in names):
            found[role] = last.roles[role]
            continue
        module = scene.block.get_submodule(path)
        linear, parts = read_linear(module), find_matrices(module)
        assert linear is not None and parts is not None
        metric = Metric(scene.grams[role], scene.gradient(role))
        own, cost = round_linear(linear, metric, lambda part, w, m, p=path, n=parts: rounding(f"{p}.{n[part]}", w, m))  # type: ignore[misc]
        found[role] = ({f"{path}.{parts[part]}": r for part, r in own.items()}, cost)
    return found


def find(scene: Scene, name: str) -> Tensor:
    tensor = find_tensor(scene.block, name)
    assert tensor is not None
    return tensor.detach()


def keep_state(scene: Scene, roles: list[str]) -> State:
    """What `balance` may change of these roles."""
    paths = [scene.path(r) for r in roles] + [n.path for n in scene.layout.norms if set(n.roles) <= set(roles)]
    names = [n for n, _ in scene.block.named_parameters() if any(n.startswith(f"{p}.") for p in paths)]
    return State({n: find(scene, n) for n in names}, dict(scene.grams), dict(scene.gradients))


def set_state(scene: Scene, state: State) -> None:
    for name, tensor in state.tensors.items():
        set_data(scene.block, name, tensor)
    scene.grams.update(state.grams)
    scene.gradients.update(state.gradients)
