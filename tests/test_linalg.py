"""Tensor mathematics against textbook forms and explicit sums."""

from __future__ import annotations

import warnings

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish.core import Shape, Unit
from planish.methods import find_method
from planish.solvers import linalg, pivots, selection
from planish.solvers.linear import LinearSVD, output_errors
from planish.solvers.neurons import Neurons
from planish.solvers.value_pca import ValuePCA
from planish.stats import Stats, Tap

SIZES = st.integers(1, 11)
SEEDS = st.integers(0, 10_000)
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("quick")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, n: int, tokens: int) -> Tensor:
    """Correlated tokens (tokens, n) with channels of very different scale."""
    return draw(seed, tokens, n) @ draw(seed + 1, n, n) * torch.logspace(-1, 1, n, dtype=torch.float64)


def energy(x: Tensor) -> float:
    return float(x.square().sum())


# ---------------------------------------------------------------- low rank


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), SEEDS)
def test_products_that_read_half_of_a_matrix(m, n, leaf, seed):
    w, a = draw(seed, m, n), draw(seed + 1, n, n)
    lower, gram = a.tril(), a @ a.T
    torch.testing.assert_close(linalg.triangular_product(w, a, leaf=leaf), w @ lower)  # what lies above is not read
    products = (linalg.sandwich(w, gram), w @ gram @ w.T), (linalg.congruence(gram, lower), lower.T @ gram @ lower)
    for half, whole in products:
        torch.testing.assert_close(half, whole)


def test_shapes_are_checked():
    """By beartype, wherever a test calls a solver."""
    for wrong in (torch.ones(4, 4), torch.ones(3, 4), torch.ones(3), torch.ones(3, 3, dtype=torch.int64)):
        with pytest.raises(jaxtyping.TypeCheckError):
            linalg.sandwich(torch.ones(2, 3), wrong)


@given(SIZES, SIZES, st.integers(0, 11), SEEDS)
def test_truncation_is_the_svds(out, n, rank, seed):
    m, r = draw(seed, out, n), min(rank, out, n)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    b, a = linalg.truncate(m, r)
    assert b.shape == (out, r) and a.shape == (r, n)
    torch.testing.assert_close(b @ a, (u[:, :r] * s[:r]) @ vh[:r], rtol=1e-6, atol=1e-6 * float(s[0]))
    assert energy(m - b @ a) == pytest.approx(float(s[r:].square().sum()), rel=1e-8, abs=1e-12 * energy(m))


@given(SIZES, SIZES, SEEDS)
def test_whitened_svd_is_the_cholesky_form(out, n, seed):
    """[W S]_r S⁻¹ with S Sᵀ = X Xᵀ, and Σ of the dropped σ² is the error on the tokens."""
    w, x = draw(seed, out, n), inputs(seed + 7, n, 4 * n + 8)
    low = linalg.whitened_svd(w, x.T @ x)
    s = torch.linalg.cholesky(x.T @ x)
    u, sigma, vh = torch.linalg.svd(w @ s, full_matrices=False)
    k = min(out, n)
    torch.testing.assert_close(low.s[:k], sigma, rtol=1e-6, atol=1e-8 * float(sigma[0]))
    for r in range(k + 1):
        b, a = low.at(r)
        assert torch.equal(b, low.B[:, :r]) or torch.allclose(b, low.B[:, :r])
        textbook = (u[:, :r] * sigma[:r]) @ vh[:r] @ torch.linalg.inv(s)
        scale = energy(x @ w.T)
        assert energy(x @ (w - b @ a).T) == pytest.approx(float(low.tails()[r]), rel=1e-6, abs=1e-10 * scale)
        assert (
            energy(x @ (b @ a - textbook).T) <= 1e-10 * scale or sigma[r - 1] - sigma[r : r + 1].sum() < 1e-3 * sigma[0]
        )


@given(SIZES, SIZES, st.integers(1, 6), SEEDS)
def test_whitened_svd_of_a_singular_gram(out, n, tokens, seed):
    """Fewer tokens than channels, and dead channels: finite, no loss at full rank, exact tails."""
    w, x = draw(seed, out, n), inputs(seed + 3, n, tokens)
    x[:, 0] = 0
    low = linalg.whitened_svd(w, x.T @ x)
    assert torch.isfinite(low.B).all() and torch.isfinite(low.A).all()
    for r in range(min(out, n) + 1):
        b, a = low.at(r)
        error, scale = energy(x @ (w - b @ a).T), energy(x @ w.T)
        assert error == pytest.approx(float(low.tails()[r]), rel=1e-5, abs=1e-9 * scale + 1e-12)


