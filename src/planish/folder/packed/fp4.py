"""4-bit floats (E2M1), two per byte, in groups along a row, each with a scale: NVFP4 and MXFP4.

NVFP4  groups of 16, E4M3 scales, and one fp32 number per tensor that divides (compressed-tensors: weight_global_scale) or
       multiplies (ModelOpt: weight_scale_2)
MXFP4  groups of 32, scales are powers of two in bytes; for dense linears (compressed-tensors: weight_packed,
       weight_scale), and for gpt-oss's stacked experts: gate_up_proj_blocks (experts, out, in / 32, 16),
       gate_up_proj_scales (experts, out, in / 32), whose weight is (experts, in, out)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.folder.packed.codes import multiply, read_e2m1, read_e8m0
from planish.folder.packed.packing import (
    Declared,
    Known,
    Packing,
    Rows,
    check_scale,
    expect_shape,
    expect_type,
    is_listed,
)


@dataclass(frozen=True)
class FP4(Packing):
    """w[i, j] = E2M1[code[i, j]] · scale[i, j // group] [/ global].

    Parts: codes (out, in / 2) of bytes, scale (out, in / group).
    """

    needed: ClassVar[Mapping[str, str]] = {"codes": "_packed", "scale": "_scale"}
    optional: ClassVar[Mapping[str, str]] = {"total": "_global_scale"}
    divides: ClassVar[bool] = True

    name: str
    group: int
    power: bool = False

    def describe(self) -> str:
        return f"{self.name}, groups of {self.group}"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, scale = parts["codes"], parts["scale"]
        expect_type(codes, "codes", torch.uint8)
        expect_type(scale, "scales", *((torch.uint8, torch.float8_e8m0fnu) if self.power else (torch.float8_e4m3fn,)))
        if len(codes.shape) != 2 or codes.shape[1] * 2 % self.group:
            raise ValueError(
                f"has codes of shape {tuple(codes.shape)}, expected (out, in / 2), in a multiple of {self.group}"
            )
        out, width = codes.shape[0], codes.shape[1] * 2
        expect_shape(scale, "scales", (out, width // self.group))
        if ("total" in parts) == self.power:
            raise ValueError("has a global scale, which MXFP4 has none of" if self.power else "has no global scale")
        if "total" in parts:
            expect_type(parts["total"], "a global scale", torch.float32)
            expect_shape(parts["total"], "a global scale", (1,), ())
        return out, width

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        scale = check_scale(read_e8m0(parts["scale"]) if self.power else parts["scale"])
        if not self.power:
            total = check_scale(parts["total"], "global scales").reshape(())
            if float(total) == 0:
                raise ValueError("has a global scale of zero")
            scale = scale / total if self.divides else scale * total

        def rows(first: int, count: int) -> Tensor:
            numbers = read_e2m1(parts["codes"][first : first + count]).unflatten(1, (-1, self.group))
            return multiply(numbers, scale[first : first + count, :, None]).flatten(1)

        return rows


@dataclass(frozen=True)
class ModelOptFP4(FP4):
    """The codes are called weight, the number per tensor weight_scale_2, and is multiplied."""

    needed: ClassVar[Mapping[str, str]] = {"codes": "", "scale": "_scale", "total": "_scale_2"}
    optional: ClassVar[Mapping[str, str]] = {}
    divides: ClassVar[bool] = False


@dataclass(frozen=True)
class StackedMXFP4(Packing):
    """w[e, j, i] = E2M1[code[e, i, j]] · 2^(scale[e, i, j // 32] − 127)."""

    needed: ClassVar[Mapping[str, str]] = {"codes": "_blocks", "scale": "_scales"}

    def describe(self) -> str:
        return "MXFP4, groups of 32"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, scale = parts["codes"], parts["scale"]
        expect_type(codes, "blocks", torch.uint8)
        expect_type(scale, "scales", torch.uint8)
        if len(codes.shape) != 4 or codes.shape[-1] != 16:
            raise ValueError(f"has blocks of shape {tuple(codes.shape)}, expected (experts, out, in / 32, 16)")
        expect_shape(scale, "scales", tuple(codes.shape[:-1]))
        experts, out, groups, _ = codes.shape
        return experts, groups * 32, out

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        codes, scale, height = parts["codes"], check_scale(read_e8m0(parts["scale"])), shape[1]

        def rows(first: int, count: int) -> Tensor:
            found = []
            for e in range(first // height, (first + count - 1) // height + 1):
                start, end = max(first - e * height, 0), min(first + count - e * height, height)
                groups = slice(start // 32, -(-end // 32))
                numbers = multiply(read_e2m1(codes[e, :, groups]), scale[e, :, groups, None]).flatten(1)
                found.append(numbers[:, start - groups.start * 32 : end - groups.start * 32].T)
            return torch.cat(found)

        return rows


class MXFP4(Declared):
    """quant_method mxfp4: gpt-oss's experts."""

    name = "mxfp4"
    marks = {s: s for s in StackedMXFP4.needed.values()}

    def __init__(self, config: Mapping[str, Any]):
        self.listed = config.get("modules_to_not_convert")

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        return StackedMXFP4()

    def skips(self, module: str) -> bool:
        return is_listed(module, self.listed)
