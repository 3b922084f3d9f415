"""KFAC-SVD: linears whitened by inputs and by the text's own gradients, both shrunk; LEMS: ranks by measured divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from planish.calibrate.losses import Probe, divergence
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden
from planish.core import Frontier, Plan, Solver, Unit
from planish.methods.method import Method
from planish.plan.allocate import Curve
from planish.plan.alone import measure_alone
from planish.plan.foreseen import Foreseen, Work, survey_back
from planish.plan.frontiers import Frontiers, measure_gradients
from planish.plan.planned import Planned
from planish.plan.problem import Problem, choose_ranks
from planish.solvers.two_sided import ShrunkTwoSided
from planish.walks.solve import run_solved

PROBED, HIGHEST = (
    0.1,
    0.95,
)  # shares of a linear's break-even rank: at which it is tried alone, above which it stays dense
FLOOR = {True: 0.3, False: 0.1}  # the least share, where at least half of the weights stay, and below
STEP = 8  # ranks are multiples of it
STEEPEST, STRONGEST = 3.0, 7.0  # the largest α and γ of the depth factor
TEMPERATURE, BEHIND = 0.6, 0.125  # of the divergences; tokens of a window that have too little before them to count


@dataclass(frozen=True)
class KFACSVD(Method):
    """Every linear is truncated where the text's loss moves least, by moments that a few tokens cannot decide.

    Problem: the W̃ of rank r with the least E[(gᵀ (W − W̃) x)²], g the gradient of the text's loss at the linear's output.

    Equation: R = E[x xᵀ] and G = E[g gᵀ], summed token by token; for G the first and the last eighth of every window are left
    out and each token's |g| is clamped to 0.1 … 10 times the window's mean. Both are shrunk towards the mean of their diagonals;
    the SVD of G^½ W R^½ is truncated (`planish.solvers.two_sided.ShrunkTwoSided`).

    `allocation`: "uniform", or "lems": linear i at the share ρ of its break-even rank m n / (m + n) is taken to lose
    err_i(ρ) = KL_i (1 − E_i(ρ)) / (1 − E_i(0.1)) · (1 + γ (S_l − S_min) / (S_max − S_min)), E_i the share of Σ σ² that is kept,
    KL_i the measured divergence of the model in which i alone is cut to ρ = 0.1, S_l = Σ_{k=l}^{L−1} (k + 1)^{−α} for block l
    of L. Ranks are multiples of 8 between ρ = 0.3 (0.1 below keep 0.5) and 0.95, or the linear stays dense; the least sum within
    the budget. `trials`: how many α in [0, 3] and γ in [0, 7] are tried; the plan whose model, solved, diverges least is taken.
    `windows`: calibration windows on which divergences are measured. `shrink_in`: share of R that its mean diagonal replaces.
    `shrink_out`: the same of G. `form`: "pair", or "pivoted", which stores a rank in fewer weights.

    Differs from the paper: of tall linears only Wᵀ G W is measured, which has the same optimum; α and γ by a seeded random search
    that begins without a depth factor, instead of a tree-structured one; the choice of ranks is optimal to one step of the
    budget, not by an integer program; windows are spread evenly over the calibration text.
    """

    title: ClassVar[str] = (
        "SVD of every linear whitened on both sides, by shrunk moments; ranks by measured divergences"
    )
    reference: ClassVar[str] = "KFAC-SVD and LEMS, arXiv 2610.32878"
    probe: ClassVar[Probe] = "text"
    shares: ClassVar[tuple[str, ...]] = ("shrink_in", "shrink_out")
    dampings: ClassVar[tuple[str, ...]] = ("shrink_in",)

    allocation: Literal["uniform", "lems"] = "uniform"
    shrink_in: float = 0.1
    shrink_out: float = 0.3
    trials: int = 10
    windows: int = 32
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [ShrunkTwoSided(form=self.form, shrink_in=self.shrink_in, shrink_out=self.shrink_out)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if problem.keep == 1:
            return self.decide(problem, {})
        uniform = problem.spread(lambda unit: 1.0)
        frontiers = measure_gradients(problem, measure, self.probe)
        if self.allocation == "uniform":
            return self.decide(problem, uniform, frontiers=frontiers)
        with measure.phase("search"):
            ranks, notes = self.search(problem, measure, frontiers)
        return self.decide(problem, ranks, frontiers=frontiers, notes=notes)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        planned, work, n = (
            self.decide(problem, problem.spread(lambda unit: 1.0)),
            [survey_back(problem)],
            len(problem.shapes),
        )
        if self.allocation == "lems":
            few, each = min(self.windows, windows), len(problem.block_units(0))
            work += [Work("single cuts", few, lambda i: 1.0 + each * (n - i), heads=len(problem.units))]
            work += [Work("search", few, solve=planned, heads=1)] * self.trials
        return Foreseen(planned, work)

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)

    def search(self, problem: Problem, measure: Measurements, frontiers: Frontiers) -> tuple[Plan, dict[str, Any]]:
        """Of the plans of all trials the one whose model diverges least, and what was found on the way."""
        few = measure.stream.spread(self.windows)
        reference = few.outputs()

        def lost(outputs: Hidden) -> float:
            return divergence(few, outputs, reference, TEMPERATURE, BEHIND)

        probed = {u: max(1, round(PROBED * break_even(problem, u))) for u in frontiers}
        alone = measure_alone(problem, measure, probed, few, lost)
        curves = [make_curve(problem, frontiers[u], alone[u], probed[u]) for u in alone]
        tried: dict[tuple[float, float], tuple[float, Plan]] = {}
        known: dict[tuple[int, ...], float] = {}
        for alpha, gamma in draw(self.trials):
            factors = weigh_depths(len(problem.shapes), alpha, gamma)
            ranks = choose_ranks(problem, {c.unit: scale(c, factors[c.unit.block]) for c in curves})
            key = tuple(ranks[u] for u in sorted(ranks))
            if key not in known:
                known[key] = lost(run_solved(problem, measure, self.decide(problem, ranks), few))
            tried[alpha, gamma] = known[key], ranks
        best = min(tried, key=lambda t: tried[t][0])
        trials = [{"alpha": a, "gamma": g, "divergence": found} for (a, g), (found, _) in tried.items()]
        return tried[best][1], {"alone": {str(u): kl for u, kl in alone.items()}, "trials": trials}


def break_even(problem: Problem, unit: Unit) -> float:
    """m n / (m + n): the rank at which a pair holds as much as the linear (m, n)."""
    out, n = problem.shapes[unit.block].linear(unit.name)
    return out * n / (out + n)


def make_curve(problem: Problem, frontier: Frontier, moved: float, probed: int) -> Curve:
    """LEMS's choices for a linear and their losses, without a depth factor: `moved` at the rank `probed`."""
    unit, choices = frontier.unit, problem.choices(frontier.unit)
    share = choices.ranks / break_even(problem, unit)
    step = problem.step if problem.step > 1 else STEP
    kept = (choices.ranks % step == 0) & (share >= FLOOR[problem.keep >= 0.5]) & (share <= HIGHEST)
    kept[-1] = True
    tails = torch.as_tensor(frontier.loss, dtype=torch.float64)
    loss = moved * tails[choices.ranks[kept]] / tails[probed].clamp(min=torch.finfo(torch.float64).tiny)
    loss[-1] = 0.0
    return Curve(unit, choices.ranks[kept], choices.cost[:, kept], loss)


def scale(curve: Curve, factor: float) -> Curve:
    return Curve(curve.unit, curve.ranks, curve.cost, factor * curve.loss)


def weigh_depths(blocks: int, alpha: float, gamma: float) -> list[float]:
    """1 + γ (S_l − S_min) / (S_max − S_min) per block l, S_l = Σ_{k=l}^{L−1} (k + 1)^{−α}."""
    terms = torch.arange(1, blocks + 1, dtype=torch.float64) ** -alpha
    sums = terms.flip(0).cumsum(0).flip(0)
    span = sums[0] - sums[-1]
    share = (sums - sums[-1]) / span if span > 0 else torch.zeros(blocks)
    return (1 + gamma * share).tolist()


def draw(trials: int, seed: int = 0) -> list[tuple[float, float]]:
    """(α, γ) of every trial: none at all first, then at random."""
    drawn = torch.rand(max(trials - 1, 0), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [(0.0, 0.0), *((STEEPEST * a, STRONGEST * g) for a, g in drawn.tolist())]
