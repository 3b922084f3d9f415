"""From a model and a method to a smaller folder."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import processes
from planish.activations import Room
from planish.allocate import BudgetError, Choices, Curve, spread, spread_by_kind
from planish.budgets import (
    Asked,
    Budget,
    CacheNumbers,
    count_flops,
    count_headers,
    label,
    make_budget,
    read_asked,
    show,
)
from planish.cache import Cache, open_cache
from planish.checkpoint import apply_edits, count_block, is_empty, kv_bytes, narrow, write_config
from planish.core import SUBMODULES, Edit, Frontier, Method, Plan, Progress, Shape, Solver, Unit, Weights
from planish.errors import InputError
from planish.kept import Kept
from planish.latency import Latency, Table, make_latency, read_table
from planish.methods import find_method
from planish.modules import Spec, get_linear
from planish.shards import Shard, hash_file
from planish.sources import FolderSource, Source, open_source
from planish.stats import Stats, Tap
from planish.stream import Stream, reuse_memory
from planish.targets import check_plan, constrain, find_target, fit_target, make_uniform, needs_uniform
from planish.version import __version__
from planish.writer import Writer, tidy, unseal


@dataclass
class Result:
    """What `compress` reports; counted from the written weights."""

    method: str
    keep_requested: float
    keep: float
    params_before: int
    params_after: int
    block_params_before: int
    block_params_after: int
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int
    format: str
    output: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    bytes_before: int = 0  # of the files that the uncut model is written in, headers included
    bytes_after: int = 0  # of the written files
    flops_per_token_before: int = 0  # two per weight of the blocks and the head, and attention over `context` tokens
    flops_per_token_after: int = 0
    context: int = 0
    latency_ms_before: float | None = None  # per decoded token, as `planish.latency` predicts it; None unless asked
    latency_ms_after: float | None = None
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → asked, achieved
    submodules: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # removed ones by kind: count, of, sparsity, blocks

    @property
    def removed(self) -> float:
        """The papers' ratio: share of the blocks' weights that is gone."""
        return 1 - self.keep

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed": self.removed, "keep_whole_model": self.params_after / self.params_before}


class Job:
    """One method on one model and one calibration text under one budget: what a method's `plan` can ask."""

    def __init__(
        self,
        stream: Stream,
        method: Method,
        keep: float | None = None,
        *,
        asked: Asked | None = None,
        step: int = 1,
        progress: Progress | None = None,
        cache: Cache | None = None,
        target: str = "any",
        measured: dict[str, float] | None = None,
    ):
        self.stream, self.method, self.step, self.progress = stream, method, step, progress
        self.cache = cache or Cache()
        self.shapes: list[Shape] = [stream.source.shape(i) for i in range(len(stream))]
        self.asked = asked or Asked(keep=keep)
        self.cache_only = set(self.asked.given) == {"kv_keep"}
        beside = sorted(set(self.asked.given) - {"keep"})
        if beside and getattr(method, "sparsity", None) is not None:
            raise InputError(f"sparsity says how much goes; {label(beside[0])} cannot hold beside it: give one of them")
        self.budgets: list[Budget] = self.make_budgets(measured or {})
        shares = {b.name: b.share for b in self.budgets}
        self.units: dict[Unit, Solver] = {}
        for solver in method.solvers():
            for shape in self.shapes:
                units = [u for u in solver.units(shape) if method.takes(u, shares)]
                if self.cache_only:  # nothing else is cut then
                    units = [u for u in units if solver.cache(u, shape, solver.ranks(u, shape)[-1]) > 0]
                self.units |= dict.fromkeys(units, solver)
        self.target = target
        self.stack = fit_target(target, stream.source, self.shapes)
        self.units = constrain(self.stack, find_name(method), self.units, self.shapes)
        self.weights = sum(s.count() for s in self.shapes)
        self.costs: dict[tuple[int, str, Shape], tuple[Solver, Choices]] = {}
        for b in self.budgets:
            uncut = not any(self.choices(u).prices(self.budgets.index(b)) for u in self.units)
            if isinstance(b, CacheNumbers) and (self.cache_only or b.share < 1) and uncut:
                what = "cuts neither keys nor values" + (f" for {target}" if self.stack.refuses else "")
                normed = (
                    " of this model, which normalises queries and keys" if any(s.qk_norm for s in self.shapes) else ""
                )
                raise InputError(
                    f"--kv-keep: {find_name(method)} {what}{normed}; use auto, palu, a3, modegpt or flat-llm"
                )
        # what a method's own rule asks for: of two budgets the one that prices every linear, and of these the tighter
        self.main = min(self.budgets, key=lambda b: (isinstance(b, CacheNumbers), b.share))
        self.keep, self.total = self.main.share, self.main.total
        self.stored = Kept(stream.room)  # statistics that a plan measured and the solve uses again, per block
        self.edits: dict[int, list[Edit]] = {}  # per block, what the plan has worked out itself; not solved again
        self.notes: dict[str, Any] = {}  # what the method wants recorded in the manifest
        self.remarks: dict[str, str] = {}  # the same, and said to the user: what the method could not cut, and why
        self.seconds: dict[str, float] = {}
        self.timers: list[Timer] = []  # running now, the innermost last
        stream.clock = partial(Timer, self.seconds, running=self.timers)
        self.finished: dict[
            int, Callable[[nn.Module], Any]
        ] = {}  # blocks of an interrupted run: turn into the solved one
        self.caught: list[warnings.WarningMessage] = []
        self.known: dict[Unit, Frontier] = {}  # what a plan was chosen by
        self.errors: dict[str, float] = {}  # predicted loss of the planned rank, per unit

    def make_budgets(self, measured: Mapping[str, float]) -> list[Budget]:
        found: list[Budget] = []
        for name, value in self.asked.given.items():
            if name == "max_latency":
                found.append(make_latency(value, measured, self.shapes))
            else:
                found.append(make_budget(name, value, self.stream.source, self.shapes, self.context))
        return found

    @property
    def kept_budgets(self) -> list[Budget]:
        """Those that the plan keeps to: none where a `sparsity` was given instead."""
        return [] if self.notes.get("sparsity_requested") is not None else self.budgets

    @property
    def table(self) -> Table | None:
        """Measured latencies, where they were asked for."""
        return next((b.table for b in self.budgets if isinstance(b, Latency)), None)

    @property
    def context(self) -> int:
        """Tokens that FLOPs and latency are counted behind."""
        return self.asked.context or (self.stream.batches[0].shape[1] if self.stream.batches else 0)

    @property
    def budget(self) -> float:
        """What all units together may cost of the main budget."""
        return self.main.limit - (self.total - self.full_cost())

    @property
    def limits(self) -> list[float]:
        """What all units together may cost of every budget."""
        full = [sum(float(self.choices(u).full[n]) for u in self.units) for n in range(len(self.budgets))]
        return [b.limit - (b.total - f) for b, f in zip(self.budgets, full, strict=True)]

    def full_cost(self, units: list[Unit] | None = None) -> float:
        return sum(self.cost(u, self.full(u)) for u in (self.units if units is None else units))

    def full(self, unit: Unit) -> int:
        return self.units[unit].ranks(unit, self.shapes[unit.block])[-1]

    def cost(self, unit: Unit, rank: int, budget: Budget | None = None) -> float:
        """Of the main budget, or another one."""
        return (budget or self.main).cost(self.units[unit], unit, self.shapes[unit.block], rank)

    def count(self, unit: Unit, rank: int) -> int:
        """Weights left in the unit at this rank, whatever the budgets count."""
        return self.units[unit].cost(unit, self.shapes[unit.block], rank)

    def choices(self, unit: Unit) -> Choices:
        """Admissible ranks of a unit, and what they cost of every budget."""
        solver, shape = self.units[unit], self.shapes[unit.block]
        key = (id(solver), unit.name, replace(shape, block=0))
        if key not in self.costs:  # the same in blocks of the same shape
            ranks = list(solver.ranks(unit, shape))
            cost = torch.tensor([[b.cost(solver, unit, shape, r) for r in ranks] for b in self.budgets])
            self.costs[key] = solver, Choices(torch.tensor(ranks), cost.double())
        return self.costs[key][1]

    def spread(self, share: Callable[[Unit], float], by_kind: bool = False) -> Plan:
        """Ranks in proportion to `share`, within the budgets (see `spread`, `spread_by_kind` of `planish.allocate`)."""
        try:
            rule = spread_by_kind if by_kind else spread
            return rule({u: self.choices(u) for u in self.units}, share, self.limits, self.step)
        except BudgetError as error:
            b = self.budgets[error.which]
            refusal = b.refuse(find_name(self.method), error.smallest + b.limit - self.limits[error.which])
            coarse = [f"ranks are multiples of {self.step}, see --round-to"] if self.step > 1 else []
            why = "; ".join([*coarse, *self.remarks.values()])
            raise InputError(f"{refusal} ({why})" if why else str(refusal)) from None

    def plan(self) -> Plan:
        """The method's ranks within the budgets."""
        plan = self.method.plan_cache(self) if self.cache_only else self.method.plan(self)
        check_plan(self.stack, find_name(self.method), plan)
        if needs_uniform(self.stack, plan):
            plan = self.make_uniform(plan)
        return plan

    def make_uniform(self, plan: Plan) -> Plan:
        """The plan with equal ranks in all blocks where the target needs that."""
        self.known = self.known or self.frontiers()
        uniform = set(self.stack.uniform)
        cut = {u.name for u in plan} & uniform
        gone = {(u.block, {"attention": "vo", "ffn": "mlp"}.get(u.name)) for u, r in plan.items() if r < self.full(u)}
        plan = plan | {  # where the method left a block whole, it must come along
            u: self.full(u)
            for u in self.units
            if u.name in cut and u in self.known and (u.block, u.name) not in gone and u not in plan
        }
        curves = {u: self.curve(self.known[u]) for u in plan}
        others = []  # what the plan leaves of everything else stays; the rest goes to the units that must be equal
        for b in self.budgets:
            taken = b.total - sum(self.cost(u, self.full(u), b) - self.cost(u, r, b) for u, r in plan.items())
            others.append(taken - sum(self.cost(u, r, b) for u, r in plan.items() if u.name in uniform))
        try:
            limits = [b.limit - o for b, o in zip(self.budgets, others, strict=True)]
            plan = make_uniform(self.stack, plan, curves, limits)
        except BudgetError as error:
            who = f"{find_name(self.method)} for {self.target}"
            raise self.budgets[error.which].refuse(who, error.smallest + others[error.which]) from None
        self.notes["uniform"] = {
            n: next(r for u, r in plan.items() if u.name == n) for n in sorted(uniform & {u.name for u in plan})
        }
        return plan

    def curve(self, frontier: Frontier) -> Curve:
        """Admissible ranks of a unit with their costs and predicted losses; leaving it whole loses nothing."""
        choices = self.choices(frontier.unit)
        kept = choices.allowed(self.step)
        loss = torch.as_tensor(frontier.loss, dtype=torch.float64)[choices.ranks[kept]]
        return Curve(frontier.unit, choices.ranks[kept], choices.cost[:, kept], loss)

    def predicted(self, plan: Plan) -> float | None:
        """Predicted loss of a plan, summed over its units: nats, or the frontiers' squared errors; None if none is known."""
        if not all(u in self.known for u in plan):
            return None
        return sum(float(self.known[u].loss[r]) for u, r in plan.items())

    def measure(
        self,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        edits: dict[int, list[Edit]] | None = None,
    ) -> None:
        """One pass over the uncompressed model, or over the model with `edits` (per block); see `Stream.sweep`."""
        with self.phase("statistics"):
            if edits:
                self.stream.sweep(taps, use, self.progress, edits=edits)
            else:
                self.recall("forward", taps, use, self.stream.sweep, range(len(self.shapes)))

    def recall(
        self,
        origin: str,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        sweep: Callable[..., object],
        order: Sequence[int],
    ) -> None:
        """Hand every block's statistics of the uncompressed model to `use`; `sweep` measures what the cache lacks."""
        wanted = {s.block: taps(s) for s in self.shapes}
        missing = {i: self.cache.missing(origin, i, t) for i, t in wanted.items()}

        def merge(i: int, block: nn.Module, stats: Stats) -> None:
            self.cache.keep_stats(origin, i, stats)
            stats.merge(self.cache.stats(origin, i, set(wanted[i]) - set(missing[i])))
            stats.origin = origin
            use(i, block, stats)

        if any(missing.values()) or not any(wanted.values()):
            sweep(lambda shape: missing[shape.block], merge, self.progress)
            return
        for n, i in enumerate(order):
            merge(i, self.stream.block(i), Stats())
            if self.progress:
                self.progress("cached statistics", n + 1, len(order))

    def frontiers(self, solver: Solver | None = None) -> dict[Unit, Frontier]:
        """Every unit's frontier from the uncompressed model's statistics, without the factors.

        `solver`: decompose with this one instead of the units' own.
        """
        found: dict[Unit, Frontier] = {}

        def use(i: int, block: nn.Module, stats: Stats) -> None:
            found.update(self.decompose(i, block, stats, solver))

        self.measure(lambda shape: self.taps(self.block_units(shape.block), solver), use)
        return found

    def decompose(self, i: int, block: nn.Module, stats: Stats, solver: Solver | None = None) -> dict[Unit, Frontier]:
        """Frontiers of block i's units, without the factors."""
        weights, found, new = read_weights(block, self.stream), {}, []
        units = self.block_units(i)
        for n in processes.own_work([self.full_cost([u]) for u in units]):
            unit = units[n]
            used = solver or self.units[unit]
            if f := self.cache.losses(stats.origin, used, unit):
                found[unit] = f
                continue
            with self.phase("frontiers"):
                f = used.decompose(unit, weights, stats, self.shapes[i])
            found[unit] = Frontier(unit, f.loss, {}, f.nats)
            new.append((used, found[unit]))
        self.cache.keep_losses(stats.origin, new)
        found = {u: f for part in processes.gather(found) for u, f in part.items()}
        return {u: found[u] for u in units}

    def gradients(
        self,
        use: Callable[[int, nn.Module, Stats], None],
        taps: Callable[[Shape], list[Tap]] | None = None,
        edits: dict[int, list[Edit]] | None = None,
        whole: bool = False,
    ) -> None:
        """One pass forward and back over the uncompressed model, or the one that `edits` make; see `Stream.sweep_back`.

        Without `taps`: those of all units' frontiers; what the solve uses again, with `whole` all of it, stays in `stored`.
        """

        def keep(i: int, block: nn.Module, stats: Stats) -> None:
            use(i, block, stats)
            self.stored[i] = stats if whole else stats.only(self.taps(self.block_units(i)))

        with self.phase("gradients"):
            chosen = taps or (lambda shape: self.stored_taps(shape.block))
            if edits:
                self.stream.sweep_back(chosen, use if taps else keep, self.progress, edits=edits)
            else:
                order = range(len(self.shapes))[::-1]
                self.recall("gradients", chosen, use if taps else keep, self.stream.sweep_back, order)

    def solve_stored(self, plan: Plan) -> dict[int, list[Edit]]:
        """Edits of every block under a plan, from the stored statistics alone."""
        edits: dict[int, list[Edit]] = {}
        with self.phase("solve"):
            for i, shape in enumerate(self.shapes):
                weights = read_weights(self.stream.block(i), self.stream)
                for unit in self.block_units(i):
                    if plan.get(unit, self.full(unit)) < self.full(unit):
                        frontier = self.units[unit].decompose(unit, weights, self.stored[i], shape)
                        new = self.units[unit].truncate(frontier, plan[unit], shape)
                        edits.setdefault(i, []).extend(new)
        return edits

    def stored_taps(self, i: int) -> list[Tap]:
        """Taps of a block's units that the uncompressed model alone answers: those of their frontiers to plan by."""
        return sorted({t for u in self.block_units(i) for t in self.units[u].dense_taps(u, self.shapes[i])})

    def probe(self, plan: Plan, windows: int) -> tuple[dict[Unit, Frontier], dict[Unit, float]]:
        """Frontiers without factors, and how far each unit alone, at its rank in `plan`, moves the model's predictions.

        KL(uncompressed ‖ cut) in nats per token over the first `windows` windows: the expected rise of the loss without
        the noise of the text's own labels, which for small cuts is larger than the rise. Costs, per unit, those windows
        through the blocks behind it and the head twice.
        """
        stream = self.stream
        small = Stream(
            stream.source, torch.cat(stream.batches)[:windows], device=str(stream.device), dtype=stream.dtype
        )
        hidden = small.start()
        reference = small.sweep(lambda shape: [], lambda i, block, stats: None)
        frontiers: dict[Unit, Frontier] = {}
        moved: dict[Unit, float] = {}

        def use(i: int, block: nn.Module, stats: Stats) -> None:
            nonlocal hidden
            weights = read_weights(block, stream)
            for unit in self.block_units(i):
                solver, shape = self.units[unit], self.shapes[i]
                f = solver.decompose(unit, weights, stats, shape)
                frontiers[unit] = Frontier(unit, f.loss, {}, f.nats)
                cut = stream.block(i)
                apply_edits(cut, solver.truncate(f, plan[unit], shape), stream.family, stream.source.config, shape)
                out = small.run(i, small.place(cut), hidden)
                for j in range(i + 1, len(self.shapes)):
                    out = small.run(j, small.place(stream.block(j)), out)
                moved[unit] = small.divergence(out, reference)
            hidden = small.run(i, small.place(block), hidden)

        self.measure(lambda shape: self.taps(self.block_units(shape.block)), use)
        return frontiers, moved

    def cut_errors(self, wanted: Mapping[Unit, Sequence[int]], site: str, windows: int) -> dict[Unit, list[Tensor]]:
        """Per unit and rank E[e eᵀ] (channels, channels) of the error e that this cut alone, as its frontier has it, really makes
        at `site` of its block: on `windows` calibration windows, evenly spaced, of the uncompressed model.

        Needs the statistics of the units' frontiers in `stored`. One run of the block up to the site per rank.
        """
        few = self.stream.spread(windows)
        hidden = few.start()
        found: dict[Unit, list[Tensor]] = {}
        for i, shape in enumerate(self.shapes):
            block = self.stream.block(i)
            seen, after = few.capture(i, few.place(block), {site}, hidden)
            for unit in (u for u in self.block_units(i) if u in wanted):
                solver = self.units[unit]
                frontier = solver.decompose(unit, read_weights(block, self.stream), self.stored[i], shape)
                for rank in wanted[unit]:
                    cut = self.stream.block(i)
                    apply_edits(cut, solver.truncate(frontier, rank, shape), few.family, few.source.config, shape)
                    other, _ = few.capture(i, few.place(cut), {site}, hidden)
                    errors = [(a - b).flatten(0, -2).double() for a, b in zip(other[site], seen[site], strict=True)]
                    sums = few.in_order([(e.T @ e, len(e)) for e in errors])
                    found.setdefault(unit, []).append(
                        torch.stack([m for m, _ in sums]).sum(0) / sum(n for _, n in sums)
                    )
            hidden = after
        return found

    def nll(self, plan: Plan) -> float:
        """Calibration loss of the model under a plan, in nats per token."""
        return self.stream.nll(self.outputs(plan, "search"))

    def outputs(self, plan: Plan, phase: str) -> Sequence[Tensor]:
        """Last-block outputs of the model under a plan, whichever prefix the method measures on."""
        hidden = self.stream.start()

        def emit(i: int, block: nn.Module, spec: Spec) -> None:
            nonlocal hidden
            hidden = self.stream.run(i, self.stream.place(block), hidden)

        self.solve(plan, emit, phase=phase)
        return hidden

    def trial(self) -> tuple[Job, Stream]:
        """(This job without every fourth calibration window, the stream of these): for the loss of plans on text that they
        are not solved on, see `held_loss`."""
        windows = torch.cat(self.stream.batches)
        held = torch.arange(len(windows)) % 4 == 3
        few = copy.copy(self)
        few.stream = self.stream.part(windows[~held])
        few.cache, few.finished, few.errors, few.notes, few.progress = Cache(), {}, {}, {}, None
        few.seconds, few.timers = {}, []  # the whole of it is one phase of this job's
        return few, self.stream.part(windows[held])

    def held_loss(self, plan: Plan, held: Stream) -> float:
        """Loss of the model under a plan, solved on this job's windows, on those of `held`: nats per token."""
        hidden = held.start()

        def emit(i: int, block: nn.Module, spec: Spec) -> None:
            nonlocal hidden
            hidden = held.run(i, held.place(block), hidden)

        self.solve(plan, emit, phase="search")
        return held.nll(hidden)

    def output_errors(self, plans: list[Plan]) -> list[float]:
        """Mean squared error per token of the last block's output under each plan."""
        with self.phase("statistics"):
            dense = self.stream.sweep(lambda shape: [], lambda i, block, stats: None, self.progress)
        errors = []
        for n, plan in enumerate(plans):
            hidden = self.outputs(plan, f"search {n + 1}/{len(plans)}")
            squares = [(a.double() - b.double()).square().sum(-1) for a, b in zip(hidden, dense, strict=True)]
            sums = self.stream.in_order([(float(x.sum()), x.numel()) for x in squares])
            errors.append(sum(s for s, _ in sums) / sum(n for _, n in sums))
        return errors

    def unknown(self, i: int, units: list[Unit]) -> tuple[str, list[Tap]]:
        """For solving block i's units on the uncompressed model's statistics: (the passes they come from, taps to measure).

        The passes' name is empty where something else has been stored.
        """
        stored = self.stored.get(i, Stats())
        origin = "forward" if i not in self.stored else f"{stored.origin}+forward" if stored.origin else ""
        taps = self.taps([u for u in units if not self.cache.holds(origin, self.units[u], u)])
        return origin, self.cache.missing("forward", i, [t for t in taps if t not in stored.sums])

    def planned(self, i: int, plan: Plan) -> list[Unit]:
        """Block i's units that a plan cuts."""
        return [u for u in self.block_units(i) if plan.get(u, self.full(u)) < self.full(u)]

    def block_units(self, i: int) -> list[Unit]:
        return [u for u in self.units if u.block == i]

    def taps(self, units: list[Unit], solver: Solver | None = None) -> list[Tap]:
        return sorted({t for u in units for t in (solver or self.units[u]).taps(u, self.shapes[u.block])})

    def phase(self, name: str) -> Timer:
        return Timer(self.seconds, name, self.timers)

    def solve(
        self, plan: Plan, emit: Callable[[int, nn.Module, Spec], None], phase: str = "blocks"
    ) -> Sequence[Tensor]:
        """Walk the blocks, solve every planned unit, hand each finished block to `emit`; last block's outputs."""
        method, stream = self.method, self.solve_stream()
        sequential = method.prefix != "dense"
        pristine = not sequential and not self.edits  # then all statistics are the uncompressed model's
        unknown = any(self.unknown(s.block, self.planned(s.block, plan))[1] for s in self.shapes)
        ready = phase == "blocks" and pristine and not unknown
        hidden = stream.start() if stream.batches and not ready and (sequential or not self.stored) else []
        dense_hidden = hidden if method.prefix == "both" else None
        for i, shape in enumerate(self.shapes):
            if i in self.finished:
                block = stream.block(i)
                with self.phase("stream"):
                    self.finished[i](block)
                    if dense_hidden is not None:
                        dense_hidden = stream.run(i, stream.place(stream.block(i)), dense_hidden)
                    seen = block if sequential else stream.block(i, self.edits.get(i, ()))
                    hidden = stream.run(i, stream.place(seen), hidden)
                emit(i, block, {})
                continue
            block = stream.block(i)
            before = count_block(block)
            assert before == shape.count(), f"block {i} has {before} weights, its shape says {shape.count()}"
            edits = list(self.edits.get(i, []))
            done = {SUBMODULES.get(e.target) for e in edits}
            units = [u for u in self.planned(i, plan) if u.name not in done]
            outputs = None
            weights = read_weights(block, stream)
            dense = copy.deepcopy(block) if method.prefix == "both" else None
            spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
            captured, dense_outputs = None, None
            sites = self.beside(units)
            if dense is not None and dense_hidden is not None and sites:
                with self.phase("stream"):
                    captured, dense_outputs = stream.capture(i, stream.place(dense), sites, dense_hidden)
            for stage in method.stages(units):
                taps = self.taps(stage)
                with self.phase("stream"):
                    current = stream.place(block)
                    pair: Any = captured
                    if captured is None and dense is not None and dense_hidden is not None:
                        pair = (stream.place(dense), dense_hidden)
                    origin, known = "", Stats()
                    known.merge(self.stored.get(i, Stats()))
                    if pristine and not edits:
                        origin, taps = self.unknown(i, stage)
                        if taps and self.cache.keeps:  # a smaller budget may cut what this one leaves whole
                            taps = sorted({*taps, *self.unknown(i, self.block_units(i))[1]})
                        known.merge(self.cache.stats("forward", i, set(self.taps(stage)) - set(taps) - set(known.sums)))
                    taps = [t for t in taps if t not in known.sums]
                    if taps or sequential:
                        stats, outputs = stream.measure(i, current, taps, hidden, pair, outputs=not sequential)
                    else:
                        stats = Stats()
                    if origin:
                        self.cache.keep_stats("forward", i, stats)
                    stats.merge(known)
                    del current, pair  # the computing copies
                with self.phase("solve"):
                    new = self.solve_units(stage, plan, weights, stats, origin)
                    if edits:  # edits of a block are applied together, to a block as it was
                        block = stream.block(i)
                    edits += new
                    spec = apply_edits(block, edits, stream.family, stream.source.config, shape)
                    del stats
            with self.phase("stream"):
                if sequential or outputs is None:
                    outputs = stream.run(i, stream.place(block), hidden)
                if dense is not None and dense_hidden is not None:
                    dense_hidden = dense_outputs or stream.run(i, stream.place(dense), dense_hidden)
                hidden = outputs
            emit(i, block, spec)
            if self.progress:
                self.progress(phase, i + 1, len(self.shapes))
        return hidden

    def solve_stream(self) -> Stream:
        """The calibration windows that the method's solve runs, evenly spaced among all."""
        if self.method.prefix == "dense":
            return self.stream
        return self.stream.spread(self.method.solve_windows(sum(map(len, self.stream.batches))))

    def beside(self, units: list[Unit]) -> set[str]:
        """Sites of the uncompressed block that solving these units of one block looks at, if one run beside the stages can
        keep them all: none wider than what flows between submodules."""
        known = self.stored.taps(units[0].block) if units else set()
        seen = {s for t in self.taps(units) if t not in known for s in t.sites}
        sites = {s.removeprefix("dense:") for s in seen if s.startswith("dense:")}
        shape = self.shapes[units[0].block] if units else self.shapes[0]
        narrow = all(shape.width(s) <= max(shape.hidden, shape.heads * shape.v) for s in sites)
        return sites if narrow and not any(s.endswith(".gap") for s in seen) else set()

    def solve_units(self, units: list[Unit], plan: Plan, weights: Weights, stats: Stats, origin: str) -> list[Edit]:
        """Edits of units of one block, in the order of units; several processes share the units out by cost."""
        found: dict[int, tuple[float, list[Edit]]] = {}
        for n in processes.own_work([self.count(u, self.full(u)) for u in units]):
            unit, shape = units[n], self.shapes[units[n].block]
            solver = self.units[unit]
            make = partial(solver.decompose, unit, weights, stats, shape)
            frontier = self.cache.frontier(origin, solver, unit, make) if origin else make()
            edits = [
                store(e, weights, f"block {unit.block}, {unit.name}")
                for e in solver.truncate(frontier, plan[unit], shape)
            ]
            found[n] = (float(frontier.loss[plan[unit]]), edits)
            del frontier, make  # before the next one is made
        found = {n: f for part in processes.gather(found) for n, f in part.items()}
        for n, unit in enumerate(units):
            if not isnan(found[n][0]):  # nothing is predicted
                self.errors[str(unit)] = found[n][0]
        return [edit for n in range(len(units)) for edit in found[n][1]]


