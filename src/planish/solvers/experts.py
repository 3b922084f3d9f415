"""Which experts of a mixture stay: by how often, how strongly and how much they are asked, alone or together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, ExpertShape, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.shapes import Float, Int, Shaped
from planish.solvers.forms import (
    ExpertSolver,
    find_experts,
    keep_neurons,
    neuron_edits,
    of_expert,
    read_expert,
)
from planish.solvers.grams import Refits, order_neurons, slicing_losses
from planish.stats import Stats, Tap, kind

Criterion = Literal["frequency", "mass", "gated", "reap", "man", "together", "nats"]
ALONE = ("frequency", "mass", "gated", "reap", "man")


@kind
def expert_sums(g: Float[Tensor, "tokens experts"], f: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """Of every expert, over the tokens that it has a gate above 0 for: their number, Σ g, Σ g ‖f‖, Σ ‖f‖; each (experts,)."""
    g, f = g.double(), f.double()
    return {"number": (g > 0).double().sum(0), "mass": g.sum(0), "gated": (g * f).sum(0), "length": f.sum(0)}


@kind
def expert_counts(g: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """Of every expert the number of tokens that it has a gate above 0 for, and Σ g; each (experts,)."""
    g = g.double()
    return {"number": (g > 0).double().sum(0), "mass": g.sum(0)}


@kind
def coactivation(g: Float[Tensor, "tokens experts"], f: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """Σ a_i a_j, a = g ‖f‖, and the number of tokens that reach both i and j: (experts, experts); their diagonal is each one's."""
    reached, a = (g > 0).double(), g.double() * f.double()
    return {"sum": a.T @ a, "number": reached.T @ reached}


