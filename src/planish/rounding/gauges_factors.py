"""Both factors of a low-rank linear rounded, the second solved again for the first one as it was rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from planish.rounding.gauges_linears import Linear
from planish.rounding.round import Metric, Rounded
from planish.solvers.linalg import root

RIDGES = (1e-3, 1e-2)  # relative to the mean diagonal
Round = Callable[[str, Tensor, Metric], Rounded]  # part ("right", "left"), matrix (out, in), its metric


def refit(first: Tensor, target: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """C (out, r) with the least E‖(W − C Â) x‖² + λ ‖C‖²: W R Âᵀ (Â R Âᵀ + λI)⁻¹, λ = ridge · mean diag Â R Âᵀ.

    `first` Â (r, in), `target` W (out, in), `gram` R (in, in). Takes back what of Â's rounding error can be told from Â x: most
    of it, where few directions hold most of R. The ridge keeps C short where Â x hardly varies, and rounding C cheap.
    """
    seen = first @ gram
    return torch.cholesky_solve(seen @ target.T, root(seen @ first.T, ridge)).T


def pull_back(gradient: Tensor | None, linear: Linear) -> Tensor | None:
    """Jᵀ G J (r, r): what errors of `right`'s outputs cost, whatever multiplies these included."""
    behind = linear.behind()
    if gradient is None:
        return None if behind is None else behind.T @ behind
    if behind is None:
        return gradient
    return behind.T @ (gradient[:, None] * behind if gradient.ndim == 1 else gradient @ behind)


def round_linear(linear: Linear, metric: Metric, rounding: Round) -> tuple[dict[str, Rounded], float]:
    """Every matrix of a linear rounded, by part, and what their errors cost together: tr(G E R Eᵀ), W = J right.

    First `right` (A, P, the dense one) in its own metric; then `left` (B, C) for the inputs that it then has, as it is and solved
    again, whichever costs least. A pivoted linear's rows C P x carry P's error times C, whose squares add up to 19 to 78 for
    a pivot row in the linears that were looked at; most of that is taken back here. Nats are split: to `left` what its own
    rounding costs, the rest to `right`.
    """
    first = rounding("right", linear.right, Metric(metric.moment, pull_back(metric.gradient, linear)))
    if linear.left is None or linear.left.ndim == 3:
        cost = 2 * first.nats if first.nats is not None and linear.behind() is None else None
        if cost is None:
            cost = metric.cost(replace(linear, right=first.value.double()).dense() - linear.dense())
        return {"right": replace(first, nats=None if metric.gradient is None else cost / 2)}, cost
    whole, value, gram = linear.dense(), first.value.double(), metric.moment
    assert gram is not None
    moved = value @ gram @ value.T
    at = torch.arange(len(whole)) if linear.order is None else linear.order.long().argsort()[len(value) :]
    gradient = metric.gradient
    own = gradient if gradient is None else gradient[at] if gradient.ndim == 1 else gradient[at][:, at]
    seconds = [linear.left]
    if not first.exact:
        seconds += [refit(value, whole[at], gram, ridge) for ridge in RIDGES]
    best, least = {"right": first}, float("inf")
    for second in seconds:
        found = rounding("left", second, Metric(moved, own))
        error = replace(linear, right=value, left=found.value.double()).dense() - whole
        if not (cost := metric.cost(error)) >= least:
            best, least = {"right": first, "left": found}, cost
    left = best["left"].nats
    best["right"] = replace(first, nats=None if left is None else least / 2 - left)
    return best, least
