"""Storage types and rounding: against naive programs, the libraries' own numbers, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.errors import InputError
from planish.rounding import ggml, integers
from planish.rounding import round as rounding
from planish.rounding.round import Metric, read, round_matrix
from planish.rounding.types import GGML, TYPES, choose, find_type, integer

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
SMALL = [n for n, t in GGML.items() if t.group == 32]


def make(seed: int, out: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) and a second moment (in, in) of correlated inputs of unequal size."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=draw, dtype=torch.float64) @ torch.randn(
        n, n, generator=draw, dtype=torch.float64
    )
    x *= torch.rand(n, generator=draw, dtype=torch.float64).mul(3).exp()
    return torch.randn(out, n, generator=draw).to(dtype), x.T @ x / len(x)


def cost(error: torch.Tensor, moment: torch.Tensor) -> float:
    return float(torch.trace(error.double() @ moment @ error.double().T))


# ------------------------------------------------------------------ oracles


@pytest.mark.parametrize("name", ["int4-32-asym", "int3-32", "int2-32-asym"])
def test_feedback_is_gptq(name):
    """The textbook: a Cholesky factor of the inverse, and after every column an update of all later ones."""
    kind, (w, moment) = find_type(name), make(0, 6, 96)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(96)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, want, grid = w.double().clone(), torch.zeros(6, 96, dtype=torch.float64), None
    for j in range(96):
        if j % 32 == 0:
            weights = 1 / upper.diagonal()[j : j + 32].square()
            grid = integers.search(left[:, None, j : j + 32], weights[None], kind, torch.float32)
        codes = integers.nearest(left[:, j : j + 1], grid.zero, grid.scale, kind)
        want[:, j] = integers.multiply(codes, grid.zero, grid.scale, torch.float32)[:, 0]
        left[:, j:] -= torch.outer((left[:, j] - want[:, j]) / upper[j, j], upper[j, j:])
    got = rounding.feed_groups(w, kind, rounding.upper_root(moment, 0.01), torch.float32)
    assert torch.equal(got.value.double(), want)


def test_act_order_is_gptq_by_falling_energy():
    kind, (w, moment) = find_type("int3-32-asym"), make(1, 5, 64)
    grid = integers.search(w.unflatten(1, (-1, 32)), rounding.blocks_of(moment, kind, 64), kind, torch.float32)
    order = moment.diagonal().argsort(descending=True)
    damped = (moment + 0.01 * moment.diagonal().mean() * torch.eye(64))[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, want = w.double()[:, order], torch.zeros(5, 64, dtype=torch.float64)
    for j, at in enumerate(order.tolist()):
        scale, zero = grid.scale[:, at // 32].double(), grid.zero[:, at // 32].double()
        want[:, at] = ((left[:, j] / scale + zero).round().clamp(-4, 3) - zero) * scale
        left[:, j:] -= torch.outer((left[:, j] - want[:, at]) / upper[j, j], upper[j, j:])
    got = list(rounding.round_with_feedback(w, kind, moment, 0.01, torch.float32))[1]
    assert torch.allclose(got.value.double(), want, atol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_nearest_takes_every_groups_best_range(zero):
    """Group by group, range by range, with the errors' own second moment."""
    kind, (w, moment) = integer(3, 32, zero), make(2, 4, 64)
    groups = w.unflatten(1, (-1, 32))
    grid = integers.search(groups, rounding.blocks_of(moment, kind, 64), kind, torch.float32)
    codes = integers.nearest(groups, grid.zero[..., None], grid.scale[..., None], kind).flatten(1)
    got = rounding.draft_integers(codes, grid, kind, torch.float32)
    for r in range(4):
        for at in (0, 32):
            part, block = w[r, at : at + 32].double(), moment[at : at + 32, at : at + 32]
            low, high = min(float(part.min()), 0), max(float(part.max()), 0)
            least = np.inf
            for share in np.linspace(1, 0.45, 12):
                step = (high - low) * share / 7 if zero else max(high / 3.5, -low / 4.5) * share
                step = float(torch.tensor(step).half())
                shift = min(max(round(-4 - low * share / step), -4), 3) if zero else 0
                error = part - ((part / step + shift).round().clamp(-4, 3) - shift) * step
                least = min(least, float(error @ block @ error))
            own = part - got.value[r, at : at + 32].double()
            assert float(own @ block @ own) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0"])
