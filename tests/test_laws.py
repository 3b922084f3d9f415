"""Laws that every solver and every method obeys, on tiny random models of every family.

Solvers and methods are found, not listed: a new file in `planish.methods` is held to all of this. A solver may set
`exempt` (law → reason) for what its source does not promise; a method may refuse a family with a clear InputError.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from math import isnan
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.apply import apply_edits, count_block, merge_forms, merge_specs
from planish.calibrate.collect import Run, measure_block
from planish.calibrate.losses import compute_logits
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream, read_weights
from planish.calibrate.taps import tap_sites
from planish.core import Edit, Frontier, Shape, Solver, Unit
from planish.errors import InputError
from planish.folder.source import MemorySource, open_source
from planish.methods import find_method, list_methods
from planish.methods.erc_svd import compare
from planish.modelling.blocks import find_blocks, get_linear, has_linear
from planish.plan.footprint import Footprint, count_weights, footprint, footprints
from planish.plan.frontiers import measure_frontiers
from planish.solvers.linear import LinearSVD
from planish.solvers.neurons import Neurons
from planish.stats import Stats, Tap
from planish.walks import solve as planish_solve
from planish.walks.solve import run_solved
from posed import Posed, pose_on
from tiny import compress, load

METHODS = list(list_methods())
KINDS = ["flat-llm", "a3", "svd-llm", "mpifa", "slicegpt", "shortgpt", "palu", "subfit", "auto"]  # of every kind
QUICK = (
    "linear-svd(svd-llm)",
    "neurons(flat-llm)",
    "value-pca(flat-llm)",
    "rotary-pairs(a3)",
    "svd-llm",
)  # on every family
WINDOWS = tiny.windows(12, 24)

# Where a source promises less than a law asks.
EXEMPT: dict[str, dict[str, str]] = {
    "two-stage-svd": {"monotone": "the residual is truncated in another metric than the first stage"},
}


def exempt(solver: Solver, law: str) -> bool:
    slicing = isinstance(solver, Neurons) and not solver.refit and law == "monotone"
    return slicing or law in EXEMPT.get(solver.name, {}) or law in getattr(solver, "exempt", {})


class Bench:
    """One model in fp64 with the inputs of its blocks: what solvers see of it."""

    def __init__(self, name: str):
        self.stream = Stream(MemorySource(tiny.build(name, torch.float64)), WINDOWS, dtype=torch.float64)
        self.stream.batches = list(WINDOWS.split(5))
        self.family = self.stream.family
        self.inputs = [self.stream.start()]
        self.blocks = []
        for i in range(len(self.stream)):
            self.blocks.append(self.stream.block(i))
            self.inputs.append(self.stream.run(i, self.blocks[i], self.inputs[i]))

    def decompose(self, solver: Solver, unit: Unit) -> tuple[Frontier, Shape]:
        i = unit.block
        shape = self.stream.source.shape(i)
        taps = solver.taps(unit, shape)
        forward = [t for t in taps if not any(s.startswith("grad:") for s in t.sites)]
        stats, _ = measure_block(
            self.stream, i, self.blocks[i], forward, self.inputs[i], Run(self.blocks[i], self.inputs[i])
        )
        if len(forward) < len(taps):
            stats.merge(self.gradients(tuple(t for t in taps if t not in forward), i))
        weights = read_weights(self.blocks[i], self.stream)
        return solver.decompose(unit, weights, stats, shape), shape

    @functools.cache  # noqa: B019
    def gradients(self, taps: tuple[Tap, ...], i: int) -> Stats:
        return next(s for j, _, s in sweep_back(self.stream, lambda at: list(taps) if at.block == i else []) if j == i)

    def edited(self, edits: list[Edit], shape: Shape) -> nn.Module:
        block = copy.deepcopy(self.blocks[shape.block])
        apply_edits(block, edits, self.family, self.stream.source.config, shape)
        return block

    @torch.no_grad()
    def see(self, i: int, block: nn.Module, *sites: str) -> dict[str, Tensor]:
        """Tensors at these sites of a block on its calibration inputs: (tokens, channels)."""
        found: dict[str, list[Tensor]] = {s: [] for s in sites}
        for n, h in enumerate(self.inputs[i]):
            with tap_sites(block, self.family, set(sites)) as seen:
                self.stream.forward(i, block, h, n)
            for s in sites:
                found[s].append(seen[s].flatten(0, -2))
        return {s: torch.cat(t) for s, t in found.items()}


@functools.cache
def bench(name: str) -> Bench:
    return Bench(name)


def mean_square(x: Tensor) -> float:
    return float(x.square().sum(-1).mean())


def measured(b: Bench, unit: Unit, shape: Shape, edits: list[Edit], nats: bool = False) -> dict[str, float]:
    """Squared error per token that these edits alone really cause, in the ways a unit's loss may be defined."""
    i, dense, block = unit.block, b.blocks[unit.block], b.edited(edits, shape)
    if unit.name in shape.linears:
        site = f"{unit.name}.in"
        x = b.see(i, dense, site)[site]
        old, new = (get_linear(m, b.family, unit.name) for m in (dense, block))
        with torch.no_grad():
            error = old(x) - new(x)
        if not nats:
            return {"linear": mean_square(error)}
        g = b.gradients((Tap(f"grad:{unit.name}.out", "gram"),), i).mean(Tap(f"grad:{unit.name}.out", "gram"))
        return {"nats": float(((error @ g) * error).sum(-1).mean() / 2)}
    if unit.name == "vo":
        old, new = (b.see(i, m, "v.out", "o.in", "o.out") for m in (dense, block))
        found = {
            "values": mean_square(old["v.out"]) - mean_square(new["v.out"]),  # of an orthogonal projection
            "output": mean_square(old["o.out"] - new["o.out"]),
        }
        return found | {"heads": sum(head_errors(b, shape, dense, block, old["o.in"], new["o.in"]))}
    if unit.name == "mlp":
        old, new = (b.see(i, m, "down.out") for m in (dense, block))
        return {"down": mean_square(old["down.out"] - new["down.out"])}
    if unit.name == "qk":
        return score_errors(b, shape, dense, block)
    if unit.name == "keys":
        return shared_key_errors(b, shape, dense, block)
    if unit.name in ("attention", "ffn"):
        sites = ("block.out", "attention.add" if unit.name == "attention" else "mlp.add")
        old, new = (b.see(i, m, *sites) for m in (dense, block))
        return {s: mean_square(old[s] - new[s]) for s in sites}
    return {}


