"""Pivoted linears: the same map as the pair they come from, in r(m + n − r) numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.methods import find_method
from planish.modelling.blocks import build_linear
from planish.modelling.modules import Fused, FusedRows, Pivoted
from planish.solvers.forms import low_rank_edit
from planish.solvers.pivots import _find_pivots, pivot
from tiny import compress, load

SHAPES = [(12, 30, 5), (30, 12, 5), (16, 16, 8), (40, 24, 1), (9, 30, 8), (64, 64, 33)]  # out, in, rank


def factors(out: int, n: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=g, dtype=torch.float64) for size in ((out, rank), (rank, n)))


def build(b: Tensor, a: Tensor, dtype: torch.dtype = torch.float64, bias: Tensor | None = None) -> Pivoted:
    edit = low_rank_edit("q", b, a, "pivoted")
    stock = nn.Linear(a.shape[1], b.shape[0], bias=bias is not None, dtype=dtype)
    if bias is not None:
        stock.bias.data = bias.to(dtype)
    module = build_linear(edit.form, stock)
    missing = module.load_state_dict(
        {k: t.to(dtype) if t.is_floating_point() else t for k, t in edit.tensors.items()}, strict=False
    )
    assert set(missing.missing_keys) <= {"bias"} and not missing.unexpected_keys
    return module.requires_grad_(False)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_map_as_the_pair(shape, dtype, tolerance):
    b, a = factors(*shape)
    bias = torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    module = build(b, a, dtype, bias)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert relative(module(x), x.double() @ (b @ a).T + bias) < tolerance
    assert relative(module.dense(), b @ a) < tolerance
    assert module(x[:0]).shape == (0, 3, shape[0])
    out, n, rank = shape
    assert module.P.weight.numel() + module.C.weight.numel() == rank * (out + n - rank)
    assert sorted(module.order.tolist()) == list(range(out))


def hard(kind: str) -> tuple[Tensor, Tensor]:
    b, a = factors(48, 30, 20)
    if kind == "rank-deficient":
        b[:, 3:7] = 0
        a[11] = a[12]
    elif kind == "repeated rows":
        b[10:40] = b[0]
    elif kind == "scales":
        b *= 10.0 ** -torch.arange(20)
        a *= 10.0 ** torch.arange(20)[:, None]
    elif kind == "ill-conditioned":
        a *= 10.0 ** -torch.arange(20)[:, None]
    elif kind == "zero":
        b *= 0
    else:  # elimination with partial pivoting grows 2^r here
        b = torch.cat([torch.eye(40) - torch.ones(40, 40).tril(-1), torch.ones(3, 40)]).double()
        b[:40, -1] = 1
        a = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return b, a


@pytest.mark.parametrize("kind", ["rank-deficient", "repeated rows", "scales", "ill-conditioned", "zero", "growth"])
def test_lossless_with_bounded_coefficients_on_hard_factors(kind):
    """Each row to the rounding of its own pair; no coefficient beyond the bound, so nothing blows up in bf16."""
    b, a = hard(kind)
    p = pivot(b, a)
    w = torch.cat([p.base, p.coefficients @ p.base])[p.order()]
    scale = (b.abs() @ a.abs()).amax() + 1e-300
    assert float((w - b @ a).abs().amax() / scale) < 1e-13
    assert float(p.coefficients.abs().max()) <= 2 + 1e-9


def test_bound_holds_where_elimination_alone_exceeds_it():
    """Swaps matter: over many draws LU alone leaves coefficients above the bound in some."""
    largest = 0.0
    for seed in range(20):
        b, a = factors(60, 5, 30, seed)
        assert float(pivot(b, a).coefficients.abs().max()) <= 2 + 1e-9
        largest = max(largest, float(pivot(b, a, bound=1e9).coefficients.abs().max()))
    assert largest > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_square_bases_have_the_same_pivots(shape):
    """As accelerators factorise them."""
    b, _ = factors(*shape)
    plain, square = (_find_pivots(b, 2.0, square) for square in (False, True))
    assert torch.equal(plain[0], square[0]) and torch.equal(plain[1], square[1])
    torch.testing.assert_close(plain[2], square[2], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(square[2] @ b[square[0]], b[square[1]], rtol=1e-9, atol=1e-9)


def test_pivots_do_not_depend_on_scales():
    """B T, T⁻¹ A with an upper triangular T is the same map with columns scaled and mixed into later ones."""
    b, a = factors(24, 18, 7)
    gauge = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).triu(1)
    gauge += torch.diag(10.0 ** torch.arange(-3, 4))
    one, two = pivot(b, a), pivot(b @ gauge, torch.linalg.solve(gauge, a))
    assert torch.equal(one.pivots, two.pivots)
    assert torch.allclose(one.coefficients, two.coefficients) and torch.allclose(one.base, two.base)


def test_gradients_and_inside_a_fused_linear():
    modules = {r: build(*factors(out, 12, 3, seed=out)) for r, out in (("gate", 10), ("up", 14))}
    fused = Fused(modules, FusedRows("rows", []))
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    dense = torch.cat([m.dense() for m in modules.values()])
    fused(x).square().sum().backward()
    assert torch.allclose(fused(x), x @ dense.T) and torch.allclose(x.grad, 2 * (x @ dense.T) @ dense)


@pytest.mark.slow
def test_compiles_in_one_graph():
    module = build(*factors(24, 16, 6), torch.float32)
    x = torch.randn(3, 16)
    assert torch.allclose(torch.compile(module, fullgraph=True)(x), module(x), atol=1e-5)


@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gpt_neox"])
def test_saved_and_loaded_bit_for_bit(family, tmp_path):
    """Fused families and biases too; the same plan as pairs counts more weights for the same ranks."""
    model = tiny.build(family)
    result = compress(
        model, output=tmp_path / "a", keep=0.7, method=find_method("svd", {"form": "pivoted"}), windows=tiny.windows(4)
    )
    one, two = load(tmp_path / "a"), load(tmp_path / "a")
    pivoted = [m for m in one.modules() if isinstance(m, Pivoted)]
    assert pivoted and 0.69 < result.keep <= 0.7
    ids = tiny.windows(2, 9)
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)
    one.save_pretrained(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b")(input_ids=ids).logits, two(input_ids=ids).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(ids, **greedy), one.generate(ids, use_cache=False, **greedy))
