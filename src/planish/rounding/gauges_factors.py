"""The second factor of a low-rank linear, solved again for the first one as it was rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from planish.rounding.gauges_linears import Linear
from planish.solvers.linalg import root

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2)  # relative to the mean diagonal; 1e-3 or 1e-2 mostly win
RoundIn = Callable[
    [Tensor, Tensor], Tensor
]  # matrix (out, in), second moments of its inputs (in, in) → its rounded value


def refit(first: Tensor, target: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """C (out, r) with the least E‖(W − C Â) x‖² + λ ‖C‖²: W R Âᵀ (Â R Âᵀ + λI)⁻¹, λ = ridge · mean diag Â R Âᵀ.

    `first` Â (r, in), `target` W (out, in), `gram` R (in, in). Takes back what of Â's rounding error can be told from Â x: most
    of it, where few directions hold most of R. The ridge keeps C short where Â x hardly varies, and rounding C cheap.
    """
    seen = first @ gram
    return torch.cholesky_solve(seen @ target.T, root(seen @ first.T, ridge)).T


def round_factors(linear: Linear, gram: Tensor, rounding: RoundIn) -> Linear:
    """A pair or a pivoted linear rounded: first A or P, then B or C, as it is and solved again; the best in `gram`.

    A pivoted linear's rows C P x carry P's error times C, whose squares add up to 19 to 78 for a pivot row in the linears that
    were looked at; most of that is taken back here.
    """
    assert linear.left is not None and linear.left.ndim == 2
    whole, first = linear.dense(), rounding(linear.right, gram)
    target = whole
    if linear.order is not None:
        target = torch.empty_like(whole).index_copy(0, linear.order.long(), whole)[len(first) :]
    moved = first @ gram @ first.T
    best, least = linear, float("inf")
    for second in (linear.left, *(refit(first, target, gram, ridge) for ridge in RIDGES)):
        found = replace(linear, right=first, left=rounding(second, moved))
        error = found.dense() - whole
        cost = float((error @ gram * error).sum())
        if cost < least:
            best, least = found, cost
    return best