def head_errors(b: Bench, shape: Shape, dense: nn.Module, block: nn.Module, x: Tensor, y: Tensor) -> Iterator[float]:
    """Per query head: error of its own contribution to the output."""
    old, new = (get_linear(m, b.family, "o").weight.unflatten(1, (shape.heads, -1)) for m in (dense, block))
    x, y = (t.unflatten(-1, (shape.heads, -1)) for t in (x, y))
    for h in range(shape.heads):
        yield mean_square(x[:, h] @ old[:, h].T - y[:, h] @ new[:, h].T)


def score_errors(b: Bench, shape: Shape, dense: nn.Module, block: nn.Module) -> dict[str, float]:
    """Error of the scores over all pairs of tokens, summed over query heads; rotated pairs that are dropped, averaged
    over all relative rotations. Kept pairs must hold what they held."""
    heads = []
    for m in (dense, block):
        seen = b.see(shape.block, m, "q.out", "k.out")
        q, k = seen["q.out"].unflatten(-1, (shape.heads, -1)), seen["k.out"].unflatten(-1, (shape.kv_heads, -1))
        heads.append((q.transpose(0, 1), k.repeat_interleave(shape.groups, 1).transpose(0, 1)))  # (heads, tokens, d)
    half, pairs = shape.rotary // 2, getattr(block.get_submodule(b.family.attention), "pairs", None)
    total = 0.0
    for h in range(shape.heads):
        (q, k), (q2, k2) = ((q[h], k[h]) for q, k in heads)
        kept = torch.arange(half) if pairs is None else pairs[h // shape.groups].long()
        both = torch.cat([kept, kept + half])
        assert torch.allclose(q[:, both], q2[:, : len(both)]) and torch.allclose(k[:, both], k2[:, : len(both)])
        dropped = torch.ones(half, dtype=torch.bool)
        dropped[kept] = False
        energy = [x[:, : 2 * half].unflatten(1, (2, half)).square().sum(1).mean(0)[dropped] for x in (q, k)]
        rest = q[:, 2 * half :] @ k[:, 2 * half :].T - q2[:, len(both) :] @ k2[:, len(both) :].T
        total += float((energy[0] * energy[1]).sum() / 2 + rest.square().mean())
    return {"scores": total}


def shared_key_errors(b: Bench, shape: Shape, dense: nn.Module, block: nn.Module) -> dict[str, float]:
    """Score error of keys shared within each frequency, over all query heads, averaged over all relative rotations."""
    old = b.see(shape.block, dense, "q.out", "k.out")
    attention = block.get_submodule(b.family.attention)
    rebuilt = attention.rebuild(b.see(shape.block, block, "k.out")["k.out"].T).T
    half, total = shape.qk // 2, 0.0
    for h in range(shape.heads):
        j = h // shape.groups
        q = old["q.out"][:, h * shape.qk : (h + 1) * shape.qk]
        error = (old["k.out"] - rebuilt)[:, j * shape.qk : (j + 1) * shape.qk]
        size, lost = (x.unflatten(1, (2, half)).square().sum(1).mean(0) for x in (q, error))
        total += float((size * lost).sum() / 2)
    return {"scores": total}


def find_solvers() -> dict[str, Solver]:
    """Every solver of every method, without noise beside moments (`tests/test_noise.py`), and the settings that no method uses by
    default."""
    found: dict[str, Solver] = {}
    for name in METHODS:
        for solver in find_method(name, {"noise": 0.0} if name == "auto" else {}).solvers():
            found.setdefault(f"{solver.name}({name})", solver)
    unique = {repr(s): n for n, s in reversed(found.items())}
    found = {n: s for n, s in found.items() if unique[repr(s)] == n}
    return found | {
        "pivoted": LinearSVD(form="pivoted"),
        "updated": LinearSVD(update=True),
        "same-metric": find_method("erc-svd", {"residual_metric": "whitened"}).solvers()[0],
        "energy": Neurons("energy", refit=False),
        "energy-refit": Neurons("energy", refit=True),
        "head-pca": find_method("flat-llm", {"qk": "pca"}).solvers()[-1],
        "key-frequency": find_method("palu", {"keys": "frequency"}).solvers()[0],
    }


SOLVERS = find_solvers()


def some(ranks, n: int = 4) -> list[int]:
    """A few of the admissible ranks below the full one, the extremes among them."""
    cut = list(ranks)[:-1]
    return sorted({cut[round(i * (len(cut) - 1) / max(n - 1, 1))] for i in range(n)}) if cut else []


@functools.cache
def cases(family: str, solver: Solver) -> list[tuple[Unit, Frontier, Shape]]:
    """Every unit of the last block of each kind, decomposed; of experts those of `tests/test_experts.py` are enough."""
    b = bench(family)
    last = {s.linears: s for s in map(b.stream.source.shape, range(len(b.blocks)))}
    try:
        units = [u for s in last.values() for u in solver.units(s) if u.name not in ("experts", "neurons")]
    except InputError as refusal:
        assert family in tiny.HYBRIDS + tiny.STOCK
        pytest.skip(str(refusal))
    return [(unit, *b.decompose(solver, unit)) for unit in units]


def covering(names: list[str], always: tuple[str, ...], width: int, more: set[tuple[str, str]] | None = None) -> list:
    """Every entry with the families of `always` and `width` rotating ones, and `more`: those of `QUICK` with all of `tiny.MORE`
    and `tiny.HYBRIDS`, where nothing else is said; the full product is slow."""
    every = {(n, f) for n in QUICK for f in tiny.MORE + tiny.HYBRIDS if f not in tiny.RARE}
    at, chosen = 0, set(every if more is None else more)
    for name in names:
        chosen |= {(name, f) for f in always}
        for _ in range(width):
            chosen.add((name, tiny.NAMES[at % len(tiny.NAMES)]))
            at += 5  # coprime to the number of families
    return [
        pytest.param(n, f, marks=() if (n, f) in chosen else pytest.mark.slow, id=f"{n}-{f}")
        for n in names
        for f in tiny.NAMES + tiny.MORE + tiny.HYBRIDS + tiny.STOCK
    ]


SOLVER_CASES = covering(list(SOLVERS), ("llama_gqa", "opt"), 1)


@pytest.mark.parametrize(("solver", "family"), SOLVER_CASES)
def test_predicted_loss_is_the_measured_error(solver, family):
    """The law that catches wrong whitening, wrong heads and wrong biases."""
    solver, b = SOLVERS[solver], bench(family)
    if exempt(solver, "exact"):
        pytest.skip(solver.exempt["exact"])
    for unit, frontier, shape in cases(family, solver):
        if frontier.nats and unit.name not in shape.linears:
            continue
        ranks = solver.ranks(unit, shape)
        assert len(frontier.loss) == ranks[-1] + 1
        assert float(frontier.loss[ranks[-1]]) == pytest.approx(0, abs=1e-12)
        fits: set[str] | None = None
        for rank in some(ranks):
            predicted = float(frontier.loss[rank])
            if isnan(predicted):
                continue  # nothing is predicted
            errors = measured(b, unit, shape, solver.truncate(frontier, rank, shape), frontier.nats)
            scale = max(float(frontier.loss[ranks[0]]), predicted)
            near = {n for n, e in errors.items() if abs(e - predicted) <= 1e-6 * predicted + 1e-9 * scale}
            fits = near if fits is None else fits & near
            assert fits, f"{unit} at rank {rank}: predicted {predicted}, measured {errors}"


@pytest.mark.parametrize(("solver", "family"), SOLVER_CASES)
def test_more_rank_is_not_more_loss_and_costs_more(solver, family):
    solver = SOLVERS[solver]
    for unit, frontier, shape in cases(family, solver):
        ranks = list(solver.ranks(unit, shape))
        costs = [count_weights(solver, unit, shape, r) for r in ranks]
        assert ranks == sorted(set(ranks)) and costs == sorted(set(costs))
        assert solver.truncate(frontier, ranks[-1], shape) == []
        losses = torch.tensor([float(frontier.loss[r]) for r in ranks], dtype=torch.float64)
        if losses.isnan().any():
            continue  # nothing is predicted
        assert torch.isfinite(losses).all()
        if not exempt(solver, "monotone"):
            assert (losses.diff() <= 1e-9 * losses.max()).all(), f"{unit}: {losses}"
            assert (losses >= -1e-9 * losses.max()).all()


@pytest.mark.parametrize(("solver", "family"), SOLVER_CASES)
def test_the_footprint_is_what_the_edits_hold(solver, family):
    """Weights, bytes and cache of a unit's spec at a rank, and all the rest of the block, are counted in the modules that
    `truncate` makes; the spec is the one that they are made from."""
    solver, b = SOLVERS[solver], bench(family)
    for unit, frontier, shape in cases(family, solver):
        ranks = solver.ranks(unit, shape)
        dense = footprint({}, shape, itemsize=8)
        for rank in some(ranks, 3):
            edits = solver.truncate(frontier, rank, shape)
            block = b.edited(edits, shape)
            own, full = (find(solver, unit, shape, r) for r in (rank, ranks[-1]))
            changed = {n: getattr(own, n) - getattr(full, n) + getattr(dense, n) for n in ("weights", "bytes", "cache")}
            assert changed["weights"] == count_block(block), f"{unit} at rank {rank}"
            assert changed["cache"] == count_cached(b, block), f"{unit} at rank {rank}"
            tables = sum(
                t.numel() for t in block.buffers() if t.dtype in (torch.int32, torch.int64)
            )  # written as int32
            made, planned = merge_forms(shape, edits), merge_specs(shape, [solver.spec(unit, shape, rank)])
            if made == planned:
                assert changed["bytes"] == 8 * count_block(block) + 4 * tables
            else:  # how many rotary pairs are kept beside channels that are not rotated, statistics decide
                assert 0 < shape.rotary < shape.qk
                assert made | {"attention": made["attention"] | {"pairs": planned["attention"]["pairs"]}} == planned
                assert changed["bytes"] >= 8 * count_block(block) + 4 * tables
            assert all(torch.isfinite(p).all() for p in block.parameters())


def find(solver: Solver, unit: Unit, shape: Shape, rank: int) -> Footprint:
    ((_, found),) = footprints(solver, unit, shape, rank, itemsize=8)
    return found


def count_cached(b: Bench, block: nn.Module) -> int:
    """Numbers that a block caches per token: what its k and v put out."""
    if not has_linear(block, b.family, "k"):
        return 0
    values = "v" if has_linear(block, b.family, "v") else "k"  # which may be values too
    return sum(get_linear(block, b.family, role).out_features for role in ("k", values))


OPTIMAL = {
    "whitened": LinearSVD("whitened"),
    "pivoted": LinearSVD("whitened", form="pivoted"),
    "refitted": Neurons("leverage", damping=0.0),
    "head-pca": SOLVERS["head-pca"],
    "key-frequency": SOLVERS["key-frequency"],
}


@pytest.mark.parametrize("family", ["llama_gqa", "llama_bias", "gpt_neox", "opt"])
@pytest.mark.parametrize("solver", OPTIMAL)
def test_no_perturbation_of_the_solution_does_better(solver, family):
    solver, b = OPTIMAL[solver], bench(family)
    generator = torch.Generator().manual_seed(3)
    free = {"A.weight", "B.weight", "P.weight", "C.weight", "weight", "U"}
    for unit, frontier, shape in cases(family, solver):
        rank = some(solver.ranks(unit, shape), 3)[1]
        if solver.name == "head-pca" and f"{unit.name}.bias" in frontier.factors:
            continue  # best among projections of q itself, not among affine maps
        edits = solver.truncate(frontier, rank, shape)
        (best,) = measured(b, unit, shape, edits).values()
        for size in (1e-1, 1e-3, 1e-5):
            tried = []
            for edit in edits:
                chosen = free if unit.name != "mlp" or edit.target == "down" else set()
                noise = {
                    n: t + size * t.abs().mean() * torch.randn(t.shape, generator=generator, dtype=torch.float64)
                    for n, t in edit.tensors.items()
                    if n in chosen
                }
                tried.append(Edit(edit.target, edit.form, edit.tensors | noise))
            (worse,) = measured(b, unit, shape, tried).values()
            assert worse >= best * (1 - 1e-9), f"{unit}: {worse} < {best} after a perturbation of {size}"


# ---------------------------------------------------------------- methods, end to end


def check_line(refusal: InputError) -> None:
    """A refusal is one clear line."""
    assert "\n" not in str(refusal) and len(str(refusal)) > 20


def run(model, output: Path, method: str, keep: float, round_to: int = 1, **kw):
    """compress; None where the method refuses the family in one clear line."""
    try:
        return compress(model, output=output, keep=keep, method=method, windows=WINDOWS, round_to=round_to, **kw)
    except InputError as refusal:
        check_line(refusal)
        return None


def fingerprint(model: nn.Module) -> tuple:
    """Everything about a model that compress must leave alone."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = [
        n for n, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._forward_hooks_with_kwargs
    ]  # fmt: skip
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    flags = {n: (p.requires_grad, p.dtype, p.grad is None) for n, p in model.named_parameters()}
    return digest.hexdigest(), hooks, attributes, kinds, flags, model.config.to_json_string(), model.training


def shards(folder: Path) -> dict[str, bytes]:
    """Weights and configuration of a folder, byte for byte; the manifest carries times and is left out."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in ("planish.json", "README.md")}


# beside one family each, llama for what takes whole blocks, which others are too small for, and for the default
METHOD_CASES = covering(METHODS, (), 1, more={(m, "llama_gqa") for m in ("auto", "llm-streamline", "sleb")})


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), METHOD_CASES)
def test_compress(method, family, tmp_path):
    """Budget met as counted, deterministic, input untouched, folder = memory, saved = solved, bit for bit."""
    model = tiny.build(family)
    before = fingerprint(model)
    result = run(model, tmp_path / "a", method, 0.72)
    assert fingerprint(model) == before
    if result is None:
        assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()
        pytest.skip(f"{method} refuses {family}")

    # counted parameters = plan, within one step below the budget
    source = MemorySource(model)
    manifest = json.loads((tmp_path / "a" / "planish.json").read_text())
    stream = Stream(source, WINDOWS)
    job = pose_on(stream, find_method(method), 0.72)
    plan = {Unit.parse(u): r for u, r in manifest["plan"].items()}
    planned = int(0.72 * job.problem.main.total + 1e-6) - job.left(plan)
    compressed = load(tmp_path / "a")
    blocks = find_blocks(compressed, stream.family)
    assert result.block_params_after == sum(count_block(x) for x in blocks) == planned <= 0.72 * job.problem.main.total
    assert result.block_params_before == job.problem.main.total
    outside = sum(p.numel() for p in compressed.parameters())
    assert result.params_after == outside
    assert result.params_before == sum(p.numel() for p in model.parameters())
    assert all(0 <= e < float("inf") for e in manifest["errors"].values())

    # the same again from a folder, from shards: the same bytes
    folder = tiny.save(model, tmp_path / "model", sharded=True)
    again = run(folder, tmp_path / "b", method, 0.72)
    first, second = shards(tmp_path / "a"), shards(tmp_path / "b")
    same = ("generation_config.json", "config.json")
    assert {n for n in first if n not in same} == {n for n in second if n not in same}
    assert all(first[n] == second[n] for n in first if n not in same)
    assert again.as_dict()["keep"] == result.keep

    # what was loaded computes what the stream computed, and loading twice gives the same
    ids = WINDOWS[:3]
    logits = compressed(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, load(tmp_path / "b")(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), covering(METHODS, (), 1))