def test_blocks_are_the_gguf_librarys(name):
    gguf, (w, _) = ggml.load_gguf(), make(3, 8, 96)
    number = ggml.find_number(GGML[name])
    want = gguf.quants.quantize(w.numpy(), number)
    got = round_matrix(w, GGML[name])
    assert np.array_equal(got.stored["weight_ggml"].numpy(), want)
    assert np.array_equal(got.value.numpy(), gguf.quants.dequantize(want, number))


@pytest.mark.parametrize("name", list(ggml.FIELDS))
def test_codes_are_put_where_they_are_read(name):
    kind = GGML[name]
    block = ggml.quantise(make(4, 3, kind.group)[0], kind)
    levels = ggml.Levels(block, kind)
    codes = torch.randint(levels.low, levels.high + 1, (3, kind.group), generator=torch.Generator().manual_seed(0))
    value = ggml.dequantise(ggml.put_codes(block, kind, codes), kind).double()
    for j in range(kind.group):
        back, same = levels.pick(value[:, j], j)
        assert torch.allclose(same, value[:, j], rtol=1e-5, atol=1e-9)
        flat = torch.isclose(
            ggml.dequantise(ggml.fill(block, kind, 1), kind), ggml.dequantise(ggml.fill(block, kind, 2), kind)
        )
        assert torch.equal(back[~flat[:, j]], codes[:, j][~flat[:, j]])


def test_nats_are_half_the_trace_in_both_metrics():
    (w, moment), (_, gradient) = make(5, 32, 64), make(6, 1, 32)
    got = round_matrix(w, find_type("int3"), Metric(moment, gradient))
    error = w.double() - got.value.double()
    assert got.nats == pytest.approx(0.5 * float(torch.trace(gradient @ error @ moment @ error.T)))
    assert got.error == pytest.approx(cost(error, moment) / cost(w, moment))


# ------------------------------------------------------------------ laws


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([*(n for n, t in TYPES.items() if t.kind == "integer" and t.group == 32), *SMALL]),
    st.integers(1, 12), st.integers(1, 4), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1.0, 1e-6, 1e3]), st.booleans(),
)  # fmt: skip
def test_laws(name, out, groups, seed, dtype, size, holes):
    """Feedback loses no more than rounding to nearest, what is stored is what is counted and reads back, no NaN."""
    kind, (w, moment) = TYPES[name], make(seed, out, 32 * groups)
    w = (w * size).to(dtype)
    if holes:  # dead inputs and weights of zero
        moment[::3], moment[:, ::3] = 0, 0
        w[0], w[:, :32] = 0, 0
    plain = round_matrix(w, kind, Metric(moment), feedback=False)
    best = round_matrix(w, kind, Metric(moment))
    for found in (plain, best):
        assert found.value.dtype == dtype and bool(found.value.isfinite().all())
        assert found.bytes == kind.count(*w.shape)
        assert torch.equal(read(found.stored, kind, dtype), found.value)
    assert cost(w - best.value, moment) <= cost(w - plain.value, moment) * (1 + 1e-9)
    if kind.kind == "integer" and size == 1 and (kind.bits < 8 or dtype == torch.float32):
        again = round_matrix(best.value, kind, Metric(moment))
        assert again.exact and again.error == 0 and torch.equal(again.value, best.value)


@pytest.mark.parametrize("name", ["q6_K", "q4_K", "iq4_xs", "q3_K", "q2_K", "iq3_s"])
def test_feedback_helps_on_blocks_of_256(name):
    w, moment = make(7, 8, 512)
    plain, best = (round_matrix(w, GGML[name], Metric(moment), feedback=f) for f in (False, True))
    assert best.how == "feedback" and best.error < 0.95 * plain.error
    assert torch.equal(read(best.stored, GGML[name]), best.value)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0"])
