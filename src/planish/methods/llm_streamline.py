"""LLM-Streamline, layer variant: one block stands for a window; here its down projection is fitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from planish.calibrate.measure import Measurements
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.removal import check_foldable, compare_windows, fit_window, foresee_window, remove, remove_blocks
from planish.solvers.bypass import Bypass
from planish.solvers.window import down_edit, fit_map_held_out


@dataclass(frozen=True)
class LLMStreamline(Method):
    """A run of blocks becomes its first block, refitted to the run's output.

    Problem: to remove n blocks, find the n + 1 in a row that change the residual stream least, and one light block that
    stands for them.

    Equation: the window with the highest E cos(h_j, h_{j + n + 1}); then the down projection of its first block by least
    squares towards the window's output, min over D of E‖h_mid + D x − h_end‖² + λ‖D‖², x the gated features, h_mid the
    stream before the feed-forward is added (`planish.solvers.window.fit_map`). The result is the stock architecture with
    fewer blocks.

    `sparsity`: share of the blocks that goes; otherwise `keep` decides. `ridge`: λ, relative; 0 = chosen on held-out
    sequences. `windows`: calibration sequences on which runs are compared.

    Differs from the paper: the light block is not trained; its down projection is the least-squares one.
    """

    title: ClassVar[str] = "a window of blocks becomes its first block with a least-squares down projection"
    reference: ClassVar[str] = "LLM-Streamline, arXiv 2403.19135"
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    sparsity: float | None = None
    ridge: float = 0.0
    windows: int = 16

    def solvers(self) -> list[Solver]:
        return [Bypass(kind="zero")]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        check_foldable(measure.source.family, self.name)
        n, remarks = remove_blocks(problem, self.sparsity)
        if n == 0:
            return remove(self.decide(problem, {}, remarks=remarks), problem, [], self.sparsity)
        cosines = compare_windows(measure, n + 1, self.windows, "cosine")
        start = max(cosines, key=lambda a: (cosines[a], -a))
        notes: dict[str, Any] = {"window": {"first": start, "last": start + n, "cosines": cosines}}
        window = fit_window(measure, start, start + n, "down.in")
        bias = window.weights.get("down.bias")
        train, held = window.train, window.held
        if bias is not None:  # it stays
            train, held = train.shift(bias.double()), held and held.shift(bias.double())
        w, notes["ridge"] = fit_map_held_out(train, held, self.ridge)
        edits = {start: [down_edit(window.weights, w.T, bias)]}
        gone = [Unit(i, name) for i in range(start + 1, start + n + 1) for name in ("attention", "ffn")]
        return remove(self.decide(problem, {}, edits=edits, notes=notes, remarks=remarks), problem, gone, self.sparsity)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        n, remarks = remove_blocks(problem, self.sparsity)
        planned = self.decide(problem, {}, remarks=remarks)
        return foresee_window(planned, problem, n, self.sparsity, min(self.windows, windows))
