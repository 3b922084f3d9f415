"""A fitted affine map in place of a whole submodule, chosen and measured in predicted nats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.solvers.forms import bypass_form
from planish.solvers.linalg import damp, solve, whitened_svd
from planish.stats import Stats, Tap

PARTS = {"attention": ("attention", "q.in"), "ffn": ("mlp", "up.in")}  # unit → edit's target, the site that it reads


@dataclass(frozen=True)
class FisherBypass(Solver):
    """A submodule's contribution f(x) becomes ν + (x − μ) U, rank U = r: reduced-rank regression in the metric G.

    x is the submodule's normed input. Predicted loss ½ (tr(G Σ_f|x) + Σ_{i>r} σ_i²), σ of G^½ C S^-½, with C = Cov(f, x),
    S = Cov(x), Σ_f|x what no linear map explains. Ranks 0 … d/2 − 1; d, one matrix (in between two factors hold more than
    that); the last one, d + 1, leaves the submodule.

    `anchor` > 0 (needs the dense prefix beside the compressed one): fitted on the compressed prefix's inputs x̂ towards
    (1 − a) f(x̂) + a f(x), f the uncompressed submodule; nothing is predicted then.
    Reference: SubFit (arXiv 2606.02559) and NBL (arXiv 2505.21077) for the form; the metric is ours.
    """

    name: ClassVar[str] = "fisher-bypass"
    damping: float = 1e-4
    anchor: float = 0.0

    def units(self, shape: Shape) -> list[Unit]:
        parts = [
            n for n in PARTS if n != "attention" or not shape.stays
        ]  # one has to stay, whose cache knows positions
        parts = [n for n in parts if n != "ffn" or not shape.experts]  # which read the same norm
        return [Unit(shape.block, name) for name in parts if shape.held(name)]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return [*range((shape.hidden + 1) // 2), shape.hidden, shape.hidden + 1]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        if rank > shape.hidden:
            return {}
        return {PARTS[unit.name][0]: bypass_form(rank, shape.hidden, gate=False, raw=False)}

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        if not self.anchor:
            return self.dense_taps(unit, shape)
        target, site = PARTS[unit.name]
        add = f"{target}.add"
        return [Tap(site, "moments", add), Tap(site, "moments", f"dense:{add}"), Tap(f"grad:{add}", "gram")]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        target, site = PARTS[unit.name]
        add = f"{target}.add"
        return [
            Tap(f"dense:{site}", "moments", f"dense:{add}"),
            Tap(f"dense:{add}", "gram"),
            Tap(f"grad:{add}", "gram"),
        ]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        found, cross, gradient = self.taps(unit, shape)
        own: Tap | None = None
        if not self.anchor or found not in stats.sums:
            found, own, gradient = self.dense_taps(unit, shape)
        mu, nu, xf = (stats.mean(found, n) for n in ("x", "f", "xf"))
        if own is None:
            nu = (1 - self.anchor) * nu + self.anchor * stats.mean(cross, "f")
            xf = (1 - self.anchor) * xf + self.anchor * stats.mean(cross, "xf")
        s = damp(stats.mean(found, "xx") - mu.outer(mu), self.damping)
        c = xf.T - nu.outer(mu)  # (out, in)
        w = solve(s, c.T, 0.0).T
        metric = stats.mean(gradient)
        if own is None:
            low = whitened_svd(w, s, metric)
            unknown = torch.full((shape.hidden + 2,), torch.nan, dtype=torch.float64)
            return Frontier(unit, unknown, {"B": low.B, "A": low.A, "mu": mu, "nu": nu}, nats=True)
        unexplained = stats.mean(own) - nu.outer(nu) - w @ s @ w.T
        floor = (metric * unexplained).sum().clamp(min=0)
        low = whitened_svd(w, s, metric)
        tails = (low.tails() + floor) / 2
        loss: Tensor = tails.new_zeros(shape.hidden + 2)
        loss[: len(tails)] = tails
        loss[-1] = 0
        return Frontier(unit, loss, {"B": low.B, "A": low.A, "mu": mu, "nu": nu}, nats=True)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank > shape.hidden:
            return []
        f = frontier.factors
        b, a = f["B"][:, :rank], f["A"][:rank]
        target, form = PARTS[frontier.unit.name][0], bypass_form(rank, shape.hidden, gate=False, raw=False)
        tensors = {"shift": f["nu"] - b @ (a @ f["mu"])}
        if rank:
            tensors |= {"V.weight": a, "W.weight": b} if form["factored"] else {"V.weight": b @ a}
        return [Edit(target, form, tensors)]
