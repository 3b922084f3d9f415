"""A LoRA adapter's folder merged while the model is read: the naive formula, peft itself, and everything that is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import planish
import tiny
from packed_files import write
from planish.compression import resume
from planish.errors import InputError
from planish.folder.source import open_source
from planish.request import read_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
RUN = {"method": "svd", "keep": 0.8, "n_samples": 8, "seq_len": 16, "calibration": tiny.windows(8, 16).flatten()}


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "base_model_name_or_path": "owner/base",
        "qalora_group_size": 16,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(module: str, out: int, width: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g)
    return {f"{module}.lora_A.weight": 0.3 * a, f"{module}.lora_B.weight": 0.3 * b}


def naive(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    out = weight.double().clone()
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[o, i] += scale * sum(float(b[o, k]) * float(a[k, i]) for k in range(len(a)))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save(tiny.build("llama_gqa", **SIZES), tmp_path_factory.mktemp("base") / "m")


def test_weights_are_those_of_the_formula(base, tmp_path):
    """A rank and an alpha of its own for one module; everything else as it was."""
    tensors = factors(Q, 32, 32) | factors(DOWN, 32, 32, rank=2, seed=1)
    adapter = save_adapter(
        tmp_path / "a", tensors, rank_pattern={"mlp.down_proj": 2}, alpha_pattern={r"layers\.1\..*": 5}
    )
    before, after = open_source(base), open_source(base, adapter=adapter)
    for name in before.reader.names:
        was, now, module = before.weight(name), after.weight(name), name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in tensors:
            assert torch.equal(was, now)
            continue
        a, b = (tensors[f"{module}.lora_{s}.weight"] for s in "AB")
        expected = naive(was, a, b, 6 / 4 if module == Q else 5 / 2)
        assert torch.allclose(now.double(), expected, atol=1e-6) and not torch.allclose(was, now)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_rslora_chunks_and_half_precision(base, tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("planish.folder.adapter.CHUNK", chunk)
    model = tiny.build("llama_gqa", torch.bfloat16, **SIZES)
    tensors = {n: t.bfloat16() for n, t in factors(Q, 32, 32).items()}
    adapter = save_adapter(tmp_path / "a", tensors, use_rslora=True)
    found = open_source(tiny.save(model, tmp_path / "m"), adapter=adapter).weight(f"{Q}.weight")
    expected = naive(model.get_submodule(Q).weight.detach(), *tensors.values(), 6 / 2)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_transposed_linears_embeddings_and_whole_modules(tmp_path):
    """gpt2 stores (in, out); an embedding's factors stand the other way round; a module that was trained whole is taken."""
    gpt2 = tiny.save(tiny.build("gpt2", num_hidden_layers=2), tmp_path / "gpt2")
    name = "transformer.h.1.mlp.c_fc"
    tensors = factors(name, 44, 32)
    adapter = save_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    before, after = (open_source(gpt2, adapter=a).weight(f"{name}.weight") for a in (None, adapter))
    assert torch.allclose(after.T.double(), naive(before.T, *tensors.values(), 1.5), atol=1e-6)

    base = tiny.save(tiny.build("llama_gqa", **SIZES), tmp_path / "m")
    head = torch.randn(97, 32)
    a, b = torch.randn(4, 97), torch.randn(32, 4)
    words = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b, "lm_head.weight": head}
    adapter = save_adapter(tmp_path / "b", words, modules_to_save=["lm_head"])
    before, after = open_source(base), open_source(base, adapter=adapter)
    assert torch.equal(after.weight("lm_head.weight"), head)
    embedding = "model.embed_tokens.weight"
    assert torch.allclose(after.weight(embedding).T.double(), naive(before.weight(embedding).T, a, b, 1.5), atol=1e-5)
    tied = tiny.save(tiny.build("llama_tied"), tmp_path / "tied")
    with pytest.raises(InputError, match=r"changes .*embed_tokens.*, and the model's embedding and head are tied"):
        open_source(tied, adapter=adapter)


