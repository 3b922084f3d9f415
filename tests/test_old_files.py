"""Recipes, journals, sweeps and manifests as earlier code wrote them still load, resume and are gone on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import planish
import tiny
from planish.compression import resume
from planish.evaluate.report.page import write_report
from planish.folder.writer import seal
from planish.manifest import read_result
from planish.request import read_recipe
from planish.sweep import sweep
from test_resume import hashes

RECIPE = """version: 1
model: model
kv_keep: 0.75
max_params: 16000
method: flat-llm
settings:
  allocation: iprs
  ridge: 0.02
  damping: 1.0e-10
  qk: dense
calibration:
  source: ids.npy
  n_samples: 12
  seq_len: 16
  seed: 3
  sampling: random
device: cpu
dtype: float32
round_to: 1
target: any
"""

REQUEST = """{
  "model": "/somewhere/model", "name": "model",
  "asked": {"keep": null, "kv_keep": 0.75, "flops_keep": null, "max_params": 16000, "max_bytes": null, "max_latency": null,
            "context": null},
  "method": "flat-llm", "settings": {"allocation": "iprs", "ridge": 0.02, "damping": 1e-10, "qk": "dense"},
  "given": ["ridge"],
  "calibration": {"source": "ids.npy", "n_samples": 12, "seq_len": 16, "seed": 3, "sampling": "random", "bos": false,
                  "fingerprint": "fb484300e9a83045525a4228f7d340ae39863ad18c851b55a5655b5536ef71b1"},
  "device": "cpu", "dtype": "float32", "round_to": 1, "overwrite": false, "target": "any",
  "files": {"recipe.yaml": "version: 1\\nmodel: model\\n"},
  "processes": 1, "measured": null, "windows": "", "digest": ""
}"""

SWEEP = """{
  "model": "model",
  "calibration": {"source": "ids.npy", "n_samples": 4, "seq_len": 16, "seed": 0, "sampling": "contiguous", "bos": false,
                  "fingerprint": "f8db9c9ebd24a31ad6a0c0d6bf1deecb7fb9f411d4af38554446600ec3061884"},
  "evaluation": {"source": "ids.npy", "tokens": 400, "seq_len": 16,
                 "fingerprint": "c45f82a0c8fca26771bbd92c7ba445549e5df93b408de27f4cd5e9e9fb1551c8"},
  "device": "cpu", "dtype": null, "round_to": 1
}"""
# fmt: off
ROWS = (
    "name,method,settings,keep_requested,keep,params,block_params,kv_bytes_per_token,perplexity,nll,excess,predicted,kl,"
    "prefill_tokens_per_s,decode_tokens_per_s,dense_decode_tokens_per_s,seconds,peak_rss_bytes,format,kept,error,budgets,bytes,"
    "flops_per_token\n"
    "dense,dense,{},1.0,1.0,20960,14592,256,43606.469112122875,10.682960792462032,0.0,,,,,,,0,native,,,{},86032,39488\n"
    "svd-0.8,svd,{},0.8,0.799890350877193,18040,11672,256,63932.57840163417,11.065584344585737,0.3826235521237056,,"
    '3.931363750183373,,,,1.01,395014144,planish,,,"{""keep"": 0.8}",75776,33648\n'
)
# fmt: on
MANIFEST = """{
  "planish": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "source": "model", "method": "flat-llm",
  "settings": {"allocation": "iprs", "ridge": 0.02, "damping": 1e-10, "qk": "dense"}, "round_to": 1,
  "calibration": {"source": "ids.npy", "n_samples": 12, "seq_len": 16, "seed": 3, "sampling": "random", "bos": false,
                  "fingerprint": "fb484300e9a83045525a4228f7d340ae39863ad18c851b55a5655b5536ef71b1"},
  "dtype": "float32",
  "result": {
    "method": "flat-llm", "keep_requested": 0.6600877192982456, "keep": 0.6578947368421053, "params_before": 20960,
    "params_after": 15968, "block_params_before": 14592, "block_params_after": 9600, "kv_bytes_per_token_before": 256,
    "kv_bytes_per_token_after": 192, "format": "planish", "output": "out", "seconds": {"plan": 0.26, "total": 0.92},
    "peak_rss_bytes": 391442432, "warnings": [], "bytes_before": 86032, "bytes_after": 66032, "flops_per_token_before": 39488,
    "flops_per_token_after": 28480, "context": 16, "latency_ms_before": null, "latency_ms_after": null,
    "budgets": {"kv_keep": {"asked": 0.75, "achieved": 0.75}, "max_params": {"asked": 16000, "achieved": 15968}},
    "submodules": {}, "removed": 0.3421052631578947, "keep_whole_model": 0.7618320610687023
  },
  "plan": {"0.mlp": 30, "0.vo": 5, "1.mlp": 22, "1.vo": 3}, "full": {"0.mlp": 44, "0.vo": 8, "1.mlp": 44, "1.vo": 8},
  "roles": ["q", "k", "v", "o", "gate", "up", "down"],
  "weights": {"0.mlp": [4224, 2880], "0.vo": [1536, 960], "1.mlp": [4224, 2112], "1.vo": [1536, 576]},
  "errors": {"0.vo": 1.89, "0.mlp": 1.11, "1.vo": 5.2, "1.mlp": 3.87},
  "notes": {"importance": {"0": 0.29, "1": 0.22}}
}"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the model and the ids that the files below speak of; the commands run in it."""
    tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.arange(400) * 7 % 97)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_recipe(path: Path, output: Path) -> None:
    planish.compress(**read_recipe(path).arguments, output=output)


