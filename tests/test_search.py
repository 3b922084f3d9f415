"""Searches among many small changes to a model: successive halving against plain forwards, and what is foretold of it."""

from __future__ import annotations

import pytest
import torch

import tiny
from planish.calibrate.stream import Stream
from planish.calibrate.text import mark
from planish.folder.source import open_source
from planish.plan import search
from planish.plan.search import list_race, list_rounds, race, search_greedily, trial_losses
from planish.solvers.bypass import drop_edit
from tiny import compress

WINDOWS = tiny.windows(16, 24)
PATHS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
TRIALS = {(i, target): {i: [drop_edit(target)]} for i in range(5) for target in PATHS}


def open_stream(windows=WINDOWS) -> Stream:
    return Stream(open_source(tiny.build("llama_gqa", num_hidden_layers=5)), windows)


@torch.no_grad()
def naive_losses(gone: list[tuple[int, str]]) -> torch.Tensor:
    """Of every window, without these submodules, by the whole model with zeros in it."""
    model = tiny.build("llama_gqa", num_hidden_layers=5)
    for block, target in gone:
        model.model.layers[block].get_submodule(PATHS[target]).weight.zero_()
    return torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in WINDOWS])


@pytest.mark.parametrize(("n", "sizes"), [(1, (3, 2, 2)), (3, (6, 6, 6))])
def test_a_race_is_successive_halving(n, sizes, monkeypatch):
    monkeypatch.setattr(search, "LEAST", 1)
    left = {key: naive_losses([(0, "mlp"), key]) for key in TRIALS if key != (0, "mlp")}
    rest = {key: TRIALS[key] for key in left}
    found = race(open_stream(), rest, n, TRIALS[0, "mlp"])
    for windows, size in zip((2, 4, 8), sizes, strict=True):
        left = {k: left[k] for k in sorted(left, key=lambda k: float(left[k][:windows].mean()))[:size]}
    assert {k: pytest.approx(float(x.mean()), abs=1e-5) for k, x in left.items()} == found


def test_a_few_tokens_are_one_round():
    stream = open_stream()
    assert race(stream, TRIALS, 1, {}) == trial_losses(stream, {}, TRIALS)


@pytest.mark.parametrize(
    ("priced", "ends"),
    [
        ([511] * 16, [2, 4, 8, 16]),
        ([23] * 16, [16]),
        ([0, 0, 600, 0, 600, 0, 0], [5]),  # as many windows as it takes, and none that have no answer at the end
        ([0] * 4 + [2000, 0, 0, 6000, 0], [5, 8]),
        ([0, 0], [1]),
    ],
)
def test_rounds_are_shares_of_the_tokens_that_are_priced(priced, ends):
    assert list_rounds(priced) == ends


def test_windows_without_an_answer_are_no_round(monkeypatch):
    monkeypatch.setattr(search, "LEAST", 1)
    answers = torch.zeros_like(WINDOWS, dtype=torch.bool)
    answers[5:12, 12:] = True
    stream = open_stream(mark(WINDOWS, answers))
    exact = trial_losses(stream, {}, TRIALS)
    found = race(stream, TRIALS, 5, {})
    assert found == pytest.approx({k: exact[k] for k in found}, rel=1e-5) and len(found) == 10


def test_the_walks_of_a_race_are_foretold(monkeypatch):
    monkeypatch.setattr(search, "LEAST", 1)
    walks: list[tuple[int, int]] = []

    def count(stream, edits, trials):
        walks.append((sum(map(len, stream.batches)), len(trials)))
        return trial_losses(stream, edits, trials)

    monkeypatch.setattr(search, "trial_losses", count)
    race(open_stream(), TRIALS, 1, {})
    told = list_race([i for i, _ in TRIALS], 1, 16, 24)
    assert walks == [(w.windows, w.heads) for w in told] == [(2, 10), (2, 4), (4, 2), (8, 2)]


def test_a_search_makes_the_best_again_and_again(monkeypatch):
    """Without rounds: by every model built by itself."""
    made, losses = search_greedily(open_stream(), TRIALS, lambda made: len(made) == 3)
    gone: list[tuple[int, str]] = []
    for key, loss in zip(made, losses, strict=True):
        naive = {k: float(naive_losses([*gone, k]).mean()) for k in TRIALS if k not in gone}
        assert key == min(naive, key=lambda k: naive[k]) and loss == pytest.approx(naive[key], abs=1e-5)
        gone.append(key)


def test_what_a_trial_has_fitted_is_not_fitted_again(tmp_path, monkeypatch):
    """Of the three fits that are tried the best one's bypasses are written: nothing runs any more."""
    phases: list[str] = []
    forward = Stream.forward

    def count(self, *args, **kwargs):
        assert phases[-1] != "blocks"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Stream, "forward", count)
    model = tiny.build("llama_gqa", num_hidden_layers=5)
    compress(
        model, output=tmp_path / "out", keep=0.7, method="subfit", windows=WINDOWS, settings={},
        progress=lambda phase, done, total: phases.append(phase),
    )  # fmt: skip
    assert {"fit 1/3", "fit 3/3", "blocks"} <= {*phases}
