"""How far two models' predictions agree, against naive forms; answers side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planish
import tiny
from planish.errors import InputError
from planish.evaluate import agreement
from planish.evaluate.tasks import Score, count_flips
from test_text import byte_tokenizer

FAMILIES = ["llama_gqa", "gemma2", "gpt2", "opt"]


def two(name: str):
    """A model and one that differs a little."""
    model, dense = tiny.build(name), tiny.build(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.02)
    return model, dense


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("at_once", [1 << 22, 300])
def test_against_the_formula(name, at_once, monkeypatch):
    """Whatever the pieces in which logits are computed."""
    monkeypatch.setattr(agreement, "AT_ONCE", at_once)
    model, dense = two(name)
    tokens = tiny.windows(5, 24).flatten()
    found = agreement.compare(model, dense, tokens, 24)
    with torch.no_grad():
        p, q = (m(tokens.view(5, 24)).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for m in (dense, model))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == len(kl) == 5 * 23
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4) and found.kl > 0
    assert found.kl_stderr == pytest.approx(float(kl.std()) / len(kl) ** 0.5, rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=2 / len(kl))
    for share, value in ((0.99, found.kl_99), (0.999, found.kl_999)):
        assert (
            float((kl > value * (1 + 1e-4)).double().mean())
            <= 1 - share + 1e-9
            <= float((kl >= value * (1 - 1e-4)).double().mean()) + 1e-9
        )


@pytest.mark.parametrize("at_once", [1 << 22, 300])
def test_a_model_agrees_with_itself(at_once, monkeypatch):
    monkeypatch.setattr(agreement, "AT_ONCE", at_once)
    model = tiny.build("llama_gqa")
    tokens = tiny.windows(3, 24).flatten()
    for other in (model, tiny.build("llama_gqa")):
        found = agreement.compare(model, other, tokens, 24, max_windows=2)
        assert (found.tokens, found.kl, found.top1) == (46, 0.0, 1.0)


def test_other_vocabularies_are_refused():
    with pytest.raises(InputError, match=r"97 and 90 tokens"):
        agreement.compare(
            tiny.build("llama_gqa"), tiny.build("llama_gqa", vocab_size=90), tiny.windows(2, 24).flatten(), 24
        )


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles(values, share):
    rising = torch.tensor(values, dtype=torch.float64).sort().values
    found = agreement.find_quantile(rising, share)
    assert found in values and sum(v > found for v in values) <= len(values) * (1 - share) + 1e-9
    below = [v for v in values if v < found]
    assert not below or sum(v > max(below) for v in values) > len(values) * (1 - share) - 1e-9


@given(st.lists(st.integers(0, 2), max_size=12))
def test_repetition_is_the_share_of_grams_seen_before(ids):
    grams = ["".join(map(str, ids[i : i + 4])) for i in range(len(ids) - 3)]
    again = sum(g in grams[:i] for i, g in enumerate(grams))
    assert agreement.measure_repetition(ids) == pytest.approx(again / len(grams) if grams else 0.0)


def test_flips_are_counted_example_by_example():
    one, other = (Score("t", 4, 0.5, 0.1, answers=a) for a in ((0, 1, 2, 3), (0, 2, 1, 3)))
    assert count_flips(one, other) == (0.5, pytest.approx((0.25 / 3) ** 0.5))
    assert count_flips(one, Score("t", 4, 0.5, 0.1)) is None
    assert "answers" not in one.as_dict()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(A model, the dense one), each with a tokenizer that has a chat template."""
    place = tmp_path_factory.mktemp("two")
    for name, scale in (("model", 1.5), ("dense", 1.0)):
        model = tiny.build("llama_gqa", vocab_size=258)
        model.lm_head.weight.data.mul_(scale)
        model.save_pretrained(place / name)
        tokenizer = byte_tokenizer(end=True)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}?"
        tokenizer.save_pretrained(place / name)
    return place / "model", place / "dense"


def test_eval_against_says_how_far_they_agree(folders, tmp_path, run):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    done = run("eval", folders[0], "--text", tmp_path / "a.txt", "--seq-len", 32, "--against", folders[1], "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    direct = planish.compare(*folders, tmp_path / "a.txt", 32)
    assert found["agreement"]["kl"] == pytest.approx(direct.agreement.kl) and direct.agreement.kl > 0
    assert found["agreement"]["top1"] == 1.0  # scaled logits: less sure, never of another opinion
    assert found["perplexity"] == pytest.approx(planish.evaluate(folders[0], tmp_path / "a.txt", 32).perplexity)
    shown = run("eval", folders[0], "--text", tmp_path / "a.txt", "--seq-len", 32, "--against", folders[1]).stdout
    assert "KL to its predictions" in shown and "the same likeliest token at 100.00" in shown


def test_one_measurement_has_no_standard_error(folders, tmp_path, run):
    task = tmp_path / "t.jsonl"
    task.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}))
    done = run("eval", folders[0], "--tasks", task, "--against", folders[1])
    assert done.exit_code == 0 and "0.00" in done.stdout and "nan" not in done.output and "±" not in done.stdout
    np.save(tmp_path / "ids.npy", np.arange(2))
    done = run("eval", folders[0], "--text", tmp_path / "ids.npy", "--against", folders[1])
    assert done.exit_code == 0 and "KL to its predictions" in done.stdout and "nan" not in done.output


def test_eval_shows_flips_and_answers(folders, tmp_path, run):
    task = tmp_path / "t.jsonl"
    task.write_text(
        "".join(json.dumps({"query": f"q {i}", "choices": ["a", "b", "cc"], "gold": i % 3}) + "\n" for i in range(6))
    )
    done = run("eval", folders[0], "--tasks", task, "--against", folders[1], "--json")
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["flips"]["t"][0] <= 1
    assert "flips" in run("eval", folders[0], "--tasks", task, "--against", folders[1]).stdout
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    done = run("eval", folders[0], "--generate", prompts, "--against", folders[1], "--json")
    answers = json.loads(done.stdout)["answers"]
    assert [a["prompt"] for a in answers] == ["one", "two"] and answers[0]["dense"] == answers[0][
        "model"
    ]  # greedy: the same
    shown = run("eval", folders[0], "--generate", prompts, "--against", folders[1])
    assert "repeated 4-grams" in shown.stdout
    for wrong, words in (
        (["--generate", prompts], "--against"),
        (["--generate", tmp_path / "none.txt", "--against", folders[1]], "cannot read prompts"),
        (["--generate", prompts, "--text", "builtin", "--against", folders[1]], "two measurements"),
    ):
        done = run("eval", folders[0], *wrong)
        assert done.exit_code == 2 and words in done.stderr
