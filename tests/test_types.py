"""Types that differ among matrices: the least sum of nats within a mean of bits per weight."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import planish
from planish.errors import InputError
from planish.plan.types import Offer, choose_types
from planish.rounding.types import choose, integer, list_bits
from tiny import build, save, windows

pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
IDS = windows(12, 24)


def make_offers(seed: int, count: int = 5) -> dict[str, list[Offer]]:
    """Matrices of several sizes, a bit more costing about four times the nats."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for n in range(count):
        out, width = 8 * int(torch.randint(1, 9, (), generator=g)), 64 * int(torch.randint(1, 4, (), generator=g))
        size = float(torch.rand((), generator=g)) + 0.05
        found[str(n)] = [
            Offer(
                integer(b, 64, zero=True), out, width, size * 4.0 ** -(b - 2) * float(torch.rand((), generator=g) + 0.5)
            )
            for b in (2, 3, 4, 8)
        ]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mean", [2.6, 3.4, 4.3, 6.0])
def test_types_are_the_best_of_all_combinations(seed, mean):
    """Within the mean; no combination of fewer bytes and nats, and the best one by at most a matrix's step."""
    offers = make_offers(seed)
    limit = mean * sum(o[0].out * o[0].n for o in offers.values()) / 8
    chosen = choose_types(offers, mean)
    taken = [next(o for o in offers[n] if o.kind == kind) for n, kind in chosen.items()]
    assert sum(o.bytes for o in taken) <= limit
    nats = sum(o.nats for o in taken)
    combinations = [c for c in itertools.product(*offers.values()) if sum(o.bytes for o in c) <= limit]
    best = min(sum(o.nats for o in c) for c in combinations)
    step = max(a.nats - b.nats for found in offers.values() for a, b in itertools.pairwise(found))
    assert best <= nats <= best + step
    alike = [o for o in combinations if len({x.kind for x in o}) == 1]
    assert nats <= min(sum(o.nats for o in c) for c in alike) + 1e-12


def test_too_few_bits_are_said():
    with pytest.raises(InputError, match=r"--bits 2.1: the smallest types take 2\.\d+ bits per weight"):
        choose_types(make_offers(0), 2.1)


def test_a_mean_is_read():
    asked = choose("3.4", "any")
    assert asked is not None and (asked.bits, asked.mean, asked.name) == (3, 3.4, "3.4")
    assert [t.bits for t in asked.ladder(64, "")] == [2, 3, 4, 8]
    assert [t.name for t in choose("4.5", "gguf").ladder(64, "")] == ["iq4_nl", "q5_0", "q8_0"]
    assert choose("4", "any").mean is None
    for text in ("1.5", "17.5", "7"):
        with pytest.raises(InputError, match=f"--bits {text} --target any: expected 16, 8, 4, 3, 2, a mean like 2.5"):
            choose(text, "any")


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama_gqa", {}), pytest.param("phi3", {"sliding_window": None}, marks=pytest.mark.slow)],
)
def test_matrices_get_types_of_their_own(name, options, tmp_path):
    """Within the mean, counted in the file; fused linears one type; the loss no larger than that of one type of as many bytes."""
    model = save(build(name, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **options), tmp_path / "model")
    text = {"calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24, "keep": 1}
    plain = planish.compress(model, output=tmp_path / "plain", bits=3, **text)
    mean = plain.rounding["bits_per_weight"]
    done = planish.compress(model, output=tmp_path / "mixed", bits=f"{mean:.3f}", **text)
    assert len(done.rounding["types"]) > 1 and done.rounding["bits_per_weight"] <= mean
    assert done.rounding["nats"] <= 1.02 * plain.rounding["nats"]
    assert done.rounding["asked"] == f"{mean:.3f}".rstrip("0")
    linears = json.loads((tmp_path / "mixed/planish.json").read_text())["rounding"]
    assert len(linears) == (14 if name == "llama_gqa" else 8)
    loaded = planish.load(tmp_path / "mixed")
    assert bool(loaded(IDS[:1]).logits.isfinite().all())


@pytest.mark.parametrize("bits", list_bits("gguf"))
@pytest.mark.parametrize("n", [64, 256, 288, 512, 4096])
def test_files_of_llama_cpp_can_be_cut_to_what_their_types_hold(bits, n):
    """Some narrower width there is, and every width in such steps has a type."""
    asked = choose(bits, "gguf")
    step = asked.step(n)
    assert step < n
    assert all(asked.pick(width, "down").holds(width) for width in range(step, n + 1, step))
