"""Low-rank forms of single linears: plain, diagonally scaled, whitened and two-stage truncated SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.shapes import Float
from planish.solvers.forms import input_site, list_ranks, low_rank_edit, low_rank_spec
from planish.solvers.linalg import LowRank, damp, least_squares, root, solve, svd, truncate, whitened_svd
from planish.stats import Stats, Tap

Metric = Literal["plain", "diagonal", "whitened"]


@dataclass(frozen=True)
class LinearSVD(Solver):
    """Every linear W (out, in) becomes B A of one rank; left dense where the pair would not be smaller.

    `metric`: "plain" minimises ‖W − BA‖; "diagonal" scales inputs by (mean |x|)^power first (ASVD); "whitened"
    minimises the output error E‖(W − BA) x‖² exactly (SVD-LLM), by eigh of W C Wᵀ or a clamped root, no inverse.
    `form`: "pair" or "pivoted". Predicted loss is the output error in every metric. `update` (needs the dense prefix
    beside the compressed one): whitening on dense inputs x, then B by least squares of W x on A x̂, the compressed
    prefix's inputs (SVD-LLM V1's sequential update; loss is then that of the truncation before it).
    """

    name: ClassVar[str] = "linear-svd"
    metric: Metric = "whitened"
    power: float = 0.5
    form: Literal["pair", "pivoted"] = "pair"
    roles: tuple[str, ...] = ()
    update: bool = False

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, r) for r in shape.linears if not self.roles or r in self.roles]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return list_ranks(shape.linear(unit.name), self.form)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return low_rank_spec(unit.name, shape, self.form, rank)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        site = input_site(unit.name)
        if self.update:
            return [Tap(f"dense:{site}", "gram"), Tap(site, "gram"), Tap(f"dense:{site}", "cross", site)]
        return [Tap(site, "gram")] + ([Tap(site, "magnitudes")] if self.metric == "diagonal" else [])

    def memory(self, unit: Unit, shape: Shape) -> int:
        out, n = shape.linear(unit.name)
        grams = n * n * (1 + 2 * self.update + 2 * (out > n))  # mean moments; a root of them
        return grams + 3 * out * n + 6 * min(out, n) ** 2

    def gram_tap(self, unit: Unit) -> Tap:
        return Tap(("dense:" if self.update else "") + input_site(unit.name), "gram")

    def factorise(self, unit: Unit, w: Float[Tensor, "out in"], stats: Stats) -> LowRank:
        if self.metric == "whitened":
            return whitened_svd(w, stats.mean(self.gram_tap(unit)))
        if self.metric == "plain":
            return whitened_svd(w)
        scale = (stats.mean(Tap(input_site(unit.name), "magnitudes")) + 1e-6) ** self.power
        u, s, vh = svd(w.double() * scale)
        return LowRank(u * s.sqrt(), s.sqrt()[:, None] * vh / scale, s)

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w = weights[unit.name].double()
        low = self.factorise(unit, w, stats)
        if self.metric == "whitened":
            loss = low.tails()
        else:
            loss = output_errors(w, low, stats.mean(self.gram_tap(unit)))
        factors: dict[str, Any] = {"low": low}
        if self.update:
            site = input_site(unit.name)
            factors["gram"] = stats.mean(Tap(site, "gram"))
            factors["target"] = w @ stats.mean(Tap(f"dense:{site}", "cross", site))
        return Frontier(unit, loss, factors)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["low"].at(rank)
        if self.update:
            b = least_squares(a @ frontier.factors["gram"] @ a.T, frontier.factors["target"] @ a.T)
        return [low_rank_edit(frontier.unit.name, b, a, self.form, orthogonal=not self.update)]


def output_errors(w: Float[Tensor, "out in"], low: LowRank, gram: Float[Tensor, "in in"]) -> Float[Tensor, " ranks"]:
    """E‖(W − B_r A_r) x‖² for every rank r = 0 … k from gram = E[x xᵀ]: (k + 1,).

    With E_r = W − B_r A_r and P = W C, each step costs one rank-one update of tr(E C Eᵀ).
    """
    ca = low.A @ gram.double()  # (k, in)
    cross = (low.B * (w @ ca.T)).sum(0)  # b_iᵀ W C a_i
    inner = (ca @ low.A.T) * (low.B.T @ low.B)  # ⟨i, j⟩ in the metric
    start = ((w @ gram.double()) * w).sum()
    pairs = torch.tril(inner, -1).sum(1) * 2 + inner.diagonal()
    return torch.cat([start[None], start + (pairs - 2 * cross).cumsum(0)]).clamp(min=0)


@dataclass(frozen=True)
class TwoStageSVD(LinearSVD):
    """W ≈ [W]_{r − r_r} + [W − [W]_{r − r_r}]_{r_r} with r_r = β · mn/(m + n), stored as one pair of rank r.

    The first stage minimises the output error; `residual_metric` "plain" compensates in weight space, which trades
    calibration error for robustness; "whitened" is provably one truncation at rank r (a test shows it).
    Reference: ERC-SVD (arXiv 2505.20112) Alg. 2, Eq. 5; β is a share of the break-even rank, not of r.
    """

    name: ClassVar[str] = "two-stage-svd"
    beta: float = 0.05
    residual_metric: Literal["plain", "whitened"] = "plain"

    def memory(self, unit: Unit, shape: Shape) -> int:
        out, n = shape.linear(unit.name)
        return super().memory(unit, shape) + 6 * out * n

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w = weights[unit.name].double()
        gram = stats.mean(self.gram_tap(unit))
        losses = TwoStages(self, w, gram, shape.linear(unit.name))
        return Frontier(unit, losses, {"losses": losses})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["losses"].factors(rank)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]


class LastRank:
    """Factors of one rank, B (out, rank) and A (rank, in), are asked for twice in a row: for its loss and for the result."""

    last: tuple[int, tuple[Tensor, Tensor]] | None = None

    def find(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        raise NotImplementedError

    def factors(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        known, self.last = self.last, None  # not kept longer: frontiers may be cached
        if known is not None and known[0] == rank:
            return known[1]
        self.last = rank, self.find(rank)
        return self.last[1]


class TwoStages(LastRank, Sequence[float]):
    """Output error of every rank, computed when asked for: each rank has a residual of its own."""

    def __init__(
        self, solver: TwoStageSVD, w: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], size: tuple[int, int]
    ):
        self.solver, self.w, self.gram = solver, w, gram
        self.full = min(size)
        alpha = (
            size[0] * size[1] / sum(size)
        )  # Eq. 5: the rank at which a pair holds as much as the weight, m n / (m + n)
        self.residual_rank = round(solver.beta * alpha)
        self.low: LowRank = whitened_svd(w, gram)

    def __len__(self) -> int:
        return self.full + 1

    def find(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """Alg. 2: B A = W₁ + W₂ with W₁ = [W]_{r − r_r}, W₂ = [W − W₁]_{r_r}."""
        second = min(self.residual_rank, rank - 1) if rank > 0 else 0
        b, a = self.low.at(rank - second)
        if not second:
            return b, a
        rest = self.w - b @ a
        whitened = self.solver.residual_metric == "whitened"
        more_b, more_a = whitened_svd(rest, self.gram).at(second) if whitened else truncate(rest, second)
        return torch.cat([b, more_b], 1), torch.cat([a, more_a])

    def __getitem__(self, rank):  # type: ignore[override]
        if not 0 <= rank <= self.full:
            raise IndexError(rank)
        if rank == self.full:
            return 0.0
        b, a = self.factors(rank)
        error = self.w - b @ a
        return float(((error @ self.gram) * error).sum().clamp(min=0))


@dataclass(frozen=True)
class AnchoredSVD(LinearSVD):
    """Low-rank form against the compressed prefix's inputs x̂: min E‖y − B A x̂‖², y = (1 − a) W x̂ + a W x, x dense.

    With G = E[x̂ x̂ᵀ] and H = E[y x̂ᵀ] = (1 − a) W G + a W E[x x̂ᵀ]:
    `fit` "closed": B A = [H L⁻ᵀ]_r L⁻¹ with L Lᵀ = G + μI, the optimum (AA-SVD's at a = 1, SVD-LLM's at a = 0);
    "alternating": from SVD-LLM's factors on the dense inputs, B ← H' Aᵀ (A G' Aᵀ)⁻¹, then A ← B⁺ H' G'⁻¹, with
    G' = G + μI and H' = H + μW: both steps lower E‖y − B A x̂‖² + μ‖W − B A‖². μ = `damping` · mean diag G.
    Predicted loss: E‖y − B A x̂‖² of every rank; for "alternating", of a rank when asked for.

    Reference: MPIFA (arXiv 2501.19090) for the mixed target and the steps; AA-SVD (arXiv 2604.02119) for the optimum.
    Differs from MPIFA's code: μ is relative and part of both steps (theirs is absolute, and in the second only).
    """

    name: ClassVar[str] = "anchored-svd"
    anchor: float = 1.0
    fit: Literal["closed", "alternating"] = "closed"
    damping: float = 1e-3

    def memory(self, unit: Unit, shape: Shape) -> int:
        out, n = shape.linear(unit.name)
        return 8 * n * n + 6 * out * n + 6 * min(out, n) ** 2

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        site = input_site(unit.name)
        return [Tap(f"dense:{site}", "gram"), Tap(site, "gram"), Tap(f"dense:{site}", "cross", site)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w = weights[unit.name].double()
        dense, own, cross = (stats.mean(t) for t in self.taps(unit, shape))
        problem = Anchored(w, dense, own, cross, self.anchor, self.damping)
        losses = problem.losses() if self.fit == "closed" else AlternatingLosses(problem)
        return Frontier(unit, losses, {"problem": problem})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        problem = frontier.factors["problem"]
        b, a = problem.optimum(rank) if self.fit == "closed" else problem.factors(rank)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]


class Anchored(LastRank):
    """One linear's problem min E‖y − B A x̂‖²; see `AnchoredSVD`. Arguments are mean second moments, `cross` E[x x̂ᵀ]."""

    def __init__(
        self,
        w: Float[Tensor, "out in"],
        dense: Float[Tensor, "in in"],
        own: Float[Tensor, "in in"],
        cross: Float[Tensor, "in in"],
        anchor: float,
        damping: float,
    ):
        self.w, self.dense, self.own = w, dense, own
        self.target = w @ ((1 - anchor) * own + anchor * cross)  # H (out, in)
        mixed = (1 - anchor) ** 2 * own + anchor * (1 - anchor) * (cross + cross.T) + anchor**2 * dense
        self.energy = float(((w @ mixed) * w).sum())  # E‖y‖²
        self.drift = anchor**2 * ((dense - cross) + (own - cross.T))  # of y − W x̂ = a W (x − x̂)
        self.damped = damp(own, damping)  # G'
        level = float(self.damped.diagonal().sum() - own.diagonal().sum()) / len(own)
        self.damped_target = self.target + level * w  # H'

    def error(self, b: Float[Tensor, "out r"], a: Float[Tensor, "r in"]) -> float:
        """E‖y − B A x̂‖²."""
        inner = (b.T @ b) * (a @ self.own @ a.T)
        return max(0.0, float(self.energy - 2 * ((b.T @ self.target) * a).sum() + inner.sum()))

    def dense_error(self) -> float:
        """E‖y − W x̂‖²: what staying dense leaves."""
        return max(0.0, float(((self.w @ self.drift) * self.w).sum()))

    @cached_property
    def low(self) -> LowRank:
        """All ranks' optima of the damped problem."""
        factor = root(self.damped, 0.0)
        u, s, vh = svd(torch.linalg.solve_triangular(factor, self.damped_target.T, upper=False).T)
        a = torch.linalg.solve_triangular(factor, vh, upper=False, left=False)
        return LowRank(u * s, a, s)

    def losses(self) -> Float[Tensor, " ranks"]:
        """E‖y − B A x̂‖² of the optimum at every rank: (k + 1,)."""
        low = self.low
        ga = low.A @ self.own
        inner = (ga @ low.A.T) * (low.B.T @ low.B)
        pairs = torch.tril(inner, -1).sum(1) * 2 + inner.diagonal()
        steps = pairs - 2 * ((low.B.T @ self.target) * low.A).sum(1)
        errors = torch.cat([steps.new_zeros(1), steps.cumsum(0)]).add(self.energy).clamp(min=0)
        errors[-1] = self.dense_error()
        return errors

    def optimum(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """B (out, rank), A (rank, in)."""
        return self.low.B[:, :rank], self.low.A[:rank]

    @cached_property
    def start(self) -> LowRank:
        """SVD-LLM's factors on the dense inputs."""
        return whitened_svd(self.w, self.dense)

    def find(self, rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """One least-squares step for B and one for A from `start`."""
        a = self.start.A[:rank]
        b = least_squares(a @ self.damped @ a.T, self.damped_target @ a.T)
        q = torch.linalg.qr(b).Q  # B A = Q Qᵀ H' G'⁻¹: the projection does not depend on B's scale
        return q, solve(self.damped, self.damped_target.T @ q, 0.0).T


class AlternatingLosses(Sequence[float]):
    """E‖y − B A x̂‖² after the alternating steps, computed when asked for; the full rank stays dense."""

    def __init__(self, problem: Anchored):
        self.problem = problem

    def __len__(self) -> int:
        return min(self.problem.w.shape) + 1

    def __getitem__(self, rank):  # type: ignore[override]
        if not 0 <= rank < len(self):
            raise IndexError(rank)
        if rank == len(self) - 1:
            return self.problem.dense_error()
        return self.problem.error(*self.problem.factors(rank))
