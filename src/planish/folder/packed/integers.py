"""Integers of a few bits in 32-bit words, with a scale and a zero per group of a row: GPTQ, AWQ and pack-quantized.

GPTQ  qweight (⌈in · bits / 32⌉, out), qzeros (groups, ⌈out · bits / 32⌉), scales (groups, out), g_idx (in): packed along the
      inputs; a stored zero is one less than the zero, modulo 2^bits (checkpoint_format gptq), or itself (gptq_v2)
AWQ   qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out): packed along the outputs, of every 8 in the
      order 0 2 4 6 1 3 5 7 (version gemm)
pack-quantized (compressed-tensors)  weight_packed (out, ⌈in · bits / 32⌉), weight_scale (out, groups), weight_shape (2);
      codes are stored with 2^(bits − 1) added; weight_zero_point (⌈out · bits / 32⌉, groups) likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.folder.packed.codes import multiply, spread, unpack_bits
from planish.folder.packed.packing import (
    Declared,
    Known,
    Packing,
    Rows,
    check_scale,
    expect_shape,
    expect_type,
    expect_zero,
    is_listed,
    whole,
)
from planish.folder.packed.scaled import FLOATS

BITS = (2, 3, 4, 8)
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # column of the nibble n of a word


def words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


@dataclass(frozen=True)
class GPTQLinear(Packing):
    """w[o, i] = (code[i, o] − zero[g_idx[i], o]) · scale[g_idx[i], o]. `group` 0: the whole row."""

    needed: ClassVar[Mapping[str, str]] = {"codes": ".qweight", "zeros": ".qzeros", "scale": ".scales"}
    optional: ClassVar[Mapping[str, str]] = {"order": ".g_idx"}
    result: ClassVar[str] = ".weight"

    bits: int
    group: int
    less_one: bool

    def describe(self) -> str:
        return f"INT{self.bits}, {f'groups of {self.group}' if self.group else 'a scale per row'}"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, zeros, scale = parts["codes"], parts["zeros"], parts["scale"]
        for part, role in ((codes, "qweight"), (zeros, "qzeros")):
            expect_type(part, role, torch.int32)
        expect_type(scale, "scales", *FLOATS)
        if len(codes.shape) != 2 or codes.shape[0] * 32 % self.bits:
            raise ValueError(f"has qweight of shape {tuple(codes.shape)}, expected (in · {self.bits} / 32, out)")
        width, out = codes.shape[0] * 32 // self.bits, codes.shape[1]
        groups = -(-width // self.group) if self.group else 1
        expect_shape(scale, "scales", (groups, out))
        expect_shape(zeros, "qzeros", (groups, words(out, self.bits)))
        if "order" in parts:
            expect_type(parts["order"], "g_idx", torch.int32)
            expect_shape(parts["order"], "g_idx", (width,))
        return out, width

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        out, width = shape
        scale = check_scale(parts["scale"])
        zeros = unpack_bits(parts["zeros"], self.bits, out)
        if self.less_one:
            zeros = zeros + 1 & 2**self.bits - 1
        group = parts["order"].long() if "order" in parts else torch.arange(width) // (self.group or width)
        if int(group.min()) < 0 or int(group.max()) >= len(scale):
            raise ValueError(f"has g_idx from {int(group.min())} to {int(group.max())} for {len(scale)} groups")

        def rows(first: int, count: int) -> Tensor:
            span = slice(first, first + count)
            codes = unpack_bits(parts["codes"][:, span].T, self.bits, width)
            return multiply(codes - zeros[:, span].T[:, group], scale[:, span].T[:, group])

        return rows


class GPTQ(Declared):
    """quant_method gptq. `dynamic` (other settings for some modules) is not read."""

    name = "gptq"
    marks = {s: s for s in (".qweight", ".qzeros", ".scales", ".g_idx")}

    def __init__(self, config: Mapping[str, Any]):
        self.bits = whole(config.get("bits"), "bits", BITS)
        form = config.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format {form!r} is not read; expected gptq or gptq_v2")
        if config.get("pack_dtype") not in (None, "int32"):
            raise ValueError(f"pack_dtype {config['pack_dtype']!r} is not read; expected int32")
        if config.get("dynamic"):
            raise ValueError("dynamic settings per module are not read")
        size = config.get("group_size", 128)
        self.packing = GPTQLinear(self.bits, 0 if size == -1 else whole(size, "group_size"), form == "gptq")

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        return self.packing

    def skips(self, module: str) -> bool:
        return False


@dataclass(frozen=True)
class AWQLinear(Packing):
    """w[o, i] = (code[i, o] − zero[i // group, o]) · scale[i // group, o], 4 bits."""

    needed: ClassVar[Mapping[str, str]] = {"codes": ".qweight", "zeros": ".qzeros", "scale": ".scales"}
    result: ClassVar[str] = ".weight"

    group: int

    def describe(self) -> str:
        return f"INT4, {f'groups of {self.group}' if self.group else 'a scale per row'}"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, zeros, scale = parts["codes"], parts["zeros"], parts["scale"]
        for part, role in ((codes, "qweight"), (zeros, "qzeros")):
            expect_type(part, role, torch.int32)
        expect_type(scale, "scales", *FLOATS)
        if len(codes.shape) != 2:
            raise ValueError(f"has qweight of shape {tuple(codes.shape)}, expected (in, out / 8)")
        width, out = codes.shape[0], codes.shape[1] * 8
        groups = -(-width // self.group) if self.group else 1
        expect_shape(scale, "scales", (groups, out))
        expect_shape(zeros, "qzeros", (groups, out // 8))
        return out, width

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        width = shape[1]
        scale, group = check_scale(parts["scale"]), torch.arange(width) // (self.group or width)

        def unpack(packed: Tensor) -> Tensor:
            found = unpack_bits(packed, 4, packed.shape[1] * 8).unflatten(1, (-1, 8))
            return torch.empty_like(found).index_copy_(2, ORDER, found).flatten(1)

        zeros = unpack(parts["zeros"])

        def rows(first: int, count: int) -> Tensor:
            start, end = first // 8, -(-(first + count) // 8)
            span = slice(first, first + count)
            codes = unpack(parts["codes"][:, start:end])[:, first - start * 8 :][:, :count].T
            return multiply(codes - zeros[:, span].T[:, group], scale[:, span].T[:, group])

        return rows


class AWQ(Declared):
    """quant_method awq, version gemm."""

    name = "awq"
    marks = {s: s for s in AWQLinear.needed.values()}

    def __init__(self, config: Mapping[str, Any]):
        whole(config.get("bits", config.get("w_bit")), "bits", (4,))
        version = str(config.get("version") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version {version!r} is not read; expected gemm")
        if config.get("zero_point", True) is not True:
            raise ValueError(f"zero_point {config['zero_point']!r} is not read; expected true")
        size = config.get("group_size", config.get("q_group_size", 128))
        self.packing, self.listed = (
            AWQLinear(0 if size == -1 else whole(size, "group_size")),
            config.get("modules_to_not_convert"),
        )

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        return self.packing

    def skips(self, module: str) -> bool:
        return is_listed(module, self.listed)


@dataclass(frozen=True)
class PackedLinear(Packing):
    """w[o, i] = (code[o, i] − zero[o, g]) · scale[o, g], g = i // group; `group` 0: one scale per row, −1: per tensor."""

    needed: ClassVar[Mapping[str, str]] = {"codes": "_packed", "scale": "_scale", "shape": "_shape"}
    optional: ClassVar[Mapping[str, str]] = {"zeros": "_zero_point", "order": "_g_idx"}

    bits: int
    group: int
    zero: bool = False

    def describe(self) -> str:
        where = {0: "a scale per row", -1: "a scale per tensor"}.get(self.group, f"groups of {self.group}")
        return f"INT{self.bits}, {where}"

    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        codes, scale = parts["codes"], parts["scale"]
        expect_type(codes, "codes", torch.int32)
        expect_type(scale, "scales", *FLOATS)
        expect_shape(parts["shape"], "weight_shape", (2,))
        expect_type(parts["shape"], "weight_shape", torch.int64, torch.int32)
        if "order" in parts:
            raise ValueError("has weight_g_idx: groups in the order of activations are not read")
        out, width = (int(n) for n in parts["shape"].read())
        if min(out, width) < 1 or (self.group > 0 and width % self.group):
            raise ValueError(f"has weight_shape {(out, width)}, expected whole groups of {self.group}")
        expect_shape(codes, "codes", (out, words(width, self.bits)))
        groups = width // self.group if self.group > 0 else 1
        if self.group < 0:
            expect_shape(scale, "scales", (1,), (), (1, 1))
        else:
            expect_shape(scale, "scales", (out, groups), *([(out,)] if not self.group else []))
        expect_zero(self.zero, parts, "zeros")
        if "zeros" in parts:
            expect_type(parts["zeros"], "zero points", torch.int32)
            expect_shape(parts["zeros"], "zero points", (words(out, self.bits), groups))
        return out, width

    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        out, width = shape
        scale = check_scale(parts["scale"])
        scale = scale.reshape(out if self.group >= 0 else 1, -1).expand(out, -1)
        half, block = 2 ** (self.bits - 1), (1, self.group if self.group > 0 else width)
        zeros = unpack_bits(parts["zeros"].T, self.bits, out).T - half if self.zero else None

        def rows(first: int, count: int) -> Tensor:
            codes = unpack_bits(parts["codes"][first : first + count], self.bits, width) - half
            if zeros is not None:
                codes = codes - spread(zeros, first, count, out, block, width)
            return multiply(codes, spread(scale, first, count, out, block, width))

        return rows
