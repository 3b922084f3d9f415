"""Planning from a config.json alone, and what is predicted for blocks of a 70 B model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig

import planish
import tiny
from planish.calibrate import stream
from planish.calibrate.activations import Activations, MemoryLimits
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Awaited, Stream
from planish.core import Shape
from planish.dry_run import look_ahead, memory, seconds
from planish.dry_run.memory import count_kept, count_peaks
from planish.dry_run.passes import Run, count_between, count_passes, reach
from planish.dry_run.seconds import extend, list_sizes, rehearse
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.methods import find_method, list_methods, make_plan, pose
from planish.request import Limits, Request
from planish.stats import Tap
from planish.walks.solve import solve
from posed import pose_on


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_config_alone_gives_the_plan_of_the_whole_folder(family, tmp_path):
    whole = tiny.save(tiny.build(family, torch.bfloat16), tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "bare")
    plans = [
        planish.forecast(m, keep=0.7, method="svd-llm", n_samples=8, seq_len=16).as_dict()
        for m in (whole, tmp_path / "bare", tmp_path / "bare" / "config.json")
    ]
    for found in plans:
        del found["seconds"], found["how"], found["phases"]
    assert plans[0] == plans[1] == plans[2]


def test_statistics_need_weights(tmp_path):
    tiny.configure("llama_gqa").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no weights to measure them with"):
        planish.forecast(tmp_path, method="auto", n_samples=8, seq_len=16, measure=True)
    with pytest.raises(InputError, match="holds no weights, which this needs"):
        planish.forecast(tmp_path, method="slicegpt", n_samples=8, seq_len=16)
    with pytest.raises(InputError, match="neither model"):
        planish.compress(tmp_path, method="svd-llm", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "settings"),
    tiny.pick(
        [("flat-llm", {"allocation": "uniform"})],
        [("a3", {}), ("flat-llm", {"allocation": "uniform"}), ("svd-llm", {})],
    ),
)
def test_70b_fits_24_gb_and_64_gb(method, settings, tmp_path, monkeypatch):
    """Activations that stay on such a device included."""
    monkeypatch.setattr(seconds, "WIDTH", 128)
    monkeypatch.setattr(stream, "find_device_limit", lambda device: 6_000_000_000)
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256}
    config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    found = planish.forecast(tmp_path, method=method, settings=settings, device="cuda", n_samples=128, seq_len=2048)
    assert found.elsewhere == (not torch.cuda.is_available())
    assert found.params_before > 70e9
    assert 6.6e9 + 6e9 < found.peak_vram_bytes < 24e9  # at least the widest Gram
    assert 10e9 < found.peak_ram_bytes < 64e9


@pytest.mark.parametrize("method", list(list_methods()))
def test_every_methods_solves_can_be_rehearsed(method):
    """On random numbers: every unit that a method cuts takes some time."""
    shape = Shape(0, 64, 4, 2, 16, 16, 128, 16, gated=True, blocks=4)
    solvers = {u: s for s in find_method(method).solvers() for u in s.units(shape)}
    ranks = {u: s.ranks(u, shape)[len(s.ranks(u, shape)) // 2] for u, s in solvers.items()}
    took = rehearse(solvers, ranks, shape)
    assert set(took) == set(solvers) and all(t.decompose > 0 for t in took.values())


def test_wide_blocks_are_rehearsed_smaller():
    shape = Shape(0, 8192, 64, 8, 128, 128, 28672, 128, gated=True)
    sizes = [(s.hidden, s.intermediate, s.v, s.rotary, scale) for s, scale in list_sizes(shape)]
    assert sizes == [(64 * n, 224 * n, n, n, 128 // n) for n in (2, 4, 8, 16)]
    odd = Shape(0, 2048, 8, 8, 256, 255, 8192, 64, gated=True)
    assert list_sizes(odd) == [(odd, 1)]  # heads that cannot be halved
    assert extend([8, 4, 2], 5 + 0.25**3, 5 + 0.5**3) == pytest.approx(6)  # a + b · width³ with a 5, b 1
    assert (extend([4], 0.0, 1.0), extend([4, 2], 3.0, 2.0)) == (64, 2)


def test_how_much_of_a_block_runs_for_a_site():
    shape = Shape(0, 64, 4, 2, 16, 16, 128, 16, gated=True)
    parts = [shape.count(*roles) / shape.count() for roles in ("qkv", "qkvo", ("q", "k", "v", "o", "gate", "up"))]
    found = [reach(shape, [Tap(site, "gram")]) for site in ("q.in", "o.in", "v.out", "up.in", "down.in", "mlp.add")]
    assert found == [0, parts[0], parts[0], parts[1], parts[2], 1]


def test_passes_of_a_method(tmp_path):
    """Counted on what it runs: one for statistics of the dense model; up to the last site and once more on the prefix."""
    found = {}
    for method, settings in (("svd-llm", {}), ("flat-llm", {"allocation": "uniform"}), ("mpifa", {})):
        stream = Stream(MemorySource(tiny.build("llama_gqa")), tiny.windows(40, 24))
        job = pose_on(stream, find_method(method, settings), 0.7)
        planned = job.plan()
        runs = [Run(job.problem, job.measure, planned, windows, 24) for windows in (40, 340)]  # 1 and 4 batches
        found[method] = [count_passes(run, 0)[0] for run in runs]
    shape = job.problem.shapes[0]
    down = 1 - shape.count("down") / shape.count()
    up, o = (shape.count(*roles) / shape.count() for roles in ("qkvo", "qkv"))
    assert found["svd-llm"] == [1, 1] and found["flat-llm"] == pytest.approx([1 + down] * 2)
    once = 1 + 0 + o + up + down  # of four batches three start at o in the last three of these, in the last one at down
    neurons = shape.count("gate", "up") / shape.count()
    assert found["mpifa"] == pytest.approx([2 * once, 2 * (once - 3 * 3 / 4 * o - 3 / 4 * neurons)])
    assert count_passes(runs[0], 2)[0] == pytest.approx(2 * (once - 1))  # behind the last block nothing is run
    assert count_passes(runs[0], 2, trial=True)[0] == pytest.approx(2 * once)  # but in a trial
    stream.limits.limit = 2 * 340 * 24 * 4 * shape.intermediate  # what down reads fits twice, but nothing beside it
    assert count_passes(runs[1], 0)[0] == pytest.approx(2 * (once - 3 * 3 / 4 * o))


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_bytes_count_headers_before_and_after(family, tmp_path):
    """A model of which nothing is cut keeps all of its bytes; the forecast is off by headers of cut tensors alone."""
    model = tiny.save(tiny.build(family), tmp_path / "model")
    more = {"method": "svd-llm", "calibration": tiny.windows(40, 24).flatten(), "n_samples": 12, "seq_len": 24}
    for keep in (1.0, 0.7):
        found = planish.compress(model, output=tmp_path / str(keep), keep=keep, **more)
        files = sum(p.stat().st_size for p in (tmp_path / str(keep)).glob("*.safetensors"))
        planned = planish.forecast(model, keep=keep, **more)
        assert found.bytes_after == files and planned.bytes_before == found.bytes_before
        if keep == 1:
            assert planned.bytes_after == planned.bytes_before
            assert files <= found.bytes_before < files * 1.001
        else:
            assert files <= planned.bytes_after < found.bytes_before


@pytest.mark.parametrize("settings", [{}, {"units": "structural"}, {"anchor": 0.0}, {"refit_share": 0.5}], ids=str)
def test_what_is_kept_of_all_blocks_is_predicted_to_the_byte(monkeypatch, tmp_path, settings):
    spilled, append = [], Activations.append

    def watch(self: Activations, tensor: torch.Tensor) -> None:
        append(self, tensor)
        if isinstance(self.items[-1], tuple):
            spilled.append(tensor.nbytes)

    monkeypatch.setattr(Activations, "append", watch)
    windows = tiny.windows(40, 16)
    stream = Stream(open_source(tiny.build("llama_gqa")), windows, limits=MemoryLimits(folder=tmp_path, stored=0))
    job = pose_on(stream, find_method("auto", settings), asked=Limits(keep=0.8))
    run = Run(job.problem, job.measure, job.method.decide(job.problem, {}), *windows.shape)
    expected = count_kept(run)
    job.plan()
    assert expected == (0, sum(spilled)) and spilled
    stream.limits.stored.limit = 100_000
    assert count_kept(run) == (100_000, sum(spilled) - 100_000)


def test_a_plan_that_cuts_nothing_needs_no_text(tmp_path):
    folder = tiny.save(tiny.build("llama_gqa"), tmp_path / "model")
    more = {"calibration": tiny.windows(40, 16).flatten(), "n_samples": 40, "seq_len": 16}
    found = planish.forecast(folder, method="auto", keep=1, measure=True, **more)
    assert found.keep == 1 and not found.needed_statistics and found.measured
    few = planish.forecast(folder, method="auto", keep=1, **more | {"n_samples": 2})
    assert found.peak_ram_bytes == few.peak_ram_bytes  # whatever the text: no block is run
    request = Request(model=str(folder), keep=1.0, device="cpu")
    run = look_ahead(request, find_method("auto"), open_source(folder), (40, 16))
    assert [count_passes(run, i)[0] for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("method", sorted({*list_methods()} - {"hope", "reap"}))  # which refuse a model without experts
def test_where_nothing_is_to_go_no_block_runs(method, tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "forward", None)
    model, text = tiny.build("llama_gqa", num_hidden_layers=2), tiny.windows(40, 16).flatten()
    more = {"calibration": text, "n_samples": 8, "seq_len": 16, "device": "cpu"}
    result = planish.compress(model, output=tmp_path / "out", method=method, keep=1, **more)
    assert result.keep == 1 and not result.loss
    assert [p["name"] for p in planish.forecast(model, method=method, keep=1, **more).phases] == ["blocks"]


def test_only_shares_of_one_leave_everything():
    assert Limits(keep=1.0).whole and Limits(keep=1, kv_keep=1).whole
    assert not any(Limits.ask(**asked).whole for asked in ({}, {"max_params": 1}, {"max_latency": 1}, {"max_bytes": 1}))


def test_an_awaited_text_is_read_once_and_only_to_measure():
    read, source = [], MemorySource(tiny.build("llama_gqa"))

    def make() -> Stream:
        read.append(True)
        return Stream(source, tiny.windows(4, 16))

    measure = Measurements(Awaited(source, torch.device("cpu"), torch.float32, MemoryLimits(), make, torch.float32))
    for method, times in (("svd-llm", 0), ("flat-llm", 1), ("shortgpt", 1)):
        chosen = find_method(method)
        make_plan(chosen, pose(chosen, source, Limits(keep=0.6), length=16), measure)
        assert (len(read), measure.started) == (times, times > 0)


@pytest.mark.parametrize(("keep", "coarse"), tiny.pick([(0.8, True)], [(0.8, True), (0.8, False), (0.5, False)]))
def test_the_plan_foretold_is_the_one_that_is_followed(monkeypatch, tmp_path, keep, coarse):
    """Also where calibration forms products in bf16."""
    monkeypatch.setattr("planish.compression.LARGE", 0 if coarse else 1 << 60)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    folder = tiny.save(tiny.build("llama_gqa"), tmp_path / "model")
    more = {"calibration": tiny.windows(40, 16).flatten(), "n_samples": 40, "seq_len": 16, "device": "cpu"}
    foretold = planish.forecast(folder, keep=keep, measure=True, **more)
    planish.compress(folder, keep=keep, output=tmp_path / "out", **more)
    notes = json.loads((tmp_path / "out" / "planish.json").read_text())["notes"]
    assert sum(foretold.predicted.values()) == pytest.approx(notes["predicted_loss"], rel=1e-9)


WITHIN = {"flat-llm": {}, "mpifa": {}, "aa-svd": {}, "auto": {"units": "linear"}}
BESIDE = [(m, WITHIN[m], *text) for m in WITHIN for text in (("llama_gqa", 400), ("opt", 400), ("llama_gqa", 40))]
SOON = {"flat-llm": ("opt", 400), "mpifa": ("llama_gqa", 400), "aa-svd": ("llama_gqa", 400), "auto": ("llama_gqa", 40)}


@pytest.mark.parametrize(
    ("method", "settings", "family", "count"), tiny.pick([c for c in BESIDE if c[2:] == SOON[c[0]]], BESIDE), ids=str
)
def test_what_lies_between_is_what_is_kept_while_a_block_is_solved(
    monkeypatch, tmp_path, method, settings, family, count
):
    """Activations in memory at their peak: inputs and outputs of all streams, and what is kept from within the block."""
    windows, peak, append = tiny.windows(count, 24), 0, Activations.append
    source = open_source(tiny.build(family))
    stream = Stream(source, windows)

    def watch(self: Activations, tensor: torch.Tensor) -> None:
        nonlocal peak
        append(self, tensor)
        peak = max(peak, stream.limits.used)

    job = pose_on(stream, find_method(method, settings), asked=Limits(keep=0.8))
    planned = job.plan()
    monkeypatch.setattr(Activations, "append", watch)
    solve(job.problem, job.measure, planned, lambda *args: None)
    shape, streams = job.problem.shapes[0], 2 if planned.prefix == "both" else 1
    run = Run(job.problem, job.measure, planned, *windows.shape)
    channels = 2 * streams * shape.hidden + max(count_between(run, s) for s in job.problem.shapes)
    assert peak == channels * windows.numel() * 4


def test_what_the_shelf_does_not_hold_goes_to_disk(monkeypatch):
    windows = tiny.windows(40, 24)
    job = pose_on(Stream(MemorySource(tiny.build("llama_gqa")), windows), "svd-llm", 0.7)
    run, limits = Run(job.problem, job.measure, job.plan(), *windows.shape), job.measure.stream.limits
    plain = count_peaks(run, 10_000, 7)
    monkeypatch.setattr(memory, "count_kept", lambda run: (50_000, 700))
    kept = count_peaks(run, 10_000, 7)
    assert (plain.spill, kept.spill, kept.ram - plain.ram) == (0, 700, 50_000)
    limits.limit = 1000
    assert count_peaks(run, 10_000, 7).spill == 2 * windows.numel() * run.largest.hidden * 4 - 1000 + 700


ASKED = [
    ("llm-drop", {"sparsity": 0.5}),
    ("blockpruner", {"sparsity": 0.5}),
    ("llm-streamline", {"keep": 0.7}),
    ("sleb", {"max_params": 22_000}),
    ("subfit", {"keep": 0.7}),
    ("flat-llm", {"keep": 0.7}),
    ("a3", {"keep": 0.7}),
    ("slicegpt", {"keep": 0.7}),
]
WRITTEN = [(*asked, family) for asked in ASKED for family in ("llama_gqa", "gpt2")]
BIASED = ("blockpruner", "llm-streamline", "flat-llm", "a3")  # the others are tried on llama


@pytest.mark.parametrize(
    ("method", "asked", "family"),
    tiny.pick([c for c in WRITTEN if (c[2] == "gpt2") == (c[0] in BIASED)], WRITTEN),
    ids=str,
)
def test_parameters_foretold_are_those_that_are_written(tmp_path, family, method, asked):
    """What goes takes its norms and biases along."""
    if method == "slicegpt" and family == "gpt2":
        pytest.skip("needs RMSNorm")
    more = {"method": method, "calibration": tiny.windows(40, 24).flatten(), "n_samples": 12, "seq_len": 24, **asked}
    model = tiny.save(tiny.build(family), tmp_path / "model")
    foretold = planish.forecast(model, measure=True, **more)
    found = planish.compress(model, output=tmp_path / "out", **more)
    assert foretold.params_after == found.params_after < foretold.params_before
    assert foretold.budgets == found.budgets
