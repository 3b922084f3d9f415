"""How many experts stay: the same number in every block that has some, as stock programs hold nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from planish.core import INSIDE, Frontier, Plan, Unit
from planish.errors import InputError
from planish.folder.released import Released, find_released
from planish.folder.source import Source
from planish.plan.allocate import Alternative, Curve, choose
from planish.plan.planned import Planned
from planish.plan.problem import Problem, count_left, find_beside
from planish.plan.spread import BudgetError


def count_kept(problem: Problem) -> tuple[Plan, dict[str, str]]:
    """The largest number of experts within the budgets, equal in all blocks that have some, and what there is to say about it."""
    units = sorted(u for u in problem.units if u.name == "experts")
    if not units:
        raise InputError(f"{problem.name} drops experts; this model's blocks have none that could go")
    choices = [problem.choices(u) for u in units]
    common = set.intersection(*({int(r) for r in c.ranks} for c in choices))
    plans: list[Plan] = [dict.fromkeys(units, r) for r in sorted(common, reverse=True)]
    within = (p for p in plans if all(count_left(problem, p, b) <= b.limit for b in problem.budgets))
    if (found := next(within, None)) is not None:
        return found, describe_top(problem, found)
    least = {b: count_left(problem, plans[-1], b) for b in problem.budgets}
    budget = next(b for b, cost in least.items() if cost > b.limit)
    refusal = budget.refuse(f"{problem.name}, which only drops experts", least[budget])
    raise InputError(f"{refusal}; auto also cuts what is inside them, and attention")


def describe_top(problem: Problem, plan: Plan) -> dict[str, str]:
    """A remark where a token reaches fewer experts than before, because no more are left."""
    for unit, rank in plan.items():
        e = problem.shapes[unit.block].experts
        if unit.name == "experts" and e and (top := e.lower_top(rank)) < e.top:
            return {"top": f"fewer experts are left than a token reached: it reaches {top} of them instead of {e.top}"}
    return {}


def level_widths(plan: Plan, step: int) -> Plan:
    """Of a mixture's uniform plan, in which rounding has left some blocks a step wider than others: the lesser width for all,
    which stock programs hold."""
    found = dict(plan)
    for name in ("neurons", "mlp") if any(u.name == "neurons" for u in plan) else ():
        ranks = {r for u, r in plan.items() if u.name == name}
        if ranks and max(ranks) - min(ranks) <= step:
            found |= {u: min(ranks) for u in plan if u.name == name}
    return found


def choose_with_experts(
    groups: Sequence[Sequence[Alternative]],
    curves: Mapping[Unit, Curve],
    limits: Sequence[float],
    inside: Callable[[Plan], list[list[Alternative]]] = lambda kept: [],
) -> tuple[Plan, float]:
    """`planish.plan.allocate.choose`, with one number of experts for all blocks; `groups`: of everything else, `inside`: of cuts
    inside experts, where blocks keep so many.

    Every number is tried: a price alone passes over those at which the loss is concave, and spends far less than the budget.
    """
    experts = {u: c for u, c in curves.items() if u.name == "experts"}
    if not experts:
        return choose([*groups, *inside({})], limits)
    found, refused = list[tuple[Plan, float]](), list[BudgetError]()
    for alternative in tie(experts, [0.0] * len(limits)):
        kept = {c.unit: int(c.ranks[0]) for c in alternative.curves}
        try:
            found.append(choose([*groups, [alternative], *inside(kept)], limits))
        except BudgetError as error:
            refused.append(error)
    if not found:
        raise min(refused, key=lambda error: error.smallest)
    return min(found, key=lambda plan: plan[1])


def list_inside(
    problem: Problem, frontiers: Mapping[Unit, Frontier], curves: Mapping[Unit, Curve], kept: Plan
) -> list[list[Alternative]]:
    """Cuts inside experts, where blocks keep so many of these: what each costs more than none, which is less than nothing.

    Their losses are those of all experts: where some go, tokens reach as many as before. One width for all blocks where the
    target holds no other.
    """
    found = dict[Unit, Curve]()
    for unit in (u for u in curves if u.name in INSIDE):
        beside = find_beside(problem, unit, kept)
        cost = problem.curve(frontiers[unit], beside).cost
        alone = 0.0 if beside or Unit(unit.block, "experts") in kept else cost[:, -1:]
        found[unit] = replace(curves[unit], cost=cost - cost[:, -1:] + alone)
    nothing = [0.0] * len(problem.budgets)
    if found and {u.name for u in found} <= {*problem.target.uniform}:
        return [tie(found, nothing)]
    return [[Alternative((c,), nothing)] for c in found.values()]


def tie(curves: Mapping[Unit, Curve], fixed: Sequence[float]) -> list[Alternative]:
    """One rank for all of these units: an alternative for each that all could have, of curves with that rank alone."""
    common = set.intersection(*({int(r) for r in c.ranks} for c in curves.values()))
    found = []
    for rank in sorted(common):
        few = []
        for c in curves.values():
            at = int((c.ranks == rank).nonzero()[0])
            part = slice(at, at + 1)
            few.append(
                replace(c, ranks=c.ranks[part], cost=c.cost.reshape(-1, len(c.ranks))[:, part], loss=c.loss[part])
            )
        found.append(Alternative(tuple(few), fixed))
    return found


def find_kept(problem: Problem, planned: Planned, source: Source) -> Released | None:
    """The packed checkpoint that a model was read from, where its tensors can be written as they are stored: nothing but whole
    experts goes, as many in every block, and no budget counts other bytes. None: something is rounded anew."""
    units = {u: s for u, s in planned.solvers.items() if u in planned.ranks}
    cut = [u for u, s in units.items() if planned.ranks[u] < s.ranks(u, problem.shapes[u.block])[-1]]
    if any(b.name == "max_bytes" for b in problem.budgets) or planned.make or planned.edits or not cut:
        return None
    numbers = {planned.ranks.get(Unit(s.block, "experts"), s.experts.number) for s in problem.shapes if s.experts}
    if len(numbers) > 1 or any(u.name != "experts" for u in cut):
        return None
    return find_released(source)
