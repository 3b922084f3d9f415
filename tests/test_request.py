"""Options are declared once: flags, keywords, recipes and the journal hold the fields of a request, no others and no fewer."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from typer.main import get_command

import planish
import tiny
from planish.cli import app
from planish.errors import InputError
from planish.request import OPTIONS, RECIPE, TEXT, Limits, Request, Text, read_recipe

FLAGS = {"settings": "set"}  # where a flag has another name than its option
OWN = {  # flags that are no part of a request: how a command runs, and what it measures
    "compress": {"output", "sparsity", "overwrite", "cache", "no-cache", "no-ladder", "json"},
    "plan": {"sparsity", "measure", "cache", "no-cache", "json"},
    "sweep": {"output", "methods", "eval-text", "eval-tokens", "keep-models", "bench", "cache", "no-cache", "overwrite", "json"},
    "eora": {"output", "bits", "rank", "quantiser", "overwrite", "json"},
}  # fmt: skip
LEFT_OUT = {
    "plan": {"ladder"},
    "sweep": {"max-params", "max-latency", "context", "method", "set", "adapter", "bits", "head-bits",
              "fit", "ladder"},
    "eora": {FLAGS.get(n, n.replace("_", "-")) for n in OPTIONS} - {"calibration", "n-samples", "seq-len", "seed", "sampling",
                                                                  "bos", "device", "dtype", "bits"},
}  # fmt: skip


def flags(command: str) -> dict[str, object]:
    """Long flags of a command, --help left out, and their parameters."""
    found = get_command(app).commands[command].params
    options = {n: p for p in found for n in [*p.opts, *p.secondary_opts] if n.startswith("--")}
    return {n.removeprefix("--"): p for n, p in options.items() if n != "--help"}


@pytest.mark.parametrize("command", OWN)
def test_flags_are_the_fields(command):
    asked = {FLAGS.get(n, n.replace("_", "-")) for n in OPTIONS}
    assert set(flags(command)) == (asked | OWN[command]) - LEFT_OUT.get(command, set())


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_flags_say_what_the_fields_say(command):
    named = {FLAGS.get(n, n.replace("_", "-")): n for n in OPTIONS}
    for shown in named.keys() - LEFT_OUT.get(command, set()):
        name, flag = named[shown], flags(command)[shown]
        field = OPTIONS[name]
        assert flag.help == field.description
        assert flag.default == (None if name == "settings" else field.default)


@pytest.mark.parametrize("function", [planish.compress, planish.forecast])
def test_keywords_are_the_fields(function):
    found = inspect.signature(function).parameters
    assert {n: p.default for n, p in found.items() if n in OPTIONS} == {n: f.default for n, f in OPTIONS.items()}
    more = {"model", "tokenizer", "sparsity", "cache", "progress"} | (
        {"output", "overwrite", "begin"} if function is planish.compress else {"measure"}
    )
    assert set(found) - set(OPTIONS) == more
    assert all(f"{n}: {f.description}" in function.__doc__ for n, f in OPTIONS.items())
    with pytest.raises(TypeError, match="keeep"):
        function("model", keeep=0.5)


def test_recipes_hold_every_option():
    fields = set(Request.model_fields)
    assert set(RECIPE) == fields and set(Limits.model_fields) < fields
    assert set(OPTIONS) == fields - {"version", "model", "published"} | set(TEXT)
    assert set(Text.model_fields) - {"source"} == set(TEXT)


def test_a_recipe_means_the_same_from_any_directory(tmp_path, monkeypatch):
    """Written from one directory with relative names, run from another, and once more after the tree was moved."""
    root = tmp_path / "before"
    tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), root / "models" / "m")
    np.save(root / "ids.npy", tiny.windows(20, 24).flatten().numpy())
    monkeypatch.chdir(root)
    options = {"n_samples": 12, "seq_len": 16, "method": "svd", "device": "cpu"}
    planish.compress("models/m", output="a", calibration="ids.npy", **options)
    recipe = read_recipe(root / "a" / "recipe.yaml")
    assert "model: ../models/m\n" in (root / "a" / "recipe.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    root = root.rename(tmp_path / "after")
    recipe = read_recipe(root / "a" / "recipe.yaml")
    planish.compress(**recipe.arguments, output="b")
    shards = sorted(p.name for p in (root / "a").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (root / "a" / name).read_bytes() == (tmp_path / "elsewhere" / "b" / name).read_bytes()


def test_names_of_no_file_are_left_alone(tmp_path):
    (tmp_path / "r.yaml").write_text("model: owner/model\ncalibration: {source: wikitext2}\n")
    (tmp_path / "wikitext2").mkdir()
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.model, recipe.calibration.source) == ("owner/model", "wikitext2")


@pytest.mark.parametrize("value", ["1e400", "0", "0.4"])
def test_sizes_that_are_none(value):
    with pytest.raises(InputError, match="must be 1 or more and a number"):
        Request.ask(model="m", max_bytes=value)
