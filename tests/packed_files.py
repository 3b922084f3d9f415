"""Weights in low precision, written by hand: random codes and scales of every format, and the numbers they stand for, in loops.

`make(name, rng, out, width)` gives a `Case`: what config.json declares, the stored tensors by what comes behind the linear's
name, and the weight as numpy fp32. `write` makes a model's folder of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planish.modelling.families import FAMILIES

F = np.float32
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Case(NamedTuple):
    declared: dict[str, Any]
    stored: dict[str, Tensor]
    weight: np.ndarray


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def codes(rng: random.Random, rows: int, columns: int, top: int) -> list[list[int]]:
    return [[rng.randrange(top) for _ in range(columns)] for _ in range(rows)]


def e4m3_codes(rng: random.Random, rows: int, columns: int) -> list[list[int]]:
    """Small ones mostly; 127 and 255 are NaN."""
    return [
        [rng.choice([rng.randrange(72), 128 + rng.randrange(72), 126]) for _ in range(columns)] for _ in range(rows)
    ]


def scales(rng: random.Random, rows: int, columns: int, unit: float = 0.05) -> np.ndarray:
    return np.array([[unit * (0.5 + rng.random()) for _ in range(columns)] for _ in range(rows)], dtype=F)


def as_fp8(numbers: list[list[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8).view(torch.float8_e4m3fn)


def pack_stream(row: list[int], bits: int) -> list[int]:
    """One row as 32-bit words, the lowest bits first."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [stream >> (32 * n) & 0xFFFFFFFF for n in range(-(-len(row) * bits // 32))]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in words]


def turned(matrix: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in zip(*matrix, strict=True)]


