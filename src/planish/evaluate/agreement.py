"""How far a compressed model's predictions are from the dense model's, token by token, and what both write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.text import eval_windows, list_priced, unmark
from planish.errors import InputError
from planish.evaluate.perplexity import NOT_FINITE, pieces_of_logits

AT_ONCE = 1 << 22  # logits in fp64 at a time


@dataclass(frozen=True)
class Agreement:
    """`kl`: mean KL(dense ‖ model) of the next token's distribution over all predicted tokens, nats per token, its standard
    error, and the values that 1 % and 0.1 % of the tokens exceed. `top1`: share of tokens whose likeliest next one is the
    same, and its standard error."""

    tokens: int
    kl: float
    kl_stderr: float
    kl_99: float
    kl_999: float
    top1: float
    top1_stderr: float


@torch.no_grad()
def compare(
    model: nn.Module,
    dense: nn.Module,
    tokens: Tensor,
    seq_len: int,
    *,
    begin: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Agreement of two causal LMs over ``tokens`` (n,) int64, in the windows of `planish.evaluate.perplexity.evaluate`; of tokens
    as `planish.calibrate.text.mark` makes them over the predictions that are priced.

    Equivalent to::

        p, q = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
        kl = (p.exp() * (p - q)).sum(-1);  top1 = (p.argmax(-1) == q.argmax(-1)).double().mean()

    but a window at a time and its logits in pieces. Raises `InputError` where the vocabularies have different sizes.
    """
    sizes = [m.config.get_text_config().vocab_size for m in (model, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: their predictions cannot be compared"
        )
    windows = eval_windows(tokens, seq_len, begin)[:max_windows]
    found: list[Tensor] = []
    same = 0
    if progress is not None:
        progress(0, len(windows))
    for n, window in enumerate(windows):
        priced = list_priced(window[:-1])
        for p, q in pair_logits(dense, model, unmark(window)[None]):
            some, priced = priced[: len(p)], priced[len(p) :]
            found.append((p.exp() * (p - q)).sum(-1)[some])
            same += int((p.argmax(-1) == q.argmax(-1))[some].sum())
        if progress is not None:
            progress(n + 1, len(windows))
    kl = torch.cat(found).clamp(min=0).sort().values
    share = same / len(kl)
    spread = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return Agreement(
        len(kl), float(kl.mean()), spread, find_quantile(kl, 0.99), find_quantile(kl, 0.999), share,
        math.sqrt(share * (1 - share) / max(len(kl) - 1, 1)),
    )  # fmt: skip


def find_quantile(rising: Tensor, share: float) -> float:
    """The least of the values (n,) that at most n (1 − share) others exceed."""
    return float(rising[min(math.ceil(share * len(rising)), len(rising)) - 1])


def pair_logits(dense: nn.Module, model: nn.Module, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities (tokens, vocabulary) fp64 of both models for the same predicted tokens of one window (1, seq)."""
    step = max(1, AT_ONCE // model.config.get_text_config().vocab_size)
    streams: list[Any] = []
    for m in (dense, model):
        place = m.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        streams.append(cut(pieces_of_logits(m, ids.to(place), step), step))
    if dense is model:  # its pieces cannot be computed in turns
        streams = [[*stream] for stream in streams]
    for p, q in zip_longest(*streams):
        yield p.double().log_softmax(-1).cpu(), q.double().log_softmax(-1).cpu()


def cut(pieces: Iterator[tuple[int, Tensor]], step: int) -> Iterator[Tensor]:
    """Logits of single windows (1, any, vocabulary) as (step, vocabulary) each, the last one as long as it is."""
    for _, logits in pieces:
        yield from logits[0].split(step)


@dataclass(frozen=True)
class Answer:
    """What the models write to one prompt, greedily. `repeated`: share of a text's 4-grams of tokens that it had before, which
    is near 0 in ordinary text and near 1 in a loop."""

    prompt: str
    dense: str
    model: str
    repeated_dense: float
    repeated: float


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a .txt file (one a line) or a .jsonl file (fields `prompt` or `messages`)."""
    try:
        lines = [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
        if path.suffix != ".jsonl":
            prompts: list[Any] = lines
        else:
            prompts = [r["messages"] if "messages" in r else str(r["prompt"]) for r in map(json.loads, lines)]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read prompts {path}: {error!r}; expected a prompt a line, or .jsonl with `prompt` or `messages`"
        ) from None
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return prompts


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, prompt: Any, new_tokens: int) -> tuple[str, float]:
    """(What the model writes greedily to a prompt, the share of repeated 4-grams). A text goes through the model's chat template
    where there is one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    elif isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        raise InputError("a prompt has `messages`, and the tokenizer has no chat template; give `prompt`")
    generate: Any = model.generate  # type: ignore[attr-defined]
    place = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    out = generate(
        ids.to(place), do_sample=False, max_new_tokens=new_tokens, temperature=None, top_p=None, top_k=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    if any(logits.isnan().any() for logits in out.logits):
        raise InputError(NOT_FINITE)
    own = out.sequences[0, ids.shape[1] :].tolist()
    return tokenizer.decode(own, skip_special_tokens=True), measure_repetition(own)


def measure_repetition(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams of a sequence that occur earlier in it."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_both(
    model: nn.Module, dense: nn.Module, tokenizer: Any, prompts: list[Any], new_tokens: int = 64
) -> list[Answer]:
    """Every prompt's answers side by side."""
    found = []
    for prompt in prompts:
        (theirs, a), (ours, b) = (answer(m, tokenizer, prompt, new_tokens) for m in (dense, model))
        found.append(Answer(prompt if isinstance(prompt, str) else prompt[-1]["content"], theirs, ours, a, b))
    return found
