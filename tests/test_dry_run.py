"""Plans from shapes alone, windows that fit the machine, and the time that is left."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest

import planish
import tiny
from planish.cli import run as session
from planish.cli.left import TimeLeft
from planish.dry_run import rounding_seconds, seconds, windows
from planish.dry_run.windows import choose_windows, list_smaller
from planish.errors import InputError
from planish.folder.source import open_shapes, open_source
from planish.methods import find_method, list_methods
from planish.request import Request
from planish.rounding.types import find_type

SHAPES = ("a3", "aa-svd", "mpifa", "svd", "svd-llm")  # methods whose ranks follow from shapes
IDS = tiny.windows(16, 48).flatten()
MORE = {"calibration": IDS, "n_samples": 16, "seq_len": 48}


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    tiny.configure("llama_gqa", num_hidden_layers=4).save_pretrained(folder)
    return folder


def test_every_method_plans_without_weights_and_text(bare, monkeypatch):
    """Within the budget, with the phases of a run; what is measured later says so."""
    pretend(monkeypatch, 1e-6)
    for method in list_methods():
        if method in ("slicegpt", "hope", "reap"):  # it looks at the first block's norms; they drop experts
            continue
        found = planish.forecast(
            bare, keep=0.8, method=method, calibration="no-such-file.txt", n_samples=64, seq_len=32
        )
        assert found.keep <= 0.8 and found.measured == (not found.needed_statistics), method
        assert found.measured or method not in SHAPES, method
        *before, blocks, loss = found.phases
        assert (blocks["name"], len(blocks["steps"])) == ("blocks", 4), method
        assert (loss["name"], len(loss["steps"])) == ("loss", 2), method
        assert found.seconds == pytest.approx(sum(sum(p["steps"]) for p in found.phases))
        assert bool(before) == (not found.measured), method
        before, after = (sum(b[k] for b in found.blocks) for k in ("before", "after"))
        assert (before, after) == (found.block_params_before, found.block_params_after), method


def test_what_cannot_be_reached_is_refused_alike():
    """By the plan from shapes as by the one that measures."""
    model = tiny.build("llama_gqa")
    for method, keep in (("auto", 1e-4), ("modegpt", 0.1), ("sleb", 0.1)):
        said = []
        for measure in (False, True):
            with pytest.raises(InputError) as caught:
                planish.forecast(model, keep=keep, method=method, measure=measure, **MORE)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_expected_ranks_are_near_the_measured_ones():
    """Of a random model, all of whose blocks are alike, uniform ranks are what is found; budgets hold either way."""
    model = tiny.build("llama_gqa")
    for method in ("flat-llm", "modegpt", "palu"):
        dry, measured = (planish.forecast(model, keep=0.8, method=method, measure=m, **MORE) for m in (False, True))
        assert (dry.measured, measured.measured) == (False, True) and dry.needed_statistics
        assert abs(dry.keep - measured.keep) < 0.02 and dry.bytes_after == pytest.approx(measured.bytes_after, rel=0.02)
        assert dry.kv_bytes_per_token_after == pytest.approx(measured.kv_bytes_per_token_after, rel=0.25)


def test_smaller_windows_are_shorter_first_then_fewer():
    sizes = [(128, 1024), (128, 512), (64, 512), (32, 512), (16, 512), (8, 512)]
    assert list_smaller((128, 2048), 0) == sizes
    assert list_smaller((128, 2048), 1536) == sizes[:5]  # at least 6144 tokens
    assert list_smaller((128, 256), 100) == [(64, 256), (32, 256), (16, 256), (8, 256)]
    assert list_smaller((128, 512), 20_000) == []


def pretend(monkeypatch, per_token: float) -> None:
    """A machine on which nothing takes time but the blocks, and these so many seconds per token."""
    monkeypatch.setattr(seconds, "measure_rates", lambda *_: seconds.Rates(1e30, 1e30, 1e30, 1e30, 0.0, 0.0, 0.0))
    monkeypatch.setattr(seconds.Costs, "run", lambda self, shape, seq_len, back=False: per_token)
    monkeypatch.setattr(seconds, "rehearse", lambda *_: {})
    monkeypatch.setattr(windows, "is_small", lambda *_: False)


@pytest.mark.parametrize(
    ("bits", "target", "rounds"),
    [(None, "any", {}), (8, "any", {"rounding": 1}), (8, "gguf", {"rounding": 1}), (4, "gguf", {"rounding": 2}),
     (3.5, "any", {"types": 4 * rounding_seconds.PRICED, "rounding": 2})],
)  # fmt: skip
def test_seconds_of_rounding_are_foretold(bits, target, rounds, monkeypatch):
    """Where only rounding takes time, a microsecond a weight: every block as often as bases are tried, in four types at a mean."""
    pretend(monkeypatch, 0.0)
    micro = rounding_seconds.Pace(0.0, 1e-6, 0.0)
    monkeypatch.setattr(
        rounding_seconds, "rehearse_type", lambda kind, known=True: micro if known else micro._replace(weight=0.0)
    )
    monkeypatch.setattr(rounding_seconds, "TRIES", {})
    model = tiny.build("llama_gqa", intermediate_size=64)
    found = planish.forecast(
        model, keep=1, method="svd-llm" if target == "any" else "flat-llm", bits=bits, target=target, **MORE
    )
    steps = {p["name"]: p["steps"] for p in found.phases}
    assert [*steps] == ["blocks", *rounds, *(["loss"] if bits else [])]
    weights = found.block_params_before / 3 * 1e-6
    assert all(steps[n] == pytest.approx([times * weights] * 3, rel=1e-3) for n, times in rounds.items())
    assert found.seconds == pytest.approx(sum(rounds.values()) * 3 * weights, rel=1e-3) or not bits


def test_a_matrix_is_foretold_from_smaller_ones():
    """Columns, weights and what is behind them, as three sizes tell."""
    pace = rounding_seconds.Pace(2.0, 3.0, 5.0)
    assert pace.take(10, 7) == 7 * (2 + 10 * (3 + 7 * 5))
    kind = find_type("int4-43-asym")  # the rehearsed widths are multiples of any group
    assert 0 < rounding_seconds.rehearse_type(kind).take(64, 86) < 5


def test_windows_are_chosen_by_the_predicted_time(bare, monkeypatch):
    """The largest that take half an hour at most: svd-llm runs the text once through four blocks, and to tell what the result loses
    either model runs 16,384 further tokens, or a quarter as many."""
    source, method = open_shapes(bare), find_method("svd-llm")
    most = 128 * 2048 + 2 * 16_384
    for bound, size in ((most, (128, 2048)), (most - 128, (128, 1024)), (60_000, (64, 512)), (1, (8, 512))):
        pretend(monkeypatch, windows.BOUND / bound / 4)
        found = choose_windows(Request(model="", device="cpu"), method, source, (128, 2048))
        assert found.size == size and bool(found.why) == (size != (128, 2048)), found
    assert "128 × 2048 would take about" in found.why and "8 × 512" in found.why and "needs" not in found.why
    assert choose_windows(Request(model="", device="cuda"), method, source, (128, 2048)).size == (128, 2048)


def test_a_small_model_keeps_the_default_windows_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(windows, "Outlook", None)
    source = open_source(tiny.build("llama_gqa"))
    assert choose_windows(Request(model="", device="cpu"), find_method("auto"), source, (128, 64)) == (
        (128, 64),
        "",
        None,
    )


def test_chosen_windows_are_recorded(monkeypatch, tmp_path):
    folder = tiny.save(tiny.build("llama_gqa"), tmp_path / "model")
    more = {"method": "svd-llm", "keep": 0.8, "calibration": tiny.windows(128, 64).flatten(), "device": "cpu"}
    pretend(monkeypatch, windows.BOUND / 3 / 3100)
    monkeypatch.setattr(windows, "SHORT", 16)
    begun = []
    result = planish.compress(folder, output=tmp_path / "a", begin=lambda *told: begun.append(told), **more)
    record = json.loads((tmp_path / "a" / "planish.json").read_text())["calibration"]
    assert (record["n_samples"], record["seq_len"]) == (128, 16) and record["chosen"] in result.warnings
    foretold = planish.forecast(folder, **more)
    assert (foretold.n_samples, foretold.seq_len) == (128, 16) and record["chosen"] in foretold.warnings
    phases, shorter, notes = begun[0]
    assert notes == [record["chosen"]] and all(s <= 0.505 * sum(p.seconds for p in phases) for s in shorter.values())
    own = sum(p.seconds for p in phases)
    assert own == pytest.approx(foretold.seconds) and shorter["--n-samples 64"] == pytest.approx(own / 2)
    planish.compress(folder, output=tmp_path / "b", **more, n_samples=100)
    record = json.loads((tmp_path / "b" / "planish.json").read_text())["calibration"]
    assert (record["n_samples"], record["seq_len"], "chosen" in record) == (100, 64, False)


# ---------------------------------------------------------------- the time that is left


def replay(phases, took, clock: TimeLeft):
    """Reports of a run whose steps take these seconds: (steps done, time left as told, as it is) after every one."""
    now, whole, n = 0.0, sum(map(sum, took)), 0
    for (name, steps), real in zip(phases, took, strict=True):
        for i, s in enumerate(real):
            now, n = now + s, n + 1
            clock.report(name, i + 1, len(steps), now)
            yield n, clock.left(now), whole - now


PHASES = [
    ("forward", [1.0] * 6),
    ("gradients", [4.0, 5.0, 6.0, 4.0, 5.0, 6.0]),
    ("search", [2.0] * 6),
    ("search", [2.0] * 6),
]
PHASES += [("blocks", [7.0] * 6)]


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_a_wrong_speed_is_mended_by_the_first_step(factor):
    took = [[factor * s for s in steps] for _, steps in PHASES]
    assert TimeLeft(PHASES).left(0.0) == sum(map(sum, (s for _, s in PHASES)))
    for _, told, real in replay(PHASES, took, TimeLeft(PHASES)):
        assert told == pytest.approx(real)


def test_the_time_left_is_right_within_a_third_after_one_step():
    """Whatever the machine's speed, if phases are foretold within 15 % of each other and steps of a phase vary by 10 %."""
    rng = random.Random(0)
    for _ in range(200):
        speed = rng.uniform(0.1, 10)
        took = []
        for _, steps in PHASES:
            phase = speed * rng.uniform(0.87, 1.15)
            took.append([s * phase * rng.uniform(0.95, 1.05) for s in steps])
        for _, told, real in itertools.islice(replay(PHASES, took, TimeLeft(PHASES)), 29):
            assert abs(told - real) <= real / 3 + 1e-9


