"""Calibration text of a chat model's own: its answers to questions, as conversations.

Text of another kind holds neither the tokens of a chat template nor what a model does between them, so answers go first.
Problem: which conversations, where none are at hand? Those that the model has with itself.
Reference: Williams, Chrysostomou and Aletras, Self-calibration for Language Model Quantization and Pruning, NAACL 2025. Differs
from it: the questions, of which some are about passages of a text, and the template around them are ours.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.calibrate.documents import read_documents
from planish.calibrate.encode import has_template
from planish.core import Progress
from planish.errors import InputError
from planish.evaluate.evaluation import load_to_measure
from planish.folder.hub import find_folder
from planish.folder.safetensors import write_text
from planish.folder.tokenizer import load_tokenizer

SILENT = (
    "the model has a chat template and the text no conversations: its answers lose most. `planish ask` writes some that it has "
    "with itself, --calibration TEXT:0.7,FILE:0.3 takes them in (docs/calibration.md)"
)
TEMPERATURE = 0.8
AT_ONCE = 8  # questions
LONGEST = 600  # characters of a passage
PATIENCE = 200  # questions in a row that are too long
Say = Callable[[Sequence[list[int]]], list[list[int]]]  # ids of questions → ids of what is said to each

TOPICS = (
    "photosynthesis", "a good breakfast", "the French Revolution", "a sorting algorithm", "learning to swim", "the moon",
    "a job interview", "democracy", "baking bread", "prime numbers", "saving money", "earthquakes", "a short story",
    "the human heart", "growing tomatoes", "a train journey",
)  # fmt: skip
QUESTIONS = tuple(
    f"{ask} {what}?"
    for ask in ("Can you explain", "What should I know about", "How would you describe to a child")
    for what in TOPICS
)
ABOUT = (  # a passage of so many sentences
    ("Summarize this in one sentence: {}", 4),
    ("Rewrite the following so that it is easier to read.\n\n{}", 3),
    ("What is the following text about?\n\n{}", 4),
    ("Quote one sentence of this text word for word.\n\n{}", 3),
    ("Correct the spelling of this sentence and say nothing else: {}", 1),
)
KINDS = ("passage",) * 5 + ("general",) * 2 + ("list", "sum")  # alike often; without a text there are no passages


@dataclass(frozen=True)
class Written:
    """A file of conversations, how many they are, and how many tokens they have in all."""

    output: str
    conversations: int
    tokens: int


def ask(
    model: str | Path | nn.Module,
    output: str | Path,
    tokenizer: Any = None,
    *,
    text: str | Path | Sequence[str] | None = None,
    tokens: int = 1 << 14,
    new_tokens: int = 100,
    seed: int = 0,
    **options: Any,
) -> Written:
    """Write a chat model's own answers to questions into a .jsonl file of `messages`: calibration text.

    `text`: a SOURCE; five questions of nine are then about passages of it. Answers have at most `new_tokens` tokens and are
    sampled at temperature 0.8 by `seed`; questions and answers have at least `tokens` in all. The whole model has to fit into
    the device's memory. `options`: `device`, `dtype`, `overwrite`, `progress`. Raises InputError.
    """
    path, progress = Path(output), options.pop("progress", None)
    place, kind, overwrite = (options.pop(n, None) for n in ("device", "dtype", "overwrite"))
    if options:
        raise TypeError(f"ask() got an unexpected keyword argument {next(iter(options))!r}")
    if path.suffix != ".jsonl":
        raise InputError(f"conversations go into a .jsonl file, got {path}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already: give another name, or overwrite it")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it, or give another place")
    if tokens < 1 or new_tokens < 1:
        raise InputError(f"tokens and new_tokens must be 1 or more, got {tokens} and {new_tokens}")
    given = isinstance(model, nn.Module)
    tokenizer = tokenizer or (None if given else load_tokenizer(find_folder(model, weights=False)))
    if tokenizer is None:
        raise InputError("a model is asked through its tokenizer, and it has none beside it")
    documents = [] if text is None else [d for d in read_documents(text, "calibration") if isinstance(d, str)]
    if text is not None and not documents:
        raise InputError(f"{text} has no texts to ask about: give one, or none")
    lm = model if given else load_to_measure(model, place, kind)
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    questions = make_questions(documents, seed)
    if positions is not None:
        questions = pass_over(questions, tokenizer, positions - new_tokens)
    return write_answers(make_sampler(lm, tokenizer, new_tokens, seed), tokenizer, path, questions, tokens, progress)


def write_answers(
    say: Say, tokenizer: Any, path: Path, questions: Iterator[str], tokens: int, progress: Progress | None = None
) -> Written:
    """Conversations of at least so many tokens: `messages`, or where there is no chat template `text`. All of them or no file."""
    lines, count = list[str](), 0
    if progress:
        progress("own answers", 0, tokens)
    while count < tokens:
        asked = [*itertools.islice(questions, AT_ONCE)]
        ids = [encode_question(tokenizer, q) for q in asked]
        for question, own, answer in zip(asked, ids, say(ids), strict=True):
            said = tokenizer.decode(answer, skip_special_tokens=True)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
            record: Any = {"messages": turns} if has_template(tokenizer) else {"text": f"{question} {said}"}
            lines.append(json.dumps(record))
            count += len(own) + len(answer)
            if count >= tokens:
                break
        if progress:
            progress("own answers", min(count, tokens), tokens)
    write_text(path, "\n".join(lines) + "\n")
    return Written(str(path), len(lines), count)


def encode_question(tokenizer: Any, question: str) -> list[int]:
    """Ids of a question as the model expects it."""
    if not has_template(tokenizer):
        return tokenizer(question).input_ids
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def pass_over(questions: Iterator[str], tokenizer: Any, most: int) -> Iterator[str]:
    """Those of at most so many tokens."""
    missed = 0
    while missed < PATIENCE:
        question = next(questions)
        missed = 0 if len(encode_question(tokenizer, question)) <= most else missed + 1
        if not missed:
            yield question
    raise InputError("questions and answers are longer than the model's context: give fewer --new-tokens, or no --text")


def make_questions(documents: Sequence[str] = (), seed: int = 0) -> Iterator[str]:
    """Without end: about passages of the documents, general ones, for lists, and small sums in words."""
    draw, kinds = random.Random(seed), KINDS if documents else KINDS[KINDS.count("passage") :]
    while True:
        kind = draw.choice(kinds)
        if kind == "passage":
            form, sentences = draw.choice(ABOUT)
            yield form.format(cut_passage(draw.choice(documents), sentences, draw))
        elif kind == "list":
            words = cut_passage(draw.choice(documents), 1, draw).split() if documents else TOPICS
            yield f"Make a list of five things that have to do with {draw.choice(words)}."
        elif kind == "sum":
            have, more, do = draw.randint(20, 60), draw.randint(2, 20), draw.choice(("find", "lose"))
            yield f"If I have {have} coins and {do} {more}, how many do I have?"
        else:
            yield draw.choice(QUESTIONS)


def cut_passage(document: str, sentences: int, draw: random.Random) -> str:
    """So many sentences of a document's text, side by side, from anywhere in it."""
    found = re.split(r"(?<=[.!?])\s+", document.strip())
    at = draw.randrange(max(1, len(found) - sentences + 1))
    return " ".join(found[at : at + sentences])[:LONGEST]


def make_sampler(model: nn.Module, tokenizer: Any, most: int, seed: int = 0) -> Say:
    """What transformers' `generate` says, questions side by side."""
    stop, state = set(tokenizer.all_special_ids), itertools.count(seed)
    place = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    generate: Any = model.generate  # type: ignore[attr-defined]

    @torch.no_grad()
    def say(questions: Sequence[list[int]]) -> list[list[int]]:
        width = max(map(len, questions))
        ids = torch.tensor([[pad] * (width - len(q)) + q for q in questions], device=place)
        mask = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in questions], device=place)
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            torch.manual_seed(next(state))
            try:
                out = generate(
                    ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                    max_new_tokens=most, pad_token_id=pad,
                )  # fmt: skip
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise InputError("the model's logits are not finite: nothing can be sampled from them") from None
        return [[*itertools.takewhile(lambda t: t not in stop, row)] for row in out[:, width:].tolist()]

    return say
