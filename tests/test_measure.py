"""Statistics handed out block by block, and the solve that goes by them."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
import torch

import tiny
from planish.calibrate.cache import Cache
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream
from planish.core import Shape, Unit
from planish.dry_run import look_ahead
from planish.dry_run.passes import count_passes
from planish.folder.source import MemorySource
from planish.methods import find_method
from planish.request import Request
from planish.stats import Tap
from planish.walks.solve import solve
from posed import pose_on

TAP, BACK = Tap("o.in", "gram"), Tap("grad:o.out", "gram")


def stream(family: str = "llama_gqa", **more) -> Stream:
    return Stream(MemorySource(tiny.build(family, **more)), tiny.windows(40, 24))


def only(tap: Tap, *blocks: int):
    """What to measure: one tap of some blocks."""

    def taps(shape: Shape) -> list[Tap]:
        return [tap] if shape.block in blocks else []

    return taps


@pytest.mark.parametrize("back", [False, True])
def test_blocks_come_in_order_and_are_emptied_behind_the_loop(back):
    measure = Measurements(stream())
    walk, tap = (measure.backward, BACK) if back else (measure.forward, TAP)
    seen, order = [], []
    for i, block, stats in walk(only(tap, 0, 1, 2)):
        assert all(not s.sums and not list(b.parameters()) for b, s in seen), "what came before is gone"
        assert stats.tokens[tap] == 40 * 24 and list(block.parameters())
        seen.append((block, stats))
        order.append(i)
    assert order == ([2, 1, 0] if back else [0, 1, 2])
    assert all(not s.sums for _, s in seen)


def test_what_the_cache_has_is_not_measured_again(monkeypatch):
    cache, starts = Cache(memory=1 << 30), []
    s, start = stream(), Stream.start
    monkeypatch.setattr(Stream, "start", lambda self: starts.append(1) or start(self))

    def grams(*blocks: int) -> dict[int, torch.Tensor]:
        measure = Measurements(s, cache)
        found = {i: stats.only([TAP]) for i, _, stats in measure.forward(only(TAP, *blocks))}
        return {i: f.sums[TAP]["sum"] for i, f in found.items() if f.sums}

    first = grams(0, 1)
    again, more = grams(0, 1), grams(0, 1, 2)
    assert len(starts) == 2 and set(more) == {0, 1, 2}
    for i, gram in first.items():
        assert torch.equal(gram, again[i]) and torch.equal(gram, more[i])


def test_phases_add_up_to_the_time_that_passed():
    measure = Measurements(stream())
    start = time.perf_counter()
    with measure.phase("outer"):
        for _ in measure.forward(only(TAP, 0)):
            with measure.phase("inner"):
                time.sleep(0.01)
    passed = time.perf_counter() - start
    assert set(measure.seconds) == {"outer", "statistics", "sums", "inner"} and measure.seconds["inner"] >= 0.03
    assert 0.9 * passed - 0.01 <= sum(measure.seconds.values()) <= passed


def test_errors_do_not_depend_on_what_an_earlier_plan_has_cut():
    """Statistics behind a block that the cache knows are the uncompressed model's, also where that block is cut."""
    cache, found = Cache(memory=1 << 30), []
    units = [[Unit(i, n) for i in blocks for n in ("attention", "ffn")] for blocks in ((1,), (1, 3))]
    for shared, gone in ((cache, units[0]), (cache, units[1]), (None, units[1])):
        job = pose_on(stream(num_hidden_layers=5), "shortgpt", 0.9, cache=shared)
        ranks, errors = {u: 0 if u in gone else 1 for u in job.problem.units}, dict[str, float]()
        solve(job.problem, job.measure, job.method.decide(job.problem, ranks), lambda i, b, s, e: errors.update(e))  # noqa: B023
        found.append(errors)
    assert set(found[0]) < set(found[1]) == set(found[2])
    assert found[1] == pytest.approx(found[2], rel=1e-6)


@pytest.mark.parametrize("method", ["flat-llm", "a3", "mpifa"])
def test_nothing_is_run_behind_the_last_block_that_is_cut(method, monkeypatch):
    """Nor anything at all where none is."""
    ran, forward = [], Stream.forward
    s = stream("llama_gqa", num_hidden_layers=4)

    def watch(self, i, *args, **kwargs):
        ran.append(i)
        return forward(self, i, *args, **kwargs)

    job = pose_on(s, find_method(method), 0.9)
    full = {u: job.problem.full(u) for u in job.problem.units}
    monkeypatch.setattr(Stream, "forward", watch)
    solve(job.problem, job.measure, job.method.decide(job.problem, full), lambda *args: None)
    assert not ran
    unit = next(u for u in job.problem.units if u.block == 1)
    less = full | {unit: job.problem.units[unit].ranks(unit, job.problem.shapes[1])[0]}
    solve(job.problem, job.measure, job.method.decide(job.problem, less), lambda *args: None)
    assert ran and max(ran) == 1


@pytest.mark.parametrize("method", ["shortgpt", "llm-drop"])
def test_what_goes_whole_is_chosen_and_priced_in_one_pass(method, tmp_path, monkeypatch):
    forward, runs = Stream.forward, Counter()

    def count(self, i, block, hidden, n):
        runs[i] += 1
        return forward(self, i, block, hidden, n)

    monkeypatch.setattr(Stream, "forward", count)
    tiny.compress(
        tiny.build("llama_gqa"), output=tmp_path / "out", windows=tiny.windows(8, 24), method=method, keep=0.6
    )
    assert set(runs.values()) == {1} and len(runs) == 3
    found = json.loads((tmp_path / "out" / "planish.json").read_text())
    gone = {u for u, rank in found["plan"].items() if rank == 0}
    assert gone and gone == set(found["errors"]) and min(found["errors"].values()) > 0
    request, source = Request.ask(model="", keep=0.6, device="cpu"), MemorySource(tiny.build("llama_gqa"))
    run = look_ahead(request, find_method(method), source, (8, 24))
    assert [count_passes(run, i) for i in range(3)] == [(0.0, [])] * 3
