"""ggml's blocks: rounded by llama.cpp's own `ggml_quantize_chunk`, read by the gguf library, and codes put into them.

Of a type whose every weight has a code of its own (`FIELDS`), codes can be replaced while scales stay: where in a block the
bits of which weight lie is asked of the gguf library once, by turning every bit of a block round.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from planish.errors import InputError
from planish.rounding.types import StorageType

TESTED = "2026.10.11549"  # of xllamacpp
CHUNK = 1 << 16  # numbers that are dequantised at a time

# type → (first byte, bytes, bits of a code in one field, first bit of the code) of the fields that hold codes
FIELDS = {
    "q8_0": [(2, 32, 8, 0)], "q5_0": [(6, 16, 4, 0), (2, 4, 1, 4)], "q4_0": [(2, 16, 4, 0)], "q4_1": [(4, 16, 4, 0)],
    "iq4_nl": [(2, 16, 4, 0)], "iq4_xs": [(8, 128, 4, 0)], "q6_K": [(0, 128, 4, 0), (128, 64, 2, 4)],
    "q5_K": [(48, 128, 4, 0), (16, 32, 1, 4)], "q4_K": [(16, 128, 4, 0)], "q3_K": [(32, 64, 2, 0), (0, 32, 1, 2)],
    "q2_K": [(16, 64, 2, 0)],
}  # fmt: skip
SIGNED = {"q8_0": 0x80}  # stored as two's complement: turned round, codes rise
LOWEST = {"q8_0": 1}  # −128 is no code of it: llama.cpp's kernels take absolute values
UNEVEN = ("iq4_nl", "iq4_xs")  # steps between neighbouring codes differ


@cache
def open_library() -> Any:
    """The shared object of xllamacpp, which exports the functions of llama.cpp and ggml."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        raise InputError("rounding to and running GGUF needs xllamacpp · pip install 'planish[gguf]'")
    files = [p for place in found.submodule_search_locations for p in Path(place).glob("xllamacpp*.so")]
    try:
        library = ctypes.CDLL(str(files[0]))
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        return library
    except (IndexError, OSError, AttributeError) as error:
        raise InputError(
            f"xllamacpp holds no llama.cpp that can be called here ({error}); tested with {TESTED}"
        ) from None


@cache
def load_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("types of llama.cpp need the gguf library · pip install 'planish[gguf]'") from None
    return gguf


def find_number(kind: StorageType) -> Any:
    """The type as the gguf library names it."""
    return load_gguf().GGMLQuantizationType[kind.name.upper()]


def quantise(weight: Tensor, kind: StorageType, importance: Tensor | None = None) -> Tensor:
    """Blocks (out, bytes) uint8 of a matrix (out, in), by `ggml_quantize_chunk`.

    `importance` (in,): weight of a column's squared error, as an importance matrix of llama.cpp has it; equal ones where a
    type cannot do without.
    """
    out, n = weight.shape
    function = open_library().ggml_quantize_chunk
    pointer = ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer]
    source = np.ascontiguousarray(weight.float().numpy())
    blocks = np.zeros((out, kind.count(1, n)), dtype=np.uint8)
    number = int(find_number(kind))
    if importance is None and open_library().ggml_quantize_requires_imatrix(number):
        importance = torch.ones(n)
    matrix = None if importance is None else np.ascontiguousarray(scale_importance(importance).numpy())
    columns = None if matrix is None else matrix.ctypes.data
    size = function(number, source.ctypes.data, blocks.ctypes.data, 0, out, n, columns)
    if size != blocks.nbytes:
        raise ValueError(f"ggml_quantize_chunk wrote {size} bytes of {kind.name}, expected {blocks.nbytes}")
    return torch.from_numpy(blocks)


def scale_importance(importance: Tensor) -> Tensor:
    """Mean 1, and no column of no importance at all: of such columns alone ggml makes scales of 0 / 0."""
    level = importance.double().mean()
    if not level > 0:
        return torch.ones(len(importance))
    return (importance.double() / level).clamp(min=1e-4).float()