def test_a_slow_or_fast_first_step_of_a_later_phase_counts_less_than_it_took():
    for factor in (0.1, 4.0):
        clock = TimeLeft([("first", [10.0] * 6), ("second", [1.0] * 60)])
        for n in range(6):
            clock.report("first", n + 1, 6, 10.0 * (n + 1))
        clock.report("second", 1, 60, 60.0 + factor)
        told = clock.left(60.0 + factor)
        assert abs(told - 59) < abs(59 * factor - 59) / 3


def test_phases_that_are_passed_over_or_were_not_foretold():
    clock = TimeLeft(PHASES)
    clock.report("text", 1, 2, 3.0)  # not foretold: it says nothing about the speed of the others
    assert clock.left(3.0) == 3.0 + sum(sum(s) for _, s in PHASES)
    clock.report("text", 2, 2, 6.0)
    clock.report("cached gradients", 6, 6, 6.0)  # neither does what was known already, but it need not be waited for
    assert clock.left(6.0) == sum(sum(s) for _, s in PHASES[2:])
    clock.report("blocks", 1, 6, 20.0)  # what was foretold before it is not waited for; 14 in the place of 7 seconds
    assert clock.left(20.0) == 5 * 14 and clock.left(25.0) == 5 * 14 - 5
    late = TimeLeft(PHASES[-1:])
    late.report("blocks", 0, 6, 30.0)  # what came before the first step is not taken for it
    assert late.left(30.0) == 42
    late.report("blocks", 1, 6, 37.0)
    assert late.left(37.0) == 35
    bare = TimeLeft(began=1.0)
    assert bare.left(1.0) is None and bare.more
    bare.report("points", 2, 5, 5.0)  # an earlier run did the first one
    assert bare.left(5.0) == 3 * 4
    ends = TimeLeft(ends=9.0)
    ends.report("runs", 1, 5, 4.0)
    assert ends.left(4.0) == 5 and not ends.more
    ends.report("runs", 4, 5, 8.0)
    assert ends.left(8.0) == 1 and ends.left(10.0) == 0