def test_keep_one_changes_nothing(method, family, tmp_path):
    model = tiny.build(family)
    result = run(model, tmp_path / "out", method, 1.0)
    if result is None:
        pytest.skip(f"{method} refuses {family}")
    assert result.keep == 1 and result.params_after == result.params_before
    compressed = load(tmp_path / "out")
    torch.testing.assert_close(
        compressed(input_ids=WINDOWS).logits, model(input_ids=WINDOWS).logits, rtol=1e-4, atol=1e-4
    )


BUDGETS = [(m, *asked) for m in METHODS for asked in ((0.95, 4), (0.8, 1), (0.6, 4))]


@pytest.mark.parametrize(
    ("method", "keep", "round_to"), tiny.pick([c for c in BUDGETS if c[1] == 0.6 or c[0] in KINDS], BUDGETS)
)
def test_keep_lands_within_one_step_below_the_budget(method, keep, round_to):
    """Planned on a model whose sizes divide nothing evenly; `test_compress` counts. Whole submodules and blocks are
    one step each."""
    stream = Stream(MemorySource(tiny.build("llama_head_dim", num_hidden_layers=4)), WINDOWS[:4])
    job = pose_on(stream, find_method(method), keep, step=round_to)
    try:
        plan = job.method.plan(job.problem, job.measure).ranks
    except InputError as refusal:
        check_line(refusal)
        pytest.skip(str(refusal))
    costs = {u: job.problem.cost(u, plan.get(u, job.problem.full(u))) for u in job.problem.units}
    left = job.left(plan)
    assert left >= 0, f"over the budget by {-left}"
    steps = []
    for u, solver in job.problem.units.items():
        rank, ranks = plan.get(u, job.problem.full(u)), list(solver.ranks(u, job.problem.shapes[u.block]))
        assert rank in ranks, f"{u}: rank {rank} is not admissible"
        assert rank in (ranks[-1], ranks[0]) or rank % round_to == 0, f"{u}: rank {rank} is no multiple of {round_to}"
        higher = [r for r in ranks if r > rank and (r % round_to == 0 or r == ranks[-1])]
        steps += [job.problem.cost(u, higher[0]) - costs[u]] if higher else []
    if all(list(s.ranks(u, job.problem.shapes[u.block])) == [0, 1] for u, s in job.problem.units.items()):
        steps = [max(s.count() for s in job.problem.shapes)] if steps else []
    assert not steps or left < max(steps), f"{left} weights left over, the largest step is {max(steps)}"


