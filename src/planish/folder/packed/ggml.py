"""quant_method ggml: weights in blocks of llama.cpp, as planish writes them for its GGUF files; vectors as they are.

`types`: name of a module → type of its weight, whose blocks are stored as rows of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from planish.folder.packed.packing import Declared, Known, Packing, Rows
from planish.rounding.ggml import dequantise
from planish.rounding.types import GGML, StorageType

END = "_ggml"  # behind the weight's own name


class Blocks(Packing):
    needed = {"blocks": END}

    def __init__(self, kind: StorageType):
        self.kind = kind

    def describe(self) -> str:
        return self.kind.name

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        dtype, shape = parts["blocks"].dtype, parts["blocks"].shape
        if dtype != torch.uint8 or len(shape) != 2 or shape[1] % int(self.kind.size):
            raise ValueError(f"is stored as {dtype} of shape {shape}, expected rows of {self.kind.size}-byte blocks")
        return shape[0], shape[1] // int(self.kind.size) * self.kind.group

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        blocks = parts["blocks"]
        return lambda first, count: dequantise(blocks[first : first + count], self.kind)


class Ggml(Declared):
    """`types`: module → type."""

    name = "ggml"
    marks = {f".weight{END}": END}

    def __init__(self, config: Mapping[str, Any]):
        types = config.get("types")
        if not isinstance(types, dict) or not types:
            raise ValueError("types is missing")
        unknown = [t for t in types.values() if t not in GGML]
        if unknown:
            raise ValueError(f"the type {unknown[0]!r} is not known; expected one of {', '.join(GGML)}")
        self.types = {str(n): GGML[t] for n, t in types.items()}

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        module = stem.removesuffix(".weight")
        if module not in self.types:
            raise ValueError("is stored in blocks, and types does not name it")
        return Blocks(self.types[module])
