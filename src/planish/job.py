"""One method on one model, one text and one budget: what plans ask and how they are solved."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planish import lanes
from planish.apply import apply_edits
from planish.calibrate.cache import Cache
from planish.calibrate.store import Kept
from planish.calibrate.stream import Stream
from planish.clock import Timer
from planish.core import Edit, Frontier, Plan, Progress, Shape, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.modelling.blocks import Spec
from planish.plan.allocate import BudgetError, Choices, Curve, spread, spread_by_kind
from planish.plan.budgets import Budget, CacheNumbers, make_budget
from planish.plan.latency import Latency, Table, make_latency
from planish.plan.targets import check_plan, constrain, fit_target, make_uniform, needs_uniform
from planish.request import Limits, label
from planish.solve import count_refit, read_weights, solve
from planish.stats import Stats, Tap


class Job:
    """One method on one model and one calibration text under one budget: what a method's `plan` can ask."""

    def __init__(
        self,
        stream: Stream,
        method: Method,
        keep: float | None = None,
        *,
        asked: Limits | None = None,
        step: int = 1,
        progress: Progress | None = None,
        cache: Cache | None = None,
        target: str = "any",
        measured: dict[str, float] | None = None,
    ):
        self.stream, self.method, self.step, self.progress = stream, method, step, progress
        self.cache = cache or Cache()
        self.shapes: list[Shape] = [stream.source.shape(i) for i in range(len(stream))]
        self.asked = asked or Limits(keep=keep)
        self.cache_only = set(self.asked.given) == {"kv_keep"}
        beside = sorted(set(self.asked.given) - {"keep"})
        if beside and method.sparsity is not None:
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
        self.units = constrain(self.stack, method.name, self.units, self.shapes)
        self.weights = sum(s.count() for s in self.shapes)
        self.costs: dict[tuple[int, str, Shape], tuple[Solver, Choices]] = {}
        for b in self.budgets:
            uncut = not any(self.choices(u).prices(self.budgets.index(b)) for u in self.units)
            if isinstance(b, CacheNumbers) and (self.cache_only or b.share < 1) and uncut:
                what = "cuts neither keys nor values" + (f" for {target}" if self.stack.refuses else "")
                normed = (
                    " of this model, which normalises queries and keys" if any(s.qk_norm for s in self.shapes) else ""
                )
                raise InputError(f"--kv-keep: {method.name} {what}{normed}; use auto, palu, a3, modegpt or flat-llm")
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
            fixed = torch.tensor([b.fixed(solver, unit, shape) for b in self.budgets])
            self.costs[key] = solver, Choices(torch.tensor(ranks), cost.double(), fixed.double())
        return self.costs[key][1]

    def spread(self, share: Callable[[Unit], float], by_kind: bool = False) -> Plan:
        """Ranks in proportion to `share`, within the budgets (see `spread`, `spread_by_kind` of `planish.plan.allocate`)."""
        try:
            rule = spread_by_kind if by_kind else spread
            return rule({u: self.choices(u) for u in self.units}, share, self.limits, self.step)
        except BudgetError as error:
            b = self.budgets[error.which]
            refusal = b.refuse(self.method.name, error.smallest + b.limit - self.limits[error.which])
            coarse = [f"ranks are multiples of {self.step}, see --round-to"] if self.step > 1 else []
            why = "; ".join([*coarse, *self.remarks.values()])
            raise InputError(f"{refusal} ({why})" if why else str(refusal)) from None

    def plan(self) -> Plan:
        """The method's ranks within the budgets."""
        plan = self.method.plan_cache(self) if self.cache_only else self.method.plan(self)
        check_plan(self.stack, self.method.name, plan)
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
            who = f"{self.method.name} for {self.target}"
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
        for n in lanes.own_work([self.full_cost([u]) for u in units]):
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
        found = {u: f for part in lanes.gather(found) for u, f in part.items()}
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
            self.stored[i] = stats if whole else stats.only(self.kept_taps(i))

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

    def kept_taps(self, i: int) -> set[Tap]:
        """Taps of a block's units that the solve uses of what the plan measured."""
        taps = set(self.taps(self.block_units(i)))
        return taps | ({t.twin for t in taps if t.twin} if self.solve_share() < 1 else set())

    def solve_share(self) -> float:
        """Share of the calibration windows that the method's solve runs."""
        n = sum(map(len, self.stream.batches))
        return count_refit(n, self.method.refit_share) / n if n and self.method.prefix != "dense" else 1.0

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

    def cut_errors(
        self, wanted: Mapping[tuple[Unit, ...], Sequence[Sequence[int]]], site: str, windows: int
    ) -> dict[tuple[Unit, ...], list[tuple[float, Tensor]]]:
        """For units of one block cut together to such ranks, and nothing else, what they are predicted to lose and E[e eᵀ]
        (channels, channels) of the error e that they really make at `site` of the block: on `windows` calibration windows,
        evenly spaced, of the uncompressed model.

        Cuts and predictions are those of the statistics in `stored`; what the units' frontiers need beside it is measured
        on the same few windows. One run of the block up to the site per entry.
        """
        few = self.stream.spread(windows)
        hidden = few.start()
        found: dict[tuple[Unit, ...], list[tuple[float, Tensor]]] = {}
        for i, shape in enumerate(self.shapes):
            block, groups = self.stream.block(i), [g for g in wanted if g[0].block == i]
            placed, weights, units = few.place(block), read_weights(block, self.stream), {u for g in groups for u in g}
            taps = {t for u in units for t in self.units[u].dense_taps(u, shape)}
            stats = self.stored[i].only(taps)
            if rest := sorted(taps - set(stats.sums)):
                stats.merge(few.measure(i, placed, rest, hidden, (placed, hidden), outputs=False)[0])
            with self.phase("frontiers"):
                frontiers = {u: self.units[u].decompose(u, weights, stats, shape) for u in sorted(units)}
            seen, after = few.capture(i, placed, {site}, hidden)
            for group in groups:
                for ranks in wanted[group]:
                    cuts = dict(zip(group, ranks, strict=True))
                    edits = [e for u, r in cuts.items() for e in self.units[u].truncate(frontiers[u], r, shape)]
                    cut = self.stream.block(i)
                    apply_edits(cut, edits, few.family, few.source.config, shape)
                    other, _ = few.capture(i, few.place(cut), {site}, hidden, outputs=False)
                    errors = [(a - b).flatten(0, -2).double() for a, b in zip(other[site], seen[site], strict=True)]
                    sums = few.in_order([(e.T @ e, len(e)) for e in errors])
                    mean = torch.stack([m for m, _ in sums]).sum(0) / sum(n for _, n in sums)
                    predicted = sum(float(frontiers[u].loss[r]) for u, r in cuts.items())
                    found.setdefault(group, []).append((predicted, mean))
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

    def trial(self, among: Sequence[int]) -> tuple[Job, Stream]:
        """(This job without every fourth of these calibration windows, the stream of that fourth): for the loss of plans on text
        that they are not solved on, see `held_loss`."""
        windows = torch.cat(self.stream.batches)
        held = torch.zeros(len(windows), dtype=torch.bool)
        held[list(among)[3::4]] = True
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
        """See `planish.solve.solve`."""
        return solve(self, plan, emit, phase)

    def solve_stream(self) -> Stream:
        """The calibration windows that the method's solve runs, evenly spaced among all."""
        if self.method.prefix == "dense":
            return self.stream
        return self.stream.spread(count_refit(sum(map(len, self.stream.batches)), self.method.refit_share))
