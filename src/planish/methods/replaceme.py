"""ReplaceMe: a window of blocks goes; a linear map folded into the down projection before it takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from planish import lanes
from planish.core import Plan, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.removal import check_foldable, compare_windows, fit_window, make_plan, remove_blocks
from planish.solvers.bypass import Bypass
from planish.solvers.window import fit_cosine, fit_map_held_out, fold_edit

if TYPE_CHECKING:
    from planish.job import Job


@dataclass(frozen=True)
class ReplaceMe(Method):
    """Window: the least angle between input and output. Map T behind the feed-forward of the block before it:
    M T + (h_mid) ≈ h_end, M that feed-forward's output, by least squares, or by Adam on the cosine as published.

    The result is the stock architecture with fewer blocks. Differs from the public code: no padding enters anything;
    the window's output is never the normed one; λ is chosen on held-out sequences (`ridge` fixes it) and solved by
    Cholesky; all tokens count in the choice of the window, which is made on `windows` sequences.
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

    def plan(self, job: Job) -> Plan:
        check_foldable(job, "replaceme")
        if self.objective == "cosine" and lanes.count() > 1:
            raise InputError("replaceme: objective=cosine runs in one process only")
        n = remove_blocks(job, self.sparsity)
        if n == 0:
            return make_plan(job, [], self.sparsity)
        angles = compare_windows(job, n, self.windows, "angle")
        start = min((a for a in angles if a > 0), key=lambda a: angles[a])
        job.notes["window"] = {"first": start, "last": start + n - 1, "angles": angles}
        window = fit_window(job, start - 1, start + n - 1, "mlp.add", store=self.objective == "cosine")
        if self.objective == "cosine":
            t = fit_cosine(torch.cat(window.x), torch.cat(window.f), self.epochs, self.rate)
        else:
            t, job.notes["ridge"] = fit_map_held_out(window.train, window.held, self.ridge)
        job.edits = {start - 1: [fold_edit(window.weights, t)]}
        gone = range(start, start + n)
        return make_plan(job, [Unit(i, name) for i in gone for name in ("attention", "ffn")], self.sparsity)