@given(SIZES, SIZES, SEEDS)
def test_two_sided_metric(out, n, seed):
    """tr(G E R Eᵀ) = Σ of the dropped σ², which no other matrix of that rank undercuts (Eckart–Young)."""
    w, x, g = draw(seed, out, n), inputs(seed + 5, n, 3 * n + 5), inputs(seed + 9, out, 3 * out + 5)
    low = linalg.whitened_svd(w, x.T @ x, g.T @ g)
    sigma = torch.linalg.svdvals(torch.linalg.cholesky(g.T @ g).T @ w @ torch.linalg.cholesky(x.T @ x))
    torch.testing.assert_close(low.s, sigma, rtol=1e-6, atol=1e-7 * float(sigma[0]))
    for r in range(len(sigma) + 1):
        error = w - low.B[:, :r] @ low.A[:r]
        assert energy(g @ error @ x.T) == pytest.approx(energy(sigma[r:]), rel=1e-6, abs=1e-9 * energy(sigma))


@given(SIZES, SIZES, st.booleans(), SEEDS)
def test_metric_svd(out, n, back, seed):
    """The same optimum from one eigenproblem, also where only Wᵀ G W of the output's metric is known."""
    w, x, g = draw(seed, out, n), inputs(seed + 5, n, 3 * n + 5), inputs(seed + 9, out, 3 * out + 5)
    gram, metric = x.T @ x, g.T @ g
    low = linalg.metric_svd(w, gram, w.T @ metric @ w if back else metric, back)
    sigma = torch.linalg.svdvals(torch.linalg.cholesky(metric).T @ w @ torch.linalg.cholesky(gram))
    k = len(sigma)
    torch.testing.assert_close(low.s[:k], sigma, rtol=1e-6, atol=1e-5 * float(sigma[0]))
    for r in range(k + 1):
        b, a = low.at(r)
        assert b.shape == (out, r) and a.shape == (r, n)
        error = energy(g @ (w - b @ a) @ x.T)
        assert error == pytest.approx(energy(sigma[r:]), rel=1e-6, abs=1e-8 * energy(sigma))


@given(st.integers(2, 9), st.integers(1, 5), SEEDS)
def test_forward_selection(n, out, seed):
    """Its losses are those of its order; every next input is the best one (one per step where steps ≥ n)."""
    x, w = inputs(seed, n, 3 * n + 4), draw(seed + 1, out, n)
    gram = x.T @ x
    order, loss = selection.select_greedily(gram, w, 1e-10)
    assert sorted(order.tolist()) == list(range(n))
    torch.testing.assert_close(loss, selection.selection_losses(gram, w, order, True, 1e-10), rtol=1e-6, atol=1e-8)
    for r in range(n):
        others = [i for i in range(n) if i not in order[:r].tolist()]
        errors = []
        for i in others:
            kept = torch.tensor([*order[:r].tolist(), i])
            errors.append(energy(x @ w.T - x[:, kept] @ selection.nystrom(gram, kept, w, 1e-10).T))
        assert float(loss[r + 1]) == pytest.approx(min(errors), rel=1e-5, abs=1e-8 * energy(x @ w.T))
    coarse, _ = selection.select_greedily(gram, w, 1e-10, steps=2)
    assert sorted(coarse.tolist()) == list(range(n))


