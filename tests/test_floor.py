"""Plans of a size are plans that the method can make; the smallest size that is named can be reached."""

from __future__ import annotations

import re

import pytest

import planish
from planish.errors import InputError
from planish.folder.source import open_source
from planish.methods import find_method
from planish.request import Request
from planish.sizes.fit import LEAST, NEAR, find_floor
from tiny import build, save, windows

pytest.importorskip("gguf", reason="GGUF is absent: pip install 'planish[gguf]'")
IDS = windows(8, 24)
WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its queries and keys are normalised, and so left whole."""
    return save(build("qwen3", **WIDE), tmp_path_factory.mktemp("floor") / "model")


def ask(model, method, **options):
    text = {
        "calibration": IDS.flatten().numpy(),
        "n_samples": len(IDS),
        "seq_len": 24,
        "ladder": False,
        "method": method,
    }
    return model, text | {"target": "gguf"} | options


@pytest.mark.parametrize("method", ["auto", "flat-llm", "llm-drop"])
def test_the_floor_is_the_smallest_keep_that_can_be_made(model, tmp_path, method):
    source, request = open_source(model), Request.ask(model="", target="gguf", method=method, device="cpu")
    floor = find_floor(request, find_method(method), source, tuple(IDS.shape))("8")
    folder, options = ask(model, method, bits="8")
    if floor < 1:
        done = planish.compress(folder, output=tmp_path / "least", keep=floor, **options)
        assert done.keep <= floor + 1e-9
    if floor > LEAST:
        with pytest.raises(InputError):
            planish.compress(folder, output=tmp_path / "below", keep=floor - 2 * NEAR, **options)


def test_the_smallest_size_that_is_named_can_be_reached(model, tmp_path):
    folder, options = ask(model, "flat-llm", context=8)
    told = planish.forecast(folder, fit=10**7, **options)
    with pytest.raises(InputError, match="is needed") as refused:
        planish.compress(folder, output=tmp_path / "out", fit=told.fit - told.size + 100, **options)
    named = re.search(r"--fit ([\d,]+) is needed", str(refused.value))
    assert named is not None
    least = int(named[1].replace(",", ""))
    found = planish.forecast(folder, fit=least, **options)
    assert found.plans and found.peak_ram_bytes > 0
    done = planish.compress(folder, output=tmp_path / "least", fit=least, **options)
    assert done.bytes_after <= found.size
    with pytest.raises(InputError, match="is needed"):
        planish.compress(folder, output=tmp_path / "below", fit=int(0.97 * least), **options)


def test_a_dry_run_lets_types_compete_where_compress_does(model):
    """For a target that rounds; what stands against types is said, and the answer is then that of cutting alone."""
    size = planish.forecast(model, max_bytes=10**7, bits="auto", target="hf").types[1]["bytes"]
    told = planish.forecast(model, max_bytes=size, target="hf")
    assert told.as_dict() == planish.forecast(model, max_bytes=size, target="hf", bits="auto").as_dict()
    assert told.plans
    cut = planish.forecast(model, max_bytes=10**7, keep=0.7, target="hf")
    assert cut.keep == pytest.approx(0.7, abs=0.05) and any("--keep holds beside it" in w for w in cut.warnings)
    assert not planish.forecast(model, max_bytes=10**7, target="hf", bits="16").warnings
