"""SubFit: submodules go wherever they matter least, each replaced by a fitted affine low-rank bypass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from planish.core import Edit, Method, Plan, Solver, Unit
from planish.solvers.bypass import Bypass, is_factored, shared_basis
from planish.stats import Tap
from planish.submodules import count_removed, lowest, make_plan, merge, search_greedily, trial_losses

if TYPE_CHECKING:
    from planish.compress import Job

Fits = dict[Unit, list[Edit]]
Fit = Literal["auto", "once", "sequential", "compensated"]
FITS: tuple[Fit, ...] = ("once", "sequential", "compensated")


@dataclass(frozen=True)
class SubFit(Method):
    """Attentions first, then feed-forwards on the model whose attentions are already replaced; not contiguous.

    Scores, lowest go. "influence": rotation × magnitude, E[1 − cos(x, x + f)] and E[|f| / |x|] (`combine` "sum": each
    divided by its mean over the blocks, then added). "cosine": the rotation alone. "error": replacement-aware, what the
    fit leaves over, E|f − f̂|² / E|x|², x the residual stream. "loss": replacement-aware, the calibration loss with the
    fit in place, on `windows` sequences; "greedy": the same, measured again after every choice.

    `fit`: "once" = each bypass from the statistics it was chosen by; "sequential" = all refitted from the first block
    to the last, each on the inputs that the replaced model before it produces; "compensated" = the same, fitting what
    is missing to the uncompressed model's residual stream, so that later bypasses repair what earlier ones broke;
    "auto" = all three are tried, the one with the least calibration loss is taken.

    Ranks up to 1 are relative to the hidden size (1/16 and 1 are the paper's 256 and 4096 at 4096), above 1 absolute.
    `sparsity` is the paper's: this share of the attentions and of the feed-forwards; otherwise `keep`, net of what the
    bypasses add, decides, with as many attentions as feed-forwards (one more or less where that comes closer).

    Differs from the paper (no code is public): its score's formula, ridge and calibration are not known to us.
    """

    title: ClassVar[str] = "submodules replaced by affine low-rank bypasses, chosen one kind after the other"
    reference: ClassVar[str] = "SubFit, arXiv 2606.02559"

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

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return {"once": "dense", "sequential": "compressed"}.get(self.fit, "both")

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
        counts = count_removed(job, self.kinds, self.sparsity)
        removed: list[Unit] = []
        edits: dict[int, list[Edit]] = {}
        for kind in self.kinds:
            scores, fits = self.score(job, kind, edits, counts[kind])
            chosen = lowest(scores, counts[kind])
            job.notes[f"{kind}_scores"] = {str(u): s for u, s in sorted(scores.items()) if isfinite(s)}
            if kind == "ffn" and self.shared and chosen and self.basis == "pca":
                fits |= self.share(job, chosen, edits)
            edits = merge(edits, {u.block: fits[u] for u in chosen if u in fits})
            removed += chosen
        plan = make_plan(job, removed, self.sparsity)
        fit = self.fit
        if fit == "auto":
            fit = self.pick_fit(job, plan, edits) if removed else "once"
            job.method = replace(self, fit=fit)
        if fit == "once":
            job.edits = edits
        return plan

    def pick_fit(self, job: Job, plan: Plan, edits: dict[int, list[Edit]]) -> Fit:
        """The way of fitting that leaves the least loss on the calibration windows; the job's units fit that way."""
        basis = next((s.shared for s in job.units.values() if isinstance(s, Bypass) and s.shared is not None), None)
        losses: dict[Fit, float] = {}

        def use(fit: Fit) -> None:
            job.method = method = replace(self, fit=fit)
            job.units = dict.fromkeys(job.units, replace(method.refit_solver(), shared=basis))
            job.edits = edits if fit == "once" else {}

        for n, fit in enumerate(FITS):
            use(fit)
            hidden = job.solve(plan, lambda i, block, spec: None, phase=f"fit {n + 1}/{len(FITS)}")
            losses[fit] = job.stream.nll(hidden)
        job.notes["fit_losses"] = losses
        job.errors = {}
        best = min(FITS, key=lambda fit: losses[fit])
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
        rank, width = self.solver().inner_rank(chosen[0], job.shapes[0]), job.shapes[0].hidden
        if not rank or not is_factored(rank, width):
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
        if self.fit in ("auto", "once"):
            solver = replace(self.solver(), shared=basis)
            job.measure(taps, refit, merge(edits))
        return fits


def combine(parts: Mapping[Unit, tuple[float, float]], how: str) -> dict[Unit, float]:
    """Rotation × magnitude, or their sum after dividing each by its mean over the blocks."""
    if how == "product":
        return {u: rotation * magnitude for u, (rotation, magnitude) in parts.items()}
    means = [sum(p[j] for p in parts.values()) / len(parts) or 1.0 for j in (0, 1)]
    return {u: rotation / means[0] + magnitude / means[1] for u, (rotation, magnitude) in parts.items()}
