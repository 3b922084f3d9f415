"""What cuts cost tokens that no moment holds, one by one.

By moments a cut that changes a linear by ΔW costs ½ tr(G ΔW R ΔWᵀ) nats per token, as if the gradient g and the input x of a token
knew nothing of each other, and as if other text were like the text that the cut was chosen by. Neither is so: of SmolLM2's cuts at
keep 0.8 those of the first blocks' gates cost 2.3 times that, those of the last blocks' 1.6 times, those between the same, and on
other text all of them 1.6 to 2.4 times as much again (docs/log/2026-12-02.md). So a few of the calibration windows are kept out of
the moments, ½ E[(gᵀ ΔW x)²] is measured on them at a few ranks of every unit, and predictions change by the factor between the
two, log-linear in the rank: by the median of all units' factors, times the root of what a unit's own is of that. The sum over
a plan's cuts then says what the plan loses (docs/tables/real.md).
Reference: none known; Fisher information without the factorisation of K-FAC (Martens & Grosse 2015) along one direction.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from planish.core import Frontier, Tokens, Unit
from planish.plan.follow import TINY, follow
from planish.plan.problem import Problem
from planish.solvers.forms import input_site
from planish.stats import Stats, Tap

TOKENS = 4096  # at most that cuts are priced on, or one window
PART = 8  # of the calibration windows at most one in so many, and none of fewer
SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)  # of ranks at which they are
TYPICAL = 0.7
MOST = 64.0  # times by which few tokens may change a prediction, or a part of it


def choose_aside(problem: Problem, windows: int, seq_len: int) -> int:
    """One calibration window in how many is kept out of the moments, for cuts to be priced on: 0, none, of fewer than eight or
    where no cut is priced so."""
    if windows < PART or not any(s.effect_role(u) for u, s in problem.units.items()):
        return 0
    return max(PART, min(-(-windows * seq_len // TOKENS), windows))


def row_taps(role: str) -> tuple[Tap, Tap]:
    """Taps of a linear's inputs and of the gradients at its output, in the windows that are set aside."""
    return Tap(f"dense:{input_site(role)}", "rows", part="aside"), Tap(f"grad:{role}.out", "rows", part="aside")


def token_taps(problem: Problem, i: int) -> set[Tap]:
    """Taps of all linears of block i at which cuts are priced."""
    roles = {problem.units[u].effect_role(u) for u in problem.block_units(i)}
    return {t for role in roles if role for t in row_taps(role)}


def price_by_tokens(problem: Problem, frontier: Frontier, stats: Stats) -> Frontier:
    """A frontier with factors, and what its cuts cost the tokens that `stats` hold, if any; no rank costs more than a lower one."""
    unit, loss = frontier.unit, torch.as_tensor(frontier.loss, dtype=torch.float64)
    solver, ranks = problem.units[unit], problem.choices(unit).ranks.tolist()
    role = solver.effect_role(unit)
    sites = (f"dense:{input_site(role)}", f"grad:{role}.out") if role else ()
    found = [
        sums["rows"] for site in sites for tap, sums in stats.sums.items() if (tap.site, tap.kind) == (site, "rows")
    ]
    if not found:
        return frontier
    if len(ranks) < 2 or not found[-1].any():  # nothing to choose, or no token of these windows is priced
        return replace(frontier, by_tokens=loss)
    tokens = Tokens(*(rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in found))
    at = torch.tensor(sorted({ranks[round(s * (len(ranks) - 2))] for s in SHARES}))
    effects = solver.effects(frontier, at.tolist(), tokens, problem.shapes[unit.block])
    measured = effects.double().square().mean(1) / 2
    factor = (measured.clamp(min=TINY) / loss[at].clamp(min=TINY)).clamp(1 / MOST, MOST)
    return replace(frontier, by_tokens=follow(loss, at, factor.log()).flip(0).cummax(0).values.flip(0))


def level(frontiers: dict[Unit, Frontier]) -> dict[Unit, Frontier]:
    """Frontiers whose prices change by the median factor of all units that have one, times what is their own of it, by half (in
    logarithms): few tokens tell a single unit's factor badly. Units without one change by the median."""
    factors = []
    for f in frontiers.values():
        at = round(TYPICAL * (len(f.loss) - 1))
        factors += [] if f.by_tokens is None or not f.loss[at] else [float(f.by_tokens[at]) / float(f.loss[at])]
    if not factors:
        return frontiers
    typical = float(torch.tensor(factors, dtype=torch.float64).median())
    found = {}
    for u, f in frontiers.items():
        usual = torch.as_tensor(f.loss, dtype=torch.float64) * typical
        found[u] = replace(f, by_tokens=usual if f.by_tokens is None else (usual * f.by_tokens).sqrt())
    return found
