"""Large matrices may be computed with elsewhere: the same results, on the CPU again, and on the CPU where they do not fit."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch

import tiny
from accelerator import COPIES, DEVICE, Simulate, There, solving_there
from planish import stats
from planish.calibrate import activations, stream
from planish.calibrate.activations import Activations, MemoryLimits, fetch
from planish.folder.safetensors import hash_file
from planish.methods import list_methods
from planish.plan import frontiers
from planish.solvers import linalg, offload
from planish.stats import Stats, Tap
from planish.walks.solve import Walk
from tiny import compress

WINDOWS = tiny.windows(8, 24)
KEEP = {"nbl": 0.85, "palu": 0.85}  # what cuts attention alone cannot go lower


@contextmanager
def elsewhere(monkeypatch, large=0):
    """As if the CPU were an accelerator: everything goes the way that it would go."""
    monkeypatch.setattr(offload, "LARGE", large)
    token = offload._device.set(torch.device("cpu"))
    try:
        yield
    finally:
        offload._device.reset(token)


def draw(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_only_large_tensors_go_there(monkeypatch):
    gone = []
    move = offload.move
    monkeypatch.setattr(offload, "move", lambda value, device: gone.append(value) or move(value, device))
    gram = draw(40, 9).T @ draw(40, 9)
    linalg.root(gram)
    with elsewhere(monkeypatch, large=82):
        linalg.root(gram)
    assert not gone, "nobody asked, and nobody with matrices of this size"
    with elsewhere(monkeypatch, large=81):
        there = linalg.root(gram, damping=0.1)
    assert gone and torch.equal(there, linalg.root(gram, damping=0.1))


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_no_device_without_fp64(device):
    """mps has none, a cuda device may be planned for where there is none."""
    with offload.offload(device):
        assert (offload._device.get() is not None) == (device == "cuda" and torch.cuda.is_available())
    assert offload._device.get() is None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), torch.linalg.LinAlgError(), RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")],
    ids=str,
)
def test_what_fails_there_is_computed_here(error, monkeypatch):
    calls = []

    @offload.offloaded
    def double(x, much=True):
        calls.append((much, sys.exc_info()[0]))
        if len(calls) == 1:
            raise error
        return x + x, None

    with elsewhere(monkeypatch):
        found, nothing = double(torch.ones(3), much=True)
    assert calls == [(True, None)] * 2, "the second time without the error, which would hold what was made there"
    assert found.tolist() == [2, 2, 2] and nothing is None


def test_other_errors_are_not_hidden(monkeypatch):
    @offload.offloaded
    def fail(x):
        raise RuntimeError("shapes do not match")

    with elsewhere(monkeypatch), pytest.raises(RuntimeError, match="shapes"):
        fail(torch.ones(3))


ALL = [("llama_gqa", m) for m in list_methods() if m not in ("reap", "hope")]
MORE = [("qwen3_moe", m) for m in ("auto", "reap", "hope", "modegpt")] + [
    ("gemma2", "auto"),
    ("qwen2", "a3"),
    ("gpt2", "auto"),
]


@pytest.mark.parametrize(
    ("family", "method"), tiny.pick([("llama_gqa", m) for m in ("auto", "flat-llm", "io-svd")], ALL + MORE)
)
def test_results_are_the_same_files(family, method, tmp_path, monkeypatch):
    """All that solving makes on the way is made where the rest is: the simulated accelerator refuses what is not."""
    model = tiny.build(family)
    compress(model, output=tmp_path / "here", keep=KEEP.get(method, 0.7), method=method, windows=WINDOWS)
    monkeypatch.setattr("planish.compression.offload", lambda device: solving_there(monkeypatch))
    compress(model, output=tmp_path / "there", keep=KEEP.get(method, 0.7), method=method, windows=WINDOWS)
    here, there = ([hash_file(p) for p in sorted((tmp_path / n).glob("*.safetensors"))] for n in ("here", "there"))
    assert here and here == there


@pytest.mark.parametrize("method", ["flat-llm", "a3", "auto"])
def test_units_are_solved_there(method, tmp_path, monkeypatch):
    """Of the numbers that solving makes, where every unit goes there, next to none is made on the CPU but what comes back."""
    seen = []

    def watch(function):
        def call(*args):
            with solving_there(monkeypatch) as counts:
                seen.append(counts)
                return function(*args)

        return call

    monkeypatch.setattr(Walk, "solve_units", watch(Walk.solve_units))
    monkeypatch.setattr(frontiers, "decompose_block", watch(frontiers.decompose_block))
    compress(tiny.build("llama_gqa"), output=tmp_path / "out", keep=0.7, method=method, windows=WINDOWS)
    here = sum(n for counts in seen for name, n in counts.here.items() if name not in COPIES)
    there = sum(n for counts in seen for n in counts.there.values())
    assert there > 50_000 and here < 0.05 * there, f"{here:,} numbers here, {there:,} there"


def test_a_unit_that_does_not_fit_is_solved_here(monkeypatch):
    """With what is there untouched, though a solve may use it up."""
    tap, device = Tap("down.in", "gram"), []
    known = Stats()
    known.sums, known.tokens = {tap: {"sum": draw(9, 9)}}, {tap: 3}
    kept = known.sums[tap]["sum"].clone()

    def solve(weights, stats):
        gram = stats.sums[tap].pop("sum")
        device.append(gram.device.type)
        gram.zero_()
        if len(device) == 1:
            raise torch.OutOfMemoryError
        return {"kept": [weights["down"] + 1]}, 3

    with solving_there(monkeypatch, large=81):
        found, three = offload.solve_there(solve, {"down": torch.ones(2)}, known, [tap])
    assert device == [DEVICE.type, "cpu"] and three == 3 and found["kept"][0].tolist() == [2, 2]
    known.sums = {tap: {"sum": kept}}
    with solving_there(monkeypatch, large=81):
        add = lambda w, s: (s.sums[tap]["sum"] + w["down"].sum(), s.sums[tap]["sum"].device.type)  # noqa: E731
        found, place = offload.solve_there(add, {"down": draw(2)}, known, [tap])
        here = offload.solve_there(add, {"down": draw(2)}, known, [Tap("o.in", "gram")])[1]
    assert (place, here) == (DEVICE.type, "cpu"), "a unit whose own sums are small stays"
    assert type(found) is torch.Tensor and torch.equal(found, kept + draw(2).sum())
    assert torch.equal(known.sums[tap]["sum"], kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", list(list_methods()))
def test_results_on_cuda_are_close(method, tmp_path, monkeypatch):
    """The whole run there, with every factorisation, against the CPU: nearly the same predictions."""
    from planish import load

    monkeypatch.setattr(offload, "LARGE", 0)
    model = tiny.build("llama_gqa")
    logits = []
    for device in ("cpu", "cuda"):
        compress(
            model,
            output=tmp_path / device,
            keep=KEEP.get(method, 0.7),
            method=method,
            windows=WINDOWS,
            device=device,
            dtype=torch.float32,
        )
        with torch.no_grad():
            logits.append(load(tmp_path / device, dtype="float32", device="cpu")(WINDOWS).logits)
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.02, f"{error:.2g}"


def test_activations_stay_near_up_to_a_limit():
    """On an accelerator up to `near` bytes, a slice without what it was cut from; the rest of them goes on."""
    limits = MemoryLimits(limit=1 << 20)
    limits.device_limit = 100
    kept = Activations(limits, (torch.empty(5, device="meta") for _ in range(4)))
    kept.append(torch.empty(100, device="meta")[:5])
    assert limits.device_used == 100 and limits.used == 0 and all(kept.read(n).is_meta for n in range(5))
    assert kept.read(4).untyped_storage().nbytes() == 20
    kept.append(torch.ones(5))  # the CPU's stay where they are
    assert limits.used == 20 and fetch(kept, 5, torch.device("cpu")).sum() == 5
    with pytest.raises(NotImplementedError, match="meta"):  # no room left there, and this one has nothing to copy
        kept.append(torch.empty(1, device="meta"))
    del kept
    assert limits.device_used == limits.used == 0


class Late:
    """Copies that are not complete before they are waited for; `log` of what was started and waited for."""

    def __init__(self):
        self.log = []

    def copy(self, name, tensor, made):
        number = float(tensor.reshape(-1)[0])
        self.log.append(f"{name} {number:g}")
        return lambda: self.log.append(f"{name} {number:g} done") or made()

    def bring(self, tensor):
        return self.copy("here", tensor.here, lambda: tensor.here.clone())

    def send(self, tensor):
        return self.copy("there", tensor, lambda: There(tensor.clone()))


@pytest.mark.parametrize("limit", [1 << 20, 40, 0])
def test_copies_go_on_while_the_device_computes(limit, monkeypatch, tmp_path):
    """The last tensor comes while the next is made, the next one goes while one is used; in memory, in a file or in both."""
    late = Late()
    monkeypatch.setattr(activations, "find_copies", lambda device: late if device == DEVICE else None)
    kept = Activations(MemoryLimits(limit=limit, folder=tmp_path))
    with Simulate():
        for n in range(3):
            kept.append(There(torch.full((2, 4), float(n))))
            assert late.log[-1] == f"here {n}" and len(kept) == n + 1
    assert late.log == ["here 0", "here 0 done", "here 1", "here 1 done", "here 2"]
    assert kept[2].tolist() == [[2.0] * 4] * 2 and late.log[-1] == "here 2 done"
    late.log.clear()
    with Simulate():
        for n in (0, 1, 2, 0, 1, 2):
            found = fetch(kept, n, DEVICE)
            assert isinstance(found, There) and torch.equal(found.here, torch.full((2, 4), float(n)))
    once = ["there 0", "there 0 done", "there 1", "there 1 done", "there 2", "there 2 done"]
    assert late.log == once + once
    assert torch.equal(fetch(kept, 1, DEVICE).here, kept[1]) and fetch(kept, 0, DEVICE).here.sum() == 0, "in any order"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_copies_on_cuda_are_exact():
    device = torch.device("cuda")
    kept = Activations(MemoryLimits())
    tensors = [torch.randn(64, 513, device=device) for _ in range(9)]
    for t in tensors:
        kept.append(t.T)
    assert all(kept.read(n).is_cpu for n in range(9))
    for n, t in enumerate(tensors):
        assert torch.equal(fetch(kept, n, device), t.T) and torch.equal(kept[n], t.T.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", list(list_methods()))
def test_where_activations_lie_changes_nothing(method, tmp_path, monkeypatch):
    """All of them there, a few of them, none: the same files."""
    monkeypatch.setattr(stats, "WIDE", 0)  # inputs of all Grams are kept
    monkeypatch.setattr(stream, "BATCH", 48)
    model, found = tiny.build("llama_gqa"), []
    for near in (1 << 30, 20_000, 0):
        monkeypatch.setattr(
            MemoryLimits,
            "device_limit",
            property(lambda limits, near=near: near, lambda limits, value: None),
            raising=False,
        )
        out = tmp_path / str(near)
        compress(
            model,
            output=out,
            keep=KEEP.get(method, 0.7),
            method=method,
            windows=WINDOWS,
            device="cuda",
            dtype=torch.float32,
        )
        found.append([hash_file(p) for p in sorted(out.glob("*.safetensors"))])
    assert found[0] and found[0] == found[1] == found[2]
