"""ERC-SVD (formerly ResSVD): residual-compensated SVD of the last blocks only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import ClassVar, Literal

from torch import nn

from planish import lanes
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, in_order, read_weights
from planish.core import Edit, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.cuts import cut_unit
from planish.plan.footprint import find_rank
from planish.plan.foreseen import Foreseen, survey
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.linear import TwoStageSVD
from planish.stats import Stats


@dataclass(frozen=True)
class ErcSVD(Method):
    """Only the last k of N blocks are compressed, each more, and what truncation leaves over is truncated once more.

    Problem: errors made in early blocks grow through all later ones. So leave the first N − k blocks alone, compress the
    last k harder, and spend a part of every linear's rank on the residual of its first truncation.

    Equation: α = m n / (m + n) (Eq. 5); removed share per compressed block N·R/k; r = (1 − N·R/k) α, of which r_r = β α is
    the residual's: W ≈ [W]_{r − r_r} + [W − [W]_{r − r_r}]_{r_r}, as one pair (Alg. 2,
    `planish.solvers.linear.TwoStageSVD`). k by the least error of the last block's output (Alg. 3).

    `k`: number of compressed blocks; 0 = search: up to `candidates` values between the smallest feasible k and N, the one
    with the least error of the last block's output on the calibration text wins. `beta`: the residual's share of the
    break-even rank α. `residual_metric`: the paper does not say in which metric the residual is truncated; "plain" is the
    one that is not provably a single SVD, "whitened" the other. `candidates`: how many k are tried. `windows`: on so many
    calibration sequences. `form`: "pair" or "pivoted".

    Differs from the paper (no code is public): the metric of the residual, and the values of k that are tried, are ours.
    """

    title: ClassVar[str] = "two-stage (residual-compensated) SVD of the last blocks"
    reference: ClassVar[str] = "ERC-SVD / ResSVD, arXiv 2505.20112"
    aliases: ClassVar[tuple[str, ...]] = ("resvd", "ressvd", "res-svd", "ercsvd")
    shares: ClassVar[tuple[str, ...]] = ("beta",)

    k: int = 0
    beta: float = 0.05
    residual_metric: Literal["plain", "whitened"] = "plain"
    candidates: int = 6
    windows: int = 16
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [TwoStageSVD(beta=self.beta, residual_metric=self.residual_metric, form=self.form)]

    def propose(self, problem: Problem) -> dict[int, Planned]:
        """A plan for every number of blocks that is to be tried."""
        if not self.beta < 1 or self.candidates < 1:
            raise InputError(
                f"erc-svd: beta must lie in [0, 1) and candidates be 1 or more, got {self.beta:g} and {self.candidates}"
            )
        n, removed = len(problem.shapes), 1 - problem.keep
        least = floor(n * removed / (1 - self.beta) + 1e-9) + 1  # every compressed block must keep more than beta
        if self.k and not least <= self.k <= n:
            block_keep = 1 - n * removed / self.k
            raise InputError(
                f"erc-svd: k={self.k} of {n} blocks at keep {problem.keep:g} would keep {block_keep:.3f} of each, "
                f"which must be more than beta={self.beta:g}: k must lie in {least} … {n}"
            )
        if least > n:
            shapes, step = problem.shapes, problem.step
            ranks = {u: find_rank(s, u, shapes[u.block], 0.0, step) for u, s in problem.units.items()}
            smallest = max(sum(problem.cost(u, r) for u, r in ranks.items()) / problem.main.total, self.beta + 1e-6)
            raise InputError(
                f"keep {problem.keep:g} cannot be reached by erc-svd: even with all {n} blocks each must keep more than "
                f"beta={self.beta:g}; the smallest keep is {ceil(smallest * 10_000) / 10_000:g}"
            )
        if self.k or problem.keep == 1:
            return {(k := self.k or n): self.last(problem, k)}
        count = min(self.candidates, n - least + 1)
        tried = sorted({least + round(i * (n - least) / max(count - 1, 1)) for i in range(count)})
        plans: dict[int, Planned] = {}
        for k in tried:
            try:
                plans[k] = self.last(problem, k)
            except InputError as error:  # rounding of ranks leaves no room for so few blocks
                refusal = error
        if not plans:
            raise refusal
        return plans

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        plans = self.propose(problem)
        if self.k or problem.keep == 1:
            return next(iter(plans.values()))
        errors = self.search(problem, measure, plans)
        best = min(errors, key=lambda k: errors[k])
        return replace(plans[best], notes={"k": best, "searched": errors})

    def search(self, problem: Problem, measure: Measurements, plans: Mapping[int, Planned]) -> dict[int, float]:
        """The error of the last block's output (Alg. 3) under every plan.

        One walk over the blocks for all of them: of a block the statistics are measured, and its weights are whitened, once;
        what runs differ by flows side by side from the first block on that a plan cuts.
        """
        few = measure.stream.subset(self.windows)
        dense, flows = few.start(), dict[int, Hidden]()
        cuts = {i: {u for planned in plans.values() for u in problem.cut(planned.ranks, i)} for i in range(len(few))}
        for i, block, stats in measure.forward(lambda shape: problem.taps(sorted(cuts[shape.block]))):
            edits = truncate_all(problem, measure, block, stats, sorted(cuts[i]), plans)
            with measure.phase("search"):
                for k in plans:
                    if k in flows or edits[k]:
                        placed = few.place(few.block(i, edits[k]))
                        flows[k] = few.run(i, placed, flows.get(k, dense))
                dense = few.run(i, few.place(block), dense)
        return {k: compare(few, flows.get(k, dense), dense) for k in plans}

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        plans, share = self.propose(problem), min(self.windows, windows) / windows

        def begun(i: int) -> float:
            return float(sum(len(problem.shapes) - k <= i for k in plans))

        walk = replace(survey(problem), passes=lambda i: 1 + share * (1 + begun(i)), cuts=begun)
        return Foreseen([*plans.values()][len(plans) // 2], [walk])

    def last(self, problem: Problem, k: int) -> Planned:
        """Uniform ranks in the last k blocks, all others whole."""
        first = len(problem.shapes) - k
        return self.decide(problem, problem.spread(lambda unit: 1.0 if unit.block >= first else float("inf")))


def truncate_all(
    problem: Problem,
    measure: Measurements,
    block: nn.Module,
    stats: Stats,
    units: list[Unit],
    plans: Mapping[int, Planned],
) -> dict[int, list[Edit]]:
    """Edits of a block's units under every plan; a unit's frontier is worked out once, and processes share the units out."""
    weights = read_weights(block, measure.stream)

    def solve(unit: Unit) -> dict[int, list[Edit]]:
        ranks = {k: p.ranks[unit] for k, p in plans.items()}
        with measure.phase("frontiers"):
            cuts = cut_unit(problem, unit, ranks.values(), weights, stats)
            return {k: cuts[rank].edits for k, rank in ranks.items()}

    found = lanes.share_out(units, problem.count, solve)
    return {k: [edit for edits in found for edit in edits[k]] for k in plans}


def compare(stream: Stream, outputs: Hidden, dense: Hidden) -> float:
    """Alg. 3: E‖y − ŷ‖² per token, y and ŷ (batch, seq, hidden) the last block's outputs before and after."""
    squares = [(a.double() - b.double()).square().sum(-1) for a, b in zip(outputs, dense, strict=True)]
    sums = in_order(stream, [(float(x.sum()), x.numel()) for x in squares])
    return sum(s for s, _ in sums) / sum(n for _, n in sums)
