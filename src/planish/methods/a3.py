"""A3: three analytical reductions — queries–keys, values–output, neurons — that leave stock dense shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from planish.calibrate.losses import divergence, nll
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream, read_weights
from planish.core import Frontier, Plan, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.plan.allocate import Alternative, choose
from planish.plan.evolve import evolve
from planish.plan.experts import level_widths
from planish.plan.foreseen import Foreseen, Work, survey
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.experts import ExpertNeurons
from planish.solvers.neurons import Neurons
from planish.solvers.qk_joint import QKJoint
from planish.solvers.rotary_pairs import NORMALISED, RotaryPairs
from planish.solvers.value_output import ValueOutput
from planish.walks.solve import run_solved

PARTS = ("qk", "vo", "mlp")


@dataclass(frozen=True)
class A3(Method):
    """Queries–keys, values–output and neurons, each cut where the error it makes is least; dense shapes stay.

    Problem: each part of an attention or feed-forward is a product of two matrices between activations. Reduce the inner
    dimension of each product so that the error of what it puts out is least: of the attention scores, of the heads'
    output, of the feed-forward's output. Ranks are uniform, statistics are the uncompressed model's, as in the paper.

    Equation: values–output (Theorem 3): min over rank r of ‖R_p^½ (W_vo − W̃)‖, by the SVD of R_p^½ W_vo. Queries–keys
    without rotary positions (Theorem 2): min ‖R_q^½ (W_qk − W̃) R_kv^½‖; with them whole rotary pairs are kept, by
    λ_f = E[q_a²] E[k_a²] + E[q_b²] E[k_b²]. Neurons: the largest λ_i = E[x_i²] ‖w_i‖². The roots are never formed: d × d
    second moments of the heads' outputs give the same optimum (`planish.solvers.linalg.balance`,
    `planish.solvers.linalg.reduce_scores`).

    `qk`: the order of rotary pairs, "product" (the paper's λ_f) or "energy" (½ E|q_f|² E|k_f|²).
    `vo`: moments behind values and output, "attention" (the paper's for one query head per kv head, pooled within a
    group) or "values" (the paper's R_kv form for groups). `mlp`: score of neurons, "energy" (the paper's) or ridge
    "leverage". `refit`: least squares of o and of down on what is kept; false is the paper's plain slicing.
    `allocation`: "uniform"; "mixed": ranks searched by the loss of the calibration text; "evolved": ranks that evolve from the
    uniform ones, by the divergence of whole models (`planish.plan.evolve.evolve`, after Týr-the-Pruner, arXiv 2503.09657).
    `probes`: windows of the text for each unit, or each model, of these searches. `passes`: what an evolution may spend, in forward
    passes over them. `parts`: which of the three are cut (all); the budget is then met by those alone.
    `damping`: relative, makes a singular Gram invertible.

    Uniform means that each part keeps the share asked for. Where a part's steps are coarse (rotary pairs of narrow heads)
    some blocks lie a step above it and some below; rounding all of them down would cost far more than it saves.
    Models that normalise q and k keep them.

    Differs from the paper: refit and pooling are on; its mixed ranks come without an algorithm, here they are searched. From
    Týr's: what is cut and how it is refitted is this method's; generations of 16 children from one parent, not of 128 from two.
    """

    title: ClassVar[str] = "joint reduction of Q–K, O–V and neurons to smaller dense shapes"
    reference: ClassVar[str] = "A3, arXiv 2505.12942"
    dampings: ClassVar[tuple[str, ...]] = ("damping",)

    qk: Literal["product", "energy"] = "product"
    vo: Literal["attention", "values"] = "attention"
    mlp: Literal["energy", "leverage"] = "energy"
    refit: bool = True
    allocation: Literal["uniform", "mixed", "evolved"] = "uniform"
    probes: int = 16
    passes: int = 200
    damping: float = 1e-10
    parts: tuple[str, ...] = PARTS

    def solvers(self) -> list[Solver]:
        if not self.parts or set(self.parts) - set(PARTS):
            raise InputError(f"a3: parts={','.join(self.parts) or 'nothing'}; expected some of {','.join(PARTS)}")
        cut: dict[str, list[Solver]] = {
            "qk": [QKJoint(), RotaryPairs(self.qk)],
            "vo": [ValueOutput(self.vo, self.refit)],
            "mlp": [kind(self.mlp, refit=self.refit, damping=self.damping) for kind in (Neurons, ExpertNeurons)],
        }
        return [solver for part in PARTS if part in self.parts for solver in cut[part]]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        uniform = self.spread(problem)
        if self.allocation == "uniform" or problem.keep == 1:
            return uniform
        if self.allocation == "evolved":
            with measure.phase("search"):
                ranks, notes = evolve(problem, measure, uniform.ranks, self.passes, self.probes)
            return replace(uniform, ranks=ranks, notes={"evolved": notes})
        ranks, notes = self.search(problem, measure, uniform.ranks)
        return replace(uniform, ranks=ranks, notes=notes)

    def spread(self, problem: Problem) -> Planned:
        """Uniform ranks."""
        normed = "qk" in self.parts and any(s.qk_norm for s in problem.shapes)
        remarks = {"qk": NORMALISED} if normed else {}
        ranks = level_widths(problem.spread(lambda unit: 1.0, True, remarks), problem.step)
        return self.decide(problem, ranks, remarks=remarks)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        planned, n, share = self.spread(problem), len(problem.shapes), min(self.probes / max(windows, 1), 1.0)
        if self.allocation == "evolved":
            few = min(self.probes, windows)
            models = Work("evolution", few, passes=lambda i: float(self.passes + 1), heads=2.0 * self.passes)
            return Foreseen(planned, [survey(problem), models])
        probed = replace(
            survey(problem),
            passes=lambda i: 1 + share * (1 + len(self.parts) * (n - i)),
            heads=2 * len(problem.units) * share,
        )
        return Foreseen(planned, [probed, *(Work("search", solve=planned) for _ in range(3))])

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)

    def search(self, problem: Problem, measure: Measurements, uniform: Plan) -> tuple[Plan, dict[str, Any]]:
        """Ranks that differ from unit to unit, chosen by the loss of the calibration text.

        One probe per unit measures how far cutting it alone to its uniform rank, or the next lower one where that leaves it
        whole, moves the model's predictions (KL); that
        scales the unit's frontier to nats, and the sum is minimised under the budget. Of the uniform plan, this one, and
        the one whose scales are the probes' square roots, the one with the least loss of the whole compressed model wins.
        """
        probed = {u: r if r < problem.full(u) else next_lower(problem, u) for u, r in uniform.items()}
        frontiers, rises = probe(problem, measure, probed, self.probes)
        least = max(1e-6, 0.01 * sum(max(r, 0.0) for r in rises.values()) / len(rises))
        plans = {"uniform": uniform}
        for name, power in (("mixed", 1.0), ("tempered", 0.5)):
            groups = []
            for unit, f in frontiers.items():
                curve = problem.curve(f)
                at = max(float(f.loss[probed[unit]]), 1e-12 * max(map(float, f.loss)), 1e-300)
                loss = (
                    torch.where(curve.ranks < problem.full(unit), curve.loss, 0.0)
                    / at
                    * max(rises[unit], least) ** power
                )
                groups.append([Alternative((replace(curve, loss=loss),))])
            plans[name] = choose(groups, problem.limits)[0]
        stream = measure.stream
        losses = {
            name: nll(stream, run_solved(problem, measure, self.decide(problem, plan), stream))
            for name, plan in plans.items()
        }
        best = min(losses, key=lambda name: losses[name])
        notes = {"searched": losses, "chosen": best, "rises": {str(u): r for u, r in rises.items()}}
        return plans[best], notes


def next_lower(problem: Problem, unit: Unit) -> int:
    """The largest admissible rank that cuts the unit; its full one if there is none."""
    choices = problem.choices(unit)
    ranks = [int(r) for r in choices.ranks[choices.allowed(problem.step)]]
    return max((r for r in ranks if r < problem.full(unit)), default=problem.full(unit))


def probe(
    problem: Problem, measure: Measurements, plan: Plan, windows: int
) -> tuple[dict[Unit, Frontier], dict[Unit, float]]:
    """Frontiers without factors, and how far each unit alone, at its rank in `plan`, moves the model's predictions.

    KL(uncompressed ‖ cut) in nats per token over the first `windows` windows: the expected rise of the loss without
    the noise of the text's own labels, which for small cuts is larger than the rise. Costs, per unit, those windows
    through the blocks behind it and the head twice.
    """
    stream = measure.stream
    small = Stream(stream.source, torch.cat(stream.batches)[:windows], device=str(stream.device), dtype=stream.dtype)
    hidden, reference = small.start(), small.outputs()
    frontiers: dict[Unit, Frontier] = {}
    moved: dict[Unit, float] = {}
    for i, block, stats in measure.forward(lambda shape: problem.taps(problem.block_units(shape.block))):
        weights, shape = read_weights(block, stream), problem.shapes[i]
        for unit in problem.block_units(i):
            solver = problem.units[unit]
            f = solver.decompose(unit, weights, stats, shape)
            frontiers[unit] = Frontier(unit, f.loss, {}, f.nats)
            out = small.run(i, small.place(stream.block(i, solver.truncate(f, plan[unit], shape))), hidden)
            for j in range(i + 1, len(problem.shapes)):
                out = small.run(j, small.place(stream.block(j)), out)
            moved[unit] = divergence(small, out, reference)
        hidden = small.run(i, small.place(block), hidden)
    return frontiers, moved
