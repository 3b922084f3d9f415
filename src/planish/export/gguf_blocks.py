"""Matrices that a folder stores in llama.cpp's blocks, found again among the matrices of a GGUF file, row by row.

What an export does to a matrix of such a folder (rows of queries and keys in another order, a fused linear taken apart, rows
and columns of zeros) moves rows and keeps them whole. So every stored row is remembered by the numbers that it stands for, and
a matrix all of whose rows are known is written with their bytes: nothing is rounded twice.
"""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from planish.folder.packed.ggml import END, Ggml
from planish.folder.packed.reader import PackedWeights
from planish.folder.source import FolderSource
from planish.rounding.ggml import dequantise
from planish.rounding.types import StorageType

Found = tuple[StorageType, np.ndarray]  # a type, and a matrix's rows of bytes


class StoredRows:
    """Rows of the tensors that are in memory now: those outside the blocks, or one block's."""

    def __init__(self, source: FolderSource):
        weights = source.reader.weights
        known = isinstance(weights, PackedWeights) and isinstance(weights.declared, Ggml)
        self.weights = weights if known and isinstance(weights, PackedWeights) else None
        self.prefix, experts, self.store_name = (
            f"{source.family.blocks}.",
            source.family.experts,
            source.family.store_name,
        )
        self.experts = f".{source.family.store_name(experts.path)}." if experts else ""
        self.rows: dict[bytes, tuple[StorageType, np.ndarray]] = {}
        self.widths: set[int] = set()

    def open(self, block: int | None, part: str = "") -> None:
        """Remember the rows of a block, or of a part of it, or (None) of what is outside the blocks, and no others; of a whole
        block not those of its experts."""
        self.rows, self.widths = {}, set()
        if self.weights is None:
            return
        place = self.store_name(f"{self.prefix}{block}.{part}")
        for name, packed in self.weights.packed.items():
            inside = name.startswith(self.prefix)
            if not (name.startswith(place) if block is not None else not inside):
                continue
            if not part and self.experts and self.experts in name:
                continue
            kind = packed.packing.kind  # type: ignore[attr-defined]
            blocks = self.weights.stored.read(f"{name}{END}")
            numbers = dequantise(blocks, kind).numpy()
            self.widths.add(numbers.shape[1])
            self.rows |= {digest(row): (kind, raw) for row, raw in zip(numbers, blocks.numpy(), strict=True)}

    def find(self, matrix: Tensor) -> Found | None:
        """The type and the bytes of a matrix whose rows are stored ones, or zeros."""
        if not self.rows or matrix.ndim != 2:
            return None
        numbers = matrix.float().contiguous().numpy()
        width = numbers.shape[1]
        for kept in sorted((w for w in self.widths if w <= width), reverse=True):
            if numbers[:, kept:].any():
                continue
            if (found := self._match(numbers[:, :kept], width)) is not None:
                return found
        return None

    def _match(self, numbers: np.ndarray, width: int) -> Found | None:
        """Of a matrix whose columns beyond these are zeros, up to `width`."""
        known = [(n, self.rows.get(digest(row))) for n, row in enumerate(numbers) if row.any()]
        kinds = {found[0] for _, found in known if found is not None}
        if len(kinds) != 1 or any(found is None for _, found in known):
            return None
        kind = kinds.pop()
        if not kind.holds(width):
            return None
        out = np.zeros((len(numbers), kind.count(1, width)), dtype=np.uint8)  # blocks of zeros are zero bytes
        for n, found in known:
            if found is not None:
                out[n, : len(found[1])] = found[1]
        return kind, out


def digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row + 0.0).tobytes(), digest_size=16).digest()  # −0 is 0


def name_file_type(kinds: dict[StorageType, int]) -> str:
    """llama.cpp's name of a file by the type that most of its weights have."""
    kind = max(kinds, key=lambda k: kinds[k]).name.upper()
    return f"MOSTLY_{kind}" + ("_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else "")
