"""What a method is: a published recipe as data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from planish.calibrate.losses import Probe
from planish.calibrate.measure import Measurements
from planish.core import Plan, Solver, Unit
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem

ORDER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # in which activations reach the linears


def find_step(role: str) -> int:
    """Which of `ORDER` a linear belongs to, those of a mixer with attention's ("mixer.out" with o); -1 for what is none."""
    if "." in role:
        return 1 if role.endswith(".out") else 0
    return next((n for n, roles in enumerate(ORDER) if role in roles), -1)


@dataclass(frozen=True)
class Method(ABC):
    """A published recipe as data: its fields are its hyper-parameters, its file name is its name.

    `stages` groups the units that are solved together; statistics are measured again between stages when `prefix`
    is "compressed" (inputs come from the compressed prefix). "both" also runs the dense prefix beside it.
    """

    title: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    prefix: ClassVar[str] = "dense"
    probe: ClassVar[Probe] = "sampled"  # what its gradients are of (`planish.calibrate.losses.output_gradient`)
    allocations: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()  # settings that must lie in [0, 1]
    coarse: ClassVar[bool] = False  # whether its result bears calibration with the blocks' products in bf16

    aliases: ClassVar[tuple[str, ...]] = ()
    dampings: ClassVar[tuple[str, ...]] = ()  # settings that make a singular Gram invertible; the first is recommended

    @property
    def name(self) -> str:
        """What `planish methods` lists it as."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def sparsity(self) -> float | None:
        """Share of the submodules that goes, where that was asked for in place of a budget."""
        return None

    @property
    def shuffled(self) -> float:
        """Share of the calibration windows that it measures on with their tokens in another order."""
        return 0.0

    @property
    def refit_share(self) -> float:
        """Share of the calibration windows that the solve runs through what is compressed so far."""
        return 1.0

    @property
    def sweeping(self) -> dict[str, str]:
        """Settings that a sweep takes where none is given, so that a further point costs little beside the first."""
        return {}

    @abstractmethod
    def solvers(self) -> list[Solver]:
        """Solvers that together cover the units it cuts; no unit belongs to two of them."""

    def takes(self, unit: Unit, budgets: Mapping[str, float]) -> bool:
        """Whether it cuts this unit under these budgets (see `planish.plan.budgets`): name → share that stays."""
        return True

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        """Ranks within the budgets; uniform unless the recipe says otherwise."""
        return self.decide(problem, problem.spread(lambda unit: 1.0))

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        """Ranks within a budget of the KV cache; the problem then has only the units that the cache holds, at their cost in it."""
        return self.decide(problem, problem.spread(lambda unit: 1.0))

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        """The plan before anything is measured, where `plan` measures: ranks as they are expected, and what that measuring takes
        on so many calibration windows. Unless told: uniform ranks, and one pass over the text.
        """
        return Foreseen(self.decide(problem, problem.spread(lambda unit: 1.0)), [Work()])

    def decide(self, problem: Problem, ranks: Plan, **more: Any) -> Planned:
        """Ranks for the problem's units, solved as this recipe does; `more`: further fields of `Planned`."""
        return Planned(ranks, problem.units, self.prefix, self.stages, self.refit_share, **more)

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        return [units]


def list_settings(method: Method) -> dict[str, Any]:
    """Hyper-parameters by name."""
    return {f.name: getattr(method, f.name) for f in fields(method)}


def stage_roles(units: list[Unit]) -> list[list[Unit]]:
    """Units of single linears in the order in which activations reach them: q, k, v → o → gate, up → down."""
    staged = [[u for u in units if find_step(u.name) == n] for n in range(len(ORDER))]
    return [stage for stage in staged if stage] or [[]]
