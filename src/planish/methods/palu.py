"""Palu: the KV cache as latents; keys are rebuilt before they are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.calibrate.stream import read_weights
from planish.core import Solver, Unit
from planish.methods.method import Method
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.key_frequency import KeyFrequency
from planish.solvers.key_latent import KeyLatent
from planish.solvers.linalg import svd
from planish.solvers.value_pca import ValuePCA
from planish.stats import Tap

SINGULAR = 1e-6  # of the largest singular value: what the smallest one counts at least
MATRICES = {"keys": "k", "vo": "v"}  # unit → the role whose weight its rank is a share of


@dataclass(frozen=True)
class Palu(Method):
    """The KV cache holds latents of low rank; keys are rebuilt before they are rotated.

    Problem: keys and values of several heads are nearly of low rank. Store the latents z = Qᵀ k and rebuild k ≈ Q z.

    Equation: min over rank r of E‖k − Q Qᵀ k‖², Q the top eigenvectors of E[k kᵀ] of a group's heads side by side, which
    is the whitened SVD of the group's W_k (G-LRD, `planish.solvers.key_latent.KeyLatent`). Values likewise, one kv head at a
    time, their rebuilding folded into o (`planish.solvers.value_pca.ValuePCA`).

    `group`: kv heads that share a latent of keys. `allocation`: "fisher": the rank of each W_k and W_v is in proportion to
    the mean of √E[g²] over its entries, g the gradient of a calibration sequence's loss by one (as in the authors' code; one
    rank for all groups of a matrix); "uniform"; "condition" (LoRC, arXiv 2410.03111): ranks of block l ∝
    1 − (1 − `least`) (max κ̃ − κ̃_l) / (max κ̃ − min κ̃), κ̃_l = Σ_{j ≥ l} log(κ(W_k,j) κ(W_v,j)), κ the condition number, so that
    later blocks keep less. `least`: the smallest rank as a share of the largest, for "condition". `keys`: "rebuild": latents
    of K are multiplied back at every step (the paper's); "frequency": channels that several heads share within each rotary
    frequency, which need no rebuilding (`planish.solvers.key_frequency.KeyFrequency`, ours). With "fisher" keys and values of
    a block then have one share, by the mean of both: a sharp softmax hides from gradients what such keys lose, and by their
    own the embedded model's first block would keep a fifth of its keys, which alone costs 1.7 nats.

    Meant for --kv-keep, down to the 30 % of the cache that the paper keeps. The smallest `keep` leaves next to no cache: at
    0.8 the embedded model has 2 % of it, latents of one or two numbers, and a perplexity of 1,420 (dense 21.4). The cache must
    grow (DynamicCache) with "rebuild", and rope types whose frequencies change with the length are rebuilt at the current
    length.

    Differs from the paper: labels behind the gradients are sampled from the model (the true Fisher information) instead of
    the text's shifted twice; groups of one matrix have equal ranks, because a cache has one width; ranks are not rounded to
    32 (--round-to does); values per kv head, because a latent of several heads would widen o by their number.
    """

    title: ClassVar[str] = "grouped low-rank keys and values: a cache of latents"
    reference: ClassVar[str] = "Palu, arXiv 2407.21118"
    shares: ClassVar[tuple[str, ...]] = ("least",)

    group: int = 4
    allocation: Literal["fisher", "uniform", "condition"] = "fisher"
    keys: Literal["rebuild", "frequency"] = "rebuild"
    least: float = 0.5

    def solvers(self) -> list[Solver]:
        return [KeyLatent(self.group) if self.keys == "rebuild" else KeyFrequency(self.group), ValuePCA()]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        remarks = self.remark(problem)
        if self.allocation == "uniform" or problem.keep == 1:
            return self.decide(problem, problem.spread(lambda unit: 1.0, remarks=remarks), remarks=remarks)
        if self.allocation == "condition":
            shares = self.weigh_blocks(measure)
            ranks = problem.spread(lambda unit: shares[unit.block], remarks=remarks)
            return self.decide(problem, ranks, notes={"condition": shares}, remarks=remarks)
        fisher: dict[Unit, float] = {}
        for i, _, stats in measure.backward(lambda shape: [self.tap(u) for u in problem.block_units(shape.block)]):
            fisher |= {u: float(stats.mean(self.tap(u)).sqrt().mean()) for u in problem.block_units(i)}
        notes = {"fisher": {str(u): f for u, f in sorted(fisher.items())}}
        ranks = problem.spread(partial(self.weigh, fisher), remarks=remarks)
        return self.decide(problem, ranks, notes=notes, remarks=remarks)

    def weigh(self, fisher: Mapping[Unit, float], unit: Unit) -> float:
        """What a unit's rank is in proportion to: its Fisher information, or with "frequency" its block's."""
        if self.keys == "rebuild":
            return fisher[unit]
        return fmean(f for u, f in fisher.items() if u.block == unit.block)

    def remark(self, problem: Problem) -> dict[str, str]:
        """What cannot be cut, and why."""
        left = [s for s in problem.shapes if s.heads and Unit(s.block, "keys") not in problem.units]
        if not left:
            return {}
        shape, other = left[0], ""
        if shape.mrope and (self.keys == "rebuild" or shape.qk_norm):
            why = (
                "turns keys by several positions of each token, and normalises them"
                if shape.qk_norm
                else ("turns keys by several positions of each token")
            )
            other = "" if shape.qk_norm else "; keys=frequency cuts them"
        elif self.keys == "rebuild":
            return {}
        else:
            why = "normalises keys" if shape.qk_norm else "does not rotate every channel of these"
            other = "; keys=rebuild cuts them"
        where = "" if len(left) == len(problem.shapes) else f" of blocks {', '.join(str(s.block) for s in left)}"
        return {"keys": f"keys{where} are left as they are: this family {why}{other}"}

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        remarks = self.remark(problem)
        ranks = problem.spread(lambda unit: 1.0, remarks=remarks)
        return Foreseen(self.decide(problem, ranks, remarks=remarks), [Work("gradients", gradients=True)])

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)

    def weigh_blocks(self, measure: Measurements) -> list[float]:
        """LoRC's share of the largest rank, per block."""
        stream, logs = measure.stream, []
        for i in range(len(measure.shapes)):
            weights = read_weights(stream.block(i), stream)
            spectra = [svd(weights[role])[1] for role in ("k", "v")]
            logs.append(sum(float((s[0] / s[-1].clamp(min=SINGULAR * s[0])).log()) for s in spectra))
        sums = [sum(logs[i:]) for i in range(len(logs))]
        span = max(max(sums) - min(sums), 1e-300)
        return [1 - (1 - self.least) * (max(sums) - x) / span for x in sums]

    def tap(self, unit: Unit) -> Tap:
        return Tap(f"grad:{MATRICES[unit.name]}.out", "weight_gradients", "q.in")
