"""Work inside a Gram itself, for Grams of which memory holds one but not two (28,672²: 6.6 GB in fp64).

A Cholesky factor takes the lower triangle; the strict upper triangle keeps the Gram, from which it is restored bit for bit.
Everything else works on stripes of `TILE` columns. Cost n³/3 products, nearly all of them matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from planish.shapes import Float, Int
from planish.solvers.linalg import DAMPING

TILE = 512


def stripes(n: int) -> Iterator[tuple[int, int]]:
    for i in range(0, n, TILE):
        yield i, min(i + TILE, n)


@contextmanager
def factored(gram: Float[Tensor, "n n"], damping: float = DAMPING) -> Iterator[float]:
    """Within the context the lower triangle of `gram` (n, n, fp64) is L with L Lᵀ = gram + λI, as `planish.solvers.linalg.root`
    gives it; afterwards `gram` is as it was. Yields λ.
    """
    diagonal = [gram[i:j, i:j].clone() for i, j in stripes(len(gram))]
    try:
        yield take_root(gram, diagonal, damping)
    finally:
        restore(gram, diagonal)


def take_root(gram: Float[Tensor, "n n"], diagonal: list[Float[Tensor, "_ _"]], damping: float) -> float:
    """L into the lower triangle; λ. The damping is raised tenfold, with a warning, until there is a factor."""
    level = float(gram.diagonal().mean())
    level, raised = level if level > 0 else 1.0, damping
    while not factor(gram, raised * level):
        restore(gram, diagonal)
        raised = max(raised * 10, 1e-12)
        if raised > 1:
            raise ValueError("Gram has no Cholesky factor even with damping 1: it holds NaN or is far from symmetric")
    if raised > damping:
        warnings.warn(f"damping raised from {damping:g} to {raised:g}: Gram is not positive definite", stacklevel=4)
    return raised * level


def factor(a: Float[Tensor, "n n"], level: float) -> bool:
    """L with L Lᵀ = a + level · I into the lower triangle of a symmetric a; False where there is none (a is then spoiled)."""
    a.diagonal().add_(level)
    for i, j in stripes(len(a)):
        if i:
            a[i:, i:j].addmm_(a[i:, :i], a[i:j, :i].T, alpha=-1)
        tile, info = torch.linalg.cholesky_ex(a[i:j, i:j])
        if info or not bool(torch.isfinite(tile).all()):
            return False
        a[i:j, i:j] = tile
        if j < len(a):
            a[j:, i:j] = torch.linalg.solve_triangular(tile.T, a[j:, i:j], upper=True, left=False)
    return True


def restore(a: Float[Tensor, "n n"], diagonal: list[Float[Tensor, "_ _"]]) -> None:
    """Lower triangle from the upper one; `diagonal`: the tiles on the diagonal as they were."""
    for (i, j), tile in zip(stripes(len(a)), diagonal, strict=True):
        a[i:j, i:j] = tile
        a[j:, i:j] = a[i:j, j:].T


def reorder(a: Float[Tensor, "n n"], order: Int[Tensor, " n"]) -> None:
    """a ← a[order][:, order], in place."""
    for i, j in stripes(len(a)):
        a[:, i:j] = a[order, i:j]
    for i, j in stripes(len(a)):
        a[i:j] = a[i:j, order]


def inverse_diagonal(a: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """diag((L Lᵀ)⁻¹) (n,) for L in the lower triangle: squared column norms of L⁻¹, a stripe of it at a time."""
    found = []
    for i, j in stripes(len(a)):
        y = a.new_zeros(len(a) - i, j - i)  # rows i … of L⁻¹'s columns i … j
        y[: j - i].fill_diagonal_(1)
        for p, q in stripes(len(a) - i):
            if p:
                y[p:q].addmm_(a[i + p : i + q, i : i + p], y[:p], alpha=-1)
            y[p:q] = torch.linalg.solve_triangular(a[i + p : i + q, i + p : i + q], y[p:q], upper=False)
        found.append(y.square().sum(0))
    return torch.cat(found)


def times_factor(w: Float[Tensor, "out n"], a: Float[Tensor, "n n"]) -> Float[Tensor, "out n"]:
    """W ← W L (out, n), in place, for L in the lower triangle of a."""
    for i, j in stripes(len(a)):
        w[:, i:j] = w[:, i:j] @ a[i:j, i:j].tril() + w[:, j:] @ a[j:, i:j]
    return w


def over_factor(e: Float[Tensor, "out r"], a: Float[Tensor, "n n"]) -> Float[Tensor, "out r"]:
    """E L⁻¹ (out, r) for E (out, r) and the leading r × r part of L in the lower triangle of a."""
    x = e.clone()
    rank = e.shape[1]
    for i, j in reversed(list(stripes(rank))):
        if j < rank:
            x[:, i:j].addmm_(x[:, j:], a[j:rank, i:j], alpha=-1)
        x[:, i:j] = torch.linalg.solve_triangular(a[i:j, i:j], x[:, i:j], upper=False, left=False)
    return x


def slicing_losses(
    gram: Float[Tensor, "n n"], w: Float[Tensor, "out n"], order: Int[Tensor, " n"]
) -> Float[Tensor, " n+1"]:
    """E‖W x − W_J x_J‖² when W (out, n) is sliced to the first r inputs of `order`, for r = 0 … n: (n + 1,), in the
    Gram's own scale; `gram` is taken over and reordered. The same as `planish.solvers.linalg.tail_sums((WᵀW) ∘ C)`.
    """
    reorder(gram, order)
    w = w.double()[:, order]
    steps = []
    for i, j in stripes(len(gram)):
        inner = (w[:, i:j].T @ w[:, i:]) * gram[i:j, i:]
        steps.append(2 * inner.triu(1).sum(1) + inner.diagonal())
    step = torch.cat(steps)
    return torch.cat([step.flip(0).cumsum(0).flip(0), step.new_zeros(1)]).clamp(min=0)


def ridge_leverage(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, " n"]:
    """diag(C (C + λI)⁻¹) (n,) with λ = ridge · mean(diag C), without a second matrix; `gram` is left as it was."""
    with factored(gram, ridge) as level:
        return 1 - level * inverse_diagonal(gram)


def order_neurons(
    gram: Float[Tensor, "n n"], down: Float[Tensor, "out n"], score: str, ridge: float
) -> Int[Tensor, " n"]:
    """Neurons (n,), those that matter most first: by ridge "leverage", or by the "energy" that they give to the output."""
    if score == "leverage":
        worth = ridge_leverage(gram, ridge)
    else:
        worth = gram.diagonal() * torch.linalg.vector_norm(down, dim=0, dtype=gram.dtype).square()
    return worth.argsort(descending=True, stable=True)


class Refits:
    """Least-squares refits of W (out, n) on the first r inputs of an `order`, for every r from one factor.

    With C the Gram in that order and L Lᵀ = C + λI: W x is best made of the first r inputs by W' = (W L)_r L_rr⁻¹, which
    leaves Σ_{i ≥ r} ‖(W L)_i‖² (of the damped problem: ridge towards W's own columns). Takes `gram` over: it is
    reordered and then holds L.
    """

    def __init__(self, gram: Float[Tensor, "n n"], w: Float[Tensor, "out n"], order: Int[Tensor, " n"], damping: float):
        reorder(gram, order)
        self.order, self.gram = order, gram
        take_root(gram, [gram[i:j, i:j].clone() for i, j in stripes(len(gram))], damping)
        self.explained = times_factor(w[:, order].double(), gram)

    def losses(self) -> Float[Tensor, " ranks"]:
        """Squared error at every rank 0 … n: (n + 1,), in the Gram's own scale."""
        energy = self.explained.square().sum(0)
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])

    def at(self, rank: int) -> tuple[Int[Tensor, " rank"], Float[Tensor, "out rank"]]:
        """The kept inputs (rank,), rising, and W' (out, rank) for them."""
        kept, columns = self.order[:rank].sort()
        return kept, over_factor(self.explained[:, :rank], self.gram)[:, columns]
