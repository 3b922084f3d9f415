"""Low-rank linears chosen in predicted nats: two-sided whitening by input moments and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.core import Edit, Frontier, Shape, Solver, Unit, Weights
from planish.edits import input_site, low_rank_edit
from planish.linalg import solve, whitened_svd
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class TwoSided(Solver):
    """Each linear W becomes B A, min ½ tr(G (W − BA) R (W − BA)ᵀ): R = E[x xᵀ], G = E[g gᵀ], g = ∂ΣNLL/∂(W x) for
    labels sampled from the model (true Fisher). With gᵀ(W − BA)x small and g, x independent this is the increase of
    the loss in nats per token. SVD of G^½ W R^½; predicted loss ½ Σ_{i>r} σ_i².

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
        out, n = shape.linear(unit.name)
        if self.form == "pivoted":
            return range(1, min(out, n) + 1)
        return [*range(1, min((out * n - 1) // (out + n), min(out, n) - 1) + 1), min(out, n)]

    def cost(self, unit: Unit, shape: Shape, rank: int) -> int:
        out, n = shape.linear(unit.name)
        if rank >= min(out, n):
            return out * n
        return rank * (out + n - rank) if self.form == "pivoted" else rank * (out + n)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        site = input_site(unit.name)
        taps = [Tap(f"dense:{site}", "gram"), Tap(f"grad:{unit.name}.out", "gram")]
        if self.anchor:
            taps += [Tap(site, "gram"), Tap(f"dense:{site}", "cross", site)]
        return taps

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w, site = weights[unit.name].double(), input_site(unit.name)
        gradient = stats.mean(Tap(f"grad:{unit.name}.out", "gram"))
        gram = stats.mean(Tap(f"dense:{site}", "gram"))
        own = Tap(site, "gram")
        if self.anchor and own in stats.sums:
            gram = stats.mean(own)
            moved = stats.mean(Tap(f"dense:{site}", "cross", site))  # E[x x̂ᵀ]
            level = self.ridge * gram.diagonal().mean()
            target = w @ ((1 - self.anchor) * gram + self.anchor * moved)
            w = solve(gram, (target + level * w).T, self.ridge).T
        low = whitened_svd(w, gram, gradient)
        return Frontier(unit, low.tails() / 2, {"B": low.B, "A": low.A}, nats=True)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= min(shape.linear(frontier.unit.name)):
            return []
        b, a = frontier.factors["B"][:, :rank], frontier.factors["A"][:rank]
        return [low_rank_edit(frontier.unit.name, b, a, self.form)]
