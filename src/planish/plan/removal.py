"""Which submodules go, how many, and what it takes to fit a map in the place of several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import floor
from typing import Literal

import torch
from torch import Tensor

from planish.calibrate.activations import Activations, fetch
from planish.calibrate.collect import collect
from planish.calibrate.measure import Edits, Measured, Measurements
from planish.calibrate.stream import Hidden
from planish.calibrate.taps import tap_sites
from planish.core import Edit, Shape, Unit, Weights
from planish.errors import InputError
from planish.modelling.blocks import get_linear
from planish.modelling.families import Family
from planish.plan.budgets import Budget, make_budget
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.moments import Moments
from planish.stats import Tap

NARROW = "the model is too narrow for it"


def round_half_up(x: float) -> int:
    """7.5 → 8, as the published cache sizes show (30 blocks at 25 %: 240 MiB → 176 MiB)."""
    return floor(x + 0.5 + 1e-9)


def count_removed(
    problem: Problem,
    kinds: Sequence[str],
    sparsity: float | None,
    together: bool = False,
    advice: str = NARROW,
) -> tuple[dict[str, int], dict[str, str]]:
    """(How many units of each kind go, remarks on it).

    `sparsity`: this share of each kind, rounded half up. Otherwise the fewest that bring what the blocks cost, with what
    the replacements add, within the budgets; numbers of two kinds differ by at most one, by none if `together`.
    At least one attention stays. `advice`: see `saving`.
    """
    n = len(problem.shapes)
    limit = {k: n - 1 if k == "attention" or together else n for k in kinds}
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise InputError(
                f"sparsity must lie in [0, 1), got {sparsity:g} (the share of submodules of each type that goes)"
            )
        wanted = round_half_up(sparsity * n)
        found = {k: min(wanted, limit[k]) for k in kinds}
        for kind in (k for k in kinds if found[k]):
            saving(problem, [Unit(0, kind)], advice=advice)  # or the model would grow
        remark = ""
        if wanted == 0 < sparsity:
            remark = f"sparsity {sparsity:g} of {n} blocks is less than half a submodule: nothing goes"
        elif capped := [k for k in kinds if found[k] < wanted]:
            what = "block" if together else capped[0]
            remark = f"sparsity {sparsity:g} of {n} blocks: {n - 1} go, one {what} has to stay"
        return found, {"sparsity": remark} if remark else {}
    saved = {k: saving(problem, [Unit(0, k)], advice=advice) for k in kinds}
    first, last = kinds[0], kinds[-1]
    choices = [
        {first: a} | {last: b if first != last else a}
        for a in range(limit[first] + 1)
        for b in range(limit[last] + 1)
        if first == last or (a == b if together else abs(a - b) <= 1)
    ]
    able = choices
    for b in problem.budgets:
        each = {k: saving(problem, [Unit(0, k)], b) for k in kinds}
        left = {id(c): b.total - sum(c[k] * each[k] for k in kinds) for c in able}
        within = [c for c in able if left[id(c)] <= b.limit]
        if not within:
            raise b.refuse(f"removing {' and '.join(kinds)} of {n} blocks", min(left.values()))
        able = within
    return min(able, key=lambda c: (sum(c[k] * saved[k] for k in kinds), c[first])), {}


def saving(problem: Problem, units: Sequence[Unit], budget: Budget | None = None, advice: str = NARROW) -> float:
    """Weights, or what a budget counts, that go when these units do, net of what their replacements add.

    `advice`: what an error says where no weights would go.
    """
    if budget is not None:
        return sum(problem.cost(u, 1, budget) - problem.cost(u, 0, budget) for u in units)
    saved = sum(problem.count(u, 1) - problem.count(u, 0) for u in units)
    if saved <= 0:
        raise InputError(f"the bypass of {units[0]} would hold as many parameters as what it replaces: {advice}")
    return saved


def find_budgets(problem: Problem, measure: Measurements, sparsity: float | None) -> Sequence[Budget]:
    """What a free choice of submodules has to meet: of a sparsity, as many weights as that share of whole blocks."""
    if sparsity is None:
        return problem.budgets
    share = round_half_up(sparsity * len(problem.shapes)) / len(problem.shapes)
    return [make_budget("keep", 1 - share, measure.source, problem.shapes, problem.context)]


def count_saved(problem: Problem, budgets: Sequence[Budget], units: list[Unit]) -> Tensor:
    """What goes of every budget with these units, net of their bypasses."""
    return torch.tensor([saving(problem, units, b) for b in budgets], dtype=torch.float64)


def remove(planned: Planned, problem: Problem, gone: Sequence[Unit], sparsity: float | None) -> Planned:
    """The plan in which these units go (rank 0) and the others stay (rank 1), with what it amounts to."""
    units, n = planned.solvers, len(problem.shapes)
    problem = replace(problem, units=units)
    before = sum(problem.count(u, 1) for u in set(gone))
    added = sum(problem.count(u, 0) for u in set(gone))
    kept = 1 - (before - added) / sum(s.count() for s in problem.shapes)
    removed = {
        name: {"count": len(blocks), "of": n, "sparsity": len(blocks) / n, "blocks": blocks}
        for name in ("attention", "ffn")
        if (blocks := sorted(u.block for u in set(gone) if u.name == name)) or any(u.name == name for u in units)
    }
    amounts = {
        "removed": removed,
        "sparsity_requested": sparsity,
        "parameters_removed": before,
        "parameters_added": added,
        "keep_net": kept,
    }
    return replace(
        planned,
        ranks={u: 0 if u in set(gone) else 1 for u in units},
        removed=removed,
        keep=None if sparsity is None else kept,
        notes={**planned.notes, **amounts},
    )


def store_removals(problem: Problem, measure: Measurements, taps: Callable[[int], list[Tap]]) -> Measured:
    """A pass over the uncompressed blocks for these taps, by block, and for what removing their units costs, which is stored:
    whatever goes then, nothing is run again."""
    for i, block, stats in measure.forward(lambda shape: [*taps(shape.block), *list_costs(problem, shape)]):
        measure.stored[i] = stats.only(list_costs(problem, measure.shapes[i]))
        yield i, block, stats


def survey_removals(problem: Problem) -> Work:
    """What `store_removals` takes."""
    return Work(taps=partial(list_costs, problem), stored=partial(list_costs, problem))


def list_costs(problem: Problem, shape: Shape) -> list[Tap]:
    return problem.taps(problem.block_units(shape.block))


def pick_some(n: int, counts: Mapping[str, int]) -> list[Unit]:
    """As many units of each kind as go of n blocks, where it is not known yet which: from the last block but one backwards."""
    order = [*reversed(range(n - 1)), n - 1]
    return [Unit(i, kind) for kind, count in counts.items() for i in order[:count]]


def lowest(scores: Mapping[Unit, float], n: int) -> list[Unit]:
    """The n units with the lowest scores."""
    return sorted(scores, key=lambda u: (scores[u], u))[:n]


def merge(*several: Edits) -> dict[int, list[Edit]]:
    """Edits of one model, per block."""
    out: dict[int, list[Edit]] = {}
    for edits in several:
        for i, more in edits.items():
            out.setdefault(i, []).extend(more)
    return out


def remove_blocks(problem: Problem, sparsity: float | None) -> tuple[int, dict[str, str]]:
    """(How many whole blocks go, remarks on it); at least one stays."""
    counts, remarks = count_removed(problem, ("attention", "ffn"), sparsity, together=True)
    return counts["attention"], remarks


def check_foldable(family: Family, name: str) -> None:
    """A map behind the feed-forward can only be folded where nothing stands between it and the residual stream."""
    if family.mlp_post_norm is not None or family.factor:
        what = "norm" if family.mlp_post_norm else "factor"
        raise InputError(
            f"{name} cannot be used with {family.model_type}: a {what} follows the down projection, so no map can be "
            "folded into it; use a method that folds none"
        )


@torch.no_grad()
def compare_windows(measure: Measurements, n: int, windows: int, name: Literal["angle", "cosine"]) -> dict[int, float]:
    """First block → mean angle / π, or cosine, between input and output of the n blocks from there, over all tokens.

    Both are residual streams, never the normed last one. n + 1 sets of activations are kept.
    """
    stream = measure.stream.subset(windows)
    found: dict[int, float] = {}
    tap = Tap("in", "angle", "out")
    with measure.phase("search"):
        hidden = stream.start()
        recent = deque([hidden], maxlen=n + 1)
        for i in range(len(stream)):
            hidden = stream.run(i, stream.place(stream.block(i)), hidden)
            recent.append(hidden)
            if len(recent) == n + 1:

                def pair(m: int, before: Hidden = recent[0], after: Hidden = hidden) -> dict[str, Tensor]:
                    return {"in": before[m], "out": after[m]}

                stats = collect(stream, [tap], pair, measure.shapes[i])
                found[i + 1 - n] = float(stats.mean(tap, name))
            stream.report("search", i + 1, len(stream))
    return found


def foresee_window(planned: Planned, problem: Problem, n: int, sparsity: float | None, windows: int) -> Foreseen:
    """What to expect where n blocks in a row go: runs are compared on so many windows, then a map is fitted on all."""
    gone = pick_some(len(problem.shapes), {"attention": n, "ffn": n})
    last = min((u.block for u in gone), default=0) - 1
    planned = remove(replace(planned, edits={last: ()} if gone else {}), problem, gone, sparsity)
    fit = Work(passes=lambda i: float(i <= last + n))
    return Foreseen(planned, [Work("search", windows), fit] if gone else [])


@dataclass
class Window:
    """What it takes to fit a map behind block `first` to the output of a later block."""

    weights: Weights  # of the first block's down projection
    train: Moments
    held: Moments | None
    x: list[Tensor]  # per batch (tokens, channels), if stored
    f: list[Tensor]


@torch.no_grad()
def fit_window(measure: Measurements, first: int, last: int, site: str, store: bool = False) -> Window:
    """Moments of x = `site` in block `first` and f = output of block `last` − what block `first` puts out but for its
    feed-forward."""
    stream = measure.stream
    with measure.phase("statistics"):
        hidden = stream.start()
        for i in range(first):
            hidden = stream.run(i, stream.place(stream.block(i)), hidden)
        block = stream.block(first)
        down = get_linear(block, stream.family, "down")
        weights = {"down": down.weight.detach()} | ({} if down.bias is None else {"down.bias": down.bias.detach()})
        placed = stream.place(block)
        xs, rest, after = (Activations(stream.limits) for _ in range(3))
        for n, h in enumerate(hidden):
            with tap_sites(placed, stream.family, {site, "mlp.add"}) as seen:
                out = stream.forward(first, placed, h, n)
            xs.append(seen[site].reshape(*h.shape[:2], -1))
            rest.append(out - seen["mlp.add"].view_as(out))
            after.append(out)
        outputs: Hidden = after
        for i in range(first + 1, last + 1):
            outputs = stream.run(i, stream.place(stream.block(i)), outputs)
        taps = [Tap("x", "moments", "f", part=part) for part in ("fit", "held")]

        def pair(m: int) -> dict[str, Tensor]:
            x, out, before = (fetch(t, m, stream.device) for t in (xs, outputs, rest))
            return {"x": x, "f": out - before}

        stats = collect(stream, taps, pair, measure.shapes[first])
        train, held = (Moments.read(stats, tap) for tap in taps)
        assert train is not None
    if not store:
        return Window(weights, train, held, [], [])
    f = [(out - r).flatten(0, 1) for r, out in zip(rest, outputs, strict=True)]
    return Window(weights, train, held, [x.flatten(0, 1) for x in xs], f)
