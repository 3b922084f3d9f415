"""The stored tensors of a model: which files they are in, and one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.safetensors import Shard


class Stored(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Weights(Protocol):
    """What a weight format offers: tensors by the names they are stored under. Nothing stays open or mapped.

    `Shards` is safetensors, `planish.folder.gguf_reader.GGUFWeights` is GGUF; another format is another such class, chosen
    in `open_weights`. Errors are InputErrors.
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


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder or file, whatever they are stored as. A further format is recognised here."""
    return open_gguf(folder) if is_gguf(folder) else Shards(folder)


class Shards:
    """Safetensors, sharded or not."""

    def __init__(self, folder: Path):
        self.files = index_tensors(folder)
        self._opened: dict[Path, Shard] = {}

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self.files.values()))

    @property
    def names(self) -> Collection[str]:
        return self.files.keys()

    def entry(self, name: str) -> Stored:
        return self._shard(name).entry(name)

    def read(self, name: str) -> Tensor:
        return self._shard(name).read(name)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        return self._shard(name).read(name, (first, count))

    def expect(self, names: Iterable[str]) -> None:
        ahead: dict[Path, list[str]] = {}
        for name in names:
            ahead.setdefault(self.files[name], []).append(name)
        for stored in ahead.values():
            self._shard(stored[0]).expect(stored)

    def _shard(self, name: str) -> Shard:
        path = self.files[name]
        if path not in self._opened:
            self._opened[path] = Shard(path)
        return self._opened[path]


def index_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → shard. Shard names must be plain file names inside the folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            items = {str(k): str(v) for k, v in mapping.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"cannot read {index}: {error!r}") from None
        for shard in sorted(set(items.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
                raise InputError(f"{index} names the shard {shard!r}: not a plain .safetensors file name")
            check_inside(folder, folder / shard)
            if not (folder / shard).is_file():
                raise InputError(f"shard {shard} is missing in {folder}: download it again")
        return {name: folder / shard for name, shard in items.items()}
    if not single.is_file():
        others = [p.name for p in folder.glob("*.bin")]
        hint = f" (found {others[0]}: only safetensors are read, never pickles; convert it first)" if others else ""
        raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
    check_inside(folder, single)
    return dict.fromkeys(Shard(single).entries, single)


def check_inside(folder: Path, file: Path) -> None:
    """A model's files lie in its folder, or in the hub cache's own store beside it."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot follow {file}: {error}") from None
    if not target.is_relative_to(home) and not target.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(f"{file} is a link to {target}, outside the model's folder: copy the file there")
