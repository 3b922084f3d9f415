"""What a format of weights offers to those who read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Stored(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Weights(Protocol):
    """What a weight format offers: tensors by the names they are stored under. Nothing stays open or mapped.

    `planish.folder.weights.Shards` is safetensors, `planish.folder.gguf_reader.GGUFWeights` is GGUF, and
    `planish.folder.packed.reader.PackedWeights` reads checkpoints in low precision; another format is another such class,
    chosen in `planish.folder.weights.open_weights`. Errors are InputErrors.
    """

    @property
    def paths(self) -> list[Path]:
        """The files, in a fixed order."""
        ...

    @property
    def names(self) -> Collection[str]: ...

    def entry(self, name: str) -> Stored:
        """Type and shape, from headers alone."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own, on the CPU."""
        ...

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of the tensor as a matrix, whose width is its last axis: of stacked experts one's."""
        ...

    def expect(self, names: Iterable[str]) -> None:
        """These are read next: the system may fetch them ahead."""
        ...

    def origin(self) -> dict[str, Any] | None:
        """What planish.json says about how the model was stored; None where it is read as it is."""
        ...
