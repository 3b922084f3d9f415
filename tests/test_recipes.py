"""Recipes say everything the flags can say, and repeat a run byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import planish
import tiny
from planish.cli.reproduce import find_papers
from planish.errors import InputError
from planish.methods import find_method
from planish.request import Request, read_recipe
from test_fuzz import VALUES, fuzz, survives
from test_resume import hashes


def call(*words: object) -> int:
    from typer.main import get_command

    from planish.cli import app

    return get_command(app).main(list(map(str, words)), standalone_mode=False)


def test_recipe_beside_the_weights_repeats_them(tmp_path):
    model = tiny.save(tiny.build(tiny.NAMES[0]), tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, 400))
    flags = ["--keep", 0.7, "--method", "flat-llm", "--calibration", tmp_path / "ids.npy", "--n-samples", 12]
    flags += ["--seq-len", 16, "--set", "ridge=0.02", "--sampling", "random", "--seed", 3]
    assert call("compress", model, "-o", tmp_path / "a", *flags) == 0
    recipe = read_recipe(tmp_path / "a" / "recipe.yaml")
    assert (recipe.keep, recipe.settings["ridge"], recipe.calibration.seed) == (0.7, 0.02, 3)
    assert call("compress", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b") == 0
    assert hashes(tmp_path / "b") == hashes(tmp_path / "a")
    assert call("compress", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "c", "--keep", 0.9) == 0
    assert read_recipe(tmp_path / "c" / "recipe.yaml").keep == 0.9


def test_another_method_drops_the_recipes_settings(tmp_path):
    model = tiny.save(tiny.build(tiny.NAMES[0]), tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, 800))
    recipe = {"model": str(model), "keep": 0.8, "method": "flat-llm", "settings": {"ridge": 0.5, "allocation": "uniform"},
              "calibration": {"source": str(tmp_path / "ids.npy"), "n_samples": 12, "seq_len": 16}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    used = {}
    for method, words in (("a3", ["--set", "probes=3"]), ("flat_llm", ["--set", "damping=0.25"])):
        assert call("compress", tmp_path / "r.yaml", "--method", method, *words, "-o", tmp_path / method) == 0
        used[method] = read_recipe(tmp_path / method / "recipe.yaml").settings
    assert used["a3"]["probes"] == 3 and "ridge" not in used["a3"]
    assert used["flat_llm"] == {"ridge": 0.5, "allocation": "uniform", "damping": 0.25, "qk": "dense"}


WITHOUT_DENSE = {"cocurve-llama-3.1-8b-instruct"}  # whose paper gives no perplexity of the dense model


@pytest.mark.parametrize("path", find_papers().values(), ids=lambda p: p.stem)
def test_papers(path):
    recipe = read_recipe(path)
    p = recipe.published
    assert p and p.differs and p.where
    assert (p.dense is None) == (p.value is None or path.stem in WITHOUT_DENSE)
    assert p.factor > 1 if p.value is None else p.value > (p.dense or 1)
    find_method(recipe.method, recipe.arguments["settings"])


def test_reproduce_a_local_recipe(tmp_path, capsys):
    """The plumbing of `planish reproduce` on a tiny model: what it measures is what compress and eval measure."""
    model = tiny.save(tiny.build(tiny.NAMES[0]), tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, 800))
    recipe = {
        "version": 1, "model": "nobody/knows", "keep": 0.7, "method": "svd-llm",
        "calibration": {"source": str(tmp_path / "ids.npy"), "n_samples": 12, "seq_len": 16},
        "published": {"paper": "P", "where": "T", "text": str(tmp_path / "ids.npy"), "seq_len": 16, "dense": 50.0, "value": 75.0},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    words = ["reproduce", tmp_path / "r.yaml", "--model", model, "-o", tmp_path / "out"]
    assert call(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["published"], found["published_dense"], found["published_factor"]) == (75.0, 50.0, 1.5)
    for key, place in (("measured", tmp_path / "out"), ("measured_dense", model)):
        assert found[key] == planish.evaluate(place, tmp_path / "ids.npy", seq_len=16).perplexity
    assert found["measured_factor"] == pytest.approx(found["measured"] / found["measured_dense"])
    assert found["keep"] < 0.7 + 1e-9
    recipe["published"] |= {"value": None, "factor": 2.0}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    words[-1] = tmp_path / "again"
    assert call(*words) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["dense", "50", f"{found['measured_dense']:.4g}"] in rows
    assert ["compressed", "/", "dense", "2", f"{found['measured_factor']:.4g}"] in rows


def test_reproduce_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("model: x\n")
    for words, message in (
        (["nonsense"], "no recipe 'nonsense'; known: "),
        ([tmp_path / "none.yaml"], "no such recipe"),
        ([tmp_path / "r.yaml"], "nothing published"),
        (["a3-llama-2-7b", "--model", tmp_path / "none"], "no such model"),
    ):
        assert call("reproduce", *words) == 2
        assert message in capsys.readouterr().err
    assert call("reproduce", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["recipes"]) == set(find_papers())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a mapping"),
        ("version: 2\nmodel: x", "version 2"),
        ("model: x\nkeep: 1.5", "keep: .*less than or equal to 1"),
        ("model: x\nkeeep: 0.5", "keeep: .*not permitted"),
        ("keep: 0.5", "model: .*required"),
        ("model: x\npublished: {paper: p, where: w}", "either value or factor"),
        ("a: [", "cannot read"),
        ("!!python/object/apply:os.system [id]", "cannot read"),
    ],
)
def test_wrong_recipes(text, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "r.yaml")
    assert call("compress", tmp_path / "r.yaml", "-o", tmp_path / "out") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@fuzz
@given(data=st.data())
def test_any_recipe(data, tmp_path):
    value = {"version": 1, "model": "x", "calibration": {"source": "y"}}
    for key in data.draw(st.lists(st.sampled_from([*Request.model_fields, "other"]), min_size=1, max_size=3)):
        value[key] = data.draw(VALUES)
    path = Path(tmp_path / "r.yaml")
    path.write_text(yaml.safe_dump(value))
    if survives(lambda: read_recipe(path)):
        again = tmp_path / "again.yaml"
        again.write_text(read_recipe(path).text())
        assert read_recipe(again).model_dump() == read_recipe(path).model_dump() or "nan" in again.read_text()
