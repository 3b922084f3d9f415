"""What the rounding walk holds in memory, and that the forecast counts it."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

import planish
from planish.calibrate.activations import MemoryLimits
from planish.calibrate.linears import measure_gradients
from planish.calibrate.stream import Stream
from planish.dry_run.memory import LIBRARIES
from planish.dry_run.rounding import count_moments, count_work
from planish.folder.source import open_folder
from planish.rounding.round import choose, draft_integers, round_integers
from planish.rounding.types import find_type
from planish.walks import quantise
from tiny import build, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
IDS = windows(12, 24)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MIXTURE = WIDE | {"intermediate_size": 64, "moe_intermediate_size": 32, "mlp_only_layers": []}
SHARED = MIXTURE | {"shared_expert_intermediate_size": 32}
FEW = {"calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama_gqa", WIDE), ("qwen3_moe", MIXTURE), pytest.param("qwen2_moe", SHARED, marks=pytest.mark.slow)],
)
def test_the_forecast_counts_what_the_walk_holds(tmp_path, monkeypatch, family, sizes):
    """Moments of all distinct inputs of a block at once, and of the gradients at the outputs of what is rounded."""
    model, held = save(build(family, **sizes), tmp_path / "model"), dict[str, int]()
    watched = {n: getattr(quantise, n) for n in ("measure_grams", "measure_attended", "measure_gradients")}

    def grams(stream, i, block, names, hidden):
        found = watched["measure_grams"](stream, i, block, names, hidden)
        held["inputs"] = sum({id(g): g.numel() for g in found.values()}.values())
        held["gradients"] = sum(held[n] for n in names)
        held["weights"] = sum(block.get_submodule(n).weight.numel() for n in names)
        return found

    def attended(*args):
        found = watched["measure_attended"](*args)
        held["inputs"] += found.numel()
        return found

    def gradients(stream):
        found, outputs = watched["measure_gradients"](stream)
        held.update({n: g.numel() for n, g in found[0].items()})
        return found, outputs

    for own in (grams, attended, gradients):
        monkeypatch.setattr(quantise, f"measure_{own.__name__}", own)
    planish.compress(model, output=tmp_path / "out", keep=1, bits=4, target="gguf", **FEW)
    shape = open_folder(model).shape(0)
    dense, one = count_moments(shape, False), count_moments(shape, True)
    number = shape.experts.number if shape.experts else 0
    for name in ("inputs", "gradients", "weights"):
        own = sum(getattr(g, name) for g in dense.values()) + number * sum(getattr(g, name) for g in one.values())
        assert own == held[name], name


def test_moments_of_all_blocks_may_lie_on_disk(tmp_path):
    source = open_folder(save(build("llama_gqa", **WIDE), tmp_path / "model"))
    near, _ = measure_gradients(Stream(source, IDS))
    limits = MemoryLimits(folder=tmp_path, stored=0)
    far, _ = measure_gradients(Stream(source, IDS, limits=limits))
    assert limits.stored.used == 0
    for here, there in zip(near, far, strict=True):
        assert [*here] == [*there]
        assert all(torch.equal(here[n], there[n]) for n in here)


def test_codes_of_a_draft_are_bytes():
    """They are kept for a whole block."""
    kind = find_type("int4-32")
    draft = round_integers(torch.randn(16, 64), kind, None, torch.bfloat16)
    assert draft.codes.dtype == torch.int8
    again = draft_integers(draft.codes.float(), draft.grid, kind, torch.bfloat16)
    assert torch.equal(again.value, draft.value)


def test_of_every_row_the_first_of_the_best_drafts_stays():
    """As if all errors were compared at once, which takes more memory."""
    from planish.rounding.round import Draft, Metric

    w = torch.randn(6, 8, dtype=torch.float64)
    moment = torch.randn(8, 8, dtype=torch.float64)
    metric = Metric(moment @ moment.T)
    drafts = [Draft(w + 0.1 * torch.randn(6, 8)) for _ in range(3)]
    drafts[2].value[:3] = drafts[1].value[:3]
    drafts[1].value[5] = torch.nan
    best, lost, _, how = choose(w, drafts, metric)
    errors = torch.stack([w - d.value for d in drafts])
    rows = ((errors @ metric.moment) * errors).sum(-1)
    at = rows.nan_to_num(torch.inf).argmin(0)
    assert how == "feedback"
    assert torch.equal(best.value, torch.stack([drafts[n].value[i] for i, n in enumerate(at.tolist())]))
    assert lost == pytest.approx(float(rows.gather(0, at[None]).sum()))


def test_what_rounding_takes_is_foreseen(tmp_path):
    """It is more than writing the blocks as they are, and more for a larger block; of plans that compete the largest."""
    folder = save(build("llama_gqa", **WIDE), tmp_path / "model")
    plain, rounded = (planish.forecast(folder, keep=1, **more, **FEW) for more in ({}, {"bits": 4}))
    assert rounded.peak_ram_bytes > plain.peak_ram_bytes > LIBRARIES
    assert rounded.disk_bytes >= plain.disk_bytes + rounded.bytes_after
    assert "rounding" in rounded.how["peak_ram"]
    assert "rounding" not in plain.how["peak_ram"]
    told = planish.forecast(folder, max_bytes=int(0.7 * plain.bytes_after), bits="auto", **FEW)
    assert told.peak_ram_bytes >= rounded.peak_ram_bytes - (1 << 20)
    assert list(chain.from_iterable([count_work(n, n), count_work(n, 2 * n)] for n in (64, 1024, 8192))) == sorted(
        count_work(n, m * n) for n in (64, 1024, 8192) for m in (1, 2)
    )
