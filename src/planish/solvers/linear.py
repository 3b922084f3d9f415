"""Low-rank forms of single linears: plain, diagonally scaled, whitened and two-stage truncated SVD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Unit, Weights
from planish.linalg import LowRank, least_squares, pivot, svd, whitened_svd
from planish.stats import Stats, Tap

Metric = Literal["plain", "diagonal", "whitened"]


def input_site(role: str) -> str:
    """Linears that read the same input share its statistics."""
    return {"q": "q.in", "k": "q.in", "v": "q.in", "gate": "up.in", "up": "up.in"}.get(role, f"{role}.in")


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
        return [Unit(shape.block, r) for r in shape.roles if not self.roles or r in self.roles]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        out, n = shape.linear(unit.name)
        full = min(out, n)
        if self.form == "pivoted":
            return range(1, full + 1)
        below = (out * n - 1) // (out + n)  # largest rank whose pair is smaller than the dense weight
        return [*range(1, min(below, full - 1) + 1), full]

    def cost(self, unit: Unit, shape: Shape, rank: int) -> int:
        out, n = shape.linear(unit.name)
        if rank >= min(out, n):
            return out * n
        return rank * (out + n - rank) if self.form == "pivoted" else rank * (out + n)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        site = input_site(unit.name)
        if self.update:
            return [Tap(f"dense:{site}", "gram"), Tap(site, "gram"), Tap(f"dense:{site}", "cross", site)]
        return [Tap(site, "gram")] + ([Tap(site, "magnitudes")] if self.metric == "diagonal" else [])

    def gram_tap(self, unit: Unit) -> Tap:
        return Tap(("dense:" if self.update else "") + input_site(unit.name), "gram")

    def factorise(self, unit: Unit, w: Tensor, stats: Stats) -> LowRank:
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
        factors = {"B": low.B, "A": low.A}
        if self.update:
            site = input_site(unit.name)
            factors["gram"] = stats.mean(Tap(site, "gram"))
            factors["target"] = w @ stats.mean(Tap(f"dense:{site}", "cross", site))
        return Frontier(unit, loss, factors)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["B"][:, :rank], frontier.factors["A"][:rank]
        if self.update:
            b = least_squares(a @ frontier.factors["gram"] @ a.T, frontier.factors["target"] @ a.T)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]


def output_errors(w: Tensor, low: LowRank, gram: Tensor) -> Tensor:
    """E‖(W − B_r A_r) x‖² for every rank r = 0 … k from gram = E[x xᵀ]: (k + 1,).

    With E_r = W − B_r A_r and P = W C, each step costs one rank-one update of tr(E C Eᵀ).
    """
    ca = low.A @ gram.double()  # (k, in)
    cross = (low.B * (w @ ca.T)).sum(0)  # b_iᵀ W C a_i
    inner = (ca @ low.A.T) * (low.B.T @ low.B)  # ⟨i, j⟩ in the metric
    start = ((w @ gram.double()) * w).sum()
    pairs = torch.tril(inner, -1).sum(1) * 2 + inner.diagonal()
    return torch.cat([start[None], start + (pairs - 2 * cross).cumsum(0)]).clamp(min=0)


def low_rank_edit(role: str, b: Tensor, a: Tensor, form: str) -> Edit:
    """Edit that gives `role` the weight B A in the given form."""
    rank = a.shape[0]
    if form == "pair":
        u, r = torch.linalg.qr(b)  # balance the factors: Uᵀ U = I up to √σ on both sides
        left, s, vh = svd(r @ a)
        return Edit(role, {"kind": "pair", "rank": rank}, {"B.weight": (u @ left) * s.sqrt(), "A.weight": s.sqrt()[:, None] * vh})
    p = pivot(b, a)
    rest = torch.ones(b.shape[0], dtype=torch.bool)
    rest[p.pivots] = False
    order = torch.empty(b.shape[0], dtype=torch.int32)
    order[torch.cat([p.pivots, rest.nonzero()[:, 0]])] = torch.arange(b.shape[0], dtype=torch.int32)
    return Edit(
        role, {"kind": "pivoted", "rank": rank}, {"P.weight": p.base, "C.weight": p.coefficients, "order": order}
    )
