"""MoDeGPT: modules of two or three matrices reduced together, more from blocks that change their input least."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.core import Solver
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.neurons import Neurons
from planish.solvers.qk_joint import QKJoint
from planish.solvers.rotary_pairs import NORMALISED, RotaryPairs
from planish.solvers.value_output import ValueOutput
from planish.stats import Tap


@dataclass(frozen=True)
class MoDeGPT(Method):
    """Modules of two or three matrices are reduced together; blocks that change their input least give up most.

    Problem: a neuron, a channel of queries and keys and a value direction each cut two matrices at once. Choose them for
    the least error of the module's output, and choose how much each block gives up by its influence.

    Equation: neurons (Type I): ridge leverage diag(C (C + λI)⁻¹), then Nyström (`planish.solvers.grams.Refits`).
    Queries–keys (Type II): the channels or rotary pairs with the largest (E[q_j²] E[k_j²])^½. Values–output (Type III): SVD
    with the input's moments (`planish.solvers.linalg.balance`). Share removed from block l: N φ softmax(−s/ε)_l,
    s_l = 1 − E cos(input, output) of the block.

    `allocation`: "entropy", the softmax above, or "uniform". `smoothing`: ε. `cap`: no block loses more than this share; what
    that leaves over is spread over the others in the same proportions. `ridge`: λ of the leverage, relative. `refit`: least
    squares of o too. `damping`: relative, makes a singular Gram invertible.

    Models that normalise q and k keep them.

    Differs from the paper: rotary pairs of a group are scored together; ε and the cap are those of a public port (the
    paper tunes ε and gives no cap, without which a block of a deep model can lose more than it has).
    """

    title: ClassVar[str] = "Nyström neurons, CR for Q–K, SVD for V–O, entropic ranks from block influence"
    reference: ClassVar[str] = "MoDeGPT, arXiv 2408.09632"
    shares: ClassVar[tuple[str, ...]] = ("cap",)
    dampings: ClassVar[tuple[str, ...]] = ("damping", "ridge")

    allocation: Literal["entropy", "uniform"] = "entropy"
    smoothing: float = 0.15
    cap: float = 0.8
    ridge: float = 1e-2
    refit: bool = False
    damping: float = 1e-10

    def solvers(self) -> list[Solver]:
        return [
            QKJoint("select"),
            RotaryPairs("product", "select"),
            ValueOutput("values", self.refit),
            Neurons("leverage", self.ridge, True, self.damping),
        ]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if self.allocation == "uniform" or problem.keep == 1:
            return self.spread(problem, [0.0] * len(problem.shapes))
        tap = Tap("block.in", "angle", "block.out")
        influence = {i: 1 - float(stats.mean(tap, "cosine")) for i, _, stats in measure.forward(lambda shape: [tap])}
        removed = spread_removal(list(influence.values()), 1 - problem.keep, self.smoothing, self.cap)
        return self.spread(problem, removed, notes={"influence": influence, "removed_shares": removed})

    def spread(self, problem: Problem, removed: list[float], **more: Any) -> Planned:
        """Ranks by the share that every block gives up."""
        remarks = {"qk": NORMALISED} if any(s.qk_norm for s in problem.shapes) else {}
        ranks = problem.spread(lambda unit: 1 - removed[unit.block], True, remarks)
        return self.decide(problem, ranks, remarks=remarks, **more)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        equal = spread_removal([1.0] * len(problem.shapes), 1 - problem.keep, self.smoothing, self.cap)
        return Foreseen(self.spread(problem, equal), [Work()])

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)


def spread_removal(influence: list[float], removed: float, smoothing: float, cap: float) -> list[float]:
    """Removed share of every block: mean `removed`, ∝ softmax(−influence / smoothing), none above `cap`.

    Blocks that reach the cap stay there and the rest share what is left in proportion: at most one round per block.
    """
    if not (smoothing > 0 and 0 < cap < 1):
        raise InputError(f"modegpt: smoothing must be positive and cap between 0 and 1, got {smoothing:g} and {cap:g}")
    if removed >= cap:
        raise InputError(
            f"modegpt: {removed:g} of every block would go on average, which must stay below cap={cap:g}; ask for less, or "
            f"raise it with --set cap={(1 + removed) / 2:.3f}"
        )
    least = min(influence)
    weights = [exp((least - s) / smoothing) for s in influence]
    shares = [0.0] * len(weights)
    open_blocks, left = set(range(len(weights))), removed * len(weights)
    while open_blocks:
        total = sum(weights[i] for i in open_blocks)
        level = {i: left * weights[i] / total if total > 0 else left / len(open_blocks) for i in open_blocks}
        over = {i for i in open_blocks if level[i] >= cap}
        for i in over or open_blocks:
            shares[i] = cap if over else level[i]
        if not over:
            break
        left -= cap * len(over)
        open_blocks -= over
    return shares
