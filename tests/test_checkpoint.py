"""Compressed folders: they load with stock calls, generate with every cache, and hold what was counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compressed
import tiny
from planish.apply import apply_edits
from planish.calibrate.losses import compute_logits
from planish.calibrate.stream import Stream
from planish.core import Edit, Unit
from planish.export.dense import export_dense
from planish.folder.source import MemorySource, open_folder, open_source
from planish.manifest import Result
from planish.methods import find_method, list_methods
from planish.methods.method import Method
from planish.modelling.attentions import Attention
from planish.modelling.blocks import find_blocks, get_linear
from planish.plan.planned import Planned
from planish.solvers.forms import value_edits
from tiny import compress, load

WINDOWS = tiny.windows(8, 24)
EOS = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
CUTS = [(method, f) for method in ("flat-llm", "svd-llm", "blockpruner") for f in tiny.MORE]
CUTS += [(method, f) for method in ("flat-llm", "svd-llm", "auto") for f in tiny.HYBRIDS]
CUTS += [(method, f) for method in ("flat-llm", "a3") for f in tiny.OTHERWISE]
CUTS += [(method, f) for method in ("flat-llm", "svd-llm") for f in tiny.STOCK]
CUTS += [("flat-llm", f) for f in tiny.NAMES] + [
    (method, family)
    for method, family in (
        ("svd-llm", "qwen2"), ("svd-llm", "phi3"), ("a3", "llama_gqa"), ("a3", "gemma2"), ("a3", "opt"),
        ("a3", "phi3_partial"), ("a3", "gpt_neox"), ("auto", "llama_bias"), ("llm-drop", "llama_gqa"),
        ("llm-drop", "gemma3"), ("llm-drop", "opt"), ("subfit", "qwen2"), ("subfit", "opt"), ("shortgpt", "mistral"),
    )
    if method in list_methods()
]  # fmt: skip
SOME = [c for c in CUTS if c[1] in (*tiny.CORE, "gemma3", "llama_bias") or c[0] not in ("flat-llm", "blockpruner")]
SOME = [c for c in SOME if c[1] not in tiny.RARE + tiny.OTHERWISE and c not in [("auto", f) for f in tiny.HYBRIDS]]
FEW = [("flat-llm", f) for f in (*tiny.CORE, "gemma3")] + [("a3", "llama_gqa"), ("a3", "phi3_partial")]
FEW += [("svd-llm", f) for f in ("phi3", "lfm2", "qwen3_next", "nemotron_h")] + [
    ("auto", "llama_bias"),
    ("llm-drop", "gemma3"),
]
FEW += [("subfit", "qwen2"), ("subfit", "opt"), ("shortgpt", "mistral")]
ALL = tiny.pick(FEW, CUTS)


@dataclass(frozen=True)
class Custom(Method):
    """FLAT-LLM's solvers under a plan given by hand: one rank for all units of a name."""

    ranks: tuple[tuple[str, int], ...] = ()

    def solvers(self):
        return find_method("flat-llm").solvers()

    def plan(self, problem, measure) -> Planned:
        ranks = dict(self.ranks)
        return self.decide(problem, {u: ranks.get(u.name, problem.full(u)) for u in problem.units})


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[[str, str], tuple[Path, Result]]:
    """(folder, result) of a method on a tiny family, compressed once."""
    done: dict[tuple[str, str], tuple[Path, Result]] = {}

    def make(method: str, family: str) -> tuple[Path, Result]:
        if (method, family) not in done:
            folder = tmp_path_factory.mktemp("made") / f"{method}-{family}"
            model = tiny.build(family)
            # whole submodules are large steps
            keep = 0.65 if method in ("llm-drop", "shortgpt", "subfit", "nbl", "blockpruner") else 0.75
            done[method, family] = folder, compress(model, output=folder, keep=keep, method=method, windows=WINDOWS)
        return done[method, family]

    return make


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = WINDOWS, **kw: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **kw).logits


