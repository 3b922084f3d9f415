"""Ranks by evolution (a3, allocation=evolved): what is compared, what children are, what is found."""

from __future__ import annotations

import random

import pytest
import torch

import tiny
from planish.calibrate.losses import divergence
from planish.calibrate.stream import Stream
from planish.core import Plan
from planish.folder.source import MemorySource
from planish.plan import evolve as evolution
from planish.plan.evolve import Library, breed, evolve, step
from planish.walks.solve import run_solved
from posed import Posed, pose_on

WINDOWS = tiny.windows(12, 24)


def job(keep: float = 0.7, settings: dict[str, str] | None = None, **more: int) -> Posed:
    s = Stream(MemorySource(tiny.build("llama_gqa", torch.float64)), WINDOWS, dtype=torch.float64)
    return pose_on(
        s, "a3", keep, settings={"allocation": "evolved", "passes": "8", "probes": "4"} | (settings or {}), **more
    )


def uniform(j: Posed) -> Plan:
    return j.problem.spread(lambda unit: 1.0, True)


def fit(j: Posed, plan: Plan) -> float:
    """The solved model's divergence on four windows, without a library."""
    few = j.measure.stream.spread(4)
    return divergence(few, run_solved(j.problem, j.measure, j.method.decide(j.problem, plan), few), few.outputs())


def test_the_library_holds_what_a_solve_makes():
    j = job()
    plan = uniform(j)
    for i, _, stats in j.measure.forward(lambda shape: j.problem.taps(j.problem.block_units(shape.block))):
        j.measure.stored[i] = stats.only(j.problem.taps(j.problem.block_units(i)))
    library = Library(j.problem, j.measure)
    library.add(plan.items())
    s = j.measure.stream
    expected = run_solved(j.problem, j.measure, j.method.decide(j.problem, plan), s)
    for a, b in zip(s.outputs(library.edits(plan)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    places = dict(library.places)
    library.add(plan.items())
    assert library.places == places  # nothing is made twice


@pytest.mark.parametrize("round_to", [1, 4])
def test_children_move_in_pairs_and_keep_to_the_budget(round_to):
    j = job(step=round_to)
    parent, draw = uniform(j), random.Random(1)
    children = breed(j.problem, parent, parent, 1 / 8, draw)
    assert len({tuple(sorted(c.items())) for c in children}) == len(children) > 4
    for child in children:
        assert j.left(child) >= 0 and child != parent
        for name in ("qk", "vo", "mlp"):
            own = {u: child[u] - parent[u] for u in parent if u.name == name}
            assert sum(d > 0 for d in own.values()) <= 4 and any(own.values()) == (
                len([d for d in own.values() if d]) > 1
            )
        for u, r in child.items():
            assert abs(r - parent[u]) <= 4 * j.problem.full(u) / 8 + 1
            assert r in (j.problem.full(u), 1) or r % round_to == 0


def test_a_step_is_the_nearest_rank_that_way():
    j = job(step=4)
    (unit, *_) = (u for u in j.problem.units if u.name == "mlp")
    assert [step(j.problem, 20, unit, s) for s in (1 / 8, -1 / 8, 1 / 64, -1 / 64)] == [24, 16, 24, 16]
    assert step(j.problem, 44, unit, 1 / 8) == 44 and step(j.problem, 4, unit, -1 / 2) == 4


@pytest.mark.slow
def test_evolution_finds_a_plan_that_diverges_less(monkeypatch):
    """Less than the uniform one that it starts from, measured anew on solved models; the same again; within its passes."""
    monkeypatch.setattr(evolution, "CHILDREN", 6)
    j = job(settings={"passes": "14"})
    planned = j.plan()
    notes = planned.notes["evolved"]
    assert notes["first"] == pytest.approx(fit(j, uniform(j)), rel=1e-6)
    assert notes["best"] == pytest.approx(fit(j, planned.ranks), rel=1e-6) and notes["best"] < notes["first"]
    assert j.left(planned.ranks) >= 0 and notes["generations"] == 3
    assert notes["passes"] < 14 + 6 * (1 / 4 + 1 / 4) + 2 * 4
    assert job(settings={"passes": "14"}).plan().ranks == planned.ranks


def test_without_passes_the_start_stays():
    j = job()
    found, notes = evolve(j.problem, j.measure, uniform(j), 0.5, 4)
    assert found == uniform(j) and notes["generations"] == 0 and notes["first"] == notes["best"]