@tiny.exact_norms()
def solve(name: str, method: str, batches: list[Tensor], keep: float = 0.72) -> dict[str, Tensor]:
    """Weights of the compressed blocks, solved in fp64."""
    stream = Stream(MemorySource(tiny.build(name, torch.float64)), WINDOWS, dtype=torch.float64)
    stream.batches = batches
    job = pose_on(stream, find_method(method), keep)
    planned = job.method.plan(job.problem, job.measure)
    found: dict[str, Tensor] = {}

    def emit(i: int, block: nn.Module, *_: object) -> None:
        found.update({f"{i}.{n}": t for n, t in block.state_dict().items()})

    planish_solve.solve(job.problem, job.measure, planned, emit)
    return found


@pytest.mark.parametrize(
    ("method", "family"), covering(METHODS, (), 1, more={("svd-llm", f) for f in ("lfm2", "qwen3_next", "nemotron_h")})
)
def test_batches_do_not_matter(method, family):
    """Grouping and order of the calibration windows change nothing but rounding."""
    try:
        whole = solve(family, method, [WINDOWS])
    except InputError:
        pytest.skip(f"{method} refuses {family}")
    job = pose_on(Stream(MemorySource(tiny.build(family)), WINDOWS[:1]), find_method(method), 1.0)
    taps = job.problem.taps(
        job.problem.units
    )  # held-out parts, sampled labels and first samples go by the sequence's number
    ordered = any(t.part != "all" or "grad:" in t.site + t.other for t in taps) or hasattr(job.method, "samples")
    ordered |= hasattr(job.method, "windows")  # so do measurements on the first few sequences
    ordered |= getattr(job.method, "allocation", "") == "fisher"  # and gradients that a plan asks for
    order = torch.arange(12) if ordered else torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = solve(family, method, list(WINDOWS[order].split(5)))
    assert whole.keys() == parts.keys()
    for name, w in whole.items():
        if "A.weight" in name or "B.weight" in name:
            continue  # compared as products below: nearly equal singular values turn both factors together
        torch.testing.assert_close(parts[name], w, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for name in whole:
        if name.endswith("A.weight") and name.replace("A.w", "B.w") in whole:
            product = [w[name.replace("A.w", "B.w")] @ w[name] for w in (whole, parts)]
            torch.testing.assert_close(product[1], product[0], rtol=1e-6, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "family"),
    covering(KINDS, (), 1, more=set()) + covering([m for m in METHODS if m not in KINDS], (), 0, more=set()),
)
def test_bf16_result_is_near_the_fp32_one(method, family, tmp_path):
    """The same relative error of the logits within the resolution of bf16."""
    errors = {}
    dense = tiny.build(family)
    target = dense(input_ids=WINDOWS).logits
    for dtype in (torch.float32, torch.bfloat16):
        if run(tiny.build(family, dtype), tmp_path / str(dtype), method, 0.8) is None:
            pytest.skip(f"{method} refuses {family}")
        compressed = load(tmp_path / str(dtype))
        assert next(compressed.parameters()).dtype == dtype
        logits = compressed.float()(input_ids=WINDOWS).logits
        errors[dtype] = float((logits - target).norm() / target.norm())
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.1, abs=0.02)