# ---------------------------------------------------------------- our attention is the stock one


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", tiny.each(tiny.NAMES + tiny.MORE + tiny.HYBRIDS + tiny.OTHERWISE))
def test_uncut_attention_is_the_stock_one(family, attention):
    """Masks, windows, soft caps, norms, rotation and scale of every family, with nothing cut away."""
    if family in ("mpt", "gpt_oss") and attention == "sdpa":
        pytest.skip("the stock class has no sdpa")
    model = tiny.build(family, attn_implementation=attention)
    capped = family == "gemma2" and attention == "sdpa"
    with pytest.warns(UserWarning, match="calibrated with eager attention") if capped else nullcontext():
        stream = Stream(MemorySource(model), WINDOWS)
    hidden = stream.start()
    for i in range(len(stream)):
        block, shape = stream.block(i), stream.source.shape(i)
        if not shape.heads:
            hidden = stream.run(i, block, hidden)
            continue
        v, o = (get_linear(block, stream.family, r) for r in "vo")
        edits = value_edits(v.weight, o.weight, v.bias, shape.v)
        edits[-1] = Edit("attention", {"kind": "own", "v": shape.v, "qk": shape.qk}, {})
        apply_edits(block, edits, stream.family, stream.source.config, shape)
        assert isinstance(block.get_submodule(stream.family.attention), Attention)
        ours, hidden = stream.run(i, block, hidden), stream.run(i, stream.block(i), hidden)
        torch.testing.assert_close(ours[0], hidden[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", [6, 8, 10])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "keys"), [(torch.float32, 5), (torch.float64, 40), (torch.bfloat16, 1030)])
def test_one_query_is_attended_as_many_are(dtype, keys, masked, v):
    """On the CPU a single query goes another way than transformers' filled-up heads and repeated keys; v of 6, 8, 10, qk 8."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, d, generator=generator).to(dtype)
        for heads, n, d in ((6, 1, 8), (2, keys, 8), (2, keys, v))
    )
    mask = torch.rand(2, 1, 1, keys, generator=generator) < 0.6 if masked else None
    module = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa"), softcap=None, num_key_value_groups=3, training=False, is_causal=True
    )  # fmt: skip
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attend, *states = Attention.level(module, stock, query, key, value)
    assert (attend is stock) == (dtype == torch.bfloat16 and v == 8)
    ours = attend(module, *states, mask, scaling=0.3)[0][..., :v]
    wide = [x.double() for x in (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))]
    scores = wide[0] @ wide[1].mT * 0.3
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    want = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), want, rtol=near, atol=near)
    many = Attention.level(module, stock, query.repeat(1, 1, 2, 1), key, value)
    assert many[0] is stock and len({x.shape[-1] for x in many[1:]}) == 1


# ---------------------------------------------------------------- loading


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), ALL)
def test_auto_classes_and_saving_again(method, family, made, tmp_path):
    folder, result = made(method, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    assert not model.training and torch.isfinite(expected).all()
    assert torch.equal(expected, logits(load(folder)))
    base, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    hidden = base(input_ids=WINDOWS, use_cache=False).last_hidden_state
    inner = model.model if model.base_model is model else model.base_model  # llama4's prefix is that of its wrapper
    assert torch.equal(hidden, inner(input_ids=WINDOWS, use_cache=False).last_hidden_state)

    model.save_pretrained(tmp_path / "again")
    assert torch.equal(expected, logits(load(tmp_path / "again")))
    kept = {"auto_map", "planish", "model_type", "architectures"} & set(read_config(folder))
    assert {k: read_config(folder)[k] for k in kept} == {k: read_config(tmp_path / "again")[k] for k in kept}
    if result.format != "native":
        assert {p.name for p in (tmp_path / "again").glob("*.py")} == {p.name for p in folder.glob("*.py")}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", tiny.CORE)
def test_per_layer_config_describes_the_blocks(family, made, capfd):
    folder, _ = made("flat-llm", family)
    config, row = AutoConfig.from_pretrained(folder), MemorySource(tiny.build(family)).family
    for i, block in enumerate(find_blocks(load(folder), row)):
        assert getattr(config.per_layer_config[i], row.intermediate) == get_linear(block, row, "down").in_features
    assert config.to_dict()["per_layer_config"] and config.to_diff_dict() and repr(config)
    assert "per-layer" not in capfd.readouterr().err


REMOTE = """
import importlib.abc, json, sys, torch

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "planish":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folders, out = json.loads(sys.argv[1]), sys.argv[2]
ids = torch.load(out + "/ids.pt")
found = {}
for name, folder in folders.items():
    kw = {"trust_remote_code": True}
    AutoConfig.from_pretrained(folder, **kw)
    AutoModel.from_pretrained(folder, **kw)
    model = AutoModelForCausalLM.from_pretrained(folder, **kw)
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits
        tokens = model.generate(ids[:2, :10], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(out + "/again-" + name)
    again = AutoModelForCausalLM.from_pretrained(out + "/again-" + name, **kw)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, found[name]), name
assert "planish" not in sys.modules
torch.save(found, out + "/logits.pt")
"""


def test_folders_carry_their_own_code(made, tmp_path):
    """Where planish is not installed: AutoConfig, AutoModel and AutoModelForCausalLM with trust_remote_code, quietly."""
    names = (
        ("flat-llm", "gemma3"),
        ("flat-llm", "gpt_neox"),
        ("svd-llm", "phi3"),
        ("a3", "llama_gqa"),
        ("subfit", "qwen2"),
    )
    cuts = [c for c in SOME if c in names or c == ("llm-drop", "gemma3")]
    folders = {f"{m}-{f}": str(made(m, f)[0]) for m, f in cuts}
    torch.save(WINDOWS, tmp_path / "ids.pt")
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    kernels = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    environment |= {n: os.environ[n] for n in kernels if n in os.environ}  # or the bits differ from this process's
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, json.dumps(folders), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("per-layer", "newly initialized", "MISSING", "MISMATCH"):
        assert word not in done.stderr, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    for m, f in cuts:
        assert torch.equal(found[f"{m}-{f}"], logits(load(made(m, f)[0]))), (m, f)


@pytest.mark.parametrize(
    "family",
    [n for n in tiny.NAMES + tiny.HYBRIDS if n not in ("mpt", "qwen3_5_moe")],  # the latter has experts everywhere
)  # mpt: whole multiples of the width only
def test_uniform_neurons_load_with_stock_classes(family, tmp_path):
    model = tiny.build(family)
    result = compress(model, output=tmp_path / "out", keep=0.8, method=Custom((("mlp", 28),)), windows=WINDOWS)
    config = read_config(tmp_path / "out")
    assert result.format == "native"
    assert not {"auto_map", "planish", "per_layer_config"} & set(config) and not list(tmp_path.glob("out/*.py"))
    assert config["architectures"] == [type(model).__name__]
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(model) and not any(
        found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    assert 28 in (
        getattr(loaded.config, k, 0) for k in ("intermediate_size", "ffn_dim", "n_inner", "shared_intermediate_size")
    )
    assert torch.isfinite(logits(loaded)).all()


def test_width_that_the_stock_class_cannot_name_is_ours(tmp_path):
    """mpt's configuration knows whole multiples of the hidden size only: nothing else may pass for native."""
    result = compress(
        tiny.build("mpt"), output=tmp_path / "out", keep=0.8, method=Custom((("mlp", 28),)), windows=WINDOWS
    )
    assert result.format == "planish"
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


# ---------------------------------------------------------------- generating


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), ALL)
def test_generate_with_every_cache_and_padding(method, family, made):
    """Greedy tokens agree between no cache, dynamic and static cache, padded and not; well past the sliding window."""
    model = load(made(method, family)[0])
    prompt = WINDOWS[:2, :13]
    plain = model.generate(prompt, max_new_tokens=10, use_cache=False, **EOS)
    assert plain.shape == (2, 23)
    caches = [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}]
    if family == "llama4":  # transformers fails to make its masks for a static one, compressed or not
        del caches[1]
    for kw in caches:
        assert torch.equal(plain, model.generate(prompt, max_new_tokens=10, **kw, **EOS)), kw
    short = WINDOWS[2:3, :8]
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), prompt[:1]])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    alone = model.generate(short, max_new_tokens=6, use_cache=False, **EOS)
    if family == "llama4":  # it scales queries by their place in the row, padding counted
        alone = model.generate(padded, attention_mask=mask, max_new_tokens=6, use_cache=False, **EOS)[:1, 5:]
    for kw in caches:
        both = model.generate(padded, attention_mask=mask, max_new_tokens=6, **kw, **EOS)
        assert torch.equal(both[0, 5:], alone[0]), kw
        assert torch.equal(both[1], plain[0, :19]), kw


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), ALL)
def test_real_cache_is_as_large_as_reported(method, family, made):
    folder, result = made(method, family)
    for model, expected in (
        (tiny.build(family), result.kv_bytes_per_token_before),
        (load(folder), result.kv_bytes_per_token_after),
    ):
        n = tiny.WINDOW - 1  # every layer holds all tokens
        cache = model(input_ids=WINDOWS[:1, :n], use_cache=True).past_key_values
        if "falcon_new" in family and not any(isinstance(m, Attention) for m in model.modules()):
            expected *= 2  # transformers' attention repeats keys and values for every query head before it caches them
        tensors = [
            t for layer in cache.layers for end in ("keys", "values") if (t := getattr(layer, end, None)) is not None
        ]
        assert sum(t.numel() * t.element_size() for t in tensors) == expected * n
    if method in ("flat-llm", "a3"):
        after, before = result.kv_bytes_per_token_after, result.kv_bytes_per_token_before
        fixed = "attention" in MemorySource(tiny.build(family)).family.fixed  # no values go
        assert after == before if fixed else after < before


