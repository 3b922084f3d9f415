"""The inside of experts in nats: neurons priced against a loop over tokens, and chosen together with how many experts stay."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import planish
import tiny
from planish.calibrate.losses import output_gradient
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream, read_weights
from planish.core import ExpertShape, Unit
from planish.dry_run.seconds import Rates, call_experts, rehearse
from planish.folder.source import MemorySource
from planish.plan.allocate import Alternative
from planish.plan.experts import choose_with_experts, list_inside
from planish.plan.problem import count_left, make_problem
from planish.request import Limits
from planish.solvers.experts import Experts
from planish.solvers.fisher_experts import FisherExpertNeurons
from planish.stats import Tap
from tiny import compress

WINDOWS = tiny.windows(40, 12)


def measure(solver, model: nn.Module, i: int, windows: Tensor):
    """(frontier, shape) of the inside of block i's experts."""
    stream, source = Stream(MemorySource(model), windows, dtype=torch.float64), MemorySource(model)
    shape = source.shape(i)
    (unit,) = solver.units(shape)
    taps = solver.dense_taps(unit, shape)
    stats = next(s for j, _, s in sweep_back(stream, lambda s: taps if s.block == i else []) if j == i)
    return solver.decompose(unit, read_weights(stream.block(i), stream), stats, shape), shape


def look(model: nn.Module, i: int, windows: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int, float, Tensor]]]:
    """Naively: the gradient u (tokens, hidden) of a sampled NLL at what block i's experts put out, that output, and (token,
    expert, gate, input) of each choice."""
    experts, last, seen, routed = model.model.layers[i].mlp.experts, [], [], []

    def route(module, args):
        for t, (x, js, gates) in enumerate(zip(*(a.detach() for a in args), strict=True)):
            routed.extend((t, int(j), float(g), x) for j, g in zip(js, gates, strict=True))

    handles = [
        experts.register_forward_pre_hook(route),
        experts.register_forward_hook(lambda m, a, out: seen.append(out)),
        model.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out)),
    ]
    model(windows)
    stream = Stream(MemorySource(model), windows, dtype=torch.float64)
    (u,) = torch.autograd.grad(last[0], seen[0], output_gradient(stream, stream.outputs()[0], 0, 0))
    for handle in handles:
        handle.remove()
    return u, seen[0].detach(), routed


def answer(experts: nn.Module, j: int, x: Tensor, cut: dict[str, Tensor] | None = None) -> Tensor:
    gate, up = experts.gate_up_proj[j].detach().chunk(2)
    down = experts.down_proj[j].detach()
    if cut:
        gate, up, down = (cut[f"expert.{j}.{r}"] for r in ("gate", "up", "down"))
    return down @ (experts.act_fn(gate @ x) * (up @ x))


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_price_of_neurons_is_that_of_what_the_mixture_then_puts_out(name):
    """½ tr(G E[e eᵀ]) with e = g (f' − f) token by token; and near ½ E[(uᵀe)²], for which u and e need not be independent."""
    model = tiny.build(name, torch.float64)
    i = len(model.model.layers) - 1
    solver = FisherExpertNeurons(prior=0.0, damping=1e-12)
    frontier, shape = measure(solver, model, i, WINDOWS)
    u, _, routed = look(model, i, WINDOWS)
    metric, experts = u.T @ u / len(u), model.model.layers[i].mlp.experts
    for rank in (4, 9):
        cut = {e.target: e.tensors["weight"] for e in solver.truncate(frontier, rank, shape)}
        told = real = 0.0
        for t, j, g, x in routed:
            e = g * (answer(experts, j, x, cut) - answer(experts, j, x))
            told, real = told + float(e @ metric @ e) / 2 / len(u), real + float(u[t] @ e) ** 2 / 2 / len(u)
        assert float(frontier.loss[rank]) == pytest.approx(told, rel=1e-6)
        assert float(frontier.loss[rank]) == pytest.approx(real, rel=0.3)


def test_few_tokens_neither_crash_nor_make_an_expert_worthless():
    """Four choices among eight experts: cutting those that nothing reached costs what `prior` tokens would, and can be solved."""
    model, few = tiny.build("qwen3_moe", torch.float64), WINDOWS[:1, :2]
    reached = {j for _, j, _, _ in look(model, 0, few)[2]}
    assert len(reached) <= 4
    frontier, shape = measure(FisherExpertNeurons(), model, 0, few)
    losses = torch.as_tensor(frontier.loss)
    assert (losses[:-1] > 0).all() and losses[-1] == 0 and (losses.diff() <= 0).all()
    for j in set(range(8)) - reached:
        gram = frontier.factors[str(j)]["gram"]
        assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram), dtype=gram.dtype)) and gram[0, 0] > 0
    for edit in FisherExpertNeurons().truncate(frontier, 3, shape):
        assert torch.isfinite(edit.tensors["weight"]).all()
        assert edit.tensors["weight"].abs().max() < 100 * model.model.layers[0].mlp.experts.down_proj.abs().max()


def pose(keep: float, **more):
    """(problem, frontiers) of experts and their neurons in both blocks of a tiny mixture."""
    model = tiny.build("qwen3_moe", torch.float64, moe_intermediate_size=6)
    problem = make_problem(
        MemorySource(model), "auto", [Experts("nats"), FisherExpertNeurons()], Limits(keep=keep), **more
    )
    frontiers = {}
    for unit, solver in problem.units.items():
        frontiers[unit] = measure(solver, model, unit.block, WINDOWS)[0]
    return problem, frontiers


