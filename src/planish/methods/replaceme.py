"""ReplaceMe: a window of blocks goes; a linear map folded into the down projection before it takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from planish import lanes
from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import check_foldable, compare_windows, fit_window, foresee_window, remove, remove_blocks
from planish.solvers.bypass import Bypass
from planish.solvers.window import fit_cosine, fit_map_held_out, fold_edit


@dataclass(frozen=True)
class ReplaceMe(Method):
    """A run of blocks goes; a linear map folded into the down projection before it takes its place.

    Problem: which n blocks in a row change the residual stream least, and which linear map of the feed-forward before them
    makes up for them?

    Equation: the window with the least angle between input and output; then T with the least E‖M T + h_mid − h_end‖² +
    λ‖T‖², M the output of the feed-forward before the window, h_mid the stream it is added to, h_end the window's output;
    W_down ← Tᵀ W_down (`planish.solvers.window.fit_map`, `planish.solvers.window.fold_edit`). The result is the stock
    architecture with fewer blocks.

    `sparsity`: share of the blocks that goes; otherwise `keep` decides. `objective`: "squares", or "cosine": E[1 − cos] by
    Adam, as published. `ridge`: λ, relative; 0 = chosen on held-out sequences. `epochs`: passes of Adam. `rate`: its step.
    `windows`: calibration sequences on which runs are compared.

    Differs from the public code: no padding enters anything; the window's output is never the normed one; solved by
    Cholesky; all tokens count in the choice of the window.
    """

    title: ClassVar[str] = "drop a window of blocks, fold a least-squares map into the down projection before it"
    reference: ClassVar[str] = "ReplaceMe, arXiv 2505.02819"
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    sparsity: float | None = None
    objective: Literal["squares", "cosine"] = "squares"
    ridge: float = 0.0
    epochs: int = 10
    rate: float = 1e-4
    windows: int = 16

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        check_foldable(measure.source.family, self.name)
        if self.objective == "cosine" and lanes.count() > 1:
            raise InputError("replaceme: objective=cosine runs in one process only")
        n, remarks = remove_blocks(problem, self.sparsity)
        if n == 0:
            return remove(self.decide(problem, {}, remarks=remarks), problem, [], self.sparsity)
        angles = compare_windows(measure, n, self.windows, "angle")
        start = min((a for a in angles if a > 0), key=lambda a: angles[a])
        notes: dict[str, Any] = {"window": {"first": start, "last": start + n - 1, "angles": angles}}
        window = fit_window(measure, start - 1, start + n - 1, "mlp.add", store=self.objective == "cosine")
        if self.objective == "cosine":
            t = fit_cosine(torch.cat(window.x), torch.cat(window.f), self.epochs, self.rate)
        else:
            t, notes["ridge"] = fit_map_held_out(window.train, window.held, self.ridge)
        edits = {start - 1: [fold_edit(window.weights, t)]}
        gone = [Unit(i, name) for i in range(start, start + n) for name in ("attention", "ffn")]
        return remove(self.decide(problem, {}, edits=edits, notes=notes, remarks=remarks), problem, gone, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        n, remarks = remove_blocks(problem, self.sparsity)
        planned = self.decide(problem, {}, remarks=remarks)
        return foresee_window(planned, problem, n, self.sparsity, min(self.windows, windows))
