"""Ranks by evolution: of plans that move a little from block to block, the one whose model diverges least."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish.calibrate.activations import Activations
from planish.calibrate.losses import divergence
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, read_weights
from planish.core import Edit, Plan, Unit
from planish.plan.problem import Problem, count_left

ROUNDS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)  # steps of a unit's full rank
FARTHEST = 4  # steps that a unit moves in a round
CHILDREN, SURVIVORS = (
    16,
    (4, 2, 1),
)  # of a generation: of them all, and how many are left after each of three lengths of text
PAIRS = (1, 1, 2, 2, 3, 4)  # how many pairs of units a child moves, drawn from these


class Library:
    """The edits of every unit at the ranks that were asked for, solved once from `measure.stored`; in memory up to the limit of
    what is stored, beyond it in an unnamed file."""

    def __init__(self, problem: Problem, measure: Measurements):
        self.problem, self.measure = problem, measure
        self.tensors = Activations(measure.stream.limits.stored)
        self.places: dict[tuple[Unit, int], list[tuple[Edit, dict[str, int]]]] = {}

    def add(self, wanted: Iterable[tuple[Unit, int]]) -> None:
        new: dict[int, dict[Unit, list[int]]] = {}
        for unit, rank in sorted(set(wanted) - set(self.places)):
            new.setdefault(unit.block, {}).setdefault(unit, []).append(rank)
        for i, units in new.items():
            stream, shape = self.measure.stream, self.problem.shapes[i]
            weights, stats = read_weights(stream.block(i), stream), self.measure.stored[i]
            for unit, ranks in units.items():
                solver = self.problem.units[unit]
                frontier = solver.decompose(unit, weights, stats.only(solver.taps(unit, shape)), shape)
                for rank in ranks:
                    self.places[unit, rank] = [
                        self._keep(e, stream.dtype) for e in solver.truncate(frontier, rank, shape)
                    ]

    def _keep(self, edit: Edit, kind: torch.dtype) -> tuple[Edit, dict[str, int]]:
        at = {}
        for name, tensor in edit.tensors.items():
            at[name] = len(self.tensors)
            self.tensors.append(tensor.to(kind) if tensor.is_floating_point() else tensor)
        return replace(edit, tensors={}), at

    def edits(self, plan: Plan) -> dict[int, list[Edit]]:
        """Of a whole plan, per block; they are read when they are asked for here."""
        found: dict[int, list[Edit]] = {}
        for unit, rank in sorted(plan.items()):
            if rank < self.problem.full(unit):
                for edit, at in self.places[unit, rank]:
                    tensors = {name: self.tensors[n] for name, n in at.items()}
                    found.setdefault(unit.block, []).append(replace(edit, tensors=tensors))
        return found


@dataclass
class Trial:
    """A part of the text, and what the uncompressed model makes of it."""

    stream: Stream
    reference: Hidden
    share: float


def evolve(
    problem: Problem, measure: Measurements, start: Plan, passes: float, windows: int, seed: int = 0
) -> tuple[Plan, dict[str, Any]]:
    """The best plan found from `start`, and what was found on the way.

    A child moves one to four pairs of units of the same kind and shape, one down a step and one up, and keeps within all
    budgets. Of 16 children those that diverge least (KL) on one window, then on an eighth of the `windows`, then on all of them
    are left; the last one is the next parent if it is better than the last. Four rounds, each with half the steps of the one
    before, end when together they have spent `passes` forward passes over the windows. Statistics are stored.
    Reference: Týr-the-Pruner (arXiv 2503.09657), which has 128 children and 50 generations a round, on up to 131,072 tokens.
    """
    for i, _, stats in measure.forward(lambda shape: problem.taps(problem.block_units(shape.block))):
        measure.stored[i] = stats.only(problem.taps(problem.block_units(i)))
    library, draw = Library(problem, measure), random.Random(seed)
    trials = list(make_trials(measure.stream, windows))

    def fit(plan: Plan, trial: Trial) -> float:
        library.add((u, r) for u, r in plan.items() if r < problem.full(u))
        return divergence(trial.stream, trial.stream.outputs(library.edits(plan)), trial.reference)

    best, least = start, fit(start, trials[-1])
    first, spent, generations = least, 1.0, 0
    for n, share in enumerate(ROUNDS):
        base = best
        while spent < passes * (n + 1) / len(ROUNDS):
            children = breed(problem, best, base, share, draw)
            if not children:
                break
            for trial, left in zip(trials, SURVIVORS, strict=True):
                losses = [fit(child, trial) for child in children]
                spent += len(children) * trial.share
                order = sorted(range(len(children)), key=losses.__getitem__)
                children = [children[k] for k in order[:left]]
            best, least = (children[0], min(losses)) if min(losses) < least else (best, least)
            generations += 1
            if measure.progress:
                measure.progress("evolution", min(int(spent), int(passes)), int(passes))
    return best, {"first": first, "best": least, "generations": generations, "passes": spent}


def make_trials(stream: Stream, windows: int) -> Iterator[Trial]:
    """One window, an eighth of the windows, all of them: evenly spaced."""
    whole = stream.spread(windows)
    count = sum(map(len, whole.batches))
    for n in (1, max(1, count // 8), count):
        part = whole.spread(n)
        yield Trial(part, part.outputs(), n / count)


def breed(problem: Problem, parent: Plan, base: Plan, share: float, draw: random.Random) -> list[Plan]:
    """Different children within the budgets, as many as are found in four times as many attempts."""
    kinds: dict[Any, list[Unit]] = {}
    mixture = any(u.name == "neurons" for u in parent)  # whose experts are of one width, and that of other blocks
    for unit in sorted(u for u in parent if not (mixture and u.name in ("mlp", "neurons"))):
        kinds.setdefault((unit.name, replace(problem.shapes[unit.block], block=0)), []).append(unit)
    able = [units for units in kinds.values() if len(units) > 1]
    found: dict[tuple[int, ...], Plan] = {}
    for _ in range(4 * CHILDREN if able else 0):
        child = dict(parent)
        for _ in range(draw.choice(PAIRS)):
            down, up = draw.sample(draw.choice(able), 2)
            moved = {down: step(problem, child[down], down, -share), up: step(problem, child[up], up, share)}
            limit = FARTHEST * share * problem.full(down) + 1
            if all(r != child[u] and abs(r - base[u]) <= limit for u, r in moved.items()):
                child |= moved
        within = all(count_left(problem, child, b) <= b.limit * (1 + 1e-12) for b in problem.budgets)
        if child != parent and within:
            found[tuple(child[u] for u in sorted(child))] = child
        if len(found) == CHILDREN:
            break
    return list(found.values())


def step(problem: Problem, rank: int, unit: Unit, share: float) -> int:
    """The admissible rank nearest to one that is this share of the full one away; the same one if there is none that way."""
    choices = problem.choices(unit)
    ranks: Sequence[int] = choices.ranks[choices.allowed(problem.step)].tolist()
    wanted = rank + share * ranks[-1]
    beyond = [r for r in ranks if (r > rank if share > 0 else r < rank)]
    return min(beyond, key=lambda r: abs(r - wanted), default=rank)