def test_what_lies_on_a_grid_of_llama_cpp_is_left_alone(name):
    on = round_matrix(make(8, 4, 64)[0], GGML[name]).value
    assert round_matrix(on, GGML[name], Metric(make(9, 1, 64)[1])).exact


def test_codes_pack_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    for bits in (8, 4, 3, 2):
        kind, low = integer(bits, 32, True), 2 ** (bits - 1)
        codes = torch.randint(-low, low, (5, 96), generator=draw)
        zero = torch.randint(-low, low, (5, 3), generator=draw).float()
        grid = integers.Grid(torch.rand(5, 3, generator=draw).half(), zero)
        back, same = integers.unpack(integers.pack(codes, grid, kind), kind)
        assert torch.equal(back.long(), codes) and torch.equal(same.zero, zero) and torch.equal(same.scale, grid.scale)


# ------------------------------------------------------------------ what is asked, and what is wrong


def test_bits_are_types_that_hold_the_width():
    names = {(b, t, n): choose(b, t).pick(n, "").name for b, t, n in [
        (4, "any", 576), (4, "hf", 459), (4, "vllm", 96), (4, "gguf", 576), (4, "gguf", 1536), (3, "gguf", 512), (8, "gguf", 96),
        ("int3-128", "hf", 256), ("IQ4_XS", "gguf", 256),
    ]}  # fmt: skip
    assert list(names.values()) == [
        "int4-64-asym", "int4-51-asym", "int4-32-asym", "iq4_nl", "q4_K", "q3_K", "q8_0", "int3-128", "iq4_xs",
    ]  # fmt: skip
    assert choose(16, "onnx") is None
    assert choose(4, "gguf").step(1536) == 256 and choose(4, "gguf").step(96) == 32


@pytest.mark.parametrize(
    ("bits", "target", "n", "words"),
    [
        ("q4_K", "gguf", 576, "q_proj: its rows of 576 weights do not divide into the groups of 256 that q4_K has"),
        (4, "gguf", 100, "q_proj: no type of llama.cpp holds rows of 100 weights"),
        (4, "hf", 67, "q_proj: rows of 67 weights do not divide into groups"),
        ("q4_K", "hf", 256, "--target hf cannot hold q4_K: ask for it with --target gguf"),
        ("int4", "gguf", 256, "--target gguf cannot hold int4-64: ask for it with --target any, hf or vllm"),
        ("int3", "vllm", 256, "--target vllm cannot multiply int3-64"),
        (3, "vllm", 256, "--bits 3 --target vllm: expected 16, 8, 4, a mean like 4.5 or a type's name"),
        (7, "any", 256, "--bits 7 --target any: expected 16, 8, 4, 3, 2, a mean like 2.5 or a type's name"),
        (4, "onnx", 256, "--target onnx has no rounded weights"),
        ("q9_Z", "gguf", 256, "unknown type 'q9_Z'; expected int8"),
    ],
)
def test_what_cannot_be_held_is_said(bits, target, n, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        choose(bits, target).pick(n, "q_proj")


def test_numbers_that_cannot_be_rounded_are_said():
    with pytest.raises(InputError, match="up_proj holds NaN or infinity: nothing to round"):
        round_matrix(torch.full((2, 64), torch.nan), find_type("int4"), where="up_proj")
    with pytest.raises(InputError, match="too large for float16"):
        round_matrix(torch.full((2, 64), 1e8), find_type("int4"))
    with pytest.raises(InputError, match="in q4_0 is not finite"):
        round_matrix(torch.full((2, 64), 1e8), find_type("q4_0"))
    with pytest.raises(InputError, match="rows of 48 weights do not divide into the groups of 64"):
        round_matrix(torch.ones(2, 48), find_type("int4"))
    stored = round_matrix(torch.randn(2, 64), find_type("int4")).stored
    stored["weight_scale"] = torch.full_like(stored["weight_scale"], torch.nan)
    with pytest.raises(InputError, match="scales that are NaN or infinite"):
        read(stored, find_type("int4"))
