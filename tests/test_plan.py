"""Planning from a config.json alone, and what is predicted for blocks of a 70 B model."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import LlamaConfig

import planish
import tiny
from planish.errors import InputError


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_config_alone_gives_the_plan_of_the_whole_folder(family, tmp_path):
    whole = tiny.save(tiny.build(family, torch.bfloat16), tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "bare")
    plans = [
        planish.forecast(m, keep=0.7, method="svd-llm", n_samples=8, seq_len=16).as_dict()
        for m in (whole, tmp_path / "bare", tmp_path / "bare" / "config.json")
    ]
    for found in plans:
        del found["seconds"], found["how"]
    assert plans[0] == plans[1] == plans[2]


def test_statistics_need_weights(tmp_path):
    tiny.configure("llama_gqa").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no weights to measure them with"):
        planish.forecast(tmp_path, method="auto", n_samples=8, seq_len=16)
    with pytest.raises(InputError, match="holds no weights, which this needs"):
        planish.forecast(tmp_path, method="slicegpt", n_samples=8, seq_len=16)
    with pytest.raises(InputError, match="neither model"):
        planish.compress(tmp_path, method="svd-llm", output=tmp_path / "out")


@pytest.mark.parametrize(("method", "settings"), [("a3", {}), ("flat-llm", {"allocation": "uniform"}), ("svd-llm", {})])
def test_70b_fits_24_gb_and_64_gb(method, settings, tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256}
    config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    found = planish.forecast(tmp_path, method=method, settings=settings, device="cuda", n_samples=128, seq_len=2048)
    assert found.params_before > 70e9
    assert 6.6e9 < found.peak_vram_bytes < 24e9  # at least the widest Gram
    assert 10e9 < found.peak_ram_bytes < 64e9
