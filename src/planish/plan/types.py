"""A storage type for every matrix: the least sum of nats within a mean of bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from planish.calibrate.linears import list_linears
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import FolderSource
from planish.modelling.blocks import find_blocks
from planish.plan.allocate import Alternative, Curve, choose
from planish.rounding.types import Choice, StorageType


class Offer(NamedTuple):
    """What a matrix (out, n) costs in a type: bytes, and nats per token."""

    kind: StorageType
    out: int
    n: int
    nats: float

    @property
    def bytes(self) -> int:
        return self.kind.count(self.out, self.n)


def choose_types(offers: Mapping[str, list[Offer]], mean: float) -> dict[str, StorageType]:
    """Of every matrix the type, least sum of nats within `mean` bits per weight over all of them."""
    weights = sum(found[0].out * found[0].n for found in offers.values())
    units = {Unit(n, "type"): found for n, found in enumerate(offers.values())}
    curves = [
        Curve(
            unit, torch.arange(len(found)), torch.tensor([float(o.bytes) for o in found]).double(),
            torch.tensor([o.nats for o in found]).double(),
        )
        for unit, found in units.items()
    ]  # fmt: skip
    refuse_mean(mean, weights, sum(min(o.bytes for o in found) for found in offers.values()))
    plan, _ = choose([[Alternative((curve,))] for curve in curves], mean * weights / 8)
    return {name: found[plan[unit]].kind for (unit, found), name in zip(units.items(), offers, strict=True)}


def check_mean(blocks: Choice, source: FolderSource) -> None:
    """InputError, before any matrix is rounded, where the smallest types take more than the mean that is asked for. Experts' are
    left to `choose_types`."""
    if blocks.mean is None or any(source.shape(i).experts for i in range(source.n_blocks)):
        return
    linears = [m for block in find_blocks(source.model, source.family) for m in list_linears(block).values()]
    sizes = [(m.out_features, m.in_features) for m in linears]
    least = sum(blocks.ladder(n, "a matrix", out)[0].count(out, n) for out, n in sizes)
    refuse_mean(blocks.mean, sum(out * n for out, n in sizes), least)


def refuse_mean(mean: float, weights: int, least: int) -> None:
    """InputError where `least` bytes of so many weights are more than the mean."""
    if least > mean * weights / 8:
        raise InputError(
            f"--bits {mean:g}: the smallest types take {8 * least / weights:.3f} bits per weight; give that many, or cut more"
        )
