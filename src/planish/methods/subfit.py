"""SubFit: submodules go wherever they matter least, each replaced by a fitted affine low-rank bypass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from planish.calibrate.losses import nll
from planish.calibrate.measure import Measurements
from planish.core import Edit, Shape, Solver, Unit
from planish.methods.method import Method
from planish.plan.budgets import Budget
from planish.plan.foreseen import Foreseen, Work
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.plan.refit import fit_unit, fit_units, refit_and_repair, refit_jointly
from planish.plan.removal import (
    check_foldable,
    count_removed,
    count_saved,
    find_budgets,
    lowest,
    merge,
    pick_some,
    remove,
    saving,
)
from planish.plan.search import list_greedy, list_race, race, search_by_weight, search_greedily, trial_losses
from planish.solvers.bypass import Bypass, is_factored, shared_basis
from planish.stats import Tap
from planish.walks.solve import solve

Fits = dict[Unit, list[Edit]]
Fit = Literal["auto", "once", "joint", "sequential", "compensated"]
SMALLER = "choose smaller ranks (--set attention_rank=…, ffn_rank=…)"
TRIED: tuple[Fit, ...] = ("once", "sequential", "compensated")  # by "auto"
PREFIXES: dict[Fit, str] = {
    "once": "dense", "joint": "dense", "sequential": "compressed", "compensated": "both", "auto": "both",
}  # fmt: skip


@dataclass(frozen=True)
class SubFit(Method):
    """Attentions first, then feed-forwards, go wherever they matter least; a fitted affine low-rank map takes each place.

    Problem: which attentions and feed-forwards can be replaced by a map f̂ of the same input, and which f̂? They need not
    lie side by side.

    Equation: f̂(x) = g ⊙ x + b + (x − μ) U, with S = E[(x − μ)(x − μ)ᵀ], C = E[(x − μ)(f − ν)ᵀ], ν = E f: gate
    g_j = C_jj / (S_jj + λ), b = ν − g ⊙ μ, and U of low rank by ridge regression of what is left (`planish.solvers.bypass.fit`).
    Attentions are chosen first, feed-forwards then on the model whose attentions are already replaced.

    `sparsity`: the paper's, this share of the attentions and of the feed-forwards; otherwise `keep`, net of what the bypasses
    add, decides, with as many attentions as feed-forwards (one more or less where that comes closer). `submodules`: both
    kinds, or one. `numbers`: "free" is ours, not the paper's: attentions and feed-forwards compete on one list, greedily by the
    loss that a bypass of the attentions' rank in their place costs per weight saved (scores and a shared basis then say
    nothing); the weights that the budget leaves raise the rank of all bypasses together, up to the feed-forwards' rank. With
    a sparsity, as many weights go, net, as in that share of whole blocks.

    `attention_score`: which attentions go; the lowest do. "influence": rotation × magnitude, E[1 − cos(x, x + f)] and
    E[|f| / |x|]. "cosine": the rotation alone, the paper's choice of feed-forwards in instruct models. "error":
    replacement-aware, what the fit leaves over, E|f − f̂|² / E|x|², x the residual stream. "loss": replacement-aware, the
    calibration loss with the fit in place. "greedy": the same, measured again after every choice. `ffn_score`: the same for
    feed-forwards. `combine`: of influence, "product", or "sum": each divided by its mean over the blocks, then added.
    `windows`: calibration sequences on which losses are compared, in rounds (`planish.plan.search.race`). `swaps`: then up to
    so many exchanges of a replaced submodule for another (of its kind, where numbers are equal) that lower their loss.

    `gate`: with g. `attention_rank`: rank of U, up to 1 relative to the hidden size (1/16 is the paper's 256 at 4096), above 1
    absolute; from half the hidden size on U is one matrix. `ffn_rank`: the same for feed-forwards (1 is the paper's 4096).
    `input`: x is what the submodule reads ("normed"), or the residual stream ("raw"), and the norm goes too. `basis`: "pca":
    U's input basis is the top eigenvectors of the inputs' covariance; "rrr": reduced-rank regression, each its own.
    `shared`: with "pca" one basis for all feed-forwards. `ridge`: λ relative to tr(S) / d; 0 = of 1e-7 … 1 the best for every
    eighth sequence, held out. `tokens`: "calm": massive activations (a channel above 1000 × the median one) stay out of the
    fit.

    `fit`: "once" = each bypass from the statistics it was chosen by; "joint" = all refitted at once, on the inputs that
    the model with all of them in place produces; "sequential" = all refitted from the first block to the last, each on
    the inputs that the refitted model before it produces; "compensated" = the same, fitting what is missing to the
    uncompressed model's residual stream, so that later bypasses repair what earlier ones broke; "auto" = "once",
    "sequential" and "compensated" are tried, the one with the least calibration loss is taken.

    `repair`: ours too: the down projections of the feed-forwards that stay are refitted to what is missing to the
    uncompressed model's residual stream behind them, by ridge regression towards the weights they have. It adds nothing.

    Differs from the paper (no code is public): its score's formula, ridge and calibration are not known to us.
    """

    title: ClassVar[str] = "submodules replaced by affine low-rank bypasses, chosen one kind after the other"
    reference: ClassVar[str] = "SubFit, arXiv 2606.02559"
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    sparsity: float | None = None
    submodules: Literal["both", "attention", "ffn"] = "both"
    attention_score: Literal["influence", "cosine", "error", "loss", "greedy"] = "loss"
    ffn_score: Literal["influence", "cosine", "error", "loss", "greedy"] = "greedy"
    combine: Literal["product", "sum"] = "product"
    fit: Fit = "auto"
    attention_rank: float = 1 / 16
    ffn_rank: float = 1.0
    input: Literal["normed", "raw"] = "normed"
    basis: Literal["pca", "rrr"] = "rrr"
    shared: bool = True
    gate: bool = True
    tokens: Literal["all", "calm"] = "all"
    ridge: float = 0.0
    windows: int = 16
    numbers: Literal["equal", "free"] = "equal"
    swaps: int = 0
    repair: bool = False

    @property
    def prefix(self) -> str:  # type: ignore[override]
        if self.repair:
            return "dense"  # the plan works out every edit itself
        return PREFIXES[self.fit]

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("attention", "ffn") if self.submodules == "both" else (self.submodules,)

    def solver(self) -> Bypass:
        """With which candidates are fitted; the target is the submodule's own contribution."""
        names = ("attention_rank", "ffn_rank", "input", "gate", "basis", "ridge", "tokens")
        return Bypass(self.kinds, **{n: getattr(self, n) for n in names})

    def _refit_solver(self) -> Bypass:
        """With which the chosen ones are fitted at last."""
        return replace(self.solver(), target=find_target(self.fit))

    def solvers(self) -> list[Solver]:
        return [self._refit_solver()]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        """The feed-forward is fitted on what the replaced attention of its block puts out."""
        return [stage for k in self.kinds if (stage := [u for u in units if u.name == k])]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        found = (self.choose_freely if self.numbers == "free" else self.choose)(problem, measure)
        problem = replace(problem, units=found.units)
        planned = self.decide(problem, {}, notes=found.notes, remarks=found.remarks)
        planned = remove(planned, problem, found.removed, self.sparsity)
        fit, edits = self.fit, found.edits
        if fit == "auto":
            losses, made = try_fits(problem, measure, planned, edits)
            fit = min(losses, key=lambda fit: losses[fit])
            problem, edits = replace(problem, units=aim(problem.units, fit)), made[fit]
            notes = {**planned.notes, "fit_losses": losses} if found.removed else planned.notes
            planned = replace(planned, solvers=problem.units, prefix="dense", settings={"fit": fit}, notes=notes)
        if fit == "joint":
            edits = refit_jointly(problem, measure, edits)
        if self.repair:
            check_foldable(measure.source.family, "subfit with repair=true")
            again = fit in ("sequential", "compensated")
            return replace(planned, edits=refit_and_repair(problem, measure, found.edits, again, self.ridge))
        return planned if self.fit in ("sequential", "compensated") else replace(planned, edits=edits)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        counts, remarks = count_removed(problem, self.kinds, self.sparsity, advice=SMALLER)
        gone, few, free = pick_some(len(problem.shapes), counts), min(self.windows, windows), self.numbers == "free"
        work: list[Work] = []
        for kinds in [self.kinds] if free else [(k,) for k in self.kinds]:
            units = [u for u in problem.units if u.name in kinds]
            how = "greedy" if free else self.attention_score if kinds == ("attention",) else self.ffn_score
            solvers = dict.fromkeys(units, self.solver())
            work.append(Work(taps=partial(list_taps, solvers), solvers=solvers))
            if how == "loss":
                work += list_race([u.block for u in units], counts[kinds[0]], few, problem.context)
            elif how == "greedy":
                work += list_greedy(problem, units, [u for u in gone if u in solvers], few)
        made: dict[int, tuple[Edit, ...]] = {u.block: () for u in gone}
        planned = remove(self.decide(problem, {}, remarks=remarks), problem, gone, self.sparsity)
        for n, fit in enumerate(TRIED if self.fit == "auto" and gone else ()):
            own = None if fit == "once" else replace(planned, prefix=PREFIXES[fit])
            work.append(Work(f"fit {n + 1}/{len(TRIED)}", solve=own, heads=1))
        if self.fit == "joint" or self.repair:
            work.append(Work("refits", passes=lambda i: 4.0 if self.repair else 2.0))
        done = self.repair or self.fit not in ("sequential", "compensated")
        return Foreseen(replace(planned, edits=made) if done else planned, work)

    def choose(self, problem: Problem, measure: Measurements) -> Choice:
        """One kind after the other, as many of each; which go, and their bypasses."""
        counts, remarks = count_removed(problem, self.kinds, self.sparsity, advice=SMALLER)
        removed: list[Unit] = []
        edits: dict[int, list[Edit]] = {}
        fits: Fits = {}
        notes: dict[str, Any] = {}
        for kind in self.kinds:
            scores, found = self.score(measure, kind, edits, counts[kind])
            chosen = lowest(scores, counts[kind])
            notes[f"{kind}_scores"] = {str(u): s for u, s in sorted(scores.items()) if isfinite(s)}
            edits = merge(edits, {u.block: found[u] for u in chosen})
            fits |= found
            removed += chosen
        removed, swaps = self.swap(
            measure, removed, fits, lambda others, gone: [u for u in fits if u.name == gone.name]
        )
        units = dict(problem.units)
        if self.shared and self.basis == "pca":
            attentions = merge(*({u.block: fits[u]} for u in removed if u.name == "attention"))
            again, shared = self.share(measure, [u for u in removed if u.name == "ffn"], attentions)
            fits, units = fits | again, units | shared
        return Choice(removed, merge(*({u.block: fits[u]} for u in removed)), units, notes | swaps, remarks)

    def choose_freely(self, problem: Problem, measure: Measurements) -> Choice:
        """The submodules that cost the least loss per weight saved, until the budget is met, and their bypasses."""
        n, full = len(problem.shapes), self.solver()
        problem = replace(problem, units=dict.fromkeys(problem.units, replace(full, ffn_rank=full.attention_rank)))
        for u in problem.units:
            saving(problem, [u], advice=SMALLER)  # refuses a bypass that saves nothing
        budgets = find_budgets(problem, measure, self.sparsity)
        need = torch.tensor([b.total - b.limit for b in budgets], dtype=torch.float64)
        saved = {u: count_saved(problem, budgets, [u]) for u in problem.units}
        spared = max((u for u in saved if u.name == "attention"), key=lambda u: float(saved[u][0]), default=None)
        most = count_saved(problem, budgets, [u for u in saved if u != spared])
        for b, most_of in zip(budgets, most.tolist(), strict=True):
            if most_of < b.total - b.limit:
                raise b.refuse("subfit", b.total - most_of)
        fits = fit_units(problem, measure, list(problem.units))

        def able(others: list[Unit], gone: Unit | None = None) -> list[Unit]:
            """What may go besides `others`; instead of `gone`, if given: then the budget must be met."""
            last = sum(u.name == "attention" for u in others) >= n - 1
            short = need - sum(saved[u] for u in others) if gone else torch.zeros_like(need)
            rest = [u for u in fits if u not in others and bool((saved[u] >= short).all())]
            return [u for u in rest if not (last and u.name == "attention")]

        with measure.phase("search"):
            few = measure.stream.subset(self.windows)
            trials = {u: {u.block: f} for u, f in fits.items()}
            removed, losses = search_by_weight(few, trials, saved, need, able)
        notes = {"search": {str(u): loss for u, loss in zip(removed, losses, strict=True)}}
        removed, swaps = self.swap(measure, removed, fits, able)
        problem = raise_ranks(problem, budgets, removed, need, full)
        fits = fit_units(problem, measure, removed)
        units = aim(problem.units, self.fit)
        return Choice(removed, merge(*({u.block: f} for u, f in fits.items())), units, notes | swaps)

    def swap(
        self, measure: Measurements, removed: list[Unit], fits: Fits, able: Callable[[list[Unit], Unit], list[Unit]]
    ) -> tuple[list[Unit], dict[str, Any]]:
        """Exchange replaced units for others while that lowers the loss, at most `swaps` times; notes on it."""
        few, made = measure.stream.subset(self.windows), list(removed)
        trace: list[tuple[str, str, float]] = []
        with measure.phase("search"):
            for _ in range(self.swaps if made else 0):
                losses: dict[tuple[Unit, Unit], float] = {}
                for gone in made:
                    others = [u for u in made if u != gone]
                    edits = merge(*({u.block: fits[u]} for u in others))
                    trials = {(gone, u): {u.block: fits[u]} for u in able(others, gone) if u not in others}
                    losses |= trial_losses(few, edits, trials)
                gone, new = min(losses, key=lambda pair: losses[pair])
                if gone == new or losses[gone, new] >= losses[gone, gone]:
                    break
                made[made.index(gone)] = new
                trace.append((str(gone), str(new), losses[gone, new]))
        return made, {"swaps": trace} if trace else {}

    def score(
        self, measure: Measurements, kind: str, edits: Mapping[int, list[Edit]], n: int
    ) -> tuple[dict[Unit, float], Fits]:
        """Scores of all submodules of one kind in the model with `edits`, and their fits; the n lowest will go."""
        how = self.attention_score if kind == "attention" else self.ffn_score
        where = "attention" if kind == "attention" else "mlp"
        turn, power = Tap(f"{where}.raw", "influence", f"{where}.add"), Tap(f"{where}.raw", "squares")
        parts: dict[Unit, tuple[float, float]] = {}
        scores: dict[Unit, float] = {}
        fits: Fits = {}

        def taps(shape: Shape) -> list[Tap]:
            return [turn, power, *self.solver().taps(Unit(shape.block, kind), shape)]

        for i, _, stats in measure.forward(taps, edits):
            unit = Unit(i, kind)
            parts[unit] = float(stats.mean(turn, "rotation")), float(stats.mean(turn, "magnitude"))
            frontier = self.solver().decompose(unit, {}, stats, measure.shapes[i])
            fits[unit] = self.solver().truncate(frontier, 0, measure.shapes[i])
            scores[unit] = float(frontier.loss[0] / stats.mean(power).sum())
        if how == "cosine":
            scores = {u: rotation for u, (rotation, _) in parts.items()}
        elif how == "influence":
            scores = combine(parts, self.combine)
        elif how in ("loss", "greedy"):
            with measure.phase("search"):
                trials = {u: {u.block: f} for u, f in fits.items()}
                few = measure.stream.subset(self.windows)
                if how == "loss":
                    found = race(few, trials, n, edits)
                else:
                    made, losses = search_greedily(few, trials, lambda made: len(made) >= n, edits)
                    found = dict(zip(made, losses, strict=True))
                scores = dict.fromkeys(fits, float("inf")) | found
        return scores, fits

    def share(
        self, measure: Measurements, chosen: list[Unit], edits: Mapping[int, list[Edit]]
    ) -> tuple[Fits, dict[Unit, Solver]]:
        """One basis for the chosen feed-forwards, the top eigenvectors of their mean covariance; (their fits in it, as far
        as they are made now, their solvers)."""
        shapes = measure.shapes
        rank, width = self.solver().inner_rank(Unit(0, "ffn"), shapes[0]), shapes[0].hidden
        if not chosen or not rank or not is_factored(rank, width):
            return {}, {}

        def taps(shape: Shape) -> list[Tap]:
            unit = Unit(shape.block, "ffn")
            return self.solver().taps(unit, shape) if unit in chosen else []

        covariances: list[Tensor] = []
        for i, _, stats in measure.forward(taps, edits):
            if (unit := Unit(i, "ffn")) in chosen:
                train, held = self.solver().moments(unit, stats)
                covariances.append((train + held).covariance)
        basis, fits = shared_basis(covariances, rank), Fits()
        if self.fit in ("auto", "once", "joint"):
            solver = replace(self.solver(), shared=basis)
            for i, _, stats in measure.forward(taps, edits):
                if (unit := Unit(i, "ffn")) in chosen:
                    fits[unit] = fit_unit(solver, unit, stats, shapes[i])
        return fits, dict.fromkeys(chosen, replace(self._refit_solver(), shared=basis))


@dataclass(frozen=True)
class Choice:
    """Which units go, the bypasses that they were chosen with, and with what they are to be fitted."""

    removed: list[Unit]
    edits: dict[int, list[Edit]]
    units: Mapping[Unit, Solver]
    notes: dict[str, Any]
    remarks: dict[str, str] = field(default_factory=dict)


def find_target(fit: Fit) -> Literal["own", "gap"]:
    """What bypasses are fitted to at last: the submodule's own contribution, or what is missing to the uncompressed model."""
    return "gap" if fit in ("auto", "compensated") else "own"


def aim(units: Mapping[Unit, Solver], fit: Fit) -> dict[Unit, Solver]:
    """The same bypasses with the target that this way of fitting has."""
    return {u: replace(s, target=find_target(fit)) if isinstance(s, Bypass) else s for u, s in units.items()}


def try_fits(
    problem: Problem, measure: Measurements, planned: Planned, edits: dict[int, list[Edit]]
) -> tuple[dict[Fit, float], dict[Fit, dict[int, list[Edit]]]]:
    """(Loss on the calibration windows by each way of fitting, its edits); `edits`: the bypasses fitted once."""
    if not edits:
        return {"once": 0.0}, {"once": {}}
    losses: dict[Fit, float] = {}
    made: dict[Fit, dict[int, list[Edit]]] = {fit: {} for fit in TRIED}
    for n, fit in enumerate(TRIED):
        first = edits if fit == "once" else {}
        own = replace(planned, solvers=aim(problem.units, fit), prefix=PREFIXES[fit], edits=first)
        hidden = solve(problem, measure, own, lambda *block: None, trial=f"fit {n + 1}/{len(TRIED)}", made=made[fit])
        losses[fit] = nll(measure.stream, hidden)
    return losses, made


def raise_ranks(
    problem: Problem, budgets: Sequence[Budget], removed: list[Unit], need: Tensor, solver: Bypass
) -> Problem:
    """The replaced units at the largest common rank at which what they save still meets the budgets.

    No rank is below that of `solver` for attentions, nor above that for feed-forwards.
    """
    width = problem.shapes[0].hidden

    def at(rank: int) -> Problem:
        units = dict(problem.units)
        for u in removed:
            least = solver.inner_rank(Unit(u.block, "attention"), problem.shapes[u.block])
            share = max(rank, least) / width
            units[u] = replace(solver, attention_rank=share, ffn_rank=share)
        return replace(problem, units=units)

    limit = solver.inner_rank(Unit(0, "ffn"), problem.shapes[0])
    falling = (p for r in range(limit, 0, -1) if (count_saved(p := at(r), budgets, removed) >= need).all())
    return next(falling, at(0))


def list_taps(solvers: Mapping[Unit, Solver], shape: Shape) -> list[Tap]:
    """What these solvers of a block's units measure."""
    return sorted({t for u, s in solvers.items() if u.block == shape.block for t in s.taps(u, shape)})


def combine(parts: Mapping[Unit, tuple[float, float]], how: str) -> dict[Unit, float]:
    """Rotation × magnitude, or their sum after dividing each by its mean over the blocks."""
    if how == "product":
        return {u: rotation * magnitude for u, (rotation, magnitude) in parts.items()}
    means = [sum(p[j] for p in parts.values()) / len(parts) or 1.0 for j in (0, 1)]
    return {u: rotation / means[0] + magnitude / means[1] for u, (rotation, magnitude) in parts.items()}
