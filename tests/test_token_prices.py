"""What cuts cost token by token: effects are those of the cut model, their price is the naive one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from planish.apply import apply_edits
from planish.calibrate.cache import Cache
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream, read_weights
from planish.calibrate.taps import choose_windows
from planish.calibrate.text import list_shuffled
from planish.core import Frontier, Solver, Tokens, Unit
from planish.folder.source import MemorySource
from planish.methods import find_method
from planish.methods.auto import Weighing
from planish.plan import frontiers
from planish.plan.frontiers import dense_taps
from planish.plan.targets import Rounded
from planish.plan.token_prices import MOST, PART, TOKENS, TYPICAL, choose_aside, level, price_by_tokens, row_taps
from planish.rounding.types import choose
from planish.solvers.noise import NONE
from planish.stats import Stats, Tap
from posed import pose_on

WINDOWS = tiny.windows(12, 24)
PATHS = {
    "q": "self_attn.q_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def posed():
    """A problem, and of its block 1 the weights and statistics to plan by."""
    stream = Stream(MemorySource(tiny.build("llama_gqa", torch.float64)), WINDOWS, dtype=torch.float64)
    job = pose_on(stream, find_method("auto"), 0.6)
    for i, block, stats in job.measure.backward(lambda shape: dense_taps(job.problem, shape.block)):
        if i == 1:
            weights = {n: w.clone() for n, w in read_weights(block, stream).items()}
            return job, weights, stats.only(stats.sums)
    raise AssertionError


def watch(job, role: str, edits) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a linear of block 1, which is cut by `edits`, while the whole model runs."""
    model = tiny.build("llama_gqa", torch.float64)
    block, seen = model.model.layers[1], []
    apply_edits(block, edits, job.measure.stream.family, model.config, job.problem.shapes[1])
    block.get_submodule(PATHS[role]).register_forward_hook(
        lambda m, args, out: seen.extend((args[0].detach().flatten(0, 1), out.detach().flatten(0, 1)))
    )
    with torch.no_grad():
        model(WINDOWS)
    return seen[0], seen[1]


def make_rows(role: str, x: torch.Tensor, g: torch.Tensor) -> Stats:
    rows = Stats()
    for tap, values in zip(row_taps(role), (x, g), strict=True):
        rows.sums[tap], rows.tokens[tap] = {"rows": values}, len(values)
    return rows


@pytest.mark.parametrize(
    ("name", "share"), [("q", 0.3), ("v", 0.6), ("o", 0.4), ("gate", 0.5), ("down", 0.9), ("vo", 0.5), ("mlp", 0.4)]
)
def test_effects_are_those_of_the_cut_model(posed, name, share):
    """gᵀ (output of the linear with the unit alone cut − output before), for any g."""
    job, weights, stats = posed
    unit, shape = Unit(1, name), job.problem.shapes[1]
    solver, ranks = job.problem.units[unit], job.problem.choices(unit).ranks.tolist()
    rank, frontier = ranks[round(share * (len(ranks) - 2))], solver.decompose(unit, weights, stats, shape)
    role = solver.effect_role(unit)
    x, before = watch(job, role, [])
    _, after = watch(job, role, solver.truncate(frontier, rank, shape))
    g = torch.randn(before.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solver.effects(frontier, [rank], Tokens(x, g), shape)[0]
    wanted = (g * (after - before)).sum(1)
    assert wanted.abs().max() > 1e-8
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 * float(wanted.abs().max()))


def test_rows_are_what_linears_see_and_what_goes_back_to_them(posed):
    """As a pass over all windows finds them. The moments hold the other windows' alone: E[x xᵀ] and E[g gᵀ] of their rows."""
    job, _, _ = posed
    few = [t for role in ("q", "down") for t in row_taps(role)]
    taps = [replace(t, part="all") for t in few]
    whole = {}
    for i, _, found in job.measure.backward(lambda shape: taps):
        whole |= {t: found.sums[t]["rows"].double() for t in taps if i == 1}
    aside = choose_aside(job.problem, *WINDOWS.shape)
    chosen = choose_windows("aside", 0, len(WINDOWS), aside)
    assert aside == PART and 1 <= int(chosen.sum()) <= 2
    grams = 0
    for i, _, found in job.measure.backward(lambda h: [*few, *taps, *dense_taps(job.problem, h.block)], aside=aside):
        if i != 1:
            continue
        for tap, own in zip(taps, few, strict=True):
            rows = whole[tap].unflatten(0, WINDOWS.shape)
            assert torch.equal(found.sums[own]["rows"].double(), rows[chosen].flatten(0, 1))
            rest = rows[~chosen].flatten(0, 1)
            assert torch.equal(found.sums[tap]["rows"].double(), rest) and found.tokens[tap] == len(rest)
            gram = replace(tap, kind="gram")
            if gram in found.sums:
                grams += 1
                torch.testing.assert_close(rest.T @ rest / len(rest), found.mean(gram), rtol=1e-9, atol=1e-12)
    assert grams