SOLVED = [("flat-llm", f) for f in tiny.NAMES + tiny.HYBRIDS]
SOLVED += [(m, f) for m in ("svd-llm", "a3", "subfit") for f in ("phi3", "opt", "gemma3")]
SOON = [("flat-llm", f) for f in (*tiny.CORE, "gpt2", "lfm2", "qwen3_next", "nemotron_h")]
SOON += [("svd-llm", "phi3"), ("a3", "opt"), ("subfit", "gemma3")]


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), tiny.pick(SOON, SOLVED))
def test_loaded_model_computes_what_was_solved(method, family, tmp_path):
    """Logits of the loaded folder = blocks as they were emitted, run by the stream, bit for bit; from fp32 weights."""
    source = open_source(tiny.save(tiny.build(family), tmp_path / "model"))
    stream = Stream(source, WINDOWS)
    job = pose_on(stream, find_method(method), 0.7)
    hidden = stream.start()

    def emit(i: int, block: nn.Module, *_: object) -> None:
        nonlocal hidden
        hidden = stream.run(i, block, hidden)

    planish_solve.solve(job.problem, job.measure, job.method.plan(job.problem, job.measure), emit)
    solved = compute_logits(stream, hidden[0])
    run(tmp_path / "model", tmp_path / "out", method, 0.7)
    logits = load(tmp_path / "out")(input_ids=WINDOWS).logits
    if family in tiny.MIXED:  # stacked experts are added up in another order
        torch.testing.assert_close(logits, solved, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, solved)


