"""Token sequences: read a SOURCE, cut windows from it; and text that every Python installation carries."""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from planish.errors import InputError

SOURCES = "builtin, wikitext2, c4, or a file: .txt, .jsonl (field `text`), .parquet (column `text`), .npy (token ids)"

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, mod 1, are spread evenly, every k-th of them too

_SKIPPED = {
    "site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip",
    "encodings", "pydoc_data", "test", "tests", "idle_test",
}  # fmt: skip


def builtin_files(split: str, *, with_tests: bool = False) -> Iterator[Path]:
    """Source files of the running interpreter's standard library, in a fixed order.

    Whole top-level modules are held out by a hash of their names: ``split="heldout"`` has those
    (one name in twelve, one byte in five of CPython 3.11), ``split="train"`` the others. ``with_tests`` adds Python's own test
    suite to the training split where the installation has it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        if with_tests and split == "train" and parts[0] == "test":
            if "encodings" not in parts and "data" not in parts:
                yield path
            continue
        if _SKIPPED & set(parts):
            continue
        top = parts[0].removesuffix(".py")
        heldout = hashlib.sha256(top.encode()).digest()[0] < 20
        if heldout == (split == "heldout"):
            yield path


def builtin_text(split: str, *, with_tests: bool = False) -> str:
    """The files of `builtin_files`, joined; each begins with a comment line that names it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join(
        f"# {p.relative_to(root).as_posix()}\n" + p.read_text(encoding="utf-8", errors="replace").strip()
        for p in builtin_files(split, with_tests=with_tests)
    )


@dataclass(frozen=True, eq=False)
class Text:
    """One long token sequence and where it came from."""

    tokens: Tensor  # (n,), int64, on the CPU
    source: str
    bos: bool  # the tokenizer put its beginning-of-sequence token in front
    is_ids: bool  # given as token ids: no tokenizer was involved

    @property
    def sampling(self) -> Literal["contiguous", "random"]:
        """How to take windows from it unless told: ids in their order, text at random."""
        return "contiguous" if self.is_ids else "random"


def load_tokens(
    source: str | Path | np.ndarray | Tensor,
    tokenizer: Any = None,
    *,
    split: Literal["calibration", "evaluation"] = "calibration",
    vocab_size: int | None = None,
    tokenize: Callable[[Any, str], np.ndarray] | None = None,
) -> Text:
    """Read a SOURCE as one sequence of token ids.

    Documents are joined by a blank line and tokenized in one call, which is what the papers' perplexities
    are measured on. Names have two disjoint parts, chosen by ``split``:

    ========= ============================================ ===========================================
    name      calibration                                  evaluation
    ========= ============================================ ===========================================
    builtin   training modules of the standard library     its held-out modules
    wikitext2 train split, raw                             test split, raw
    c4        first 8192 documents of training shard 0     first 1100 documents of validation shard 0,
                                                           joined by a space, first 256 · 2048 tokens
    ========= ============================================ ===========================================

    Files, arrays and tensors are taken whole, whatever the split. ``vocab_size`` is the model's: ids beyond it are
    an error. ``tokenize(tokenizer, text)``: in the place of `encode`, with the same ids. Raises `InputError` for whatever
    the user can correct.
    """
    if isinstance(source, np.ndarray | Tensor):
        array = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
        return Text(check_ids(array, "the given ids", vocab_size), "ids", bos=False, is_ids=True)
    name = str(source)
    if name not in ("builtin", "wikitext2", "c4"):
        _check_file(Path(name).expanduser())
        if name.endswith(".npy"):
            return Text(check_ids(_read_npy(Path(name).expanduser()), name, vocab_size), name, bos=False, is_ids=True)
    if tokenizer is None:
        raise InputError(
            f"cannot turn text into tokens · {name} · got no tokenizer · expected one beside the model · "
            "add its tokenizer files to the model folder (in Python, give tokenizer=), or give token ids as a .npy file"
        )
    text = _read_text(name, split)
    if not text.strip():
        raise InputError(f"no text · {name} · got only white space · give a source that has text")
    ids = (tokenize or encode)(tokenizer, text)
    if name == "c4" and split == "evaluation":
        ids = ids[: 256 * 2048]
    bos = len(ids) > 0 and int(ids[0]) == getattr(tokenizer, "bos_token_id", None)
    return Text(check_ids(ids, name, vocab_size), name, bos=bos, is_ids=False)


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a text (n,), int64, with whatever the tokenizer puts in front."""
    return np.asarray(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"], dtype=np.int64)


def sample_windows(
    tokens: Tensor, n_samples: int, seq_len: int, seed: int = 0, sampling: Literal["contiguous", "random"] = "random"
) -> Tensor:
    """Cut ``n_samples`` windows (n_samples, seq_len) from ``tokens`` (n,); both int64.

    ``random``: distinct starts drawn by ``random.Random(seed)``, in the order drawn; windows may overlap.
    ``contiguous``: windows 0, 1, 2 … side by side from the start; ``seed`` is not used.
    """
    if n_samples < 1:
        raise InputError(f"cannot sample windows · got n_samples {n_samples} · expected 1 or more")
    _check_length(tokens, seq_len)
    if sampling == "random":
        available = len(tokens) - seq_len + 1
        starts = random.Random(seed).sample(range(available), min(n_samples, available))
    elif sampling == "contiguous":
        available = len(tokens) // seq_len
        starts = [seq_len * i for i in range(min(n_samples, available))]
    else:
        raise InputError(f"unknown sampling · got {sampling!r} · expected contiguous or random")
    if available < n_samples:
        raise InputError(
            f"not enough windows · {len(tokens)} tokens hold {available} {sampling} windows of {seq_len} · "
            f"got n_samples {n_samples} · use --n-samples {available}, a smaller --seq-len, or a longer source"
        )
    return torch.stack([tokens[i : i + seq_len] for i in starts])


def list_shuffled(n: int, share: float) -> list[int]:
    """Which of n windows `shuffle_windows` shuffles."""
    return [i for i in range(n) if (i + 0.5) * GOLDEN % 1 < share]


def shuffle_windows(windows: Tensor, share: float) -> Tensor:
    """The windows (n, seq), a share of them, spread evenly, with all tokens but the first in another order.

    Which ones and in which order depends on their places alone.
    """
    places = list_shuffled(len(windows), share)
    if not places or windows.shape[1] < 3:
        return windows
    windows = windows.clone()
    for i in places:
        order = torch.randperm(windows.shape[1] - 1, generator=torch.Generator().manual_seed(i))
        windows[i, 1:] = windows[i, 1 + order]
    return windows


def eval_windows(tokens: Tensor, seq_len: int) -> Tensor:
    """``tokens`` (n,) as non-overlapping windows (n // seq_len, seq_len); the tail is dropped."""
    _check_length(tokens, seq_len)
    n = len(tokens) // seq_len
    return tokens[: n * seq_len].view(n, seq_len)


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


def _check_file(path: Path) -> None:
    if path.suffix not in (".txt", ".jsonl", ".parquet", ".npy"):
        raise InputError(f"unknown text source · got {str(path)!r} · expected {SOURCES}")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"text source {what} · {path} · give an existing file, or one of: {SOURCES}")


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


