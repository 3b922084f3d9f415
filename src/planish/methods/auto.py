"""auto: every cut competes in predicted nats per token under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import exp
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from planish.calibrate.cache import describe
from planish.calibrate.text import list_shuffled
from planish.core import Frontier, Plan, Shape, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method
from planish.modelling.families import ATTENTION, MLP
from planish.plan.allocate import Alternative, BudgetError, Curve, choose
from planish.solvers.fisher_bypass import FisherBypass
from planish.solvers.fisher_structural import FisherNeurons, FisherPairs, FisherValues
from planish.solvers.key_latent import KeyLatent
from planish.solvers.two_sided import TwoSided
from planish.stats import Stats, Tap

if TYPE_CHECKING:
    from planish.job import Job

ATTENTION_UNITS = ("q", "k", "v", "o", "qk", "keys", "vo", "attention")
WAYS = {  # alternatives for a submodule: units that go together
    "attention": (
        *(("q", "k", "v", "o"), ("qk", "vo"), ("q", "k", "vo"), ("attention",)),
        *(("q", "keys", "v", "o"), ("q", "keys", "vo"), ("keys", "vo")),
    ),
    "ffn": (("gate", "up", "down"), ("mlp",), ("ffn",)),
}
SCORES = {  # kinds of units that change an attention's scores: shares of ranks at which, windows on which errors are measured
    ("q", "k"): ((0.125, 0.25, 0.5), 4),
    ("qk",): ((0.125, 0.25, 0.5, 0.75), 8),
    ("keys",): ((0.125, 0.25, 0.5, 0.75), 8),
}
LOW = 0.6  # keep below which the prediction saturates: ranks are chosen by steeper losses, bypasses are tried
NEVER = 1e9  # weight with which a bypass is never taken
BYPASSES = (NEVER, 1.4, 1.2, 1.0, 0.85)  # weights of their predicted loss that are tried
LINEARS = (1.0, 2.0, 4.0)  # the same for low-rank linears
TINY = 1e-300
SATURATES = 0.01  # predicted nats per token above which plans are compared by measured loss
HELD = 8  # windows at least on which they are
MOVES = {  # how a search changes the weights of predictions: one step either way
    "attention": (1 / 1.5, 1.5),
    "tilt": (-0.5, 0.5),
    "keys": (0.5, 2.0),
    "linear": (0.5, 2.0),
    "steep": (-3.0, 3.0),
}


@dataclass(frozen=True)
class Weighing:
    """What predicted losses are multiplied by when ranks are chosen: l becomes w · l · (1 + steep · w · l).

    w = `attention` for what belongs to an attention, times `keys` for q and k, `linear` for low-rank linears, `bypass` for whole
    submodules, times e^(tilt · (1 − 2 i / (n − 1))) in block i of n. Predictions miss by kind and by
    depth; measured losses of whole plans tell by how much.
    """

    steep: float = 0.0
    attention: float = 1.0
    keys: float = 1.0
    tilt: float = 0.0
    linear: float = 1.0
    bypass: float = NEVER

    def apply(self, curve: Curve, blocks: int) -> Curve:
        name, depth = curve.unit.name, curve.unit.block / max(blocks - 1, 1)
        weight = exp(self.tilt * (1 - 2 * depth))
        weight *= self.attention if name in ATTENTION_UNITS else 1.0
        weight *= self.keys if name in ("q", "k", "qk", "keys") else 1.0
        weight *= self.linear if name in ATTENTION + MLP else 1.0
        weight *= self.bypass if name in ("attention", "ffn") else 1.0
        loss = weight * curve.loss
        return replace(curve, loss=loss * (1 + self.steep * loss))

    def moved(self, name: str, step: float) -> Weighing:
        old = getattr(self, name)
        new = old * step if name in ("attention", "keys", "linear") else old + step
        return replace(self, **{name: max(new, 0.0) if name == "steep" else new})


@dataclass(frozen=True)
class Auto(Method):
    """All cuts compete in predicted nats per token: low-rank linears, value dimensions, rotary pairs, neurons, bypasses.

    Problem: for every unit of every block, how much does the loss of the language model rise at each rank it could have?
    Which ranks have the least sum within the budget?

    Equation: Δ ≈ ½ tr(G E[e eᵀ]) nats per token: e the error that a cut makes in an output, G = E[g gᵀ], g the gradient of
    the summed NLL there, labels sampled from the model. One pass forward and back measures input moments and gradient
    moments; every unit's frontier is then in one currency (`planish.solvers.two_sided.TwoSided`,
    `planish.solvers.fisher_structural.FisherValues`), and each submodule takes the alternative that is best at the
    budget's price (`planish.plan.allocate.choose`).

    `units`: "any"; "structural" = dense shapes only; "linear" = low-rank linears only. Under a budget of the KV cache keys
    may also become latents, unless it is "structural". `anchor`: share of the uncompressed model's activations in the target
    of each solve (0: solve on the uncompressed model's statistics alone, which a sweep can re-use). `ridge`: of the refits,
    relative. `bypass`: whether fitted affine maps in place of whole submodules compete too; by default below keep 0.6 where
    all units may be cut, and under a budget of latency. `rounds`: gradients are measured again on the model compressed so far
    after each equal share of the cut. `steep`: ranks are chosen by loss · (1 + steep · loss) of every unit: the second-order
    prediction saturates, so a cut that looks like 0.3 nats costs more than thirty of 0.01; what is reported stays the
    prediction itself. By default 0, or 3 below keep 0.6. `search`: up to so many plans with other weights of all predictions
    are compared by measured loss. `refit_share`: with an anchor, share of the calibration windows, evenly spaced, that each
    plan's solve runs again: less makes a further point of a sweep cheaper and the result a little worse; their moments are
    then blended with the uncompressed model's. `planish sweep` takes a sixteenth unless told otherwise. `shuffled`: share of
    the calibration windows whose tokens, but the first, are put in another order. Statistics of such windows hold more than
    the calibration text's own directions, and text of another kind loses less.

    Where more than 0.01 nats per token are predicted, the plan without bypasses and those with several weights of their
    predicted loss are solved without every fourth of the windows that are not shuffled and compared by the loss on these;
    below keep 0.6, where all units may be cut, also those with the loss of low-rank linears counted two and four times.
    """

    title: ClassVar[str] = "all cuts compete in predicted nats per token under one budget"
    reference: ClassVar[str] = "planish"
    shares: ClassVar[tuple[str, ...]] = ("anchor", "refit_share", "shuffled")
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)

    units: Literal["any", "structural", "linear"] = "any"
    anchor: float = 0.25
    ridge: float = 1e-3
    bypass: bool | None = None
    rounds: int = 1
    steep: float | None = None
    search: int = 0
    refit_share: float = 1.0
    shuffled: float = 0.25

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return "both" if self.anchor else "dense"

    def solvers(self) -> list[Solver]:
        structural: list[Solver] = [FisherValues(self.anchor, self.ridge), FisherNeurons(self.anchor, self.ridge)]
        structural += [FisherPairs()]
        if self.bypass or (self.bypass is None and self.units == "any"):
            structural += [FisherBypass(self.ridge, self.anchor)]
        linear: list[Solver] = [TwoSided(anchor=self.anchor, ridge=self.ridge), KeyLatent(nats=True)]
        return {"any": linear + structural, "structural": structural, "linear": linear}[self.units]

    def takes(self, unit: Unit, budgets: Mapping[str, float]) -> bool:
        """Keys as latents save nothing but cache, at a time per token that no table of latencies holds; bypasses unasked only
        at low keeps and where time counts, of which a call takes some however small its matrices are; elsewhere measuring
        for them costs and brings nothing."""
        if unit.name in ("attention", "ffn") and self.bypass is None and "max_latency" not in budgets:
            return min((share for name, share in budgets.items() if name != "kv_keep"), default=1.0) < LOW
        return unit.name != "keys" or ("kv_keep" in budgets and "max_latency" not in budgets)

    def stages(self, units: list[Unit]) -> list[list[Unit]]:
        if not self.anchor:
            return [units]
        order = (("q", "k", "qk", "keys", "v", "attention"), ("o", "vo"), ("gate", "up", "ffn"), ("down", "mlp"))
        return [s for s in ([u for u in units if u.name in names] for names in order) if s]

    def __post_init__(self) -> None:
        if not 0 < self.refit_share <= 1:
            raise InputError(
                f"refit_share of auto must lie in (0, 1], got {self.refit_share:g} (a share of the windows)"
            )

    def plan(self, job: Job) -> Plan:
        if all(b.share >= 1 for b in job.budgets):  # nothing is to go, not even a direction that no input has
            job.notes |= {"predicted_loss": 0.0, "units cut": {}}
            return {}
        frontiers: dict[Unit, Frontier] = {}
        rounds = max(self.rounds, 1)
        job.gradients(lambda i, block, stats: frontiers.update(job.decompose(i, block, stats)), whole=rounds > 1)
        plan: Plan = {}
        for n in range(1, rounds + 1):
            if n > 1:
                frontiers = self.measure_again(job, plan)
            plan = self.allocate(job, frontiers, n / rounds)
        return self.settle(job, frontiers, plan)

    def plan_cache(self, job: Job) -> Plan:
        frontiers: dict[Unit, Frontier] = {}
        job.gradients(lambda i, block, stats: frontiers.update(job.decompose(i, block, stats)))
        return self.settle(job, frontiers, self.allocate(job, frontiers))

    def settle(self, job: Job, frontiers: dict[Unit, Frontier], plan: Plan) -> Plan:
        """The plan with what is measured instead of predicted: errors of scores where it changes any, whole plans' losses."""
        if job.cache.keeps and self.rounds <= 1:  # a smaller budget may change them
            with job.phase("statistics"):
                self.measure_scores(job, frontiers, {*SCORES})
        known: set[tuple[str, ...]] = set()
        while True:
            cut = {u.name for u, r in plan.items() if r < job.full(u)}
            changed = {kind for kind in SCORES if cut & {*kind}}
            changed |= {*SCORES} if changed and job.keep < LOW else set()  # plans of other kinds are compared then
            if changed <= known:
                break
            with job.phase("statistics"):
                frontiers |= self.measure_scores(job, frontiers, changed - known)
            known |= changed
            plan = self.allocate(job, frontiers)
        with job.phase("search"):
            return self.compare(job, frontiers, plan)

    def measure_scores(
        self, job: Job, frontiers: dict[Unit, Frontier], kinds: Set[tuple[str, ...]]
    ) -> dict[Unit, Frontier]:
        """What cuts of queries and keys are predicted to cost, corrected by the error that they make in the attention's output.

        What scores do to the loss is a first derivative: where the softmax is sharp it is nearly zero, however much what
        is cut decides. At a few ranks ½ tr(G E[e eᵀ]) is measured instead, with the true error e of o's output and the moment G
        of the gradient there; other ranks' predictions change by the factor between the two, log-linear in the rank.
        Low-rank queries and keys are cut together and have one factor, at least 1.
        """
        wanted: dict[tuple[Unit, ...], list[tuple[int, ...]]] = {}
        for kind in (k for k in SCORES if k in kinds):
            for block in range(len(job.shapes)):
                group = tuple(u for n in kind if (u := Unit(block, n)) in frontiers)
                ranks = [job.choices(u).ranks[:-1].tolist() for u in group]
                if group and all(ranks):
                    wanted[group] = sorted({tuple(r[round(s * (len(r) - 1))] for r in ranks) for s in SCORES[kind][0]})
        # after more rounds the gradients are those of the model under a plan, and nothing of them is known or kept
        names = {
            g: "scores|" + "|".join(f"{describe(job.units[u])}|{u}|{[r[n] for r in ranks]}" for n, u in enumerate(g))
            for g, ranks in wanted.items()
            if self.rounds <= 1
        }
        known = {g: job.cache.get(n)["factor"] for g, n in names.items() if job.cache.has([n])}
        for kind, (_, windows) in SCORES.items():
            rest = {g: r for g, r in wanted.items() if g not in known and g[0].name in kind}
            for group, pairs in job.cut_errors(rest, "o.out", windows).items() if rest else ():
                metric = job.stored[group[0].block].mean(Tap("grad:o.out", "gram"))
                measured = torch.stack([(metric * e).sum() / 2 for _, e in pairs])
                predicted = torch.tensor([loss for loss, _ in pairs], dtype=torch.float64)
                factor = (measured.clamp(min=TINY) / predicted.clamp(min=TINY)).log()
                known[group] = factor if len(kind) == 1 else factor.clamp(min=0)  # their errors meet in one product
            job.cache.keep({names[g]: {"factor": known[g]} for g in rest if g in names})
        found = {}
        for group, factor in known.items():
            for n, unit in enumerate(group):
                loss = torch.as_tensor(frontiers[unit].loss, dtype=torch.float64)
                at = torch.tensor([ranks[n] for ranks in wanted[group]])
                between = interpolate(torch.arange(len(loss)), at, factor)
                found[unit] = replace(frontiers[unit], loss=loss * between.exp())
        return found

    @property
    def sweeping(self) -> dict[str, str]:
        return {"refit_share": "0.0625"} if self.anchor else {}

    def start(self, job: Job) -> Weighing:
        steep = self.steep if self.steep is not None else 0.0 if job.keep >= LOW else 3.0
        timed = self.bypass is None and job.table is not None
        return Weighing(steep, bypass=1.0 if self.bypass or timed else NEVER)

    def compare(self, job: Job, frontiers: dict[Unit, Frontier], plan: Plan) -> Plan:
        """The plan with the least measured loss: this one, those with bypasses, those that a short search finds from there."""
        windows, length = sum(map(len, job.stream.batches)), job.stream.batches[0].shape[1]
        plain = sorted({*range(windows)} - {*list_shuffled(windows, self.shuffled)})
        among = plain if 2 * len(plain) >= windows else [*range(windows)]
        if job.notes["predicted_loss"] < SATURATES or len(among) < 4 * HELD or length < 2:
            return plan
        best, tried = self.start(job), dict[tuple[tuple[Unit, int], ...], float]()
        weights: dict[str, tuple[float, ...]] = {"bypass": BYPASSES if self.bypass is not False else ()}
        weights["linear"] = LINEARS if self.units == "any" and job.keep < LOW else ()
        others = [replace(best, **{name: w}) for name, tries in weights.items() for w in tries]
        make = cache(lambda weighing: self.allocate(job, frontiers, weighing=weighing))
        if self.search < 2 and all(make(w) == plan for w in others):
            return self.allocate(job, frontiers, weighing=best)
        trial, held = job.trial(among)

        def measure(weighing: Weighing) -> float:
            other = make(weighing)
            key = tuple(sorted(other.items()))
            if key not in tried:
                tried[key] = trial.held_loss(other, held)
            return tried[key]

        first = measure(best)
        for name, tries in weights.items():
            best = min([best, *(replace(best, **{name: w}) for w in tries)], key=measure)
        if best.linear == LINEARS[-1]:  # then perhaps none at all
            best = min([best, replace(best, linear=NEVER)], key=measure)
        least = measure(best)
        for name, steps in MOVES.items() if self.search > 1 else ():
            for step in steps:
                better = best
                while len(tried) < self.search and (loss := measure(best.moved(name, step))) < least:
                    least, best = loss, best.moved(name, step)
                if best != better:  # the other way leads back
                    break
        plan = self.allocate(job, frontiers, weighing=best)
        job.notes["search"] = {"plans": len(tried), "first": first, "best": least, "weighing": asdict(best)}
        return plan

    def allocate(
        self, job: Job, frontiers: dict[Unit, Frontier], part: float = 1.0, weighing: Weighing | None = None
    ) -> Plan:
        """The cheapest plan in weighed predicted nats within the job's budgets, after this part of the cut."""
        job.known = frontiers
        weighing = weighing or self.start(job)
        curves = {u: weighing.apply(job.curve(f), len(job.shapes)) for u, f in frontiers.items()}
        try:
            plan, _ = choose(self.groups(job, curves), [b.part(part) for b in job.budgets])
        except BudgetError as error:
            raise job.budgets[error.which].refuse("auto", error.smallest) from None
        loss = sum(float(frontiers[u].loss[r]) for u, r in plan.items())
        names = sorted({u.name for u in plan})
        cut = {n: sum(u.name == n and r < job.full(u) for u, r in plan.items()) for n in names}
        job.notes |= {"predicted_loss": loss, "units cut": {n: c for n, c in cut.items() if c}}
        return plan

    def measure_again(self, job: Job, plan: Plan) -> dict[Unit, Frontier]:
        """Frontiers of the uncompressed weights with gradients of the model under `plan`, wherever they still exist."""
        gone = {"qk": "qk", "keys": "k", "vo": "v", "mlp": ("gate", "up"), "attention": ATTENTION, "ffn": MLP}
        edits = job.solve_stored(plan)
        frontiers: dict[Unit, Frontier] = {}

        def taps(shape: Shape) -> list[Tap]:
            cut = [u.name for u, r in plan.items() if u.block == shape.block and r < job.full(u)]
            missing = {f"grad:{r}.{end}" for name in cut for r in gone.get(name, ()) for end in ("out", "back")}
            missing |= {"grad:attention.add"} if "attention" in cut else set()
            missing |= {"grad:mlp.add"} if "ffn" in cut else set()
            return [t for t in job.stored_taps(shape.block) if t.site.startswith("grad:") and t.site not in missing]

        def use(i: int, block: nn.Module, stats: Stats) -> None:
            known = job.stored[i]
            known.replace(stats)
            job.stored[i] = known
            frontiers.update(job.decompose(i, job.stream.block(i), known))

        job.gradients(use, taps, edits)
        return frontiers

    def groups(self, job: Job, curves: dict[Unit, Curve]) -> list[list[Alternative]]:
        """Per submodule the ways to treat it with the units at hand; what no unit holds costs what it costs."""
        groups = []
        for shape in job.shapes:
            for name, ways in WAYS.items():
                found = {}
                for way in ways:
                    present = tuple(n for n in way if Unit(shape.block, n) in curves)
                    if "keys" in way and "keys" not in present:
                        continue
                    held = {r for n in present for r in shape.held(n)}
                    rest = [r for r in shape.held(name) if r not in held]
                    chosen = tuple(curves[Unit(shape.block, n)] for n in present)
                    found[present] = Alternative(chosen, [sum(b.uncut(shape, r) for r in rest) for b in job.budgets])
                groups.append(list(found.values()))
            if shape.rest:  # no unit holds it
                groups.append([Alternative((), [sum(b.uncut(shape, r) for r in shape.rest) for b in job.budgets])])
        return groups


def interpolate(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (known, values), constant beyond the ends. `known` rises."""
    right = torch.searchsorted(known, at).clamp(1, max(len(known) - 1, 1))
    left = right - 1
    right = right.clamp(max=len(known) - 1)
    share = ((at - known[left]) / (known[right] - known[left]).clamp(min=1)).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])
