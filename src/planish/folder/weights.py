"""The stored tensors of a model: which files they are in, and one tensor at a time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from torch import Tensor

from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.packed.declared import find_declared, find_dtype
from planish.folder.packed.reader import PackedWeights
from planish.folder.recognise import describe_files, refuse_adapter
from planish.folder.safetensors import Shard
from planish.folder.stored import Stored, Weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder or file, whatever they are stored as. A further format is recognised here."""
    if is_gguf(folder):
        return open_gguf(folder)
    declared = find_declared(folder)
    return PackedWeights(Shards(folder), declared, find_dtype(folder), folder) if declared else Shards(folder)


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
        return self._shard(name).read_rows(name, first, count)

    def expect(self, names: Iterable[str]) -> None:
        ahead: dict[Path, list[str]] = {}
        for name in names:
            ahead.setdefault(self.files[name], []).append(name)
        for stored in ahead.values():
            self._shard(stored[0]).expect(stored)

    def origin(self) -> None:
        return None

    def _shard(self, name: str) -> Shard:
        path = self.files[name]
        if path not in self._opened:
            self._opened[path] = Shard(path)
        return self._opened[path]


def index_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → file, by the rules of `from_pretrained`: the file that config.json names as `transformers_weights`, else
    model.safetensors, else the shards of model.safetensors.index.json.

    Shards must be plain file names inside the folder; the files themselves may be links to anywhere.
    """
    refuse_adapter(folder)
    single, index = folder / SINGLE, folder / INDEX
    if named := read_named(folder):
        return read_index(named) if named.name.endswith(".index.json") else list_single(named)
    if single.is_file():
        if index.is_file() and is_complete(index):
            warnings.warn(
                f"{folder} holds two sets of weights: {SINGLE}, which is read (as transformers does), and the shards of "
                f"{INDEX}, which are not",
                stacklevel=2,
            )
        return list_single(single)
    for path in (single, index):
        if path.is_symlink() and not path.is_file():
            raise InputError(f"{path} is a link to {path.readlink()}, which is not there")
    if index.is_file():
        return read_index(index)
    what = describe_files([p.name for p in folder.iterdir()])
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}" + (f": it holds {what}" if what else ""))


def list_single(path: Path) -> dict[str, Path]:
    return dict.fromkeys(Shard(path).entries, path)


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name → shard."""
    folder, items = index.parent, read_names(index)
    for shard in sorted(set(items.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            raise InputError(f"{index} names the shard {shard!r}: not a plain .safetensors file name")
        path = folder / shard
        if not path.is_file():
            where = f": it is a link to {path.readlink()}" if path.is_symlink() else ""
            raise InputError(f"shard {shard} is missing in {folder}{where}: download it again")
    return {name: folder / shard for name, shard in items.items()}


def read_names(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(k): str(v) for k, v in mapping.items()}
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise InputError(f"cannot read {index}: {error!r}") from None


def is_complete(index: Path) -> bool:
    """Whether an index and all its shards are there."""
    try:
        return bool(read_index(index))
    except InputError:
        return False


def read_named(folder: Path) -> Path | None:
    """The file of weights that config.json names, if it does."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (ValueError, AttributeError, OSError):
        return None
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise InputError(f"{folder}/config.json names the weights {name!r}: not a plain .safetensors file name")
    if not (folder / name).is_file():
        raise InputError(f"{folder}/config.json names the weights {name}, which are not there")
    return folder / name