def test_where_gradients_meet_inputs_a_cut_costs_more(posed):
    """Tokens with the moments that the prediction is of are priced as it says; where x and g are both larger, by factors s² and
    t² of mean 1 that moments do not see, E[s² t²] times that."""
    job, weights, stats = posed
    unit, shape, draw = Unit(1, "o"), job.problem.shapes[1], torch.Generator().manual_seed(1)
    solver = replace(job.problem.units[unit], noise=NONE)
    frontier = solver.decompose(unit, weights, stats, shape)
    sides = []
    for tap in (Tap("dense:o.in", "gram"), Tap("grad:o.out", "gram")):
        gram = stats.mean(tap)
        root = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
        sides.append(torch.randn(20_000, len(gram), generator=draw, dtype=gram.dtype) @ root.T)
    size = 0.5 + torch.rand(20_000, 1, generator=draw, dtype=torch.float64).square()
    size = size / size.square().mean().sqrt()
    x, g = sides
    middle = len(frontier.loss) // 2
    wanted = {1.0: (x, g), 1.001: (x * size, g * size.flip(0)), float(size.pow(4).mean()): (x * size, g * size)}
    for factor, rows in wanted.items():
        priced = price_by_tokens(job.problem, frontier, make_rows("o", *rows)).by_tokens
        assert priced[middle] / frontier.loss[middle] == pytest.approx(factor, rel=0.12)
    assert max(wanted) > 1.3


@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3))
def test_no_rank_costs_more_than_a_lower_one(posed, seed, scale):
    """Whatever few tokens say; and the last rank, which leaves the unit whole, nothing."""
    job, weights, stats = posed
    unit, shape = Unit(1, "down"), job.problem.shapes[1]
    frontier = job.problem.units[unit].decompose(unit, weights, stats, shape)
    draw = torch.Generator().manual_seed(seed)
    out, n = shape.linear("down")
    rows = make_rows("down", scale * torch.randn(3, n, generator=draw), torch.randn(3, out, generator=draw))
    priced = price_by_tokens(job.problem, frontier, rows).by_tokens
    assert (priced.diff() <= 0).all() and priced[-1] == 0
    low, high = (torch.as_tensor(frontier.loss) * f for f in (1 / MOST, MOST))
    assert (priced >= low * (1 - 1e-9)).all() and priced.max() <= high.max() * (1 + 1e-9)


def test_units_change_by_the_median_factor_and_half_of_their_own():
    """Half in logarithms; where a unit has none of its own, by the median alone."""
    loss = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    at = round(TYPICAL * 3)
    found = {
        Unit(0, "qk"): Frontier(Unit(0, "qk"), loss),
        **{Unit(n, "q"): Frontier(Unit(n, "q"), loss, by_tokens=loss * f) for n, f in enumerate((1.0, 3.0, 7.0))},
    }
    leveled = level(found)
    assert torch.equal(leveled[Unit(0, "qk")].by_tokens, loss * 3) and float(loss[at]) > 0
    for n, own in enumerate((1.0, 3.0, 7.0)):
        torch.testing.assert_close(leveled[Unit(n, "q")].by_tokens, loss * 3 * (own / 3) ** 0.5, rtol=1e-12, atol=0)
    plain = {u: replace(f, by_tokens=None) for u, f in found.items()}
    assert level(plain) == plain
    for weighing, factor in ((Weighing(), 21**0.5), (Weighing(moments=True), 1)):
        torch.testing.assert_close(weighing.price(leveled)[Unit(2, "q")].loss, loss * factor, rtol=1e-12, atol=0)


