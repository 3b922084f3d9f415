"""GGUF files with plain reads: the header at once, tensors one at a time, dequantised by the gguf library.

Layout (little-endian): magic "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries, the entries (key,
type, value), per tensor its name, shape (innermost first), type and offset, then the data, aligned. Headers come from
outside and are checked entirely before any tensor is read. A model may be split over files
`NAME-00001-of-00003.gguf`; metadata of the model is in the first.

Reference: the GGUF specification in ggml's docs/gguf.md. (The gguf library's own reader maps files into memory, where
pages that were read count as resident, and takes seconds for a vocabulary of 10⁵ tokens.)
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from planish.errors import InputError

MAGIC = b"GGUF"
SPLIT = re.compile(r"(?P<stem>.*)-(?P<n>\d{5})-of-(?P<count>\d{5})\.gguf$")
SCALARS = {  # metadata type → struct format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
CHUNK = 1 << 22  # numbers that are dequantised at a time
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Info(NamedTuple):
    """Where a tensor lies. `shape`: outermost dimension first; `start`: position in `file`; `size`: bytes."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUF:
    """A model's GGUF file, or all files of a split one: `metadata`, and `tensors` by name. Nothing stays open."""

    def __init__(self, path: Path):
        load_library()
        self.paths = list_parts(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Info] = {}
        for i, part in enumerate(self.paths):
            try:
                metadata, tensors = read_header(part)
            except (OSError, ValueError, OverflowError) as error:
                raise InputError(f"cannot read {part}: {error}") from None
            check_part(part, i, len(self.paths), metadata)
            self.metadata = self.metadata or metadata
            for name in tensors.keys() & self.tensors.keys():
                raise InputError(f"tensor {name} is in {part} and in another file of the same model")
            self.tensors |= tensors
        expected = self.metadata.get("split.tensors.count")
        if expected is not None and expected != len(self.tensors):
            raise InputError(f"{path}: {len(self.tensors)} tensors in {len(self.paths)} files, expected {expected}")

    @property
    def path(self) -> Path:
        return self.paths[0]

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the model is read in: the type of all its matrices where they share one of torch's, else fp32.

        Vectors, which GGUF keeps in fp32, are rounded to it.
        """
        kinds = {t.kind for t in self.tensors.values() if len(t.shape) > 1}
        return PLAIN.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def count_types(self) -> dict[str, int]:
        """How many tensors are stored in each type, the most frequent first."""
        return dict(Counter(t.kind for t in self.tensors.values()).most_common())

    def read(self, name: str, dtype: torch.dtype | None = None, part: int | None = None) -> Tensor:
        """One tensor in `dtype`, by default the model's, or (part) one matrix of a stack; needs memory for itself and for one
        chunk."""
        info = self.tensors[name]
        if part is not None:
            size = info.size // info.shape[0]
            info = info._replace(shape=info.shape[1:], start=info.start + part * size, size=size)
        out = torch.empty(info.shape, dtype=dtype or self.dtype)
        flat = out.view(-1, info.shape[-1]) if info.shape else out.view(1, 1)
        width = info.size // max(len(flat), 1)  # bytes per row
        step = max(1, CHUNK // max(flat.shape[1], 1))
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.start)
                for at in range(0, len(flat), step):
                    rows = flat[at : at + step]
                    rows.copy_(decode(read_bytes(file, len(rows) * width), info.kind).view_as(rows))
        except OSError as error:
            raise InputError(f"cannot read tensor {name} of {info.file}: {error}") from None
        return out


def load_library() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("reading GGUF needs the gguf library · pip install 'planish[gguf]'") from None
    return gguf


def decode(data: np.ndarray, kind: str) -> Tensor:
    """Numbers of a run of whole quantisation blocks."""
    if kind in PLAIN:
        return torch.from_numpy(data).view(PLAIN[kind])
    gguf = load_library()
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def read_bytes(file: BinaryIO, size: int) -> np.ndarray:
    data = np.empty(size, dtype=np.uint8)
    view = data.data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file ends early")
        view = view[count:]
    return data


def list_parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a file of, in order."""
    match = SPLIT.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [p.name for p in parts if not p.is_file()]
    if missing or not parts:
        raise InputError(
            f"{path} is one of {count} files of a model; {missing[0] if missing else 'the first'} is missing beside it"
        )
    return parts


def check_part(path: Path, i: int, count: int, metadata: dict[str, Any]) -> None:
    """The file's own idea of its place among the parts is that of its name."""
    n, of = metadata.get("split.no", 0), metadata.get("split.count", 0) or 1
    if (n, of) == (i, count) or (count > 1 and "split.count" not in metadata):
        return
    if count == 1:
        raise InputError(
            f"{path} is file {n + 1} of a model in {of}; give them their names NAME-00001-of-{of:05d}.gguf"
        )
    raise InputError(f"{path} says that it is file {n + 1} of {of}, its name says {i + 1} of {count}")


class Cursor:
    """Reads a header field by field; ValueError where the file ends first."""

    def __init__(self, file: BinaryIO, total: int):
        self.file, self.left = file, total

    def bytes(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"the header asks for {size:,} bytes where {self.left:,} are left (truncated?)")
        self.left -= size
        return self.file.read(size)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth > 4:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            form = np.dtype(f"<{SCALARS[inner]}")
            return np.frombuffer(self.bytes(count * form.itemsize), form).tolist()
        if count > self.left:
            raise ValueError(f"the header lists {count:,} values where {self.left:,} bytes are left (truncated?)")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Info]]:
    """Metadata and tensors of one file; ValueError says what is wrong."""
    total = path.stat().st_size
    with path.open("rb") as file:
        cursor = Cursor(file, total)
        if (magic := file.read(4)) != MAGIC:
            raise ValueError(f"it begins with {magic!r}, a GGUF file with {MAGIC!r}")
        cursor.left -= 4
        version = cursor.number("I")
        if version & 0xFFFF == 0:
            raise ValueError("a big-endian GGUF file; only little-endian ones are read")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; versions 2 and 3 are read")
        n_tensors, n_entries = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.number("I"))
        listed = [read_listing(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r} bytes")
    base = -(-(total - cursor.left) // alignment) * alignment
    tensors: dict[str, Info] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise ValueError(f"tensor {name} is listed twice")
        tensors[name] = check_tensor(path, name, shape, kind, base + offset, total)
    return metadata, tensors


def read_listing(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape outermost first, type number, offset) of one tensor."""
    name, dims = cursor.text(), cursor.number("I")
    if not 1 <= dims <= 4:
        raise ValueError(f"tensor {name[:80]} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def check_tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int, total: int) -> Info:
    """The tensor's place, if its type is one that the gguf library dequantises and its data is in the file."""
    gguf = load_library()
    try:
        kind = gguf.GGMLQuantizationType(number)
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        what = kind.name if number in {int(k) for k in gguf.GGMLQuantizationType} else f"number {number}"
        raise ValueError(
            f"tensor {name} is stored in type {what}, which the gguf library does not dequantise"
        ) from None
    if shape[-1] % per_block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} numbers, {kind.name} has blocks of {per_block}")
    nbytes = prod(shape) // per_block * size
    if start + nbytes > total:
        raise ValueError(f"tensor {name} ends at byte {start + nbytes:,} of a file of {total:,} bytes (truncated?)")
    return Info(path, kind.name, shape, start, nbytes)
