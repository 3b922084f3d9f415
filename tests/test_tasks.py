"""Zero-shot scores against a naive oracle: one sequence at a time, one token at a time, no padding, no batches."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from compressed import train_tokenizer
from planish.errors import InputError
from planish.evaluate.tasks import encode_pair, evaluate_file, evaluate_tasks, read_config, read_task, score_pairs
from tiny import HYBRIDS, MORE, NAMES, SPARSE, STOCK, build, each, windows

WORDS = ["the cat sat", "a hat on that mat", "then the rat", "that bat", "on", "the mat and a cat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, byte_level=True)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return build("llama_gqa")


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


def oracle(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Σ log p of the continuation's tokens, each from a forward pass of its own, and whether each was the best."""
    ids = tokenizer(context + continuation).input_ids
    start = len(tokenizer(context.rstrip()).input_ids)
    total, greedy = 0.0, True
    for t in range(start, len(ids)):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)
        total += float(logp[ids[t]])
        greedy &= int(logp.argmax()) == ids[t]
    return total, greedy


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox", "opt"])
def test_scores_equal_the_oracle(family, tokenizer):
    model = build(family)
    pairs = [(a, f" {b}") for a in WORDS for b in WORDS[:4]] + [("the cat  ", "sat on")]
    scored = score_pairs(model, [encode_pair(tokenizer, *p) for p in pairs], batch_tokens=64)
    for pair, (logp, greedy) in zip(pairs, scored):
        want, want_greedy = oracle(model, tokenizer, *pair)
        assert logp == pytest.approx(want, abs=2e-4) and greedy == want_greedy


@pytest.mark.parametrize("family", each([n for n in NAMES + SPARSE + HYBRIDS + STOCK + MORE if n != "llama_dynamic"]))
def test_split_forwards_score_like_whole_ones(family):
    """Where continuations' logits are made of a part of the decoder's output: in every family what all positions' logits say
    (but where rotary embeddings follow the longest sequence of a batch)."""
    model = build(family).eval()
    encoded = [(windows(1, length, seed=length)[0].tolist(), n) for length, n in ((9, 2), (17, 5), (12, 1), (17, 16))]
    for (ids, n), (logp, greedy) in zip(encoded, score_pairs(model, encoded, batch_tokens=60), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -n - 1 : -1].double()
        target = torch.tensor(ids[-n:])
        assert logp == pytest.approx(float(logits.log_softmax(-1)[range(n), target].sum()), abs=2e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_no_answers_of_logits_that_are_no_numbers(tokenizer, tmp_path):
    """Neither the first choice nor the first word of the vocabulary is what such a model says."""
    model = build("llama_gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    tasks = [
        write(tmp_path / "mc.jsonl", [{"query": "the cat", "choices": WORDS[:3], "gold": 0}]),
        write(tmp_path / "e.jsonl", [{"prompt": "the cat", "answer": "sat"}]),
    ]
    for task in tasks:
        with pytest.raises(InputError, match="logits are not finite"):
            evaluate_tasks(model, tokenizer, [str(task)])


def test_multiple_choice(model, tokenizer, tmp_path):
    records = [{"query": q, "choices": WORDS[:3], "gold": i % 3} for i, q in enumerate(WORDS)]
    score = evaluate_file(model, tokenizer, write(tmp_path / "mc.jsonl", records))
    acc = norm = 0
    for r in records:
        logps = [oracle(model, tokenizer, r["query"], f" {c}")[0] for c in r["choices"]]
        acc += logps.index(max(logps)) == r["gold"]
        per_byte = [p / len(c.encode()) for p, c in zip(logps, r["choices"])]
        norm += per_byte.index(max(per_byte)) == r["gold"]
    assert (score.acc, score.acc_norm) == (acc / 6, norm / 6)
    assert score.acc_stderr == pytest.approx((score.acc * (1 - score.acc) / 5) ** 0.5)


def test_winogrande_scores_the_continuation(model, tokenizer, tmp_path):
    records = [{"context_options": WORDS[i : i + 2], "continuation": "the cat", "gold": 0} for i in range(4)]
    score = evaluate_file(model, tokenizer, write(tmp_path / "w.jsonl", records))
    right = 0
    for r in records:
        logps = [oracle(model, tokenizer, c, " the cat")[0] for c in r["context_options"]]
        right += logps[0] > logps[1]
    assert score.acc == right / 4 and score.acc_norm == score.acc, "one continuation: nothing to normalise"


def test_lambada_asks_for_the_greedy_continuation(model, tokenizer, tmp_path):
    records = [{"context": a, "continuation": b} for a in WORDS for b in WORDS]
    ids = tokenizer(WORDS[0]).input_ids
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    records.append({"context": WORDS[0], "continuation": tokenizer.decode([best]).strip()})
    score = evaluate_file(model, tokenizer, write(tmp_path / "l.jsonl", records))
    want = [oracle(model, tokenizer, r["context"], f" {r['continuation']}")[1] for r in records]
    assert score.acc == sum(want) / len(want) and score.acc_norm is None


def test_long_contexts_lose_their_left(model, tokenizer):
    ids = list(range(3, 90))
    long, short = score_pairs(model, [(ids, 3), (ids[-65:], 3)])
    assert long == short


def test_every_form_of_the_optional_data_is_read(data_path):
    for file in sorted(data_path("tasks").glob("*.jsonl")):
        examples = read_task(file, limit=20)
        assert len(examples) == 20
        assert all(len(e.pairs) > 1 or e.gold is None for e in examples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "line 1: KeyError"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold 1 of 1 choices"),
        ("not json", "line 1"),
        ("", "has no examples"),
    ],
)
def test_broken_files_say_where(text, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_task(tmp_path / "t.jsonl")


def test_what_is_missing_is_said(model, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no such task file: x\.jsonl"):
        evaluate_tasks(model, tokenizer, ["x.jsonl"])
    with pytest.raises(InputError, match="need a tokenizer"):
        evaluate_tasks(model, None, ["x.jsonl"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="arc_easy need lm_eval"):
        evaluate_tasks(model, tokenizer, ["arc_easy"])


def test_the_harness_scores_local_data_alike(model, tokenizer, tmp_path, monkeypatch):
    """The same examples through lm_eval, by a task file, and through our own reader."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'planish[eval]')")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [{"query": q, "choices": WORDS[:3], "gold": i % 3} for i, q in enumerate(WORDS)]
    data = write(tmp_path / "mc.jsonl", records)
    (tmp_path / "mc.yaml").write_text(
        f"""task: mc
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    own, theirs = evaluate_tasks(model, tokenizer, [str(tmp_path / "mc.yaml"), str(data)])
    assert own.examples == theirs.examples == len(records)
    assert (own.acc, own.acc_norm) == pytest.approx((theirs.acc, theirs.acc_norm))
    assert own.acc_stderr == pytest.approx(theirs.acc_stderr, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "cannot read task"),
        ("doc_to_text: !function utils.f", "cannot read task"),
        ("a: 1", "no task of lm_eval: expected a mapping with the key 'task'"),
    ],
)
def test_broken_task_files_say_so(text, message, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "t.yaml")
