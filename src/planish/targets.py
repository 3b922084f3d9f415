"""What each stack can hold of a compressed model, and how that constrains the ranks before anything is solved.

| form | hf | vllm | gguf | onnx |
|---|---|---|---|---|
| low-rank linears (`pair`, `pivoted`, low-rank heads) | yes | yes | multiplied back: saves nothing | yes |
| fewer value dimensions | yes | yes; cache not smaller | yes, equal in all blocks, and MLP widths then too | yes |
| fewer rotary pairs, fewer query/key dimensions | yes | yes | filled up: saves nothing | yes |
| fewer neurons | yes | yes | yes, per block | yes |
| MLP removed or linear | yes | yes | yes; linear of the normed input | yes |
| attention removed or linear | yes | yes | yes; linear of the normed input | yes |
| keys cached at low rank (palu) | yes | no | multiplied back: saves nothing | not tried |

`any` asks for nothing: what comes out runs in transformers, and where else it runs, `planish export` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.allocate import BudgetError, Curve
from planish.core import Edit, Frontier, Plan, Shape, Solver, Unit, Weights
from planish.errors import InputError
from planish.stats import Stats, Tap

Spec = dict[str, Any]
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
LOW_RANK = ("pair", "pivoted", "head_pair")


@dataclass(frozen=True)
class Target:
    """`refuses`: what a unit would become (`describe_unit`) → why that cannot, or need not, be cut for this target.
    `steps`: unit name → ranks are multiples of it; `wide`: of this instead, where the full rank is at least 32 of them.
    `uniform`: units that must have the same rank in every block as soon
    as the first of them is cut."""

    title: str
    refuses: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    wide: Mapping[str, int] = field(default_factory=dict)
    uniform: tuple[str, ...] = ()


_NO_LATENT = "vLLM's cache has no room for keys that attention rebuilds"
_NO_GRAPH = "llama.cpp has no graph for it, and filled up again it saves nothing"

TARGETS: dict[str, Target] = {
    "any": Target("transformers; elsewhere as far as it goes"),
    "hf": Target("transformers"),
    "onnx": Target("ONNX Runtime"),
    "vllm": Target(
        "vLLM, through its Transformers backend",
        refuses={"keys": _NO_LATENT},
        steps={"vo": 8, "qk": 8, "mlp": 8},
    ),
    "gguf": Target(
        "llama.cpp",
        refuses={
            "low-rank linear": _NO_GRAPH,
            "keys": _NO_GRAPH,
            "fewer query/key dimensions": _NO_GRAPH,
            "raw linear attention": "llama.cpp has no linear map of the residual stream before the norm",
            "raw linear MLP": "llama.cpp has no linear map of the residual stream before the norm",
        },
        steps={"vo": 8, "mlp": 32},
        wide={"mlp": 64},  # AVX-512 multiplies f16 rows 64 at a time, the rest one by one
        uniform=("vo", "mlp"),
    ),
}


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


NAMES = {"vo": "value dimensions", "qk": "query/key dimensions", "mlp": "neurons"}


def describe_limits(name: str, units: Mapping[Unit, Solver] | None = None) -> list[str]:
    """What a target asks of a compressed model, one line each; with a method's `units` only what concerns them."""
    target = find_target(name)
    forms = None if units is None else {describe_unit(u, s) for u, s in units.items()}
    cut = None if units is None else {u.name for u in units}
    lines = [f"no {what}: {why}" for what, why in target.refuses.items() if forms is None or what in forms]
    for unit, step in target.steps.items():
        if cut is None or unit in cut:
            wide = f" ({w} from {32 * w} on)" if (w := target.wide.get(unit)) else ""
            equal = ", equal in all blocks" if unit in target.uniform else ""
            lines.append(f"{NAMES[unit]} in multiples of {step}{wide}{equal}")
    return lines


def describe_unit(unit: Unit, solver: Solver) -> str:
    """What a solver makes of a unit when it cuts it."""
    if unit.name in ROLES:
        return "low-rank linear"
    if unit.name in ("attention", "ffn"):
        part = "attention" if unit.name == "attention" else "MLP"
        raw = getattr(solver, "input", None) == "raw"
        return f"raw linear {part}" if raw else f"linear {part}"
    return {"vo": "fewer value dimensions", "qk": "fewer query/key dimensions", "mlp": "fewer neurons"}.get(
        unit.name, unit.name
    )


@dataclass(frozen=True)
class Rounded(Solver):
    """Another solver, whose ranks are multiples of `step` (or full)."""

    solver: Solver
    step: int
    name: ClassVar[str] = "rounded"

    def units(self, shape: Shape) -> list[Unit]:
        return self.solver.units(shape)

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        ranks = self.solver.ranks(unit, shape)
        return [r for r in ranks if r % self.step == 0 or r == ranks[-1]]

    def cost(self, unit: Unit, shape: Shape, rank: int) -> int:
        return self.solver.cost(unit, shape, rank)

    def cache(self, unit: Unit, shape: Shape, rank: int) -> int:
        return self.solver.cache(unit, shape, rank)

    def work(self, unit: Unit, shape: Shape, rank: int) -> int:
        return self.solver.work(unit, shape, rank)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return self.solver.taps(unit, shape)

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return self.solver.dense_taps(unit, shape)

    def memory(self, unit: Unit, shape: Shape) -> int:
        return self.solver.memory(unit, shape)

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        return self.solver.decompose(unit, weights, stats, shape)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        return self.solver.truncate(frontier, rank, shape)


