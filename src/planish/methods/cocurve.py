"""CoCurve: attentions and groups of neurons go by what leaving them out, alone and together, does to the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.calibrate.losses import divergence, nll
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream
from planish.core import Plan, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.ablations import Part, measure_interactions
from planish.plan.foreseen import Foreseen, Work, compare_trials
from planish.plan.planned import Planned
from planish.plan.problem import Problem, count_left
from planish.solvers.bypass import Bypass
from planish.solvers.neurons import ChosenNeurons, Neurons
from planish.walks.solve import run_solved

GROUPS = 16  # of a feed-forward's neurons
COUPLINGS = (0.0, 0.25, 0.5, 0.75, 1.0)  # λ that are tried
LARGEST = 0.35  # change of a gain
RIDGE = 0.1  # γ of the gains, relative to the mean of the diagonal


@dataclass(frozen=True)
class CoCurve(Method):
    """Whole attentions and groups of neurons go, with regard to what those that went before have done. Dense shapes stay.

    Problem: the set S of parts to leave out, within the budget, that moves the model's predictions least.

    Equation: with p the likeliest words' probabilities of a token and d the change of their logits where part u is left out,
    φ_u = √p ⊙ (d − pᵀ d); leaving out S loses ½ Σ_{u,v ∈ S} H_uv, H_uv = E[φ_uᵀ φ_v]
    (`planish.plan.ablations.measure_interactions`). Next goes argmin_u (½ H_uu + λ Σ_{s gone} H_us) / cost_u, until the budget
    is met. Of λ = 0 … 1 the one whose model diverges least on held-out windows.

    `windows`: calibration windows, evenly spaced, on which parts are left out. `held`: others, on which plans are compared.
    `gains`: the neurons that stay, where some of a block's went, are multiplied by 1 + c with (H_KK + γ I) c = H_KS 1 per group,
    |c| ≤ 0.35, if that lowers the loss on the held-out windows.

    Differs from the paper: an attention goes whole (the paper's parts are kv heads with their query heads; here all blocks have
    as many heads); five λ are tried instead of every value at which the choice changes; 8 windows and 8 others instead of 128 and
    16; every feed-forward keeps a group; probabilities of the 256 likeliest words are scaled to sum to 1; parts that
    went are put back where the last one went too far; gains only where neurons went, with γ a tenth of the mean of the diagonal.
    """

    title: ClassVar[str] = "attentions and groups of neurons by measured interactions of leaving them out"
    reference: ClassVar[str] = "CoCurve, arXiv 2607.17568"

    windows: int = 8
    held: int = 8
    gains: bool = False

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero"), Neurons("energy", refit=False)]

    def takes(self, unit: Unit, budgets: Mapping[str, float]) -> bool:
        return unit.name != "ffn"

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if problem.target.uniform:
            raise InputError(
                f"cocurve leaves blocks with different numbers of neurons, and {problem.target.name} holds one size for all: use "
                "a method with uniform ranks, or another target"
            )
        whole = {u: problem.full(u) for u in problem.units}
        if all(b.share >= 1 for b in problem.budgets):
            return self.decide(problem, whole)
        parts = list_parts(problem)
        least = count_kept(problem, [p for p in parts if p not in list_lasting(problem, parts)])
        for b in problem.budgets:
            if (smallest := count_left(problem, least, b)) > b.limit:
                raise b.refuse("cocurve", smallest)
        few, held = split_windows(measure.stream, self.windows, self.held)
        with measure.phase("search"):
            h = measure_interactions(measure, few, parts)
            reference, tried = held.outputs(), dict[float, tuple[float, list[Part]]]()
            known: dict[tuple[Part, ...], float] = {}

            def run(gone: Sequence[Part], gains: Mapping[Part, float] | None = None) -> Hidden:
                return run_solved(problem, measure, self.leave_out(problem, gone, gains or {}), held)

            for coupling in COUPLINGS:
                gone = pick(problem, parts, h, coupling)
                key = tuple(sorted(gone))
                if key not in known:
                    known[key] = divergence(held, run(gone), reference)
                tried[coupling] = known[key], gone
            best = min(tried, key=lambda c: tried[c][0])
            gone, gains = tried[best][1], dict[Part, float]()
            notes: dict[str, Any] = {"coupling": best, "divergences": {str(c): d for c, (d, _) in tried.items()}}
            if self.gains:
                fitted = fit_gains(parts, h, gone)
                losses = [nll(held, run(gone)), nll(held, run(gone, fitted))]
                gains = fitted if losses[1] < losses[0] else {}
                notes["gains"] = {"without": losses[0], "with": losses[1]}
        single, pairs = score(parts, h, gone)
        return replace(
            self.leave_out(problem, gone, gains),
            notes=notes
            | {"gone": [str(u) for u in sorted({name(p) for p in gone})], "alone": single, "together": pairs},
        )

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        planned = self.decide(problem, problem.spread(lambda unit: 1.0))
        parts, held = list_parts(problem), min(self.held, windows)
        alone = replace(compare_trials([p.block for p in parts], min(self.windows, windows)), name="ablations")
        return Foreseen(planned, [alone, *[Work("search", solve=planned, heads=2 * held / windows)] * len(COUPLINGS)])

    def leave_out(self, problem: Problem, gone: Sequence[Part], gains: Mapping[Part, float]) -> Planned:
        """The plan without these parts."""
        ranks, solvers = count_kept(problem, gone), dict(problem.units)
        for unit, rank in ranks.items():
            if unit.name == "mlp" and rank < problem.full(unit):
                kept = [p for p in list_groups(problem, unit.block) if p not in gone]
                neurons = [(n, 1 + gains.get(p, 0.0)) for p in kept for n in range(p.first, p.last)]
                solvers[unit] = ChosenNeurons(kept=tuple(n for n, _ in neurons), gains=tuple(g for _, g in neurons))
        return replace(self.decide(problem, ranks), solvers=solvers)


def name(part: Part) -> Unit:
    return Unit(part.block, "mlp" if part.last else "attention")


def list_groups(problem: Problem, block: int) -> list[Part]:
    """Neighbouring neurons of a block, in groups as equal as can be where they are multiples of the problem's step."""
    steps = problem.shapes[block].intermediate // problem.step
    groups = min(GROUPS, steps)
    return (
        [Part(block, a, b) for a, b in pairwise(problem.step * (steps * g // groups) for g in range(groups + 1))]
        if groups
        else []
    )


def list_parts(problem: Problem) -> list[Part]:
    attentions = [Part(u.block) for u in sorted(problem.units) if u.name == "attention"]
    return attentions + [g for u in sorted(problem.units) if u.name == "mlp" for g in list_groups(problem, u.block)]


def list_lasting(problem: Problem, parts: Sequence[Part]) -> list[Part]:
    """An attention and of every feed-forward a group, the largest: what is left whichever of them stay."""
    kinds: dict[int, list[Part]] = {}
    for p in parts:
        kinds.setdefault(p.block if p.last else -1, []).append(p)
    return [max(found, key=lambda p: measure_costs(problem, p)) for found in kinds.values()]


def count_kept(problem: Problem, gone: Sequence[Part]) -> Plan:
    """Ranks without these parts; where neurons of a block go, those beyond a multiple of the problem's step go as well."""
    ranks = {u: problem.full(u) for u in problem.units}
    for part in gone:
        ranks[name(part)] -= part.last - part.first if part.last else ranks[name(part)]
    return {
        u: r - problem.full(u) % problem.step if u.name == "mlp" and r < problem.full(u) else r
        for u, r in ranks.items()
    }


def pick(problem: Problem, parts: Sequence[Part], h: Tensor, coupling: float) -> list[Part]:
    """What goes, in order: each time the part that loses least per cost of the main budget, what went before counted."""
    costs = [measure_costs(problem, p) for p in parts]
    missing = measure_missing(problem, [])
    main, gone = problem.budgets.index(problem.main), list[int]()
    while max(missing) > 0:
        marginal = h.diagonal() / 2 + coupling * h[:, gone].sum(1)
        able = [
            n for n in range(len(parts))
            if n not in gone and may_go(parts, gone, n) and any(c > 0 < m for c, m in zip(costs[n], missing, strict=True))
        ]  # fmt: skip
        gone.append(min(able, key=lambda n: float(marginal[n]) / max(costs[n][main], 1e-9)))
        missing = measure_missing(problem, [parts[n] for n in gone])
    for n in sorted(gone, key=lambda n: -float(h[n, n] / 2 + coupling * (h[n, gone].sum() - h[n, n]))):
        fewer = [m for m in gone if m != n]
        if max(measure_missing(problem, [parts[m] for m in fewer])) <= 0:
            gone = fewer
    return [parts[n] for n in gone]


def measure_missing(problem: Problem, gone: Sequence[Part]) -> list[float]:
    """By how much the model without these parts is beyond every budget."""
    ranks = count_kept(problem, gone)
    return [count_left(problem, ranks, b) - b.limit for b in problem.budgets]


def may_go(parts: Sequence[Part], gone: Sequence[int], n: int) -> bool:
    """Whether another of its kind stays: of a feed-forward a group, of the model an attention."""
    same = [
        m
        for m, p in enumerate(parts)
        if bool(p.last) == bool(parts[n].last) and (not p.last or p.block == parts[n].block)
    ]
    return any(m not in gone and m != n for m in same)


def measure_costs(problem: Problem, part: Part) -> list[float]:
    """What a part holds of every budget."""
    unit, full = name(part), problem.full(name(part))
    rank = full - (part.last - part.first) if part.last else 0
    return [
        problem.cost(unit, full, b) - (problem.cost(unit, rank, b) if rank or not part.last else 0.0)
        for b in problem.budgets
    ]


def fit_gains(parts: Sequence[Part], h: Tensor, gone: Sequence[Part]) -> dict[Part, float]:
    """c per group of neurons that stays where others of its block went."""
    cut = {p.block for p in gone if p.last}
    kept = [n for n, p in enumerate(parts) if p.last and p.block in cut and p not in gone]
    went = [n for n, p in enumerate(parts) if p in gone]
    own = h[kept][:, kept]
    own = own + RIDGE * own.diagonal().mean() * torch.eye(len(kept), dtype=h.dtype)
    c = torch.linalg.solve(own, h[kept][:, went].sum(1)).clamp(-LARGEST, LARGEST) if kept and went else []
    return {parts[n]: float(x) for n, x in zip(kept, c, strict=True)}


def score(parts: Sequence[Part], h: Tensor, gone: Sequence[Part]) -> tuple[float, float]:
    """½ Σ H_uu and ½ Σ H_uv over what goes: what it loses without and with interactions, to second order."""
    at = [n for n, p in enumerate(parts) if p in gone]
    return float(h.diagonal()[at].sum() / 2), float(h[at][:, at].sum() / 2)


def split_windows(stream: Stream, n: int, held: int) -> tuple[Stream, Stream]:
    """(n windows, `held` others), evenly spaced, or as large shares of all there are; of a single one both."""
    windows = torch.cat(stream.batches)
    count = min(n + held, len(windows))
    some = windows[torch.arange(count) * len(windows) // count]
    others = min(max(1, round(count * held / (n + held))), max(count - 1, 1))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[(2 * torch.arange(others) + 1) * count // (2 * others)] = True
    return stream.part(some[~chosen] if count > 1 else some), stream.part(some[chosen])
