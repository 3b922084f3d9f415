"""A closed-form affine map in place of a whole submodule: f̂(x) = g ⊙ x + b + (x − μ) U, from sufficient statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.errors import InputError
from planish.shapes import Float
from planish.solvers.forms import NOTHING, bypass_form, is_factored
from planish.solvers.linalg import eigh_descending, eigh_root, root, svd
from planish.solvers.moments import RIDGES, Moments
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class Affine:
    """f̂(x) = gate ⊙ x + shift + x V W with the constant folded: shift = ν − (gate ⊙ μ) − μ V W. V (d, r), W (r, d)."""

    gate: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    V: Float[Tensor, "d r"]
    W: Float[Tensor, "r d"]

    def dense(self) -> Float[Tensor, "d d"]:
        """A (d, d) with f̂(x) = x A + shift."""
        return torch.diag(self.gate) + self.V @ self.W


def fit(
    m: Moments,
    rank: int,
    ridge: float,
    *,
    gate: bool = True,
    basis: Literal["pca", "rrr"] = "pca",
    shared: Float[Tensor, "d r"] | None = None,
) -> Affine:
    """Gate, shift and low-rank part, in this order, each by ridge regression with λ = ridge · tr(S) / d.

    g_j = C_jj / (S_jj + λ);  C_e = C − S diag(g);  then with basis
    "pca": V = top eigenvectors of S (or `shared` (d, r)), W = (Vᵀ S V + λI)⁻¹ Vᵀ C_e;
    "rrr": V W = argmin E|e − (x − μ) U|² + λ|U|² over U of this rank: with L Lᵀ = S + λI and L⁻¹ C_e = P Σ Qᵀ,
    V = L⁻ᵀ P_r, W = Σ_r Q_rᵀ (Eckart–Young in the whitened space).
    Without the gate and at full rank both are the ridge regression of f on x.

    Reference: SubFit (arXiv 2606.02559) §3, as described; the order of the steps is the paper's, λ is not given there.
    """
    mu, nu = m.means
    s, c = m.covariance, m.cross
    level = s.diagonal().mean().clamp(min=torch.finfo(s.dtype).tiny)
    g = c.diagonal() / (s.diagonal() + ridge * level) if gate else torch.zeros_like(mu)
    c = c - s * g
    d = len(mu)
    if rank == 0:
        v, w = s.new_zeros(d, 0), s.new_zeros(0, d)
    elif basis == "rrr" and shared is None:
        factor = root(s, ridge)
        p, sigma, qh = svd(torch.linalg.solve_triangular(factor, c, upper=False))
        v = torch.linalg.solve_triangular(factor.T, p[:, :rank], upper=True)
        w = sigma[:rank, None] * qh[:rank]
    else:
        v = eigh_descending(s)[1][:, :rank] if shared is None else shared
        inner = v.T @ s @ v
        inner.diagonal().add_(ridge * level)
        w = torch.cholesky_solve(v.T @ c, root(inner, 0.0))
    return Affine(g, nu - g * mu - mu @ v @ w, v, w)


def fit_held_out(train: Moments, held: Moments | None, rank: int, ridge: float = 0.0, **how) -> tuple[Affine, float]:
    """`fit` on all tokens with the ridge (of `RIDGES`, unless given) that is best for held-out ones; the fit and the ridge."""
    if not ridge:
        ridge = 1e-3 if held is None else min(RIDGES, key=lambda r: _error(held, fit(train, rank, r, **how)))
    return fit(train + held, rank, ridge, **how), ridge


def _error(m: Moments, a: Affine) -> float:
    return m.error(a.dense(), a.shift)


def shared_basis(covariances: Sequence[Float[Tensor, "d d"]], rank: int) -> Float[Tensor, "d rank"]:
    """V (d, rank): top eigenvectors of the mean of the covariances, each scaled to trace 1 so that none dominates."""
    return eigh_descending(torch.stack([s / s.trace() for s in covariances]).mean(0))[1][:, :rank]


def compute_correlations(m: Moments, ff: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Canonical correlations (d,), falling, of x and x + f; `ff` = Σ f fᵀ (d, d).

    Singular values of S_x^-½ C S_y^-½ with y = x + f, by clamped eigen-roots, never an explicit inverse.
    Reference: NBL (arXiv 2505.21077) Eq. 6.
    """
    s, c = m.covariance, m.cross
    nu = m.means[1]
    y = s + c + c.T + ff / m.n - torch.outer(nu, nu)
    rho = torch.linalg.svdvals(eigh_root(s)[1] @ (s + c) @ eigh_root(y)[1].T)
    return rho.clamp(max=1)


def bypass_edit(target: str, a: Affine, *, gate: bool, raw: bool) -> Edit:
    """Edit that puts f̂ in place of a submodule: factored, or as one d × d matrix (gate included) where that is smaller."""
    d, rank = a.V.shape
    form, tensors = bypass_form(rank, d, gate, raw), {"shift": a.shift}
    if form["gate"]:
        tensors["gate"] = a.gate
    if rank and not form["factored"]:
        tensors["V.weight"] = a.dense().T
    elif rank:
        tensors |= {"V.weight": a.V.T, "W.weight": a.W.T}
    return Edit(target, form, tensors)