@torch.no_grad()
@pytest.mark.parametrize(("method", "family"), tiny.pick(FEW, SOME))
def test_eager_and_sdpa_agree(method, family, made):
    folder, _ = made(method, family)
    model = load(folder, attn_implementation="eager")
    expected = logits(model)
    if family != "gemma2":  # sdpa has no soft cap, in the stock model neither
        torch.testing.assert_close(logits(load(folder, attn_implementation="sdpa")), expected, rtol=1e-4, atol=1e-4)
    switched = load(folder, attn_implementation="sdpa")
    switched.set_attn_implementation("eager")
    assert torch.equal(logits(switched), expected)
    weights = [w for w in model(input_ids=WINDOWS, output_attentions=True).attentions if w is not None]
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", tiny.each(n for n in tiny.MORE + tiny.HYBRIDS + tiny.OTHERWISE if "qwen3_5" not in n)
)
def test_a_budget_for_the_cache_is_met_by_the_cache(family, tmp_path):
    """Keys as latents, rebuilt with the family's norms and rotation: tokens with a cache are those without."""
    result = compress(tiny.build(family), output=tmp_path / "m", method="palu", kv_keep=0.7, windows=WINDOWS)
    assert result.kv_bytes_per_token_after <= 0.7 * result.kv_bytes_per_token_before
    model, n = load(tmp_path / "m"), tiny.WINDOW - 1
    cache = model(input_ids=WINDOWS[:1, :n], use_cache=True).past_key_values
    ends = [getattr(layer, end, None) for layer in cache.layers for end in ("keys", "values")]
    assert sum(t.nbytes for t in ends if t is not None) == result.kv_bytes_per_token_after * n
    plain = model.generate(WINDOWS[:2, :13], max_new_tokens=10, use_cache=False, **EOS)
    assert torch.equal(plain, model.generate(WINDOWS[:2, :13], max_new_tokens=10, **EOS))


