"""ASVD: SVD after scaling inputs by their mean magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.core import Method, Solver
from planish.solvers.linear import LinearSVD


@dataclass(frozen=True)
class ASVD(Method):
    """Inputs scaled by (mean |x|)^alpha. Differs from the repository: exact SVD instead of a randomised one."""

    title: ClassVar[str] = "activation-scaled truncated SVD of every linear"
    reference: ClassVar[str] = "ASVD, arXiv 2312.05821"

    alpha: float = 0.5

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="diagonal", power=self.alpha)]
