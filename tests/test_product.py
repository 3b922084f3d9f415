"""Methods × models as users have them (sharded, bf16 and fp16, tied under the head's name, odd head sizes): every promise
of a compressed folder, in this process and in one that has no planish."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import tiny
from planish.manifest import Result
from tiny import compress

WINDOWS = tiny.windows(16, 24)
IDS = tiny.windows(3, 30, seed=11)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

# name → family of `tiny`, stored dtype, how it is stored, what differs
MODELS: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "llama, 12 blocks in bf16 shards": ("llama_gqa", torch.bfloat16, "shards", {"num_hidden_layers": 12}),
    "qwen2, tied as lm_head alone": ("qwen2", torch.float32, "head", {"tie_word_embeddings": True}),
    "qwen3 in fp16": ("qwen3", torch.float16, "shards", {"tie_word_embeddings": False}),
    "phi3 in bf16": ("phi3", torch.bfloat16, "file", {}),
    "gemma2 with soft caps": ("gemma2", torch.float32, "file", {}),
    "gemma3 in bf16, one kv head": ("gemma3", torch.bfloat16, "file", {"num_key_value_heads": 1}),
    "mistral in fp64": ("mistral", torch.float64, "shards", {}),
    "opt in fp16": ("opt", torch.float16, "file", {}),
    "gpt_neox in bf16": ("gpt_neox", torch.bfloat16, "shards", {}),
}
METHODS: dict[str, dict[str, Any]] = {
    "flat-llm": {}, "svd-llm": {}, "erc-svd": {}, "svd": {}, "asvd": {}, "auto": {}, "a3": {},
}  # fmt: skip
KEEPS = (0.85, 0.6)
QUICK = [
    ("llama, 12 blocks in bf16 shards", "flat-llm", 0.6),
    ("qwen2, tied as lm_head alone", "auto", 0.6),
    ("qwen3 in fp16", "svd-llm", 0.85),
]
PRODUCT = [(model, method, keep) for model in MODELS for method in METHODS for keep in KEEPS]
ALL = tiny.pick(QUICK[1:], PRODUCT)

Made = Callable[[str, str, float], tuple[Path, Result]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """(folder, result), compressed once."""
    place = tmp_path_factory.mktemp("product")
    done: dict[tuple[str, str, float], tuple[Path, Result]] = {}

    def store(name: str) -> Path:
        family, dtype, how, more = MODELS[name]
        folder = place / f"dense {name}"
        if not folder.exists():
            tiny.save(tiny.build(family, dtype, **more), folder, sharded=how == "shards")
            if how == "head":
                tensors = load_file(folder / "model.safetensors")
                tensors = {"lm_head.weight" if "embed_tokens" in n else n: t for n, t in tensors.items()}
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def make(model: str, method: str, keep: float) -> tuple[Path, Result]:
        if (model, method, keep) not in done:
            output = place / f"{len(done)}"
            result = compress(
                store(model), output=output, keep=keep, method=method, windows=WINDOWS, settings=METHODS[method]
            )
            done[model, method, keep] = output, result
        return done[model, method, keep]

    return make


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "keep"), ALL)
def test_folder_keeps_its_promises(name, method, keep, made, tmp_path):
    folder, result = made(name, method, keep)
    dtype = MODELS[name][1]
    assert keep - 0.05 < result.keep <= keep
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype and sum(p.numel() for p in model.parameters()) == result.params_after
    stored = logits(model)
    assert torch.isfinite(stored).all()
    aligned = logits(copy.deepcopy(model))  # where tensors lie in a mapped file decides the last bit of an fp64 product

    cache = model(input_ids=IDS[:1, : tiny.WINDOW - 1], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held == result.kv_bytes_per_token_after * (tiny.WINDOW - 1)
    assert result.kv_bytes_per_token_after <= result.kv_bytes_per_token_before

    for again in (tmp_path / "again", tmp_path / "and again"):
        model.save_pretrained(again)
        model = AutoModelForCausalLM.from_pretrained(again)
        assert torch.equal(logits(copy.deepcopy(model)), aligned)

    wide = {"dtype": torch.promote_types(dtype, torch.float32)}  # low precision has ties
    model = AutoModelForCausalLM.from_pretrained(folder, **wide)
    prompt = IDS[:, :17]
    expected = model.generate(prompt, use_cache=False, **GREEDY)
    assert torch.equal(expected, model.generate(prompt, past_key_values=DynamicCache(config=model.config), **GREEDY))
    static = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(expected, model.generate(prompt, past_key_values=static, disable_compile=True, **GREEDY))
    padded, mask = IDS[:, :20].clone(), torch.ones(3, 20, dtype=torch.long)
    for row, n in enumerate((6, 0, 3)):
        padded[row, :n], mask[row, :n] = 0, 0
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    for row, n in enumerate((6, 0, 3)):
        assert torch.equal(together[row : row + 1, n:], model.generate(padded[row : row + 1, n:], **GREEDY))

    full = logits(model)
    eager, sdpa = (
        logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=a, **wide)) for a in ("eager", "sdpa")
    )
    if "soft caps" in name:  # sdpa has none, in the stock model neither
        assert torch.equal(full, eager)
    else:
        torch.testing.assert_close(full, sdpa, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(eager, sdpa, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
    torch.testing.assert_close(
        logits(torch.compile(model, fullgraph=True, backend="eager")), full, rtol=1e-3, atol=1e-3
    )


BARE = """
import importlib.abc, json, sys, torch

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "planish":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1] + "/ids.pt")
found = {}
for folder, native in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, **({} if native else {"trust_remote_code": True}))
    with torch.no_grad():
        found[folder] = model(input_ids=ids, use_cache=False).logits
assert "planish" not in sys.modules
torch.save(found, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.parametrize("cases", [QUICK, pytest.param(PRODUCT, marks=pytest.mark.slow)], ids=["some", "all"])
def test_folders_load_where_planish_is_not(cases, made, tmp_path):
    folders = {str(made(*c)[0]): made(*c)[1].format == "native" for c in cases}
    torch.save(IDS, tmp_path / "ids.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path), json.dumps(folders)],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "custom code" not in done.stdout, "nobody may be asked"
    for folder, there in torch.load(tmp_path / "logits.pt").items():
        assert torch.equal(there, logits(AutoModelForCausalLM.from_pretrained(folder))), folder
