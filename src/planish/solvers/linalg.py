"""Pure tensor mathematics shared by the solvers. Everything is computed in fp64 whatever comes in.

Conventions: a linear is y = W x with W (out, in); a gram is Σ x xᵀ (in, in); `damping` is relative,
λ = damping · mean(diag gram). No Gram is ever inverted: Cholesky with triangular solves, or eigh with a clamp. Within
`planish.solvers.offload.offload` the long ones run on an accelerator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.solvers.offload import offloaded

DAMPING = 1e-8


def symmetrise(m: Tensor) -> Tensor:
    return (m + m.mH).div_(2)


@offloaded
def symmetric_product(a: Tensor, b: Tensor, tile: int = 256) -> Tensor:
    """a bᵀ (n, n) for a, b (n, k) whose product is known to be symmetric: tiles on and above the diagonal, mirrored."""
    out = a.new_empty(len(a), len(a))
    for i in range(0, len(a), tile):
        out[i : i + tile, i:] = a[i : i + tile] @ b[i:].T
        out[i + tile :, i : i + tile] = out[i : i + tile, i + tile :].T
    return out


def triangular_product(w: Tensor, lower: Tensor, out: Tensor | None = None, leaf: int = 256) -> Tensor:
    """w L (m, n) for w (m, n) and a lower triangular L (n, n), whose upper part is not read: half the operations."""
    out = torch.empty_like(w) if out is None else out
    if len(lower) <= leaf:
        return torch.matmul(w, lower.tril(), out=out)
    h = len(lower) // 2
    triangular_product(w[:, :h], lower[:h, :h], out[:, :h], leaf)
    out[:, :h].addmm_(w[:, h:], lower[h:, :h])
    triangular_product(w[:, h:], lower[h:, h:], out[:, h:], leaf)
    return out


@offloaded
def sandwich(w: Tensor, gram: Tensor) -> Tensor:
    """w C wᵀ (m, m) for w (m, n) and a symmetric C (n, n).

    With C = T + Tᵀ, T lower triangular, it is M + Mᵀ, M = (w T) wᵀ: m n² + 2 m² n operations, and no copy of C. Where w is
    not wide, half of the product of w C and wᵀ: 2 m n² + m² n.
    """
    if w.shape[0] >= w.shape[1]:
        return symmetric_product(w @ gram, w)
    half = triangular_product(w.contiguous(), gram).addcmul_(w, gram.diagonal(), value=-0.5)
    m = half @ w.T
    return m + m.T


@offloaded
def congruence(gram: Tensor, lower: Tensor) -> Tensor:
    """Lᵀ C L (n, n) for a symmetric C and a lower triangular L."""
    return symmetric_product(triangular_product(gram, lower).T, lower.T)


def damp(gram: Tensor, damping: float) -> Tensor:
    """gram + damping · mean(diag gram) · I; an all-zero Gram becomes damping · I."""
    gram = symmetrise(gram.double())
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = torch.where(level > 0, level, torch.ones_like(level)) * damping
    gram.diagonal(dim1=-2, dim2=-1).add_(level[..., None])
    return gram


@offloaded
def root(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Lower L (n, n) with L Lᵀ = gram + λI; the damping is raised tenfold, with a warning, until Cholesky succeeds."""
    raised = damping
    while True:
        factor, info = torch.linalg.cholesky_ex(damp(gram, raised))
        if not info.any():
            break
        raised = max(raised * 10, 1e-12)
        if raised > 1:
            raise ValueError("Gram has no Cholesky factor even with damping 1: it holds NaN or is far from symmetric")
    if raised > damping:
        warnings.warn(f"damping raised from {damping:g} to {raised:g}: Gram is not positive definite", stacklevel=2)
    return factor


@offloaded
def solve(gram: Tensor, rhs: Tensor, damping: float = DAMPING) -> Tensor:
    """X (n, k) with (gram + λI) X = rhs."""
    return torch.cholesky_solve(rhs.double(), root(gram, damping))


