"""How long a run still takes, from what has been measured of it: the steps that are done, and what was predicted of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

Predicted = Sequence[tuple[str, Sequence[float]]]  # phases in their order: name, seconds of every step

PRIOR = 0.05  # part of a phase for which the pace of the whole run counts in its own: a first step alone may mislead


@dataclass
class Walk:
    """A phase that has begun: `steps`, predicted seconds of each (None: nothing was predicted), `done` of `total`, the clock
    when it began, and how much of the prediction was done before the first report, by an earlier run."""

    name: str
    steps: Sequence[float] | None
    total: int
    began: float
    done: int = 0
    now: float = 0.0
    skipped: int = 0

    def predicted(self, first: int, last: int) -> float:
        """Of the steps between, in the unit of the prediction; each is 1 where there is none."""
        if self.steps is None or len(self.steps) != self.total:
            whole = 1.0 if self.steps is None else sum(self.steps) / max(self.total, 1)
            return whole * (last - first)
        return sum(self.steps[first:last])

    @property
    def measured(self) -> tuple[float, float]:
        """(Seconds, what was predicted for them)."""
        return self.now - self.began, self.predicted(self.skipped, self.done)


@dataclass
class TimeLeft:
    """Reports of progress come in, with the clock; out comes the time that is left.

    Of the phase that runs: what its finished steps took, in proportion to what was predicted of its steps, and the pace of the
    whole run as if it were a further step, of `PRIOR` of the phase. Of later phases:
    what was predicted, times measured / predicted of all that is done. A phase that is reported without having been predicted
    counts by itself, and so does one whose results were cached; predicted ones that are passed over are not waited for.
    `ends`: the clock when the run stops in any case.
    """

    predicted: Predicted = ()
    began: float = 0.0
    ends: float = inf
    walks: list[Walk] = field(default_factory=list)
    _next: int = 0

    def report(self, name: str, done: int, total: int, now: float) -> None:
        """`done` of `total` steps of a phase are finished at this time of the clock (seconds); 0: the first one begins."""
        walk = self.walks[-1] if self.walks else None
        if walk is None or walk.name != name or done <= walk.done or total != walk.total:
            began = now if done == 0 else walk.now if walk else self.began
            steps = self._take(name.removeprefix("cached "))
            walk = Walk(name, None if name.startswith("cached ") else steps, total, began, skipped=max(done - 1, 0))
            self.walks.append(walk)
        walk.done, walk.now = done, now

    def _take(self, name: str) -> Sequence[float] | None:
        """The prediction of the next phase of this name."""
        for n in range(self._next, len(self.predicted)):
            if self.predicted[n][0] == name:
                self._next = n + 1
                return self.predicted[n][1]
        return None

    def left(self, now: float) -> float | None:
        """Seconds, or None where nothing tells: no step is done yet, and nothing was predicted."""
        if not self.walks:
            return max(sum(sum(s) for _, s in self.predicted) - (now - self.began), 0.0) if self.predicted else None
        walk = self.walks[-1]
        took, of = walk.measured
        rest = walk.predicted(walk.done, walk.total)
        known = [w.measured for w in self.walks if w.steps is not None]
        measured, foretold = (sum(part) for part in zip(*known, strict=True)) if known else (0.0, 0.0)
        rate = measured / foretold if foretold else 1.0
        if walk.steps is not None:
            prior = PRIOR * (of + rest)
            took, of = took + prior * rate, of + prior
        own = rest * (took / of if of else rate if walk.steps is not None else 0.0)
        later = sum(sum(steps) for _, steps in self.predicted[self._next :])
        return max(min(own + later * rate - (now - walk.now), self.ends - now), 0.0)

    @property
    def more(self) -> bool:
        """Whether phases may follow that nothing is known of."""
        return not self.predicted and self.ends == inf