# ---------------------------------------------------------------- recipes against naive forms


@pytest.mark.parametrize("family", ["llama_mha", "llama_head_dim", "qwen2", "phi3", "gemma3", "opt", "gpt_neox"])
def test_value_pca_is_the_naive_projection(family):
    """Every query head's map x → W_o^h (W_v^g x + b_v^g) becomes W_o^h P_g (W_v^g x + b_v^g), P_g the PCA of group g."""
    b, rank = bench(family), 3
    (solver, *_) = find_method("flat-llm").solvers()
    ((unit, frontier, shape),) = cases(family, solver)
    dense = b.blocks[unit.block]
    block = b.edited(solver.truncate(frontier, rank, shape), shape)
    v = b.see(unit.block, dense, "v.out")["v.out"]
    old, new = ([get_linear(m, b.family, r) for r in "vo"] for m in (dense, block))
    for h in range(shape.heads):
        g = h // shape.groups
        at, small = (slice(i * n, (i + 1) * n) for i, n in ((g, shape.v), (g, rank)))
        vectors = torch.linalg.eigh(v[:, at].T @ v[:, at])[1][:, -rank:]
        wo = old[1].weight[:, h * shape.v : (h + 1) * shape.v] @ vectors @ vectors.T
        wo_small = new[1].weight[:, h * rank : (h + 1) * rank]
        torch.testing.assert_close(wo_small @ new[0].weight[small], wo @ old[0].weight[at], rtol=1e-6, atol=1e-8)
        if old[0].bias is not None:
            torch.testing.assert_close(wo_small @ new[0].bias[small], wo @ old[0].bias[at], rtol=1e-6, atol=1e-8)