@offloaded
def eigh_descending(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) falling and eigenvectors (n, n) in columns of a symmetric or Hermitian m (or a batch of them).

    Signs, or phases, are fixed so that results are reproducible: the largest entry of each vector is positive.
    """
    values, vectors = torch.linalg.eigh(symmetrise(m.to(torch.complex128 if m.is_complex() else torch.float64)))
    values, vectors = values.flip(-1), vectors.flip(-1)
    at = vectors.abs().argmax(-2, keepdim=True)
    return values, vectors * vectors.gather(-2, at).sgn().conj()


@offloaded
def eigh_root(gram: Tensor, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """(S, S⁺), both (n, n), with S Sᵀ = gram: S = Q Λ^½ and S⁺ = Λ^-½ Qᵀ, eigenvalues under floor · max dropped."""
    values, vectors = eigh_descending(gram)
    keep = values > floor * values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)
    sqrt = torch.where(keep, values, 0).clamp(min=0).sqrt()
    inverse = torch.where(keep, sqrt, 1).reciprocal() * keep
    return vectors * sqrt[..., None, :], inverse[..., :, None] * vectors.transpose(-1, -2)


@dataclass(frozen=True)
class LowRank:
    """W ≈ B[:, :r] A[:r]: B (out, k), A (k, in) and the singular values `s` (k,) of the weighted matrix, falling.

    Truncating at r loses exactly Σ_{i≥r} s_i² in the metric of the decomposition.
    """

    B: Tensor
    A: Tensor
    s: Tensor

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (out, rank), A (rank, in)."""
        return self.B[:, :rank], self.A[:rank]

    def tails(self) -> Tensor:
        """Loss of every rank 0 … k: (k + 1,), falling, last 0."""
        squares = self.s.square()
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


class Projected(LowRank):
    """Factors that follow from an orthonormal basis (p, k), column by column: computed only up to the rank asked for."""

    def __init__(self, basis: Tensor, s: Tensor, b: Callable[[Tensor], Tensor], a: Callable[[Tensor], Tensor]):
        self.__dict__.update(basis=basis, s=s, b=b, a=a)

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        basis = self.basis[:, :rank]  # type: ignore[attr-defined]
        return self.b(basis), self.a(basis)  # type: ignore[attr-defined]

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        return self.b(self.basis)  # type: ignore[attr-defined]

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self.a(self.basis)  # type: ignore[attr-defined]


def whitened_svd(w: Tensor, gram: Tensor | None = None, out_gram: Tensor | None = None) -> LowRank:
    """Best low-rank forms of W (out, in) for every rank at once, min ‖G^½ (W − W̃) R^½‖_F.

    R = `gram` (input second moment) and G = `out_gram` (second moment of the output's gradient); either may be
    None for the identity. With R alone this is SVD-LLM's optimum by one symmetric eigenproblem of the smaller side:
    B = U, A = Uᵀ W with U the eigenvectors of W R Wᵀ (m ≤ n), else B = W L V, A = Vᵀ L⁻¹ (a triangular solve) with
    V the eigenvectors of Lᵀ Wᵀ W L, L Lᵀ = R; a nearly singular R takes the SVD with a clamped root instead.
    """
    w = w.double()
    if out_gram is None and gram is not None and w.shape[0] <= w.shape[1]:
        values, u = eigh_descending(sandwich(w, gram.double()))
        return Projected(u, values.clamp(min=0).sqrt(), lambda u: u, lambda u: multiply(u.T, w))
    if out_gram is None and gram is not None and (lower := well_conditioned_root(gram)) is not None:
        wl = triangular_product(w, lower)
        values, v = eigh_descending(symmetric_product(wl.T, wl.T))
        return Projected(v, values.clamp(min=0).sqrt(), lambda v: multiply(wl, v), lambda v: solve_right(lower, v.T))
    left = None if out_gram is None else eigh_root(out_gram)[0]
    right, right_inverse = (None, None) if gram is None else eigh_root(gram)
    wr = w if right is None else w @ right
    _, s, vh = svd(wr if left is None else left.T @ wr)
    # For a given A the best B is the least-squares one whatever G is, so G is never inverted: B = W R^½ V, A = Vᵀ R^-½.
    b, a = wr @ vh.T, vh if right_inverse is None else vh @ right_inverse
    return LowRank(b, a, s)


