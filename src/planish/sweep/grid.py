"""What a sweep's points are: methods at budgets, or the three curves of sizes.

| curve | at a size, in bytes of the files |
|---|---|
| bits | all weights, rounded: every type that one of the sizes holds, the next larger one, and types mixed to fill each size |
| cuts | 16 bits, so many of the weights as the method fits into the size |
| both | `--bits auto`: cuts and types compete (`planish.sizes.fit`) |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import nan

from planish.errors import InputError
from planish.evaluate.report.points import Point
from planish.folder.source import Source
from planish.methods import find_method
from planish.methods.method import Method
from planish.request import Grid, Limits, Request, label
from planish.sizes.ladder import list_rungs, order_rungs


@dataclass(frozen=True)
class Trial:
    """One method at one budget. `text`: the method and its settings as they were given, as in "auto:anchor=0"; `curve`: of sizes
    (see above), empty elsewhere."""

    text: str
    method: Method
    request: Request
    curve: str = ""

    @property
    def name(self) -> str:
        """Of its folder below points/."""
        limits = [f"{v:g}" if k == "keep" else f"{label(k)}{v:.7g}" for k, v in self.request.given.items()]
        if self.curve == "bits":
            limits = []
        bits = [] if self.request.bits is None else [f"{self.request.bits}-bits"]
        text = "rounding" if self.curve == "bits" else self.text
        return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", "-".join([text, *limits, *bits]))

    def point(self) -> Point:
        """Its row, before anything is measured."""
        given = self.request.given
        settings = "{}" if self.curve == "bits" else json.dumps(dict(self.request.settings))
        return Point(
            self.name, self.method.name, settings, nan if self.curve in ("cuts", "both") else next(iter(given.values())),
            budgets=json.dumps(given), curve=self.curve, asked_bits=self.request.bits or "",
        )  # fmt: skip


def list_sizes(grid: Grid, asked: Request, source: Source) -> list[Trial]:
    """The three curves of a grid's sizes, the largest first; none where no sizes are asked for."""
    if not grid.sizes:
        return []
    if grid.keeps or grid.kv_keeps or grid.flops_keeps:
        raise InputError("--max-bytes draws curves over sizes: leave the other budgets out")
    methods, sizes = read_methods(grid), sorted(set(grid.sizes), reverse=True)
    asked = asked.model_copy(update={"ladder": False})

    def make(text: str, method: Method, settings: dict[str, str], curve: str, **limits: object) -> Trial:
        update = {"method": method.name, "settings": settings} | limits
        return Trial(text, method, asked.model_copy(update=update), curve)

    text, settings, method = methods[0]
    auto = asked.model_copy(update={"bits": "auto"})
    rungs = {r.bits: r for size in sizes for r in list_rungs(auto, source, size)}
    if not rungs:
        raise InputError(f"--max-bytes: nothing of {source.name} can be rounded for --target {asked.target}")
    plain = [make(text, method, settings, "bits", keep=1.0, bits=r.bits) for r in order_rungs([*rungs.values()])]
    return plain + [
        make(text, method, settings, curve, max_bytes=size, bits="auto" if curve == "both" else None)
        for text, settings, method in methods
        for curve in ("cuts", "both")
        for size in sizes
    ]


def tell_sweeping(trial: Trial) -> Iterable[str]:
    """Settings that the sweep chose, which `compress` would not."""
    for name, value in trial.method.sweeping.items():
        given = f"{name}=" in trial.text.replace("-", "_").replace(" ", "")
        if trial.request.settings[name] == value and not given:
            default = getattr(type(trial.method), name)
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            yield (
                f"{trial.text} ran with {name}={value}, so that further points cost little; "
                f"{trial.text}:{name}={shown} gives what compress does"
            )


def list_trials(grid: Grid, asked: Request) -> list[Trial]:
    """Every method at every combination of the lists of budgets; the smallest budget first: it measures what the others need."""
    chosen = read_methods(grid)
    lists = [grid.keeps, grid.kv_keeps, grid.flops_keeps]
    lists = lists if any(lists) else [(0.9, 0.8, 0.7), (), ()]
    pairs = product(*(values or (None,) for values in lists))
    budgets = [Limits.ask(keep=k, kv_keep=v, flops_keep=f) for k, v, f in pairs]
    budgets.sort(key=lambda b: list(b.given.values()))
    return [
        Trial(text, method, asked.model_copy(update={**b.limits, "method": method.name, "settings": settings}))
        for text, settings, method in chosen
        for b in budgets
    ]


def read_methods(grid: Grid) -> list[tuple[str, dict[str, str], Method]]:
    chosen = [parse_method(text) for text in grid.methods]
    if not chosen:
        raise InputError("a sweep needs at least one method")
    return chosen


def parse_method(text: str) -> tuple[str, dict[str, str], Method]:
    """ "auto:anchor=0:units=linear" → (the text, {"anchor": "0", …}, the method)."""
    name, *pairs = text.strip().split(":")
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--methods {text}: {pair!r} has no value; write {name}:name=value")
        settings[key.strip().replace("-", "_")] = value.strip()
    settings = find_method(name, settings).sweeping | settings
    return text.strip(), settings, find_method(name, settings)
