"""Plain truncated SVD of every linear: the baseline of baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.core import Solver
from planish.methods.method import Method
from planish.solvers.linear import LinearSVD


@dataclass(frozen=True)
class SVD(Method):
    """Truncated SVD of the weights: the baseline of baselines, which sees no text.

    Problem: the matrix of rank r nearest to W.

    Equation: W̃ = U_r Σ_r V_rᵀ (Eckart and Young; `planish.solvers.linear.LinearSVD.decompose`).

    `form`: "pair" or "pivoted".
    """

    title: ClassVar[str] = "truncated SVD of the weights"
    reference: ClassVar[str] = "Eckart & Young, 1936"

    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="plain", form=self.form)]