@offloaded
def truncate(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank), A (rank, in): the best approximation of m (out, in), by eigh of its smaller side's Gram.

    Directions with singular values under about 1e-8 of the largest are any orthonormal ones; the SVD's cost thrice as much.
    """
    m = m.double()
    wide = m.shape[0] <= m.shape[1]
    side = m if wide else m.T
    basis = eigh_descending(symmetric_product(side, side))[1][:, :rank]
    return (basis, basis.T @ m) if wide else (m @ basis, basis.T)


def metric_svd(w: Tensor, gram: Tensor, metric: Tensor, back: bool = False, damping: float = 1e-10) -> LowRank:
    """Best low-rank forms of W (out, in) for every rank at once, min tr(G (W − W̃) R (W − W̃)ᵀ), R = `gram` (in, in).

    `metric`: G (out, out), or with `back` Wᵀ G W (in, in), which is all of a tall W's G that matters. One symmetric
    eigenproblem of that side. Gᵀ's root S: Sᵀ W R Wᵀ S = U Λ Uᵀ, A = Uᵀ Sᵀ W, B = W R Aᵀ Λ⁻¹, the best B for that A
    whatever G is; `back`, R = L Lᵀ: Lᵀ (Wᵀ G W) L = V Λ Vᵀ, A = Vᵀ L⁻¹, B = W L V. Roots are damped by `damping`.
    """
    u, s, left, right = _metric_basis(w, gram, metric, back, damping)
    if back:
        return Projected(u, s, lambda v: multiply(left, v), lambda v: solve_right(right, v.mT.contiguous()))
    alive = s > 1e-7 * s[:1]
    inverse = torch.where(alive, s, 1).square().reciprocal() * alive
    return Projected(
        u, s, lambda u: multiply(left, multiply(right.T, u)) * inverse[: u.shape[1]], lambda u: multiply(u.T, right)
    )


@offloaded
def _metric_basis(w: Tensor, gram: Tensor, metric: Tensor, back: bool, damping: float) -> tuple[Tensor, ...]:
    """Of `metric_svd` (U, Λ^½, W R, Sᵀ W), with `back` (V, Λ^½, W L, L)."""
    w, gram = w.double(), gram.double()
    lower = root(gram if back else metric, damping)
    if back:
        values, v = eigh_descending(congruence(metric.double(), lower))
        return v, values.clamp(min=0).sqrt(), triangular_product(w, lower), lower
    wr = w @ gram
    values, u = eigh_descending(congruence(symmetric_product(wr, w), lower))
    k = min(w.shape)
    return u[:, :k], values[:k].clamp(min=0).sqrt(), wr, lower.T @ w


@offloaded
def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@offloaded
def solve_right(lower: Tensor, x: Tensor) -> Tensor:
    """x L⁻¹."""
    return torch.linalg.solve_triangular(lower, x, upper=False, left=False)


@offloaded
def well_conditioned_root(gram: Tensor, limit: float = 1e-6) -> Tensor | None:
    """Lower L with L Lᵀ = gram, or None where its diagonal falls by more than `limit` (squared: the condition number)."""
    factor, info = torch.linalg.cholesky_ex(symmetrise(gram.double()))
    diagonal = factor.diagonal()
    return factor if not info.any() and diagonal.min() > limit * diagonal.max() else None


@offloaded
def svd(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in fp64 (batched over leading dimensions), signs fixed so that results are reproducible."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    at = u.abs().argmax(-2, keepdim=True)
    sign = u.gather(-2, at).sign()
    return u * sign, s, vh * sign.mT


def balance(left: Tensor, right: Tensor, floor: float = 1e-10) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in which a product of two factors is best truncated: (P, Q, s), P and Q (..., d, d), s (..., d) falling.

    M_r = Q_r P_rᵀ (first r columns) minimises tr(left (I − M) right (I − M)ᵀ) over matrices of rank r, and leaves
    Σ_{i≥r} s_i². With left = E[q qᵀ], right = E[k kᵀ] that is the score error E(qᵀ(I − M)k)²; with left = Wᵀ W,
    right = E[x xᵀ] the output error E‖W (I − M) x‖². Roots S Sᵀ of both, S_leftᵀ S_right = U s Vᵀ, P = S_left U s^-½,
    Q = S_right V s^-½: nothing is inverted but the kept s (square-root balanced truncation). Columns with
    s < floor · s_0 are zero. Batched over leading dimensions.
    """
    a, b = eigh_root(left)[0], eigh_root(right)[0]
    u, s, vh = svd(a.mT @ b)
    alive = s > floor * s[..., :1]
    scale = torch.where(alive, s, 1).rsqrt() * alive
    return a @ u * scale[..., None, :], b @ vh.mT * scale[..., None, :], s


