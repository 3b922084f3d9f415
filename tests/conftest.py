"""What several test files share. Nothing here touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and output is then broken into lines

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import checked

checked.install("planish.solvers", "planish.stats")  # before anything imports planish

import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

os.fsync = os.fstat  # nothing here has to outlive a power cut, and a disk takes milliseconds

torch.set_num_threads(min(2, torch.get_num_threads()))


def optional_data(*parts: str) -> Path:
    """A path below PLANISH_DATA (default: ../shared/data beside the repository), or skip the test."""
    path = Path(os.environ.get("PLANISH_DATA") or ROOT.parent / "shared" / "data").joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional data not found: {'/'.join(parts) or 'the folder'} (set PLANISH_DATA)")
    return path


MIXTURE = Path(os.environ.get("PLANISH_CACHE") or "~/.cache/planish").expanduser() / "mixture"  # the user's


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Commands that the tests run keep their statistics here, not in the user's cache."""
    os.environ["PLANISH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_path() -> Callable[..., Path]:
    """``data_path("text", "wikitext2_test.txt")``: an optional file; the test is skipped where it is absent."""
    return optional_data


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """A trained 260 thousand-parameter GQA LLaMA with a tokenizer (optional data)."""
    return optional_data("models", "stories260k")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The embedded demo model."""
    path = ROOT / "src" / "planish" / "data" / "demo"
    if not (path / "config.json").exists():
        pytest.skip("the embedded demo model is absent from this checkout")
    return path


@pytest.fixture(scope="session")
def mixture_dir() -> Path:
    """A small trained mixture, where its user has trained it."""
    if not (MIXTURE / "config.json").exists():
        pytest.skip(f"no trained mixture at {MIXTURE}: python tools/train_demo_model.py --experts 16 --fp32")
    return MIXTURE


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., nn.Module]:
    """``tiny_llama(**config)``: a random two-block GQA LLaMA with 97 ids and 64 positions, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**overrides: object) -> nn.Module:
        settings = {
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
        }  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random llama in several shards, without a tokenizer."""
    return tiny.save(tiny.build("llama_gqa"), tmp_path_factory.mktemp("models") / "llama", sharded=True)


@pytest.fixture(scope="session")
def ids(tmp_path_factory) -> Path:
    """Token ids for it, as a file."""
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, tiny.windows(40, 24).flatten().numpy())
    return path


@pytest.fixture
def run() -> Callable[..., Any]:
    """``run("compress", folder, ...)``: the command line in this process."""
    from typer.testing import CliRunner

    from planish.cli import app

    return lambda *args, **kw: CliRunner().invoke(app, [str(a) for a in args], **kw)
