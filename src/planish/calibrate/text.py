"""Token sequences: a SOURCE as ids, and windows cut from them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from planish.calibrate.documents import NAMES, Document, check_file, read_documents, read_npy
from planish.calibrate.encode import encode, encode_rendered, join, render
from planish.errors import InputError

Bos = Literal["auto", "every", "once", "never"]
Objective = Literal["text", "answers"]
SPARE = 1 << 14  # tokens at most that a result is measured on
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, mod 1, are spread evenly, every k-th of them too


@dataclass(frozen=True, eq=False)
class Text:
    """One long token sequence and where it came from.

    `begin`: the id that every window begins with; None where windows are cut from the sequence as it is.
    """

    tokens: Tensor  # (n,), int64, on the CPU; as `mark` makes them where only answers are priced
    source: str
    bos: bool  # the sequence begins with the tokenizer's beginning-of-sequence token
    is_ids: bool  # given as token ids: no tokenizer was involved
    begin: int | None = None
    turns: bool = False  # some of it are conversations

    @property
    def sampling(self) -> Literal["contiguous", "random"]:
        """How to take windows from it unless told: ids in their order, text at random."""
        return "contiguous" if self.is_ids else "random"

    @property
    def policy(self) -> Literal["every", "once", "never"]:
        """Which windows begin with the beginning-of-sequence token: every one, at most the first, none."""
        return "every" if self.begin is not None else "once" if self.bos else "never"


def load_tokens(
    source: str | Path | Sequence[str] | np.ndarray | Tensor,
    tokenizer: Any = None,
    *,
    split: Literal["calibration", "evaluation"] = "calibration",
    vocab_size: int | None = None,
    tokenize: Callable[[Any, list[Document], bool], np.ndarray] | None = None,
    bos: Bos = "auto",
    objective: Objective = "text",
) -> Text:
    """Read a SOURCE as one sequence of token ids.

    Names have two disjoint parts, chosen by ``split``:

    ========= ============================================ ===========================================
    name      calibration                                  evaluation
    ========= ============================================ ===========================================
    builtin   training modules of the standard library     its held-out modules
    wikitext2 train split, raw                             test split, raw
    c4        first 8192 documents of training shard 0     first 1100 documents of validation shard 0,
                                                           first 256 · 2048 tokens
    ========= ============================================ ===========================================

    Files, lists of texts, arrays and tensors are taken whole, whatever the split. ``vocab_size`` is the model's: ids beyond
    it are an error. ``tokenize``: in the place of `encode`, with the same ids.
    ``objective`` "answers": ids that predict no token of an answer are marked (see `mark`); a SOURCE without answers is refused.

    ``bos``, where the beginning-of-sequence token stands, as ``Text.policy`` then says:

    - every: in front of every window, as the model sees a text in use. Every document is tokenized by itself.
    - once: the papers' protocol. Documents are joined by a blank line (of `c4`'s evaluation part by a space) and tokenized in
      one call: the token comes once, in front of it all, where the tokenizer puts it at all.
    - never: as once, without that token.
    - auto: every, where the tokenizer puts the token in front of a text. Where it does not: no such token, every document
      tokenized by itself and followed by the end-of-sequence token, if there is one. Ids are taken as they are.

    Raises `InputError` for whatever the user can correct.
    """
    begin = find_begin(tokenizer := getattr(tokenizer, "tokenizer", tokenizer), bos)  # a processor's own
    name = str(source) if isinstance(source, str | Path) else "texts"
    if (ids := read_ids(source, objective)) is not None:
        name, where = (name, name) if isinstance(source, str | Path) else ("ids", "the given ids")
        return Text(check_ids(ids, where, vocab_size), name, False, True, begin if bos == "every" else None)
    documents = list_documents(source, tokenizer, name, split)
    between = None if bos in ("auto", "every") else " " if name == "c4" and split == "evaluation" else "\n\n"
    if objective == "answers":
        ids, answers = encode_answers(tokenizer, documents, between, name)
    else:
        ids, answers = encode_text(tokenizer, documents, between, tokenize or encode), np.ones(1, dtype=bool)
    if name == "c4" and split == "evaluation":
        ids = ids[: 256 * 2048]
    first = len(ids) > 0 and int(ids[0]) == begin
    if bos == "never" and first:
        ids, answers, first = ids[1:], answers[1:] if len(answers) == len(ids) else answers, False
    every = bos == "every" or (bos == "auto" and first)
    tokens = mark(check_ids(ids, name, vocab_size), torch.from_numpy(answers))
    turns = any(not isinstance(d, str) for d in documents)
    return Text(tokens, name, first or every, False, begin if every else None, turns)


def list_documents(source: Any, tokenizer: Any, name: str, split: str) -> list[Document]:
    """Of a SOURCE that is text, for a tokenizer that has to be there; at least one."""
    if tokenizer is None:
        raise InputError(
            f"cannot turn text into tokens · {name} · got no tokenizer · expected one beside the model · "
            "add its tokenizer files to the model folder (in Python, give tokenizer=), or give token ids as a .npy file"
        )
    if documents := read_documents(source, split):
        return documents
    raise InputError(f"no text · {name} · got only white space · give a source that has text")


def encode_text(
    tokenizer: Any,
    documents: list[Document],
    between: str | None,
    encode: Callable[[Any, list[Document], bool], np.ndarray],
) -> np.ndarray:
    """Ids of documents, joined by `between` if given."""
    if between is not None:
        documents = [join([render(tokenizer, d) for d in documents], between).text]
    return encode(tokenizer, documents, between is None)


def encode_answers(
    tokenizer: Any, documents: Sequence[Document], between: str | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents, joined by `between` if given, and which of them are of answers."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"--objective answers needs a tokenizer that says where its tokens are in the text, {type(tokenizer).__name__} does "
            "not: use a fast one, or --objective text"
        )
    rendered = [render(tokenizer, d, answers=True) for d in documents]
    apart = between is None
    ids, answers = encode_rendered(tokenizer, rendered if apart else [join(rendered, between or "")], apart, True)
    if not answers.any():
        raise refuse_unanswered(name)
    return ids, answers


def refuse_unanswered(name: str) -> InputError:
    return InputError(
        f"no answers to price · {name} · --objective answers needs a .jsonl file whose lines have `messages` with turns of an "
        "assistant, or `prompt` and `answer` or `completion` · give one, or --objective text"
    )


def mark(tokens: Tensor, answers: Tensor) -> Tensor:
    """Token ids i (n,), those that predict no token of an answer (the next one is none) as −1 − i: what is cut, mixed, kept or
    fingerprinted carries its mask with it. The last one counts as what predicts the first."""
    return torch.where(answers.roll(-1), tokens, ~tokens)


def unmark(windows: Tensor) -> Tensor:
    """Token ids as they were before `mark`."""
    return torch.where(windows < 0, ~windows, windows)


def list_priced(windows: Tensor) -> Tensor:
    """Which tokens predict what is priced: all, unless `mark` says otherwise."""
    return windows >= 0


def find_begin(tokenizer: Any, bos: str) -> int | None:
    """The tokenizer's beginning-of-sequence token, which "every" needs."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if bos not in ("auto", "every", "once", "never"):
        raise InputError(f"unknown bos · got {bos!r} · expected auto, every, once or never")
    if bos == "every" and begin is None:
        raise InputError("bos every: the tokenizer has no beginning-of-sequence token; use auto, once or never")
    return begin


