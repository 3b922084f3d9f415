"""Checkpoints in low precision of which nothing but whole experts goes: what stays is written as it is stored, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.core import ExpertShape
from planish.folder.model_folder import match_names
from planish.folder.packed.declared import FIELDS, MODELOPT, read_raw
from planish.folder.packed.reader import FLOATS, PackedWeights
from planish.folder.safetensors import Later, make_header
from planish.folder.source import FolderSource, Source
from planish.folder.stored import Stored, Weights
from planish.modelling.families import ExpertsRow

PATTERN = re.compile(r"experts\W*[\d\[]")  # a name, or an expression for names, with numbers of experts
GONE = "\0"  # in place of a listed module that is not there any more


class Place(NamedTuple):
    """Of a stored tensor of a block: its name there. `expert`: of one expert; `first`: its first axis counts experts."""

    inside: str
    expert: int | None = None
    first: bool = False


@dataclass(frozen=True)
class Released:
    """The stored tensors of a packed checkpoint under the names that they have in a folder with fewer experts.

    `places`: block → stored name → place; `outside`: the stored names of everything else. Scales of activations and caches,
    which engines use, are among them.
    """

    source: FolderSource
    stored: Weights
    places: Mapping[int, Mapping[str, Place]]
    outside: Sequence[str]

    @property
    def size(self) -> int:
        """Bytes of the checkpoint's files."""
        return sum(path.stat().st_size for path in self.stored.paths)

    def describe(self) -> str:
        weights = self.source.reader.weights
        assert isinstance(weights, PackedWeights)
        return f"Only whole experts go: what stays is written as it was released, in {weights.declared.name}, byte for byte."

    def block(self, i: int, at: int, kept: Sequence[int]) -> dict[str, Tensor | Later]:
        """Block i as block `at`, of its experts those in `kept`, in that order."""
        family, found = self.source.family, dict[str, Tensor | Later]()
        new = {old: number for number, old in enumerate(kept)}
        for name, place in self.places[i].items():
            inside = place.inside
            if place.expert is not None:
                if place.expert not in new:
                    continue
                inside = move_expert(inside, self._path, new[place.expert])
            found[family.store_name(f"{family.blocks}.{at}.{inside}")] = self._later(
                name, kept if place.first else None
            )
        return found

    def rest(self) -> dict[str, Tensor | Later]:
        """What is in no block."""
        return {name: self._later(name) for name in self.outside}

    def count_bytes(self, kept: Mapping[int, int]) -> int:
        """Bytes of the files, headers included, with the first so many experts of each block."""
        total = 0
        for tensors in (self.rest(), *(self.block(i, i, range(kept.get(i, 0))) for i in self.places)):
            total += 8 + len(make_header(tensors)[0]) + sum(t.numel() * t.element_size() for t in tensors.values())
        return total

    def declare(self, kept: Mapping[int, Sequence[int]]) -> tuple[dict[str, Any], dict[str, str]]:
        """(What config.json says of how weights are stored, further files by name), with the experts' new numbers."""
        raw = read_raw(self.source.folder)
        fields = {n: self._renumber(raw[n], kept) for n in FIELDS if n in raw}
        other = read_raw(self.source.folder, MODELOPT)
        return fields, {MODELOPT: json.dumps(self._renumber(other, kept), indent=2) + "\n"} if other else {}

    @property
    def _path(self) -> str:
        row = self.source.family.experts
        assert row is not None
        return row.path

    def _later(self, name: str, kept: Sequence[int] | None = None) -> Later:
        entry = self.stored.entry(name)
        shape = tuple(entry.shape)
        if kept is None:
            return Later(entry.dtype, shape, lambda: (self.stored.read(name),))
        rows = partial(take_matrices, self.stored, name, shape, tuple(kept))
        return Later(entry.dtype, (len(kept), *shape[1:]), rows)

    def _renumber(self, value: Any, kept: Mapping[int, Sequence[int]]) -> Any:
        """A declaration in which modules of experts have their new numbers, and those that went are not listed."""
        if isinstance(value, dict):
            items = {self._renumber(k, kept): self._renumber(v, kept) for k, v in value.items()}
            return {k: v for k, v in items.items() if k != GONE}
        if isinstance(value, list):
            return [v for v in (self._renumber(v, kept) for v in value) if v != GONE]
        if not isinstance(value, str):
            return value
        family, found = self.source.family, match_expert(self.source, value)
        if found is None:
            return value
        i, number = int(found[1]), int(found[2])
        if number not in kept.get(i, ()):
            return GONE
        return family.store_name(f"{family.blocks}.{i}.{self._path}.{kept[i].index(number)}{found[3] or ''}")