@given(windows=st.integers(1, 4096), seq_len=st.integers(2, 8192))
def test_few_windows_are_set_aside(posed, windows, seq_len):
    """At least one of eight and more, at most an eighth of more, and about as many tokens as are looked at; none that is shuffled
    where no more than 85 % are."""
    job, _, _ = posed
    aside = choose_aside(job.problem, windows, seq_len)
    chosen = choose_windows("aside", 0, windows, aside)
    few = int(chosen.sum())
    if windows < PART:
        assert not few and not aside
        return
    assert 1 <= few <= -(-windows // PART) and (few - 1) * seq_len < TOKENS
    assert not set(chosen.nonzero().flatten().tolist()) & set(list_shuffled(windows, 0.85))
    first = windows // 3
    both = [choose_windows("aside", at, n, aside) for at, n in ((0, first), (first, windows - first))]
    assert torch.equal(torch.cat(both), chosen), "whatever the batches"
    assert torch.equal(choose_windows("all", 0, windows, aside), ~chosen)


def test_prices_are_kept(monkeypatch):
    """For a further budget they come from the cache, to the bit, and no rows are asked for."""
    stream, cache = Stream(MemorySource(tiny.build("llama_gqa")), WINDOWS), Cache(memory=1 << 30)
    job = pose_on(stream, find_method("auto"), 0.6, cache=cache)
    first = job.method.measure(job.problem, job.measure)
    priced = [u for u in first if job.problem.units[u].effect_role(u)]
    assert priced and any(not torch.allclose(first[u].by_tokens, torch.as_tensor(first[u].loss)) for u in priced)
    monkeypatch.setattr(frontiers, "token_taps", None)
    again = job.method.measure(job.problem, job.measure)
    assert all(torch.equal(first[u].by_tokens, again[u].by_tokens) for u in first)


def test_what_is_priced_by_tokens():
    """Whatever auto cuts; published methods go by moments, of all windows."""
    source = MemorySource(tiny.build("llama_gqa"))
    roles = {
        (name, units): {
            s.effect_role(u) for s in find_method(name, options).solvers() for u in s.units(source.shape(0))
        }
        for name, units, options in (
            *(("auto", units, {"units": units}) for units in ("any", "linear", "structural")),
            *((name, "", {}) for name in ("kfac-svd", "io-svd")),
        )
    }
    assert all({"o", "down"} <= found for (name, _), found in roles.items() if name == "auto")
    assert all(found == {None} for (name, _), found in roles.items() if name != "auto")
    stream = Stream(source, WINDOWS)
    for name, wanted in (("auto", PART), ("kfac-svd", 0)):
        assert choose_aside(pose_on(stream, find_method(name), 0.6).problem, *WINDOWS.shape) == wanted


TARGETED = ["vllm", "onnx", "gguf", choose(4, "any"), choose(4, "gguf")]


@pytest.mark.parametrize("target", TARGETED, ids=lambda t: t if isinstance(t, str) else f"{t.bits} bits")
def test_a_target_changes_no_price_of_what_it_leaves(target):
    """Whatever ranks it allows, units are priced by the same tokens."""
    stream = Stream(MemorySource(tiny.build("llama_gqa")), WINDOWS)
    free, bound = (pose_on(stream, "auto", 0.6, Cache(), target=t) for t in ("any", target))
    plain, found = (job.method.measure(job.problem, job.measure) for job in (free, bound))
    roles = {u for u in found if free.problem.units[u].effect_role(u)}
    assert roles
    for u in roles:
        assert bound.problem.units[u].effect_role(u) and found[u].by_tokens is not None
        assert torch.equal(torch.as_tensor(found[u].loss), torch.as_tensor(plain[u].loss))


def test_ranks_in_steps_hide_nothing_of_a_solver():
    """Whatever a solver can be asked for, the one behind the steps is asked."""
    asked = {name for name, member in vars(Solver).items() if callable(member) and not name.startswith("_")}
    assert {"decompose", "effects"} <= asked <= vars(Rounded).keys()


def test_prices_of_plans_for_other_bits_are_those_of_a_first_one():
    stream, cache = Stream(MemorySource(tiny.build("llama_gqa")), WINDOWS), Cache(memory=1 << 30)

    def price(bits: int, cache: Cache):
        job = pose_on(stream, "auto", 0.6, cache, target=choose(bits, "any"))
        return job.method.measure(job.problem, job.measure)

    price(8, cache)
    for bits in (4, 4, 3):
        fresh, found = price(bits, Cache()), price(bits, cache)
        assert any(f.rough for f in fresh.values())
        for u, f in fresh.items():
            assert found[u].rough == f.rough and torch.equal(found[u].by_tokens, f.by_tokens), (bits, u)


@pytest.mark.parametrize("family", tiny.pick(["mixtral", "gpt_oss"], ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]))
def test_what_is_asked_of_experts_changes_no_other_gradient(family):
    """A mixture calls one expert more to learn what it would bring; nothing below it may see that."""
    tap, shares = Tap("grad:q.out", "gram"), Tap("grad:experts.shares", "gram")
    moments = []
    for taps in ([tap], [tap, shares]):
        s = Stream(MemorySource(tiny.build(family, torch.float64)), WINDOWS, dtype=torch.float64)
        moments.append({i: found.mean(tap) for i, _, found in sweep_back(s, lambda shape, taps=taps: taps)})
    for i, plain in moments[0].items():
        torch.testing.assert_close(moments[1][i], plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


def test_batches_of_which_no_window_is_set_aside_are_not_copied():
    assert choose_windows("all", 4, 4, 12) == slice(None) and choose_windows("all", 0, 4) == slice(None)
    assert not choose_windows("aside", 4, 4, 12).any() and choose_windows("aside", 0, 12, 12).sum() == 1


def test_plans_by_moments_are_predicted_by_tokens_too():
    job = pose_on(Stream(MemorySource(tiny.build("llama_gqa")), WINDOWS), "auto", 0.5)
    found = job.method.measure(job.problem, job.measure)
    for moments in (False, True):
        pick = job.method.allocate(job.problem, found, Weighing(moments=moments))
        expected = sum(float(torch.as_tensor(found[u].price)[r]) for u, r in pick.ranks.items())
        assert pick.loss == pytest.approx(expected, rel=1e-12)
        assert pick.loss != pytest.approx(sum(float(found[u].loss[r]) for u, r in pick.ranks.items()), rel=1e-3)
