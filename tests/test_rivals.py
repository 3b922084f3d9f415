"""kfac-svd, io-svd and what they measure, against the papers' rules written out naively."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.calibrate import losses
from planish.calibrate.cache import Cache
from planish.calibrate.losses import mix_words, output_gradient, sign_words
from planish.calibrate.measure import Measurements, sweep_back
from planish.calibrate.stream import Stream, read_weights
from planish.core import Plan, Unit
from planish.folder.source import MemorySource
from planish.methods.kfac_svd import weigh_depths
from planish.modelling.blocks import get_linear
from planish.plan.planned import Planned
from planish.solvers.two_sided import ShrunkTwoSided
from planish.stats import Stats, Tap, clamped_gram
from posed import Posed, pose_on

WINDOWS = tiny.windows(12, 24)
PROBES = ["sampled", "text", "curvature", "signs"]


def stream(name: str = "llama_gqa", windows: Tensor = WINDOWS, **more: Any) -> Stream:
    return Stream(MemorySource(tiny.build(name, torch.float64, **more)), windows, dtype=torch.float64)


def gradients(s: Stream, sites: list[str]) -> list[dict[str, Tensor]]:
    """Per block, tensors at these sites (n, seq, channels), gradients of the text's own loss, by hooks in the whole model."""
    model = s.source.model
    seen: list[dict[str, Tensor]] = [{} for _ in range(len(s))]
    hooks = []
    for i, block in enumerate(model.model.layers):
        for site in sites:
            role, _, end = site.removeprefix("grad:").partition(".")
            linear = get_linear(block, s.family, role)

            def look(m, args, out, i=i, site=site, end=end) -> None:
                tensor = args[0] if end == "in" else out
                if site.startswith("grad:"):
                    tensor.register_hook(lambda g: seen[i].__setitem__(site, g.detach()))
                else:
                    seen[i][site] = tensor.detach()

            hooks.append(linear.register_forward_hook(look))
    with torch.enable_grad():
        for p in model.parameters():
            p.requires_grad_(True)
        logits = model(WINDOWS, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.grad = None
    return seen


# ---------------------------------------------------------------- what is sent back


def head(model: nn.Module, h: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(h))


def test_the_text_sends_back_the_gradient_of_its_own_loss():
    s = stream()
    (outputs,) = s.outputs()
    h = outputs.clone().requires_grad_(True)
    logits = head(s.source.model, h)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, WINDOWS[:, 1:].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, h)
    found = output_gradient(s, outputs, 0, 0, "text", WINDOWS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not found[:, -1].any() and found[:, :-1].any(-1).all()


def test_signed_words_have_the_curvature_as_their_second_moment():
    """Over all signs of the five likeliest words, exactly; with all words signed it is diag(p) − p pᵀ."""
    p = torch.rand(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).square()
    p /= p.sum(1, keepdim=True)
    for words in (5, 11):
        signs = torch.tensor(list(itertools.product((-1, 1), repeat=words)))
        for row in p:
            v = mix_words(row.expand(len(signs), -1), signs)
            expected = torch.zeros(11, 11, dtype=torch.float64)
            for k in row.argsort(descending=True)[:words]:
                e = torch.eye(11, dtype=torch.float64)[k] - row
                expected += row[k] * e[:, None] * e
            torch.testing.assert_close(v.T @ v / len(signs), expected)
        if words == 11:
            torch.testing.assert_close(expected, row.diag() - row[:, None] * row)
            bits = torch.arange(2**words, dtype=torch.int32)[:, None]
            v = sign_words(row.expand(len(bits), -1), bits)
            torch.testing.assert_close(v.T @ v / len(bits), expected)


def test_the_curvature_reaches_the_hidden_state(monkeypatch):
    """The mean over all signs of what is sent back is Jᵀ C J, J the derivative of a token's logits."""
    s = stream()
    h = s.outputs()[0][:1, 7:8]
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=losses.TOP)))
    monkeypatch.setattr(losses, "aim", lambda *a: signs)
    g = output_gradient(s, h.expand(len(signs), -1, -1), 0, 0, "curvature")[:, 0]
    j = torch.autograd.functional.jacobian(lambda x: head(s.source.model, x), h[0, 0])
    p = head(s.source.model, h[0, 0]).softmax(-1).detach()
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for k in p.argsort(descending=True)[: losses.TOP]:
        b = j[k] - p @ j  # Jᵀ (e_k − p)
        expected += p[k] * b[:, None] * b
    torch.testing.assert_close(
        g.T @ g / len(signs), expected, rtol=1e-5, atol=1e-5 * float(expected.max())
    )  # a norm in fp32


