"""What cuts of queries and keys cost, measured where the prediction cannot be trusted.

A cut makes the error e (channels) in the attention's output; with the gradient's second moment G there, the loss rises by

    Δ ≈ ½ E[(gᵀ e)²] = ½ tr(G E[e eᵀ]),    G = E[g gᵀ],

in nats per token. What scores do to e is only a first derivative in the prediction: where the softmax is sharp it is nearly
zero, however much what is cut decides. So E[e eᵀ] is measured at a few ranks, and other ranks' predictions change by the
factor between the two, log-linear in the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from planish import lanes
from planish.calibrate.cache import describe
from planish.calibrate.collect import Run, capture, measure_block
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import in_order, read_weights
from planish.core import Frontier, Unit, Weights
from planish.modelling.families import ATTENTION
from planish.plan.cuts import Cut, cut_unit
from planish.plan.follow import TINY, follow
from planish.plan.foreseen import Work
from planish.plan.frontiers import SITE, Frontiers
from planish.plan.problem import Problem
from planish.stats import Stats, Tap

Kind = tuple[str, ...]  # names of units of one block that are cut together
Group = tuple[Unit, ...]
SCORES: dict[Kind, tuple[tuple[float, ...], int]] = {  # shares of ranks at which errors are measured, windows on which
    ("q", "k"): ((0.125, 0.25, 0.5), 4),
    ("qk",): ((0.125, 0.25, 0.5, 0.75), 8),
    ("keys",): ((0.125, 0.25, 0.5, 0.75), 8),
}


def correct_scores(problem: Problem, measure: Measurements, frontiers: Frontiers, kinds: Set[Kind]) -> Frontiers:
    """The frontiers of these kinds of units, corrected by the error that their cuts make in the attention's output.

    Low-rank queries and keys are cut together and have one factor, at least 1: their errors meet in one product. Cuts and
    the gradient's moment are those of `measure.stored`.
    """
    wanted = {g: ranks for kind in SCORES if kind in kinds for g, ranks in list_ranks(problem, frontiers, kind).items()}
    cache, origins = measure.cache, measure.stored.origin
    names = {g: f"{origins(g[0].block)} {name_factor(problem, g, ranks)}" for g, ranks in wanted.items()}
    factors = {g: cache.get(n)["factor"] for g, n in names.items() if cache.has([n])}  # log of measured / predicted
    for kind, (_, windows) in SCORES.items():
        rest = {g: ranks for g, ranks in wanted.items() if g not in factors and g[0].name in kind}
        for group, pairs in cut_errors(problem, measure, rest, SITE, windows).items() if rest else ():
            g = measure.stored[group[0].block].mean(Tap(f"grad:{SITE}", "gram"))
            measured = torch.stack([(g * ee).sum() / 2 for _, ee in pairs])  # ½ tr(G E[e eᵀ])
            predicted = torch.tensor([loss for loss, _ in pairs], dtype=torch.float64)
            factor = (measured.clamp(min=TINY) / predicted.clamp(min=TINY)).log()
            factors[group] = factor if len(kind) == 1 else factor.clamp(min=0)
        cache.keep({names[g]: {"factor": factors[g]} for g in rest})
    found: Frontiers = {}
    for group, factor in factors.items():
        for n, unit in enumerate(group):
            frontier, at = frontiers[unit], torch.tensor([ranks[n] for ranks in wanted[group]])
            loss = follow(torch.as_tensor(frontier.loss, dtype=torch.float64), at, factor)
            by_tokens = None if frontier.by_tokens is None else follow(frontier.by_tokens, at, factor)
            found[unit] = replace(frontier, loss=loss, by_tokens=by_tokens)
    return found


def foresee_errors(problem: Problem, kind: Kind, windows: int) -> Work:
    """The walk that measures the errors of one kind of units: a pass to the end, and one to the output projection per rank."""
    shares, few = SCORES[kind]
    solvers = {u: s for u, s in problem.units.items() if u.name in kind}

    def count(i: int) -> float:
        upto = problem.shapes[i].count(*ATTENTION) / problem.shapes[i].count()
        return 1 + (len(shares) + 1) * upto

    return Work("scores", min(few, windows), count, solvers=solvers, cuts=lambda i: 1.0)


def list_ranks(problem: Problem, frontiers: Mapping[Unit, Frontier], kind: Kind) -> dict[Group, list[tuple[int, ...]]]:
    """Units of one kind that are cut together, per block, and the ranks at which their errors are to be measured."""
    found: dict[Group, list[tuple[int, ...]]] = {}
    for block in range(len(problem.shapes)):
        group = tuple(u for n in kind if (u := Unit(block, n)) in frontiers)
        ranks = [problem.choices(u).ranks[:-1].tolist() for u in group]
        if group and all(ranks):
            found[group] = sorted({tuple(r[round(s * (len(r) - 1))] for r in ranks) for s in SCORES[kind][0]})
    return found


def name_factor(problem: Problem, group: Group, ranks: list[tuple[int, ...]]) -> str:
    """Under which the cache keeps a group's factors."""
    parts = (f"{describe(problem.units[u])}|{u}|{[r[n] for r in ranks]}" for n, u in enumerate(group))
    return "scores|" + "|".join(parts)


