"""Of many small changes to a model those that cost the least loss: one after the other, the rest compared anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from planish.calibrate.losses import NOTHING, list_labels, nll
from planish.calibrate.measure import Edits
from planish.calibrate.stream import Hidden, Stream
from planish.core import Unit
from planish.plan.foreseen import Work, compare_trials
from planish.plan.problem import Problem
from planish.plan.removal import merge

Key = TypeVar("Key")
ROUNDS = (1 / 8, 1 / 4, 1 / 2, 1)  # shares of the tokens on which many trials are compared, one round after the other
LEAST = 1000  # tokens of a round


def list_rounds(priced: Sequence[int]) -> list[int]:
    """After how many windows, of which so many tokens are priced, trials are compared: see `ROUNDS`, `LEAST`."""
    sums = [*accumulate(priced)]
    enough = [min(max(LEAST, share * sums[-1]), sums[-1]) for share in ROUNDS]
    return sorted({next(n for n, s in enumerate(sums, 1) if s >= least) for least in enough})


def count_further(n: int, trials: int) -> int:
    """How many of these trials, of which the n best are wanted, are compared further: a third, but twice n."""
    return min(trials, max(2 * n, ceil(trials / 3)))


def list_race(starts: Sequence[int], n: int, windows: int, length: int) -> list[Work]:
    """The walks of `race` among trials that begin to differ at these blocks, on windows of so many tokens."""
    walks, ends = list[Work](), list_rounds([length - 1] * windows)
    for start, end in pairwise([0, *ends]):
        walks.append(compare_trials(starts, end - start))
        left = count_further(n, len(starts))
        starts = [starts[(2 * j + 1) * len(starts) // (2 * left)] for j in range(left)]  # which is not known
    return walks


def list_greedy(problem: Problem, units: Iterable[Unit], gone: Iterable[Unit], windows: int) -> list[Work]:
    """The walks of a greedy search among units that ends with some of them gone."""
    rest, walks = list(units), list[Work]()
    for unit in gone:
        walks += list_race([u.block for u in rest], 1, windows, problem.context)
        rest.remove(unit)
    return walks


@torch.no_grad()
def trial_losses(stream: Stream, edits: Edits, trials: Mapping[Key, Edits]) -> dict[Key, float]:
    """Loss (nats per token on the stream's windows) of the model with `edits` and, in turn, each trial's own edits.

    One walk over the blocks for all trials: those that have begun to differ flow side by side (their activations are
    in memory together), so every block is read once.
    """
    main = stream.start()
    stream.report("search", 0, len(stream))
    flows: dict[Key, Hidden] = {}
    for i in range(len(stream)):
        plain = stream.place(stream.block(i, edits.get(i, ())))
        for key, trial in trials.items():
            if i in trial:
                block = stream.place(stream.block(i, [*edits.get(i, ()), *trial[i]]))
                flows[key] = stream.run(i, block, flows.get(key, main))
            elif key in flows:
                flows[key] = stream.run(i, plain, flows[key])
        main = stream.run(i, plain, main)
        stream.report("search", i + 1, len(stream))
    return {key: nll(stream, flows.get(key, main)) for key in trials}


def race(stream: Stream, trials: Mapping[Key, Edits], n: int, edits: Edits) -> dict[Key, float]:
    """`trial_losses` of some of the trials, the n best among them.

    All trials are compared on the first windows, the better third of them, but 2 n at least, on twice as many, and so on: on
    all windows are those that were among the best on every share of them.
    Reference: successive halving (Jamieson and Talwalkar, arXiv 1502.07943).
    """
    windows = torch.cat(stream.batches)
    priced = [int((list_labels(w[None]) != NOTHING).sum()) for w in windows]
    losses, ends = dict.fromkeys(trials, 0.0), list_rounds(priced)
    for start, end in pairwise([0, *ends]):
        found = trial_losses(stream.part(windows[start:end]), edits, {k: trials[k] for k in losses})
        share = sum(priced[start:end]) / max(sum(priced[:end]), 1)
        losses = {k: losses[k] + share * (loss - losses[k]) for k, loss in found.items()}
        if end < ends[-1]:
            losses = {k: losses[k] for k in sorted(losses, key=lambda k: losses[k])[: count_further(n, len(losses))]}
    return losses


def search_greedily(
    stream: Stream, trials: Mapping[Key, Edits], enough: Callable[[list[Key]], bool], edits: Edits | None = None
) -> tuple[list[Key], list[float]]:
    """Make the trial that costs the least loss, again and again, until `enough`; what was made and the losses.

    `edits` are made from the start; trials are compared by `race`.
    Reference: SLEB (arXiv 2402.09025) Alg. 1, BlockPruner (arXiv 2406.10594) Alg. 1.
    """
    made: list[Key] = []
    losses: list[float] = []
    while not enough(made):
        now = merge(edits or {}, *(trials[k] for k in made))
        rest = {k: t for k, t in trials.items() if k not in made}
        if not rest:
            break
        found = race(stream, rest, 1, now)
        best = min(found, key=lambda k: found[k])
        made.append(best)
        losses.append(found[best])
    return made, losses


def search_by_weight(
    stream: Stream,
    trials: Mapping[Key, Edits],
    saved: Mapping[Key, Tensor],
    need: Tensor,
    able: Callable[[list[Key]], list[Key]],
) -> tuple[list[Key], list[float]]:
    """Make the trial that costs the least loss per cost saved, until `need` (budgets,) is saved; what was made and losses.

    `saved` (budgets,): by each trial; no more of it counts than is missing, as a share of what is needed. `able(made)`:
    what may still be made.
    """
    made: list[Key] = []
    losses: list[float] = []
    loss = nll(stream, stream.outputs())
    while ((missing := (need - sum(saved[k] for k in made)).clamp(min=0)) > 0).any():

        def gain(k: Key, missing: Tensor = missing) -> float:
            return float((torch.minimum(saved[k], missing) / need.clamp(min=1)).sum())

        found = trial_losses(
            stream, merge(*(trials[k] for k in made)), {k: trials[k] for k in able(made) if gain(k) > 0}
        )
        best = min(found, key=lambda k: (found[k] - loss) / gain(k))
        made.append(best)
        losses.append(loss := found[best])
    return made, losses
