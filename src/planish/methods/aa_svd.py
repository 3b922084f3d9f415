"""AA-SVD: every linear truncated against the dense output, given the compressed prefix's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.core import Solver, Unit
from planish.methods.method import Method, stage_roles
from planish.solvers.linear import AnchoredSVD


@dataclass(frozen=True)
class AASVD(Method):
    """Every linear truncated against the dense model's output, on the inputs that the compressed model gives it.

    Problem: a linear behind compressed blocks reads x̂ where the dense model reads x. Find the low-rank W̃ whose output on
    x̂ is nearest to the dense output: min over rank r of E‖W x − W̃ x̂‖².

    Equation: with G = E[x̂ x̂ᵀ], H = E[W x x̂ᵀ] and L Lᵀ = G: W̃ = [H L⁻ᵀ]_r L⁻¹ (`planish.solvers.linear.AnchoredSVD`).

    `anchor`: below 1 mixes W x̂ into the target. `damping`: relative; pulls towards W. `order`: "role": statistics are
    measured again between q, k, v → o → gate, up → down; "block": once per block. `form`: "pair" or "pivoted".

    Differs from the repository: damping is relative and pulls towards W; the optional 25 passes of gradient descent per
    block are left out.
    """

    title: ClassVar[str] = "low-rank linears anchored to the dense outputs, closed form"
    reference: ClassVar[str] = "AA-SVD, arXiv 2604.02119"
    prefix: ClassVar[str] = "both"
    shares: ClassVar[tuple[str, ...]] = ("anchor",)
    dampings: ClassVar[tuple[str, ...]] = ("damping",)

    anchor: float = 1.0
    damping: float = 1e-3
    order: Literal["role", "block"] = "role"
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [AnchoredSVD(anchor=self.anchor, damping=self.damping, form=self.form)]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        return stage_roles(units) if self.order == "role" else [units]