def test_flat_llm_leaves_queries_and_keys_and_biases_alone(tmp_path):
    model = tiny.build("qwen2")
    compress(model, output=tmp_path / "out", keep=0.7, method="flat-llm", windows=WINDOWS)
    mine = load(tmp_path / "out").state_dict()
    for name, t in model.state_dict().items():
        if any(part in name for part in ("q_proj", "k_proj", "norm", "embed", "lm_head")):
            assert torch.equal(mine[name], t), name


def spend(name: str, method: str, **more: str) -> tuple[Posed, dict[Unit, int]]:
    job = pose_on(Stream(MemorySource(tiny.build(name)), WINDOWS), find_method(method, more), 0.6)
    return job, job.method.plan(job.problem, job.measure).ranks


def test_svd_llm_v2_keeps_more_where_more_is_lost():
    """Within a matrix type, a larger truncation loss at the uniform rank means a larger rank; the budget is the same."""
    uniform_job, uniform = spend("llama_gqa", "svd-llm")
    job, plan = spend("llama_gqa", "svd-llm", allocation="v2")
    assert job.left(plan) >= 0 <= uniform_job.left(uniform)
    losses = {
        u: float(f.loss[uniform[u]]) for u, f in measure_frontiers(uniform_job.problem, uniform_job.measure).items()
    }
    assert plan != uniform
    for role in job.problem.shapes[0].roles:
        units = sorted((u for u in plan if u.name == role), key=losses.__getitem__)
        ranks = [plan[u] for u in units]
        assert all(b >= a - 1 for a, b in pairwise(ranks)), f"{role}: {ranks}"  # one step is what rounding may do


def test_svd_llm_update_repairs_what_the_prefix_lost():
    """V1's sequential least squares: less error at the last block's output than without it."""
    errors = {}
    for update in ("false", "true"):
        job, plan = spend("llama_gqa", "svd-llm", update=update)
        stream, planned = job.measure.stream, job.method.decide(job.problem, plan)
        outputs = run_solved(job.problem, job.measure, planned, stream)
        errors[update] = compare(stream, outputs, stream.outputs())
    assert errors["true"] < errors["false"]


def test_erc_svd_compresses_the_last_blocks_only():
    job, plan = spend("llama_gqa", "erc-svd", k="2")
    cut = {u.block for u, r in plan.items() if r < job.problem.full(u)}
    assert cut == {1, 2}
    with pytest.raises(InputError, match="k must lie in"):
        spend("llama_gqa", "erc-svd", k="1")
