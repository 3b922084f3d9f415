"""Experts whose weights stay in their file while a block runs, is solved and is written."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from planish.calibrate.collect import measure_block
from planish.calibrate.measure import measure_back
from planish.calibrate.stream import Stream, read_weights
from planish.compression import resume
from planish.dry_run import seconds
from planish.folder import stored_linear
from planish.folder.model_folder import ModelFolder
from planish.folder.source import open_source
from planish.folder.stored_linear import StoredLinear, count_held
from planish.stats import Tap
from posed import pose_on
from tiny import compress

WINDOWS = tiny.windows(6, 12)
NEVER = 1 << 60
MODELS = (
    "qwen3_moe",
    "granitemoe",
    "deepseek_v3",
    "gpt_oss",
)  # linears one by one, stacked, beside dense blocks, with biases


def find_stored(block: torch.nn.Module) -> list[StoredLinear]:
    return [m for m in block.modules() if isinstance(m, StoredLinear)]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_statistics_and_gradients_are_those_of_the_whole_block(name, kind, tmp_path, monkeypatch):
    stream = Stream(open_source(tiny.save(tiny.build(name, kind), tmp_path / "m")), WINDOWS)
    last = len(stream) - 1
    taps = [Tap(s, "gram") for s in ("experts.gates", "expert.1.down.in", "expert.1.up.out", "block.out")]
    back = [Tap("grad:expert.1.down.out", "gram"), Tap("grad:block.in", "gram")]
    found = []
    for limit in (NEVER, 0):
        monkeypatch.setattr(stored_linear, "APART", limit)
        block, hidden = stream.block(last), stream.start()
        assert bool(find_stored(block)) == (limit == 0)
        weights = {r: w.clone() for r, w in read_weights(block, stream).items()}
        stats, outputs = measure_block(stream, last, stream.place(block), taps, hidden)
        ends = (hidden, [torch.ones_like(h) for h in outputs])
        gradients, earlier = measure_back(stream, last, block, back, ends)
        found.append((weights, stats.sums | gradients.sums, [*outputs, *earlier]))
    (one, sums, tensors), (other, again, same) = found
    assert one.keys() == other.keys() and all(torch.equal(one[r], other[r]) for r in one)
    for tap in taps + back:
        for part, value in sums[tap].items():
            torch.testing.assert_close(again[tap][part], value, rtol=1e-6, atol=1e-9)
    for a, b in zip(tensors, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def read_files(folder: Path) -> dict[str, bytes]:
    """But for what a clock or the system measured."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "planish.json"}


WRITTEN = [("mixtral", "reap"), ("granitemoe", "reap")]
FURTHER = [
    ("gpt_oss", "reap"),
    ("nemotron_h_moe", "reap"),
    ("granitemoe", "flat-llm"),
    ("deepseek_v3", "hope"),
    ("qwen3_moe", "auto"),
    ("qwen3_moe", "svd-llm"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER]


@pytest.mark.parametrize(("name", "method"), [*WRITTEN, *SLOW])
def test_what_is_written_is_the_same(name, method, tmp_path, monkeypatch):
    """To the bit; also where a run is taken up again behind its first block."""
    model = tiny.save(tiny.build(name, torch.bfloat16), tmp_path / "model")
    asked = {"windows": WINDOWS, "method": method, "keep": 0.8}
    monkeypatch.setattr(stored_linear, "APART", NEVER)
    compress(model, output=tmp_path / "whole", **asked)
    monkeypatch.setattr(stored_linear, "APART", 0)
    compress(model, output=tmp_path / "apart", **asked)
    assert read_files(tmp_path / "whole") == read_files(tmp_path / "apart")
    with tiny.stopped():
        compress(model, output=tmp_path / "again", **asked)
    resume(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "criterion"), [("qwen3_moe", "nats"), pytest.param("granitemoe", "reap", marks=pytest.mark.slow)]
)
def test_a_few_experts_are_in_memory_at_a_time(name, criterion, tmp_path, monkeypatch):
    """Whatever their number: weights of experts that were read and are still alive, gradients included."""
    monkeypatch.setattr(stored_linear, "APART", 0)
    alive, peaks, real = [0], {}, ModelFolder.tensor

    def read(self: ModelFolder, stored: str) -> Tensor:
        tensor = real(self, stored)
        if ".experts." in stored:
            alive[0] += tensor.nbytes
            peaks[number] = max(peaks.get(number, 0), alive[0])
            weakref.finalize(tensor, lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(ModelFolder, "tensor", read)
    for number in (8, 24):
        more = {"num_local_experts" if name == "granitemoe" else "num_experts": number, "num_hidden_layers": 2}
        model = tiny.save(tiny.build(name, **more), tmp_path / f"model{number}")
        shape = open_source(model).shape(0)
        asked = {"windows": WINDOWS, "method": "reap", "keep": 0.8, "settings": {"criterion": criterion}}
        compress(model, output=tmp_path / f"out{number}", **asked)
        assert 0 < peaks[number] <= 3 * 4 * shape.count("expert.0.up") and alive[0] == 0
    assert peaks[8] == peaks[24]


def test_the_forecast_counts_what_is_in_memory(tmp_path, monkeypatch):
    shape = open_source(tiny.save(tiny.build("qwen3_moe"), tmp_path / "m")).shape(0)
    more = replace(shape, experts=replace(shape.experts, number=64))
    assert count_held(shape) == shape.count()
    monkeypatch.setattr(stored_linear, "APART", 0)
    router = next(r for r, out, n in shape.others if out == 8)
    assert count_held(shape) == count_held(more) == shape.count(*shape.roles, router) + shape.count("expert.0.up")


def test_a_rehearsal_takes_no_memory_for_every_expert(tmp_path, monkeypatch):
    """Weights of all experts are one tensor."""
    source, seen = open_source(tiny.save(tiny.build("qwen3_moe"), tmp_path / "m")), []
    monkeypatch.setattr(seconds, "solve_once", lambda solver, given, rank: seen.append(given[1]))
    problem = pose_on(Stream(source, WINDOWS), "flat-llm", 0.8).problem
    shape, units = problem.shapes[0], {u: s for u, s in problem.units.items() if u.block == 0}
    seconds.rehearse_at(units, dict.fromkeys(units, 4), shape, shape)
    assert {len({seen[0][f"expert.{n}.{r}"].data_ptr() for n in range(8)}) for r in ("gate", "up", "down")} == {1}


@torch.no_grad()
def test_a_linear_in_a_file_is_one(tmp_path):
    """Its weight, moved and cast when it is read; on no rows nothing is read."""
    weight, reads = torch.randn(5, 3), []

    def read() -> Tensor:
        reads.append(1)
        return weight

    linear = StoredLinear(read, (5, 3), weight.dtype)
    x = torch.randn(4, 3)
    assert torch.equal(linear(x), x @ weight.T) and linear(x[:0]).shape == (0, 5) and len(reads) == 1
    double = linear.to(torch.float64)
    assert torch.equal(double(x.double()), x.double() @ weight.double().T)
    assert {p.dtype for p in double.parameters()} == {torch.float64} and double.weight.dtype == torch.float64
