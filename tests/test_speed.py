"""Sanity of the measurements; nothing here depends on how fast the machine is."""

import dataclasses
import json

import pytest
import torch

from planish.errors import InputError
from planish.evaluate.speed import bench, kv_bytes


def test_what_is_measured(tiny_llama):
    models = {"dense": tiny_llama(), "fewer kv heads": tiny_llama(num_key_value_heads=1).bfloat16().train()}
    calls = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda m, args, name=name: calls.append(name))
    seen = []
    got = bench(
        models,
        batch_sizes=(1, 3),
        prompt_len=10,
        new_tokens=4,
        repeats=3,
        device="cpu",
        progress=lambda *n: seen.append(n),
    )

    assert [(s.model, s.batch_size) for s in got] == [(n, b) for b in (1, 3) for n in models]
    for s in got:
        heads, size = (2, 4) if s.model == "dense" else (1, 2)
        assert s.kv_bytes == 2 * 2 * s.batch_size * heads * 14 * 8 * size  # k and v, blocks, batch, heads, 10 + 4, dim
        assert s.weight_bytes >= size * sum(p.numel() for p in models[s.model].parameters())
        assert s.peak_bytes >= s.weight_bytes
        for spread in (s.prefill_tokens_per_s, s.decode_tokens_per_s, s.time_to_first_token_s):
            assert 0 < spread.low <= spread.median <= spread.high and len(spread.values) == 3
        assert s.prefill_tokens_per_s.median * s.time_to_first_token_s.median == pytest.approx(s.batch_size * 10)
        assert (s.device, s.compiled) == ("cpu", False)
    assert [s.dtype for s in got[:2]] == ["float32", "bfloat16"]
    json.dumps([dataclasses.asdict(s) for s in got])

    runs = calls[::5]  # a run is one prefill and four decode passes
    a, b = models
    assert runs == [a, a, b, b, *[a, b] * 3] * 2  # in turns
    assert seen == [(i + 1, 20) for i in range(20)]
    assert not models["dense"].training and models["fewer kv heads"].training


def test_shared_and_absent_tensors_count_once(tiny_llama):
    out = tiny_llama()(torch.zeros(1, 5, dtype=torch.long), use_cache=True)
    layers = out.past_key_values.layers
    once = kv_bytes(out.past_key_values)
    layers[1].values = layers[1].keys
    assert kv_bytes(out.past_key_values) == once * 3 // 4
    layers[0].keys = layers[0].values = None
    assert kv_bytes(out.past_key_values) == once // 4


@pytest.mark.slow
def test_compiled(tiny_llama):
    (got,) = bench({"m": tiny_llama()}, batch_sizes=(2,), prompt_len=8, new_tokens=3, repeats=1, compile=True)
    assert got.compiled and got.kv_bytes == 2 * 2 * 2 * 2 * 11 * 8 * 4


@pytest.mark.parametrize("bad", [{"prompt_len": 0}, {"new_tokens": 0}, {"repeats": 0}, {"batch_sizes": (1, 0)}])
def test_numbers_below_one(tiny_llama, bad):
    with pytest.raises(InputError, match=f"got {next(iter(bad))} 0 · expected 1 or more"):
        bench({"m": tiny_llama()}, **bad)


def test_other_errors(tiny_llama):
    with pytest.raises(InputError, match=r"m · got 60 \+ 5 · expected at most max_position_embeddings 64"):
        bench({"m": tiny_llama()}, prompt_len=60, new_tokens=5)
    with pytest.raises(InputError, match="no model"):
        bench({})
    with pytest.raises(InputError, match="number of batch_sizes 0"):
        bench({"m": tiny_llama()}, batch_sizes=())
