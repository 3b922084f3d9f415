"""Integers out of packed words, numbers out of codes, scales onto blocks: what all formats are made of. Everything in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # OCP MX 1.0, table 5


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of each row (rows, count), int32 in [0, 2^bits).

    A row of int32 words is one stream of bits, the lowest first; integer i begins at bit i · bits and may reach into the next
    word. (Bytes are little-endian, as in the file.)
    """
    if bits in (4, 8):  # none reaches over a byte
        parts = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        return (split_nibbles(parts) if bits == 4 else parts)[:, :count].to(torch.int32)
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    found = wide[:, word] >> shift
    over = shift + bits > 32
    if over.any():
        found[:, over] |= wide[:, word[over] + 1] << (32 - shift[over])
    return (found & (2**bits - 1)).to(torch.int32)


def split_nibbles(packed: Tensor, high_first: bool = False) -> Tensor:
    """Bytes (…, n) → integers (…, 2 n) in [0, 16)."""
    halves = [packed & 15, packed >> 4]
    return torch.stack(halves[::-1] if high_first else halves, -1).flatten(-2)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """table[codes], in the shape of the codes."""
    return table.float()[codes.int()]


def read_e2m1(packed: Tensor) -> Tensor:
    """4-bit floats (sign, 2 exponent bits, 1 mantissa bit), two per byte, the low nibble first: (…, n) → (…, 2 n)."""
    return look_up(split_nibbles(packed), torch.tensor(E2M1))


def read_e8m0(scales: Tensor) -> Tensor:
    """Powers of two, 2^(byte − 127); 255 is NaN (OCP MX 1.0, section 5.4.1)."""
    return scales.view(torch.float8_e8m0fnu).float()


def multiply(values: Tensor, factors: Tensor) -> Tensor:
    """values · factors in fp32 (`factors` broadcast); ValueError where a factor is zero and the code under it is not."""
    if bool((factors == 0).any()) and bool(((factors == 0) & (values != 0)).any()):
        raise ValueError("has a scale of zero where its codes are not zero")
    return values.float() * factors


def spread(grid: Tensor, first: int, count: int, height: int, block: tuple[int, int], width: int) -> Tensor:
    """What a grid of blocks says of rows first … first + count of a matrix: (count, width).

    `grid` (matrices · grid rows, grid columns); rows number those of all matrices, each of `height` rows; a block has `block`
    (rows, columns), the last ones may be smaller.
    """
    rows = torch.arange(first, first + count)
    per_matrix = -(-height // block[0])
    picked = grid[rows // height * per_matrix + rows % height // block[0]]
    if picked.shape[1] == 1:
        return picked
    return picked.repeat_interleave(block[1], dim=1)[:, :width]