def find_released(source: Source) -> Released | None:
    """None where the source is not packed, or stored in a way in which experts do not come apart: then, as anything else, it is
    written in the type that it is read in."""
    if not isinstance(source, FolderSource) or source.reader.tower is not None or source.reader.adapter is not None:
        return None
    weights, row, family = source.reader.weights, source.family.experts, source.family
    if not isinstance(weights, PackedWeights) or weights.declared.name == "ggml" or row is None:
        return None
    raw, other = read_raw(source.folder), read_raw(source.folder, MODELOPT)
    texts = list_texts([raw.get(n) for n in FIELDS] + [other])
    if any(PATTERN.search(text) and not match_expert(source, text) for text in texts):
        return None
    places: dict[int, dict[str, Place]] = {i: {} for i in range(source.n_blocks)}
    outside, shapes = [], [source.shape(i).experts for i in places]
    for name, stored in match_names(weights.stored.names, family).items():
        if name.startswith(source.reader.predictors):
            continue
        if not name.startswith(f"{family.blocks}."):
            outside.append(stored)
            continue
        number, _, inside = name.removeprefix(f"{family.blocks}.").partition(".")
        if family.store_name(name) != stored or not number.isdecimal() or int(number) not in places:
            return None
        place = find_place(row, shapes[int(number)], inside, weights.stored.entry(stored))
        if place is None:
            return None
        places[int(number)][stored] = place
    return Released(source, weights.stored, places, outside)


def find_place(row: ExpertsRow, experts: ExpertShape | None, inside: str, entry: Stored) -> Place | None:
    """Where a stored tensor of a block with these experts belongs; None where it is not known how it would be cut."""
    if experts is None:
        return Place(inside)
    first = len(entry.shape) > 0 and entry.shape[0] == experts.number
    if inside in row.router:
        return Place(inside, first=True) if first and entry.dtype in FLOATS else None
    if inside.startswith(row.router[0].rpartition(".")[0] + "."):  # a packed router
        return None
    if not inside.startswith(f"{row.path}."):
        return Place(inside)
    number = inside.removeprefix(f"{row.path}.").partition(".")[0]
    if number.isdecimal():
        return Place(inside, int(number)) if int(number) < experts.number else None
    if first:
        return Place(inside, first=True)
    return Place(inside) if prod(entry.shape) == 1 else None


def match_expert(source: FolderSource, name: str) -> re.Match[str] | None:
    """The whole name of a module of an expert, or of the expert: block, number, and what is behind them."""
    family = source.family
    path = "" if family.experts is None else re.escape(family.experts.path)
    return re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.{path}\.(\d+)(\.[\w.]*)?", family.read_name(name))


def move_expert(inside: str, path: str, number: int) -> str:
    """A name inside a block with another number of the expert."""
    return f"{path}.{number}.{inside.removeprefix(f'{path}.').partition('.')[2]}"


def take_matrices(stored: Weights, name: str, shape: Sequence[int], kept: Sequence[int]) -> Iterator[Tensor]:
    """Of a tensor whose first axis counts matrices or numbers these, one after the other."""
    if len(shape) == 1:
        yield stored.read(name)[torch.tensor(kept)]
        return
    rows = prod(shape[1:-1])
    for number in kept:
        yield stored.read_rows(name, number * rows, rows)


def list_texts(value: Any) -> list[str]:
    """All texts of a JSON value, keys among them."""
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in list_texts(part)]
    if isinstance(value, list):
        return [t for part in value for t in list_texts(part)]
    return [value] if isinstance(value, str) else []
