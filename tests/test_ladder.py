"""Beside a result of a size: what plain rounding of the dense model gives at the same bytes, measured on the same windows."""

from __future__ import annotations

import json
from math import nan

import numpy as np
import pytest
import torch

import planish
from planish.cli import app
from planish.cli.compress import show_ladder
from planish.evaluate.report.page import write_report
from planish.folder.source import open_source
from planish.request import Request
from planish.sizes import ladder
from planish.sizes.fit import predict
from planish.sizes.ladder import Ladder, list_rungs
from planish.sizes.trials import Choice, Runner, hold_out
from tiny import build, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
IDS = windows(16, 24)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(build("llama_gqa", **SMALL), tmp_path_factory.mktemp("ladder") / "model")


@pytest.fixture(scope="module")
def size(model) -> int:
    """Between 3 and 4 bits."""
    three, four = (sum(predict(Request.ask(model=""), open_source(model), b)) for b in "34")
    return int((three + four) / 2)


def compress(model, output, **options):
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 16, "seq_len": 24, "method": "flat-llm"}
    return planish.compress(model, output=output, **text | options)


def measure(folder, dense) -> float:
    """KL(dense ‖ folder) on the held-out windows, in nats per token, by the definition."""
    with torch.no_grad():
        p, q = (
            planish.load(f, dtype="float32")(input_ids=hold_out(IDS)[1]).logits[:, :-1].double().log_softmax(-1)
            for f in (dense, folder)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_rungs_are_plain_roundings_on_the_same_windows(model, size, tmp_path, monkeypatch):
    """By hand: a plain rounding made from the same three quarters of the windows; and a second run makes none of them again."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    asked = {"max_bytes": int(0.8 * sum(p.stat().st_size for p in model.glob("*.safetensors"))), "cache": True}
    done = compress(model, tmp_path / "out", **asked)
    found = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert found == done.ladder and (found["size"], found["windows"]) == (asked["max_bytes"], 4)
    rungs = {r["bits"]: r for r in found["rungs"]}
    assert [*rungs] == ["8", "4", "3", "2"] and all(r["fits"] for r in found["rungs"])
    few = {"calibration": hold_out(IDS)[0].flatten().numpy(), "n_samples": 12, "ladder": False}
    plain = compress(model, tmp_path / "plain", keep=1, bits="3", **few)
    assert plain.bytes_after == rungs["3"]["bytes"]
    assert measure(tmp_path / "plain", model) == pytest.approx(rungs["3"]["kl"], rel=1e-3)

    def refuse(self, choice: Choice, size: float) -> None:
        raise AssertionError(f"{choice} is made again")

    monkeypatch.setattr(Runner, "make", refuse)
    again = compress(model, tmp_path / "again", **asked)
    assert again.ladder == done.ladder
    assert not [p for p in tmp_path.iterdir() if ".sizes-" in p.name]


def test_a_cut_to_a_size_has_a_ladder_too(model, size, tmp_path, capsys):
    """In its text, its JSON and its page; without --no-ladder only."""
    whole = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    words = ["compress", str(model), "--max-bytes", str(int(0.8 * whole)), "--method", "flat-llm", "--calibration",
             str(tmp_path / "ids.npy"), "--n-samples", "16", "--seq-len", "24", "--no-cache"]  # fmt: skip
    assert app([*words, "-o", str(tmp_path / "out"), "--json"], standalone_mode=False) in (0, None)
    result = json.loads(capsys.readouterr().out)
    found = result["ladder"]
    assert found["result"]["bits"] == "16" and found["result"]["keep"] < 1 and not result["choices"]
    assert result["budgets"]["max_bytes"]["achieved"] <= 0.8 * whole
    assert [r["bits"] for r in found["rungs"]] == ["8", "4", "3", "2"] and all(r["fits"] for r in found["rungs"])
    assert found["verdict"] == "plain"  # 8 bits of a random model cost next to nothing
    table, line = show_ladder(found)
    assert table.row_count == 5 and "plain rounding is nearer" in line and "--bits auto" in line
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "Plain rounding at the same bytes" in page and f"{found['rungs'][1]['bytes']:,}" in page
    assert app([*words, "-o", str(tmp_path / "none"), "--no-ladder"], standalone_mode=False) in (0, None)
    assert "plain rounding" not in capsys.readouterr().out and not (tmp_path / "none" / "ladder.json").exists()


def test_a_second_budget_cuts_no_rung(model, tmp_path, monkeypatch):
    """And what a run beside it has measured is the same for a run without."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    size = int(0.8 * sum(p.stat().st_size for p in model.glob("*.safetensors")))
    both = compress(model, tmp_path / "both", max_bytes=size, flops_keep=0.5, cache=True)
    alone = compress(model, tmp_path / "alone", max_bytes=size)
    assert both.keep < 0.6 < alone.keep
    assert both.ladder["rungs"] == alone.ladder["rungs"]
    assert compress(model, tmp_path / "after", max_bytes=size, cache=True).ladder == alone.ladder


def test_where_there_is_nothing_to_compare(model, size, tmp_path):
    """Said, where a model is in memory or there are too few windows; nothing, where the size holds the dense model."""
    small = build("llama_gqa", **SMALL)
    whole = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    done = compress(small, tmp_path / "memory", max_bytes=int(0.8 * whole))
    assert "in memory" in done.ladder["why"] and "in memory" in show_ladder(done.ladder)[0]
    few = {"calibration": IDS[:3].flatten().numpy(), "n_samples": 3}
    assert "none to hold out" in compress(model, tmp_path / "few", max_bytes=int(0.8 * whole), **few).ladder["why"]
    assert compress(model, tmp_path / "all", max_bytes=2 * whole).ladder == {}
    assert compress(model, tmp_path / "keep", keep=0.9).ladder == {}


def test_the_types_to_measure(model, size):
    """The next larger type, types mixed to fill the size, and all that it holds; below all types the smallest."""
    source, request = open_source(model), Request.ask(model="", bits="auto")
    rungs = [r.bits for r in list_rungs(request, source, size)]
    assert rungs[0] == "4" and rungs[2:] == ["3", "2"] and 3.3 < float(rungs[1]) < 4.3
    assert [r.bits for r in list_rungs(request, source, 1000)] == ["2"]
    assert [r.bits for r in list_rungs(request, source, 10**9)] == ["8", "4", "3", "2"]


def test_who_won():
    """Within two standard errors nobody did; of types only those that the size holds count."""
    result = Choice("4", 0.8, 90, 0.5, stderr=0.03)
    rungs = [Choice("4", 1.0, 120, 0.1, stderr=0.01), Choice("3", 1.0, 90, 0.6, stderr=0.04)]
    found = Ladder(100, 4, result, rungs)
    assert found.best is rungs[1] and found.verdict == "alike"
    rungs[1].kl = 0.61
    assert found.verdict == "result"
    rungs[1].kl = 0.39
    assert found.verdict == "plain"
    assert Ladder(100, 4, rungs[1], rungs).verdict == "plain"
    assert Ladder(100, 4, result, rungs[:1]).verdict == "" and Ladder(100, why="x").verdict == ""
    rungs[1].kl = nan
    assert found.best is None and found.as_dict()["rungs"][1]["kl"] is None
    assert ladder.NOISE == 2
