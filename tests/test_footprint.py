"""What a spec costs, counted by hand: stored types, experts. (That it is what modules hold: test_laws.)"""

from __future__ import annotations

from dataclasses import replace

from planish.core import ExpertShape, Shape
from planish.plan.footprint import footprint

SHAPE = Shape(0, 64, 4, 2, 16, 16, 96, 16, True)


def test_a_stored_type_counts_for_its_linear_alone():
    """Of q4_0 32 weights of a row take 18 bytes, and what is left of the row as many."""
    spec = {"linears": {"q": {"kind": "pair", "rank": 8, "stored": "q4_0"}, "up": {"kind": "dense", "stored": "q4_0"}}}
    plain = footprint({"linears": {"q": {"kind": "pair", "rank": 8}}}, SHAPE, itemsize=2)
    found = footprint(spec, SHAPE, itemsize=2)
    assert found.weights == plain.weights
    pair, up = 8 * (64 + 64), 96 * 64
    typed = (8 * 2 + 64 * 1) * 18 + 96 * 2 * 18  # A (8, 64), B (64, 8), up (96, 64)
    assert found.bytes == plain.bytes - 2 * (pair + up) + typed


def test_all_experts_are_stored_and_some_work():
    """8 experts of which a token reaches 2, beside the attention: all count as bytes, two for FLOPs."""
    shape = replace(SHAPE, intermediate=0, experts=ExpertShape(8, 2, 40, 64))
    found = footprint({}, shape, context=10, itemsize=2)
    attention, expert = 64 * (64 + 32 + 32 + 64), 3 * 40 * 64
    assert found.weights == attention + 8 * expert == shape.count() and found.bytes == 2 * found.weights
    assert found.working == attention + 2 * expert == shape.working
    assert found.flops == 2 * (found.working + 10 * 4 * (16 + 16)) and found.cache == 2 * (16 + 16)
