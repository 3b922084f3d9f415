"""Sweeps: many points from one calibration, a table that says what the manifests say, a page of its own."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

import planish
import tiny
from planish import api
from planish.calibrate.stream import Stream
from planish.cli import app
from planish.errors import InputError
from planish.evaluate import drift
from planish.evaluate.report import page
from planish.evaluate.report.page import find_shares, write_report
from planish.evaluate.report.points import Point, read_points
from planish.evaluate.report.sizes import find_curves, tell_losers
from planish.evaluate.report.svg import Axis, Mark, Quantity, Series, chart, heat_map
from planish.folder.source import open_source
from planish.request import Request
from planish.sizes.fit import predict
from planish.sweep import sweep
from planish.sweep.grid import parse_method

METHODS = ["flat-llm", "svd-llm", "auto:anchor=0:units=linear"]
KEEPS = [0.9, 0.7]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model's folder, token ids to calibrate on, token ids to measure on."""
    root = tmp_path_factory.mktemp("sweep")
    tiny.build("llama_gqa").save_pretrained(root / "tiny & <model>")
    for seed, name in enumerate(("calibration", "evaluation")):
        np.save(root / f"{name}.npy", np.random.default_rng(seed).integers(0, tiny.VOCABULARY, 600))
    return root / "tiny & <model>", root / "calibration.npy", root / "evaluation.npy"


def run(texts, output: Path, **more):
    model, calibration, evaluation = texts
    options = {"methods": METHODS, "keeps": KEEPS, "n_samples": 12, "seq_len": 24, "device": "cpu"}
    return sweep(model, output=output, calibration=calibration, eval_text=evaluation, **(options | more))


