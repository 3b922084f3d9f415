"""Linears of a block that a file stores as one matrix, or that have one type."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from planish.modelling.canonical import list_fused
from planish.modelling.families import Family
from planish.modelling.modules import Fused
from planish.rounding.round import Metric, Rounded


class Joined(NamedTuple):
    """A fused linear that is stored as one matrix: its name in the file, its parts' in the block, and their rows, one after the
    other, as it has them. Or (`experts`) the same linear of all experts, which have one type and are stored apart."""

    name: str
    parts: list[str]
    order: Tensor
    experts: bool = False

    @property
    def rows(self) -> int:
        return len(self.order)


def find_joined(block: nn.Module, family: Family, prefix: str) -> list[Joined]:
    """Linears that a canonical block's family lays out in another way, where all parts are dense."""
    found = []
    for row in list_fused(block, family):
        module = block.get_submodule(row.path)
        if isinstance(module, Fused) and all(type(m) is nn.Linear for m in module.children()):
            sizes = [len(getattr(module, r).weight) for r in row.roles]
            order = module.rows.join(torch.arange(sum(sizes)).split(sizes))
            found.append(Joined(f"{prefix}{row.path}.weight", [f"{row.path}.{r}.weight" for r in row.roles], order))
    return found


def stack_experts(block: nn.Module, own: list[str], prefix: str) -> Joined:
    """The same linear of all experts, which a file may hold as one tensor: they get one type."""
    rows = sum(len(block.get_submodule(n).weight) for n in own)  # type: ignore[arg-type]
    first, _, name = own[0].rpartition(".")
    return Joined(f"{prefix}{first.rpartition('.')[0]}.{name}", [f"{n}.weight" for n in own], torch.arange(rows), True)


Rounding = Callable[
    [str, Tensor, Metric, "Joined | None"], Rounded
]  # name in the file, (out, in), and what it is a part of
