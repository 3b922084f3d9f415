"""What every matrix of a model costs in every type that it may have, and what is remembered of that.

Prices hang on the model, the text and the types, on no mean and no size: those of a model of which nothing is cut are kept beside
its statistics, within a run and on disk, for the next mean and the next size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from planish.calibrate.cache import Cache
from planish.calibrate.stream import Hidden, Stream, return_memory
from planish.calibrate.text import fingerprint
from planish.core import Progress
from planish.plan.types import Offer
from planish.rounding.prices import price
from planish.rounding.round import Draft, Metric, Rounded
from planish.walks.bits import Asked
from planish.walks.joined import Joined, Rounding


class Walk(Protocol):
    """What goes through a model's blocks (`planish.walks.quantise.Quantiser`)."""

    asked: Asked
    stream: Stream
    reads: torch.dtype

    def visit(
        self, i: int, hidden: Hidden, moments: Mapping[str, Tensor], rounding: Rounding
    ) -> tuple[nn.Module, object, object]: ...


def price_types(
    walk: Walk, gradients: Sequence[Mapping[str, Tensor]], known: Cache | None, progress: Progress | None
) -> dict[str, list[Offer]]:
    """What every matrix costs in every type that it may have, by its name in the file: rounded, each as if it were alone.

    `known`: remembers it, where the model is the one whose statistics it holds.
    """
    blocks, head = walk.asked.blocks, walk.asked.head
    record = f"prices|{blocks.target}|{head.name if head else None}|{fingerprint(torch.cat(walk.stream.batches))}"
    if known is not None and known.has([record]):
        return {name: read_offers(walk, name, row) for name, row in known.get(record).items()}
    offers: dict[str, list[Offer]] = {}
    hidden = walk.stream.start()
    for i in range(len(walk.stream)):

        def look(name: str, weight: Tensor, metric: Metric, whole: Joined | None) -> Rounded:
            rows, own = (whole.rows, whole.name) if whole else (len(weight), name)
            kinds = blocks.ladder(weight.shape[1], name, rows)
            return_memory(weight.numel())
            nats = price(weight, kinds, metric, name, walk.reads)
            before = offers.get(own, [Offer(k, rows, weight.shape[1], 0.0) for k in kinds])
            offers[own] = [o._replace(nats=o.nats + n) for o, n in zip(before, nats, strict=True)]
            same = Draft(weight.to(walk.stream.dtype))  # of which all come, so that nothing changes
            return Rounded(kinds[-1], same, "exact", 0.0, True, 0.0)

        block, _, _ = walk.visit(i, hidden, gradients[i], look)
        hidden = walk.stream.run(i, block, hidden)
        if progress:
            progress("types", i + 1, len(walk.stream))
    if known is not None:
        known.keep({record: {name: write_offers(found) for name, found in offers.items()}})
    return offers


def write_offers(found: Sequence[Offer]) -> Tensor:
    """A matrix's shape and nats (2 + types,), fp64."""
    return torch.tensor([found[0].out, found[0].n, *(o.nats for o in found)], dtype=torch.float64)


def read_offers(walk: Walk, name: str, row: Tensor) -> list[Offer]:
    """What `write_offers` made."""
    (out, n), nats = map(int, row[:2]), row[2:].tolist()
    kinds = walk.asked.blocks.ladder(n, name, out)
    return [Offer(k, out, n, value) for k, value in zip(kinds, nats, strict=True)]
