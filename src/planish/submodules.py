"""Which submodules go: how many, in which order, and the loss of the model without each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from planish.core import Edit, Plan, Unit
from planish.errors import InputError
from planish.stream import Stream

if TYPE_CHECKING:
    from planish.compress import Job

Edits = Mapping[int, Sequence[Edit]]
Key = TypeVar("Key")


def round_half_up(x: float) -> int:
    """7.5 → 8, as the published cache sizes show (30 blocks at 25 %: 240 MiB → 176 MiB)."""
    return floor(x + 0.5 + 1e-9)


def count_removed(job: Job, kinds: Sequence[str], sparsity: float | None, together: bool = False) -> dict[str, int]:
    """How many units of each kind go.

    `sparsity`: this share of each kind, rounded half up. Otherwise the fewest that bring the blocks' weights, with what
    the replacements add, under `job.keep`; numbers of two kinds differ by at most one, by none if `together`.
    At least one attention stays.
    """
    n = len(job.shapes)
    limit = {k: n - 1 if k == "attention" or together else n for k in kinds}
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise InputError(
                f"sparsity must lie in [0, 1), got {sparsity:g} (the share of submodules of each type that goes)"
            )
        wanted = round_half_up(sparsity * n)
        return {k: min(wanted, limit[k]) for k in kinds}
    saved = {k: saving(job, [Unit(0, k)]) for k in kinds}
    need = job.total - int(job.keep * job.total + 1e-6)
    first, last = kinds[0], kinds[-1]
    choices = [
        {first: a} | {last: b if first != last else a}
        for a in range(limit[first] + 1)
        for b in range(limit[last] + 1)
        if first == last or (a == b if together else abs(a - b) <= 1)
    ]
    able = [c for c in choices if sum(c[k] * saved[k] for k in kinds) >= need]
    if not able:
        smallest = 1 - max(sum(c[k] * saved[k] for k in kinds) for c in choices) / job.total
        raise InputError(
            f"keep {job.keep:g} cannot be reached by removing {' and '.join(kinds)} of {n} blocks: "
            f"the smallest keep is {-(-smallest * 10_000 // 1) / 10_000:g}"
        )
    return min(able, key=lambda c: (sum(c[k] * saved[k] for k in kinds), c[first]))


def saving(job: Job, units: Sequence[Unit]) -> int:
    """Weights that go when these units do, net of what their replacements add."""
    saved = sum(job.cost(u, 1) - job.cost(u, 0) for u in units)
    if saved <= 0:
        raise InputError(
            f"the bypass of {units[0]} would hold as many parameters as what it replaces: choose smaller ranks "
            "(--set attention_rank=…, ffn_rank=…)"
        )
    return saved


def make_plan(job: Job, removed: Sequence[Unit], sparsity: float | None) -> Plan:
    """Rank 0 for the removed units, 1 for the others; records what it amounts to."""
    gone = set(removed)
    plan = {u: 0 if u in gone else 1 for u in job.units}
    before = sum(job.cost(u, 1) for u in gone)
    added = sum(job.cost(u, 0) for u in gone)
    kept = 1 - (before - added) / job.total
    if sparsity is not None:
        job.keep = kept
    n = len(job.shapes)
    job.notes |= {
        "removed": {
            name: {"count": len(blocks), "of": n, "sparsity": len(blocks) / n, "blocks": blocks}
            for name in ("attention", "ffn")
            if (blocks := sorted(u.block for u in gone if u.name == name)) or any(u.name == name for u in job.units)
        },
        "sparsity_requested": sparsity,
        "parameters_removed": before,
        "parameters_added": added,
        "keep_net": kept,
    }
    return plan


def lowest(scores: Mapping[Unit, float], n: int) -> list[Unit]:
    """The n units with the lowest scores."""
    return sorted(scores, key=lambda u: (scores[u], u))[:n]


def merge(*several: Edits) -> dict[int, list[Edit]]:
    """Edits of one model, per block."""
    out: dict[int, list[Edit]] = {}
    for edits in several:
        for i, more in edits.items():
            out.setdefault(i, []).extend(more)
    return out


@torch.no_grad()
def trial_losses(stream: Stream, edits: Edits, trials: Mapping[Key, Edits]) -> dict[Key, float]:
    """Loss (nats per token on the stream's windows) of the model with `edits` and, in turn, each trial's own edits.

    One walk over the blocks for all trials: those that have begun to differ flow side by side (their activations are
    in memory together), so every block is read once.
    """
    main = stream.start()
    flows: dict[Key, list[Tensor]] = {}
    for i in range(len(stream)):
        plain = stream.place(stream.block(i, edits.get(i, ())))
        for key, trial in trials.items():
            if i in trial:
                block = stream.place(stream.block(i, [*edits.get(i, ()), *trial[i]]))
                flows[key] = stream.run(i, block, flows.get(key, main))
            elif key in flows:
                flows[key] = stream.run(i, plain, flows[key])
        main = stream.run(i, plain, main)
    return {key: stream.nll(flows.get(key, main)) for key in trials}


def search_greedily(
    stream: Stream, trials: Mapping[Key, Edits], enough: Callable[[list[Key]], bool]
) -> tuple[list[Key], list[float]]:
    """Make the trial that costs the least loss, again and again, until `enough`; what was made and the losses.

    Reference: SLEB (arXiv 2402.09025) Alg. 1, BlockPruner (arXiv 2406.10594) Alg. 1.
    """
    made: list[Key] = []
    losses: list[float] = []
    while not enough(made):
        edits = merge(*(trials[k] for k in made))
        rest = {k: t for k, t in trials.items() if k not in made}
        if not rest:
            break
        found = trial_losses(stream, edits, rest)
        best = min(rest, key=lambda k: found[k])
        made.append(best)
        losses.append(found[best])
    return made, losses
