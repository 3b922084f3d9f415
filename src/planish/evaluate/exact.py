"""Answers that are right or wrong: prompts, what a model writes to them greedily, and whether that is what was asked for.

Perplexity can stay while answers go (arithmetic first), so a compressed model is asked as well. `make_items` makes a set that
needs no data: sums, copying, and answers in a given form. A .jsonl file has a `prompt`, or `messages`, and an `answer` per line.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from planish.errors import InputError
from planish.evaluate.agreement import answer

NAME = "answers"  # of the set that `make_items` makes
WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "window",
    "silver",
    "bread",
    "mountain",
    "letter",
    "winter",
    "orange",
    "music",
    "bridge",
    "candle",
    "forest",
    "pencil",
    "ocean",
    "basket",
    "mirror",
    "thunder",
]
THINGS = ("colours", "animals", "fruits", "countries", "cities", "tools", "drinks", "sports", "metals", "flowers")
LINES = (
    "The old clock struck nine as the rain began.", "Nobody knew who had painted the small red door.",
    "She kept every ticket in a wooden box.", "A cold wind came down from the northern hills.",
    "They sold the boat and bought a bicycle.", "The baker opens his shop before the sun is up.",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A prompt (or the messages of a conversation), and what the whole answer has to match."""

    kind: str
    prompt: Any
    right: re.Pattern[str]
    new_tokens: int = 24


def ends_with(words: str) -> re.Pattern[str]:
    """Answers whose last words these are, in any case: "7" for "3 + 4 = 7."."""
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.compile(rf"(?:.*[^\w.,-])?{spaced}\W*", re.IGNORECASE | re.DOTALL)


def is_right(item: Item, text: str) -> bool:
    """Whether an answer's first paragraph is right."""
    return item.right.fullmatch(text.strip().partition("\n\n")[0].strip()) is not None


def make_items(count: int = 200, seed: int = 0) -> list[Item]:
    """`count` items, the same ones for the same seed: two of five sums, the rest copying and forms in turn."""
    draw = random.Random(seed)
    makers = (make_sum, make_copy, make_sum, make_form, make_copy, make_form, make_sum, make_copy, make_sum, make_form)
    return [makers[n % len(makers)](draw) for n in range(count)]


def make_sum(draw: random.Random) -> Item:
    a, b = draw.randint(2, 40), draw.randint(2, 9)
    sign, value = draw.choice((("+", a + b), ("-", a - b), ("+", a + b)))
    return Item("sums", f"What is {a} {sign} {b}? Answer with the number only.", ends_with(str(value)), 12)


def make_copy(draw: random.Random) -> Item:
    text = draw.choice(LINES) if draw.random() < 0.5 else " ".join(draw.sample(WORDS, draw.randint(3, 6)))
    return Item("copying", f'Repeat this text exactly, and write nothing else: "{text}"', ends_with(text.rstrip(".")))


def make_form(draw: random.Random) -> Item:
    """One of four forms, which a pattern recognises whatever the content is."""
    thing, word = draw.choice(THINGS), draw.choice(WORDS)
    asked, pattern = draw.choice(
        (
            (f"Name three {thing}, separated by commas, in one line.", r"(?:[^,\n:]+,){2}[^,\n]+"),
            (f"Name three {thing} as a numbered list.", r"(?s:.*)1[.)] .+\n+2[.)] .+\n+3[.)] (?s:.*)"),
            (f'Write the word "{word}" in capital letters, nothing else.', rf"\W*{word.upper()}\W*"),
            (f'Answer with yes or no only: is "{word}" an English word?', r"\W*(?i:yes|no)\W*"),
        )
    )
    return Item("forms", asked, re.compile(pattern), 32)


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Items of a .jsonl file, of which an answer has to end with the record's `answer`; none where the file's first record has
    no `prompt` or `messages`: then it is a task of another kind."""
    found = []
    try:
        lines = [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
        for number, line in enumerate(lines[:limit], start=1):
            record = json.loads(line)
            prompt = record.get("messages", record.get("prompt"))
            if prompt is None and number == 1:
                return []
            if not prompt or not str(record["answer"]).split():
                raise ValueError("empty prompt or answer")
            found.append(Item(path.stem, prompt, ends_with(str(record["answer"])), int(record.get("new_tokens", 24))))
    except OSError as error:
        raise InputError(f"cannot read task {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not found:
            return []  # the reader of the other kinds says what is wrong
        raise InputError(
            f"task {path}, record {len(found) + 1}: {error!r} · expected prompt or messages, and answer"
        ) from None
    return found


def grade(
    model: nn.Module, tokenizer: Any, items: list[Item], progress: Callable[[int, int], None] | None = None
) -> dict[str, list[int]]:
    """Per kind, 1 for every item that the model answers rightly and 0 for every other one, in their order.

    Where the tokenizer has no chat template the model continues "Question: … Answer:".
    """
    found: dict[str, list[int]] = {}
    plain = not getattr(tokenizer, "chat_template", None)
    training = model.training
    model.eval()
    if progress is not None:
        progress(0, len(items))
    try:
        for n, item in enumerate(items):
            asked = f"Question: {item.prompt}\nAnswer:" if plain and isinstance(item.prompt, str) else item.prompt
            text, _ = answer(model, tokenizer, asked, item.new_tokens)
            if plain:
                text = text.partition("\nQuestion:")[0]
            found.setdefault(item.kind, []).append(int(is_right(item, text)))
            if progress is not None:
                progress(n + 1, len(items))
    finally:
        model.train(training)
    return found
