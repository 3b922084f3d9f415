"""Zero-shot tasks: which of several texts does the model find most likely.

Local files (.jsonl), one example per line, in one of three forms; all are scored by log p(continuation | context):

    {"query": ..., "choices": [...], "gold": i}                         " choice" after the query
    {"context_options": [...], "continuation": ..., "gold": i}          one continuation after each context (Winogrande)
    {"context": ..., "continuation": ...}                               is the greedy continuation the given one (LAMBADA)

`acc` picks the largest log-probability, `acc_norm` the largest per byte of the choice, as the Eleuther evaluation harness
does. What is written freely is right or wrong (`planish.evaluate.exact`): {"prompt": ..., "answer": ...}, and "answers",
200 such items that need no file. Any other name is a task of that harness (the `eval` extra), which runs on the same in-memory
model; a .yaml file is a task of it with data of your own (its `!function` tags, which would run code, are refused).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from planish.errors import InputError
from planish.evaluate.exact import NAME, Item, grade, make_items, read_items
from planish.evaluate.perplexity import NOT_FINITE, split_forward


@dataclass(frozen=True)
class Score:
    """One task: accuracies and their standard errors √(p (1 − p) / (n − 1))."""

    task: str
    examples: int
    acc: float
    acc_stderr: float
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    answers: tuple[int, ...] = field(default=(), repr=False)  # chosen by `acc`, per example; of local files

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "answers"}


def count_flips(one: Score, other: Score) -> tuple[float, float] | None:
    """(Share of a task's examples that two models answer differently, its standard error); None where answers are not known.

    An unchanged accuracy can hide many changed answers (Dutta et al. 2024, arXiv 2407.09141).
    """
    if not one.answers or len(one.answers) != len(other.answers):
        return None
    share = sum(a != b for a, b in zip(one.answers, other.answers)) / len(one.answers)
    return share, stderr(share, len(one.answers))


@dataclass(frozen=True)
class Example:
    """Pairs of texts to score, the right one (None: is the continuation the greedy one?), and bytes to normalise by."""

    pairs: tuple[tuple[str, str], ...]
    gold: int | None
    sizes: tuple[int, ...]


def read_task(path: Path, limit: int | None = None) -> list[Example]:
    """The examples of a .jsonl file, in any of the three forms."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read task {path}: {error}") from None
    examples: list[Example] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(examples) >= limit:
            break
        try:
            record = json.loads(line)
            examples.append(read_example(record))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"task {path}, line {number}: {error!r} · expected query, choices, gold; or context_options, continuation, "
                "gold; or context, continuation"
            ) from None
    if not examples:
        raise InputError(f"task {path} has no examples")
    return examples


def read_example(record: dict[str, Any]) -> Example:
    if "choices" in record:
        choices = [str(c) for c in record["choices"]]
        pairs = [(record["query"], f" {c}") for c in choices]
        return _checked(pairs, int(record["gold"]), [len(c.encode()) for c in choices])
    if "context_options" in record:
        text = str(record["continuation"])
        pairs = [(c, f" {text}") for c in record["context_options"]]
        return _checked(pairs, int(record["gold"]), [len(text.encode())] * len(pairs))
    text = str(record["continuation"])
    return Example(((record["context"], f" {text}"),), None, (len(text.encode()),))


def _checked(pairs: list[tuple[str, str]], gold: int, sizes: list[int]) -> Example:
    if not 0 <= gold < len(pairs):
        raise IndexError(f"gold {gold} of {len(pairs)} choices")
    return Example(tuple(pairs), gold, tuple(max(1, s) for s in sizes))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Ids of the whole text and how many of them belong to the continuation.

    Spaces at the end of the context move to the continuation, and the whole text is tokenized at once, so that the
    tokens are those the model would read.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation).input_ids
    start = len(tokenizer(context).input_ids)
    return whole, max(1, len(whole) - start)


