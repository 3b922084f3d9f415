"""Whole runs on a simulated accelerator: every tensor is made, or brought, where it is used, and results are the CPU's but for
rounding. What a real one computes differently is not seen here."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import tiny
from accelerator import DEVICE, Simulate, SimulateCalls, There, solving_there
from planish import compression
from planish.calibrate import activations
from planish.methods import list_methods
from tiny import compress

WINDOWS = tiny.windows(8, 24)
KEEP = {"nbl": 0.85, "palu": 0.85}  # what cuts attention alone cannot go lower
OF_EXPERTS = ("hope", "reap")
QUICK = [("llama_gqa", "auto"), ("qwen3_moe", "auto")]
CASES = [
    *(("qwen3_moe" if m in OF_EXPERTS else "llama_gqa", m) for m in list_methods()),
    *((name, "auto") for name in tiny.name_families().values()),
]


class Direct:
    """Copies between the accelerator and the CPU."""

    def bring(self, tensor):
        return lambda: tensor.here.clone()

    def send(self, tensor):
        return lambda: There(tensor.clone())


@pytest.fixture
def device(monkeypatch):
    """The name of the accelerator, which planish takes within the test."""
    copies = Direct()
    monkeypatch.setattr(activations, "find_copies", lambda device: copies if device == DEVICE else None)
    monkeypatch.setattr("planish.api.find_device", lambda name: name)
    offload = compression.offload
    monkeypatch.setattr(
        compression, "offload", lambda place: solving_there(monkeypatch) if place == DEVICE else offload(place)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    return DEVICE.type


@pytest.mark.parametrize(("family", "method"), tiny.pick(QUICK, list(dict.fromkeys(CASES))))
def test_runs_are_the_same_but_for_rounding(family, method, device, tmp_path):
    model, keep = tiny.build(family), KEEP.get(method, 0.7)
    compress(model, output=tmp_path / "cpu", keep=keep, method=method, windows=WINDOWS)
    with SimulateCalls(), Simulate():
        compress(model, output=tmp_path / "there", keep=keep, method=method, windows=WINDOWS, device=device)
    here, there = (
        {n: t for p in sorted((tmp_path / where).glob("*.safetensors")) for n, t in load_file(p).items()}
        for where in ("cpu", "there")
    )
    assert here.keys() == there.keys() and all(here[n].shape == there[n].shape for n in here)
    for name, tensor in here.items():
        error = (tensor.double() - there[name].double()).norm() / tensor.double().norm().clamp(min=1e-300)
        assert error < 1e-3, f"{name}: {error:.2g}"