@pytest.mark.parametrize("probe", PROBES)
def test_a_window_sends_back_the_same_in_any_company(probe, monkeypatch):
    s = stream()
    (outputs,) = s.outputs()
    whole = output_gradient(s, outputs, 3, 0, probe, WINDOWS)
    for at in (slice(0, 5), slice(5, 12)):
        part = output_gradient(s, outputs[at], 3, at.start, probe, WINDOWS[at])
        torch.testing.assert_close(part, whole[at], rtol=1e-10, atol=1e-13)
    monkeypatch.setattr(losses, "LOGITS", 7 * s.source.config.vocab_size + 1)
    torch.testing.assert_close(output_gradient(s, outputs, 3, 0, probe, WINDOWS), whole, rtol=1e-10, atol=1e-13)
    again = output_gradient(s, outputs, 4, 0, probe, WINDOWS)
    assert torch.equal(again, whole) == (probe == "text")


def test_the_cache_tells_probes_apart(monkeypatch):
    s, cache, starts = stream(), Cache(memory=1 << 30), []
    tap, start = Tap("grad:o.out", "gram"), Stream.start
    monkeypatch.setattr(Stream, "start", lambda self: starts.append(1) or start(self))

    def measure(probe: str) -> tuple[Tensor, str]:
        found = [(stats.sums[tap]["sum"].clone(), stats.origin) for _, _, stats in
                 Measurements(s, cache).backward(lambda shape: [tap], probe=probe)]  # fmt: skip
        return torch.stack([f for f, _ in found]), found[0][1]

    first = {p: measure(p) for p in PROBES}
    again = {p: measure(p) for p in PROBES}
    assert len(starts) == len(PROBES) == len({origin for _, origin in first.values()})
    for a, b in itertools.combinations(PROBES, 2):
        assert float((first[a][0] - first[b][0]).norm()) > 1e-3 * float(first[a][0].norm())
    assert all(torch.equal(first[p][0], again[p][0]) for p in PROBES)


def test_auto_plans_by_the_probe_that_is_asked_for():
    settings = {"units": "linear", "anchor": "0"}
    plans = [pose_on(stream(), "auto", 0.6, settings=settings | {"probe": p}) for p in PROBES]
    losses = [[f.loss[3] for f in p.method.measure(p.problem, p.measure).values()] for p in plans]
    assert len({tuple(map(float, found)) for found in losses}) == len(PROBES)


# ---------------------------------------------------------------- moments without edges and outliers