@given(SIZES, SIZES, SEEDS)
def test_output_errors_of_any_factors(out, n, seed):
    w, x = draw(seed, out, n), inputs(seed + 2, n, 9)
    k = min(out, n)
    low = linalg.LowRank(draw(seed + 3, out, k), draw(seed + 4, k, n), torch.ones(k))
    losses = output_errors(w, low, x.T @ x / 9)
    explicit = [energy(x @ (w - low.B[:, :r] @ low.A[:r]).T) / 9 for r in range(k + 1)]
    torch.testing.assert_close(losses, torch.tensor(explicit, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_svd_is_reproducible():
    m = draw(0, 7, 5)
    u, s, vh = linalg.svd(m)
    torch.testing.assert_close(u * s @ vh, m)
    again = linalg.svd(-m)
    torch.testing.assert_close(again[0], u)
    torch.testing.assert_close(again[2], -vh)
    batched = linalg.svd(torch.stack([m, -m]))
    torch.testing.assert_close(batched[0][0], u)


@given(SIZES, SIZES, st.integers(1, 11), st.booleans(), SEEDS)
def test_pivoting_is_lossless_and_bounded(out, n, rank, deficient, seed):
    rank = min(rank, out, n)
    b, a = draw(seed, out, rank), draw(seed + 1, rank, n)
    if deficient:
        b[:, -1] = b[:, 0]
    form = pivots.pivot(b, a)
    w = torch.cat([form.base, form.coefficients @ form.base])[form.order()]
    torch.testing.assert_close(w, b @ a, rtol=1e-8, atol=1e-8)
    assert form.coefficients.numel() == 0 or form.coefficients.abs().max() <= 2 + 1e-9
    assert sorted(form.order().tolist()) == list(range(out))


@given(st.integers(1, 6), st.integers(0, 2), SEEDS)
def test_balanced_truncation(d, missing, seed):
    """tr(left (I − M) right (I − M)ᵀ) = Σ of the dropped s², also for singular moments."""
    a, b = draw(seed, d + 3, d), draw(seed + 1, d + 3, d)
    a[:, :missing] = 0
    p, q, s = linalg.balance((a.T @ a)[None], (b.T @ b)[None])
    for r in range(d + 1):
        rest = torch.eye(d, dtype=torch.float64) - q[0, :, :r] @ p[0, :, :r].T
        error = torch.trace(a.T @ a @ rest @ (b.T @ b) @ rest.T)
        assert float(error) == pytest.approx(energy(s[0, r:]), rel=1e-6, abs=1e-8 * energy(s))


# ---------------------------------------------------------------- selection


@given(st.integers(2, 9), st.integers(1, 5), SEEDS)
def test_nystrom_is_least_squares(n, out, seed):
    x, w = inputs(seed, n, 4 * n), draw(seed + 1, out, n)
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, n // 2)].sort().values
    new = selection.nystrom(x.T @ x, kept, w, damping=0.0)
    torch.testing.assert_close(new, torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 5), st.booleans(), SEEDS)
def test_selection_losses(n, out, refit, seed):
    x, w = inputs(seed, n, 4 * n + 2), draw(seed + 1, out, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    losses = selection.selection_losses(x.T @ x, w, order, refit, 0.0)
    assert len(losses) == n + 1
    for r in range(n + 1):
        kept = order[:r]
        new = selection.nystrom(x.T @ x, kept, w, 0.0) if refit and r else w[:, kept]
        explicit = energy(x @ w.T - x[:, kept] @ new.T)
        assert explicit == pytest.approx(float(losses[r]), rel=1e-6, abs=1e-8 * energy(x @ w.T))


@given(SIZES, st.sampled_from([1e-6, 1e-2, 1.0]), SEEDS)
def test_ridge_leverage(n, ridge, seed):
    gram = inputs(seed, n, 3 * n).T @ inputs(seed, n, 3 * n)
    level = ridge * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    explicit = (gram @ torch.linalg.inv(gram + level)).diagonal()
    torch.testing.assert_close(selection.ridge_leverage(gram, ridge), explicit, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(selection.ridge_leverage(gram * 1e6, ridge), explicit, rtol=1e-5, atol=1e-7)


def test_ridge_leverage_with_raised_damping():
    """The λ in the formula is the one that Cholesky needed."""
    x = inputs(0, 6, 3)
    with pytest.warns(UserWarning, match="damping raised"):
        scores = selection.ridge_leverage(x.T @ x, 0.0)
    assert torch.isfinite(scores).all() and (scores > -1e-3).all() and (scores < 1 + 1e-3).all()
    assert float(scores.sum()) == pytest.approx(3, abs=0.05)  # the Gram's rank


# ---------------------------------------------------------------- factors


@given(SIZES, SEEDS)
def test_root_and_solve(n, seed):
    gram = inputs(seed, n, 2 * n + 2).T @ inputs(seed, n, 2 * n + 2)
    factor = linalg.root(gram, 1e-3)
    torch.testing.assert_close(
        factor @ factor.T, gram + 1e-3 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    )
    x = linalg.solve(gram, draw(seed, n, 2), 1e-3)
    torch.testing.assert_close(factor @ factor.T @ x, draw(seed, n, 2), rtol=1e-6, atol=1e-6)
    s, inverse = linalg.eigh_root(gram)
    torch.testing.assert_close(s @ s.T, gram, rtol=1e-7, atol=1e-9 * float(gram.abs().max()))
    torch.testing.assert_close(inverse @ gram @ inverse.T, torch.eye(n, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_damping_is_raised_with_a_warning_until_it_works():
    x = draw(0, 2, 5)
    with pytest.warns(UserWarning, match="damping raised from 0"):
        factor = linalg.root(x.T @ x - 1e-9 * torch.eye(5, dtype=torch.float64), 0.0)
    assert torch.isfinite(factor).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(linalg.root(torch.zeros(3, 3), 1e-8)).all()
    with pytest.raises(ValueError, match="NaN"):
        linalg.root(torch.full((2, 2), torch.nan), 1e-8)


def test_eigh_root_clamps_what_is_noise():
    x = draw(1, 2, 5)
    gram = x.T @ x - 1e-14 * torch.eye(5, dtype=torch.float64)
    s, inverse = linalg.eigh_root(gram)
    assert (s[:, 2:] == 0).all() and (inverse[2:] == 0).all()
    torch.testing.assert_close(s @ inverse @ gram, gram, rtol=1e-6, atol=1e-8)
    values, vectors = linalg.eigh_descending(gram)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram)


# ---------------------------------------------------------------- hard inputs to solvers


SHAPE = Shape(block=0, hidden=8, heads=4, kv_heads=2, qk=4, v=4, intermediate=12, rotary=4, gated=True)

HARD = {
    "dead": lambda x: x * (torch.arange(x.shape[1]) != 2),
    "constant": lambda x: torch.ones_like(x) * x[:1],
    "zero": lambda x: x * 0,
    "repeated": lambda x: x[:1].repeat(len(x), 1) + 0 * x,
    "duplicate": lambda x: torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1),
    "few": lambda x: x[:3],
    "huge": lambda x: x * 1e12,
    "tiny": lambda x: x * 1e-12,
}


def stats_of(taps: list[Tap], x: Tensor) -> Stats:
    stats = Stats(taps)
    stats.update({t.site: x for t in taps})
    return stats


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize(
    "solver",
    [
        LinearSVD("whitened"), LinearSVD("plain"), LinearSVD("diagonal"), LinearSVD("whitened", form="pivoted"),
        Neurons("leverage"), Neurons("energy"), Neurons("leverage", refit=False), ValuePCA(),
        *find_method("erc-svd").solvers(),
    ],
    ids=repr,
)  # fmt: skip
def test_hard_inputs_give_finite_results(solver, what):
    """Dead neurons, constant or duplicated activations, fewer tokens than channels, any scale: finite everywhere."""
    weights = {r: draw(n, *SHAPE.linear(r)) for n, r in enumerate(SHAPE.roles)}
    units = solver.units(SHAPE)
    if units[0].name in SHAPE.roles:
        units = [Unit(0, "down"), Unit(0, "q")]
    for unit in units:
        n = {"mlp": 12, "down": 12, "q": 8, "vo": 8}[unit.name]
        x = HARD[what](inputs(4, n, 40))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frontier = solver.decompose(unit, weights, stats_of(solver.taps(unit, SHAPE), x), SHAPE)
            for rank in solver.ranks(unit, SHAPE):
                assert 0 <= float(frontier.loss[rank]) < float("inf")
                for edit in solver.truncate(frontier, rank, SHAPE):
                    assert all(torch.isfinite(t).all() for t in edit.tensors.values()), (unit, rank, edit.target)


@pytest.mark.parametrize("what", ["dead", "duplicate", "few", "constant"])
def test_refit_of_singular_neurons_loses_nothing_that_is_not_there(what):
    """Once the kept neurons span the activations, the refitted down projection is exact."""
    solver = Neurons("leverage")
    x = HARD[what](inputs(4, 12, 40))
    down = draw(1, 8, 12)
    rank = int(torch.linalg.matrix_rank(x, rtol=1e-9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frontier = solver.decompose(Unit(0, "mlp"), {"down": down}, stats_of([Tap("down.in", "gram")], x), SHAPE)
        for r in range(rank, 12):
            (edit,) = solver.truncate(frontier, r, SHAPE)
            kept = frontier.factors["order"][:r].sort().values
            error = energy(x @ down.T - x[:, kept] @ edit.tensors["weight"].T) / len(x)
            assert error <= float(frontier.loss[r]) * (1 + 1e-6) + 1e-7 * energy(x @ down.T) / len(x)


def test_residual_in_the_same_metric_is_one_truncation():
    """[W]_a + [W − [W]_a]_b = [W]_{a+b} where both truncations share a metric."""
    x, w = inputs(3, 8, 50), {"q": draw(2, 16, 8)}
    whole = LinearSVD("whitened")
    (staged,) = find_method("erc-svd", {"residual_metric": "whitened", "beta": "0.2"}).solvers()
    (plain,) = find_method("erc-svd", {"residual_metric": "plain", "beta": "0.2"}).solvers()
    unit, shape = Unit(0, "q"), SHAPE
    stats = stats_of(staged.taps(unit, shape), x)
    one, two, three = (s.decompose(unit, w, stats, shape) for s in (whole, staged, plain))
    for rank in list(whole.ranks(unit, shape))[:-1]:
        products = [
            e.tensors["B.weight"] @ e.tensors["A.weight"]
            for s, f in ((whole, one), (staged, two), (plain, three))
            for e in s.truncate(f, rank, shape)
        ]
        torch.testing.assert_close(products[1], products[0], rtol=1e-7, atol=1e-8)
        assert float(two.loss[rank]) == pytest.approx(float(one.loss[rank]), rel=1e-8)
        assert float(three.loss[rank]) >= float(one.loss[rank]) * (1 - 1e-9)
        if rank > 2:
            assert energy(w["q"] - products[2]) < energy(w["q"] - products[0])  # what the plain residual buys
