"""Targets constrain what is cut before anything is solved."""

from __future__ import annotations

import json

import pytest

import compressed
import tiny
from planish.checkpoint import open_source
from planish.compress import compress
from planish.core import Unit
from planish.errors import InputError
from planish.export.gguf import export_gguf
from planish.methods import find_method
from planish.targets import TARGETS, check, constrain, find_target, make_uniform
from tiny import build

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}


def units_of(method: str, model="llama_gqa", **settings):
    source = open_source(build(model, **SIZES))
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    solvers = find_method(method, settings).solvers()
    return {u: s for s in solvers for shape in shapes for u in s.units(shape)}, shapes


def test_unknown_targets_are_named():
    with pytest.raises(InputError, match="unknown target 'tpu'; expected one of any, hf, onnx, vllm, gguf"):
        find_target("tpu")


@pytest.mark.parametrize("target", ["any", "hf", "onnx"])
def test_some_targets_ask_for_nothing(target):
    units, shapes = units_of("svd-llm")
    assert constrain(target, "svd-llm", units, shapes) is units


def test_low_rank_methods_are_refused_for_gguf():
    units, shapes = units_of("svd-llm")
    with pytest.raises(InputError, match="svd-llm gives a low-rank linear and nothing else; llama"):
        constrain("gguf", "svd-llm", units, shapes)


def test_units_that_a_target_cannot_hold_are_left_alone():
    units, shapes = units_of("a3")
    assert {u.name for u in units} == {"qk", "vo", "mlp"}
    kept = constrain("gguf", "a3", units, shapes)
    assert {u.name for u in kept} == {"vo", "mlp"}
    for unit, solver in kept.items():
        step = TARGETS["gguf"].steps[unit.name]
        ranks = solver.ranks(unit, shapes[unit.block])
        full = units[unit].ranks(unit, shapes[unit.block])[-1]
        assert all(r % step == 0 or r == full for r in ranks) and ranks[-1] == full


def test_plans_become_uniform_where_value_dimensions_are_cut():
    plan = {Unit(0, "vo"): 16, Unit(1, "vo"): 24, Unit(0, "mlp"): 64, Unit(1, "mlp"): 96}
    assert make_uniform("gguf", plan) == {u: {"vo": 16, "mlp": 64}[u.name] for u in plan}
    only_mlp = {u: r for u, r in plan.items() if u.name == "mlp"}
    assert make_uniform("gguf", only_mlp) == only_mlp, "deci has widths per block"
    assert make_uniform("any", plan) == plan


@pytest.mark.parametrize("method", ["flat-llm", "a3"])
def test_what_is_compressed_for_gguf_needs_no_filling(method, tmp_path):
    model = build("llama_gqa", **SIZES, tie_word_embeddings=False)
    result = compress(
        model, output=tmp_path / "m", keep=0.7, method=method, windows=tiny.windows(16, 24), target="gguf",
        settings={"damping": "0.01"},
    )  # fmt: skip
    assert result.keep <= 0.7
    specs = json.loads((tmp_path / "m" / "config.json").read_text())["planish"]["blocks"]
    source = open_source(model)
    assert check("gguf", specs, [source.shape(i) for i in range(source.n_blocks)]) == []
    written = export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    assert written.architecture == "mimo2" and written.parameters == written.stored_parameters


def test_finished_models_say_why_they_do_not_fit(tmp_path):
    source = open_source(build("llama_gqa"))
    shapes = [source.shape(i) for i in range(source.n_blocks)]

    def reasons(target: str, form: str) -> list[str]:
        folder = tmp_path / form
        if not folder.exists():
            compressed.make_folder(source.model, folder, compressed.FORMS[form])
        return check(target, json.loads((folder / "config.json").read_text())["planish"]["blocks"], shapes)

    assert "block 1 has no attention" in reasons("vllm", "attention removed")[0]
    assert reasons("vllm", "low-rank pairs") == []
    assert "block 0's q is a pair: multiplied back" in reasons("gguf", "low-rank pairs")[0]
    assert "fewer query/key dimensions" in reasons("gguf", "fewer rotary pairs")[0]
    assert "no graph has that" in reasons("gguf", "submodules → linear before the norm")[0]
    assert "value dimensions differ" in reasons("gguf", "value dimensions and MLP widths per block")[0]
    assert reasons("gguf", "attention removed") == [] == reasons("hf", "low-rank pairs")
