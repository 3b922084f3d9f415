"""A storage type for every matrix: the least sum of nats within a mean of bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from planish.core import Unit
from planish.errors import InputError
from planish.plan.allocate import Alternative, Curve, choose
from planish.rounding.types import StorageType


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
    least = sum(min(o.bytes for o in found) for found in offers.values())
    if least > mean * weights / 8:
        raise InputError(
            f"--bits {mean:g}: the smallest types take {8 * least / weights:.3f} bits per weight; give that many, or cut more"
        )
    plan, _ = choose([[Alternative((curve,))] for curve in curves], mean * weights / 8)
    return {name: found[plan[unit]].kind for (unit, found), name in zip(units.items(), offers, strict=True)}