def _read_text(name: str, split: str) -> str:
    if name == "builtin":
        return builtin_text("train" if split == "calibration" else "heldout")
    if name in ("wikitext2", "c4"):
        return _read_dataset(name, split)
    path = Path(name).expanduser()
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as e:
        raise InputError(f"text is not UTF-8 · {path}, byte {e.start} · convert the file to UTF-8") from e
    except OSError as e:
        raise InputError(f"cannot read text · {path} · {e.strerror} · check the file and its permissions") from e
    return _join_jsonl(text, path) if path.suffix == ".jsonl" else text


def _join_jsonl(text: str, path: Path) -> str:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(
                f"broken JSON · {path}, line {number} · {e.msg} at column {e.colno} · expected one object per line"
            ) from e
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            got = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            got = f"`text` of type {type(document).__name__}" if isinstance(record, dict) and "text" in record else got
            raise InputError(
                f"no text in a record · {path}, line {number} · got {got} · expected a string field `text`"
            )
        documents.append(document)
    return "\n\n".join(documents)


def _read_parquet(path: Path) -> str:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise InputError(f"cannot read parquet without pyarrow · {path} · pip install 'planish[data]'") from e
    documents: list[Any] = [None]
    try:
        columns = pyarrow.parquet.read_schema(path).names
        if "text" in columns:
            documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].drop_null().to_pylist()
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read parquet · {path} · {e} · check the file") from e
    if not all(isinstance(d, str) for d in documents):
        raise InputError(
            f"no text in a parquet file · {path} · got columns {columns} · expected a string column `text`"
        )
    return "\n\n".join(documents)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        why = "it is no plain array (pickles are not read)" if "allow_pickle" in str(e) else str(e)
        raise InputError(
            f"cannot read token ids · {path} · {why} · expected an array of integers written by numpy.save"
        ) from e


def _read_dataset(name: str, split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise InputError(
            f"{name} needs the `datasets` library · pip install 'planish[data]', or give a local file or `builtin`"
        ) from e
    try:
        if name == "wikitext2":
            part = "train" if split == "calibration" else "test"
            return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
        if split == "calibration":
            files, part, between = "en/c4-train.00000-of-01024.json.gz", "train[:8192]", "\n\n"
        else:
            files, part, between = "en/c4-validation.00000-of-00008.json.gz", "train[:1100]", " "
        return between.join(load_dataset("allenai/c4", data_files={"train": files}, split=part)["text"])
    except Exception as e:  # the library raises many kinds when it cannot reach or read a data set
        raise InputError(
            f"cannot load a data set · {name} · {type(e).__name__}: {e} · "
            "check the network, or give a local file or `builtin`"
        ) from e
