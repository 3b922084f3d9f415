"""LLM-ROM: the outputs of the last blocks' linears projected onto their own principal directions, one linear after the other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf
from typing import ClassVar, Literal

import numpy as np

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method, stage_roles
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.linear import LinearSVD

KEEPS, SHARES = (
    (0.0, 0.5, 0.8, 0.9, 1.0),
    (1.0, 0.75, 0.375, 0.25, 0.0),
)  # the paper's: shares of the blocks that are cut


@dataclass(frozen=True)
class LLMROM(Method):
    """Only the last blocks are cut, linear by linear: what each puts out is projected onto its principal directions.

    Problem: the subspace of r dimensions that what a linear puts out, on inputs that the linears cut before it have changed,
    leaves least.

    Equation: V_r the top eigenvectors of E[y yᵀ], y = W x̂; W̃ = V_r (V_rᵀ W). It is the truncation of W E[x̂ x̂ᵀ]^½
    (`planish.solvers.linear.LinearSVD`).

    `blocks`: how many of the last blocks are cut, all to the same share; 0: by the paper's own, 8, 12 and 24 of 32 at keep 0.9,
    0.8 and 0.5, in between on straight lines, and as many as it takes. `form`: "pair" or "pivoted".

    Differs from the paper: second moments are not centred, so that no bias is added (the paper's are covariances).
    """

    title: ClassVar[str] = "principal directions of what each linear of the last blocks puts out"
    reference: ClassVar[str] = "LLM-ROM, arXiv 2312.07046"
    prefix: ClassVar[str] = "compressed"

    blocks: int = 0
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="whitened", form=self.form)]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        return stage_roles(units)

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        n = len(problem.shapes)
        least = floor(n * (1 - problem.keep) + 1e-9) + 1 if problem.keep < 1 else 0
        if self.blocks and not least <= self.blocks <= n:
            raise InputError(
                f"llm-rom: the last {self.blocks} of {n} blocks cannot give up {1 - problem.keep:.3g} of all weights: blocks must "
                f"lie in {least} … {n}"
            )
        wanted = self.blocks or ceil(n * float(np.interp(problem.keep, KEEPS, SHARES)) - 1e-9)
        for count in range(min(max(wanted, least), n), n + 1):
            first = n - count
            try:
                ranks = problem.spread(lambda unit, first=first: 1.0 if unit.block >= first else inf)  # type: ignore[misc]
            except InputError:
                if self.blocks or count == n:
                    raise
                continue  # rounding of ranks leaves no room for so few blocks
            return self.decide(problem, ranks, notes={"blocks": count})
        raise AssertionError("spread gives ranks or raises")
