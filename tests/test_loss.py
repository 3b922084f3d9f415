"""What `compress` says that its result loses: measured on windows of the calibration text that nothing was fitted to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import planish
from planish import lanes
from planish.calibrate.text import list_windows, mark, sample_starts, spare_windows
from planish.cli.compress import show_loss
from planish.compression import resume
from tiny import build, save, windows

IDS = windows(40, 24).flatten()
MORE = {"calibration": IDS, "n_samples": 16, "seq_len": 24}


def find_spare(n: int) -> torch.Tensor:
    """The n windows that are spread over what 16 windows from the start leave of `IDS`."""
    free = IDS.view(-1, 24)[16:]
    return free[[(2 * k + 1) * len(free) // (2 * n) for k in range(n)]]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama_gqa", "auto"),
        ("llama_gqa", "slicegpt"),
        ("llama_tied", "shortgpt"),
        ("qwen3_moe", "auto"),
        ("gemma3", "a3"),
    ],
)
def test_it_is_what_evaluating_both_models_there_gives(name, method, tmp_path):
    """Cut linears, rotated streams, blocks that are gone, experts, families that scale their embeddings."""
    model, spare = save(build(name), tmp_path / "model"), find_spare(4)
    result = planish.compress(model, output=tmp_path / "out", keep=0.7, method=method, **MORE)
    small, dense = (
        planish.evaluate(planish.load(folder, dtype="float32"), spare.flatten(), 24)
        for folder in (tmp_path / "out", model)
    )
    assert result.loss["nats"] == pytest.approx(small.nll - dense.nll, abs=1e-5)
    assert result.loss["dense"] == pytest.approx(dense.nll, abs=1e-5)
    assert (result.loss["windows"], result.loss["tokens"]) == (4, small.tokens) and result.loss["stderr"] > 0
    manifest = json.loads((tmp_path / "out" / "planish.json").read_text())
    assert manifest["result"]["loss"] == result.loss and result.seconds["loss"] > 0


def test_its_noise_is_that_of_windows_which_differ(tmp_path):
    """A window counts as its tokens do; as many tokens in each: the standard error of their mean."""
    model, spare = save(build("llama_gqa"), tmp_path / "model"), find_spare(4)
    loss = planish.compress(model, output=tmp_path / "out", keep=0.7, method="svd", **MORE).loss
    models = [planish.load(folder, dtype="float32") for folder in (tmp_path / "out", model)]
    single = [[planish.evaluate(m, w, 24).nll for w in spare] for m in models]
    lost = torch.tensor(single[0], dtype=torch.float64) - torch.tensor(single[1], dtype=torch.float64)
    assert loss["stderr"] == pytest.approx(float(lost.std() / 2), rel=1e-4)


def test_rounding_is_part_of_it(tmp_path):
    """What llama.cpp's blocks and heads of so few bits cost comes on top of the cut."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
    model = save(build("llama_gqa", hidden_size=64, intermediate_size=128), tmp_path / "model")
    options = {"keep": 0.9, "method": "a3", "bits": "3", "target": "gguf", **MORE}
    loss = planish.compress(model, output=tmp_path / "out", **options).loss
    small, dense = (
        planish.evaluate(planish.load(folder, dtype="float32"), find_spare(4).flatten(), 24).nll
        for folder in (tmp_path / "out", model)
    )
    assert loss["nats"] == pytest.approx(small - dense, abs=1e-4)


def test_a_run_that_is_taken_up_tells_the_same(tmp_path):
    model = save(build("llama_gqa"), tmp_path / "model")
    whole = planish.compress(model, output=tmp_path / "whole", keep=0.7, method="svd", **MORE)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "blocks" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planish.compress(model, output=tmp_path / "out", keep=0.7, method="svd", progress=stop, **MORE)
    assert resume(tmp_path / "out").loss == whole.loss != {}


def test_spare_windows_share_no_token_with_the_others():
    ids = torch.arange(1000)
    for how in ("random", "contiguous"):
        starts = sample_starts(ids, 8, 30, 1, how)
        taken = {i for s in starts for i in range(s, s + 30)}
        found = spare_windows(ids, starts, 5, 30)
        assert found.shape == (5, 30) and not taken & {*found.flatten().tolist()}
        assert len({*found.flatten().tolist()}) == 150
    assert spare_windows(ids, sample_starts(ids, 33, 30, 0, "contiguous"), 5, 30).shape == (0, 30)
    assert spare_windows(ids, [0], 0, 30).shape == (0, 30)
    begun = spare_windows(ids, [0], 3, 30, begin=7)
    assert (begun[:, 0] == 7).all() and begun[0, 1] - 1 >= 30
    answers = torch.zeros(1000, dtype=torch.bool)
    answers[700:740] = True
    marked = mark(ids, answers)
    assert len(spare_windows(marked, [0], 9, 30)) == len(list_windows(marked, 30, "contiguous")) == 2


def test_a_text_without_more_windows_tells_nothing(tmp_path, run):
    model = save(build("llama_gqa"), tmp_path / "model")
    result = planish.compress(
        model, output=tmp_path / "out", keep=0.7, method="svd", **MORE | {"calibration": IDS[:384]}
    )
    assert result.loss == {}
    ids = tmp_path / "ids.npy"
    np.save(ids, IDS.numpy())
    common = ["compress", model, "--method", "svd", "--keep", 0.7, "--calibration", ids, "--seq-len", 24, "--overwrite"]
    told = run(*common, "--n-samples", 16, "-o", tmp_path / "out").stdout
    assert "nats per token more than the dense model, in 4 windows" in " ".join(told.split())
    assert "than the dense model" not in run(*common, "--n-samples", 40, "-o", tmp_path / "out").stdout


def test_a_loss_of_nothing_has_no_sign():
    assert show_loss({"nats": -0.00001, "stderr": 0.001, "windows": 4})[0].startswith("loss: 0.0000 ± 0.0010 nats")
    assert show_loss({"nats": -0.002, "stderr": 0.001, "windows": 4})[0].startswith("loss: -0.0020 ± 0.0010 nats")


def test_several_processes_do_not_tell(monkeypatch, tmp_path):
    from planish.walks.loss import measure_loss

    monkeypatch.setattr(lanes, "count", lambda: 2)
    assert measure_loss(None, None, find_spare(4)) == {}
