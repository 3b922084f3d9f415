"""What a method has decided: its ranks, and how they are to be solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import nn

from planish.core import Edit, Frontier, Plan, Solver, Unit
from planish.modelling.blocks import Spec

Emit = Callable[[int, nn.Module, Spec, dict[str, float]], None]  # a finished block: its spec, predicted loss per unit


@dataclass(frozen=True)
class Planned:
    """A plan, and everything that `planish.walks.solve` and the manifest need to know beside it.

    `prefix`, `stages`, `refit_share`: see `planish.methods.method.Method`.
    """

    ranks: Plan
    solvers: Mapping[Unit, Solver]  # units of the problem → what cuts them
    prefix: str = "dense"
    stages: Callable[[list[Unit]], list[list[Unit]]] = lambda units: [units]
    refit_share: float = 1.0
    edits: Mapping[int, Sequence[Edit]] = field(default_factory=dict)  # per block: worked out already, not solved again
    frontiers: Mapping[Unit, Frontier] = field(default_factory=dict)  # that the ranks were chosen by
    make: Callable[[Emit], None] | None = None  # makes all blocks itself, where they are not made of units
    keep: float | None = None  # what a sparsity that was asked for in place of budgets amounts to
    removed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # submodules by kind
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method, those that planning settled
    remarks: Mapping[str, str] = field(
        default_factory=dict
    )  # said to the user and recorded: what could not be cut, and why
    notes: Mapping[str, Any] = field(default_factory=dict)  # recorded in the manifest for people; no code reads them

    def refit(self, n: int) -> int:
        """How many of n calibration windows the solve runs."""
        return n if self.prefix == "dense" else count_refit(n, self.refit_share)


def count_refit(n: int, share: float) -> int:
    """How many of n calibration windows are run where this share of them is."""
    return min(n, max(1, ceil(share * n)))
