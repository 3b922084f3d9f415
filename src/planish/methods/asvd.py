"""ASVD: SVD after scaling inputs by their mean magnitude; ranks by measured sensitivity."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from planish.calibrate.losses import nll
from planish.calibrate.measure import Measurements
from planish.core import Plan, Shape, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.modelling.blocks import get_linear
from planish.plan.footprint import find_rank
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.targets import unwrap
from planish.solvers.forms import input_site
from planish.solvers.linalg import LowRank
from planish.solvers.linear import LinearSVD
from planish.stats import Tap

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class ASVD(Method):
    """Truncated SVD of every linear with its inputs scaled by their size; ranks by measured sensitivity.

    Problem: truncating W alone ignores that some inputs are much larger than others. Scale them first, so that an error
    at a large input counts more; give more rank to linears whose truncation raises the loss more.

    Equation: S = diag((E|x_j|)^α); W ≈ [W S]_r S⁻¹ (paper Eq. 9, its diagonal form;
    `planish.solvers.linear.LinearSVD.decompose`).

    `alpha`: the power α. `allocation`: "strs" (sensitivity-based truncation rank search): for every linear and each of the
    keeps 0.9 … 0.4 the loss with that linear alone truncated; every linear then takes the least keep whose loss stays
    under one threshold, and the budget sets the threshold. "uniform": one keep for all, in a fraction of the time.
    `samples`: calibration sequences on which the search measures. `form`: "pair" or "pivoted".

    In the search the threshold rises from the dense loss, so that keeps far below it are never measured (the same plan
    where a linear's loss falls with its keep), and a measurement runs from the linear's block onward. It holds the whole
    model and its factors in memory.

    Differs from the repository: exact SVD instead of a randomised one; the head is not compressed; what the last step
    saves beyond the budget is given back to its linear.
    """

    title: ClassVar[str] = "activation-scaled truncated SVD of every linear, measured sensitivity"
    reference: ClassVar[str] = "ASVD, arXiv 2312.05821"

    alpha: float = 0.5
    allocation: Literal["strs", "uniform"] = "strs"
    samples: int = 4
    form: Literal["pair", "pivoted"] = "pair"

    def solvers(self) -> list[Solver]:
        return [LinearSVD(metric="diagonal", power=self.alpha, form=self.form)]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        uniform = self.spread(problem)
        if self.allocation == "uniform" or problem.keep == 1 or not measure.stream.batches:
            return uniform
        with measure.phase("sensitivity"):
            sensitivity = Sensitivity(problem, measure, self.samples, len(problem.units) * self.levels(problem))
            ranks = self.search(problem, sensitivity)
        return self.decide(problem, ranks, notes={"sensitivity": {"measured": sensitivity.count}})

    def spread(self, problem: Problem) -> Planned:
        """Uniform ranks; refuses what no allocation can do."""
        if not self.alpha <= 4 or self.samples < 1:
            raise InputError(
                f"asvd: alpha must lie in [0, 4] and samples be 1 or more, got {self.alpha:g} and {self.samples}"
            )
        ranks = problem.spread(lambda unit: 1.0)
        if self.allocation == "strs" and problem.keep < 1 and len(problem.budgets) > 1:
            raise InputError("asvd: allocation=strs keeps to one budget; use --set allocation=uniform for two")
        return self.decide(problem, ranks)

    def levels(self, problem: Problem) -> int:
        """How many keeps of each linear are measured, about."""
        return 1 + sum(keep >= problem.keep for keep in KEEPS)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        levels, linears = self.levels(problem), [len(s.linears) for s in problem.shapes]

        def taps(shape: Shape) -> list[Tap]:
            return [Tap(s, "magnitudes") for s in sorted({input_site(r) for r in shape.linears})]

        search = Work(
            "sensitivity",
            min(self.samples, windows),
            lambda i: levels * float(sum(linears[: i + 1])),
            heads=len(problem.units) * levels,
        )
        return Foreseen(self.spread(problem), [Work(taps=taps, solvers=problem.units), search])

    def search(self, problem: Problem, sensitivity: Sensitivity) -> Plan:
        """Lower the keep of the linear whose next step down costs least, until the budget is met."""
        plan = {u: problem.full(u) for u in problem.units}
        spent = sum(problem.cost(u, r) for u, r in plan.items())
        budget = problem.main.limit - (problem.main.total - spent)
        queue: list[tuple[float, Unit, int, int]] = []

        def push(unit: Unit, level: int) -> None:
            if level < len(KEEPS):
                solver, shape = problem.units[unit], problem.shapes[unit.block]
                rank = find_rank(solver, unit, shape, KEEPS[level], problem.step)
                heapq.heappush(queue, (sensitivity.loss(unit, rank), unit, level, rank))

        for unit in sorted(plan):
            push(unit, 0)
        while queue and spent > budget:
            _, unit, level, rank = heapq.heappop(queue)
            others = spent - problem.cost(unit, plan[unit])
            fits = [r for r in problem.units[unit].ranks(unit, problem.shapes[unit.block]) if rank <= r < plan[unit]]
            fits = [r for r in fits if r % problem.step == 0 and others + problem.cost(unit, r) <= budget]
            plan[unit] = max(fits, default=rank)
            spent = others + problem.cost(unit, plan[unit])
            if spent > budget:
                push(unit, level + 1)
        if spent > budget:  # below the lowest keep: all go further down together
            main = problem.budgets.index(problem.main)
            return problem.spread(lambda u: problem.choices(u).share(problem.choices(u).at(plan[u]), main))
        return plan


class Sensitivity:
    """Loss of the first calibration sequences with one linear truncated and everything else dense."""

    def __init__(self, problem: Problem, measure: Measurements, samples: int, expected: int):
        self.stream, self.count, self.expected = measure.stream.subset(samples), 0, expected
        self.blocks: list[nn.Module] = []
        self.factors: dict[Unit, LowRank] = {}
        self.inputs = [self.stream.start()]

        def taps(shape: Shape) -> list[Tap]:
            return [Tap(s, "magnitudes") for s in sorted({input_site(r) for r in shape.linears})]

        stats = {i: s.only(taps(problem.shapes[i])) for i, _, s in measure.forward(taps)}
        for i in range(len(self.stream)):
            self.blocks.append(self.stream.place(self.stream.block(i)))
            self.inputs.append(self.stream.run(i, self.blocks[i], self.inputs[i]))
            for unit in problem.block_units(i):
                solver = unwrap(problem.units[unit])
                assert isinstance(solver, LinearSVD)
                low = solver.factorise(unit, self.linear(unit).weight.detach().cpu(), stats[i])
                self.factors[unit] = LowRank(low.B.to(self.stream.dtype), low.A.to(self.stream.dtype), low.s)

    def linear(self, unit: Unit) -> nn.Module:
        return get_linear(self.blocks[unit.block], self.stream.family, unit.name)

    @torch.no_grad()
    def loss(self, unit: Unit, rank: int) -> float:
        """Nats per token."""
        linear, low, hidden = self.linear(unit), self.factors[unit], self.inputs[unit.block]
        dense: Tensor = linear.weight
        truncated = low.B[:, :rank] @ low.A[:rank] if rank < len(low.A) else dense
        linear.weight = nn.Parameter(truncated.to(dense.device), requires_grad=False)
        try:
            for i in range(unit.block, len(self.blocks)):
                hidden = self.stream.run(i, self.blocks[i], hidden)
        finally:
            linear.weight = dense
        self.count += 1
        self.stream.report("sensitivity", self.count, max(self.count, self.expected))
        return nll(self.stream, hidden)
