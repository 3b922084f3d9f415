"""A model's folder, dense or compressed, read tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError
from planish.folder.adapter import Adapter
from planish.folder.config import is_compressed, load_config, open_config, read_layout
from planish.folder.hub import find_folder
from planish.folder.stored import Stored, Weights
from planish.folder.towers import Tower, Untouched, open_tower
from planish.folder.weights import open_weights
from planish.modelling.experts import StackedRows
from planish.modelling.families import ExpertsRow, Family
from planish.modelling.wrappers import PREFIXES
from planish.stats import is_finite


class ModelFolder:
    """What all readers of model folders stand on: `Stream` (through `planish.folder.source`), exporters, EoRA, counts.

    `names` are the tensors' names in the causal LM, whatever they are stored as; of each `dtype` and `shape` are known from
    headers, and `tensor` reads it. `config`, `family` and `specs` say what the tensors are: one spec per block, empty where
    the block is a stock one. `path` is the folder or the GGUF file, `name` what the user called
    it. A hub id is read as far as it is needed: its configuration at once, its weights with the first question about them.
    `adapter`: a LoRA adapter that is merged as tensors are read. `left_out`: stored tensors of next-token prediction layers,
    which no causal LM of transformers runs; names of theirs begin with one of `predictors`. Of a language model inside a wrapper
    names are those that it would have alone, and `untouched` is everything else.

    Formats of weights plug in below this class, at `planish.folder.weights.open_weights`.
    """

    def __init__(self, model: str | Path, adapter: str | Path | None = None):
        self.path, self.name = find_folder(model, weights=False), str(model)
        self.remote = not Path(model).exists()  # weights on the hub are fetched when the first is asked for
        self.config, self._wrapped = open_config(load_config(self.path))
        self.compressed = is_compressed(self.config)
        self.family, self.specs = read_layout(self.config)
        self.adapter = None if adapter is None else Adapter(adapter)
        changed = [*self.adapter.deltas, *self.adapter.replaced] if self.adapter else []
        self._changed = {
            name_adapted(n, self.family, self._wrapped is not None): n for n in changed
        }  # name → what the adapter calls it
        first, more = self.config.num_hidden_layers, getattr(self.config, "num_nextn_predict_layers", None) or 0
        self.predictors = tuple(f"{self.family.blocks}.{i}." for i in range(first, first + more)) + (
            "mtp.",
            "model.mtp.",
        )
        if more:
            self.config.num_nextn_predict_layers = 0  # of what is written

    @cached_property
    def weights(self) -> Weights:
        return open_weights(find_folder(self.name) if self.remote else self.path)

    @cached_property
    def tower(self) -> Tower | None:
        """What the language model is in, and what the checkpoint calls its tensors there."""
        if self._wrapped is None:
            return None
        where, wrapped = str(self.path), self._wrapped
        return open_tower(wrapped.wrapper, wrapped.config, self.family.blocks, self.weights.names, where)

    @property
    def untouched(self) -> Untouched:
        """What is no language model's."""
        names = (n for n in self.weights.names if self.tower and self.tower.read_name(n) is None)
        entries = {n: self.weights.entry(n) for n in names}
        return Untouched({n: (math.prod(e.shape), e.dtype) for n, e in entries.items()}, self.weights.read)

    @cached_property
    def _places(self) -> tuple[dict[str, str], dict[str, Part]]:
        """Name → stored name; name → part of the stored tensor, where it is one."""
        if self.tower is None:
            names = match_names(self.weights.names, self.family, self.compressed)
        else:
            inside = {n: self.tower.read_name(n) for n in self.weights.names}
            names = {self.family.read_name(name): n for n, name in inside.items() if name is not None}
        for name in [n for n in names if n.startswith(self.predictors)]:
            self.left_out.append(names.pop(name))
        return names, split_experts(names, self.family, self.weights.entry, None if self.compressed else self.config)

    @cached_property
    def left_out(self) -> list[str]:
        return []

    @property
    def names(self) -> list[str]:
        return list(self._places[0])

    def __contains__(self, name: str) -> bool:
        return name in self._places[0]

    @property
    def paths(self) -> list[Path]:
        """The files that hold the tensors."""
        return self.weights.paths + (self.adapter.paths if self.adapter else [])

    def entry(self, name: str) -> Stored:
        """`dtype` and `shape` of a tensor, from headers alone."""
        entry, part = self.weights.entry(self._find(name)), self._places[1].get(name)
        if part is None:
            return entry
        rows = torch.empty(part.height, entry.shape[-1], device="meta")
        return Taken(entry.dtype, tuple(part.take(rows).shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored type, on the CPU; every number is finite."""
        stored, part = self._find(name), self._places[1].get(name)
        if part is None:
            tensor = self.weights.read(stored)
        else:
            tensor = part.read(partial(self.weights.read_rows, stored))
        if self.adapter and name in self._changed:
            tensor = self.adapter.merge(self._changed[name], tensor, self._transposed(name))
        if not is_finite(tensor):
            raise InputError(f"tensor {name} of {self.path} holds NaN or infinity")
        return tensor

    def leave_out_zeros(self, asked: Collection[str]) -> None:
        """Leave out biases of packed weights that the model has none of, where all are zero: writers of GPTQ store them anyway."""
        for name in [n for n in self.names if n.endswith(".bias") and n not in asked] if self.weights.origin() else []:
            if not bool(self.weights.read(self._find(name)).any()):
                del self._places[0][name]

    def check_adapter(self, tied: Iterable[str]) -> None:
        """InputError for an adapter that does not fit the model's tensors, or changes one of the `tied` names."""
        if self.adapter:
            shapes = {own: self.entry(n).shape for n, own in self._changed.items() if n in self}
            ours = {own for n, own in self._changed.items() if n in set(tied)}
            self.adapter.fit(shapes, {own: self._transposed(n) for n, own in self._changed.items()}, ours)

    def _transposed(self, name: str) -> bool:
        """Whether a linear is stored transposed."""
        return self.family.conv1d and name.startswith(f"{self.family.blocks}.")

    def expect(self, names: Iterable[str]) -> None:
        """These tensors are read next: the system may fetch them ahead."""
        self.weights.expect(dict.fromkeys(self._places[0][n] for n in names))

    def inside(self, i: int) -> list[str]:
        """Names of block i's tensors."""
        prefix = f"{self.family.blocks}.{i}."
        return [n for n in self._places[0] if n.startswith(prefix)]

    def _find(self, name: str) -> str:
        if name not in self._places[0]:
            raise InputError(f"tensor {name} is missing in {self.path}: the checkpoint is incomplete")
        return self._places[0][name]


class Taken(NamedTuple):
    """Part of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Part(NamedTuple):
    """One linear's weight or bias in a stack of many experts': of what `height` rows of the stored tensor as a matrix, from the
    `first`, hold of one expert, the `number`-th of `several`, laid out as `rows`. `vector`: of biases."""

    first: int
    height: int
    rows: StackedRows = StackedRows()
    number: int = 0
    several: int = 1
    vector: bool = False

    def read(self, rows: Callable[[int, int], Tensor]) -> Tensor:
        """The same of what `rows` (first, count) gives."""
        return self.take(rows(self.first, self.height))

    def take(self, matrix: Tensor) -> Tensor:
        """(height, columns) as they are stored → (out, in), or (out,)."""
        return self.rows.split(matrix[0] if self.vector else matrix, self.several)[self.number].contiguous()


def split_experts(
    names: dict[str, str], family: Family, entry: Callable[[str], Stored], config: Any = None
) -> dict[str, Part]:
    """Where experts are stored stacked: name of each of their linears' tensors → which part it is of its stored tensor.
    In `names` (name → stored name) these take the place of the whole. Stacks have the shapes that `config` asks for."""
    found: dict[str, Part] = {}
    row = family.experts
    if row is None:
        return found
    for name, stored in list(names.items()):
        where, _, leaf = name.rpartition(".")
        parts = row.stacks.get(leaf.removesuffix("_bias"), ())
        if not parts or not where.endswith(f".{row.path}"):
            continue
        shape, vector = tuple(entry(stored).shape), leaf.endswith("_bias")
        check_stack(stored, shape, row, parts, vector, config)
        del names[name]
        for number in range(shape[0]):
            for part, own in zip(parts, lay_parts(shape, number, row, len(parts)), strict=True):
                inside = f"{where}.{number}.{part}.{'bias' if vector else 'weight'}"
                names[inside], found[inside] = stored, own
    return found


def check_stack(
    stored: str, shape: tuple[int, ...], row: ExpertsRow, parts: Sequence[str], vector: bool, config: Any
) -> None:
    """InputError for stacked experts of another layout."""
    several, axes = len(parts), ("experts", "rows") if vector else ("experts", "rows", "columns")
    if len(shape) != len(axes) or shape[-1 if row.transposed else 1] % several:
        raise InputError(f"tensor {stored} has shape {shape}, expected ({', '.join(axes)}) of stacked experts")
    if config is None:
        return
    width, hidden = getattr(config, row.width), row.reads(config)
    out, n = (hidden, width) if parts == row.names[2:] else (several * width, hidden)
    asked = (getattr(config, row.count), *((out,) if vector else (n, out) if row.transposed else (out, n)))
    if shape != asked:
        raise InputError(f"tensor {stored} has shape {shape}, expected {asked} from config.json")


def lay_parts(shape: Sequence[int], number: int, row: ExpertsRow, several: int) -> list[Part]:
    """Where the tensors of an expert's linears are in a stack of this shape; of one that holds them one after the other, their
    rows alone."""
    if len(shape) == 2:
        return [Part(number, 1, StackedRows.of(row), n, several, True) for n in range(several)]
    if row.transposed or row.alternating:
        return [Part(number * shape[1], shape[1], StackedRows.of(row), n, several) for n in range(several)]
    count = shape[1] // several
    return [Part((number * several + n) * count, count) for n in range(several)]


def name_adapted(name: str, family: Family, wrapped: bool = False) -> str:
    """Name in the causal LM of a weight that an adapter changes: of one that was trained on the base model without its prefix,
    or on what the language model is in."""
    inside = next((p for p in PREFIXES[:-1] if wrapped and name.startswith(p)), None)
    name = name if inside is None else "model." + name.removeprefix(inside)
    first, head = family.blocks.partition(".")[0] + ".", f"{family.head}."
    if name.startswith(head):
        return f"lm_head.{name.removeprefix(head)}"
    return name if name.startswith((first, "lm_head.")) else first + name


def match_names(stored: Iterable[str], family: Family, compressed: bool = False) -> dict[str, str]:
    """Name in the causal LM → stored name. Checkpoints of base models drop the prefix; some families call the head otherwise."""
    first, head = family.blocks.partition(".")[0] + ".", f"{family.head}."
    names = {n: family.read_name(f"lm_head.{n.removeprefix(head)}" if n.startswith(head) else n) for n in stored}
    if not compressed and not any(n.startswith(family.blocks + ".") for n in names.values()):
        names = {n: name if name.startswith("lm_head.") else first + name for n, name in names.items()}
    return {name: n for n, name in names.items()}