class Timer:
    """Adds the seconds of a with-block, less those of timers running inside it, to a dict entry."""

    def __init__(self, seconds: dict[str, float], name: str, running: list[Timer]):
        self.seconds, self.name, self.running = seconds, name, running
        self.inner = 0.0

    def __enter__(self) -> None:
        self.running.append(self)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.start
        self.running.pop()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + took - self.inner
        if self.running:
            self.running[-1].inner += took


def store(edit: Edit, weights: Weights, where: str) -> Edit:
    """The edit in the weights' own dtype, in which it will be applied."""
    kind = next(iter(weights.values())).dtype
    return replace(edit, tensors={n: narrow(t, kind, where) for n, t in edit.tensors.items()})


def read_weights(block: nn.Module, stream: Stream) -> Weights:
    """Weights and biases of a canonical block's linears, in the stored dtype, on the CPU."""
    weights: Weights = {}
    for role in stream.family.roles:
        linear = get_linear(block, stream.family, role)
        weights[role] = linear.weight.detach()
        if linear.bias is not None:
            weights[f"{role}.bias"] = linear.bias.detach()
    return weights


def find_name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2].replace("_", "-")


def ceil4(x: float) -> float:
    return -(-x * 10_000 // 1) / 10_000


DAMPINGS = ("damping", "ridge")  # settings with which a method makes a singular Gram invertible


def check_tokens(job: Job, windows: Tensor, settings: dict[str, Any]) -> None:
    """Fewer calibration tokens than a Gram's dimension make it singular: an error unless damping is asked for."""
    own = [n for n in DAMPINGS if n in job.method.settings()]
    if set(own) & set(settings):
        return
    grams = [t for t in job.taps(job.block_units(0)) if t.kind in ("gram", "moments")]
    need = max((job.shapes[0].width(t.site) for t in grams), default=0)
    if 0 < windows.numel() < need:
        hint = f", or ask for damping (--set {own[0]}=0.01)" if own else ""
        raise InputError(
            f"calibration has {windows.numel()} tokens, fewer than the largest Gram's dimension {need}: "
            f"use at least {need} tokens (--n-samples × --seq-len){hint}"
        )


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes. (getrusage also counts what its parent had before.)"""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        found = next((line for line in file if line.startswith("VmHWM:")), None)
        if found:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compress(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    keep: float | None = None,
    asked: Asked | None = None,
    method: str | Method = "flat-llm",
    windows: Tensor,
    calibration: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    round_to: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    stream: Stream | None = None,
    cache: Cache | bool = False,
    resume: bool = False,
    target: str = "any",
    files: dict[str, str] | None = None,
    measured: dict[str, float] | None = None,
    spent: dict[str, float] | None = None,
    **limits: Any,
) -> Result:
    """Compress a model into a folder. `windows` (n, seq): calibration token ids (see `planish.text`).

    `model`: folder, hub id or causal LM in memory (left untouched). `settings`: the method's hyper-parameters by name.
    `asked`, or `keep` and other `limits` by name: the budgets (see `planish.budgets.Asked`). `kv_keep` alone only cuts what
    the cache holds. `measured`: the latency table to plan with, instead of this machine's.
    `calibration`: what to record about the text in the manifest. Raises InputError for anything wrong with the input.
    `cache`: the one that several runs share, or whether to use the one on disk; `stream`: what several runs share.
    `resume`: take up an interrupted run with these same arguments (see `planish.resume`).
    `files`: further text files for the folder, by name. `spent`: seconds of phases before this call, counted in the result.
    """
    start = time.perf_counter()
    reuse_memory()
    if processes.start(device):
        device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    asked = asked or read_asked(keep=keep, **limits)
    find_target(target)
    method = find_method(method, settings or {})
    source = open_source(model, tokenizer)
    check_windows(windows, source)
    check_apart(Path(output), source)
    writer = Writer(Path(output), source.n_blocks, overwrite, resume)
    try:
        kind = dtype or pick_dtype(source, device)
        if asked.max_latency is not None and measured is None:
            first = processes.rank() == 0  # all plan with one table
            measured = processes.share(
                read_table(source, asked.context or windows.shape[1], device, kind, progress) if first else None
            )
        if not resume and isinstance(source, FolderSource):
            request = {
                "model": str(source.folder.resolve()), "name": source.name, "asked": asdict(asked),
                "method": find_name(method), "settings": method.settings(), "given": sorted(settings or {}),
                "calibration": calibration or {}, "device": device.partition(":")[0], "dtype": dtype and str(dtype)[6:],
                "round_to": round_to, "overwrite": overwrite, "target": target, "files": files or {},
                "processes": processes.count(), "measured": measured,
            }  # fmt: skip
            writer.keep_request(request, windows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if stream is None:
                room = Room(folder=writer.partial)
                stream = Stream(source, windows, device=device, dtype=kind, room=room)
            shared = open_cache(stream) if cache is True else cache or None
            job = Job(
                stream,
                method,
                asked=asked,
                step=round_to,
                progress=progress,
                cache=shared,
                target=target,
                measured=measured,
            )
            job.caught = caught
            job.seconds |= spent or {}
            check_tokens(job, windows, settings or {})
            with job.phase("plan"):
                plan = job.plan()
                method.finish(job, plan)
            result = write(job, plan, writer)
        earlier = {w for entry in writer.finished.values() for w in entry["warnings"]}
        result.warnings = sorted({*read_warnings(caught), *job.remarks.values(), *earlier})
        result.seconds["total"] = time.perf_counter() - start + sum((spent or {}).values())
        write_manifest(writer, job, plan, result, calibration or {})
        for name, content in (files or {}).items():
            writer.text(name, content)
        writer.close()
    except BaseException as error:
        writer.abort(wrong_input=isinstance(error, (InputError, OSError)) and not resume)
        raise
    return result


def resume(output: str | Path, progress: Progress | None = None) -> Result:
    """Finish an interrupted `compress` into `output`: the same weights as if it had never been interrupted.

    The plan is worked out again (it is deterministic); finished blocks are read back and only run, not solved.
    """
    output = Path(output)
    state = output.with_name(output.name + ".partial") / "resume"
    if not (state / "request.json").is_file():
        if (output / "planish.json").is_file() and tidy(output):  # stopped after the last rename
            return read_result(output)
        hint = ": it is complete" if (output / "planish.json").is_file() else ""
        raise InputError(f"nothing to resume at {output}{hint} (no {state / 'request.json'})")
    try:
        request = unseal(json.loads((state / "request.json").read_text(encoding="utf-8")))
        if hash_file(state / "windows.safetensors") != request["windows"]:
            raise ValueError("the calibration windows are not what was written")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in request["settings"].items()}
        method = find_method(find_method(request["method"]).__class__(**values))
        dtype = getattr(torch, request["dtype"]) if request["dtype"] else None
        if request["processes"] != processes.world():
            warnings.warn(
                f"started with {request['processes']} processes, resumed with {processes.world()}", stacklevel=2
            )
        source = open_source(request["model"])
        source.name = request["name"]
        asked, measured = Asked(**request["asked"]), request["measured"]
        round_to, overwrite = request["round_to"], request["overwrite"]
        target, files = request["target"], request["files"]
        calibration, given, device = request["calibration"], dict.fromkeys(request["given"]), request["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {state / 'request.json'}: {error!r}; compress again with --overwrite") from None
    return compress(
        source, output=output, asked=asked, measured=measured, method=method,
        windows=Shard(state / "windows.safetensors").read("windows"), calibration=calibration, settings=given,
        device=device, dtype=dtype, round_to=round_to, overwrite=overwrite, progress=progress, resume=True,
        target=target, files=files,
    )  # fmt: skip


def read_result(output: Path) -> Result:
    """What the manifest of a complete folder says."""
    try:
        found = json.loads((output / "planish.json").read_text(encoding="utf-8"))["result"]
        return Result(**{f.name: found[f.name] for f in fields(Result)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {output / 'planish.json'}: {error!r}; compress again with --overwrite") from None


def read_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})


def pick_dtype(source: Source, device: str) -> torch.dtype:
    """What to compute in: the stored dtype on an accelerator, fp32 on a CPU."""
    stored = getattr(source.config, "dtype", None)
    if device == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def check_apart(output: Path, source: Source) -> None:
    """The output must not replace the model that it is made from."""
    if isinstance(source, FolderSource):
        model, place = source.folder.resolve(), output.resolve()
        if place == model or place in model.parents:
            raise InputError(f"output {output} would replace the model {source.folder}; choose another folder")


def check_windows(windows: Tensor, source: Source) -> None:
    limit = getattr(source.config, "max_position_embeddings", None)
    rope = getattr(source.config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "dynamic":  # tables that grow with the sequence
        limit = int(limit * rope.get("factor", 1.0))
    if limit and windows.shape[-1] > limit:
        raise InputError(f"--seq-len {windows.shape[-1]} is longer than the model's {limit} positions")
    vocabulary = source.config.vocab_size
    if windows.numel() and not (int(windows.min()) >= 0 and int(windows.max()) < vocabulary):
        raise InputError(f"calibration holds token id {int(windows.max())}, the model's vocabulary has {vocabulary}")


def write(job: Job, plan: Plan, writer: Writer) -> Result:
    """Solve and write every block, then what is outside the blocks and the configuration."""
    source = job.stream.source
    specs: list[Spec] = []
    shapes: list[Shape] = []  # of the blocks that are left
    counted: list[int] = []
    itemsize = 2

    def emit(i: int, block: nn.Module, spec: Spec) -> None:
        nonlocal itemsize
        spec = writer.finished[i]["spec"] if i in writer.finished else spec
        errors = {u: e for u, e in job.errors.items() if Unit.parse(u).block == i}
        entry = {"spec": spec, "errors": errors, "warnings": read_warnings(job.caught)}
        if is_empty(spec):
            writer.block(i, None, source.family, len(specs), entry)
            return
        counted.append(count_block(block))
        specs.append(spec)
        shapes.append(job.shapes[i])
        itemsize = next(block.parameters()).element_size()
        with job.phase("write"):
            writer.block(i, block, source.family, len(specs) - 1, entry)

    for i, entry in writer.finished.items():
        job.errors |= entry["errors"]
        job.finished[i] = partial(writer.restore, i, source=source)
    job.method.solve(job, plan, emit)
    kind = write_config(writer, source, specs, shapes)
    outside = drop_tied(source.outside(), source)
    outer = sum(t.numel() for t in outside.values())
    head = source.family.head if kind == "native" else "lm_head"
    writer.shard(
        0, {n.replace("lm_head.", f"{head}.", 1) if n.startswith("lm_head.") else n: t for n, t in outside.items()}
    )
    if writer.active:
        source.copy_files(writer.partial)
    blocks = sum(p.numel() for i in range(source.n_blocks) for p in source.empty_block(i).parameters())
    before, dense = job.weights, [dict[str, Any]()] * len(job.shapes)
    flops = [
        count_flops(job.shapes, dense, [s.count() for s in job.shapes], job.context),
        count_flops(shapes, specs, counted, job.context),
    ]
    result = Result(
        find_name(job.method),
        job.keep,
        sum(counted) / before,
        outer + blocks,
        writer.parameters,
        before,
        sum(counted),
        kv_bytes(dense, job.shapes, itemsize),
        kv_bytes(specs, shapes, itemsize),
        kind,
        str(writer.output),
        job.seconds,
        peak_rss(),
        bytes_before=sum(n * dtype.itemsize for n, dtype in source.sizes().values()) + count_headers(source),
        bytes_after=writer.bytes + writer.headers,
        flops_per_token_before=flops[0] + 2 * source.count_head(),
        flops_per_token_after=flops[1] + 2 * source.count_head(),
        context=job.context,
        submodules=job.notes.get("removed", {}),
    )
    if job.table is not None:
        result.latency_ms_before = job.table.predict(dense, job.shapes) * 1e3
        result.latency_ms_after = job.table.predict(specs, shapes) * 1e3
    achieved = {
        "keep": result.keep,
        "max_params": result.params_after,
        "max_bytes": result.bytes_after,
        "kv_keep": result.kv_bytes_per_token_after / result.kv_bytes_per_token_before,
        "flops_keep": flops[1] / flops[0],
        "max_latency": result.latency_ms_after,
    }
    result.budgets = {b.name: {"asked": b.asked, "achieved": achieved[b.name]} for b in job.kept_budgets}
    return result


def drop_tied(outside: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Tied checkpoints store one matrix, under the embedding's name."""
    if not source.config.tie_word_embeddings or "lm_head.weight" not in outside:
        return outside
    rest = {n: t for n, t in outside.items() if n != "lm_head.weight"}
    embedding = source.embedding_name()
    return rest if embedding in rest else {embedding: outside["lm_head.weight"], **rest}


def write_manifest(writer: Writer, job: Job, plan: Plan, result: Result, calibration: dict[str, Any]) -> None:
    """planish.json: everything needed to understand and to repeat the run."""
    manifest = {
        "planish": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "source": job.stream.source.name,
        "method": result.method,
        "settings": job.method.settings(),
        "round_to": job.step,
        "calibration": calibration,
        "dtype": str(job.stream.dtype).removeprefix("torch."),
        "result": result.as_dict(),
        "plan": {str(u): r for u, r in sorted(plan.items())},
        "full": {str(u): job.full(u) for u in sorted(job.units)},
        "roles": job.shapes[0].roles,
        "weights": {str(u): [job.count(u, job.full(u)), job.count(u, r)] for u, r in sorted(plan.items())},
        "errors": job.errors,
        "notes": job.notes | job.remarks,
    }
    writer.text("planish.json", json.dumps(manifest, indent=2, default=str) + "\n")
    writer.text("README.md", make_card(manifest))


def make_card(manifest: dict[str, Any]) -> str:
    """The folder's model card."""
    r = manifest["result"]
    name = manifest["source"]
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    base = f"base_model: {name}\n" if is_hub_id else ""
    load = "from transformers import AutoModelForCausalLM\n"
    if r["format"] != "native":
        load = "import planish  # or trust_remote_code=True: the folder carries the modelling files\n" + load
    kv = (r["kv_bytes_per_token_before"], r["kv_bytes_per_token_after"])
    asked = " and ".join(f"{label(n)} {show(n, b['asked'])}" for n, b in r["budgets"].items()) or "a sparsity"
    latency = ""
    if r["latency_ms_after"] is not None:
        times = (r["latency_ms_before"], r["latency_ms_after"])
        latency = f"| predicted ms per decoded token | {times[0]:.3g} | {times[1]:.3g} |\n"
    return f"""---
{base}library_name: transformers
tags: [planish, compressed, {manifest["method"]}]
---

# Compressed with planish: {manifest["method"]}, keep {r["keep"]:.4f}

| | before | after |
|---|---|---|
| parameters | {r["params_before"]:,} | {r["params_after"]:,} |
| parameters of the blocks' linears | {r["block_params_before"]:,} | {r["block_params_after"]:,} |
| bytes of weights | {r["bytes_before"]:,} | {r["bytes_after"]:,} |
| FLOPs per token, {r["context"]} tokens of context | {r["flops_per_token_before"]:,} | {r["flops_per_token_after"]:,} |
| KV cache, bytes per token | {kv[0]:,} | {kv[1]:,} |
{latency}
Asked: {asked}.

```python
{load}model = AutoModelForCausalLM.from_pretrained("this folder")
```

Calibration: {json.dumps(manifest["calibration"], default=str)}. Hyper-parameters: {json.dumps(manifest["settings"], default=str)}.
The plan, per-unit errors and versions are in `planish.json`.
"""
