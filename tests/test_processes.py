"""One, two or four processes: the same plan and the same weights, byte for byte."""

from __future__ import annotations

import os
import socket

import pytest
import torch

import tiny
from planish import lanes
from planish.calibrate.collect import measure_block
from planish.calibrate.stream import Stream
from planish.core import Unit
from planish.folder.source import MemorySource
from planish.methods import find_method
from planish.plan import scores
from planish.stats import Stats, Tap
from posed import pose_on
from test_resume import fork, hashes, one_thread, wait  # noqa: F401
from tiny import compress

WINDOWS = torch.randint(0, 90, (700, 64), generator=torch.Generator().manual_seed(0))  # six batches, two lanes empty


def launch(count: int, task) -> None:
    """Run a task in several processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in world.items()})
        torch.set_num_threads(1)
        task()

    children = [fork(lambda rank=rank: one(rank)) for rank in range(count)]
    assert [wait(child) for child in children] == [0] * count


@pytest.mark.parametrize(
    "method",
    [
        "flat-llm",
        pytest.param("svd-llm", marks=pytest.mark.slow),
        pytest.param("auto", marks=pytest.mark.slow),
        pytest.param("erc-svd", marks=pytest.mark.slow),
        pytest.param("asvd", marks=pytest.mark.slow),
    ],
)
def test_same_weights_for_any_number_of_processes(method, tmp_path):
    model = tiny.save(tiny.build(tiny.NAMES[0]), tmp_path / "model")
    for count in (1, 2, 4):
        launch(
            count, lambda n=count: compress(model, output=tmp_path / str(n), keep=0.7, method=method, windows=WINDOWS)
        )
    one = hashes(tmp_path / "1")
    assert hashes(tmp_path / "2") == one
    assert hashes(tmp_path / "4") == one


def test_cuts_to_measure_are_solved_once_among_processes(tmp_path):
    """Errors of cut queries and keys: no process works out what another one does, and all know the same bits."""

    def task(count: int) -> None:
        lanes.start()
        stream = Stream(MemorySource(tiny.build(tiny.NAMES[0])), WINDOWS[:64])
        job = pose_on(stream, find_method("auto"), 0.6)
        job.method.measure(job.problem, job.measure)
        solved = []
        for kind in {type(s) for s in job.problem.units.values()}:
            old = kind.decompose
            kind.decompose = lambda self, unit, *a, old=old: solved.append(unit) or old(self, unit, *a)
        pair = (Unit(1, "q"), Unit(1, "k"))
        found = scores.cut_errors(job.problem, job.measure, {pair: [(3, 2), (7, 5)]}, "o.out", 4)
        torch.save((solved, found[pair]), tmp_path / f"{count}-{lanes.rank()}")

    for count in (1, 2):
        launch(count, lambda n=count: task(n))
    (all_units, one), *others = (torch.load(tmp_path / n, weights_only=False) for n in ("1-0", "2-0", "2-1"))
    assert sorted(all_units) == [Unit(1, "k"), Unit(1, "q")] and all(e.any() for _, e in one)
    assert sorted(u for solved, _ in others for u in solved) == sorted(all_units)
    for _, found in others:
        assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(one, found, strict=True))


def test_lanes_add_up_to_plain_sums(tiny_llama):
    """Statistics by lanes = one Gram over all tokens."""
    stream = Stream(MemorySource(tiny_llama(max_position_embeddings=64)), WINDOWS)
    assert len(stream.batches) == 22  # of 2048 tokens, over eight lanes
    hidden, tap = stream.start(), Tap("block.in", "gram")
    stats, _ = measure_block(stream, 0, stream.place(stream.block(0)), [tap], hidden)
    x = torch.cat([h.flatten(0, 1) for h in hidden]).double()
    torch.testing.assert_close(stats.sums[tap]["sum"], x.T @ x, rtol=1e-12, atol=1e-9)
    assert stats.tokens[tap] == len(x)


def test_tiled_gram_is_the_plain_one():
    x = torch.randn(1500, 700)
    stats, tap = Stats([Tap("q.in", "gram")]), Tap("q.in", "gram")
    stats.update({"q.in": x})
    stats.update({"q.in": x})
    gram = stats.sums[tap]["sum"]
    torch.testing.assert_close(gram, 2 * x.double().T @ x.double(), rtol=1e-12, atol=1e-9)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_task_has_one_owner(count, monkeypatch):
    monkeypatch.setattr(lanes, "count", lambda: count)
    costs, found = [5, 1, 1, 7, 3, 3], []
    for rank in range(count):
        monkeypatch.setattr(lanes, "rank", lambda r=rank: r)
        found += lanes.own_work(costs)
    assert sorted(found) == list(range(len(costs)))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 22, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_no_process_is_left_without_batches(n, count, monkeypatch):
    """Lanes are contiguous runs of batches, as many as there can be, and processes differ by one lane at most."""
    found = [lanes.find_lane(i, n) for i in range(n)]
    assert found == sorted(found) and set(found) == set(range(min(n, lanes.LANES)))
    monkeypatch.setattr(lanes, "count", lambda: count)
    own = []
    for rank in range(count):
        monkeypatch.setattr(lanes, "rank", lambda r=rank: r)
        own.append(len(set(found) & set(lanes.own_lanes())))
    assert sum(own) == len(set(found)) and max(own) - min(own) <= 1
