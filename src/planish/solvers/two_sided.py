"""Low-rank linears chosen in predicted nats: two-sided whitening by input moments and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.solvers.forms import input_site, list_ranks, low_rank_edit, low_rank_spec
from planish.solvers.linalg import metric_svd, multiply, solve
from planish.stats import Stats, Tap

ALONE = ("o", "down")


@dataclass(frozen=True)
class TwoSided(Solver):
    """Each linear W becomes B A, min ½ tr(G (W − BA) R (W − BA)ᵀ): R = E[x xᵀ], G = E[g gᵀ], g = ∂ΣNLL/∂(W x) for
    labels sampled from the model (true Fisher). With gᵀ(W − BA)x small and g, x independent this is the increase of
    the loss in nats per token. SVD of G^½ W R^½; predicted loss ½ Σ_{i>r} σ_i². Of a tall W only Wᵀ G W (in, in) is needed.

    `anchor` > 0 (needs the dense prefix beside the compressed one): the target becomes (1 − a) W x̂ + a W x, x̂ the
    compressed prefix's inputs: W is replaced by its regression on x̂, R by E[x̂ x̂ᵀ], before the SVD.
    Reference: K-FAC's factorisation of the Fisher for the metric; PIFA (arXiv 2501.19090) for the form and the mixed
    target; AA-SVD (arXiv 2604.02119) for the anchored objective.
    """

    name: ClassVar[str] = "two-sided"
    form: Literal["pair", "pivoted"] = "pivoted"
    anchor: float = 0.0
    ridge: float = 1e-3

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, r) for r in shape.roles]

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
        if not self.anchor or own not in stats.sums:
            low = metric_svd(w, stats.mean(Tap(f"dense:{site}", "gram")), gradient, back)
            return Frontier(unit, low.tails() / 2, {"low": low}, nats=True)
        gram, moved = stats.mean(own), stats.mean(self.cross_tap(unit))
        level = self.ridge * gram.diagonal().mean()
        if unit.name in ALONE:
            target = (1 - self.anchor) * multiply(w, gram) + self.anchor * moved + level * w
            moved_w = solve(gram, target.T, self.ridge).T
        else:
            mixed = (1 - self.anchor) * gram + self.anchor * moved
            mixed.diagonal().add_(level)
            change = solve(gram, mixed.T, self.ridge).T  # W is replaced by W K
            moved_w = multiply(w, change)
            gradient = multiply(change.T, multiply(gradient, change)) if back else gradient
        low = metric_svd(moved_w, gram, gradient, back)
        return Frontier(unit, low.tails() / 2, {"low": low}, nats=True)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["low"].at(rank)
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]
