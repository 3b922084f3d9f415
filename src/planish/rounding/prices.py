"""What a matrix costs in every type that it may have, for the choice among them: of real roundings, those that move the price.

    every type:   feedback, columns as they are stored, costs in fp32
    integers:     by falling energy too, where that takes a tenth off the smallest type's price

The naive program is `round_matrix` of every type, which tries all of it. On five of SmolLM2's blocks most of these prices are 0 to
10 % above its own; the types chosen were the same at six of seven means, and at the seventh cost 0.02 % more nats by its prices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.rounding.round import (
    DAMPING,
    Metric,
    choose,
    feed_blocks,
    feed_falling,
    feed_groups,
    lies_on,
    round_matrix,
    upper_root,
)
from planish.rounding.types import StorageType

GAIN = 0.9  # of the price, to which the other order of columns takes it at least, or it is not tried again


def price(
    w: Tensor, kinds: Sequence[StorageType], metric: Metric, where: str, read: torch.dtype = torch.float32
) -> list[float]:
    """½ tr(G E R Eᵀ), nats per token, of w (out, in) rounded to each of `kinds`, smallest first; 0 where G is not known.

    Raises InputError as `round_matrix` does.
    """
    moment, wide = metric.moment, w.double()
    plain = moment is None or not float(moment.trace()) > 0
    near, found, falling = w.float(), list[float](), True
    root: Tensor | None = None
    for kind in kinds:
        if moment is None or plain or lies_on(w, kind, where, read):
            found.append(round_matrix(w, kind, metric, where=where, dtype=read).nats or 0.0)
            continue
        root = upper_root(moment, DAMPING) if root is None else root
        drafts = [(feed_groups if kind.kind == "integer" else feed_blocks)(wide, kind, root, read)]
        if kind.kind == "integer" and falling:
            root = None  # the other order has one of its own: of large matrices two are too much
            drafts.append(feed_falling(wide, kind, moment, DAMPING, read))
        few = metric.narrow()
        cost = few.cost(near - drafts[0].value)
        if len(drafts) > 1:
            alone, cost = cost, choose(near, drafts, few)[1]
            falling = cost < GAIN * alone
        found.append(0.0 if metric.gradient is None else cost / 2)
    return found
