"""Documents as token ids, and which of these are of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from planish.calibrate.documents import Asked, Document
from planish.errors import InputError

Span = tuple[int, int]  # first character, last + 1


class Rendered(NamedTuple):
    """A document as a tokenizer gets it. `plain`: it adds its special tokens, which a chat template's text has already."""

    text: str
    plain: bool
    answers: tuple[Span, ...] = ()


def render(tokenizer: Any, document: Document, answers: bool = False) -> Rendered:
    """A document's text; with `answers`, where in it they are. A question and its answer are a conversation in the chat template,
    or where there is none what `planish.evaluate.exact` asks."""
    if isinstance(document, Asked) and (document.goes_on or not has_template(tokenizer)):
        asked = document.prompt if document.goes_on else f"Question: {document.prompt}\nAnswer:"
        text = asked + (document.answer if document.goes_on else f" {document.answer}")
        return Rendered(text, True, ((len(asked), len(text)),))
    if isinstance(document, str):
        return Rendered(document, True)
    messages = document.messages if isinstance(document, Asked) else document
    text = apply_template(tokenizer, messages)
    return Rendered(text, False, find_turns(tokenizer, messages, text) if answers else ())


def join(rendered: Sequence[Rendered], between: str) -> Rendered:
    """Documents as one plain text."""
    at, spans = 0, list[Span]()
    for r in rendered:
        spans += [(at + a, at + b) for a, b in r.answers]
        at += len(r.text) + len(between)
    return Rendered(between.join(r.text for r in rendered), True, tuple(spans))


def encode(tokenizer: Any, documents: Sequence[Document], apart: bool = False) -> np.ndarray:
    """Token ids of documents one after the other (n,), int64, each with what the tokenizer puts in front.

    `apart`: where that is no beginning-of-sequence token, several documents are followed by the end-of-sequence token each.
    """
    return encode_rendered(tokenizer, [render(tokenizer, d) for d in documents], apart)[0]


def encode_rendered(
    tokenizer: Any, rendered: Sequence[Rendered], apart: bool = False, answers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that `encode` gives, and with `answers` which of them (n,) hold a character of one, or end a document behind one."""
    options = {"return_attention_mask": False, "verbose": False} | ({"return_offsets_mapping": True} if answers else {})
    plain = [r.text for r in rendered if r.plain]
    batch = tokenizer(plain, **options) if plain else {"input_ids": [], "offset_mapping": []}
    found = iter(zip(batch["input_ids"], batch["offset_mapping"] if answers else batch["input_ids"], strict=True))
    begin, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    parts, marks = list[np.ndarray](), list[np.ndarray]()
    for r in rendered:
        if r.plain:
            ids, places = next(found)
        else:
            one = tokenizer(r.text, add_special_tokens=False, **options)
            ids, places = one["input_ids"], one["offset_mapping"] if answers else ()
        mark = find_tokens(places, r.answers) if answers else np.zeros(len(ids), dtype=bool)
        if apart and len(rendered) > 1 and end is not None and not (ids and (ids[0] == begin or ids[-1] == end)):
            ids, mark = [*ids, end], np.append(mark, mark[-1:].any())
        parts.append(np.asarray(ids, dtype=np.int64))
        marks.append(mark)
    return np.concatenate(parts), np.concatenate(marks)


def find_tokens(places: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens (n,), each of the characters first … last − 1, share one with the spans, which are in order."""
    if not len(places) or not spans:
        return np.zeros(len(places), dtype=bool)
    first, last = np.asarray(places, dtype=np.int64).T
    starts, ends = np.asarray(spans, dtype=np.int64).T
    next_span = np.searchsorted(ends, first, side="right")  # the first one that ends behind the token's first character
    return (last > first) & (np.append(starts, np.iinfo(np.int64).max)[next_span] < last)


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def apply_template(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """A conversation in the model's own template, which holds all special tokens."""
    if not has_template(tokenizer):
        raise InputError(
            "a record has `messages`, and the tokenizer has no chat template; give records with a field `text`"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise whatever their authors chose
        roles = [m["role"] for m in messages]
        raise InputError(f"the chat template refuses a conversation of roles {roles}: {error}") from None


def find_turns(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> tuple[Span, ...]:
    """Where the assistant's turns are in a conversation's text: what it says, and the special token that closes the turn.

    What is around them is what the template makes of the same conversation with other words in their place.
    """
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    if not said:
        return ()
    names = iter(f"\ue000{n}\ue001" for n in range(len(said)))
    named = [m | {"content": next(names)} if m["role"] == "assistant" else m for m in messages]
    around = re.split("\ue000[0-9]+\ue001", apply_template(tokenizer, named))
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    close = re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(special))) + ")")
    for answers in (said, [s.strip() for s in said]):
        spelt, spans = around[0], list[Span]()
        for answer, behind in zip(answers, around[1:], strict=False):
            closed = close.match(behind) if special else None
            spans.append((len(spelt), len(spelt) + len(answer) + (closed.end() if closed else 0)))
            spelt += answer + behind
        if spelt == text and len(around) == len(said) + 1:
            return tuple(spans)
    raise InputError(
        f"the chat template writes answers in other words than they are given ({said[0][:40]!r} …), so that their tokens cannot "
        "be told: give `prompt` and `completion`, or use --objective text"
    )