CAPPED = {"attn_logit_softcapping": 0.5}  # small enough to change every score


@torch.no_grad()
def test_transformers_sdpa_drops_the_soft_cap_and_we_do_not(tmp_path):
    """Of gemma2, whichever way it comes in: loaded, calibrated from a folder or from memory, compensated."""
    default, eager = (tiny.build("gemma2", attn_implementation=a, **CAPPED) for a in (None, "eager"))
    expected, dropped = logits(eager), logits(default)
    assert default.config._attn_implementation == "sdpa"
    assert (dropped - expected).abs().max() > 0.05 * expected.abs().max(), "the cap is too wide to matter here"

    folder = tiny.save(default, tmp_path / "m")
    assert torch.equal(logits(load(folder)), expected)
    assert torch.equal(logits(load(folder, attn_implementation="sdpa")), dropped)
    with pytest.warns(UserWarning, match="the model is calibrated with eager attention"):
        memory = MemorySource(default)
    for source in (open_source(folder), memory, MemorySource(eager), open_folder(folder)):
        stream = Stream(source, WINDOWS)
        hidden = stream.start()
        for i in range(len(stream)):
            hidden = stream.run(i, stream.place(source.block(i)), hidden)
        torch.testing.assert_close(
            torch.cat([compute_logits(stream, h) for h in hidden]), expected, rtol=1e-5, atol=1e-5
        )
    assert torch.equal(logits(default), dropped), "the model in memory stays as it was"


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
def test_compressed_folders_keep_the_soft_cap_in_plain_transformers(native, tmp_path):
    forms = [compressed.neurons(24)] if native else [compressed.values(5), None]
    model = tiny.build("gemma2", attn_implementation="eager", **CAPPED)
    folder = compressed.make_folder(model, tmp_path / "m", forms)
    assert ("planish" in read_config(folder)) != native
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    assert torch.equal(logits(plain), expected)
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")), expected
    )
    if not native:
        plain.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    export_dense(folder, tmp_path / "d", pad=True)
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert type(padded).__name__ == "Gemma2ForCausalLM"
    torch.testing.assert_close(logits(padded), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inductor's own
@pytest.mark.parametrize(
    ("method", "family", "backend"),
    [("flat-llm", "llama_gqa", "eager")]
    + [pytest.param(*c, b, marks=pytest.mark.slow) for b in ("eager", "inductor") for c in SOME],
)
def test_compiles_without_a_graph_break(method, family, backend, made):
    model = load(made(method, family)[0])
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- ways in which checkpoints are stored


def restore(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a one-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: t.clone() for k, t in change(tensors).items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama_tied", lambda t: {"lm_head.weight" if "embed" in k else k: v for k, v in t.items()}),
        ("llama_tied", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}),
        ("llama_tied", lambda t: {k.removeprefix("model."): v for k, v in t.items()}),
        pytest.param("qwen3", lambda t: {k.removeprefix("model."): v for k, v in t.items()}, marks=pytest.mark.slow),
        pytest.param("opt", lambda t: {k.removeprefix("model."): v for k, v in t.items()}, marks=pytest.mark.slow),
        ("opt", lambda t: {"lm_head.weight" if "embed_tokens" in k else k: v for k, v in t.items()}),
        ("gpt_neox", lambda t: {k.replace("embed_out", "lm_head"): v for k, v in t.items()}),
        ("gpt_neox", lambda t: {k.removeprefix("gpt_neox."): v for k, v in t.items()}),
        (
            "gpt_neox",
            lambda t: t | {f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(2) for i in range(3)},
        ),
        pytest.param(
            "llama_gqa",
            lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_checkpoints_of_all_ages(family, change, tmp_path):
    """Tied matrices under either name, base models' names, buffers of old versions: the same compressed model."""
    kw = {"keep": 0.8, "method": "svd-llm", "windows": WINDOWS}
    folder = tiny.save(tiny.build(family), tmp_path / "model")
    first = compress(folder, output=tmp_path / "a", **kw)
    restore(folder, change)
    second = compress(folder, output=tmp_path / "b", **kw)
    assert torch.equal(logits(load(tmp_path / "a")), logits(load(tmp_path / "b")))
    assert first.params_after == second.params_after and first.params_before == second.params_before
    model = load(tmp_path / "a")
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert first.params_before == sum(p.numel() for p in tiny.build(family).parameters())


def test_edits_name_every_part(made):
    """The manifest repeats the run: plan, settings and errors of every cut unit."""
    folder, result = made("flat-llm", "llama_gqa")
    manifest = json.loads((folder / "planish.json").read_text())
    assert manifest["method"] == "flat-llm" and manifest["result"]["keep"] == result.keep
    cut = {u for u, r in manifest["plan"].items() if r < manifest["full"][u]}
    assert cut and cut == set(manifest["errors"])
    assert all(Unit.parse(u).name in ("vo", "mlp") for u in manifest["plan"])
    assert manifest["transformers"] == transformers.__version__
