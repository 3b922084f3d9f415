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

from planish.shapes import Float, Inexact
from planish.solvers.offload import offloaded

DAMPING = 1e-8


def symmetrise(m: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    return (m + m.mH).div_(2)


@offloaded
def symmetric_product(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"], tile: int = 256) -> Float[Tensor, "n n"]:
    """a bᵀ (n, n) for a, b (n, k) whose product is known to be symmetric: tiles on and above the diagonal, mirrored."""
    out = a.new_empty(len(a), len(a))
    for i in range(0, len(a), tile):
        out[i : i + tile, i:] = a[i : i + tile] @ b[i:].T
        out[i + tile :, i : i + tile] = out[i : i + tile, i + tile :].T
    return out


def triangular_product(
    w: Float[Tensor, "m n"], lower: Float[Tensor, "n n"], out: Float[Tensor, "m n"] | None = None, leaf: int = 256
) -> Float[Tensor, "m n"]:
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
def sandwich(w: Float[Tensor, "m n"], gram: Float[Tensor, "n n"]) -> Float[Tensor, "m m"]:
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
def congruence(gram: Float[Tensor, "n n"], lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lᵀ C L (n, n) for a symmetric C and a lower triangular L."""
    return symmetric_product(triangular_product(gram, lower).T, lower.T)


def damp(gram: Float[Tensor, "*batch n n"], damping: float) -> Float[Tensor, "*batch n n"]:
    """gram + damping · mean(diag gram) · I; an all-zero Gram becomes damping · I."""
    gram = symmetrise(gram.double())
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = torch.where(level > 0, level, torch.ones_like(level)) * damping
    gram.diagonal(dim1=-2, dim2=-1).add_(level[..., None])
    return gram


@offloaded
def root(gram: Float[Tensor, "*batch n n"], damping: float = DAMPING) -> Float[Tensor, "*batch n n"]:
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
def solve(gram: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], damping: float = DAMPING) -> Float[Tensor, "n k"]:
    """X (n, k) with (gram + λI) X = rhs."""
    return torch.cholesky_solve(rhs.double(), root(gram, damping))


def anchor(gram: Float[Tensor, "n n"], moved: Float[Tensor, "n n"], share: float, ridge: float) -> Float[Tensor, "n n"]:
    """K (n, n) with which W K x̂ is nearest to (1 − a) W x̂ + a W x, whatever W: ((1 − a) R + a C + λI) (R + λI)⁻¹, λ = ridge · mean
    diag R. `gram` R = E[x̂ x̂ᵀ], `moved` C = E[x x̂ᵀ], `share` a. The ridge draws K to the identity."""
    mixed = (1 - share) * gram + share * moved
    mixed.diagonal().add_(ridge * gram.diagonal().mean())
    return solve(gram, mixed.T, ridge).T


@offloaded
def eigh_descending(
    m: Inexact[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Inexact[Tensor, "*batch n n"]]:
    """Eigenvalues (n,) falling and eigenvectors (n, n) in columns of a symmetric or Hermitian m (or a batch of them).

    Signs, or phases, are fixed so that results are reproducible: the largest entry of each vector is positive.
    """
    values, vectors = torch.linalg.eigh(symmetrise(m.to(torch.complex128 if m.is_complex() else torch.float64)))
    values, vectors = values.flip(-1), vectors.flip(-1)
    at = vectors.abs().argmax(-2, keepdim=True)
    return values, vectors * vectors.gather(-2, at).sgn().conj()


@offloaded
def eigh_root(
    gram: Float[Tensor, "*batch n n"], floor: float = 1e-12
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n n"]]:
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

    B: Float[Tensor, "out k"]
    A: Float[Tensor, "k in"]
    s: Float[Tensor, " k"]

    def at(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """B (out, rank), A (rank, in)."""
        return self.B[:, :rank], self.A[:rank]

    def tails(self) -> Float[Tensor, " ranks"]:
        """Loss of every rank 0 … k: (k + 1,), falling, last 0."""
        squares = self.s.square()
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


class Projected(LowRank):
    """Factors that follow from an orthonormal basis (p, k), column by column: computed only up to the rank asked for."""

    def __init__(
        self,
        basis: Float[Tensor, "p k"],
        s: Float[Tensor, " k"],
        b: Callable[[Tensor], Tensor],
        a: Callable[[Tensor], Tensor],
    ):
        self.__dict__.update(basis=basis, s=s, b=b, a=a)

    def at(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        basis = self.basis[:, :rank]  # type: ignore[attr-defined]
        return self.b(basis), self.a(basis)  # type: ignore[attr-defined]

    @property
    def B(self) -> Float[Tensor, "out k"]:  # type: ignore[override]
        return self.b(self.basis)  # type: ignore[attr-defined]

    @property
    def A(self) -> Float[Tensor, "k in"]:  # type: ignore[override]
        return self.a(self.basis)  # type: ignore[attr-defined]


def whitened_svd(
    w: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None = None,
    out_gram: Float[Tensor, "out out"] | None = None,
) -> LowRank:
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
def truncate(m: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """B (out, rank), A (rank, in): the best approximation of m (out, in), by eigh of its smaller side's Gram.

    Directions with singular values under about 1e-8 of the largest are any orthonormal ones; the SVD's cost thrice as much.
    """
    m = m.double()
    wide = m.shape[0] <= m.shape[1]
    side = m if wide else m.T
    basis = eigh_descending(symmetric_product(side, side))[1][:, :rank]
    return (basis, basis.T @ m) if wide else (m @ basis, basis.T)


def metric_svd(
    w: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    metric: Float[Tensor, "side side"],
    back: bool = False,
    damping: float = 1e-10,
) -> LowRank:
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
def _metric_basis(
    w: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    metric: Float[Tensor, "side side"],
    back: bool,
    damping: float,
) -> tuple[Float[Tensor, "side k"], Float[Tensor, " k"], Float[Tensor, "out in"], Float[Tensor, "rows in"]]:
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
def multiply(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    return a @ b


@offloaded
def solve_right(lower: Float[Tensor, "n n"], x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """x L⁻¹."""
    return torch.linalg.solve_triangular(lower, x, upper=False, left=False)


@offloaded
def well_conditioned_root(gram: Float[Tensor, "n n"], limit: float = 1e-6) -> Float[Tensor, "n n"] | None:
    """Lower L with L Lᵀ = gram, or None where its diagonal falls by more than `limit` (squared: the condition number)."""
    factor, info = torch.linalg.cholesky_ex(symmetrise(gram.double()))
    diagonal = factor.diagonal()
    return factor if not info.any() and diagonal.min() > limit * diagonal.max() else None


@offloaded
def svd(
    m: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch m k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k n"]]:
    """Thin SVD in fp64 (batched over leading dimensions), signs fixed so that results are reproducible."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    at = u.abs().argmax(-2, keepdim=True)
    sign = u.gather(-2, at).sign()
    return u * sign, s, vh * sign.mT


def balance(
    left: Float[Tensor, "*batch d d"], right: Float[Tensor, "*batch d d"], floor: float = 1e-10
) -> tuple[Float[Tensor, "*batch d d"], Float[Tensor, "*batch d d"], Float[Tensor, "*batch d"]]:
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


def reduce_scores(
    q: Float[Tensor, "groups d d"], k: Float[Tensor, "groups d d"], select: bool = False
) -> tuple[Float[Tensor, "groups d d"], Float[Tensor, "groups d d"], Float[Tensor, " d+1"]]:
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


def least_squares(
    gram: Float[Tensor, "in in"], cross: Float[Tensor, "out in"], damping: float = DAMPING
) -> Float[Tensor, "out in"]:
    """W (out, in) minimising ‖Y − W X‖² + λ‖W‖² from gram = X Xᵀ (in, in) and cross = Y Xᵀ (out, in)."""
    return solve(gram, cross.T, damping).T


def tail_sums(inner: Float[Tensor, "n n"]) -> Float[Tensor, " n+1"]:
    """Σ_{i,j ≥ r} inner_ij for r = 0 … n of a symmetric (n, n): (n + 1,), what dropping all but the first r loses."""
    tail = inner.flip(0, 1)
    steps = 2 * torch.tril(tail, -1).sum(1) + tail.diagonal()
    return torch.cat([steps.cumsum(0).flip(0), steps.new_zeros(1)]).clamp(min=0)


def compute_tails(steps: Float[Tensor, " n"]) -> Float[Tensor, " n+1"]:
    """Σ_{i ≥ r} steps_i for r = 0 … n: (n + 1,), last 0."""
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)])
