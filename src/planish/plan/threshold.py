"""Ranks by one threshold: every unit keeps the directions whose score reaches it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from planish.core import Plan, Unit
from planish.plan.problem import Problem


def spread_by_threshold(problem: Problem, scores: Mapping[Unit, Tensor]) -> Plan:
    """rank_u = #{i: score_u,i ≥ τ}, with the least τ that keeps within all budgets, found by bisection.

    `scores`: falling, one per direction, in [0, 1]. A rank that is not admissible becomes the next lower one, and one that no
    smaller form holds leaves the unit whole. Where even τ beyond all scores costs too much the refusal is that of uniform ranks.
    What rounding leaves over raises the units whose next direction scores highest by one step each.
    """
    choices = {u: problem.choices(u) for u in problem.units}
    allowed = {u: c.allowed(problem.step).nonzero().flatten() for u, c in choices.items()}
    limits = torch.tensor(problem.limits, dtype=torch.float64) * (1 + 1e-12)

    def at(tau: float) -> dict[Unit, int]:
        found = {}
        for u, c in choices.items():
            rank = int((scores[u] >= tau).sum())
            beyond = len(c.ranks) > 1 and rank > int(c.ranks[-2])
            low = allowed[u][c.ranks[allowed[u]] <= rank]
            found[u] = len(c.ranks) - 1 if beyond else int(low[-1]) if len(low) else int(allowed[u][0])
        return found

    def spent(plan: Mapping[Unit, int]) -> Tensor:
        return sum((choices[u].cost[:, i] for u, i in plan.items()), torch.zeros_like(limits))

    low, high = -1.0, 2.0
    plan = at(high)
    if not (spent(plan) <= limits).all():
        return problem.spread(lambda unit: 1.0)
    if (spent(at(low)) <= limits).all():
        plan = at(low)
    for _ in range(60):
        middle = (low + high) / 2
        found = at(middle)
        low, high = (low, middle) if (spent(found) <= limits).all() else (middle, high)
        plan = found if high == middle else plan
    for u in sorted(
        plan, key=lambda u: (-float(scores[u][min(int(choices[u].ranks[plan[u]]), len(scores[u]) - 1)]), u)
    ):
        higher = [int(i) for i in allowed[u] if i > plan[u]]
        raised = plan | {u: higher[0]} if higher else plan
        plan = raised if (spent(raised) <= limits).all() else plan
    return {u: int(choices[u].ranks[i]) for u, i in plan.items()}


def scale_scores(s: Tensor) -> Tensor:
    """Singular values (n,), falling → (s − min) / (max − min) in [0, 1]."""
    return (s - s.min()) / (s.max() - s.min()).clamp(min=torch.finfo(s.dtype).tiny)