def removals(
    shares: Float[Tensor, "tokens experts"], d: Float[Tensor, "tokens experts"], gates: str
) -> dict[str, Tensor]:
    """Σ s_i s_j over tokens, s_j = uᵀe_j: (experts, experts), and the number of tokens that reach each expert (experts,).

    e_j: what the mixture's output y = Σ g f changes by if expert j is missing and the next one, n, comes in its place,

        e_j = (c_j y − g_j f_j + h f_n) / (1 − c_j),

    h what n would be given if the other gates kept theirs, and c_j what lets them grow: "softmax": g_j; "chosen", where all
    add up to 1: g_j − h; "apart": 0. Without a next one, h = 0, it is the known g_j (y − f_j) / (1 − g_j) of gates that add up
    to 1. Tokens that do not reach j change too if gates are part of a softmax: e_j = c_j y / (1 − c_j).

    `shares`: g of those that a token reaches, −h, and in a softmax minus the others' parts of it; d = uᵀf, the gradient there,
    0 for these others. An expert that was the only one leaves nothing behind: e_j = −g_j f_j.
    """
    shares, d = shares.double(), d.double()
    g, h = shares.clamp(min=0), (-shares).clamp(min=0)
    if gates == "chosen":
        total = g.sum(1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        g, h, d = g / total, h / total, d * total
    y, come, reached = (g * d).sum(1, keepdim=True), (h * d).sum(1, keepdim=True), g > 0
    grow = {"chosen": reached * (g - h.sum(1, keepdim=True)), "softmax": g + h, "apart": torch.zeros_like(g)}[gates]
    grow = torch.where(1 - grow > 1e-9, grow, 0)
    s = (grow * y + reached * (come - g * d)) / (1 - grow)
    return {"sum": s.T @ s, "number": reached.double().sum(0)}


@kind
def chosen_removals(shares: Float[Tensor, "tokens experts"], d: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """`removals` where the gates of a token add up to the same, whichever experts it reaches."""
    return removals(shares, d, "chosen")


@kind
def softmax_removals(shares: Float[Tensor, "tokens experts"], d: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """`removals` where gates are part of a softmax over all experts."""
    return removals(shares, d, "softmax")


@kind
def apart_removals(shares: Float[Tensor, "tokens experts"], d: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """`removals` where the other gates stay."""
    return removals(shares, d, "apart")


@dataclass(frozen=True)
class Experts(Solver):
    """Keep the r experts of a block that matter most; the others go, with their rows of the router.

    `criterion`, with sums over the tokens routed to expert j, g the gate as used, f the expert's output, N their number:
    "frequency" N, "mass" Σ g, "gated" Σ g ‖f‖, "reap" (1/N) Σ g ‖f‖, "man" (1/N) Σ ‖f‖. "together": the set D that goes has the
    least Σ_{i,j∈D} F_ij, F_ij the mean of a_i a_j, a = g ‖f‖, over the tokens that reach both. "nats": the same with half
    the mean over all tokens of s_i s_j (`removals`), which is predicted nats per token.

    Means are drawn towards the mean of all experts by `prior` tokens, so that an expert which few tokens reached is neither
    worthless nor precious, and what "nats" predicts for an expert is that of so many tokens more; one that none reached is
    named. Predicted loss: of "nats"; the others predict nothing.
    """

    name: ClassVar[str] = "experts"
    criterion: Criterion = "reap"
    prior: float = 4.0

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "experts")] if shape.experts and shape.experts.number > shape.experts.least else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        e = find_experts(shape)
        return range(e.least, e.number + 1, e.groups)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        e = find_experts(shape)
        return {"experts": keep_form(e, rank)} if rank < e.number else {}

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        gates, shares = "experts.gates", "experts.shares"
        if self.criterion == "nats":
            return [Tap(shares, f"{find_experts(shape).gates}_removals", f"grad:{shares}")]
        if self.criterion in ("frequency", "mass"):
            return [Tap(gates, "expert_counts")]
        return [Tap(gates, "coactivation" if self.criterion == "together" else "expert_sums", "experts.norms")]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return self.taps(unit, shape)

    def memory(self, unit: Unit, shape: Shape) -> int:
        return 8 * find_experts(shape).number ** 2

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        e, (tap,) = find_experts(shape), self.taps(unit, shape)
        number = stats.sums[tap]["number"]
        name_idle(unit.block, number.diagonal() if number.ndim == 2 else number)
        if self.criterion in ALONE:
            order = order_alone(score(self.criterion, stats.sums[tap], self.prior), e.groups)
            return Frontier(unit, [nan] * e.number + [0.0], {"order": order})
        if self.criterion == "nats":
            total = stats.sums[tap]["sum"]
            few = self.prior * total.trace() / number.sum().clamp(min=1)
            pairs = (total + few * torch.eye(e.number, dtype=total.dtype)) / max(stats.tokens[tap], 1) / 2
        else:
            pairs = shrink(stats.sums[tap]["sum"], number, self.prior)
        sets, loss = choose_sets(pairs, e)
        known = loss if self.criterion == "nats" else [nan] * e.number + [0.0]
        return Frontier(unit, known, {"sets": sets}, nats=self.criterion == "nats")

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        e = find_experts(shape)
        if rank >= e.number:
            return []
        f = frontier.factors
        kept = f["order"][:rank].sort().values if "order" in f else (~f["sets"][e.number - rank]).nonzero().flatten()
        return [Edit("experts", keep_form(e, rank), {"kept": kept})]


@dataclass(frozen=True)
class ExpertNeurons(ExpertSolver):
    """Keep the r best neurons of every expert, its own ones; down is refitted on them. One width for all experts of a block.

    As `planish.solvers.neurons.Neurons` for every expert, on the inputs of its down that its tokens bring, each multiplied by the
    token's gate: Σ g² ‖W x − W' x_J‖² is then what the mixture's output loses. Predicted loss: its sum over experts, per token
    of the block.

    An expert that fewer tokens reach than it has neurons has a singular Gram: below twice as many, 1 / (N + 1) at least is
    added, relative to the Gram's mean diagonal. One that none reaches keeps the neurons with the longest columns of down.
    """

    name: ClassVar[str] = "expert-neurons"
    score: Literal["leverage", "energy"] = "leverage"
    ridge: float = 1e-2
    refit: bool = True
    damping: float = 1e-10

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap(f"expert.{n}.down.gated", "gram") for n in range(find_experts(shape).number)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        e, taps = find_experts(shape), self.taps(unit, shape)
        number = torch.tensor([float(stats.tokens[t]) for t in taps])
        tokens = max(int(number.sum()) // e.top, 1)
        name_idle(unit.block, number)
        loss, factors = torch.zeros(e.intermediate + 1, dtype=torch.float64), dict[str, Any]()
        for n, tap in enumerate(taps):
            own = read_expert(weights, n, e)
            gram, _ = stats.take(tap)
            few = 1 / (float(number[n]) + 1) if number[n] < 2 * e.intermediate else 0.0
            score = self.score if number[n] else "energy"
            if not number[n]:
                gram.diagonal().fill_(1.0)
            order = order_neurons(gram, own["down"], score, max(self.ridge, few))
            known = bool(number[n])
            if self.refit:
                refits = Refits(gram, own["down"], order, max(self.damping, few))
                loss += refits.losses() * known
                factors[str(n)] = own | {"refits": refits}
            else:
                loss += slicing_losses(gram, own["down"], order) * known
                factors[str(n)] = own | {"order": order}
        return Frontier(unit, loss / tokens, factors)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        e, edits = find_experts(shape), list[Edit]()
        for n, f in frontier.factors.items() if rank < e.intermediate else ():
            edits += of_expert(n, neuron_edits(f, *keep_neurons(f, rank)))
        return edits


def name_idle(block: int, number: Float[Tensor, " experts"]) -> None:
    """A warning with the experts that no token reaches, by the number of tokens of each."""
    if idle := (number == 0).nonzero().flatten().tolist():
        names = f"expert{'s' * (len(idle) > 1)} {', '.join(map(str, idle))}"
        warnings.warn(f"block {block}: no calibration token reaches {names} of {len(number)}", stacklevel=3)


def keep_form(e: ExpertShape, number: int) -> Spec:
    return {"kind": "kept", "number": number, "top": e.lower_top(number)}


def score(criterion: str, sums: dict[str, Tensor], prior: float) -> Float[Tensor, " experts"]:
    """What each expert is worth: (experts,)."""
    if criterion in ("frequency", "mass", "gated"):
        return sums["number" if criterion == "frequency" else criterion]
    return shrink(sums["gated" if criterion == "reap" else "length"], sums["number"], prior)


def shrink(
    total: Float[Tensor, "*experts"], number: Float[Tensor, "*experts"], prior: float
) -> Float[Tensor, "*experts"]:
    """Σ / N drawn towards the mean of all as if by `prior` further tokens; of a matrix its diagonal and the rest apart."""
    if total.ndim == 2:
        eye = torch.eye(len(total), dtype=torch.bool)
        diagonal = shrink(total.diagonal(), number.diagonal(), prior)
        rest = total / (number + prior).clamp(min=1)  # towards 0: a pair that never meets has nothing in common
        return torch.where(eye, torch.diag(diagonal), rest)
    mean = total.sum() / number.sum().clamp(min=1)
    return (total + prior * mean) / (number + prior).clamp(min=torch.finfo(total.dtype).tiny)


def order_alone(worth: Float[Tensor, " experts"], groups: int) -> Int[Tensor, " experts"]:
    """The experts (experts,), best first, the groups taking turns."""
    by_group = worth.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    return (by_group + torch.arange(groups)[:, None] * by_group.shape[1]).T.flatten()


def choose_sets(
    pairs: Float[Tensor, "n n"], e: ExpertShape
) -> tuple[dict[int, Shaped[Tensor, " n"]], Float[Tensor, " n+1"]]:
    """Which experts go, for every number m of them: masks (n,) of sets with a small pᵀ F p, and that loss of keeping r = 0 … n.

    Forward selection, then swaps of one that goes for one of its group that stays, while they help. Of groups equal parts go.
    """
    n, size = len(pairs), len(pairs) // e.groups
    group = torch.arange(n) // size
    gone, sets, loss = torch.zeros(n, dtype=torch.bool), {}, torch.full((n + 1,), nan, dtype=torch.float64)
    loss[n] = 0.0
    for m in range(1, n):
        load = torch.bincount(group[gone], minlength=e.groups)
        able = ~gone & (load[group] == load.min())
        gain = 2 * pairs @ gone.to(pairs.dtype) + pairs.diagonal()
        gone = gone.clone()
        gone[torch.where(able, gain, torch.inf).argmin()] = True
        if m % e.groups == 0:
            gone = swap(pairs, gone, group)
            sets[m] = gone
        p = gone.to(pairs.dtype)
        loss[n - m] = p @ pairs @ p
    loss[0] = pairs.sum()
    return sets, loss


def swap(pairs: Float[Tensor, "n n"], gone: Shaped[Tensor, " n"], group: Int[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    """The set (n,) after the best swaps, one after the other: −2 (Fp)_i + F_ii + 2 (Fp)_j + F_jj − 2 F_ij for i back, j gone."""
    gone, floor = gone.clone(), 1e-12 * float(pairs.diagonal().abs().sum())
    for _ in range(4 * len(gone)):
        both, own = 2 * pairs @ gone.to(pairs.dtype), pairs.diagonal()
        change = (own - both)[:, None] + (own + both)[None] - 2 * pairs
        change[~(gone[:, None] & ~gone[None] & (group[:, None] == group[None]))] = torch.inf
        at = int(change.argmin())
        if float(change.flatten()[at]) >= -floor:
            break
        gone[at // len(gone)], gone[at % len(gone)] = False, True
    return gone
