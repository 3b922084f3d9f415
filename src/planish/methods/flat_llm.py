"""FLAT-LLM: value PCA, Nyström neurons, importance-preserving ranks, sequential statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from planish.calibrate.measure import Measurements
from planish.core import Solver
from planish.methods.method import Method
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.solvers.experts import ExpertNeurons
from planish.solvers.head_pca import HeadPCA
from planish.solvers.neurons import Neurons
from planish.solvers.value_pca import ValuePCA
from planish.stats import Tap


@dataclass(frozen=True)
class FlatLLM(Method):
    """Values and neurons are cut, more in blocks that hardly turn their input; queries and keys stay dense.

    Problem: attention mixes tokens and never channels, so a basis of each head's values can be absorbed into W_v and W_o.
    Find the r directions per kv head that keep most of the values; keep the neurons that matter, refit the down
    projection; and let blocks that change the direction of the residual stream keep more.

    Equation: per kv head Q = top eigenvectors of E[v vᵀ], W_v ← Qᵀ W_v, W_o ← W_o Q (§3,
    `planish.solvers.value_pca.ValuePCA`). Neurons: ridge leverage diag(C (C + λI)⁻¹), then Nyström
    W_down ← W_down C[:, J] (C[J, J])⁻¹ (App. C, `planish.solvers.grams.Refits`). Ranks (Alg. 1): keep of a block ∝ t_l, the
    mean angle / π between its input and output, clipped at 1.

    `allocation`: "iprs", Alg. 1 (the budget solves the factor), or "uniform". `ridge`: λ of the leverage, relative.
    `damping`: of the refit, relative. `qk`: "pca" also cuts queries and keys, by the repository's later option.

    Differs from the repository: λ is relative to the Gram's scale, and the refit is damped; the V bias is handled.
    """

    title: ClassVar[str] = "head-wise value PCA absorbed into V and O, Nyström MLP, importance-preserving ranks"
    reference: ClassVar[str] = "FLAT-LLM, arXiv 2505.23966"
    prefix: ClassVar[str] = "compressed"
    dampings: ClassVar[tuple[str, ...]] = ("damping", "ridge")

    allocation: Literal["iprs", "uniform"] = "iprs"
    ridge: float = 1e-2
    damping: float = 1e-10
    qk: Literal["dense", "pca"] = "dense"

    def solvers(self) -> list[Solver]:
        cut: list[Solver] = [ValuePCA()]
        cut += [kind("leverage", self.ridge, True, self.damping) for kind in (Neurons, ExpertNeurons)]
        return cut + ([HeadPCA()] if self.qk == "pca" else [])

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if self.allocation == "uniform":
            return self.decide(problem, problem.spread(lambda unit: 1.0))
        tap = Tap("block.in", "angle", "block.out")
        importance = {i: float(stats.mean(tap, "angle")) for i, _, stats in measure.forward(lambda shape: [tap])}
        ranks = problem.spread(lambda unit: max(importance[unit.block], 1e-6))
        return self.decide(problem, ranks, notes={"importance": importance})
