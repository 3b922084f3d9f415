"""SubFit: submodules go wherever they matter least, each replaced by a fitted affine low-rank bypass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from planish.core import SUBMODULES, Edit, Plan, Solver, Unit
from planish.methods.method import Method
from planish.modelling.blocks import get_linear
from planish.plan.budgets import Budget, make_budget
from planish.plan.removal import (
    check_foldable,
    count_removed,
    lowest,
    make_plan,
    merge,
    round_half_up,
    saving,
    search_by_weight,
    search_greedily,
    trial_losses,
)
from planish.solvers.bypass import Bypass, is_factored, shared_basis
from planish.solvers.moments import Moments
from planish.solvers.window import down_edit, fit_correction
from planish.stats import Stats, Tap

if TYPE_CHECKING:
    from planish.job import Job

Fits = dict[Unit, list[Edit]]
Fit = Literal["auto", "once", "joint", "sequential", "compensated"]
TRIED: tuple[Fit, ...] = ("once", "sequential", "compensated")  # by "auto"


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
    `windows`: calibration sequences on which losses are compared. `swaps`: then up to so many exchanges of a replaced
    submodule for another (of its kind, where numbers are equal) that lower the loss of those sequences.

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
        return {"once": "dense", "joint": "dense", "sequential": "compressed"}.get(self.fit, "both")

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("attention", "ffn") if self.submodules == "both" else (self.submodules,)

    def solver(self) -> Bypass:
        """With which candidates are fitted; the target is the submodule's own contribution."""
        names = ("attention_rank", "ffn_rank", "input", "gate", "basis", "ridge", "tokens")
        return Bypass(self.kinds, **{n: getattr(self, n) for n in names})

    def refit_solver(self) -> Bypass:
        """With which the chosen ones are fitted at last."""
        return replace(self.solver(), target="gap") if self.fit in ("auto", "compensated") else self.solver()

    def solvers(self) -> list[Solver]:
        return [self.refit_solver()]

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        """The feed-forward is fitted on what the replaced attention of its block puts out."""
        return [stage for k in self.kinds if (stage := [u for u in units if u.name == k])]

    def plan(self, job: Job) -> Plan:
        removed, edits = self.choose_freely(job) if self.numbers == "free" else self.choose(job)
        plan = make_plan(job, removed, self.sparsity)
        fit = self.fit
        if fit == "auto":
            fit = self.pick_fit(job, plan, edits) if removed else "once"
            job.method = replace(self, fit=fit)
        if fit == "joint":
            edits = self.refit_jointly(job, edits)
        if self.repair:
            check_foldable(job, "subfit with repair=true")
            job.edits = self.refit_and_repair(job, edits, again=fit in ("sequential", "compensated"))
        elif fit in ("once", "joint"):
            job.edits = edits
        return plan

    def choose(self, job: Job) -> tuple[list[Unit], dict[int, list[Edit]]]:
        """One kind after the other, as many of each; which go, and their bypasses."""
        counts = count_removed(job, self.kinds, self.sparsity)
        removed: list[Unit] = []
        edits: dict[int, list[Edit]] = {}
        fits: Fits = {}
        for kind in self.kinds:
            scores, found = self.score(job, kind, edits, counts[kind])
            chosen = lowest(scores, counts[kind])
            job.notes[f"{kind}_scores"] = {str(u): s for u, s in sorted(scores.items()) if isfinite(s)}
            edits = merge(edits, {u.block: found[u] for u in chosen})
            fits |= found
            removed += chosen
        removed = self.swap(job, removed, fits, lambda others, gone: [u for u in fits if u.name == gone.name])
        if self.shared and self.basis == "pca":
            attentions = merge(*({u.block: fits[u]} for u in removed if u.name == "attention"))
            fits |= self.share(job, [u for u in removed if u.name == "ffn"], attentions)
        return removed, merge(*({u.block: fits[u]} for u in removed))

    def choose_freely(self, job: Job) -> tuple[list[Unit], dict[int, list[Edit]]]:
        """The submodules that cost the least loss per weight saved, until the budget is met, and their bypasses."""
        n = len(job.shapes)
        full = self.solver()
        small = replace(full, ffn_rank=full.attention_rank)
        job.units = dict.fromkeys(job.units, small)
        for u in job.units:
            saving(job, [u])  # refuses a bypass that saves nothing
        need = torch.tensor([b.total - b.limit for b in self.budgets(job)], dtype=torch.float64)
        saved = {u: self.saved(job, [u]) for u in job.units}
        spared = max((u for u in saved if u.name == "attention"), key=lambda u: float(saved[u][0]), default=None)
        most = self.saved(job, [u for u in saved if u != spared])
        for b, most_of in zip(self.budgets(job), most.tolist(), strict=True):
            if most_of < b.total - b.limit:
                raise b.refuse("subfit", b.total - most_of)
        fits = self.fit_all(job, list(job.units))

        def able(others: list[Unit], gone: Unit | None = None) -> list[Unit]:
            """What may go besides `others`; instead of `gone`, if given: then the budget must be met."""
            last = sum(u.name == "attention" for u in others) >= n - 1
            short = need - sum(saved[u] for u in others) if gone else torch.zeros_like(need)
            rest = [u for u in fits if u not in others and bool((saved[u] >= short).all())]
            return [u for u in rest if not (last and u.name == "attention")]

        with job.phase("search"):
            few = job.stream.subset(self.windows)
            trials = {u: {u.block: f} for u, f in fits.items()}
            removed, losses = search_by_weight(few, trials, saved, need, able)
        job.notes["search"] = {str(u): loss for u, loss in zip(removed, losses, strict=True)}
        removed = self.swap(job, removed, fits, able)
        self.raise_ranks(job, removed, need)
        fits = self.fit_all(job, removed)
        target = self.refit_solver().target
        job.units = {u: replace(s, target=target) if isinstance(s, Bypass) else s for u, s in job.units.items()}
        return removed, merge(*({u.block: f} for u, f in fits.items()))

    def budgets(self, job: Job) -> list[Budget]:
        """What the free choice has to meet: of a sparsity, as many weights as that share of whole blocks."""
        if self.sparsity is None:
            return job.budgets
        share = round_half_up(self.sparsity * len(job.shapes)) / len(job.shapes)
        return [make_budget("keep", 1 - share, job.stream.source, job.shapes, job.context)]

    def saved(self, job: Job, units: list[Unit]) -> Tensor:
        """What goes of every budget with these units, net of their bypasses."""
        return torch.tensor([saving(job, units, b) for b in self.budgets(job)], dtype=torch.float64)

    def raise_ranks(self, job: Job, removed: list[Unit], need: Tensor) -> None:
        """Give the replaced units the largest common rank at which what they save still meets the budget."""
        start, width = job.units, job.shapes[0].hidden

        def use(rank: int) -> bool:
            job.units = dict(start)
            for u in removed:
                share = max(rank, self.solver().inner_rank(Unit(u.block, "attention"), job.shapes[u.block])) / width
                job.units[u] = replace(self.solver(), attention_rank=share, ffn_rank=share)
            return bool((self.saved(job, removed) >= need).all())

        limit = self.solver().inner_rank(Unit(0, "ffn"), job.shapes[0])
        use(next((r for r in range(limit, 0, -1) if use(r)), 0))

    def swap(
        self, job: Job, removed: list[Unit], fits: Fits, able: Callable[[list[Unit], Unit], list[Unit]]
    ) -> list[Unit]:
        """Exchange replaced units for others while that lowers the loss, at most `swaps` times."""
        few, made = job.stream.subset(self.windows), list(removed)
        trace: list[tuple[str, str, float]] = []
        with job.phase("search"):
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
        if trace:
            job.notes["swaps"] = trace
        return made

    def fit_all(self, job: Job, units: list[Unit]) -> Fits:
        """The units' bypasses, each by its own solver, from the uncompressed model's statistics."""
        fits: Fits = {}

        def taps(shape) -> list[Tap]:
            return [t for u in units if u.block == shape.block for t in self.solver().taps(u, shape)]

        def use(i, block, stats) -> None:
            fits.update({u: fit_unit(job, u, stats) for u in units if u.block == i})

        job.measure(taps, use)
        return fits

    def refit_jointly(self, job: Job, edits: Mapping[int, list[Edit]]) -> dict[int, list[Edit]]:
        """All bypasses fitted again, to what each submodule would add to the stream that the model with `edits` has."""
        found: dict[int, list[Edit]] = {}
        stream = job.stream
        with job.phase("statistics"):
            hidden = stream.start()
            for i, shape in enumerate(job.shapes):
                before: list[Edit] = []
                for edit in sorted(edits.get(i, ()), key=lambda e: e.target):  # attention, then mlp
                    unit = Unit(i, SUBMODULES[edit.target])
                    block = stream.place(stream.block(i, before))
                    stats, _ = stream.measure(i, block, job.units[unit].taps(unit, shape), hidden, outputs=False)
                    found.setdefault(i, []).extend(fit_unit(job, unit, stats))
                    before.append(edit)
                hidden = stream.run(i, stream.place(stream.block(i, edits.get(i, ()))), hidden)
        return found

    def refit_and_repair(self, job: Job, edits: Mapping[int, list[Edit]], again: bool) -> dict[int, list[Edit]]:
        """From the first block to the last: bypasses fitted again, if asked for, and down projections that stay."""
        found: dict[int, list[Edit]] = {}
        stream = job.stream
        taps = [Tap("down.in", "moments", "mlp.gap", part=part) for part in ("fit", "held")]
        with job.phase("statistics"):
            hidden = dense_hidden = stream.start()
            for i, shape in enumerate(job.shapes):
                dense, new = stream.place(stream.block(i)), list[Edit]()
                for edit in sorted(edits.get(i, ()), key=lambda e: e.target):
                    if again:
                        unit = Unit(i, SUBMODULES[edit.target])
                        block, wanted = stream.place(stream.block(i, new)), job.units[unit].taps(unit, shape)
                        stats, _ = stream.measure(i, block, wanted, hidden, (dense, dense_hidden), outputs=False)
                        new += fit_unit(job, unit, stats)
                    else:
                        new.append(edit)
                if (found or new) and not any(e.target == "mlp" for e in new):
                    block = stream.block(i, new)
                    stats, _ = stream.measure(
                        i, stream.place(block), taps, hidden, (dense, dense_hidden), outputs=False
                    )
                    train, held = (Moments.read(stats, tap) for tap in taps)
                    new.append(repair_edit(get_linear(block, stream.family, "down"), train, held, self.ridge))
                if new:
                    found[i] = new
                hidden = stream.run(i, stream.place(stream.block(i, new)), hidden)
                dense_hidden = stream.run(i, dense, dense_hidden)
        return found

    def pick_fit(self, job: Job, plan: Plan, edits: dict[int, list[Edit]]) -> Fit:
        """The way of fitting that leaves the least loss on the calibration windows; the job's units fit that way."""
        losses: dict[Fit, float] = {}
        units = job.units

        def use(fit: Fit) -> None:
            job.method = method = replace(self, fit=fit, repair=False)
            target = method.refit_solver().target
            job.units = {u: replace(s, target=target) if isinstance(s, Bypass) else s for u, s in units.items()}
            job.edits = edits if fit == "once" else {}

        for n, fit in enumerate(TRIED):
            use(fit)
            hidden = job.solve(plan, lambda i, block, spec: None, phase=f"fit {n + 1}/{len(TRIED)}")
            losses[fit] = job.stream.nll(hidden)
        job.notes["fit_losses"] = losses
        job.errors = {}
        best = min(TRIED, key=lambda fit: losses[fit])
        use(best)
        return best

    def score(self, job: Job, kind: str, edits: Mapping[int, list[Edit]], n: int) -> tuple[dict[Unit, float], Fits]:
        """Scores of all submodules of one kind in the model with `edits`, and their fits; the n lowest will go."""
        how = self.attention_score if kind == "attention" else self.ffn_score
        where = "attention" if kind == "attention" else "mlp"
        turn, power = Tap(f"{where}.raw", "influence", f"{where}.add"), Tap(f"{where}.raw", "squares")
        parts: dict[Unit, tuple[float, float]] = {}
        scores: dict[Unit, float] = {}
        fits: Fits = {}

        def use(i, block, stats) -> None:
            unit = Unit(i, kind)
            parts[unit] = float(stats.mean(turn, "rotation")), float(stats.mean(turn, "magnitude"))
            frontier = self.solver().decompose(unit, {}, stats, job.shapes[i])
            fits[unit] = self.solver().truncate(frontier, 0, job.shapes[i])
            scores[unit] = float(frontier.loss[0] / stats.mean(power).sum())

        job.measure(lambda shape: [turn, power, *self.solver().taps(Unit(shape.block, kind), shape)], use, merge(edits))
        if how == "cosine":
            scores = {u: rotation for u, (rotation, _) in parts.items()}
        elif how == "influence":
            scores = combine(parts, self.combine)
        elif how in ("loss", "greedy"):
            with job.phase("search"):
                trials = {u: {u.block: f} for u, f in fits.items()}
                few = job.stream.subset(self.windows)
                if how == "loss":
                    scores = trial_losses(few, edits, trials)
                else:
                    made, losses = search_greedily(few, trials, lambda made: len(made) >= n, edits)
                    scores = dict.fromkeys(fits, float("inf")) | dict(zip(made, losses, strict=True))
        return scores, fits

    def share(self, job: Job, chosen: list[Unit], edits: Mapping[int, list[Edit]]) -> Fits:
        """Give the chosen feed-forwards one basis, the top eigenvectors of their mean covariance; their fits in it."""
        rank, width = self.solver().inner_rank(Unit(0, "ffn"), job.shapes[0]), job.shapes[0].hidden
        if not chosen or not rank or not is_factored(rank, width):
            return {}
        covariances: list[Tensor] = []
        fits: Fits = {}

        def collect(i, block, stats) -> None:
            unit = Unit(i, "ffn")
            if unit in chosen:
                train, held = self.solver().moments(unit, stats)
                covariances.append((train + held).covariance)

        def refit(i, block, stats) -> None:
            unit = Unit(i, "ffn")
            if unit in chosen:
                frontier = solver.decompose(unit, {}, stats, job.shapes[i])
                fits[unit] = solver.truncate(frontier, 0, job.shapes[i])

        def taps(shape) -> list[Tap]:
            unit = Unit(shape.block, "ffn")
            return self.solver().taps(unit, shape) if unit in chosen else []

        job.measure(taps, collect, merge(edits))
        basis = shared_basis(covariances, rank)
        shared = replace(self.refit_solver(), shared=basis)
        job.units |= dict.fromkeys(chosen, shared)
        if self.fit in ("auto", "once", "joint"):
            solver = replace(self.solver(), shared=basis)
            job.measure(taps, refit, merge(edits))
        return fits


