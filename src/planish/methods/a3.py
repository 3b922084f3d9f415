"""A3: three analytical reductions — queries–keys, values–output, neurons — that leave stock dense shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from planish.core import Method, Plan, Solver
from planish.solvers.neurons import Neurons
from planish.solvers.qk_joint import QKJoint
from planish.solvers.rotary_pairs import RotaryPairs
from planish.solvers.value_output import ValueOutput

if TYPE_CHECKING:
    from planish.compress import Job


@dataclass(frozen=True)
class A3(Method):
    """Uniform ranks, statistics of the uncompressed model, as in the paper. Models that normalise q and k keep them.

    `qk`: the order of rotary pairs, "product" (the paper's) or "energy" (½ E|q_f|² E|k_f|²).
    `vo`: moments behind values and output, "attention" (the paper's for one query head per kv head, pooled within a
    group) or "values" (the paper's R_kv form for groups). `mlp`: score of neurons, "energy" (the paper's) or ridge
    "leverage". `refit`: least squares of o and of down on what is kept; false is the paper's plain slicing.
    `allocation` "mixed": ranks searched by the loss of the calibration text (see `plan_mixed`), "uniform".
    """

    title: ClassVar[str] = "joint reduction of Q–K, O–V and neurons to smaller dense shapes"
    reference: ClassVar[str] = "A3, arXiv 2505.12942"

    qk: Literal["product", "energy"] = "product"
    vo: Literal["attention", "values"] = "attention"
    mlp: Literal["energy", "leverage"] = "energy"
    refit: bool = True
    allocation: Literal["uniform", "mixed"] = "uniform"
    damping: float = 1e-8

    def solvers(self) -> list[Solver]:
        return [
            QKJoint(),
            RotaryPairs(self.qk),
            ValueOutput(self.vo, self.refit, self.damping),
            Neurons(self.mlp, refit=self.refit, damping=self.damping),
        ]

    def plan(self, job: Job) -> Plan:
        return job.spread(lambda unit: 1.0)

    def finish(self, job: Job, plan: Plan) -> None:
        if any(s.qk_norm for s in job.shapes):
            job.notes["qk"] = "left as they are: this family normalises q and k over all channels of a head"