def words(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def expand(
    found: list[list[int]], table: Callable[[int], float], scale: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    out = np.zeros((len(found), len(found[0])), dtype=F)
    for i, row in enumerate(found):
        for j, code in enumerate(row):
            out[i, j] = F(table(code)) * scale[i // block[0], j // block[1]]
    return out


def up(a: int, b: int) -> int:
    return -(-a // b)


def fp8(rng, out, width, *, block=None, suffix=".weight_scale_inv", declared=None, form: str = "float") -> Case:
    """`block`: rows and columns; None: one number."""
    rows, columns = block or (out, width)
    found, scale = e4m3_codes(rng, out, width), scales(rng, up(out, rows), up(width, columns))
    stored = torch.from_numpy(scale)
    if form == "ue8m0":
        powers = torch.randint(118, 124, scale.shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
        scale, stored = (2.0 ** (powers.double() - 127)).numpy().astype(F), powers.to(torch.uint8)
        if declared["quant_method"] == "fp8":
            stored = stored.view(torch.float8_e8m0fnu)
    if form == "scalar":
        stored = stored.reshape(())
    declared = declared or {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    return Case(declared, {".weight": as_fp8(found), suffix: stored}, expand(found, e4m3, scale, (rows, columns)))


def ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
            "quantization_status": "compressed"}  # fmt: skip


def int8(rng, out, width, *, group: int | None, zero: bool) -> Case:
    found, size = codes(rng, out, width, 256), group or width
    scale, zeros = scales(rng, out, width // size, 0.002), codes(rng, out, width // size, 60)
    signed = [[c - 256 if c > 127 else c for c in row] for row in found]
    weight = np.zeros((out, width), dtype=F)
    for i in range(out):
        for j in range(width):
            weight[i, j] = F(signed[i][j] - (zeros[i][j // size] if zero else 0)) * scale[i, j // size]
    declared = ct("int-quantized", num_bits=8, type="int", symmetric=not zero, strategy="group" if group else "channel",
                  group_size=group)  # fmt: skip
    stored = {".weight": torch.tensor(signed, dtype=torch.int8), ".weight_scale": torch.from_numpy(scale)}
    if zero:
        stored[".weight_zero_point"] = torch.tensor(zeros, dtype=torch.int8)
    return Case(declared, stored, weight)


def packed(rng, out, width, *, bits: int, group: int | None, zero: bool = False) -> Case:
    size, half = group or width, 2 ** (bits - 1)
    found, scale, zeros = (
        codes(rng, out, width, 2 * half),
        scales(rng, out, width // size),
        codes(rng, out, width // size, 2 * half),
    )
    weight = np.zeros((out, width), dtype=F)
    for i in range(out):
        for j in range(width):
            weight[i, j] = F(found[i][j] - (zeros[i][j // size] if zero else half)) * scale[i, j // size]
    stored = {
        ".weight_packed": words([pack_stream(row, bits) for row in found]), ".weight_scale": torch.from_numpy(scale),
        ".weight_shape": torch.tensor([out, width]),
    }  # fmt: skip
    if zero:
        stored[".weight_zero_point"] = words(turned([pack_stream(column, bits) for column in turned(zeros)]))
    declared = ct("pack-quantized", num_bits=bits, type="int", symmetric=not zero, strategy="group" if group else "channel",
                  group_size=group)  # fmt: skip
    return Case(declared, stored, weight)


def fp4(rng, out, width, *, how: str) -> Case:
    group = 32 if how == "mxfp4" else 16
    found = codes(rng, out, width, 16)
    pairs = torch.tensor([[row[j] | row[j + 1] << 4 for j in range(0, width, 2)] for row in found], dtype=torch.uint8)
    if how == "mxfp4":
        powers = [[rng.randrange(118, 125) for _ in range(width // group)] for _ in range(out)]
        scale = np.array([[2.0 ** (p - 127) for p in row] for row in powers], dtype=F)
        stored = {".weight_packed": pairs, ".weight_scale": torch.tensor(powers, dtype=torch.uint8)}
        declared = ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    else:
        small = [[rng.randrange(40, 100) for _ in range(width // group)] for _ in range(out)]
        total = F(0.01 * (1 + rng.random())) if how == "modelopt" else F(70 * (1 + rng.random()))
        scale = np.array(
            [[F(e4m3(s)) * total if how == "modelopt" else F(e4m3(s)) / total for s in row] for row in small], dtype=F
        )
        names = (".weight", ".weight_scale", ".weight_scale_2") if how == "modelopt" else (
            ".weight_packed", ".weight_scale", ".weight_global_scale")  # fmt: skip
        stored = dict(zip(names, (pairs, as_fp8(small), torch.tensor([total])), strict=True))
        declared = ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
        if how == "modelopt":
            declared = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Case(declared, stored, expand(found, lambda c: E2M1[c], scale, (1, group)))


def gptq(rng, out, width, *, bits: int, group: int = 16, order: bool = False, version: str = "gptq") -> Case:
    groups = up(width, group)
    found, zeros, scale = codes(rng, width, out, 2**bits), codes(rng, groups, out, 2**bits), scales(rng, groups, out)
    index = [j // group for j in range(width)]
    if order:
        rng.shuffle(index)
    weight = np.zeros((out, width), dtype=F)
    for i in range(out):
        for j in range(width):
            weight[i, j] = F(found[j][i] - zeros[index[j]][i]) * scale[index[j], i]
    less = 1 if version == "gptq" else 0
    stored = {
        ".qweight": words(turned([pack_stream(column, bits) for column in turned(found)])),
        ".qzeros": words([pack_stream([(z - less) % 2**bits for z in row], bits) for row in zeros]),
        ".scales": torch.from_numpy(scale), ".g_idx": torch.tensor(index, dtype=torch.int32),
    }  # fmt: skip
    declared = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False,
                "checkpoint_format": version}  # fmt: skip
    return Case(declared, stored, weight)


def awq(rng, out, width, *, group: int = 16) -> Case:
    groups = width // group
    found, zeros, scale = codes(rng, width, out, 16), codes(rng, groups, out, 16), scales(rng, groups, out)
    weight = np.zeros((out, width), dtype=F)
    for i in range(out):
        for j in range(width):
            weight[i, j] = F(found[j][i] - zeros[j // group][i]) * scale[j // group, i]

    def pack(rows: list[list[int]]) -> Tensor:
        return words([
            [w for at in range(0, out, 8) for w in pack_stream([row[at + AWQ_ORDER[n]] for n in range(8)], 4)] for row in rows
        ])  # fmt: skip

    stored = {".qweight": pack(found), ".qzeros": pack(zeros), ".scales": torch.from_numpy(scale)}
    return Case(
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, stored, weight
    )


def bnb4(rng, out, width, *, kind: str = "nf4", nested: bool = False, block: int = 64) -> Case:
    count, table = out * width, [F(v) for v in NF4] if kind == "nf4" else [F(v / 12) for v in (
        0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]  # fmt: skip
    found = [rng.randrange(16) for _ in range(count)]
    blocks = up(count, block)
    absmax = scales(rng, 1, blocks, 0.3)[0]
    pairs = [found[n] << 4 | (found[n + 1] if n + 1 < count else 0) for n in range(0, count, 2)]
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [out, width]}
    stored = {".weight": torch.tensor(pairs, dtype=torch.uint8)[:, None], ".weight.absmax": torch.from_numpy(absmax)}
    if nested:
        outer, values = scales(rng, 1, up(blocks, 4), 0.2)[0], [F(n / 256 - 0.5) for n in range(256)]
        small = [rng.randrange(256) for _ in range(blocks)]
        absmax = np.array([values[s] * outer[n // 4] + F(0.25) for n, s in enumerate(small)], dtype=F)
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.25}
        stored |= {".weight.absmax": torch.tensor(small, dtype=torch.uint8), ".weight.nested_absmax": torch.from_numpy(outer),
                   ".weight.nested_quant_map": torch.tensor(values)}  # fmt: skip
    stored[".weight.quant_map"] = torch.tensor(table)
    text = json.dumps(state).encode()
    stored[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    weight = np.array([table[c] * absmax[n // block] for n, c in enumerate(found)], dtype=F).reshape(out, width)
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": ["lm_head"]}  # fmt: skip
    return Case(declared, stored, weight)


def bnb8(rng, out, width) -> Case:
    found, scale = [[c - 127 for c in row] for row in codes(rng, out, width, 255)], scales(rng, out, 1, 0.4)[:, 0]
    weight = np.array([[F(c) * (scale[i] / F(127)) for c in row] for i, row in enumerate(found)], dtype=F)
    stored = {
        ".weight": torch.tensor(found, dtype=torch.int8),
        ".SCB": torch.from_numpy(scale),
        ".weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Case({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, stored, weight)


FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.embed*"]}
UE8M0 = {"quant_method": "fp8", "weight_block_size": [8, 8], "scale_fmt": "ue8m0", "fmt": "e4m3"}
CT8 = {"num_bits": 8, "type": "float", "symmetric": True}
MAKERS: dict[str, Callable[..., Case]] = {
    "fp8 blocks of 128": lambda *a: fp8(*a, block=(128, 128)),
    "fp8 blocks of 8 x 12": lambda *a: fp8(*a, block=(8, 12)),
    "fp8 powers of two": lambda *a: fp8(*a, block=(8, 8), declared=UE8M0, form="ue8m0"),
    "fp8 per tensor": lambda *a: fp8(*a, declared=PER_TENSOR, form="scalar"),
    "fp8 per tensor, weight_scale": lambda *a: fp8(*a, suffix=".weight_scale", declared=PER_TENSOR, form="scalar"),
    "fbgemm": lambda r, o, w: fp8(r, o, w, block=(1, w), suffix=".weight_scale", declared=FBGEMM),
    "ct float per tensor": lambda *a: fp8(*a, suffix=".weight_scale", form="scalar",
                                          declared=ct("float-quantized", strategy="tensor", **CT8)),
    "ct float per row": lambda r, o, w: fp8(r, o, w, block=(1, w), suffix=".weight_scale",
                                            declared=ct("float-quantized", strategy="channel", **CT8)),
    "ct float blocks": lambda *a: fp8(*a, block=(16, 16), suffix=".weight_scale", declared=ct(
        "float-quantized", strategy="block", block_structure=[16, 16], **CT8)),
    "ct int8 per row": lambda *a: int8(*a, group=None, zero=False),
    "ct int8 groups, zeros": lambda *a: int8(*a, group=16, zero=True),
    "ct int4": lambda *a: packed(*a, bits=4, group=16),
    "ct int4, zeros": lambda *a: packed(*a, bits=4, group=16, zero=True),
    "ct int3 per row": lambda *a: packed(*a, bits=3, group=None),
    "ct int2, zeros": lambda *a: packed(*a, bits=2, group=16, zero=True),
    "ct int8 packed": lambda *a: packed(*a, bits=8, group=None),
    "ct mxfp8": lambda *a: fp8(*a, block=(1, 32), suffix=".weight_scale", form="ue8m0",
                               declared=ct("mxfp8-quantized", strategy="group", group_size=32, **CT8)),
    "ct nvfp4": lambda *a: fp4(*a, how="nvfp4"),
    "ct mxfp4": lambda *a: fp4(*a, how="mxfp4"),
    "modelopt fp8": lambda *a: fp8(*a, suffix=".weight_scale", form="scalar", declared=MODELOPT),
    "modelopt nvfp4": lambda *a: fp4(*a, how="modelopt"),
    "gptq": lambda *a: gptq(*a, bits=4),
    "gptq act-order": lambda *a: gptq(*a, bits=4, order=True),
    "gptq v2, 8 bits": lambda *a: gptq(*a, bits=8, version="gptq_v2"),
    "gptq 3 bits": lambda *a: gptq(*a, bits=3, group=32),
    "gptq 2 bits": lambda *a: gptq(*a, bits=2, group=32),
    "awq": awq,
    "bnb nf4": bnb4,
    "bnb nf4, double": lambda *a: bnb4(*a, nested=True),
    "bnb fp4": lambda *a: bnb4(*a, kind="fp4", block=32),
    "bnb int8": bnb8,
}  # fmt: skip


def make(name: str, rng: random.Random, out: int, width: int) -> Case:
    return MAKERS[name](rng, out, width)


def write(model: nn.Module, name: str, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """A model's folder in a format: its blocks' linears, those of experts too, become random ones, all else stays, also what is
    around a language model. Returns the weights (fp32), by their names in the model."""
    rng = random.Random(seed)
    model.save_pretrained(folder)
    tensors, declared, weights = load_file(folder / "model.safetensors"), {}, {}
    blocks, left = find_linears(model, tensors), []
    read = FAMILIES[model.config.model_type].read_name if model.config.model_type in FAMILIES else str
    blocks |= {read(n).removesuffix(".weight"): n for n in tensors if re.search(r"\.experts\.\d+\.", n)}
    for linear, stored in sorted(blocks.items()):
        shape = tensors[stored].shape
        if name == "awq" and shape[0] % 8:  # words of eight outputs
            left.append(stored.removesuffix(".weight"))
            continue
        case = make(name, rng, *tensors.pop(stored).shape)
        declared, weights[f"{linear}.weight"] = case.declared, torch.from_numpy(case.weight)
        tensors |= {stored.removesuffix(".weight") + suffix: t.contiguous() for suffix, t in case.stored.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if weights:
        configure(folder, quantization_config=declared | ({"modules_to_not_convert": left} if left else {}))
    return weights


def find_linears(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Linears of a language model's blocks that are stored by themselves: name of the module → of the tensor."""
    found, names = {}, [n for n in stored if "vision" not in n and "visual" not in n]
    for name, module in model.named_modules():
        place = re.search(r"\.(layers|h|blocks)\.\d+\.", name)
        if isinstance(module, nn.Linear) and place and "vision" not in name and "visual" not in name:
            end = f"{name[place.start() :]}.weight"
            if (own := next((n for n in names if n.endswith(end)), None)) is not None:
                found[name] = own
    return found


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
