"""MPIFA: whitened SVD, refitted to a mixed dense and compressed target, in pivoted form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method, stage_roles
from planish.modelling.blocks import get_linear
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.forms import input_site
from planish.solvers.linear import AnchoredSVD
from planish.stats import Tap


@dataclass(frozen=True)
class MPIFA(Method):
    """Whitened low-rank linears, refitted towards the dense output, stored as pivot rows and coefficients.

    Problem: inside a block q, k, v → o → gate, up → down, each linear reads inputs x̂ that earlier cuts changed. Find
    W̃ = B A of rank r with the least E‖y − B A x̂‖², y = (1 − a) W x̂ + a W x, x the dense inputs.

    Equation: from SVD-LLM's factors, B ← H Aᵀ (A G Aᵀ)⁻¹, then A ← B⁺ (H + μW)(G + μI)⁻¹, with G = E[x̂ x̂ᵀ], H = E[y x̂ᵀ]
    (the M of MPIFA, `planish.solvers.linear.Anchored`). PIFA stores r rows of B A and the coefficients of the others,
    r(m + n − r) numbers, without loss (`planish.solvers.pivots.pivot`).

    `anchor`: the dense inputs' share a. `damping`: μ, relative. `attention_keep`: keep of the attention's linears, the MLP's
    follows from the budget (default: the same). `allocation`: "uniform", or "outliers": keep of a block rises with its share of
    weights whose |w| ‖x‖ is far above the linear's mean (OWL, which the paper's "NS" variant takes as a table of constants).
    `threshold`: how many times the mean counts as far above. `spread`: keeps of blocks lie within ± this. `form`: "pivoted"
    or "pair".

    Differs from the repository: ranks are not padded to multiples of 16 (which exceeds the budget); any family; μ is
    relative and part of both steps, see `planish.solvers.linear.AnchoredSVD`.
    """

    title: ClassVar[str] = "whitened SVD refitted to a mixed target, pivoted linears"
    reference: ClassVar[str] = "PIFA / MPIFA, arXiv 2501.19090; OWL, arXiv 2310.05175"
    prefix: ClassVar[str] = "both"
    shares: ClassVar[tuple[str, ...]] = ("anchor", "attention_keep", "spread")
    dampings: ClassVar[tuple[str, ...]] = ("damping",)

    anchor: float = 0.25
    damping: float = 1e-3
    attention_keep: float | None = None
    allocation: Literal["uniform", "outliers"] = "uniform"
    threshold: float = 5.0
    spread: float = 0.08
    form: Literal["pair", "pivoted"] = "pivoted"

    def solvers(self) -> list[Solver]:
        return [AnchoredSVD(anchor=self.anchor, fit="alternating", damping=self.damping, form=self.form)]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        return stage_roles(units)

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        attention = mlp = problem.keep
        if self.attention_keep is not None:
            of_attention = sum(problem.main.uncut(s, r) for s in problem.shapes for r in "qkvo")
            scores = sum(problem.main.fixed(s, u, problem.shapes[u.block]) for u, s in problem.units.items())
            attention = self.attention_keep
            kept = scores + attention * (of_attention - scores)
            mlp = (problem.keep * problem.main.total - kept) / (problem.main.total - of_attention)
            if not (0 < attention <= 1 and 0 < mlp <= 1):
                raise InputError(
                    f"attention_keep={attention:g} at keep {problem.keep:g} leaves {mlp:.3f} of the MLP; "
                    f"both must lie in (0, 1]"
                )
        found = self.outliers(problem, measure) if self.allocation == "outliers" else {}
        extra = self.raise_keeps(found) if found else {}
        share = {True: attention, False: mlp}
        ranks = problem.spread(lambda u: min(1.0, max(0.01, share[u.name in "qkvo"] + extra.get(u.block, 0.0))))
        return self.decide(problem, ranks, notes={"outliers": found} if found else {})

    def outliers(self, problem: Problem, measure: Measurements) -> dict[int, float]:
        """Each block's share of weights that count as outliers."""
        found: dict[int, float] = {}
        for i, block, stats in measure.forward(
            lambda shape: sorted({Tap(input_site(r), "squares") for r in shape.linears})
        ):
            large = total = 0
            for role in problem.shapes[i].linears:
                w = get_linear(block, measure.stream.family, role).weight.detach().double().abs()
                size = w * stats.mean(Tap(input_site(role), "squares")).sqrt()
                large += int((size > self.threshold * size.mean()).sum())
                total += size.numel()
            found[i] = large / total
        return found

    def raise_keeps(self, found: dict[int, float]) -> dict[int, float]:
        """What each block's keep is raised by: its share of outliers, scaled to ± `spread` around the mean."""
        width = max(found.values()) - min(found.values())
        scaled = {i: 2 * self.spread * (x - min(found.values())) / width if width else 0.0 for i, x in found.items()}
        mean = sum(scaled.values()) / len(scaled)
        return {i: x - mean for i, x in scaled.items()}
