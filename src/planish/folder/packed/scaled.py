"""One code of a byte per weight, and scales: per tensor, row (channel), group of a row, or block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.folder.packed.codes import multiply, read_e8m0, spread
from planish.folder.packed.packing import Known, Packing, Rows, check_scale, expect_shape, expect_type, expect_zero
from planish.folder.safetensors import NAMES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSOR, CHANNEL = (0, 0), (1, 0)  # blocks: 0 stands for all rows or all columns


@dataclass(frozen=True)
class Scaled(Packing):
    """w[i, j] = (code[i, j] − zero[block]) · scale[block], block = (i // rows, j // columns).

    Parts: codes (…, out, in) of type `code`; scale (…, ⌈out / rows⌉, ⌈in / columns⌉), of one number per tensor () or (1,),
    per row (out,) too; a zero point is shaped as the scale. `power`: scales are powers of two in bytes (E8M0).
    """

    needed: ClassVar[Mapping[str, str]] = {"codes": "", "scale": "_scale"}
    optional: ClassVar[Mapping[str, str]] = {"zero": "_zero_point"}

    code: torch.dtype
    block: tuple[int, int]
    power: bool = False
    zero: bool = False

    def describe(self) -> str:
        rows, columns = self.block
        sizes = {(False, False): "tensor", (True, False): "row"}
        where = sizes.get((bool(rows), bool(columns)), f"{rows} × {columns}")
        return f"{NAMES[self.code]} per {where}"

    def _grid(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Rows and columns of a block, and the scale's full shape."""
        *stack, out, width = shape
        block = (self.block[0] or out, self.block[1] or width)
        return block, (*stack, -(-out // block[0]), -(-width // block[1]))

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, scale = parts["codes"], parts["scale"]
        expect_type(codes, "codes", self.code)
        expect_type(scale, "scales", *((torch.uint8, torch.float8_e8m0fnu) if self.power else FLOATS))
        shape = tuple(codes.shape)
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"has codes of shape {shape}, expected a matrix or stacked ones")
        full = self._grid(shape)[1]
        known = [full, *([full[:-2], ()] if full[-2:] == (1, 1) else []), *([full[:-1]] if full[-1] == 1 else [])]
        expect_shape(scale, "scales", *dict.fromkeys(known))
        expect_zero(self.zero, parts, "zero")
        if "zero" in parts:
            expect_type(parts["zero"], "zero points", self.code)
            expect_shape(parts["zero"], "zero points", tuple(scale.shape))
        return shape

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        block, full = self._grid(shape)
        height, width = shape[-2:]
        codes = parts["codes"].reshape(-1, width)
        scale = check_scale(read_e8m0(parts["scale"]) if self.power else parts["scale"]).reshape(-1, full[-1])
        zero = parts["zero"].float().reshape(-1, full[-1]) if self.zero else None

        def rows(first: int, count: int) -> Tensor:
            found = codes[first : first + count].float()
            if zero is not None:
                found = found - spread(zero, first, count, height, block, width)
            return multiply(found, spread(scale, first, count, height, block, width))

        return rows


@dataclass(frozen=True)
class ScaledInverse(Scaled):
    """The same; the scale is called weight_scale_inv, and is multiplied all the same."""

    needed: ClassVar[Mapping[str, str]] = {"codes": "", "scale": "_scale_inv"}
