"""Text reaches the model as it does in use: calibration and evaluation begin where the tokenizer begins."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch

import planish
import planish.sweep
import tiny
from planish.calibrate import text as text_module
from planish.evaluate import perplexity
from planish.evaluate.report.page import make_command, read_results
from planish.request import read_recipe
from test_text import byte_tokenizer

SEQ = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose tokenizer begins every text with 256."""
    folder = tmp_path_factory.mktemp("begins") / "model"
    tiny.build("llama_gqa", vocab_size=258, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    byte_tokenizer(with_bos=True, end=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} says " + "abc " * i}) + "\n" for i in range(30)))
    return path


def oracle(model, text, every: bool) -> float:
    """Perplexity by hand: the text's tokens in chunks, each with 256 in front of it or not."""
    lm = planish.load(model, dtype="float32")
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenize = byte_tokenizer()
    losses = []
    if every:
        stream, windows = [i for d in documents for i in (256, *tokenize(d).input_ids)], []
        while len(stream) >= SEQ:
            window = stream[:SEQ] if stream[0] == 256 else [256, *stream[: SEQ - 1]]
            windows.append(window)
            stream = stream[SEQ if stream[0] == 256 else SEQ - 1 :]
    else:
        stream = [256, *tokenize("\n\n".join(documents)).input_ids]
        windows = [stream[a:b] for a, b in pairwise(range(0, len(stream) + 1, SEQ))]
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor(window)
            losses.append(torch.nn.functional.cross_entropy(lm(ids[None]).logits[0, :-1], ids[1:]))
    return torch.stack(losses).mean().exp().item()


def test_evaluation_begins_every_window(model, text, run):
    every, once = (oracle(model, text, e) for e in (True, False))
    assert abs(every - once) > 0.01 * once  # or the test could not tell them apart
    for bos, expected, begins in (("auto", every, "every"), ("every", every, "every"), ("once", once, "once")):
        found = planish.evaluate(model, text, seq_len=SEQ, bos=bos)
        assert found.perplexity == pytest.approx(expected, rel=1e-4) and (found.begins, found.bos) == (begins, True)
    assert planish.evaluate(model, text, seq_len=SEQ, bos="never").begins == "never"
    assert planish.evaluate(model, text, seq_len=SEQ, max_windows=3).windows == 3
    done = run("eval", model, "--text", text, "--seq-len", SEQ)
    assert "(BOS in every window)" in done.stdout
    assert "(begins with BOS)" in run("eval", model, "--text", text, "--seq-len", SEQ, "--bos", "once").stdout


def test_without_a_text_some_windows_from_all_over_builtin_are_measured(model, text, run, tmp_path, monkeypatch):
    read = text_module.load_tokens
    instead = lambda name, *a, **more: read(text if name == "builtin" else name, *a, **more)  # noqa: E731
    few = partial(text_module.thin, count=4 * SEQ)
    for name in ("planish.evaluate.evaluation", "planish.sweep"):
        monkeypatch.setattr(sys.modules[name], "load_tokens", instead)
        monkeypatch.setattr(sys.modules[name], "thin", few)
    every = text_module.eval_windows(read(text, byte_tokenizer(with_bos=True, end=True)).tokens, SEQ, 256)
    at = [len(every) * i // 4 for i in range(4)]
    lm = planish.load(model, dtype="float32")
    expected = torch.stack([perplexity.token_losses(lm, every[i : i + 1]).mean() for i in at]).mean()
    found = planish.evaluate(model, seq_len=SEQ)
    assert (found.windows, found.thinned, found.nll) == (4, True, pytest.approx(float(expected), rel=1e-5))
    assert planish.evaluate(model, "builtin", SEQ).windows == len(every)
    assert planish.evaluate(model, seq_len=SEQ, max_windows=7).windows == 7
    both = run("eval", model, "--seq-len", SEQ, "--against", model)
    assert f"the same likeliest token at 100.00 ± 0.00 % of {4 * (SEQ - 1)} tokens" in both.stdout
    assert "evenly spaced; --text builtin measures all" in both.stdout
    assert "evenly spaced" not in run("eval", model, "--text", "builtin", "--seq-len", SEQ).stdout
    done = run("sweep", model, "--methods", "svd", "--keep", 0.8, "--calibration", text, "--n-samples", 4, "--seq-len", SEQ,
               "-o", tmp_path / "out")  # fmt: skip
    assert "from all over builtin; --eval-text builtin takes all" in done.stderr, done.output
    results = read_results(tmp_path / "out")
    assert results.points[0].perplexity == pytest.approx(found.perplexity, rel=1e-5)
    assert make_command(results, results.points[1]).endswith(f"planish eval svd-0.8 --seq-len {SEQ}")


@pytest.mark.parametrize(("bos", "begins"), [("auto", "every"), ("once", "once")])
def test_calibration_begins_every_window_and_says_so(model, text, tmp_path, bos, begins, monkeypatch):
    from planish import api

    seen = []
    real = api.read_calibration

    def read(*args, **more):
        found = real(*args, **more)
        seen.append(found.windows)
        return found

    monkeypatch.setattr(api, "read_calibration", read)
    options = {"keep": 0.8, "method": "svd-llm", "calibration": text, "n_samples": 8, "seq_len": 64, "bos": bos}
    planish.compress(model, output=tmp_path / "out", **options)
    record = json.loads((tmp_path / "out" / "planish.json").read_text())["calibration"]
    assert (record["bos"], record["begins"]) == (bos, begins)
    assert bool((seen[0][:, 0] == 256).all()) == (begins == "every")
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.calibration.bos == bos
    planish.compress(**recipe.arguments, output=tmp_path / "again")
    assert torch.equal(seen[0], seen[1])


def test_recipes_that_say_nothing_keep_the_papers_protocol(tmp_path):
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: m\nkeep: 0.8\ncalibration: {source: wikitext2}\n")
    assert read_recipe(tmp_path / "r.yaml").calibration.bos == "once"


def test_a_sweep_measures_what_eval_does(model, text, tmp_path, run):
    done = run("sweep", model, "--methods", "svd-llm", "--keep", "0.9", "--calibration", text, "--n-samples", 8, "--seq-len", 64,
               "--eval-text", text, "-o", tmp_path / "sweep", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    dense = next(p for p in json.loads(done.stdout)["points"] if p["name"] == "dense")
    assert dense["perplexity"] == pytest.approx(planish.evaluate(model, text, seq_len=64).perplexity, rel=1e-4)


def test_statistics_of_a_mixture_are_the_sum_over_its_texts(model, text, tmp_path):
    """Windows by weight from every text, each as it would be alone; recorded, and repeated by the recipe."""
    from planish import api
    from planish.folder.source import open_source
    from planish.folder.tokenizer import load_tokenizer
    from planish.request import Text

    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 200)
    source, tokenizer = open_source(model), load_tokenizer(model)

    def windows(name, n):
        return api.read_calibration(source, tokenizer, Text(source=str(name), n_samples=n, seq_len=32, seed=3)).windows

    mixed = windows(f"{text}:3,{other}:1", 8)
    alone = torch.cat([windows(text, 6), windows(other, 2)])
    assert sorted(map(tuple, mixed.tolist())) == sorted(map(tuple, alone.tolist()))
    options = {"keep": 0.9, "method": "svd-llm", "calibration": f"{text}:3,{other}:1", "n_samples": 8, "seq_len": 64}
    planish.compress(model, output=tmp_path / "out", **options)
    record = json.loads((tmp_path / "out" / "planish.json").read_text())["calibration"]
    assert record["source"] == f"{text.name}:3,{other.name}:1" and record["n_samples"] == 8
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    planish.compress(**recipe.arguments, output=tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "planish.json").read_text())["calibration"]["fingerprint"]
        == record["fingerprint"]
    )
