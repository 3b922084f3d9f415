"""Where text comes from: names, files and lists of texts, as documents."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planish.errors import InputError


@dataclass(frozen=True)
class Asked:
    """A prompt and its answer; `goes_on`: the answer is the rest of the prompt's text, else a turn of a conversation."""

    prompt: str
    answer: str
    goes_on: bool = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


Document = str | list[dict[str, Any]] | Asked  # a text, the messages of a conversation, a prompt and its answer
NAMES = ("builtin", "wikitext2", "c4")
SOURCES = (
    "builtin, wikitext2, c4, or a file: .txt, .jsonl (field `text`; or `messages`, or `prompt` with `answer` or `completion`), "
    ".parquet (column `text`), .npy (token ids)"
)
HALF = re.compile("[\ud800-\udfff]")  # half a character: JSON and Python can hold it, no encoding can

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


def check_file(path: Path) -> None:
    if path.suffix not in (".txt", ".jsonl", ".parquet", ".npy"):
        raise InputError(f"unknown text source · got {str(path)!r} · expected {SOURCES}")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"text source {what} · {path} · give an existing file, or one of: {SOURCES}")


def read_documents(source: str | Path | Sequence[str], split: str) -> list[Document]:
    """The documents of a name, a file or a list of texts; those that hold nothing are left out.

    A .txt file, `builtin` and `wikitext2` are one document each. Rows of a .jsonl or .parquet file whose text is null are
    passed over. Half a surrogate pair becomes U+FFFD: no tokenizer could take it. Raises InputError.
    """
    if not isinstance(source, str | Path):
        bad = next((i for i, d in enumerate(source) if not isinstance(d, str)), None)
        if bad is not None:
            raise InputError(f"a list of texts holds strings · number {bad} is of type {type(source[bad]).__name__}")
        found: list[Document] = [*source]
    else:
        found = read_named(str(source), split)
    return [HALF.sub("\ufffd", d) if isinstance(d, str) else d for d in found if not isinstance(d, str) or d.strip()]


def read_named(name: str, split: str) -> list[Document]:
    if name == "builtin":
        return [builtin_text("train" if split == "calibration" else "heldout")]
    if name in NAMES:
        return read_dataset(name, split)
    path = Path(name).expanduser()
    if path.suffix == ".parquet":
        return read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as e:
        raise InputError(f"text is not UTF-8 · {path}, byte {e.start} · convert the file to UTF-8") from e
    except OSError as e:
        raise InputError(f"cannot read text · {path} · {e.strerror} · check the file and its permissions") from e
    return read_jsonl(text, path) if path.suffix == ".jsonl" else [text]


def read_jsonl(text: str, path: Path) -> list[Document]:
    """One document per line: its field `text`; or `messages`, a conversation of {"role", "content"} objects; or `prompt` with an
    `answer` (another turn) or a `completion` (of the same text)."""
    documents: list[Document] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as e:
            what = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else "nested too deeply"
            raise InputError(f"broken JSON · {path}, line {number} · {what} · expected one object per line") from e
        fields = record if isinstance(record, dict) else {}
        if "text" in fields and fields["text"] is None:
            continue
        if isinstance(fields.get("text"), str):
            documents.append(fields["text"])
        elif "text" not in fields and is_conversation(fields.get("messages")):
            documents.append(fields["messages"])
        elif "text" not in fields and (asked := read_asked(fields)):
            documents.append(asked)
        else:
            got = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            got = f"`text` of type {type(fields['text']).__name__}" if "text" in fields else got
            raise InputError(
                f"no text in a record · {path}, line {number} · got {got} · expected a string field `text`, "
                "or `messages`, a list of objects with `role` and `content`, or strings `prompt` and `answer` or `completion`"
            )
    return documents


def is_conversation(messages: Any) -> bool:
    """A list, not empty, of objects whose role is a string and whose content is one as well."""
    parts = messages if isinstance(messages, list) else []
    return bool(parts) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in parts
    )


def read_asked(fields: dict[str, Any]) -> Asked | None:
    """A record's `prompt` and `answer` or `completion`, where these are strings and neither is empty."""
    for name in ("answer", "completion"):
        pair = fields.get("prompt"), fields.get(name)
        if all(isinstance(p, str) and p.strip() for p in pair):
            return Asked(*pair, goes_on=name == "completion")  # type: ignore[arg-type]
    return None


def read_parquet(path: Path) -> list[Document]:
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
    return documents


def read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        why = "it is no plain array (pickles are not read)" if "allow_pickle" in str(e) else str(e)
        raise InputError(
            f"cannot read token ids · {path} · {why} · expected an array of integers written by numpy.save"
        ) from e


def read_dataset(name: str, split: str) -> list[Document]:
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise InputError(
            f"{name} needs the `datasets` library · pip install 'planish[data]', or give a local file or `builtin`"
        ) from e
    try:
        if name == "wikitext2":
            part = "train" if split == "calibration" else "test"
            return ["\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])]
        files, part = "en/c4-validation.00000-of-00008.json.gz", "train[:1100]"
        if split == "calibration":
            files, part = "en/c4-train.00000-of-01024.json.gz", "train[:8192]"
        return list(load_dataset("allenai/c4", data_files={"train": files}, split=part)["text"])
    except Exception as e:  # the library raises many kinds when it cannot reach or read a data set
        raise InputError(
            f"cannot load a data set · {name} · {type(e).__name__}: {e} · "
            "check the network, or give a local file or `builtin`"
        ) from e