@pytest.mark.parametrize("keep", [0.75, 0.85, 0.93])
def test_experts_and_neurons_are_chosen_as_trying_all_would(keep):
    """One number of experts, a width per block: costs multiply, and nothing within the budget is predicted to lose less."""
    problem, frontiers = pose(keep)
    curves = {u: problem.curve(f) for u, f in frontiers.items()}
    rest = [
        Alternative(
            (), [problem.main.total - sum(problem.cost(u, problem.full(u)) for u in curves if u.name == "experts")]
        )
    ]
    plan, loss = choose_with_experts(
        [rest], curves, [b.limit for b in problem.budgets], lambda kept: list_inside(problem, frontiers, curves, kept)
    )
    blocks = sorted({u.block for u in plan})
    best = torch.inf
    for n, *widths in product(range(1, 9), *(range(1, 7) for _ in blocks)):
        other = {Unit(b, "experts"): n for b in blocks} | {
            Unit(b, "neurons"): w for b, w in zip(blocks, widths, strict=True)
        }
        if count_left(problem, other, problem.main) <= problem.main.limit:
            best = min(best, sum(float(frontiers[u].loss[r]) for u, r in other.items()))
    assert count_left(problem, plan, problem.main) <= problem.main.limit
    assert loss == pytest.approx(sum(float(frontiers[u].loss[r]) for u, r in plan.items()))
    assert best * (1 - 1e-9) <= loss <= best * 1.05  # one step of a width is left over


@torch.no_grad()
@pytest.mark.parametrize("target", ["any", "gguf"])
def test_fewer_and_narrower_experts_are_what_was_counted(target, tmp_path):
    """At a keep that takes both; where a stock program is the target, one width for all blocks and nothing of ours."""
    model = tiny.build("olmoe", num_key_value_heads=4)
    out = tmp_path / "out"
    result = compress(model, output=out, windows=WINDOWS, method="auto", keep=0.32, target=target)
    plan = {Unit.parse(u): r for u, r in json.loads((out / "planish.json").read_text())["plan"].items()}
    numbers, widths = ({r for u, r in plan.items() if u.name == n} for n in ("experts", "neurons"))
    loaded = tiny.load(out)
    assert result.params_after == sum(p.numel() for p in loaded.parameters()) and 0.3 < result.keep <= 0.32
    assert len(numbers) == 1 and max(numbers) < 8 and min(widths) < 12
    if target == "gguf":
        assert len(widths) == 1 and result.format == "native"
    assert torch.isfinite(loaded(WINDOWS).logits).all()


@pytest.mark.parametrize("number", [8, 4])  # rehearsed with four, or all
def test_seconds_of_what_is_inside_experts_are_rehearsed(number):
    solvers = {Unit(0, "neurons"): FisherExpertNeurons(), Unit(0, "experts"): Experts("nats")}
    shape = MemorySource(tiny.build("olmoe", num_experts=number)).shape(0)
    took = rehearse(solvers, {Unit(0, "neurons"): 5, Unit(0, "experts"): 4}, shape)
    assert all(min(took[u]) > 0 for u in solvers)


def test_a_plan_counts_what_both_cuts_leave():
    ids = tiny.windows(1, 2000)[0].numpy()
    found = planish.forecast(tiny.build("olmoe"), keep=0.35, method="auto", calibration=ids, n_samples=40, seq_len=12)
    assert {u["unit"] for u in found.units if u["rank"] < u["full"]} >= {"experts", "neurons"}
    assert found.keep <= 0.35
    assert found.block_params_before - found.block_params_after == found.params_before - found.params_after


@pytest.mark.slow
def test_few_narrow_experts_of_a_trained_mixture_lose_less_than_few_whole_ones(mixture_dir, tmp_path):
    """A quarter of the experts' weights left: less than half of what dropping alone loses; half of them left: no neuron goes."""

    def lose(method: str, keep: float, **settings: object) -> tuple[float, set[str]]:
        out = tmp_path / f"{method}-{keep}"
        asked = {"keep": keep, "calibration": "builtin", "n_samples": 48, "seq_len": 128, "settings": settings}
        planish.compress(mixture_dir, output=out, method=method, **asked)
        cut = {
            u.partition(".")[2] for u, r in json.loads((out / "planish.json").read_text())["plan"].items() if r < 128
        }
        return planish.evaluate(out, "builtin", 128, max_windows=32).nll, cut

    dense = planish.evaluate(mixture_dir, "builtin", 128, max_windows=32).nll
    drop, few = lose("reap", 0.42, criterion="nats")[0], lose("auto", 0.42)
    assert few[0] - dense < 0.5 * (drop - dense) and {"experts", "neurons"} <= few[1]
    assert "neurons" not in lose("auto", 0.615)[1]


def test_a_forecast_counts_every_call_of_every_expert():
    """A token meets as many neurons whatever the number of experts; calling them takes as often as there are any, and an expert's
    statistics are of few tokens."""
    few, many = (ExpertShape(n, 2, 48, 64) for n in (8, 128))
    some, most = (call_experts(e, 256, torch.device("cpu"), torch.float32, torch.bfloat16) for e in (few, many))
    assert most.forward > 3 * some.forward > 0 and most.both > most.forward
    shape = MemorySource(tiny.build("qwen3_moe")).shape(0)
    assert shape.experts is not None
    rates = Rates(*[1e-9] * 7)
    assert rates.sum(shape, Tap("expert.3.down.gated", "gram")) == pytest.approx(12 * 12 * 1e-9 * 2 / 8)