def constrain(name: str, method: str, units: dict[Unit, Solver], shapes: list[Shape]) -> dict[Unit, Solver]:
    """The units that may be cut for a target, with the ranks they may have. Raises InputError if none is left."""
    target = find_target(name)
    if not target.refuses and not target.steps:
        return units
    kept: dict[Unit, Solver] = {}
    refused: dict[str, str] = {}
    for unit, solver in units.items():
        what = describe_unit(unit, solver)
        if what in target.refuses:
            refused[what] = target.refuses[what]
            continue
        full = solver.ranks(unit, shapes[unit.block])[-1]
        step, wide = target.steps.get(unit.name, 1), target.wide.get(unit.name)
        step = wide if wide and full >= 32 * wide else step
        small = step >= full  # tiny models: rounding would leave nothing to cut
        kept[unit] = solver if step == 1 or small else Rounded(solver, step)
    if units and not kept:
        what, why = next(iter(refused.items()))
        raise InputError(
            f"--target {name}: {method} gives a {what} and nothing else; {why} · choose a method that cuts value "
            "dimensions or neurons (flat-llm, a3), or --target hf"
        )
    return kept


def needs_uniform(name: str, plan: Plan) -> bool:
    """Does the target ask for equal ranks in all blocks under this plan?"""
    uniform = find_target(name).uniform
    return bool(uniform) and any(u.name == uniform[0] for u in plan)


def make_uniform(name: str, plan: Plan, curves: Mapping[Unit, Curve], budget: float | Sequence[float]) -> Plan:
    """The plan with equal ranks in all blocks where the target needs that: least predicted loss within the budget.

    `curves`: of the plan's units; `budget`: what the target's uniform units in the plan may cost together, for each of the
    curves' costs. All combinations of one rank per kind are looked at (value dimensions × MLP widths), so the choice is exact.
    """
    kinds = [n for n in find_target(name).uniform if any(u.name == n for u in plan)]
    sums = [add_curves([curves[u] for u in sorted(plan) if u.name == n]) for n in kinds]
    limits = torch.as_tensor(budget, dtype=torch.float64).reshape(-1)
    cost, loss = torch.zeros(len(limits)), torch.zeros(())
    for _, c, f in sums:
        lift = (slice(None), *[None] * (cost.ndim - 1))
        cost, loss = cost.unsqueeze(-1) + c[lift], loss.unsqueeze(-1) + f
    held = cost.movedim(0, -1) <= limits * (1 + 1e-12)
    fits = held.all(-1)
    if not fits.any():
        which = int((~held.flatten(0, -2).any(0)).nonzero()[0]) if not held.flatten(0, -2).any(0).all() else 0
        within = torch.cat([held[..., :which], held[..., which + 1 :]], -1).all(-1)
        raise BudgetError(float(cost[which][within].min()), float(limits[which]), which)
    best = loss[fits].min()
    at = torch.where(fits & (loss <= best), cost[0], -1).argmax()  # of equally good ones the largest
    picks = torch.unravel_index(at, loss.shape) if sums else ()
    chosen = {n: int(ranks[i]) for n, (ranks, _, _), i in zip(kinds, sums, picks, strict=True)}
    return {u: chosen.get(u.name, r) for u, r in plan.items()}


def add_curves(curves: list[Curve]) -> tuple[Tensor, Tensor, Tensor]:
    """(ranks, cost, loss) of one rank for all of these units: the ranks that they all have, costs (budgets, ranks) and losses
    added."""
    common = sorted(set.intersection(*({int(r) for r in c.ranks} for c in curves)))
    ranks = torch.tensor(common)
    at = [torch.searchsorted(c.ranks, ranks) for c in curves]
    rows = [c.cost.reshape(-1, len(c.ranks))[:, i] for c, i in zip(curves, at, strict=True)]
    cost = sum(rows, torch.zeros_like(rows[0]))
    return ranks, cost, sum((c.loss[i] for c, i in zip(curves, at, strict=True)), torch.zeros(len(ranks)))


def check(name: str, specs: list[Spec], shapes: list[Shape]) -> list[str]:
    """Why a finished model (its blocks' specs) does not fit a target at the size it has; empty if it does."""
    find_target(name)
    reasons: list[str] = []
    if name == "vllm":
        latent = [i for i, s in enumerate(specs) if "k_rank" in s.get("attention", {})]
        if latent:
            reasons.append(f"block {latent[0]} caches its keys at low rank: {_NO_LATENT}")
    if name == "gguf":
        for i, spec in enumerate(specs):
            for role, form in spec.get("linears", {}).items():
                if form["kind"] in LOW_RANK:
                    reasons.append(f"block {i}'s {role} is a {form['kind']}: multiplied back to dense")
            for part in ("attention", "mlp"):
                form = spec.get(part, {})
                adds = form.get("rank") or form.get("gate") or form.get("shift")
                if form.get("kind") == "bypass" and form["raw"] and adds:
                    reasons.append(f"block {i}'s {part} is a linear map of the residual stream: no graph has that")
            form = spec.get("attention", {})
            if form.get("kind") == "own" and form["qk"] < shapes[i].qk:
                reasons.append(f"block {i} has fewer query/key dimensions: filled up again")
        values = {
            s.get("attention", {}).get("v", h.v)
            for s, h in zip(specs, shapes)
            if s.get("attention", {}).get("kind") != "bypass"
        }
        if len(values) > 1:
            reasons.append(
                f"value dimensions differ from block to block ({min(values)} to {max(values)}): filled up to the largest"
            )
    return reasons