@dataclass(frozen=True)
class Bypass(Solver):
    """Rank 0 = the submodule is replaced by its affine fit (or by nothing: `kind` "zero"), 1 = it stays.

    `attention_rank`, `ffn_rank`: rank of U, relative to the hidden size up to 1, absolute above. `input` "normed": x is
    what the submodule reads; "raw": the residual stream, and the norm goes too. `target` "own": f is the submodule's own
    contribution; "gap": what is missing to the uncompressed model's residual stream. Cost: the bypass's parameters.

    Differs from the paper: with `shared` every replaced feed-forward stores its own copy of V (the parameters are
    counted so); from rank d/2 on V is folded and nothing is shared anyway.
    """

    name: ClassVar[str] = "bypass"
    submodules: tuple[str, ...] = ("attention", "ffn")
    kind: Literal["affine", "zero"] = "affine"
    attention_rank: float = 1 / 16
    ffn_rank: float = 1.0
    input: Literal["normed", "raw"] = "normed"
    gate: bool = True
    basis: Literal["pca", "rrr"] = "pca"
    ridge: float = 0.0
    tokens: Literal["all", "calm"] = "all"
    target: Literal["own", "gap"] = "own"
    shared: Tensor | None = None

    def units(self, shape: Shape) -> list[Unit]:
        missing = [name for name in self.submodules if not shape.held(name)]
        if missing:
            what = {"attention": "attention", "ffn": "dense feed-forward"}[missing[0]]
            raise InputError(
                f"whole submodules are removed where every block has them; block {shape.block} has no {what}"
            )
        if shape.stays:
            raise InputError(f"whole submodules are removed where no block {shape.stays}, as in this model")
        if shape.experts:
            raise InputError(
                f"whole submodules are removed where no experts stand beside them, as in block {shape.block}"
            )
        return [Unit(shape.block, name) for name in self.submodules]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return (0, 1)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        if rank:
            return {}
        target = "attention" if unit.name == "attention" else "mlp"
        if self.kind == "zero":
            return {target: dict(NOTHING)}
        return {target: bypass_form(self.inner_rank(unit, shape), shape.hidden, self.gate, self.input == "raw")}

    def inner_rank(self, unit: Unit, shape: Shape) -> int:
        """Rank of U."""
        asked = self.attention_rank if unit.name == "attention" else self.ffn_rank
        return min(shape.hidden, round(asked * shape.hidden) if asked <= 1 else int(asked))

    def tap(self, unit: Unit, part: str) -> Tap:
        where = "attention" if unit.name == "attention" else "mlp"
        site = f"{where}.raw" if self.input == "raw" else {"attention": "q.in", "mlp": "up.in"}[where]
        end = "add" if self.target == "own" else "gap"
        return Tap(site, "moments" if self.tokens == "all" else "calm_moments", f"{where}.{end}", part=part)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        if self.kind == "zero":
            return [self.power_tap(unit)]
        return [self.tap(unit, "fit"), self.tap(unit, "held")]

    def power_tap(self, unit: Unit) -> Tap:
        return Tap("attention.add" if unit.name == "attention" else "mlp.add", "squares")

    def moments(self, unit: Unit, stats: Stats) -> tuple[Moments, Moments | None]:
        """Of the tokens to fit, and of those held out to choose the ridge."""
        train = Moments.read(stats, self.tap(unit, "fit"))
        if train is None:
            raise InputError(
                f"no calibration tokens to fit the bypass of {unit}"
                + (": tokens=calm leaves out every one; use tokens=all" if self.tokens == "calm" else "")
            )
        return train, Moments.read(stats, self.tap(unit, "held"))

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        """loss[0] = mean |f − f̂|² per token over all tokens, exactly; factors: the fit, the ridge, E|f|²."""
        if self.kind == "zero":
            return Frontier(unit, [float(stats.mean(self.power_tap(unit)).sum()), 0.0])
        train, held = self.moments(unit, stats)
        rank = self.inner_rank(unit, shape)
        shared = self.shared if unit.name == "ffn" and is_factored(rank, shape.hidden) else None
        affine, ridge = fit_held_out(train, held, rank, self.ridge, gate=self.gate, basis=self.basis, shared=shared)
        total = train + held
        factors = {"affine": affine, "ridge": ridge, "power": float(total.ff.sum() / total.n)}
        return Frontier(unit, [_error(total, affine), 0.0], factors)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank:
            return []
        target = "attention" if frontier.unit.name == "attention" else "mlp"
        if self.kind == "zero":
            return [drop_edit(target)]
        return [bypass_edit(target, frontier.factors["affine"], gate=self.gate, raw=self.input == "raw")]


def drop_edit(target: str) -> Edit:
    """Edit that removes a submodule, its norm included: it contributes nothing."""
    return Edit(target, dict(NOTHING), {})
