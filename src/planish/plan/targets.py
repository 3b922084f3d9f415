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

For gguf this is what llama.cpp's graphs hold of a plain LLaMA; `fit_target` says what they hold of a given model.
`any` asks for nothing: what comes out runs in transformers, and where else it runs, `planish export` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, lcm
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Plan, Shape, Solver, Spec, Tokens, Unit, Weights
from planish.errors import InputError
from planish.folder.source import Source
from planish.modelling.blocks import get_linear
from planish.modelling.families import ATTENTION, MLP
from planish.modelling.family import Family
from planish.plan.allocate import Curve
from planish.plan.footprint import Need, footprints
from planish.plan.graphs import GRAPHS, refuse_family, refuse_rope
from planish.plan.spread import BudgetError
from planish.rounding.types import Choice, head_step
from planish.shapes import Float
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class Target:
    """`refuses`: what a cut unit would need of the stack → why that cannot, or need not, be cut for this target.
    `steps`: unit name → ranks are multiples of it; `wide`: of this instead, where the full rank is at least 32 of them.
    `uniform`: units that must have the same rank in every block as soon
    as the first of them is cut. `whole`: a removed attention or MLP saves something only where both of a block go."""

    name: str
    title: str
    refuses: Mapping[Need, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    wide: Mapping[str, int] = field(default_factory=dict)
    uniform: tuple[str, ...] = ()
    whole: bool = False


_NO_LATENT = "vLLM's cache has no room for keys that attention rebuilds"
_NO_GRAPH = "llama.cpp has no graph for it, and filled up again it saves nothing"

TARGETS: dict[str, Target] = {
    "any": Target("any", "transformers; elsewhere as far as it goes"),
    "hf": Target("hf", "transformers"),
    # sixteen numbers at a time
    "onnx": Target("onnx", "ONNX Runtime", steps={"vo": 8, "qk": 8, "mlp": 16, "neurons": 16}),
    "vllm": Target(
        "vllm",
        "vLLM, through its Transformers backend",
        refuses={Need.KEYS: _NO_LATENT},
        steps={"vo": 8, "qk": 8, "mlp": 8},
    ),
    "gguf": Target(
        "gguf",
        "llama.cpp",
        refuses={
            Need.LOW_RANK: _NO_GRAPH,
            Need.KEYS: _NO_GRAPH,
            Need.QK: _NO_GRAPH,
            Need.RAW_ATTENTION: "llama.cpp has no linear map of the residual stream before the norm",
            Need.RAW_MLP: "llama.cpp has no linear map of the residual stream before the norm",
        },
        steps={"vo": 8, "mlp": 32, "neurons": 32},
        wide={"mlp": 64, "neurons": 64},  # AVX-512 multiplies f16 rows 64 at a time, the rest one by one
        uniform=("vo", "mlp"),
    ),
}


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def refuse_rotary(config: Any, rotary: Any) -> str | None:
    """Why no GGUF file can hold a rotary embedding (the model's module), or None."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope") or abs(getattr(rotary, "attention_scaling", 1.0) - 1) > 1e-6:
        return (
            f"rotary embedding of type {kind!r} (frequencies that depend on the length, or scaled attention) is not "
            "written to GGUF; use llama.cpp's own converter for the uncompressed model"
        )
    return None


def refuse_backend(family: Family) -> str | None:
    """Why vLLM's Transformers backend, which runs what has other than stock shapes, runs no models of a family, or None."""
    lacks = {
        "what mixers keep of a sequence": family.state,
        "heads whose sizes differ between blocks": family.per_block,
        "scores that no token answers to": family.sinks,
        "rotary tables of complex numbers": family.tables == "complex",
    }
    for what, has in lacks.items():
        if has:
            return f"vLLM's Transformers backend, which runs other than stock shapes, does not hold {what} ({family.model_type})"
    return None


def fit_target(name: str, source: Source, shapes: Sequence[Shape]) -> Target:
    """What a target asks of this model's compressed form. Raises InputError where it cannot hold the model at all."""
    target, family, config = find_target(name), source.family, source.config
    if name == "vllm" and (reason := refuse_backend(family)):
        raise InputError(
            f"--target vllm: {reason}; compress for --target any (stock shapes are for vLLM's own classes)"
        )
    if name != "gguf":
        return target
    block = source.empty_block(0)
    own = family.model_type in GRAPHS  # the family's own graph, whose blocks are all alike
    reason = refuse_family(family.model_type, config)
    if not reason and own:
        reason = refuse_rope(family.model_type, config) if family.rotary else None
    elif not reason:
        reason = refuse_rotary(config, source.empty.base_model.rotary_emb)
    if reason:
        raise InputError(f"--target gguf: {reason}; or compress for --target any")
    refuses = dict(target.refuses)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    mimo = None  # why mimo2, the one graph with fewer value dimensions, does not hold them
    if own:
        mimo = "has all blocks alike"
    elif family.qk_norm:
        mimo = "has no norms of queries and keys"
    elif any(get_linear(block, family, r).bias is not None for r in family.roles):
        mimo = "has no biases"
    elif rope != "default" or any(s.rotary != s.qk for s in shapes):
        mimo = "has no rotary scaling"
    elif config.tie_word_embeddings:
        mimo = "stores a tied embedding twice"
    if mimo:
        refuses[Need.VALUES] = f"llama.cpp's graph for it {mimo}, and filled up again it saves nothing"
    uniform = () if mimo else target.uniform
    if family.qk_norm or own:  # deci, the one graph with blocks of several shapes, has none either
        refuses |= dict.fromkeys((Need.LINEAR_ATTENTION, Need.LINEAR_MLP), _NO_GRAPH)
        uniform = ("neurons", "mlp") if any(s.experts for s in shapes) else ("mlp",)
        uniform = uniform if not own or not GRAPHS[family.model_type].widths else uniform[:-1]
    return replace(target, refuses=refuses, uniform=uniform, whole=bool(family.qk_norm) or own)


LOW_RANK = (32, 16, 8)  # steps of the ranks of low-rank linears, whose second factors have rows of so many weights


def takes_any(bits: Choice) -> bool:
    """Whether any group is held that divides the width."""
    return bits.type is None and bits.target not in ("gguf", "vllm")


def step_ranks(bits: Choice, shape: Shape) -> int:
    """What ranks of low-rank linears are to be multiples of."""
    if bits.target == "gguf":
        return 1
    least = min(shape.hidden, shape.intermediate or shape.hidden) // 4
    return next((g for g in LOW_RANK if g <= least), 1) if takes_any(bits) else bits.step(0)


def fit_bits(target: Target, bits: Choice | None, shapes: Sequence[Shape]) -> Target:
    """The target with ranks in such steps that the widths of what is cut divide into the groups that rounding has."""
    if bits is None or not shapes:
        return target
    shape = shapes[0]
    experts = next((s.experts for s in shapes if s.experts), None)
    one = bits.pick_experts(gcd(experts.hidden, experts.intermediate), "experts") if experts else None
    own = dict.fromkeys((*ATTENTION, *MLP, "attention", "ffn"), step_ranks(bits, shape)) | {
        "neurons": one.group if one else bits.step(experts.intermediate) if experts else 1,
        "vo": head_step(shape.heads, bits.step(shape.heads * shape.v)),
        "mlp": 32 if takes_any(bits) else bits.step(shape.intermediate),
    }
    steps = {unit: lcm(target.steps.get(unit, 1), step) for unit, step in own.items()}
    wide = {unit: lcm(step, own.get(unit, 1)) for unit, step in target.wide.items()}
    return replace(target, steps={**target.steps, **steps}, wide=wide)


NAMES = {"vo": "value dimensions", "qk": "query/key dimensions", "mlp": "neurons", "neurons": "neurons of experts"}
FEWER = {"vo": Need.VALUES, "qk": Need.QK, "mlp": Need.NEURONS}


def describe_limits(
    target: Target, units: Mapping[Unit, Solver] | None = None, shapes: Sequence[Shape] = ()
) -> list[str]:
    """What a target asks of a compressed model, one line each; with a method's `units` only what concerns them."""
    needs = set(target.refuses) if units is None else find_needs(units, shapes)
    cut = None if units is None else {u.name for u in units}
    lines = [f"no {what}: {why}" for what, why in target.refuses.items() if what in needs]
    for unit, step in target.steps.items():
        if unit in NAMES and (cut is None or unit in cut) and FEWER.get(unit) not in target.refuses:
            wide = f" ({w} from {32 * w} on)" if (w := target.wide.get(unit, step)) > step else ""
            equal = ", equal in all blocks" if unit in target.uniform else ""
            lines.append(f"{NAMES[unit]} in multiples of {step}{wide}{equal}")
    low = {r: n for r in (*ATTENTION, *MLP) if (n := target.steps.get(r, 1)) > 1}
    if low and (cut is None or cut & low.keys()):
        lines.append(f"ranks of low-rank linears in multiples of {max(low.values())}")
    if target.whole and (cut is None or cut & {"attention", "ffn"}):
        lines.append("a removed attention or MLP only with the rest of its block: alone it is filled up again")
    return lines


def find_needs(units: Mapping[Unit, Solver], shapes: Sequence[Shape]) -> set[Need]:
    """What a stack must hold where these units are cut."""
    least = ((s, u, shapes[u.block], s.ranks(u, shapes[u.block])[0]) for u, s in units.items())
    return {need for at in least for _, found in footprints(*at) for need in found.needs}


def unwrap(solver: Solver) -> Solver:
    """The solver of whose ranks a target takes multiples, or any other as it is."""
    return solver.solver if isinstance(solver, Rounded) else solver


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

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return self.solver.spec(unit, shape, rank)

    def blocks(self, unit: Unit, shape: Shape) -> list[tuple[Shape, int]]:
        return self.solver.blocks(unit, shape)

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

    def effect_role(self, unit: Unit) -> str | None:
        return self.solver.effect_role(unit)

    def effects(
        self, frontier: Frontier, ranks: Sequence[int], tokens: Tokens, shape: Shape
    ) -> Float[Tensor, "ranks tokens"]:
        return self.solver.effects(frontier, ranks, tokens, shape)


def constrain(target: Target, method: str, units: dict[Unit, Solver], shapes: list[Shape]) -> dict[Unit, Solver]:
    """The units that may be cut for a target, with the ranks they may have. Raises InputError if none is left."""
    if not target.refuses and not target.steps:
        return units
    kept: dict[Unit, Solver] = {}
    refused: list[Need] = []
    for unit, solver in units.items():
        if needs := find_needs({unit: solver}, shapes) & set(target.refuses):
            refused += needs
            continue
        full = solver.ranks(unit, shapes[unit.block])[-1]
        step, wide = target.steps.get(unit.name, 1), target.wide.get(unit.name)
        step = wide if wide and full >= 32 * wide else step
        small = step >= full  # tiny models: rounding would leave nothing to cut
        kept[unit] = solver if step == 1 or small else Rounded(solver, step)
    if units and not kept:
        several = {*FEWER.values(), Need.KEYS}
        what, why = refused[0] if refused[0] in several else f"a {refused[0]}", target.refuses[refused[0]]
        cuts = "neurons" if Need.VALUES in target.refuses else "value dimensions or neurons"
        raise InputError(
            f"--target {target.name}: {method} gives {what} and nothing else; {why} · choose a method that cuts "
            f"{cuts} (`planish methods` says which do), or --target hf"
        )
    return kept


def check_plan(target: Target, method: str, plan: Plan) -> None:
    """Raises InputError if a plan removes submodules that the target would fill up again."""
    if not target.whole:
        return
    gone = {name: {u.block for u, r in plan.items() if u.name == name and r == 0} for name in ("attention", "ffn")}
    if alone := sorted(gone["attention"] ^ gone["ffn"]):
        part = "attention" if alone[0] in gone["attention"] else "MLP"
        raise InputError(
            f"--target {target.name}: {method} removes only the {part} of block {alone[0]}; llama.cpp's graph of this "
            "family has that only whole, and filled up again it saves nothing · choose a method that removes blocks "
            "or cuts neurons (`planish methods` says which do), or --target hf"
        )


def needs_uniform(target: Target, plan: Plan) -> bool:
    """Does the target ask for equal ranks in all blocks under this plan?"""
    return bool(target.uniform) and any(u.name == target.uniform[0] for u in plan)


def make_uniform(target: Target, plan: Plan, curves: Mapping[Unit, Curve], budget: float | Sequence[float]) -> Plan:
    """The plan with equal ranks in all blocks where the target needs that: least predicted loss within the budget.

    `curves`: of the plan's units; `budget`: what the target's uniform units in the plan may cost together, for each of the
    curves' costs. All combinations of one rank per kind are looked at (value dimensions × MLP widths), so the choice is exact.
    """
    kinds = [n for n in target.uniform if any(u.name == n for u in plan)]
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
