"""FLAT-LLM: value PCA, Nyström neurons, importance-preserving ranks, sequential statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from planish.core import Plan, Solver
from planish.methods.method import Method
from planish.solvers.head_pca import HeadPCA
from planish.solvers.neurons import Neurons
from planish.solvers.value_pca import ValuePCA
from planish.stats import Tap

if TYPE_CHECKING:
    from planish.job import Job


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
        cut: list[Solver] = [ValuePCA(), Neurons("leverage", self.ridge, True, self.damping)]
        return cut + ([HeadPCA()] if self.qk == "pca" else [])

    def plan(self, job: Job) -> Plan:
        if self.allocation == "uniform":
            return job.spread(lambda unit: 1.0)
        tap = Tap("block.in", "angle", "block.out")
        importance: dict[int, float] = {}
        job.measure(
            lambda shape: [tap], lambda i, block, stats: importance.__setitem__(i, float(stats.mean(tap, "angle")))
        )
        job.notes["importance"] = importance
        return job.spread(lambda unit: max(importance[unit.block], 1e-6))
