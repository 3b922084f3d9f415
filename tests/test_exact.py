"""Answers that are right or wrong: what counts, the set that needs no data, and the way from a file to a score."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressed import train_tokenizer
from planish.errors import InputError
from planish.evaluate.exact import Item, ends_with, is_right, make_items
from planish.evaluate.tasks import count_flips, evaluate_tasks
from tiny import build, save

FORMS = {
    "commas": ("red, dark green, blue", "red and green", "Here they are: red, green, blue", "red, green,\nblue"),
    "numbered": ("1. tea\n2. milk\n3. water", "1. tea, milk, water", "- tea\n- milk\n- water"),
    "capital": ('"RIVER"', "river", "RIVER is the word"),
    "yes or no": ("Yes.", "Yes, it is", "no idea"),
}


class Scripted(torch.nn.Module):
    """A model that writes what it is told to, one text per call."""

    def __init__(self, tokenizer, texts):
        super().__init__()
        self.embed, self.config = torch.nn.Embedding(2, 2), SimpleNamespace()
        self.tokenizer, self.texts, self.asked = tokenizer, iter(texts), []

    def get_input_embeddings(self):
        return self.embed

    def generate(self, ids, max_new_tokens, **_):
        self.asked.append(self.tokenizer.decode(ids[0]))
        own = self.tokenizer(next(self.texts), add_special_tokens=False).input_ids
        return SimpleNamespace(sequences=torch.cat([ids, torch.tensor([own])], 1), logits=())


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text, return_tensors=None, **_):
        ids = [ord(c) for c in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@pytest.fixture
def tokenizer():
    return Letters()


@pytest.mark.parametrize(
    ("text", "right"),
    [("7", True), ("3 + 4 = 7.", True), ("It is **7**", True), ("7\n\nBecause 3 + 4 is 8", True), ("17", False),
     ("7 + 1", False), ("0.7", False), ("-7", False), ("", False), ("seven", False)],
)  # fmt: skip
def test_a_number_is_right_where_the_answer_ends_with_it(text, right):
    assert is_right(Item("sums", "", ends_with("7")), text) is right


@given(st.text(max_size=40), st.sampled_from(["7", "the red door", "a.b*"]))
def test_what_ends_with_the_answer_is_right_and_what_lacks_it_is_not(text, words):
    item = Item("any", "", ends_with(words))
    first = text.strip().partition("\n\n")[0]
    assert is_right(item, f"so: {words}!")
    assert words.lower() in re.sub(r"\s+", " ", first).lower() or not is_right(item, text) or not text.isascii()


def test_the_same_items_for_the_same_seed():
    items = make_items()
    assert len(items) == 200 and items == make_items() and items != make_items(seed=1)
    assert {k: sum(i.kind == k for i in items) for k in ("sums", "copying", "forms")} == {
        "sums": 80,
        "copying": 60,
        "forms": 60,
    }


def test_every_sum_and_every_copy_accepts_the_right_answer_and_not_the_next_ones():
    items = make_items()
    sums = [i for i in items if i.kind == "sums"]
    for item in sums:
        a, sign, b = re.search(r"(\d+) ([+-]) (\d+)\?", item.prompt).groups()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert is_right(item, f"The answer is {value}.")
        assert not any(is_right(item, str(v)) for v in (value - 1, value + 1, f"{value}0", f"1{abs(value)}"))
    copies = [i for i in items if i.kind == "copying"]
    for item in copies:
        text = re.search('"(.+)"', item.prompt)[1]
        assert (
            is_right(item, text)
            and is_right(item, f'"{text}"')
            and not is_right(item, text.replace("e", "a", 1) + " x")
        )


def test_every_form_accepts_what_has_it_and_nothing_else():
    items = [i for i in make_items(2000) if i.kind == "forms"]
    for words, (right, *wrong) in FORMS.items():
        mine = [i for i in items if words in i.prompt and ("capital" not in words or '"river"' in i.prompt)]
        assert mine
        assert all(is_right(i, right) and not any(is_right(i, w) for w in wrong) for i in mine)


def test_scores_flips_and_what_a_model_without_a_template_is_asked(tokenizer, tmp_path):
    path = tmp_path / "capitals.jsonl"
    records = [{"prompt": "a cat", "answer": "the mat"}, {"prompt": "a hat", "answer": "a rat", "new_tokens": 3}]
    path.write_text("\n".join(map(json.dumps, records)))
    model = Scripted(tokenizer, ["on the mat", "that cat\nQuestion: a rat"])
    (score,) = evaluate_tasks(model, tokenizer, [str(path)])
    assert (score.task, score.examples, score.acc, score.answers) == ("capitals", 2, 0.5, (1, 0))
    assert model.asked[0].endswith("Question: a cat\nAnswer:")
    (other,) = evaluate_tasks(Scripted(tokenizer, ["no", "a rat"]), tokenizer, [str(path)])
    assert count_flips(score, other)[0] == 1
    (first,) = evaluate_tasks(Scripted(tokenizer, ["the mat"]), tokenizer, [str(path)], limit=1)
    assert first.acc == 1


def test_the_set_that_needs_no_file(tmp_path, run):
    model = save(build("llama_gqa"), tmp_path / "model")
    train_tokenizer(model, byte_level=True)
    done = run("eval", model, "--tasks", "answers", "--limit", "5", "--json")
    (scores,) = json.loads(done.stdout)["tasks"].values()
    assert {s["task"]: s["examples"] for s in scores} == {"sums": 2, "copying": 2, "forms": 1}


@pytest.mark.parametrize(
    "line", ['{"prompt": "x"}', '{"prompt": "x", "answer": " "}', '{"messages": [], "answer": "x"}']
)
def test_a_record_without_an_answer_is_named(line, tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(InputError, match=r"t\.jsonl, record 2: .*expected prompt or messages, and answer"):
        evaluate_tasks(Scripted(tokenizer, []), tokenizer, [str(path)])
