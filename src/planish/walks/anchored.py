"""Weights that are about to be rounded, fitted to the inputs that the rounded blocks before them give.

    W x̂  →  (1 − a) W x̂ + a W x        x̂: inputs behind rounded blocks; x: behind the same blocks unrounded

so that a block takes back some of what rounding the blocks before it did. W becomes W K, its regression on x̂
(`planish.solvers.linalg.anchor`); of two factors and of a pivoted linear the one that reads the inputs.

Reference: GPTAQ (arXiv 2504.02692), which has a = 1 and fits while it rounds, a column at a time. Differs from it: a share of the
way, as `auto` does; fitted before rounding, so that every basis, order of columns and type is chosen for what is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from planish.calibrate.beside import measure_beside
from planish.calibrate.stream import Hidden, Stream
from planish.rounding.gauges_linears import find_matrices, fits, read_linear, write_linear
from planish.rounding.round import DAMPING
from planish.solvers.linalg import anchor

SHARE = 0.25  # of the unrounded inputs' results


@torch.no_grad()
def anchor_block(
    stream: Stream,
    i: int,
    block: nn.Module,
    grams: Mapping[str, Tensor],
    hidden: Hidden,
    beside: Hidden,
    leave: Callable[[str, Tensor], bool],
) -> Hidden:
    """Fit block i's linears, in place, for the inputs that `hidden` gives to what `beside` gave; what the block made of `beside`.

    `grams`: E[x̂ x̂ᵀ] by the linear's name, of those that are to be fitted. `leave` (name of a matrix, it): whether it stays.
    """  # fmt: skip
    moved, after = measure_beside(stream, i, block, [*grams], hidden, beside)
    tokens = max(sum(h.shape[0] * h.shape[1] for h in hidden), 1)
    maps: dict[int, Tensor] = {}
    for name in moved:
        module = block.get_submodule(name)
        linear, parts = read_linear(module), find_matrices(module)
        if linear is None or parts is None or leave(f"{name}.{parts['right']}", linear.right):
            continue
        gram = grams[name]
        if id(gram) not in maps:
            maps[id(gram)] = anchor(gram, moved[name] / tokens, SHARE, DAMPING)
        fitted = replace(linear, right=linear.right @ maps[id(gram)])
        if fits(fitted, next(module.parameters()).dtype):
            write_linear(module, fitted)
    return after
