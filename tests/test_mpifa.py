"""Mixed and anchored targets (mpifa, aa-svd), measured sensitivity (asvd)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tiny
from planish.calibrate.stream import Stream
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import open_source
from planish.methods import find_method
from planish.methods.asvd import KEEPS, Sensitivity
from planish.plan.footprint import find_rank
from planish.solvers.linear import Anchored
from posed import Posed, pose_on
from tiny import compress, load

WINDOWS = tiny.windows(6, 20)


def problem(anchor: float, damping: float, out: int = 9, n: int = 7) -> tuple[Anchored, Tensor, Tensor, Tensor]:
    """A linear whose compressed inputs x̂ are a disturbed linear image of the dense x: (problem, W, x, x̂)."""
    g = torch.Generator().manual_seed(4)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    w, x = draw(out, n), draw(200, n) @ draw(n, n)
    y = x @ (torch.eye(n) + 0.3 * draw(n, n)) + 0.5 * draw(200, n)
    second = lambda a, b: a.T @ b / 200  # noqa: E731
    return Anchored(w, second(x, x), second(y, y), second(x, y), anchor, damping), w, x, y


def measure(w: Tensor, x: Tensor, y: Tensor, anchor: float, b: Tensor, a: Tensor) -> float:
    """E‖(1 − a) W x̂ + a W x − B A x̂‖², token by token."""
    return float((((1 - anchor) * y + anchor * x) @ w.T - y @ (b @ a).T).square().sum(1).mean())


@pytest.mark.parametrize("anchor", [0.0, 0.25, 1.0])
def test_error_is_the_one_measured_on_tokens(anchor):
    p, w, x, y = problem(anchor, 1e-3)
    losses = p.losses()
    for rank in (1, 3, 6):
        for b, a in (p.optimum(rank), p.factors(rank)):
            assert p.error(b, a) == pytest.approx(measure(w, x, y, anchor, b, a), rel=1e-9)
        assert float(losses[rank]) == pytest.approx(p.error(*p.optimum(rank)), rel=1e-9)
    assert float(losses[-1]) == pytest.approx(measure(w, x, y, anchor, w, torch.eye(7).double()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("anchor", [0.0, 0.25, 1.0])
def test_whitened_start_at_least_the_alternating_steps_at_least_the_optimum(anchor):
    """On the objective they share; and the optimum beats what gradient steps from it find."""
    p, *_ = problem(anchor, 1e-9)
    for rank in (1, 2, 4, 6):
        start = p.start.B[:, :rank], p.start.A[:rank]
        b, a = p.optimum(rank)
        assert p.error(*start) >= p.error(*p.factors(rank)) * (1 - 1e-6)
        assert p.error(*p.factors(rank)) >= p.error(b, a) * (1 - 1e-6)
        g = torch.Generator().manual_seed(rank)
        for size in (0.1, 1e-3):
            db, da = (size * torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (b, a))
            assert p.error(b + db, a + da) >= p.error(b, a) * (1 - 1e-6)


def test_without_disturbance_the_optimum_is_the_whitened_svd():
    g = torch.Generator().manual_seed(0)
    w, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((8, 6), (100, 6)))
    gram = x.T @ x / 100
    p = Anchored(w, gram, gram, gram, 1.0, 1e-10)
    for rank in (1, 3, 5):
        expected = p.start.B[:, :rank] @ p.start.A[:rank]
        for b, a in (p.optimum(rank), p.factors(rank)):
            assert torch.allclose(b @ a, expected, atol=1e-6)


def job(method: str, keep: float, **settings) -> Posed:
    return pose_on(Stream(open_source(tiny.build("llama_gqa")), WINDOWS), find_method(method, settings), keep)


def test_inside_a_block_linears_follow_the_order_of_the_activations():
    units = [Unit(0, r) for r in ("down", "up", "o", "v", "gate", "k", "q")]
    staged = find_method("mpifa").stages(units)
    assert [{u.name for u in s} for s in staged] == [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]
    assert find_method("mpifa").stages([]) == [[]]


@pytest.mark.parametrize("keep", [0.9, 0.55])
def test_mpifa_plan_uses_the_whole_budget_and_no_more(keep):
    j = job("mpifa", keep)
    plan = j.method.plan(j.problem, j.measure).ranks
    largest = max(j.problem.cost(u, min(r + 1, j.problem.full(u))) - j.problem.cost(u, r) for u, r in plan.items())
    assert 0 <= j.left(plan) < largest


def test_mpifa_splits_the_budget_between_attention_and_mlp():
    j = job("mpifa", 0.7, attention_keep="0.5")
    plan = j.method.plan(j.problem, j.measure).ranks

    def kept(roles) -> float:
        spent = sum(j.problem.cost(u, r) for u, r in plan.items() if u.name in roles)
        return spent / sum(j.problem.cost(u, j.problem.full(u)) for u in plan if u.name in roles)

    assert kept("qkvo") == pytest.approx(0.5, abs=0.05) and kept(("gate", "up", "down")) > 0.72
    with pytest.raises(InputError, match="attention_keep"):
        job("mpifa", 0.95, attention_keep="0.1").plan()


def test_mpifa_outliers_raise_a_blocks_keep():
    j = job("mpifa", 0.6, allocation="outliers", threshold="2")
    planned = j.plan()
    plan = planned.ranks
    kept = [
        sum(j.problem.cost(u, r) for u, r in plan.items() if u.block == i) / j.problem.shapes[i].count()
        for i in range(3)
    ]
    found = planned.notes["outliers"]
    assert max(kept) - min(kept) == pytest.approx(0.16, abs=0.05)
    assert kept.index(max(kept)) == max(found, key=found.get) and kept.index(min(kept)) == min(found, key=found.get)


@pytest.mark.parametrize("method", ["mpifa", "aa-svd"])
def test_first_block_solves_its_own_statement(method, tmp_path):
    """At the first block x̂ = x for q, k and v: both must give SVD-LLM's weights there, whatever comes later."""
    settings = {"damping": "1e-10", "form": "pivoted"}
    model = tiny.build("llama_gqa", torch.float64)
    found = []
    for name, extra in ((method, settings), ("svd-llm", {"form": "pivoted"})):
        compress(
            model, output=tmp_path / name, keep=0.6, method=name, windows=WINDOWS, settings=extra, dtype=torch.float64
        )
        block = load(tmp_path / name).model.layers[0].self_attn
        found.append([getattr(block, f"{r}_proj").dense() for r in "qkv"])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_sensitivity_is_the_loss_of_the_model_with_that_linear_truncated():
    j = job("asvd", 0.8)
    s = Sensitivity(j.problem, j.measure, 3, 1)
    unit, rank = Unit(1, "o"), 5
    model = tiny.build("llama_gqa")
    low = s.factors[unit]
    model.model.layers[1].self_attn.o_proj.weight.data = low.B[:, :rank] @ low.A[:rank]
    ids = WINDOWS[:3]
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert s.loss(unit, rank) == pytest.approx(expected, rel=1e-5)
    assert s.loss(Unit(2, "up"), j.problem.full(Unit(2, "up"))) == pytest.approx(
        s.loss(unit, j.problem.full(unit)), rel=1e-6
    )


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.3])
def test_lazy_search_finds_the_plan_of_the_full_table(keep):
    """Naive search: measure every linear at every keep, then raise one threshold until the budget is met."""
    j = job("asvd", keep, samples="2")
    table: dict[tuple[Unit, int], float] = {}

    class Table:
        count = 0

        def loss(self, unit: Unit, rank: int) -> float:
            g = torch.Generator().manual_seed(unit.block * 100 + sum(map(ord, unit.name)))
            slope = float(torch.rand(1, generator=g))
            table[unit, rank] = slope * (j.problem.full(unit) - rank) / j.problem.full(unit)  # falls with the rank
            return table[unit, rank]

    plan = j.method.search(j.problem, Table())
    assert j.left(plan) >= 0
    if keep < 0.4:
        return  # beyond the table all go down together
    lazily = len(table)
    rank_at = {
        (u, k): find_rank(j.problem.units[u], u, j.problem.shapes[u.block], k) for u in j.problem.units for k in KEEPS
    }
    losses = {(u, k): Table().loss(u, r) for (u, k), r in rank_at.items()}
    for threshold in sorted(losses.values()):
        naive = {
            u: min([rank_at[u, k] for k in KEEPS if losses[u, k] <= threshold], default=j.problem.full(u))
            for u in j.problem.units
        }
        if j.left(naive) >= 0:
            break
    differing = [u for u in naive if naive[u] != plan[u]]
    assert len(differing) <= 1 and all(plan[u] >= naive[u] for u in differing)  # the last step's change is given back
    assert lazily < len(losses)