def read_ids(source: Any, objective: Objective = "text") -> np.ndarray | None:
    """A SOURCE that is token ids, in memory or a .npy file; None where it is text. A file must be there, and hold answers as far as
    its name tells if that is the `objective`."""
    named = isinstance(source, str | Path)
    if objective == "answers" and (not named or str(source) in NAMES or Path(source).suffix == ".npy"):
        raise refuse_unanswered(str(source) if named else "what is given in memory")
    if isinstance(source, np.ndarray | Tensor):
        return source.detach().cpu().numpy() if isinstance(source, Tensor) else source
    if not isinstance(source, str | Path) or str(source) in NAMES:
        return None
    path = Path(source).expanduser()
    check_file(path)
    return read_npy(path) if path.suffix == ".npy" else None


def sample_starts(
    tokens: Tensor,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    sampling: Literal["contiguous", "random"] = "random",
    begin: int | None = None,
) -> Sequence[int]:
    """Where ``n_samples`` windows of ``tokens`` (n,) start.

    ``random``: distinct starts drawn by ``random.Random(seed)``, in the order drawn; windows may overlap.
    ``contiguous``: windows 0, 1, 2 … side by side from the start; ``seed`` is not used. ``begin``: see `cut_window`.
    Only windows of `list_windows`.
    """
    if n_samples < 1:
        raise InputError(f"cannot sample windows · got n_samples {n_samples} · expected 1 or more")
    _check_length(tokens, seq_len)
    starts = list_windows(tokens, seq_len, sampling, begin)
    available = len(starts)
    if sampling == "random":
        starts = random.Random(seed).sample(starts, min(n_samples, available))
    answers = "" if bool(list_priced(tokens).all()) else " that have a token of an answer to predict"
    if available < n_samples:
        raise InputError(
            f"not enough windows · {len(tokens)} tokens hold {available} {sampling} windows of {seq_len}{answers} · "
            f"got n_samples {n_samples} · use --n-samples {available}, a smaller --seq-len, or a longer source"
        )
    return starts[:n_samples]