@pytest.mark.parametrize("method", ["auto", "subfit", "sleb"])
def test_phases_are_reported_as_they_are_foretold(method, monkeypatch):
    monkeypatch.setattr(windows, "SMALL", 0.0)
    foretold, seen = [], []

    def watch(phase: str, done: int, total: int) -> None:
        if done == 1:
            seen.append((phase, total))
        assert total == (2 if phase == "loss" else 3) and 0 <= done <= total

    model, more = tiny.build("llama_gqa"), MORE | {"calibration": tiny.windows(20, 48).flatten()}
    begin = lambda phases, *_: foretold.extend((p.name, len(p.steps)) for p in phases)  # noqa: E731
    planish.compress(model, keep=0.7, method=method, progress=watch, begin=begin, **more)
    if method == "auto":  # of errors of scores only those that the plan needs are measured
        seen, foretold = ([p for p in found if p[0] != "scores"] for found in (seen, foretold))
    assert seen == foretold


def test_a_log_file_gets_lines_with_the_time_left(folder, ids, tmp_path, run, monkeypatch):
    """And what goes to stdout stays one JSON object; where lines are seconds apart, a short run writes none."""
    common = ["compress", folder, "--method", "flat-llm", "--calibration", ids, "--n-samples", 8, "--seq-len", 16]
    common += ["--json", "--no-cache"]
    silent = run(*common, "-o", tmp_path / "silent")
    assert silent.exit_code == 0 and "elapsed" not in silent.stderr and "takes about" not in silent.stderr
    monkeypatch.setattr(session, "EVERY", 0.0)
    monkeypatch.setattr(windows, "SMALL", 0.0)
    assert "takes about" not in run(*common, "-o", tmp_path / "short").stderr
    monkeypatch.setattr(session, "LONG", 0.0)
    done = run(*common, "-o", tmp_path / "out")
    assert json.loads(done.stdout)["method"] == "flat-llm"
    lines = done.stderr.splitlines()
    blocks = open_source(folder).n_blocks
    for phase in ("statistics", "blocks"):
        pattern = re.compile(rf"{phase} (\d+) of {blocks} · \d+ s elapsed · about \d+ s left")
        assert [int(m[1]) for m in map(pattern.fullmatch, lines) if m] == list(range(1, blocks + 1)), done.stderr
    assert any(
        re.match(r"this takes about \d+ s \(statistics \d+ s, blocks \d+ s, loss \d+ s\)", line) for line in lines
    )