def repair_edit(down: nn.Linear, train: Moments | None, held: Moments | None, ridge: float) -> Edit:
    """The down projection nearest to the one it was that gives what the moments' f asks for."""
    assert train is not None
    bias = None if down.bias is None else down.bias.detach()
    if bias is not None:  # it stays
        train, held = train.shift(bias.double()), held and held.shift(bias.double())
    w = fit_correction(train, held, down.weight.detach().double().T, ridge)
    return down_edit({"down": down.weight.detach()}, w.T, bias)


def fit_unit(job: Job, unit: Unit, stats: Stats) -> list[Edit]:
    """A unit's bypass from its block's statistics."""
    shape = job.shapes[unit.block]
    return job.units[unit].truncate(job.units[unit].decompose(unit, {}, stats, shape), 0, shape)


def combine(parts: Mapping[Unit, tuple[float, float]], how: str) -> dict[Unit, float]:
    """Rotation × magnitude, or their sum after dividing each by its mean over the blocks."""
    if how == "product":
        return {u: rotation * magnitude for u, (rotation, magnitude) in parts.items()}
    means = [sum(p[j] for p in parts.values()) / len(parts) or 1.0 for j in (0, 1)]
    return {u: rotation / means[0] + magnitude / means[1] for u, (rotation, magnitude) in parts.items()}
