"""Equal ranks in all blocks, where a target's graphs hold one size of values or of feed-forwards only."""

from __future__ import annotations

from dataclasses import replace

from planish.calibrate.measure import Measurements
from planish.plan import targets
from planish.plan.frontiers import measure_frontiers
from planish.plan.planned import Planned
from planish.plan.problem import Problem, count_left, find_beside
from planish.plan.spread import BudgetError

HELD_BY = {"attention": "vo", "ffn": "mlp"}  # a whole submodule that went → the unit of it that must be equal elsewhere


def make_uniform(problem: Problem, measure: Measurements, planned: Planned) -> Planned:
    """The plan with the ranks of the target's uniform units chosen again, equal in all blocks.

    Least predicted loss of these units within what the plan leaves of every budget for them; the rest stays as it is.
    Raises InputError where no equal ranks fit.
    """
    problem = replace(problem, units=planned.solvers)
    frontiers = planned.frontiers or measure_frontiers(problem, measure)
    uniform, plan = set(problem.target.uniform), planned.ranks
    cut = {u.name for u in plan} & uniform
    gone = {(u.block, HELD_BY.get(u.name)) for u, r in plan.items() if r < problem.full(u)}
    plan = plan | {  # where the method left a block whole, it must come along
        u: problem.full(u)
        for u in problem.units
        if u.name in cut and u in frontiers and (u.block, u.name) not in gone and u not in plan
    }
    others = []
    for b in problem.budgets:
        taken = count_left(problem, plan, b)
        own = ((u, r) for u, r in plan.items() if u.name in uniform)
        others.append(taken - sum(problem.cost(u, r, b, find_beside(problem, u, plan)) for u, r in own))
    limits = [b.limit - o for b, o in zip(problem.budgets, others, strict=True)]
    try:
        curves = {u: problem.curve(frontiers[u], find_beside(problem, u, plan)) for u in plan}
        plan = targets.make_uniform(problem.target, plan, curves, limits)
    except BudgetError as error:
        who = f"{problem.name} for {problem.target.name}"
        raise problem.budgets[error.which].refuse(who, error.smallest + others[error.which]) from None
    ranks = {n: next(r for u, r in plan.items() if u.name == n) for n in sorted(uniform & {u.name for u in plan})}
    return replace(planned, ranks=plan, frontiers=frontiers, notes={**planned.notes, "uniform": ranks})