@torch.no_grad()
def score_pairs(
    model: nn.Module, encoded: list[tuple[list[int], int]], batch_tokens: int = 4096
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats, and whether it is the greedy one, for every (ids, continuation length).

    Sequences longer than the model's positions lose tokens on the left. Batches are padded on the right: causal models
    never look there. Logits are made of the continuations alone.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    device = model.get_input_embeddings().weight.device
    clipped = [(ids[-(limit + 1) :], n) for ids, n in encoded]
    order = sorted(range(len(clipped)), key=lambda i: -len(clipped[i][0]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(encoded)
    at = 0
    while at < len(order):
        longest = len(clipped[order[at]][0])
        rows = order[at : at + max(1, batch_tokens // longest)]
        at += len(rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for r, i in enumerate(rows):
            own = clipped[i][0]
            ids[r, : len(own)] = torch.tensor(own)
            mask[r, : len(own)] = 1
        hidden, head = split_forward(model, input_ids=ids[:, :-1].to(device), attention_mask=mask[:, :-1].to(device))
        sizes = [min(n, len(own) - 1) for own, n in (clipped[i] for i in rows)]
        ends = [len(clipped[i][0]) for i in rows]
        logits = head(torch.cat([hidden[r, e - 1 - n : e - 1] for r, (n, e) in enumerate(zip(sizes, ends))])[None])[0]
        for r, (i, end, of_i) in enumerate(zip(rows, ends, logits.float().cpu().split(sizes))):
            if of_i.isnan().any():
                raise InputError(NOT_FINITE)
            target = ids[r, end - len(of_i) : end]
            results[i] = (
                -float(F.cross_entropy(of_i, target, reduction="sum")), bool((of_i.argmax(-1) == target).all()),
            )  # fmt: skip
    return results


def evaluate_file(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score a local task file on a model in memory."""
    path = Path(path)
    examples = read_task(path, limit)
    encoded = [encode_pair(tokenizer, *pair) for e in examples for pair in e.pairs]
    training = model.training
    model.eval()
    scored: list[tuple[float, bool]] = []
    step = 64
    if progress is not None:
        progress(0, len(encoded))
    try:
        for a in range(0, len(encoded), step):
            scored += score_pairs(model, encoded[a : a + step])
            if progress is not None:
                progress(min(a + step, len(encoded)), len(encoded))
    finally:
        model.train(training)
    answers: list[int] = []
    right, right_norm, first = 0, 0, 0
    for e in examples:
        own = scored[first : first + len(e.pairs)]
        first += len(e.pairs)
        if e.gold is None:
            answers.append(int(own[0][1]))
            right += answers[-1]
            continue
        logps = [logp for logp, _ in own]
        answers.append(max(range(len(own)), key=logps.__getitem__))
        right += answers[-1] == e.gold
        right_norm += max(range(len(own)), key=[p / s for p, s in zip(logps, e.sizes)].__getitem__) == e.gold
    n = len(examples)
    acc, norm = right / n, right_norm / n
    if examples[0].gold is None:
        return Score(path.stem, n, acc, stderr(acc, n), answers=tuple(answers))
    return Score(path.stem, n, acc, stderr(acc, n), norm, stderr(norm, n), tuple(answers))


def stderr(p: float, n: int) -> float:
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else float("nan")


def evaluate_names(
    model: nn.Module, tokenizer: Any, names: list[str], *, limit: int | None = None, batch_size: int = 8
) -> list[Score]:
    """Tasks of the Eleuther evaluation harness by name, on a model in memory, zero-shot."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise InputError(
            f"tasks {', '.join(names)} need lm_eval · pip install 'planish[eval]', or give local .jsonl files"
        ) from None
    chosen = [read_config(Path(n)) if is_config(n) else n for n in names]
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=chosen,
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=100,  # 0 would leave out the standard errors of means as well
            log_samples=False,
        )
    except (KeyError, ValueError, OSError, RuntimeError, ImportError) as error:
        raise InputError(f"lm_eval cannot run {', '.join(names)}: {type(error).__name__}: {error}") from None
    scores = []
    for name, values in found["results"].items():
        count = found.get("n-samples", {}).get(name, {}).get("effective", 0)

        def get(key: str, values: dict[str, Any] = values) -> float | None:
            value = values.get(f"{key},none")
            return value if isinstance(value, float) else None

        acc = get("acc")
        if acc is not None:
            spread = get("acc_stderr")
            spread = float("nan") if spread is None else spread
            scores.append(Score(name, count, acc, spread, get("acc_norm"), get("acc_norm_stderr")))
    return scores


def is_config(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def read_config(path: Path) -> dict[str, Any]:
    """A task of the harness from a file."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read task {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not config.get("task"):
        raise InputError(f"task {path} is no task of lm_eval: expected a mapping with the key 'task'")
    return config


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Local files and harness names, in the order given (files first)."""
    if tokenizer is None:
        raise InputError("tasks need a tokenizer, and the model's folder has none")
    files = [t for t in tasks if t.endswith(".jsonl") or (Path(t).exists() and not is_config(t))]
    names = [t for t in tasks if t not in files and t != NAME]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"no such task file: {file}")
    scores = []
    for task in (t for t in tasks if t in files or t == NAME):
        items = make_items()[:limit] if task == NAME else read_items(Path(task), limit)
        if items:
            scores += evaluate_items(model, tokenizer, items, progress)
        else:
            scores.append(evaluate_file(model, tokenizer, task, limit=limit, progress=progress))
    return scores + (evaluate_names(model, tokenizer, names, limit=limit) if names else [])


def evaluate_items(
    model: nn.Module, tokenizer: Any, items: list[Item], progress: Callable[[int, int], None] | None = None
) -> list[Score]:
    """A score per kind of item; `acc` is the share of right answers."""
    scores = []
    for kind, right in grade(model, tokenizer, items, progress).items():
        acc = sum(right) / len(right)
        scores.append(Score(kind, len(right), acc, stderr(acc, len(right)), answers=tuple(right)))
    return scores