def cut_errors(
    problem: Problem, measure: Measurements, wanted: Mapping[Group, Sequence[Sequence[int]]], site: str, windows: int
) -> dict[Group, list[tuple[float, Tensor]]]:
    """For units of one block cut together to such ranks, and nothing else, what they are predicted to lose and E[e eᵀ]
    (channels, channels) of the error e that they really make at `site` of the block: on `windows` calibration windows,
    evenly spaced, of the uncompressed model.

    Cuts and predictions are those of the statistics in `measure.stored`; what the units' frontiers need beside it is measured
    on the same few windows. One run of the block up to the site per entry.
    """
    stream = measure.stream
    few = stream.spread(windows)
    few = few.part(torch.cat(few.batches), stream.dtype)  # or small errors drown in those of coarser products
    hidden = few.start()
    found: dict[Group, list[tuple[float, Tensor]]] = {}
    for i, shape in enumerate(problem.shapes):
        block, groups = stream.block(i), [g for g in wanted if g[0].block == i]
        placed, weights, units = few.place(block), read_weights(block, stream), {u for g in groups for u in g}
        taps = {t for u in units for t in problem.units[u].dense_taps(u, shape)}
        stats = measure.stored[i].only(taps)
        if rest := sorted(taps - set(stats.sums)):
            stats.merge(measure_block(few, i, placed, rest, hidden, Run(placed, hidden), outputs=False)[0])
        with measure.phase("frontiers"):
            own = {u: {ranks[g.index(u)] for g in groups if u in g for ranks in wanted[g]} for u in sorted(units)}
            made = cut_units(problem, weights, stats, own)
        seen, after = capture(few, i, placed, {site} if groups else set(), hidden)
        for group in groups:
            for ranks in wanted[group]:
                cuts = dict(zip(group, ranks, strict=True))
                edits = [e for u, r in cuts.items() for e in made[u][r].edits]
                cut = few.place(stream.block(i, edits))
                other, _ = capture(few, i, cut, {site}, hidden, outputs=False)
                errors = [(a - b).flatten(0, -2).double() for a, b in zip(other[site], seen[site], strict=True)]
                sums = in_order(few, [(e.T @ e, len(e)) for e in errors])
                mean = torch.stack([m for m, _ in sums]).sum(0) / sum(n for _, n in sums)
                predicted = sum(made[u][r].loss for u, r in cuts.items())
                found.setdefault(group, []).append((predicted, mean))
        hidden = after
        few.report("scores", i + 1, len(few))
    return found


def cut_units(
    problem: Problem, weights: Weights, stats: Stats, wanted: Mapping[Unit, Set[int]]
) -> dict[Unit, dict[int, Cut]]:
    """Cuts of units of one block, each to its ranks; several processes share the units out."""

    def cut(unit: Unit) -> dict[int, Cut]:
        return cut_unit(problem, unit, wanted[unit], weights, stats)

    return dict(zip(wanted, lanes.share_out(list(wanted), problem.count, cut), strict=True))
