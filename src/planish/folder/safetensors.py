"""Safetensors files with plain reads and writes: no memory map, so a tensor that is let go leaves memory.

(Pages of a mapped file count as resident until it is unmapped; a streamed model would then pile up.) Headers come
from outside and are checked entirely before any tensor is read. Format: u64 header length, JSON header, data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 << 20
AHEAD = (
    128 << 10
)  # bytes: Linux reads no more of a longer request than a device's read-ahead, of which this is the usual one


class DtypeError(ValueError):
    """A dtype that is not read; the file may be whole."""


class Entry(NamedTuple):
    """Where a tensor lies: `start` is a position in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def rows(self, first: int, count: int) -> Entry:
        """Some rows of the tensor as a matrix, whose width is its last axis."""
        width = self.shape[-1]
        size = width * self.dtype.itemsize
        return Entry(self.dtype, (count, width), self.start + first * size, count * size)


class Later(NamedTuple):
    """A tensor to be written that is not in memory: what it consists of, in the order of its numbers, comes piece by piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


class Shard:
    """One file's header. `read` opens the file anew: nothing stays open or mapped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.entries = read_header(path)
        except DtypeError as error:
            raise InputError(f"cannot read {path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read {path}: {error}; download it again") from None

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or these of its rows (first, count; see `Entry.rows`)."""
        entry = self.entry(name) if rows is None else self.entry(name).rows(*rows)
        data = torch.empty(entry.size, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                view = data.numpy().data
                while view:
                    count = file.readinto(view)  # type: ignore[attr-defined]
                    if not count:
                        raise OSError("the file ends early")
                    view = view[count:]
        except OSError as error:
            raise InputError(f"cannot read tensor {name} of {self.path}: {error}; download it again") from None
        return data.view(entry.dtype).reshape(entry.shape)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        return self.read(name, (first, count))

    def expect(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead, into its own cache; costs no memory of this process."""
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError), self.path.open("rb", buffering=0) as file:
            for entry in (self.entries[n] for n in names if n in self.entries):
                for start in range(entry.start, entry.start + entry.size, AHEAD):
                    size = min(AHEAD, entry.start + entry.size - start)
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def read_header(path: Path) -> dict[str, Entry]:
    """Entries by name; ValueError says what is wrong."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(total - 8, HEADER_LIMIT):
            raise ValueError(f"the header's length {length:,} does not fit a file of {total:,} bytes (truncated?)")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    entries = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = check_entry(name, value, 8 + length, total)
    end, last = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            word = "overlaps" if entry.start < end else "leaves a gap after"
            raise ValueError(f"tensor {name} {word} {last}")
        end, last = entry.start + entry.size, name
    if end != total:
        raise ValueError(f"{total:,} bytes, expected {end:,}: {total - end:,} more than its tensors have")
    return entries


def check_entry(name: str, value: Any, base: int, total: int) -> Entry:
    def whole(x: Any) -> bool:
        return type(x) is int and 0 <= x < 1 << 48

    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise ValueError(f"the header's entry for {name} has no dtype")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if (kind := value["dtype"][:20]) not in DTYPES:
        if kind.startswith(("F8", "F6", "F4")):
            raise DtypeError(
                f"tensor {name} is stored as {kind}: the checkpoint is quantised; start from the original weights "
                "(BF16, F16 or F32)"
            )
        raise DtypeError(f"tensor {name} has dtype {kind}, which is not read (known: {', '.join(DTYPES)})")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(whole, shape)):
        raise ValueError(f"tensor {name} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
        raise ValueError(f"tensor {name} has no valid data_offsets")
    dtype, (start, end) = DTYPES[value["dtype"]], offsets
    if end - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {tuple(shape)} has {end - start:,} bytes of data")
    if base + end > total:
        raise ValueError(f"tensor {name} ends at byte {base + end:,} of a file of {total:,} bytes (truncated?)")
    return Entry(dtype, tuple(shape), base + start, end - start)


def write_shard(path: Path, tensors: Mapping[str, Tensor | Later]) -> str:
    """Write tensors to `path`, complete or not at all (temporary name, fsync, rename); returns the SHA-256 in hex.

    Needs memory for one tensor besides the tensors themselves, and only where that one is not contiguous, or for one piece of
    one that is made meanwhile.
    """
    raw, order = make_header(tensors)
    digest = hashlib.sha256()
    part = path.with_name(path.name + ".part")
    with part.open("wb", buffering=0) as file:
        for head in (len(raw).to_bytes(8, "little"), raw):
            digest.update(head)
            write_all(file, head)
        for name in order:
            tensor = tensors[name]
            for piece in tensor.pieces() if isinstance(tensor, Later) else (tensor,):
                flat = piece.detach().cpu().contiguous()
                flat = flat.as_strided(
                    (flat.numel(),), (1,)
                )  # a single number counts as contiguous whatever its stride is
                data = flat.view(torch.uint8).numpy().data
                digest.update(data)
                write_all(file, data)
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
    return digest.hexdigest()


def make_header(tensors: Mapping[str, Tensor | Later]) -> tuple[bytes, list[str]]:
    """The header of a file with these tensors, and their order in it."""
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))  # widest first: everything stays aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        t = tensors[name]
        size = t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8), order


def write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
