"""The pivoted form of a low-rank matrix: some of its rows, and the others as combinations of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.shapes import Float, Int
from planish.solvers.linalg import multiply
from planish.solvers.offload import offloaded


@dataclass(frozen=True)
class Pivoted:
    """Lossless form of a rank-r matrix: rows `pivots` are `base` (r, in), rows `rest` are `coefficients` (out − r, r) @ base."""

    pivots: Int[Tensor, " r"]
    rest: Int[Tensor, " rest"]
    base: Float[Tensor, "r in"]
    coefficients: Float[Tensor, "rest r"]

    def order(self) -> Int[Tensor, " out"]:
        """(out,) int32 with W = cat[base, coefficients @ base][order]."""
        return torch.cat([self.pivots, self.rest]).argsort().int()


def pivot(b: Float[Tensor, "out r"], a: Float[Tensor, "r in"], bound: float = 2.0) -> Pivoted:
    """Pivoted form of W = B A, B (out, r), A (r, in): r(in + out − r) numbers instead of r(in + out).

    The r pivot rows span the others with coefficients of at most `bound`: LU with partial pivoting of an orthonormal
    basis of B's columns, then row swaps while a coefficient is larger (each multiplies the pivots' volume by at least
    `bound`, so they end; few are needed). Working on the basis makes the choice independent of how B and A are scaled
    and lossless where B or A lack full rank. Cost: QR and LU of B in fp64, 4096 × 2048 in about 3 s on one core.

    Reference: PIFA (arXiv 2501.19090) §3. Differs from the paper: it takes column-pivoted QR of Wᵀ (in × out) and
    solves for the coefficients by least squares in fp32.
    """
    b, a = b.double(), a.double()
    pivots, rest, coefficients = _find_pivots(b, bound)
    return Pivoted(pivots, rest, multiply(b[pivots], a), coefficients)


@offloaded
def _find_pivots(
    b: Float[Tensor, "out r"], bound: float, square: bool = False
) -> tuple[Int[Tensor, " r"], Int[Tensor, " rest"], Float[Tensor, "rest r"]]:
    """Rows of B (out, r) that span the others, the others, both rising, and their coefficients (out − r, r).

    `square`, and on an accelerator: the basis is made square first, where LU of such is four times as fast; what then stands
    beside it only moves the other rows about.
    """
    out, rank = b.shape
    q = torch.linalg.qr(b, "complete" if square or not b.is_cpu else "reduced").Q
    lu, swaps = torch.linalg.lu_factor(q)
    rows = list(range(out))
    for i, j in enumerate((swaps - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    q, lu = q[:, :rank], lu[:, :rank]
    c = torch.linalg.solve_triangular(lu[:rank].T, lu[rank:].T, upper=True, unitriangular=True).T.contiguous()
    exact = bool(lu.abs().max() < 100)  # hardly any growth in the elimination
    while c.numel():
        i, j = divmod(int(c.abs().argmax()), rank)
        if c[i, j].abs() <= bound:
            break
        exact = False
        rows[j], rows[rank + i] = rows[rank + i], rows[j]
        new = c[i] / c[i, j]
        new[j] = -1 / c[i, j]  # the old pivot row in terms of the new ones, negated
        old = c[:, j].clone()
        c[:, j] = 0
        c -= old[:, None] * new
        c[i] = -new
    pivots, at = torch.tensor(rows[:rank], device=b.device).sort()
    rest, below = torch.tensor(rows[rank:], dtype=torch.long, device=b.device).sort()
    if exact:
        return pivots, rest, c[below][:, at]
    swap, lower, upper = torch.linalg.lu(q[pivots].T)
    half = torch.linalg.solve_triangular(lower, q[rest].T[swap.argmax(0)], upper=False, unitriangular=True)
    return pivots, rest, torch.linalg.solve_triangular(upper, half, upper=True).T
