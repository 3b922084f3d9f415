"""Low-rank linears chosen in predicted nats: two-sided whitening by input moments and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Tokens, Unit, Weights
from planish.shapes import Float
from planish.solvers.forms import input_site, list_ranks, low_rank_edit, low_rank_spec
from planish.solvers.linalg import anchor, metric_svd, multiply, solve
from planish.solvers.noise import NONE, Noise, add_noise
from planish.stats import Stats, Tap

ALONE = ("o", "down")


@dataclass(frozen=True)
class TwoSided(Solver):
    """Each linear W becomes B A, min ½ tr(G (W − BA) R (W − BA)ᵀ): R = E[x xᵀ], G = E[g gᵀ], g = ∂ΣNLL/∂(W x) for
    labels sampled from the model (true Fisher). With gᵀ(W − BA)x small and g, x independent this is the increase of
    the loss in nats per token. SVD of G^½ W R^½; predicted loss ½ Σ_{i>r} σ_i². Of a tall W only Wᵀ G W (in, in) is needed.

    `anchor` > 0 (needs the dense prefix beside the compressed one): the target becomes (1 − a) W x̂ + a W x, x̂ the
    compressed prefix's inputs: W is replaced by its regression on x̂, R by E[x̂ x̂ᵀ], before the SVD.
    `noise`: beside R and G (`planish.solvers.noise.Noise`); it is part of the predicted loss.
    Reference: K-FAC's factorisation of the Fisher for the metric; PIFA (arXiv 2501.19090) for the form and the mixed
    target; AA-SVD (arXiv 2604.02119) for the anchored objective.
    """

    name: ClassVar[str] = "two-sided"
    form: Literal["pair", "pivoted"] = "pivoted"
    anchor: float = 0.0
    ridge: float = 1e-3
    noise: Noise = NONE
    by_tokens: bool = False

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, r) for r in shape.linears]

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return list_ranks(shape.linear(unit.name), self.form)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return low_rank_spec(unit.name, shape, self.form, rank)

    def metric_tap(self, unit: Unit, shape: Shape) -> Tap:
        """G (out, out), or of a tall W the same seen from its input."""
        out, n = shape.linear(unit.name)
        return Tap(f"grad:{unit.name}.{'back' if out > n and unit.name not in ALONE else 'out'}", "gram")

    def cross_tap(self, unit: Unit) -> Tap:
        """E[x x̂ᵀ], or E[W x x̂ᵀ] of a linear that shares its input with none."""
        site = input_site(unit.name)
        return Tap(f"dense:{unit.name}.product" if unit.name in ALONE else f"dense:{site}", "cross", site)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        if not self.anchor:
            return self.dense_taps(unit, shape)
        return [Tap(input_site(unit.name), "gram"), self.cross_tap(unit), self.metric_tap(unit, shape)]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap(f"dense:{input_site(unit.name)}", "gram"), self.metric_tap(unit, shape)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w, site = weights[unit.name].double(), input_site(unit.name)
        metric, own = self.metric_tap(unit, shape), Tap(site, "gram")
        back, gradient = metric.site.endswith(".back"), stats.mean(metric)
        behind = bool(self.anchor) and own in stats.sums
        along = multiply(w.T, w) if back else None
        gradient = add_noise(gradient, self.noise.find(stats, metric, behind), along)
        if not behind:
            own = Tap(f"dense:{site}", "gram")
            gram = add_noise(stats.mean(own), self.noise.find(stats, own, behind))
            low = metric_svd(w, gram, gradient, back)
            return Frontier(unit, low.tails() / 2, {"low": low}, nats=True)
        gram, moved = stats.mean(own), stats.mean(self.cross_tap(unit))
        noise = self.noise.find(stats, own, behind)
        ridge = max(self.ridge, noise)
        if unit.name in ALONE:
            target = (1 - self.anchor) * multiply(w, gram) + self.anchor * moved + ridge * gram.diagonal().mean() * w
            moved_w = solve(gram, target.T, ridge).T
        else:
            change = anchor(gram, moved, self.anchor, ridge)  # W is replaced by W K
            moved_w = multiply(w, change)
            gradient = multiply(change.T, multiply(gradient, change)) if back else gradient
        low = metric_svd(moved_w, add_noise(gram, noise), gradient, back)
        return Frontier(unit, low.tails() / 2, {"low": low}, nats=True)

    def effect_role(self, unit: Unit) -> str | None:
        return unit.name if self.by_tokens else None

    def effects(
        self, frontier: Frontier, ranks: Sequence[int], tokens: Tokens, shape: Shape
    ) -> Float[Tensor, "ranks tokens"]:
        """What factors beyond a rank do: (gᵀ B) ∘ (A x), summed from there on."""
        low = frontier.factors["low"]
        x, g = tokens
        parts = multiply(x, low.A.to(x.dtype).T) * multiply(g, low.B.to(g.dtype))
        return -torch.stack([parts[:, rank:].sum(1) for rank in ranks])

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["low"].at(rank)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]


@dataclass(frozen=True)
class ShrunkTwoSided(TwoSided):
    """`TwoSided` with moments that noise and a few tokens change less: G of window interiors and clamped tokens
    (`planish.stats.clamped_gram`), R and G drawn towards the mean of their diagonals.

    R' = (1 − a) R + a μ(R) I and G' likewise with b, μ = mean of the diagonal, a = `shrink_in`, b = `shrink_out`. Of a tall W
    Wᵀ G' W = (1 − b) Wᵀ G W + b μ(G) Wᵀ W, μ(G) = E|g|² / out. Predicted loss: ½ Σ_{i>r} σ_i² of G'^½ W R'^½, which is no
    error that could be measured.
    Reference: KFAC-SVD (arXiv 2610.32878).
    """

    name: ClassVar[str] = "shrunk-two-sided"
    exempt: ClassVar[dict[str, str]] = {"exact": "the moments are shrunk: their errors are not those of the text"}
    form: Literal["pair", "pivoted"] = "pair"
    shrink_in: float = 0.1
    shrink_out: float = 0.3

    def metric_tap(self, unit: Unit, shape: Shape) -> Tap:
        return Tap(super().metric_tap(unit, shape).site, "clamped_gram", f"grad:{unit.name}.out")

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w, metric = weights[unit.name].double(), self.metric_tap(unit, shape)
        gram = shrink(stats.mean(Tap(f"dense:{input_site(unit.name)}", "gram")), self.shrink_in)
        count = stats.mean(metric, "count")
        gradient, level = stats.mean(metric) / count, float(stats.mean(metric, "energy") / count) / len(w)
        back = metric.site.endswith(".back")
        toward = multiply(w.T, w) if back else None
        low = metric_svd(w, gram, shrink(gradient, self.shrink_out, level, toward), back)
        return Frontier(unit, low.tails() / 2, {"low": low}, nats=True)


def shrink(
    gram: Float[Tensor, "n n"], share: float, level: float | None = None, toward: Float[Tensor, "n n"] | None = None
) -> Float[Tensor, "n n"]:
    """(1 − share) gram + share · level · toward: of the mean of its diagonal and the identity, unless told."""
    level = float(gram.diagonal().mean()) if level is None else level
    out = (1 - share) * gram
    if toward is None:
        out.diagonal().add_(share * level)
        return out
    return out.add_(toward, alpha=share * level)
