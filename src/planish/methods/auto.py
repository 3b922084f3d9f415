"""auto: every cut competes in predicted nats per token under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch

from planish.calibrate.losses import Probe, nll
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream
from planish.calibrate.text import list_shuffled
from planish.core import INSIDE, Plan, Solver, Unit
from planish.errors import InputError
from planish.methods.method import Method, find_step
from planish.modelling.families import ATTENTION, MLP
from planish.plan.allocate import Alternative, Curve
from planish.plan.experts import choose_with_experts, describe_top, list_inside
from planish.plan.foreseen import Foreseen, Work, expect_frontiers, survey_back
from planish.plan.frontiers import Frontiers, measure_gradients, stored_taps
from planish.plan.planned import Planned, count_refit
from planish.plan.problem import Problem
from planish.plan.rough import add_rounding, is_priced
from planish.plan.scores import SCORES, correct_scores, foresee_errors
from planish.plan.spread import BudgetError
from planish.solvers.experts import Experts
from planish.solvers.fisher_bypass import FisherBypass
from planish.solvers.fisher_experts import FisherExpertNeurons
from planish.solvers.fisher_structural import FisherNeurons, FisherPairs, FisherValues
from planish.solvers.key_latent import KeyLatent
from planish.solvers.noise import Noise
from planish.solvers.two_sided import TwoSided
from planish.walks.solve import run_solved

WAYS = {  # alternatives for a submodule: units that go together
    "attention": (
        *(("q", "k", "v", "o"), ("qk", "vo"), ("q", "k", "vo"), ("attention",)),
        *(("q", "keys", "v", "o"), ("q", "keys", "vo"), ("keys", "vo")),
    ),
    "ffn": (("gate", "up", "down"), ("mlp",), ("ffn",)),
}
LOW = 0.6  # keep below which the prediction saturates: plans of other kinds are compared, bypasses are tried
NEVER = 1e9  # weight with which a bypass is never taken
BYPASSES = (NEVER, 1.4, 1.2, 1.0, 0.85)  # weights of their predicted loss that are tried
LINEARS = (1.0, 2.0, 4.0)  # the same for low-rank linears
INSIDES = (NEVER, 2.0)  # and for neurons of experts, beside 1
SATURATES = 0.01  # predicted nats per token above which plans are compared by measured loss
PRICED = {"any": 0.25, "linear": 0.25, "structural": 1.0}  # share of the noise beside moments that prices hold
HELD = 8  # windows at least on which they are


@dataclass(frozen=True)
class Weighing:
    """What predicted losses are multiplied by when ranks are chosen: l becomes w · l · (1 + steep · w · l), w = `linear` for
    low-rank linears, `inside` for cuts inside experts, `bypass` for whole submodules. Predictions miss by kind; measured losses
    of whole plans tell by how much. `moments`: l is what second moments say, not what tokens do.
    """

    steep: float = 0.0
    linear: float = 1.0
    inside: float = 1.0
    bypass: float = NEVER
    moments: bool = False

    def price(self, frontiers: Frontiers) -> Frontiers:
        """With the losses that the plan goes by in the place of those by moments."""
        return frontiers if self.moments else {u: replace(f, loss=f.price) for u, f in frontiers.items()}

    def apply(self, curve: Curve) -> Curve:
        name, weight = curve.unit.name, 1.0
        weight *= self.linear if name in ATTENTION + MLP or "." in name else 1.0
        weight *= self.inside if name in INSIDE else 1.0
        weight *= self.bypass if name in ("attention", "ffn") else 1.0
        loss = weight * curve.loss
        return replace(curve, loss=loss * (1 + self.steep * loss))


@dataclass(frozen=True)
class Auto(Method):
    """All cuts compete in predicted nats per token: low-rank linears, value dimensions, rotary pairs, neurons, experts, bypasses.

    Problem: for every unit of every block, how much does the loss of the language model rise at each rank it could have?
    Which ranks have the least sum within the budget?

    Equation: Δ ≈ ½ tr(G E[e eᵀ]) nats per token: e the error that a cut makes in an output, G = E[g gᵀ], g the gradient of
    the summed NLL there, for labels as the model predicts them. One pass forward and back measures input moments and gradient
    moments; every unit's frontier is then in one currency (`planish.solvers.two_sided.TwoSided`,
    `planish.solvers.fisher_structural.FisherValues`), and each submodule takes the alternative that is best at the
    budget's price (`planish.plan.allocate.choose`).

    `units`: "any"; "structural" = dense shapes only; "linear" = low-rank linears only. Under a budget of the KV cache keys may
    also become latents, unless it is "structural". `anchor`: share of the uncompressed model's activations in the target of
    each solve (0: solve on the uncompressed model's statistics alone, which a sweep can re-use). `ridge`: of the refits,
    relative. `noise`: how much of the identity is added to the moments of inputs and gradients, times an amount that falls with
    the number of tokens (`planish.solvers.noise.Noise`), so that predictions hold on other text and cuts are not tuned to this
    one. `bypass`: whether fitted affine maps in place of whole submodules compete too; by default, where all units may be cut,
    below keep 0.6 and under a budget of latency. `steep`: ranks are chosen by loss · (1 +
    steep · loss) of every unit: the second-order prediction saturates, so a cut that looks like 0.3 nats costs more than thirty
    of 0.01; what is reported stays the prediction itself.
    `refit_share`: with an anchor, share of the calibration windows, evenly spaced, that each plan's solve runs again: less makes
    a further point of a sweep cheaper and the result a little worse; their moments are then blended with the uncompressed
    model's. `planish sweep` takes a sixteenth unless told otherwise. `shuffled`: share of the calibration windows whose tokens,
    but the first, are put in another order. Statistics of such windows hold more than the calibration text's own directions, and
    text of another kind loses less. `probe`: what gradients are of: random "signs" of all words or "sampled" labels, which are
    the same in the mean, the "text"'s own next tokens, or the "curvature" of the KL at each token's five likeliest words
    (`planish.calibrate.losses.output_gradient`).

    On a CPU that multiplies in bf16 (AVX-512 BF16, AMX) calibration forms the products of large blocks in it, and sums runs of
    1024 tokens in fp32, unless a dtype is asked for: `--dtype float32` for neither.

    Where linears are rounded to fewer than 8 bits afterwards, what that costs is forecast and counts beside the cut
    (`planish.plan.rough.forecast`): pivoted linears round worse than dense ones.

    What second moments say of a cut is corrected by what it costs a few windows, which these do not hold, token by token
    (`planish.plan.token_prices.price_by_tokens`): in real models large gradients meet large inputs, in some blocks more than
    in others, and cuts are tuned to the text that they were chosen by. A unit's own factor counts half, the median of all in full.

    Where more than 0.01 nats per token are predicted, the plan without bypasses and those with several weights of their
    predicted loss are solved without every fourth of the windows that are not shuffled and compared by the loss on these;
    below keep 0.6 also the one by moments alone and, where all units may be cut, those with the loss of low-rank linears counted
    two and four times. Where neurons inside experts may go, so are a plan that cuts none of them (taken unmeasured where less than
    0.01 nats are predicted for it) and one that counts their loss twice.
    """

    title: ClassVar[str] = "all cuts compete in predicted nats per token under one budget"
    reference: ClassVar[str] = "planish"
    shares: ClassVar[tuple[str, ...]] = ("anchor", "refit_share", "shuffled")
    dampings: ClassVar[tuple[str, ...]] = ("ridge",)
    coarse: ClassVar[bool] = True

    units: Literal["any", "structural", "linear"] = "any"
    anchor: float = 0.25
    ridge: float = 1e-3
    noise: float = 1.0
    bypass: bool | None = None
    steep: float = 3.0
    refit_share: float = 1.0
    shuffled: float = 0.25
    probe: Probe = "signs"  # type: ignore[misc]

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return "both" if self.anchor else "dense"

    def solvers(self) -> list[Solver]:
        noise = Noise(self.noise, PRICED[self.units])
        structural: list[Solver] = [
            FisherValues(self.anchor, self.ridge, noise),
            FisherNeurons(self.anchor, self.ridge, noise),
        ]
        structural += [FisherPairs(), Experts("nats"), FisherExpertNeurons()]
        if self.bypass or (self.bypass is None and self.units == "any"):
            structural += [FisherBypass(self.ridge, self.anchor)]
        pivoted = TwoSided(anchor=self.anchor, ridge=self.ridge, noise=noise, by_tokens=True)
        linear: list[Solver] = [pivoted, KeyLatent(nats=True)]
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
        order = (
            ("q", "k", "qk", "keys", "v", "attention"),
            ("o", "vo"),
            ("gate", "up", "ffn"),
            ("down", "mlp", "experts", *INSIDE),
        )
        steps = {u: find_step(u.name) if "." in u.name else -1 for u in units}
        staged = ([u for u in units if u.name in names or steps[u] == n] for n, names in enumerate(order))
        return [stage for stage in staged if stage]

    def __post_init__(self) -> None:
        if not 0 < self.refit_share <= 1:
            raise InputError(
                f"refit_share of auto must lie in (0, 1], got {self.refit_share:g} (a share of the windows)"
            )

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        frontiers = self.measure(problem, measure)
        return self.settle(problem, measure, frontiers, self.allocate(problem, frontiers))

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        return self.plan(problem, measure)

    def foresee(self, problem: Problem, windows: int) -> Foreseen:
        refit = bool(self.anchor) and count_refit(windows, self.refit_share) < windows
        picked = self.allocate(problem, expect_frontiers(problem))
        planned = self.decide(problem, picked.ranks)
        work = [survey_back(problem, refit)]
        for kind in (k for k in SCORES if {*k} <= {u.name for u in problem.units}):
            work.append(foresee_errors(problem, kind, windows))
        plain = windows - len(list_shuffled(windows, self.shuffled))
        tried = (len(BYPASSES) + len(LINEARS) - 1) * (problem.keep < LOW and self.units == "any")  # further ones
        tried += 1 + len(INSIDES) * any(u.name in INSIDE for u in problem.units)
        if min(plain, windows) >= 4 * HELD and tried > 1:
            work += [Work("search", windows - plain // 4, solve=planned, heads=1 / 3)] * tried
        return Foreseen(planned, work)

    def measure(self, problem: Problem, measure: Measurements) -> Frontiers:
        """Every unit's frontier in nats, by one pass forward and back; what the solve uses again is stored."""
        windows = sum(map(len, measure.stream.batches))
        refit = bool(self.anchor) and count_refit(windows, self.refit_share) < windows
        return measure_gradients(problem, measure, self.probe, partial(stored_taps, problem, refit=refit))

    def settle(self, problem: Problem, measure: Measurements, frontiers: Frontiers, picked: Pick) -> Planned:
        """The plan with what is measured instead of predicted: errors of scores where it changes any, whole plans' losses."""
        if measure.cache.keeps:  # a smaller budget may change them
            with measure.phase("statistics"):
                correct_scores(problem, measure, frontiers, {*SCORES})
        known: set[tuple[str, ...]] = set()
        while True:
            cut = {u.name for u, r in picked.ranks.items() if r < problem.full(u)}
            changed = {kind for kind in SCORES if cut & {*kind}}
            changed |= {*SCORES} if changed and problem.keep < LOW else set()  # plans of other kinds are compared then
            if changed <= known:
                break
            with measure.phase("statistics"):
                frontiers = frontiers | correct_scores(problem, measure, frontiers, changed - known)
            known |= changed
            picked = self.allocate(problem, frontiers)
        with measure.phase("search"):
            picked, search = self.compare(problem, measure, frontiers, picked)
        notes = {"predicted_loss": picked.loss, "units cut": picked.cut} | ({"search": search} if search else {})
        priced, remarks = Weighing().price(frontiers), describe_top(problem, picked.ranks)
        return self.decide(problem, picked.ranks, frontiers=priced, notes=notes, remarks=remarks)

    @property
    def sweeping(self) -> dict[str, str]:
        return {"refit_share": "0.0625"} if self.anchor else {}

    def _start(self, problem: Problem) -> Weighing:
        """The weights that are tried first."""
        timed = self.bypass is None and problem.table is not None
        return Weighing(self.steep, bypass=1.0 if self.bypass or timed else NEVER)

    def compare(
        self, problem: Problem, measure: Measurements, frontiers: Frontiers, picked: Pick
    ) -> tuple[Pick, dict[str, Any]]:
        """The plan with the least measured loss of this one and those that weigh kinds of cuts otherwise; and what was found."""
        windows, length = sum(map(len, measure.stream.batches)), measure.stream.batches[0].shape[1]
        plain = sorted({*range(windows)} - {*list_shuffled(windows, self.shuffled)})
        among = plain if 2 * len(plain) >= windows else [*range(windows)]
        best = self._start(problem)
        make = cache(lambda weighing: self.allocate(problem, frontiers, weighing=weighing))
        narrow = any(n in INSIDE for n in picked.cut)
        if narrow and (whole := make(replace(best, inside=NEVER))).loss < SATURATES:
            return whole, {}
        if (picked.loss < SATURATES and not narrow) or len(among) < 4 * HELD or length < 2:
            return picked, {}
        tries: dict[str, tuple[Any, ...]] = {"inside": INSIDES if narrow else ()}
        if picked.loss >= SATURATES:
            tries["bypass"] = BYPASSES if self.bypass is not False else ()
            tries["moments"] = (False, True) if problem.keep < LOW else ()
            tries["linear"] = LINEARS if self.units == "any" and problem.keep < LOW else ()
        others = [replace(best, **{name: w}) for name, weights in tries.items() for w in weights]
        if all(make(w).ranks == picked.ranks for w in others):
            return make(best), {}
        few, held = hold_out(measure, among)
        tried: dict[tuple[tuple[Unit, int], ...], float] = {}

        def loss(weighing: Weighing) -> float:
            ranks = make(weighing).ranks
            key = tuple(sorted(ranks.items()))
            if key not in tried:
                tried[key] = nll(held, run_solved(problem, few, self.decide(problem, ranks), held))
            return tried[key]

        first = loss(best)
        for name, weights in tries.items():
            best = min([best, *(replace(best, **{name: w}) for w in weights)], key=loss)
        if best.linear == LINEARS[-1]:  # then perhaps none at all
            best = min([best, replace(best, linear=NEVER)], key=loss)
        return make(best), {"plans": len(tried), "first": first, "best": loss(best), "weighing": asdict(best)}

    def allocate(self, problem: Problem, frontiers: Frontiers, weighing: Weighing | None = None) -> Pick:
        """The cheapest plan in weighed predicted nats within the budgets."""
        weighing = weighing or self._start(problem)
        curves = {u: weighing.apply(problem.curve(f)) for u, f in weighing.price(frontiers).items()}
        curves = add_rounding(problem, curves, frontiers)
        try:
            inside = partial(list_inside, problem, frontiers, curves)
            limits = [b.limit for b in problem.budgets]
            ranks, _ = choose_with_experts(list_ways(problem, curves), curves, limits, inside)
        except BudgetError as error:
            raise problem.budgets[error.which].refuse("auto", error.smallest) from None
        loss = sum(float(frontiers[u].price[r]) for u, r in ranks.items())
        names = sorted({u.name for u in ranks})
        cut = {n: sum(u.name == n and r < problem.full(u) for u, r in ranks.items()) for n in names}
        return Pick(ranks, loss, {n: c for n, c in cut.items() if c}, weighing)


@dataclass(frozen=True)
class Pick:
    """Ranks, their predicted loss in nats per token, how many units of each name they cut, and how they were weighed."""

    ranks: Plan
    loss: float
    cut: dict[str, int]
    weighing: Weighing


def hold_out(measure: Measurements, among: Sequence[int]) -> tuple[Measurements, Stream]:
    """(Everything without every fourth of these calibration windows, that fourth): for the loss of plans on text that they
    are not solved on."""
    windows = torch.cat(measure.stream.batches)
    held = torch.zeros(len(windows), dtype=torch.bool)
    held[list(among)[3::4]] = True
    return measure.part(windows[~held]), measure.stream.part(windows[held])


def list_ways(problem: Problem, curves: dict[Unit, Curve]) -> list[list[Alternative]]:
    """Per submodule the ways to treat it with the units at hand; what no unit holds costs what it costs, and where rounding is
    priced, which it then is not, nothing is left to none that another way holds."""
    groups = []
    for shape in problem.shapes:
        for name, ways in WAYS.items():
            found = {}
            units = ([n for n in way if Unit(shape.block, n) in curves] for way in ways)
            most = max(len({r for n in own for r in shape.held(n)}) for own in units)
            for way in ways:
                present = tuple(n for n in way if Unit(shape.block, n) in curves)
                if "keys" in way and "keys" not in present:
                    continue
                held = {r for n in present for r in shape.held(n)}
                rest = [r for r in shape.held(name) if r not in held]
                if is_priced(problem.rounds) and len(held) < most:
                    continue
                chosen = tuple(curves[Unit(shape.block, n)] for n in present)
                found[present] = Alternative(chosen, [sum(b.uncut(shape, r) for r in rest) for b in problem.budgets])
            groups.append(list(found.values()))
        alone = [u for r in shape.further if (u := Unit(shape.block, r)) in curves]
        groups += [[Alternative((curves[u],), [0.0] * len(problem.budgets))] for u in alone]
        mixture = (n for n in ("experts", *INSIDE) if Unit(shape.block, n) in curves)
        own = {*(r for n in mixture for r in shape.held(n)), *(u.name for u in alone)}
        if rest := [r for r in shape.rest if r not in own]:  # no unit holds it
            groups.append([Alternative((), [sum(b.uncut(shape, r) for r in rest) for b in problem.budgets])])
    return groups