def reduce_scores(q: Tensor, k: Tensor, select: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Maps Q and P (groups, d, d) of queries and keys whose first r columns keep qᵀ k best at every rank r, and the loss.

    `q`, `k` (groups, d, d): second moments. Either `balance`, or with `select` the channels with the largest
    E[q_j²] E[k_j²]. Loss (d + 1,): E(qᵀ k − q̃ᵀ k̃)² over independent tokens, summed over groups.
    """
    if q.shape[-1] == 0:
        return q, k, q.new_zeros(1, dtype=torch.float64)
    if not select:
        p, back, s = balance(q, k)
        squares = s.square().sum(0)
        return back, p, torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    inner = (q * k).double()
    order = inner.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
    pick = torch.eye(q.shape[-1], dtype=inner.dtype, device=q.device)[order].mT  # columns = kept channels
    return pick, pick, torch.stack([tail_sums(m[o][:, o]) for m, o in zip(inner, order, strict=True)]).sum(0)


def tail_sums(inner: Tensor) -> Tensor:
    """Σ_{i,j ≥ r} inner_ij for r = 0 … n of a symmetric (n, n): (n + 1,), what dropping all but the first r loses."""
    tail = inner.flip(0, 1)
    steps = 2 * torch.tril(tail, -1).sum(1) + tail.diagonal()
    return torch.cat([steps.cumsum(0).flip(0), steps.new_zeros(1)]).clamp(min=0)


@offloaded
def selection_losses(gram: Tensor, w: Tensor, order: Tensor, refit: bool, damping: float = DAMPING) -> Tensor:
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


def compute_tails(steps: Tensor) -> Tensor:
    """Σ_{i ≥ r} steps_i for r = 0 … n: (n + 1,), last 0."""
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])


@offloaded
def select_greedily(gram: Tensor, w: Tensor, damping: float = DAMPING, steps: int = 64) -> tuple[Tensor, Tensor]:
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


def least_squares(gram: Tensor, cross: Tensor, damping: float = DAMPING) -> Tensor:
    """W (out, in) minimising ‖Y − W X‖² + λ‖W‖² from gram = X Xᵀ (in, in) and cross = Y Xᵀ (out, in)."""
    return solve(gram, cross.T, damping).T


@offloaded
def ridge_leverage(gram: Tensor, ridge: float) -> Tensor:
    """diag(C (C + λI)⁻¹) (n,) with λ = ridge · mean(diag C): 1 − λ · diag((C + λI)⁻¹)."""
    factor = root(gram, ridge)
    level = (factor.square().sum() - gram.double().diagonal().sum()) / gram.shape[0]
    inverse_factor = torch.linalg.solve_triangular(factor, torch.eye(len(gram), dtype=factor.dtype), upper=False)
    return 1 - level * inverse_factor.square().sum(0)


@offloaded
def nystrom(gram: Tensor, kept: Tensor, w: Tensor, damping: float = DAMPING) -> Tensor:
    """W' (out, k) minimising ‖(W − W' x_kept)‖ over the inputs: W C[:, J] (C[J, J] + λI)⁻¹. `kept` (k,) indices."""
    gram = gram.double()
    return solve(gram[kept][:, kept], gram[kept] @ w.double().T, damping).T


@dataclass(frozen=True)
class Pivoted:
    """Lossless form of a rank-r matrix: rows `pivots` are `base` (r, in), rows `rest` are `coefficients` (out − r, r) @ base."""

    pivots: Tensor
    rest: Tensor
    base: Tensor
    coefficients: Tensor

    def order(self) -> Tensor:
        """(out,) int32 with W = cat[base, coefficients @ base][order]."""
        return torch.cat([self.pivots, self.rest]).argsort().int()


def pivot(b: Tensor, a: Tensor, bound: float = 2.0) -> Pivoted:
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
def _find_pivots(b: Tensor, bound: float, square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
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
