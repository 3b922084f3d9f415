"""`planish ask`: conversations of a model with itself, as calibration text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import planish
import tiny
from planish.calibrate.documents import read_documents
from planish.errors import InputError
from planish.evaluate.own_answers import QUESTIONS, SILENT, encode_question, make_questions, make_sampler, write_answers
from test_text import byte_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
TEXT = "One thing is here. Another is there! Is a third one? The fourth stays. A fifth went away."


def chat_tokenizer():
    tokenizer = byte_tokenizer(end=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny.build("llama_gqa", vocab_size=258, max_position_embeddings=512).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def read(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_conversations_are_calibration_text(chat, tmp_path, run):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "own.jsonl"
    asked = ["ask", chat, "-o", out, "--text", tmp_path / "a.txt", "--tokens", 900, "--new-tokens", 12]
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.stderr
    found, said = json.loads(done.stdout), read(out)
    assert found["tokens"] >= 900 and found["conversations"] == len(said) == len(read_documents(out, "calibration"))
    assert all([m["role"] for m in turns] == ["user", "assistant"] for turns in said)
    assert any(turns[0]["content"] in QUESTIONS for turns in said)
    assert any("thing is here" in turns[0]["content"] for turns in said)
    before = out.read_bytes()
    assert run(*asked).exit_code == 2 and out.read_bytes() == before, "a file that is there stays"
    assert run(*asked, "--overwrite").exit_code == 0 and out.read_bytes() == before, "the same seed, the same answers"
    assert run(*asked, "--overwrite", "--seed", 1).exit_code == 0 and out.read_bytes() != before
    small = run(
        "compress", chat, "-o", tmp_path / "small", "--method", "flat-llm", "--n-samples", 8, "--seq-len", 32,
        "--calibration", f"{tmp_path / 'a.txt'}:0.5,{out}:0.5", "--json",
    )  # fmt: skip
    assert small.exit_code == 0 and SILENT not in small.stderr, small.stderr


def test_a_chat_model_that_hears_nobody_is_told_of(chat, tmp_path, run):
    (tmp_path / "a.txt").write_text(TEXT * 9)
    asked = ["--method", "flat-llm", "--n-samples", 8, "--seq-len", 32, "--calibration", tmp_path / "a.txt", "-o"]
    told = " ".join(run("compress", chat, *asked, tmp_path / "a").stderr.split())
    assert "planish ask" in told
    tokenizer = byte_tokenizer(end=True)
    plain = tmp_path / "plain"
    tiny.build("llama_gqa", vocab_size=258).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    assert "planish ask" not in run("compress", plain, *asked, tmp_path / "b").stderr


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "qwen2"])
def test_questions_side_by_side_are_answered_as_alone(name):
    """Where the likeliest token is certain."""
    model = tiny.build(name, vocab_size=258)
    model.get_output_embeddings().weight.data.mul_(1e4)
    say = make_sampler(model.eval(), byte_tokenizer(end=True), 5)
    questions = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    assert say(questions) == [say([q])[0] for q in questions]


def test_sampling_leaves_the_random_state_alone():
    say = make_sampler(tiny.build("llama_gqa", vocab_size=258).eval(), byte_tokenizer(end=True), 5)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert say([[5, 6]]) != say([[5, 6]]), "every call draws anew"
    assert torch.equal(torch.rand(3), expected)


def test_passages_stand_in_the_text():
    asked = [*itertools.islice(make_questions([TEXT], seed=1), 300)]
    about = [q for q in asked if q not in QUESTIONS and "coins" not in q and "list of five" not in q]
    assert 130 < len(about) < 210
    assert all(any(s in q for s in ("One thing", "Another is", "third one", "fourth", "fifth")) for q in about)
    assert asked == [*itertools.islice(make_questions([TEXT], seed=1), 300)]


def test_a_run_that_is_stopped_leaves_nothing(tmp_path):
    def say(questions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_answers(say, chat_tokenizer(), tmp_path / "a.jsonl", make_questions(), 10)
    assert not list(tmp_path.iterdir())


def test_without_a_template_it_is_text(tmp_path):
    written = write_answers(
        lambda ids: [[65]] * len(ids), byte_tokenizer(), tmp_path / "a.jsonl", itertools.cycle(["b?"]), 7
    )
    assert (written.conversations, written.tokens) == (3, 9)
    assert {json.loads(line)["text"][:3] for line in (tmp_path / "a.jsonl").read_text().splitlines()} == {"b? "}


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("a.txt", {}, "jsonl"), ("none/a.jsonl", {}, "no folder"),
        ("a.jsonl", {"tokens": 0}, "1 or more"), ("a.jsonl", {"text": "none.txt"}, "none.txt"),
        ("a.jsonl", {"text": ["  "]}, "no texts"), ("a.jsonl", {"new_tokens": 511}, "longer than the model's context"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(output, options, words, chat, tmp_path):
    with pytest.raises(InputError, match=words):
        planish.ask(chat, tmp_path / output, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_says_nothing_finite(tmp_path):
    model = tiny.build("llama_gqa", vocab_size=258).eval()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        planish.ask(model, tmp_path / "a.jsonl", byte_tokenizer(), tokens=10, new_tokens=2)
    assert not list(tmp_path.iterdir())


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        planish.ask(tiny.build("llama_gqa"), tmp_path / "a.jsonl")
    with pytest.raises(TypeError, match="'tempo'"):
        planish.ask(tiny.build("llama_gqa"), tmp_path / "a.jsonl", tempo=1)
    assert len(encode_question(chat_tokenizer(), "ab")) == len("user:ab") + len("a:") + 3