def test_compressing_with_an_adapter_is_compressing_the_merged_model(base, run, tmp_path):
    """Through the command line; what was merged is in planish.json and in the recipe, which repeats it."""
    adapter = save_adapter(tmp_path / "a", factors(Q, 32, 32) | factors(DOWN, 32, 32))
    model = planish.load(base)
    merged = open_source(base, adapter=adapter)
    model.load_state_dict({n: merged.weight(n) for n in model.state_dict()})
    ids = tmp_path / "ids.npy"
    np.save(ids, RUN["calibration"].numpy())
    options = ("--method", "svd", "--n-samples", "8", "--seq-len", "16", "--calibration", ids)
    done = run("compress", base, "--adapter", adapter, "-o", tmp_path / "one", *options)
    assert done.exit_code == 0 and "The adapter a is merged into 2 weights" in done.stderr, done.output
    record = json.loads((tmp_path / "one" / "planish.json").read_text())["adapter"]
    assert record == {
        "name": "a",
        "base_model_name_or_path": "owner/base",
        "r": 4,
        "lora_alpha": 6,
        "merged": 2,
        "replaced": 0,
    }
    planish.compress(model, output=tmp_path / "two", **RUN)
    planish.compress(output=tmp_path / "three", **read_recipe(tmp_path / "one" / "recipe.yaml").arguments)
    for file in sorted(p.name for p in (tmp_path / "one").glob("*.safetensors")):
        a, b, c = (load_file(tmp_path / n / file) for n in ("one", "two", "three"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)
    plan = run("plan", base, "--adapter", adapter, *options)
    assert plan.exit_code == 0 and "The adapter a is merged" in plan.stderr
    with pytest.raises(InputError, match="give the model's folder"):
        planish.compress(model, adapter=str(adapter), output=tmp_path / "four", **RUN)


def test_an_adapter_on_a_checkpoint_in_low_precision(tmp_path):
    weights = write(tiny.build("llama_gqa", torch.bfloat16, **SIZES), "bnb nf4", tmp_path / "m")
    tensors = factors(Q, 32, 32)
    found = open_source(tmp_path / "m", adapter=save_adapter(tmp_path / "a", tensors)).weight(f"{Q}.weight")
    expected = naive(weights[f"{Q}.weight"].bfloat16(), *tensors.values(), 1.5)
    assert torch.allclose(found.double(), expected, rtol=2**-8, atol=1e-6)


GOOD = factors(Q, 32, 32)
REFUSED = {  # tensors, settings, words
    "DoRA": (GOOD, {"use_dora": True}, "asks for DoRA, which is not merged"),
    "parameters": (GOOD, {"target_parameters": ["mlp.experts"]}, "asks for LoRA on stacked parameters"),
    "new": (GOOD, {"use_something": True}, "asks for use_something, which is not merged"),
    "biases": (GOOD, {"bias": "all"}, "trains biases"),
    "PiSSA": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "begins with 'pissa_niter_4', which changes the model's own weights"),
    "IA3": (GOOD, {"peft_type": "IA3"}, "is a IA3 adapter of owner/base: only LoRA"),
    "magnitudes": (GOOD | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, "lora_magnitude_vector .* is none that a LoRA"),
    "half": ({n: t for n, t in GOOD.items() if "lora_A" in n}, {}, "lora_B of .*q_proj.weight is missing"),
    "rank": (GOOD, {"r": 8}, r"shapes \(4, 32\) and \(32, 4\), expected rank 8"),
    "alpha": (GOOD, {"lora_alpha": "many"}, "lora_alpha or alpha_pattern is not read"),
    "pattern": (GOOD, {"rank_pattern": {"(": 2}}, "r or rank_pattern is not read"),
    "other names": (factors(Q.replace(".0.", ".9."), 32, 32), {}, "the model has not: it is another.* trained on owner/base"),
    "other widths": (factors(Q, 64, 32), {}, r"has shape \(64, 32\) for .*, the model \(32, 32\): it is another model's"),
    "NaN": (factors(DOWN, 32, 32) | {f"{DOWN}.lora_A.weight": torch.full((4, 32), float("nan"))}, {}, "holds NaN or infinity"),
    "empty": ({}, {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_are_refused(what, base, run, tmp_path):
    tensors, settings, words = REFUSED[what]
    refuse(run, base, save_adapter(tmp_path / "a", tensors, **settings), words, tmp_path)


def test_folders_that_are_no_adapters(base, run, tmp_path):
    refuse(run, base, base, "has no adapter_config.json", tmp_path)
    adapter = save_adapter(tmp_path / "a", GOOD)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refuse(run, base, adapter, "but a pickle, which is never read", tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    refuse(run, base, adapter, "cannot read", tmp_path)


def refuse(run, base: Path, adapter: Path, words: str, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, RUN["calibration"].numpy())
    options = ("--method", "svd", "--n-samples", "8", "--seq-len", "16", "--calibration", ids)
    done = run("compress", base, "--adapter", adapter, "-o", tmp_path / "out", *options)
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and len(lines) == 1 and re.search(words, lines[0]), done.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_as_peft_merges(family, tmp_path):
    """Patterns of ranks and alphas, rsLoRA, random factors; saved by peft."""
    peft = pytest.importorskip("peft")
    model = tiny.build(family, num_hidden_layers=2)
    folder = tiny.save(model, tmp_path / "m")
    targets = ["q_proj", "down_proj"] if family == "llama_gqa" else ["c_attn", "c_fc"]
    for rslora in (False, True):
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, rank_pattern={f"{targets[1]}": 2}, alpha_pattern={rf"1\..*{targets[0]}": 7},
            use_rslora=rslora, init_lora_weights=False, fan_in_fan_out=family == "gpt2",
        )  # fmt: skip
        tuned = peft.get_peft_model(tiny.build(family, num_hidden_layers=2), config)
        tuned.save_pretrained(tmp_path / f"a{rslora}")
        merged = tuned.merge_and_unload().state_dict()
        source = open_source(folder, adapter=tmp_path / f"a{rslora}")
        changed = 0
        for name in source.reader.names:
            assert torch.allclose(source.weight(name), merged[name], atol=1e-6), name
            changed += not torch.equal(merged[name], model.state_dict()[name])
        assert changed == 4


def test_an_interrupted_run_is_taken_up_with_its_adapter(base, tmp_path):
    adapter = save_adapter(tmp_path / "a", factors(Q, 32, 32) | factors(DOWN, 32, 32))

    def stop(phase: str, done: int, total: int) -> None:
        if (tmp_path / "one.partial" / "resume" / "journal.jsonl").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planish.compress(base, adapter=str(adapter), output=tmp_path / "one", progress=stop, **RUN)
    resume(tmp_path / "one")
    planish.compress(base, adapter=str(adapter), output=tmp_path / "two", **RUN)
    planish.compress(base, output=tmp_path / "three", **RUN)
    shard = sorted(p.name for p in (tmp_path / "one").glob("*.safetensors"))[-1]
    one, two, three = ((tmp_path / n / shard).read_bytes() for n in ("one", "two", "three"))
    assert one == two != three
