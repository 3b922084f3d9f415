"""Caches in fewer bits: the numbers that llama.cpp's own types give, and models that attend to nothing else."""

from __future__ import annotations

import pytest
import torch

import planish
from planish.errors import InputError
from planish.export.cache_bits import CacheBits, caching, round_rows
from tiny import build, windows

IDS = windows(2, 24)


def test_rounded_rows_are_those_of_llama_cpp():
    """q8_0 with nearest codes; q4_1, whose own rounding keeps the scale's range as we do."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    from planish.rounding.ggml import dequantise, quantise
    from planish.rounding.types import GGML

    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for bits, name in ((8, "q8_0"), (4, "q4_1")):
        theirs = dequantise(quantise(x, GGML[name]), GGML[name])
        step = (theirs - x).abs().max()
        assert (round_rows(x, bits) - theirs).abs().max() <= 2.1 * step
        assert (round_rows(x, bits) - x).square().mean() <= 1.05 * (theirs - x).square().mean()


@pytest.mark.parametrize(("bits", "row", "size"), [(16, 64, 128), (8, 64, 68), (4, 64, 40), (4, 16, 12), (2, 48, 20)])
def test_bytes(bits, row, size):
    assert CacheBits(bits).count(row) == size


def test_more_bits_lose_less_and_sixteen_nothing():
    x = torch.randn(2, 3, 40, 20, generator=torch.Generator().manual_seed(1))
    for channel in (False, True):
        errors = [
            float((CacheBits(b, channel).round(x, keys=True) - x).square().mean()) for b in (16, 8, 6, 5, 4, 3, 2)
        ]
        assert errors[0] == 0 and errors == sorted(errors)
    by_channel = x * torch.logspace(0, 2, 20)  # channels of very different size: what KIVI is for
    token, channel = (CacheBits(3, c).round(by_channel, keys=True) - by_channel for c in (False, True))
    assert channel[..., 0].square().mean() < 0.1 * token[..., 0].square().mean()
    assert torch.equal(CacheBits(4).round(torch.zeros(1, 1, 3, 5)), torch.zeros(1, 1, 3, 5))
    with pytest.raises(InputError, match="a cache of 7 bits"):
        CacheBits(7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3"])
def test_attention_sees_rounded_keys_and_values_alone(name):
    """By hand: the first block's attention with rounded keys and values; nothing of it stays behind."""
    model, kind, seen = build(name), CacheBits(4), {}
    attention = model.model.layers[0].self_attn
    plain = model(IDS, use_cache=False).logits
    with caching(model, CacheBits(16)):
        assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-5)
    hooks = [
        m.register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out))
        for n, m in attention.named_modules()
        if n
    ]
    hooks.append(attention.o_proj.register_forward_pre_hook(lambda m, a: seen.__setitem__("averaged", a[0])))
    with caching(model, kind):
        rounded = model(input_ids=IDS).logits
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(rounded, plain, atol=1e-3)
    value = kind.round(seen["v_proj"].unflatten(-1, (2, -1)).transpose(1, 2))
    last = value.repeat_interleave(2, 1)[:, :, 0]  # the first token sees itself alone
    assert torch.allclose(seen["averaged"][:, 0], last.flatten(1), atol=1e-5)
    assert torch.equal(model(IDS, use_cache=False).logits, plain)


@pytest.mark.slow
def test_llama_cpp_with_a_rounded_cache_is_as_far_off(tmp_path):
    """`-ctk q8_0 -ctv q8_0`: the distance from its own fp32 cache is of the size that is measured here."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    from planish.export import export
    from planish.export.llama_cpp import LlamaCpp
    from tiny import save

    folder = save(build("llama_gqa", hidden_size=128, num_hidden_layers=2), tmp_path / "model")
    export(folder, "gguf", tmp_path / "m.gguf", dtype="f32")
    model = planish.load(folder, dtype="float32")
    with torch.no_grad():
        plain = model(IDS[:1]).logits[0]
        for bits, name in ((8, "q8_0"), (4, "q4_1")):
            with caching(model, CacheBits(bits)):
                ours = model(input_ids=IDS[:1]).logits[0]
            theirs = LlamaCpp(tmp_path / "m.gguf", 64, cache=name).logits(IDS[0])
            ratio = (theirs - plain).square().mean() / (ours - plain).square().mean()
            assert 0.3 < float(ratio) < 3
