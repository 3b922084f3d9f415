"""A checkpoint in low precision, read tensor by tensor and dequantised as its configuration declares."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError
from planish.folder.packed.packing import Declared, Known, Packing
from planish.folder.safetensors import NAMES, Entry
from planish.folder.stored import Stored, Weights

CHUNK = 1 << 20  # numbers that are dequantised at a time
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RUNTIME = re.compile(  # scales of activations and of caches, which are no part of a weight
    r"[._](input|output|activation|act|[kvq]|kv|qkv|prob)_(scale|zero_point|global_scale|scale_ub)$"
)


class Packed(NamedTuple):
    """A weight that is stored in parts: names of its stored tensors by role."""

    packing: Packing
    parts: dict[str, str]
    shape: tuple[int, ...]


class PackedWeights:
    """The tensors of a checkpoint in low precision (see `planish.folder.stored.Weights`).

    Packed weights have the names that they would have unpacked, and `dtype`, to which they are rounded once from fp32; all
    others are as they are stored. All headers are checked here. Reading one weight takes memory for its parts, itself and a
    chunk of rows.
    """

    def __init__(self, stored: Weights, declared: Declared, dtype: torch.dtype | None, folder: Path):
        self.stored, self.declared, self.folder = stored, declared, folder
        self.left_out = [n for n in stored.names if RUNTIME.search(n)]
        names = set(stored.names) - set(self.left_out)
        self.packed = dict(self._describe(stem, parts) for stem, parts in self._group(names).items())
        used = {p for packed in self.packed.values() for p in packed.parts.values()}
        self.plain = {n: stored.entry(n) for n in sorted(names - used)}
        if not self.packed:
            raise InputError(
                f"{folder} declares {declared.name} weights in its configuration, and no tensor is stored that way; where they are "
                "ordinary weights, take quantization_config out of config.json"
            )
        if both := sorted(self.plain.keys() & self.packed.keys()):
            raise InputError(f"tensor {both[0]} of {folder} is stored twice, as it is and as {declared.name}")
        for name, entry in self.plain.items():
            self._check_plain(name, entry)
        kinds = Counter(e.dtype for e in self.plain.values() if e.dtype in FLOATS)
        self.dtype = dtype or (kinds.most_common(1)[0][0] if kinds else torch.bfloat16)
        self.entries = self.plain | {n: Entry(self.dtype, p.shape, 0, 0) for n, p in self.packed.items()}

    @property
    def paths(self) -> list[Path]:
        return self.stored.paths

    @property
    def names(self) -> Collection[str]:
        return self.entries.keys()

    def _group(self, names: set[str]) -> dict[str, dict[str, str]]:
        """Stem of a packed weight → stored names of its parts by suffix."""
        marks = self.declared.marks
        stems = {n.removesuffix(suffix) for n in names for end, suffix in marks.items() if n.endswith(end)}
        suffixes = {"", ".weight", *marks.values()}
        return {stem: {s: stem + s for s in suffixes if stem + s in names} for stem in sorted(stems)}

    def _describe(self, stem: str, found: Mapping[str, str]) -> tuple[str, Packed]:
        """Name of the weight, and how it is stored; InputError for what is missing, misshapen or contradicts the configuration."""
        module = stem.removesuffix(".weight")
        try:
            known = {s: self._know(n) for s, n in found.items()}
            if self.declared.skips(module):
                beside = next(n for s, n in found.items() if s not in ("", ".weight"))
                raise ValueError(f"is listed as not converted, and {beside} is stored")
            packing = self.declared.pick(stem, known)
            for role, suffix in packing.needed.items():
                if suffix not in found:
                    beside = next(n for s, n in found.items())
                    raise InputError(
                        f"tensor {stem}{suffix} is missing in {self.folder}: the {role} of {beside}; the checkpoint is incomplete"
                    )
            roles = {**packing.needed, **packing.optional}
            parts = {role: found[s] for role, s in roles.items() if s in found}
            shape = packing.measure({role: known[s] for role, s in roles.items() if s in found})
        except ValueError as error:
            raise self._refuse(stem, error) from None
        return stem + packing.result, Packed(packing, parts, shape)

    def _know(self, name: str) -> Known:
        entry = self.stored.entry(name)
        return Known(entry.dtype, tuple(entry.shape), partial(self.stored.read, name))

    def _refuse(self, name: str, error: ValueError) -> InputError:
        return InputError(f"tensor {name} of {self.folder} ({self.declared.name}) {error}")

    def _check_plain(self, name: str, entry: Stored) -> None:
        """InputError for codes without scales."""
        if name.endswith(".weight") and entry.dtype not in FLOATS:
            wanted = sorted(set(self.declared.marks.values()))
            raise InputError(
                f"tensor {name} of {self.folder} is stored as {NAMES[entry.dtype]}, and nothing beside it says what its codes mean "
                f"({self.declared.name} has {name.removesuffix('.weight')}… {', '.join(wanted)}): the checkpoint is incomplete"
            )

    def entry(self, name: str) -> Stored:
        if name not in self.entries:
            raise InputError(f"tensor {name} is missing in {self.folder}: the checkpoint is incomplete")
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return self.stored.read(name)
        shape = self.packed[name].shape
        return self._decode(name, 0, prod(shape[:-1])).view(shape)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        return self._decode(name, first, count) if name in self.packed else self.stored.read_rows(name, first, count)

    def _decode(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a packed weight as a matrix."""
        packing, parts, shape = self.packed[name]
        out = torch.empty((count, shape[-1]), dtype=self.dtype)
        step = max(1, CHUNK // shape[-1])
        try:
            held, skipped = self._read_parts(parts, shape, first, count)
            rows = packing.open(held, shape)
            for at in range(0, count, step):
                size = min(step, count - at)
                out[at : at + size] = rows(first - skipped + at, size)
        except ValueError as error:
            raise self._refuse(name, error) from None
        return out

    def _read_parts(
        self, parts: dict[str, str], shape: tuple[int, ...], first: int, count: int
    ) -> tuple[dict[str, Tensor], int]:
        """The parts of a packed weight, of a stack those of the matrices that hold these rows; and how many rows stand before."""
        if len(shape) < 3:
            return {role: self.stored.read(n) for role, n in parts.items()}, 0
        at, end = first // shape[1], (first + count - 1) // shape[1] + 1
        return {role: self._read_matrices(n, shape[0], at, end) for role, n in parts.items()}, at * shape[1]

    def _read_matrices(self, name: str, number: int, at: int, end: int) -> Tensor:
        """Of a part of `number` matrices those from `at` to `end`; one that says the same of all as it is."""
        size = tuple(self.stored.entry(name).shape)
        if len(size) < 2:
            whole = self.stored.read(name)
            return whole[at:end] if size == (number,) else whole
        rows = prod(size[1:-1])
        return self.stored.read_rows(name, at * rows, (end - at) * rows).view(end - at, *size[1:])

    def expect(self, names: Iterable[str]) -> None:
        self.stored.expect([p for n in names for p in (self.packed[n].parts.values() if n in self.packed else [n])])

    def origin(self) -> dict[str, Any]:
        """What planish.json says about how the model was stored."""
        types = Counter(p.packing.describe() for p in self.packed.values())
        types.update(NAMES[e.dtype] for e in self.plain.values())
        return {
            "format": self.declared.name,
            "tensor_types": dict(types.most_common()),
            "read_as": NAMES[self.dtype],
            "left_out": len(self.left_out),
            "note": "the rounding of these types is part of the dense model that everything here is compared with",
        }