@pytest.fixture(scope="module")
def swept(texts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "sweep"
    run(texts, output, keep_models="all")
    return output


def test_the_table_says_what_the_manifests_and_eval_say(swept, texts):
    rows = {r["name"]: r for r in csv.DictReader((swept / "results.csv").read_text(encoding="utf-8").splitlines())}
    assert len(rows) == 1 + len(METHODS) * len(KEEPS)
    dense = float(rows["dense"]["perplexity"])
    assert dense == api.evaluate(texts[0], texts[2], 24, device="cpu").perplexity
    for name, row in rows.items():
        if name == "dense":
            continue
        manifest = json.loads((swept / "points" / name / "planish.json").read_text())
        result = manifest["result"]
        for n in ("bytes", "flops_per_token", "block_params", "kv_bytes_per_token"):
            assert int(rows["dense"][n]) == result[f"{n}_before"] >= int(row[n]) > 0
        assert row["method"] == result["method"] == manifest["method"]
        assert float(row["keep"]) == result["keep"] <= float(row["keep_requested"])
        assert int(row["params"]) == result["params_after"]
        assert int(row["block_params"]) == result["block_params_after"]
        assert int(row["kv_bytes_per_token"]) == result["kv_bytes_per_token_after"]
        assert float(row["predicted"] or 0) == manifest["notes"].get("predicted_loss", 0)
        measured = api.evaluate(swept / "points" / name, texts[2], 24, device="cpu").perplexity
        assert float(row["perplexity"]) == pytest.approx(measured, rel=1e-6)
        assert float(row["excess"]) == pytest.approx(log(float(row["perplexity"]) / dense), abs=1e-12)
        assert float(row["kl"]) > 0
        blocks = json.loads((swept / "points" / name / "drift.json").read_text())["blocks"]
        assert len(blocks) == 3 and all(0 <= b < 2 for b in blocks)


def test_points_equal_single_runs_bit_for_bit(swept, texts, tmp_path):
    for name, method, settings in (("svd-llm-0.7", "svd-llm", {}), ("flat-llm-0.7", "flat-llm", {})):
        api.compress(texts[0], output=tmp_path / name, keep=0.7, method=method, settings=settings, calibration=texts[1],
                     n_samples=12, seq_len=24, device="cpu")  # fmt: skip
        for path in sorted((tmp_path / name).glob("*.safetensors")):
            assert path.read_bytes() == (swept / "points" / name / path.name).read_bytes()


def test_a_sweep_by_auto_refits_on_few_windows_unless_told(texts, tmp_path):
    found = run(texts, tmp_path / "out", methods=["auto", "auto:refit_share=1"], keeps=[0.7], keep_models="all")
    few, whole = (p for p in found.points if p.name != "dense")
    assert (few.label, whole.label) == ("auto refit_share=0.0625", "auto refit_share=1")
    assert [w for w in found.warnings if "auto:refit_share=1 gives what compress does" in w]
    assert not [
        w for w in run(texts, tmp_path / "o", methods=["auto:anchor=0"], keeps=[0.9]).warnings if "ran with" in w
    ]
    again = run(texts, tmp_path / "out", methods=["auto", "auto:refit_share=1"], keeps=[0.7], keep_models="all")
    assert again.skipped == 2 and not again.warnings, "nothing ran"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "--set refit_share=0.0625" in page  # the command that makes the point again
    for point, settings in ((few, {"refit_share": 0.0625}), (whole, {})):
        api.compress(texts[0], output=tmp_path / point.name, keep=0.7, settings=settings, calibration=texts[1], n_samples=12,
                     seq_len=24, device="cpu")  # fmt: skip
        for path in sorted((tmp_path / point.name).glob("*.safetensors")):
            assert path.read_bytes() == (tmp_path / "out" / "points" / point.name / path.name).read_bytes()


def test_the_calibration_text_runs_once(texts, tmp_path, monkeypatch):
    starts = []
    old = Stream.start
    monkeypatch.setattr(Stream, "start", lambda self: starts.append(1) or old(self))
    run(texts, tmp_path / "out", methods=["svd-llm"], keeps=[0.9, 0.8, 0.7], keep_models="none")
    assert len(starts) == 1


def test_a_sweep_on_text_writes_its_request(tmp_path):
    """Text goes through a tokenizer, and what is recorded of it into sweep.json; the same words go on from there."""
    demo, text = Path(planish.__file__).parent / "data" / "demo", tmp_path / "text.txt"
    text.write_text(
        "def spread(shares):\n    return [share / sum(shares) for share in shares]\n" * 60, encoding="utf-8"
    )
    options = {"methods": ["svd"], "keeps": [0.8], "n_samples": 4, "seq_len": 32, "device": "cpu"}
    for _ in range(2):
        sweep(str(demo), output=tmp_path / "out", calibration=text, eval_text=text, **options)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())["calibration"]
    assert record["source"].endswith("text.txt") and record["begins"] == "never"
    assert len(list(csv.DictReader((tmp_path / "out" / "results.csv").read_text(encoding="utf-8").splitlines()))) == 2


def test_finished_points_are_not_run_again_and_failed_ones_are(texts, tmp_path):
    out = tmp_path / "out"
    found = run(texts, out, methods=["svd-llm", "shortgpt"], keeps=[0.8, 0.01], keep_models="none")
    bad = [p for p in found.points if p.error]
    assert [p.keep_requested for p in bad] and all(p.keep_requested == 0.01 for p in bad)
    assert any("smallest" in p.error for p in bad)
    done = [p for p in found.points if not p.error and p.name != "dense"]
    assert {p.name for p in done} >= {"svd-llm-0.8", "shortgpt-0.8"}
    assert sorted(p.name for p in (out / "points" / "svd-llm-0.8").iterdir()) == ["drift.json", "planish.json"]
    stamp = (out / "points" / "svd-llm-0.8" / "planish.json").stat().st_mtime_ns
    again = run(texts, out, methods=["svd-llm"], keeps=[0.8, 0.9], keep_models="none")
    assert again.skipped == 1 and (out / "points" / "svd-llm-0.8" / "planish.json").stat().st_mtime_ns == stamp
    assert {"svd-llm-0.9", "shortgpt-0.8"} <= {p.name for p in again.points}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "smallest" in page
    with pytest.raises(InputError, match="another calibration"):
        run(texts, out, methods=["svd-llm"], keeps=[0.8], n_samples=11)