def dequantise(blocks: Tensor, kind: StorageType) -> Tensor:
    """The numbers (out, in), fp32, that blocks (out, bytes) stand for, by the gguf library."""
    number, read = find_number(kind), load_gguf().quants.dequantize
    runs = blocks.flatten().split(CHUNK // kind.group * int(kind.size))  # of rows the library takes sixteen at a time
    return torch.cat([torch.from_numpy(read(run.numpy()[None], number)[0]) for run in runs]).view(len(blocks), -1)


class Codes(NamedTuple):
    """Where the bits of a block's codes lie: of every bit of its fields, in order, the weight and the bit of its code."""

    weights: Tensor
    bits: Tensor


@cache
def find_codes(kind: StorageType) -> Codes:
    """Ask the gguf library: in a block whose scales are not zero, a bit that is turned round changes one weight."""
    sample = torch.linspace(-1, 1, kind.group).mul(torch.tensor([1.0, -0.7]).repeat(kind.group // 2))
    block = quantise(sample[None], kind)
    where, bits = [], []
    for first, count, width, low in FIELDS[kind.name]:
        where += [8 * (first + i) + k for i in range(count) for k in range(8)]
        bits += [low + k % width for _ in range(count) for k in range(8)]
    turned, at = block.repeat(len(where), 1), torch.tensor(where)
    turned[torch.arange(len(at)), at // 8] ^= (1 << at % 8).to(torch.uint8)
    changed = dequantise(turned, kind) != dequantise(block, kind)
    if not bool((changed.sum(1) == 1).all()):
        raise ValueError(f"blocks of {kind.name} are not laid out as they are known here")
    return Codes(changed.int().argmax(1), torch.tensor(bits))


def fill(blocks: Tensor, kind: StorageType, code: int) -> Tensor:
    """The blocks (…, bytes) with all their weights at one code."""
    blocks = blocks.clone()
    for first, count, width, low in FIELDS[kind.name]:
        field = (code >> low) & (2**width - 1)
        byte = sum(field << at for at in range(0, 8, width)) ^ SIGNED.get(kind.name, 0)
        blocks[..., first : first + count] = byte
    return blocks


def put_codes(blocks: Tensor, kind: StorageType, codes: Tensor) -> Tensor:
    """The blocks (out, bytes of one block) with the codes (out, weights of a block) in the place of theirs."""
    known, at = find_codes(kind), 0
    blocks = blocks.clone()
    for first, count, _, _ in FIELDS[kind.name]:
        part = slice(at, at + 8 * count)
        bits = (codes[:, known.weights[part]] >> known.bits[part]) & 1
        packed = torch.from_numpy(np.packbits(bits.to(torch.uint8).numpy(), axis=1, bitorder="little"))
        blocks[:, first : first + count] = packed ^ SIGNED.get(kind.name, 0)
        at += 8 * count
    return blocks


class Levels:
    """The numbers that the weights of one block per row can have, its scales given: codes of targets, and back.

    They are first + step · place of the code: the code itself, or of types whose steps differ what the gguf library's table says.
    """

    def __init__(self, blocks: Tensor, kind: StorageType):
        self.low, self.high = LOWEST.get(kind.name, 0), 2**kind.bits - 1
        self.table: Tensor | None = None
        if kind.name in UNEVEN:
            self.table = torch.tensor(load_gguf().quants.IQ4_NL.kvalues, dtype=torch.float64)
            self.table -= self.table[0].clone()
            self.between = (self.table[1:] + self.table[:-1]) / 2
        self.first, last = (dequantise(fill(blocks, kind, c), kind).double() for c in (0, self.high))
        self.step = (last - self.first) / (self.high if self.table is None else self.table[-1])
        self.first, self.step = self.first.T.contiguous(), self.step.T.contiguous()
        self.inverse = torch.where(self.step == 0, 1.0, 1 / self.step)

    def pick(self, target: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """(codes, values) (out,) of weight j of every block, nearest to `target` (out,)."""
        place = target.sub(self.first[j]).mul_(self.inverse[j])
        if self.table is None:
            place = place.round_().clamp_(self.low, self.high)
            return place.long(), torch.addcmul(self.first[j], place, self.step[j])
        code = torch.bucketize(place, self.between)
        return code, torch.addcmul(self.first[j], self.table[code], self.step[j])
