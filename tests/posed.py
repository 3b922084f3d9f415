"""A method, its problem on a model and what it measures with: what most tests of plans and solves start from."""

from __future__ import annotations

from typing import Any, NamedTuple

from planish.calibrate.cache import Cache
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream
from planish.core import Plan
from planish.methods import find_method, make_plan, pose
from planish.methods.method import Method
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.request import Limits


class Posed(NamedTuple):
    method: Method
    problem: Problem
    measure: Measurements

    def plan(self) -> Planned:
        """Within the budgets, and uniform where the target asks for it."""
        return make_plan(self.method, self.problem, self.measure)

    def left(self, plan: Plan) -> float:
        """What a plan leaves of the main budget."""
        main = self.problem.main
        cut = sum(self.problem.cost(u, self.problem.full(u)) - self.problem.cost(u, r) for u, r in plan.items())
        return main.limit - (main.total - cut)


def pose_on(
    stream: Stream, method: str | Method, keep: float | None = None, cache: Cache | None = None, **more: Any
) -> Posed:
    """`more`: `asked` in place of `keep`, `settings` of the method, and what `planish.methods.pose` takes."""
    asked, found = more.pop("asked", None) or Limits(keep=keep), find_method(method, more.pop("settings", {}))
    length = stream.batches[0].shape[1] if stream.batches else 0
    return Posed(found, pose(found, stream.source, asked, length=length, **more), Measurements(stream, cache))