def clamp_naively(g: Tensor) -> Tensor:
    """Windows (n, seq, channels) without their first and last eighth, every token's length within 0.1 … 10 × the mean."""
    n = g.shape[1]
    rows = []
    for window in g:
        inside = [window[t] for t in range(n) if n // 8 <= t < n - n // 8]
        mean = sum(float(t.norm()) for t in inside) / len(inside)
        for t in inside:
            size = float(t.norm())
            rows.append(t if size == 0 else t / size * min(max(size, 0.1 * mean), 10 * mean))
    return torch.stack(rows)


def test_clamped_gram_is_the_sum_over_clamped_tokens():
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(3, 24, 6, generator=generator, dtype=torch.float64)
    g[0, 5] *= 1000.0
    g[1, 6] *= 1e-6
    g[2, 7] = 0.0
    g[:, 1] = 1e9  # in an edge
    w = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    rows = clamp_naively(g)
    whole = Stats()
    tap = Tap("g", "clamped_gram", "g")
    for part in (g[:1], g[1:]):
        whole.update({"g": part}, [tap])
    sums = whole.sums[tap]
    torch.testing.assert_close(sums["sum"], rows.T @ rows)
    torch.testing.assert_close(float(sums["energy"]), float(rows.square().sum()))
    assert int(sums["count"]) == len(rows) == 3 * 18
    assert float(rows.norm(dim=1).max()) > 9 * float(rows.norm(dim=1).median())  # the clamp is at work
    torch.testing.assert_close(clamped_gram(g @ w, g)["sum"], (rows @ w).T @ (rows @ w))


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_shrunk_two_sided_is_the_naive_truncation(form):
    """[G'^½ W R'^½]_r with symmetric roots, G' (out, out) written out also where only Wᵀ G W is measured."""
    s = stream()
    sites = ["q.in", "up.in", "down.in", *(f"grad:{r}.out" for r in ("q", "up", "down"))]
    seen = gradients(s, sites)[1]
    solver, shape = ShrunkTwoSided(form=form, shrink_in=0.2, shrink_out=0.4), s.source.shape(1)
    units = [Unit(1, r) for r in ("q", "up", "down")]
    taps = sorted({t for u in units for t in solver.taps(u, shape)})
    (stats,) = (st for i, _, st in sweep_back(s, lambda h: taps if h.block == 1 else [], probe="text") if i == 1)
    weights = read_weights(s.block(1), s)
    for unit in units:
        w = weights[unit.name].double()
        x = seen[f"{unit.name}.in"].flatten(0, 1)
        g = clamp_naively(seen[f"grad:{unit.name}.out"])
        roots = []
        for m, share in ((x.T @ x / len(x), 0.2), (g.T @ g / len(g), 0.4)):
            m = (1 - share) * m + share * m.diagonal().mean() * torch.eye(len(m))
            values, vectors = torch.linalg.eigh(m)
            roots.append([vectors @ torch.diag(values**p) @ vectors.T for p in (0.5, -0.5)])
        (right, right_inverse), (left, left_inverse) = roots
        u, sigma, vh = torch.linalg.svd(left @ w @ right, full_matrices=False)
        frontier = solver.decompose(unit, weights, stats, shape)
        torch.testing.assert_close(float(frontier.loss[5]), float(sigma[5:].square().sum() / 2), rtol=1e-7, atol=0)
        (edit,) = solver.truncate(frontier, 5, shape)
        t = edit.tensors
        if form == "pair":
            made = t["B.weight"] @ t["A.weight"]
        else:
            made = torch.cat([t["P.weight"], t["C.weight"] @ t["P.weight"]])[t["order"].long()]
        expected = left_inverse @ u[:, :5] @ torch.diag(sigma[:5]) @ vh[:5] @ right_inverse
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


# ---------------------------------------------------------------- ranks


def test_lems_weighs_depths_as_written():
    a, gamma, blocks = 1.7, 3.0, 5
    sums = [sum((k + 1) ** -a for k in range(block, blocks)) for block in range(blocks)]
    expected = [1 + gamma * (x - min(sums)) / (max(sums) - min(sums)) for x in sums]
    assert weigh_depths(blocks, a, gamma) == pytest.approx(expected)
    assert weigh_depths(1, a, gamma) == [1.0] and weigh_depths(3, a, 0.0) == [1.0] * 3


def cut(job: Posed, ranks: Plan) -> nn.Module:
    """The model with these units' weights replaced by what the method makes of them."""
    small = copy.deepcopy(job.measure.source.model)
    for unit, rank in ranks.items():
        shape, solver = job.problem.shapes[unit.block], job.problem.units[unit]
        if rank == job.problem.full(unit):
            continue
        weights = read_weights(job.measure.stream.block(unit.block), job.measure.stream)
        (edit,) = solver.truncate(solver.decompose(unit, weights, job.measure.stored[unit.block], shape), rank, shape)
        linear = get_linear(small.model.layers[unit.block], job.measure.stream.family, unit.name)
        linear.weight.data = edit.tensors["B.weight"] @ edit.tensors["A.weight"]
    return small


@torch.no_grad()
def diverge(job: Posed, small: nn.Module, windows: Tensor) -> float:
    """KL at temperature 0.6 behind the first eighth of every window."""
    logs = [
        (m(windows, use_cache=False).logits[:, 3:] / 0.6).log_softmax(-1) for m in (job.measure.source.model, small)
    ]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def plan_by_lems(keep: float) -> tuple[Posed, Planned]:
    s = stream(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    job = pose_on(s, "kfac-svd", keep, settings={"allocation": "lems", "trials": "4", "windows": "6"})
    return job, job.plan()


def test_lems_takes_the_plan_of_least_divergence():
    """Linears tried alone, plans solved whole: models really built. Ranks by the least sum, searched through."""
    job, planned = plan_by_lems(0.7)
    problem, few = job.problem, WINDOWS[torch.arange(6) * 2]
    even = {u: (m := problem.shapes[u.block].linear(u.name))[0] * m[1] / sum(m) for u in problem.units}
    probed = {u: max(1, round(0.1 * e)) for u, e in even.items()}
    for unit in (Unit(0, "q"), Unit(0, "up"), Unit(1, "k"), Unit(1, "down")):
        assert planned.notes["alone"][str(unit)] == pytest.approx(
            diverge(job, cut(job, {unit: probed[unit]}), few), rel=1e-5
        )
    trials = planned.notes["trials"]
    assert len(trials) == 4 and (trials[0]["alpha"], trials[0]["gamma"]) == (0, 0)
    assert min(t["divergence"] for t in trials) == pytest.approx(diverge(job, cut(job, planned.ranks), few), rel=1e-5)
    assert job.left(planned.ranks) >= 0
    for u, r in planned.ranks.items():
        assert r == problem.full(u) or (r % 8 == 0 and 0.3 <= r / even[u] <= 0.95)

    best = min(trials, key=lambda t: t["divergence"])
    factors = weigh_depths(2, best["alpha"], best["gamma"])

    def err(u: Unit, r: int) -> float:
        tails = planned.frontiers[u].loss
        return (
            0.0
            if r == problem.full(u)
            else float(planned.notes["alone"][str(u)] * factors[u.block] * tails[r] / tails[probed[u]])
        )

    def choices(u: Unit) -> list[int]:
        return [r for r in range(8, 64, 8) if 0.3 <= r / even[u] <= 0.95] + [problem.full(u)]

    least = dict[int, float]({0: 0.0})  # weights spent → least sum of errors
    for u in problem.units:
        step: dict[int, float] = {}
        for (spent, loss), r in itertools.product(least.items(), choices(u)):
            key = spent + int(problem.cost(u, r))
            step[key] = min(step.get(key, float("inf")), loss + err(u, r))
        least = step
    limit, largest = problem.limits[0], max(problem.cost(u, problem.full(u)) for u in problem.units)
    own = sum(err(u, r) for u, r in planned.ranks.items())
    assert own >= min(x for spent, x in least.items() if spent <= limit) - 1e-9
    assert own <= min(x for spent, x in least.items() if spent <= limit - largest) + 1e-9  # optimal to one step


def test_io_svd_beats_greedy_removal_of_directions():
    """Directions go one at a time, of all linears the one that loses least per weight; what is left over does not count."""
    job = pose_on(stream(), "io-svd", 0.6)
    planned = job.plan()
    problem = job.problem
    ranks = {u: min(problem.shapes[u.block].linear(u.name)) for u in problem.units}
    sizes = {u: problem.shapes[u.block].linear(u.name) for u in ranks}

    def weights(u: Unit, r: int) -> int:
        return min(r * sum(sizes[u]), sizes[u][0] * sizes[u][1])

    def lost(u: Unit, r: int) -> float:
        return 0.0 if r * sum(sizes[u]) >= sizes[u][0] * sizes[u][1] else float(planned.frontiers[u].loss[r])

    def price(u: Unit) -> float:
        loss = planned.frontiers[u].loss
        return float(loss[ranks[u] - 1] - loss[ranks[u]]) / sum(sizes[u])

    while sum(weights(u, r) for u, r in ranks.items()) > problem.limits[0]:
        ranks[min((u for u, r in ranks.items() if r > 1), key=price)] -= 1
    own = sum(float(planned.frontiers[u].loss[r]) for u, r in planned.ranks.items())
    assert 0 < own <= sum(lost(u, r) for u, r in ranks.items()) * (1 + 1e-9)
    assert job.left(planned.ranks) >= 0
    assert own < sum(float(planned.frontiers[u].loss[r]) for u, r in problem.spread(lambda u: 1.0).items())


def test_io_svd_measures_the_curvature():
    s = stream()
    job = pose_on(s, "io-svd", 0.6)
    job.plan()
    tap = Tap("grad:o.out", "gram")
    expected = {i: stats.mean(tap).clone() for i, _, stats in sweep_back(s, lambda h: [tap], probe="curvature")}
    assert all(torch.equal(job.measure.stored[i].mean(tap), g) for i, g in expected.items())