def test_a_point_that_is_asked_for_twice_is_one(texts, tmp_path):
    found = run(texts, tmp_path / "s", methods=("svd", "svd"), keeps=(0.7, 0.7))
    assert (found.skipped, len(found.points)) == (0, 2)


def test_only_the_best_weights_stay(texts, tmp_path):
    found = run(texts, tmp_path / "out", methods=["svd-llm", "flat-llm"], keeps=[0.8], keep_models="best")
    best, worst = sorted((p for p in found.points if p.name != "dense"), key=lambda p: p.perplexity)
    assert (best.kept, worst.kept) == ("yes", "")
    assert list((tmp_path / "out" / "points" / best.name).glob("*.safetensors"))
    assert not list((tmp_path / "out" / "points" / worst.name).glob("*.safetensors"))


class Page(HTMLParser):
    """Everything that a browser would fetch, and whether tags match."""

    VOID = {"meta", "br", "img", "link", "circle", "polygon", "rect", "line", "polyline", "td", "th", "tr", "i"}

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_page(text: str) -> Page:
    page = Page(text)
    assert not page.open and not page.fetched and page.tags["script"] == 1 and "link" not in page.tags
    assert "default-src 'none'" in text  # what a browser obeys
    assert not re.search(r"https?://|@import|url\(", text)
    assert "nan" not in re.sub(r"[a-z-]*nan[a-z-]+", "", text.lower())
    return page