def test_plan_says_what_is_measured(folder, ids, run):
    common = ["plan", folder, "--method", "auto", "--calibration", ids, "--n-samples", 40, "--seq-len", 16]
    dry = run(*common)
    assert dry.exit_code == 0 and "ranks as expected, not measured" in dry.stdout and "plan --measure" in dry.stdout
    found = json.loads(run(*common, "--json").stdout)
    assert found["measured"] is False and found["needed_statistics"] is True and found["predicted"] == {}
    a3 = run("plan", folder, "--method", "a3").stdout
    assert "ranks from shapes alone" in a3 and "--measure" not in a3


def test_rehearsed_times_of_wider_blocks_rise(monkeypatch):
    """A solve whose time is a + b width³ is foretold from narrow blocks."""
    shape = open_source(tiny.build("llama_gqa", hidden_size=512, intermediate_size=1024, head_dim=128)).shape(0)

    def pretend_solve(solvers, ranks, shape, small):
        return {u: seconds.Took(0.5 + (small.hidden / 512) ** 3, 0.25) for u in solvers}

    monkeypatch.setattr(seconds, "rehearse_at", pretend_solve)
    monkeypatch.setattr(seconds, "WIDTH", 256)
    solvers = {u: s for s in find_method("svd-llm").solvers() for u in s.units(shape)}
    took = seconds.rehearse(solvers, dict.fromkeys(solvers, 1), shape)
    assert all(t == pytest.approx((1.5, 0.25)) for t in took.values())
