"""Which inputs of a linear to keep, and what the others take with them. fp64, and damping as in `planish.solvers.linalg`."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.shapes import Float, Int
from planish.solvers.linalg import DAMPING, compute_tails, damp, root, solve, tail_sums
from planish.solvers.offload import offloaded


@offloaded
def selection_losses(
    gram: Float[Tensor, "n n"],
    w: Float[Tensor, "out n"],
    order: Int[Tensor, " n"],
    refit: bool,
    damping: float = DAMPING,
) -> Float[Tensor, " n+1"]:
    """E‖W x − W' x_J‖² when the first r inputs of `order` are kept, for r = 0 … n: (n + 1,).

    Without refit: tr of the dropped columns' block, by a cumulative sum. With refit: the pivot-free Cholesky of the
    reordered Gram gives each further input's explained energy in one factorisation (of the damped Gram: with a large
    damping the loss is that of the damped problem).
    """
    c = gram.double()[order][:, order]
    w = w[:, order].double()
    if not refit:
        return tail_sums((w.T @ w) * c)
    return compute_tails(
        (w @ root(c, damping)).square().sum(0)
    )  # column i: energy that input i adds to those before it


@offloaded
def select_greedily(
    gram: Float[Tensor, "n n"], w: Float[Tensor, "out n"], damping: float = DAMPING, steps: int = 64
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n+1"]]:
    """Order (n,) of the inputs of W (out, n) by forward selection: next come those that lower E‖W x − W' x_J‖² most; and
    that loss (n + 1,) of keeping the first 0 … n, as `selection_losses` gives it for a refit.

    Orthogonal matching pursuit on the damped Gram: each step takes the n / `steps` inputs that alone would explain most of
    what is left, |W C_i|² / C_ii, and conditions W C and C on them (a blocked pivoted Cholesky, in place). Cost: n³ / 3
    products.
    """
    c = damp(gram, damping)
    n, size = len(c), max(1, len(c) // steps)
    unexplained, order, gains = c @ w.double().T, torch.arange(n), []
    for k in range(0, n, size):
        end = min(k + size, n)
        score = unexplained[k:].square().sum(1) / c.diagonal()[k:]
        top = score.argsort(descending=True, stable=True)[: end - k]
        stays = torch.ones(end - k, dtype=torch.bool)
        stays[top[top < end - k]] = False
        source = torch.cat([top, stays.nonzero().flatten()])
        place = torch.cat([torch.arange(end - k), top[top >= end - k]])
        for rows in (c[k:, k:], c[k:, k:].T, unexplained[k:], order[k:]):
            rows[place] = rows[source]
        chosen = c[k:end, k:end]
        factor, failed = torch.linalg.cholesky_ex(chosen)
        factor = root(chosen, 0.0) if failed else factor
        q = torch.linalg.solve_triangular(factor, c[k:end, end:], upper=False)
        explained = torch.linalg.solve_triangular(factor, unexplained[k:end], upper=False)
        gains.append(explained.square().sum(1))
        unexplained[end:].addmm_(q.T, explained, alpha=-1)
        c[end:, end:].addmm_(q.T, q, alpha=-1)
    return order, compute_tails(torch.cat(gains))


@offloaded
def ridge_leverage(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, " n"]:
    """diag(C (C + λI)⁻¹) (n,) with λ = ridge · mean(diag C): 1 − λ · diag((C + λI)⁻¹)."""
    factor = root(gram, ridge)
    level = (factor.square().sum() - gram.double().diagonal().sum()) / gram.shape[0]
    inverse_factor = torch.linalg.solve_triangular(factor, torch.eye(len(gram), dtype=factor.dtype), upper=False)
    return 1 - level * inverse_factor.square().sum(0)


@offloaded
def nystrom(
    gram: Float[Tensor, "n n"], kept: Int[Tensor, " k"], w: Float[Tensor, "out n"], damping: float = DAMPING
) -> Float[Tensor, "out k"]:
    """W' (out, k) minimising ‖(W − W' x_kept)‖ over the inputs: W C[:, J] (C[J, J] + λI)⁻¹. `kept` (k,) indices."""
    gram = gram.double()
    return solve(gram[kept][:, kept], gram[kept] @ w.double().T, damping).T
