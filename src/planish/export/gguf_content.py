"""What a GGUF file holds, before its types are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from planish.export.gguf_blocks import StoredRows

XIELU = "xielu."  # metadata whose name has no graph before it


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, a tensor of three axes in the file, of which one is in memory at a time."""

    count: int
    shape: tuple[int, int]
    matrices: Iterator[Tensor]


@dataclass(frozen=True)
class Content:
    """`values`: metadata, its names without the graph's; `tensors`: names and numbers, to be asked for once; `back`: weights
    that multiplying low-rank forms costs; `notes`: for the report."""

    graph: str
    values: dict[str, Any]
    tensors: Callable[[StoredRows], Iterator[tuple[str, Tensor | Stack]]]
    back: int
    notes: list[str] = field(default_factory=list)