def test_the_page_needs_nothing_else(swept):
    text = (swept / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    assert page.tags["svg"] >= 3 + len(METHODS) * len(KEEPS) and page.tags["polyline"]
    for heading in (
        "What it costs",
        "Where the budget went",
        "Drift",
        "All points",
        "The same again",
        "Predicted and measured",
    ):
        assert heading in text
    assert "tiny &amp; &lt;model&gt;" in text and "<model>" not in text
    assert "planish compress" in text and "--set units=linear" in text
    before = text
    (swept / "report.html").unlink()
    assert write_report(swept).read_text(encoding="utf-8") == before


def test_a_single_folder_has_a_page_too(swept, tmp_path):
    path = write_report(swept / "points" / "svd-llm-0.7", tmp_path / "one.html")
    text = path.read_text(encoding="utf-8")
    check_page(text)
    assert "Where the budget went" in text and "svd-llm" in text
    with pytest.raises(InputError, match="nothing to report"):
        write_report(tmp_path)


def test_shares_of_the_heat_map_are_the_plans(swept):
    manifest = json.loads((swept / "points" / "flat-llm-0.7" / "planish.json").read_text())
    roles, cells = find_shares(manifest)
    assert roles == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [c[0] for c in cells[0]] == [1.0, 1.0, 1.0]  # FLAT-LLM leaves queries alone
    width, full = manifest["plan"]["1.mlp"], manifest["full"]["1.mlp"]
    assert cells[roles.index("down")][1][0] == pytest.approx(width / full)


def test_removed_blocks_keep_their_input():
    model = tiny.build("llama_gqa")
    windows = tiny.windows(2, 16)
    dense = drift.trace(model, windows)
    assert drift.compare(dense, dense).kl == pytest.approx(0, abs=1e-6)
    gone = drift.Trace([dense.blocks[0], dense.blocks[2]], dense.logits)
    found = drift.compare(dense, gone, [1])
    error = (dense.blocks[0] - dense.blocks[1]).square().sum() / dense.blocks[1].square().sum()
    assert found.blocks == [0.0, pytest.approx(float(error)), 0.0]


def test_speeds_are_plotted_as_quotients_of_the_same_turns(monkeypatch):
    """Of two points the one that was measured while the machine was busy has the lower rate, and the higher quotient."""
    rates = {"dense": (100, 100), "calm": (110, 100), "busy": (60, 50)}
    points = [
        Point(n, n, json.dumps({}), keep_requested=0.9, keep=0.9, perplexity=9 + i, excess=i / 9, params=10,
              decode_tokens_per_s=a, dense_decode_tokens_per_s=b)
        for i, (n, (a, b)) in enumerate(rates.items())
    ]  # fmt: skip
    seen = {}
    monkeypatch.setattr(page, "chart", lambda series, x, *more, **kw: seen.setdefault(x.label, series) and "")
    page.find_charts(page.Results(Path(), points), {"calm": 0, "busy": 1})
    (series,) = (s for name, s in seen.items() if "per second" in name)
    assert {s.label: [m.x for m in s.marks] for s in series} == {"calm": [1.1], "busy": [1.2]}


def test_charts_hold_what_they_are_given():
    series = [Series("a", 0, [Mark(1, 2, "x"), Mark(2, 900, "far")]), Series("b", 1, [Mark(3, float("nan"), "lost")])]
    text = chart(series, Quantity("x"), Quantity("y"), top=10, level=(1, "dense"))
    assert text.count("<circle") == 1 and "↑" in text and "lost" not in text
    assert "nothing measured" in chart([], Quantity("x"), Quantity("y"))
    ends = [Series("short", 0, [Mark(1, 2, ""), Mark(2, 3, "")]), Series("long", 1, [Mark(1, 2, ""), Mark(4, 5, "")])]
    text = chart(ends, Quantity("x"), Quantity("y"), names=True)
    assert ">short 3.0 at 2<" in text and ">long 5.0<" in text
    ends = [Series("a", 0, [Mark(1, 2, ""), Mark(0.6, 3, "")]), Series("b", 1, [Mark(1, 2, ""), Mark(0.5999, 5, "")])]
    text = chart(ends, Quantity("x", falling=True), Quantity("y"), names=True)
    assert ">a 3.0<" in text and ">b 5.0<" in text, "alike but for rounding"
    assert heat_map(["q"], [[(0.25, "<t>"), None]]).count('class="cell"') == 1
    axis = Axis(1, 1000, 0, 3, log=True)
    assert axis.at(10) == pytest.approx(1) and axis.ticks() and all(1 <= t <= 1000 for t in axis.ticks())


@pytest.mark.parametrize("text", ["nope", "auto:anchor", "auto:nope=1", "auto:anchor=x"])
def test_wrong_methods_are_named(text):
    with pytest.raises(InputError):
        parse_method(text)


def test_command_line(texts, tmp_path, capsys):
    model, calibration, evaluation = map(str, texts)
    out = tmp_path / "out"
    words = ["sweep", model, "--methods", "svd-llm", "--keep", "0.8", "--calibration", calibration, "--n-samples", "12",
             "--seq-len", "24", "--eval-text", evaluation, "--eval-tokens", "96", "--device", "cpu", "--no-cache", "--bench",
             "--json", "-o", str(out)]  # fmt: skip
    assert app(words, standalone_mode=False) in (0, None)
    found = json.loads(capsys.readouterr().out)
    point = next(p for p in found["points"] if p["name"] == "svd-llm-0.8")
    assert point["decode_tokens_per_s"] > 0 and point["dense_decode_tokens_per_s"] > 0
    assert read_points(out)[1].perplexity == point["perplexity"]
    assert "Perplexity and speed" in (out / "report.html").read_text(encoding="utf-8")
    assert app(["report", str(out), "-o", str(tmp_path / "r.html"), "--json"], standalone_mode=False) in (0, None)
    assert (tmp_path / "r.html").is_file()
    assert app([*words[:5], "0.8,x", *words[6:]], standalone_mode=False) == 2
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- curves over sizes


@pytest.fixture(scope="module")
def sized(texts, tmp_path_factory) -> Path:
    """A size that 3 bits fill, and one that 8 bits leave room in."""
    pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
    root = tmp_path_factory.mktemp("sizes")
    model = tiny.save(
        tiny.build("llama_gqa", hidden_size=32, intermediate_size=64, num_hidden_layers=2), root / "model"
    )
    three = sum(predict(Request.ask(model=""), open_source(model), "3"))
    sizes = [2 * int(three), f"{1.01 * three / 1000:.3f}kB"]
    run((model, *texts[1:]), root / "sweep", methods=["flat-llm"], keeps=(), sizes=sizes, keep_models="all")
    return root / "sweep"


def test_three_curves_over_sizes(sized):
    """Plain types as `compress --keep 1 --bits` makes them, cuts that take no more than asked, and what both together chose."""
    points = {p.name: p for p in read_points(sized)}
    curves = {c: [p for p in points.values() if p.curve == c] for c in ("bits", "cuts", "both")}
    bits = [p.bits for p in curves["bits"]]
    assert (
        {"8", "4", "3", "2"} <= set(bits) and any("." in b for b in bits) and all(p.keep == 1 for p in curves["bits"])
    )
    assert len({p.bytes for p in curves["bits"]}) == len(bits) and all(p.kl >= 0 for p in curves["bits"])
    wide, narrow = sorted((p.asked["max_bytes"] for p in curves["both"]), reverse=True)
    assert [p.asked["max_bytes"] for p in curves["cuts"]] == [wide, narrow]
    assert curves["cuts"][0].bits == "16" and curves["cuts"][0].bytes <= wide and curves["cuts"][0].keep < 1
    assert "smallest" in curves["cuts"][1].error  # fewer bytes than cutting alone can reach
    for p in curves["both"]:
        chosen = next(c for c in json.loads((sized / "points" / p.name / "choices.json").read_text()) if c["chosen"])
        assert p.bytes <= p.asked["max_bytes"] and (p.bits, p.asked_bits) == (chosen["bits"], "auto")
    plain = json.loads((sized / "points" / "rounding-3-bits" / "planish.json").read_text())["result"]
    assert plain["rounding"]["asked"] == "3" and plain["bytes_after"] == points["rounding-3-bits"].bytes


def test_the_page_of_sizes(sized):
    """Three lines in two pictures, a tile for every size with the best of each curve, commands that make the points again."""
    text = (sized / "report.html").read_text(encoding="utf-8")
    check_page(text)
    for words in (
        "Divergence and size",
        "rounding alone",
        "flat-llm, 16 bits",
        "flat-llm and rounding",
        "--bits auto",
        "--bits 3",
    ):
        assert words in text
    assert text.count('class="tile"') == 2
    points, dense = [p for p in read_points(sized) if p.curve and not p.error], read_points(sized)[0]
    cards, note = find_curves(points, dense, {p.label: n for n, p in enumerate(points)})
    assert len(cards) == 2 and "The dense model takes" in note
    best = next(p for p in points if p.curve == "both")
    assert tell_losers(points) == "" or best.label not in tell_losers(points)
    worse = [Point("b", "m", bytes=9, kl=0.5, curve="both", budgets='{"max_bytes": 10}'),
             Point("a", "m", bytes=9, kl=0.2, curve="bits", bits="3")]  # fmt: skip
    assert tell_losers(worse) == (
        "Nearer to the dense model than the plan that was chosen: at 10 bytes rounding alone by 0.3000 nats."
    )


def test_sizes_stand_alone(texts, tmp_path):
    with pytest.raises(InputError, match="leave the other budgets out"):
        run(texts, tmp_path / "out", methods=["flat-llm"], keeps=[0.5], sizes=["1MB"])
    with pytest.raises(InputError, match="expected a number"):
        run(texts, tmp_path / "out", methods=["flat-llm"], keeps=(), sizes=["many"])
