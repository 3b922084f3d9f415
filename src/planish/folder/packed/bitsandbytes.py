"""quant_method bitsandbytes: 4-bit codes of a table (NF4, FP4) with a scale per block of consecutive weights, and 8-bit rows.

    4 bit  weight (⌈n / 2⌉, 1) of bytes, the high nibble first; weight.absmax: a scale per `blocksize` weights of the flat
           matrix; weight.quant_map: the 16 values; weight.quant_state.bitsandbytes__nf4: JSON in bytes with shape, blocksize.
           Double quantisation: absmax are codes of weight.nested_quant_map, with weight.nested_absmax per `nested_blocksize`,
           and `nested_offset` is added
    8 bit  weight (out, in) of INT8, SCB (out): w = code · SCB / 127

Reference: QLoRA, arXiv:2305.14314, section 3; LLM.int8(), arXiv:2208.07339, section 3.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.folder.packed.codes import look_up, multiply, split_nibbles
from planish.folder.packed.packing import (
    Declared,
    Known,
    Packing,
    Rows,
    check_scale,
    expect_shape,
    expect_type,
    is_listed,
    whole,
)

STATE = ".quant_state.bitsandbytes__"
LIMIT = 1 << 12  # bytes of a quant_state
TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class BlockTable(Packing):
    """w.flat[n] = table[code[n]] · absmax[n // blocksize]."""

    optional: ClassVar[Mapping[str, str]] = {"nested_absmax": ".nested_absmax", "nested_map": ".nested_quant_map"}

    type: str

    @property
    def needed(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"codes": "", "absmax": ".absmax", "map": ".quant_map", "state": f"{STATE}{self.type}"}

    def describe(self) -> str:
        return self.type.upper()

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        state, shape = read_state(parts["state"])
        count, block = prod(shape), whole(state.get("blocksize"), "blocksize")
        stored = prod(parts["codes"].shape) * parts["codes"].dtype.itemsize
        if stored != -(-count // 2):
            raise ValueError(f"has {stored:,} bytes of codes for a weight of shape {shape}")
        expect_shape(parts["map"], "a table", (16,))
        blocks, nested = -(-count // block), "nested_absmax" in parts
        expect_shape(parts["absmax"], "scales", (blocks,))
        expect_type(parts["absmax"], "scales", torch.uint8 if nested else torch.float32)
        if nested != ("nested_map" in parts):
            raise ValueError("has one of nested_absmax and nested_quant_map without the other")
        if nested:
            expect_shape(parts["nested_map"], "a table of scales", (256,))
            size = whole(state.get("nested_blocksize"), "nested_blocksize")
            expect_shape(parts["nested_absmax"], "scales of scales", (-(-blocks // size),))
            if not isinstance(state.get("nested_offset"), int | float):
                raise ValueError("has no nested_offset")
        return shape

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        state = json.loads(bytes(parts["state"]))
        table, block, width = check_scale(parts["map"], "values"), state["blocksize"], shape[-1]
        scale = parts["absmax"]
        if "nested_absmax" in parts:
            outer = check_scale(parts["nested_absmax"]).repeat_interleave(state["nested_blocksize"])[: len(scale)]
            scale = look_up(scale, check_scale(parts["nested_map"], "values")) * outer + state["nested_offset"]
        scale, codes = check_scale(scale), parts["codes"].reshape(-1).view(torch.uint8)

        def rows(first: int, count: int) -> Tensor:
            start, end = first * width, (first + count) * width
            numbers = look_up(split_nibbles(codes[start // 2 : -(-end // 2)], high_first=True), table)
            numbers = numbers[start % 2 : start % 2 + end - start]
            return multiply(numbers, scale[torch.arange(start, end) // block]).view(count, width)

        return rows


def read_state(part: Known) -> tuple[dict[str, Any], tuple[int, int]]:
    """A quant_state and the weight's shape in it."""
    expect_type(part, "a quant_state", torch.uint8)
    if prod(part.shape) > LIMIT:
        raise ValueError(f"has a quant_state of {prod(part.shape):,} bytes, expected at most {LIMIT:,}")
    try:
        state = json.loads(bytes(part.read()))
        rows, columns = (whole(n, "shape") for n in state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"has a quant_state that is not read: {error}") from None
    return state, (rows, columns)


@dataclass(frozen=True)
class Int8Rows(Packing):
    """w[o, i] = code[o, i] · SCB[o] / 127."""

    needed: ClassVar[Mapping[str, str]] = {"codes": ".weight", "scale": ".SCB"}
    optional: ClassVar[Mapping[str, str]] = {"form": ".weight_format"}
    result: ClassVar[str] = ".weight"

    def describe(self) -> str:
        return "I8 per row"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, scale = parts["codes"], parts["scale"]
        expect_type(codes, "codes", torch.int8)
        expect_type(scale, "scales", torch.float32)
        if len(codes.shape) != 2:
            raise ValueError(f"has codes of shape {tuple(codes.shape)}, expected (out, in)")
        expect_shape(scale, "scales", codes.shape[:1])
        if "form" in parts and prod(parts["form"].shape) == 1 and (form := int(parts["form"].read())):
            raise ValueError(f"is stored in weight_format {form}; only 0, row by row, is read")
        return tuple(codes.shape)

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        scale = check_scale(parts["scale"])[:, None] / 127

        def rows(first: int, count: int) -> Tensor:
            return multiply(parts["codes"][first : first + count], scale[first : first + count])

        return rows


class BitsAndBytes(Declared):
    """`load_in_4bit` or `load_in_8bit`; which table and block is said beside each weight."""

    name = "bitsandbytes"

    def __init__(self, config: Mapping[str, Any]):
        four, eight = (bool(config.get(f"load_in_{n}bit")) for n in (4, 8))
        if four == eight:
            raise ValueError("load_in_4bit and load_in_8bit are both true or both false")
        ends = [f"{STATE}{t}" for t in TYPES] + [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
        self.marks = {s: s for s in (ends if four else [".SCB", ".weight_format"])}
        self.kind = str(config.get("bnb_4bit_quant_type", "fp4")) if four else ""
        if four and self.kind not in TYPES:
            raise ValueError(f"bnb_4bit_quant_type {self.kind!r} is not read; expected {' or '.join(TYPES)}")
        self.listed = config.get("llm_int8_skip_modules")

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        return BlockTable(self.kind) if self.kind else Int8Rows()

    def skips(self, module: str) -> bool:
        return is_listed(module, self.listed)
