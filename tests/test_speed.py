"""Sanity of the measurements; nothing here depends on how fast the machine is."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import tiny
from planish.cli import app
from planish.errors import InputError
from planish.evaluate.speed import bench, kv_bytes
from tiny import compress, load


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
    assert seen == [(i, 20) for i in range(21)]
    assert not models["dense"].training and models["fewer kv heads"].training


def test_shared_and_absent_tensors_count_once(tiny_llama):
    out = tiny_llama()(torch.zeros(1, 5, dtype=torch.long), use_cache=True)
    layers = out.past_key_values.layers
    once = kv_bytes(out.past_key_values)
    layers[1].values = layers[1].keys
    assert kv_bytes(out.past_key_values) == once * 3 // 4
    layers[0].keys = layers[0].values = None
    assert kv_bytes(out.past_key_values) == once // 4


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile traces, and runs what it traced without a compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kw: compile(model, backend="eager", fullgraph=True, **kw))
    torch._dynamo.reset()


def measure_compiled(models, **kw):
    return bench(models, batch_sizes=(2,), prompt_len=8, new_tokens=3, repeats=1, compile=True, **kw)


def test_compiled(tiny_llama, eager_backend):
    """Steps are one graph for all models and runs, over a cache as long as the run."""
    models = {"m": tiny_llama(), "n": tiny_llama(intermediate_size=40)}
    torch._dynamo.utils.counters.clear()
    for got in measure_compiled(models):
        assert got.compiled and got.compile_s > 0 and not got.note
        assert got.kv_bytes == 2 * 2 * 2 * 2 * 11 * 8 * 4 + 2 * 8  # and how long each block's is
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(models)


@pytest.mark.parametrize(("more", "compiled"), [([], True), (["--no-compile"], False)])
def test_the_command_compiles_unless_told_otherwise(more, compiled, tiny_llama, tmp_path, eager_backend):
    tiny_llama().save_pretrained(tmp_path)
    asked = ["--batch-size", "1", "--prompt-len", "4", "--new-tokens", "2", "--repeats", "1", "--json"]
    result = CliRunner().invoke(app, ["bench", str(tmp_path), *asked, *more])
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["runs"]
    assert (row["compiled"], row["note"]) == (compiled, "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inductor's own
def test_compiled_to_machine_code(tiny_llama):
    (got,) = measure_compiled({"m": tiny_llama()})
    assert got.compiled


def test_what_cannot_be_compiled_is_measured_as_it_is(tiny_llama, monkeypatch):
    """No compiler, or a cache that has to grow."""

    def refuse(model, **kw):
        def call(**given):
            raise RuntimeError("No working C++ compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    (got,) = measure_compiled({"m": tiny_llama()})
    assert (got.compiled, got.compile_s, got.note) == (False, None, "No working C++ compiler found")
    assert got.decode_tokens_per_s.median > 0 and got.kv_bytes == 2 * 2 * 2 * 2 * 11 * 8 * 4


def test_latent_keys_are_measured_as_they_are(tmp_path, eager_backend):
    """Their cache has to grow."""
    compress(tiny.build("llama_gqa"), output=tmp_path / "m", method="palu", kv_keep=0.7, windows=tiny.windows(8, 24))
    (got,) = measure_compiled({"m": load(tmp_path / "m")})
    assert not got.compiled and "needs a cache that grows" in got.note


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
