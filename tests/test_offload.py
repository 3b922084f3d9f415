"""Large matrices may be computed with elsewhere: the same results, on the CPU again, and on the CPU where they do not fit."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch

import tiny
from planish import linalg, offload
from planish.compress import compress
from planish.shards import hash_file

WINDOWS = tiny.windows(8, 24)


@contextmanager
def elsewhere(monkeypatch, large=0):
    """As if the CPU were an accelerator: everything goes the way that it would go."""
    monkeypatch.setattr(offload, "LARGE", large)
    token = offload._device.set(torch.device("cpu"))
    try:
        yield
    finally:
        offload._device.reset(token)


def draw(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_only_large_tensors_go_there(monkeypatch):
    gone = []
    move = offload.move
    monkeypatch.setattr(offload, "move", lambda value, device: gone.append(value) or move(value, device))
    gram = draw(40, 9).T @ draw(40, 9)
    linalg.root(gram)
    with elsewhere(monkeypatch, large=82):
        linalg.root(gram)
    assert not gone, "nobody asked, and nobody with matrices of this size"
    with elsewhere(monkeypatch, large=81):
        there = linalg.root(gram, damping=0.1)
    assert gone and torch.equal(there, linalg.root(gram, damping=0.1))


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_no_device_without_fp64(device):
    """mps has none, a cuda device may be planned for where there is none."""
    with offload.offload(device):
        assert (offload._device.get() is not None) == (device == "cuda" and torch.cuda.is_available())
    assert offload._device.get() is None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), torch.linalg.LinAlgError(), RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")],
    ids=str,
)
def test_what_fails_there_is_computed_here(error, monkeypatch):
    calls = []

    @offload.offloaded
    def double(x, much=True):
        calls.append((much, sys.exc_info()[0]))
        if len(calls) == 1:
            raise error
        return x + x, None

    with elsewhere(monkeypatch):
        found, nothing = double(torch.ones(3), much=True)
    assert calls == [(True, None)] * 2, "the second time without the error, which would hold what was made there"
    assert found.tolist() == [2, 2, 2] and nothing is None


def test_other_errors_are_not_hidden(monkeypatch):
    @offload.offloaded
    def fail(x):
        raise RuntimeError("shapes do not match")

    with elsewhere(monkeypatch), pytest.raises(RuntimeError, match="shapes"):
        fail(torch.ones(3))


@pytest.mark.parametrize("method", ["auto", "svd-llm", "mpifa", "a3", "flat-llm", "modegpt", "slicegpt"])
def test_results_are_the_same_files(method, tmp_path, monkeypatch):
    """Every marked function on the way takes and gives what it may."""
    model = tiny.build("llama_gqa")
    compress(model, output=tmp_path / "here", keep=0.7, method=method, windows=WINDOWS)
    monkeypatch.setattr(sys.modules["planish.compress"], "offload", lambda device: elsewhere(monkeypatch))
    compress(model, output=tmp_path / "there", keep=0.7, method=method, windows=WINDOWS)
    here, there = ([hash_file(p) for p in sorted((tmp_path / n).glob("*.safetensors"))] for n in ("here", "there"))
    assert here and here == there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", ["auto", "svd-llm", "mpifa", "a3", "flat-llm", "modegpt", "slicegpt", "subfit"])
def test_results_on_cuda_are_close(method, tmp_path, monkeypatch):
    """The whole run there, with every factorisation, against the CPU: nearly the same predictions."""
    from planish import load

    monkeypatch.setattr(offload, "LARGE", 0)
    model = tiny.build("llama_gqa")
    logits = []
    for device in ("cpu", "cuda"):
        compress(
            model,
            output=tmp_path / device,
            keep=0.7,
            method=method,
            windows=WINDOWS,
            device=device,
            dtype=torch.float32,
        )
        with torch.no_grad():
            logits.append(load(tmp_path / device, dtype="float32", device="cpu")(WINDOWS).logits)
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.02, f"{error:.2g}"