def test_a_recipe(place):
    (place / "r.yaml").write_text(RECIPE)
    recipe = read_recipe(place / "r.yaml")
    assert recipe.given == {"kv_keep": 0.75, "max_params": 16000}
    assert recipe.calibration.model_dump() == {
        "source": str(place / "ids.npy"), "n_samples": 12, "seq_len": 16, "seed": 3, "sampling": "random",
        "bos": "once", "objective": "text",  # the only ones there were
    }  # fmt: skip
    (place / "out").mkdir()
    (place / "out" / "recipe.yaml").write_text(RECIPE)  # as it lay beside its weights: names start from where it runs
    assert read_recipe(place / "out" / "recipe.yaml").text() == RECIPE.replace(
        "sampling: random\n", "sampling: random\n  bos: once\n  objective: text\n"
    )
    run_recipe(Path("out/recipe.yaml"), place / "again")
    assert json.loads((place / "again" / "planish.json").read_text())["result"]["params_after"] == 15968


def test_a_journals_request(place):
    """What was asked before the code was changed is what is written after it."""
    (place / "r.yaml").write_text(RECIPE)
    run_recipe(Path("r.yaml"), place / "whole")
    state = place / "out.partial" / "resume"
    state.mkdir(parents=True)
    ids = planish.calibrate.text.load_tokens(place / "ids.npy").tokens
    windows = tiny.sample_windows(ids, 12, 16, 3, "random")
    save_file({"windows": windows.contiguous()}, state / "windows.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256((state / "windows.safetensors").read_bytes()).hexdigest()
    request = json.loads(REQUEST) | {"model": str(place / "model"), "windows": digest}
    del request["digest"]
    (state / "request.json").write_text(json.dumps(seal(request)))
    resume(place / "out")
    assert (place / "out" / "recipe.yaml").read_text() == request["files"]["recipe.yaml"]
    found, whole = hashes(place / "out"), hashes(place / "whole")
    for name in set(whole) - {"recipe.yaml", "planish.json", "README.md"}:
        assert found[name] == whole[name], name


def test_a_sweep(place):
    (place / "s" / "points").mkdir(parents=True)
    (place / "s" / "sweep.json").write_text(SWEEP)
    (place / "s" / "results.csv").write_text(ROWS)
    options = {"calibration": "ids.npy", "eval_text": "ids.npy", "n_samples": 4, "seq_len": 16, "device": "cpu"}
    found = sweep("model", output="s", methods=["svd"], keeps=[0.8], **options)
    assert found.skipped == 1 and [p.name for p in found.points] == ["dense", "svd-0.8"]
    assert (place / "s" / "results.csv").read_text() == ROWS


def test_a_manifest(place):
    (place / "planish.json").write_text(MANIFEST)
    assert read_result(place).as_dict()["keep_whole_model"] == pytest.approx(15968 / 20960)
    page = write_report(place).read_text()
    assert "Where the budget went" in page and "--kv-keep 0.75 --max-params 16000" in page