def count_spare(n: int, seq_len: int, parts: int = 1) -> int:
    """How many windows a result is measured on beside n of these `parts` of the text that it is calibrated on."""
    return min(n // 4, SPARE // seq_len // parts)


def spare_windows(tokens: Tensor, starts: Sequence[int], n: int, seq_len: int, begin: int | None = None) -> Tensor:
    """At most n windows (n, seq_len) of ``tokens``, side by side and spread evenly, that share no token with those at `starts`."""
    taken = torch.zeros(len(tokens), dtype=torch.bool)
    for i in starts:
        taken[i : i + seq_len] = True
    free = [i for i in list_windows(tokens, seq_len, "contiguous", begin) if not bool(taken[i : i + seq_len].any())]
    few = [free[(2 * k + 1) * len(free) // (2 * n)] for k in range(n)] if len(free) > n else free
    return cut_windows(tokens, few, seq_len, begin)


def cut_windows(tokens: Tensor, starts: Sequence[int], seq_len: int, begin: int | None = None) -> Tensor:
    """The windows (n, seq_len) of ``tokens`` at `starts`, see `cut_window`."""
    found = [cut_window(tokens, i, seq_len, begin) for i in starts]
    return torch.stack(found) if found else tokens.new_empty(0, seq_len)


def cut_window(tokens: Tensor, start: int, seq_len: int, begin: int | None = None) -> Tensor:
    """The window (seq_len,) of ``tokens`` (n,) at `start`; with `begin` in front, unless that is what stands there."""
    if begin is None or int(tokens[start]) in (begin, ~begin):
        return tokens[start : start + seq_len]
    first = begin if int(tokens[start - 1]) >= 0 else ~begin  # it predicts what the token before does
    return torch.cat([tokens.new_tensor([first]), tokens[start : start + seq_len - 1]])


def list_windows(tokens: Tensor, seq_len: int, sampling: str, begin: int | None = None) -> Sequence[int]:
    """Where windows may start: those that predict something that is priced (see `mark`)."""
    if sampling not in ("random", "contiguous"):
        raise InputError(f"unknown sampling · got {sampling!r} · expected contiguous or random")
    starts = range(len(tokens) - seq_len + 1) if sampling == "random" else list_starts(tokens, seq_len, begin)
    priced = list_priced(tokens)
    if bool(priced.all()):
        return starts
    sums, at = torch.nn.functional.pad(priced.cumsum(0), (1, 0)), torch.tensor([*starts], dtype=torch.int64)
    first = (
        at if begin is None else at - (unmark(tokens[at]) != begin).long()
    )  # one token before, where `begin` is put in front
    return at[sums[first + seq_len - 1] > sums[first.clamp(min=0)]].tolist()


def list_starts(tokens: Tensor, seq_len: int, begin: int | None = None) -> list[int]:
    """Where windows start that lie side by side, no token twice and none left out but the tail."""
    if begin is None:
        return list(range(0, len(tokens) - seq_len + 1, seq_len))
    starts, at = [], 0
    while at < len(tokens):
        length = seq_len if int(tokens[at]) in (begin, ~begin) else seq_len - 1
        if at + length > len(tokens):
            break
        starts.append(at)
        at += length
    return starts


def find_place(n: int) -> float:
    """Where window n stands in [0, 1): places of any windows that follow one another are spread evenly."""
    return (n + 0.5) * GOLDEN % 1


def list_shuffled(n: int, share: float) -> list[int]:
    """Which of n windows `shuffle_windows` shuffles."""
    return [i for i in range(n) if find_place(i) < share]


def list_aside(first: int, last: int, every: int) -> list[int]:
    """Which of the windows first … last − 1 are set aside: of each `every` the one that would be shuffled last; none for 0."""
    starts = range(first - first % every, last, every) if every else ()
    found = (max(range(start, start + every), key=find_place) for start in starts)
    return [n for n in found if first <= n < last]


def shuffle_windows(windows: Tensor, share: float) -> Tensor:
    """The windows (n, seq), a share of them, spread evenly, with all tokens but the first in another order.

    Which ones and in which order depends on their places alone. Windows of which only answers are priced stay in their order.
    """
    places = [i for i in list_shuffled(len(windows), share) if bool(list_priced(windows[i]).all())]
    if not places or windows.shape[1] < 3:
        return windows
    windows = windows.clone()
    for i in places:
        order = torch.randperm(windows.shape[1] - 1, generator=torch.Generator().manual_seed(i))
        windows[i, 1:] = windows[i, 1 + order]
    return windows


def share_out(shares: Sequence[float], n: int) -> list[int]:
    """n as whole numbers in proportion to the shares, by largest remainders; each at least 1 (InputError where n is too small)."""
    exact = [s / sum(shares) * n for s in shares]
    found = [max(1, int(e)) for e in exact]
    for i in sorted(range(len(shares)), key=lambda i: found[i] - exact[i])[: max(0, n - sum(found))]:
        found[i] += 1
    if sum(found) != n:
        raise InputError(
            f"{n} windows are too few for weights {', '.join(f'{s:g}' for s in shares)}: use more --n-samples"
        )
    return found


def interleave(parts: Sequence[Tensor]) -> Tensor:
    """Windows (n_i, seq) of several texts as one sequence (Σ n_i, seq), each text's spread evenly over all of it."""
    places = [(i + 0.5) / len(p) for p in parts for i in range(len(p))]
    return torch.cat([*parts])[sorted(range(len(places)), key=places.__getitem__)]


def eval_windows(tokens: Tensor, seq_len: int, begin: int | None = None) -> Tensor:
    """``tokens`` (n,) as windows side by side (about n / seq_len, seq_len); the tail is dropped. ``begin``: see `cut_window`."""
    _check_length(tokens, seq_len)
    starts = list_starts(tokens, seq_len, begin)
    if begin is None:
        return tokens[: len(starts) * seq_len].view(-1, seq_len)
    return torch.stack([cut_window(tokens, i, seq_len, begin) for i in starts])


def thin(tokens: Tensor, seq_len: int, begin: int | None = None, count: int = 1 << 15) -> Tensor:
    """At most `count` tokens of a text, but one window: of those that `eval_windows` cuts some, evenly spaced, one after the
    other."""
    _check_length(tokens, seq_len)
    starts, n = list_starts(tokens, seq_len, begin), max(1, count // seq_len)
    if n >= len(starts):
        return tokens
    chosen = [len(starts) * i // n for i in range(n)]
    return torch.cat([tokens[starts[i] : starts[i + 1]] for i in chosen])


def fingerprint(tokens: Tensor, **parameters: object) -> str:
    """SHA-256 (hex) of token ids, their shape and the parameters that chose them: equal exactly if all are equal."""
    digest = hashlib.sha256(json.dumps([list(tokens.shape), parameters], sort_keys=True, default=str).encode())
    digest.update(tokens.contiguous().cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _check_length(tokens: Tensor, seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"windows are too short · got seq_len {seq_len} · expected 2 or more")
    if len(tokens) < seq_len:
        raise InputError(
            f"not enough tokens for one window · got {len(tokens)} tokens · expected at least seq_len {seq_len} · "
            "use a smaller --seq-len or a longer source"
        )


def check_ids(ids: np.ndarray, where: str, vocab_size: int | None) -> Tensor:
    """Any integer array as int64 (n,), or an error that names the first bad position."""
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"token ids have the wrong form · {where} · got {ids.dtype} of shape {ids.shape} · "
            "expected a 1-D array of integers · flatten it or convert it"
        )
    if ids.size == 0:
        raise InputError(f"no tokens · {where} · got an empty sequence · give a source that has some")
    bad = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(bad.argmax())
        limit = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1} (the model's vocabulary)"
        raise InputError(
            f"token id out of range · {where}, position {at} · got {int(ids[at])} · expected {limit} · "
            "check that the tokens were made with this model's tokenizer"
        )
    return torch.from_numpy(ids.astype(np.int64))
