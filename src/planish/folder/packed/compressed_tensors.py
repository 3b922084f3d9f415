"""quant_method compressed-tensors: groups of modules, each with a format of its own.

    float-quantized, int-quantized, naive-quantized    weight and weight_scale; per tensor, row, group or block
    pack-quantized                                     integers of 2, 3, 4 or 8 bits in 32-bit words
    nvfp4-pack-quantized, mxfp4-pack-quantized         4-bit floats
    mxfp8-quantized                                    weight and weight_scale, powers of two per 32 numbers of a row

Reference: QuantizationConfig of the compressed-tensors library. Sparse formats, transforms (rotations that are computed while
the model runs) and other bits are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from planish.folder.packed.fp4 import FP4
from planish.folder.packed.integers import BITS, PackedLinear
from planish.folder.packed.packing import Declared, Known, Packing, is_listed, whole
from planish.folder.packed.scaled import CHANNEL, TENSOR, Scaled

NAIVE = ("float-quantized", "int-quantized", "naive-quantized")
CLASSES = ("Linear", "Embedding")  # targets that are classes of modules


class CompressedTensors(Declared):
    """`config_groups`: name → targets, weights, format; `ignore`: modules that are stored as they were."""

    name = "compressed-tensors"
    marks = {f".weight{s}": s for s in ("_packed", "_scale", "_shape", "_zero_point", "_global_scale", "_g_idx")}

    def __init__(self, config: Mapping[str, Any]):
        for part in ("sparsity_config", "transform_config"):
            found = config.get(part) or {}
            if found.get("format") not in (None, "dense") or found.get("config_groups"):
                raise ValueError(f"{part} is not read: the stored weights are not those of the model")
        status = config.get("quantization_status", "compressed")
        if status not in ("compressed", "frozen"):  # what is stored is seen by its types; the second is in older files
            raise ValueError(f"quantization_status {status!r} is not read; expected compressed")
        form, groups = config.get("format"), config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError("config_groups is missing")
        self.ignored = config.get("ignore") or []
        self.groups: list[tuple[list[str], Packing]] = []
        for name, group in groups.items():
            if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
                raise ValueError(f"{name} has no list of targets")
            if isinstance(weights := group.get("weights"), dict):
                packing = make_packing(group.get("format") or form, weights)
                self.groups.append((list(map(str, group["targets"])), packing))

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        module = stem.removesuffix(".weight")
        for exact in (True, False):  # targets that name modules go before classes of modules
            for targets, packing in self.groups:
                if any(matches(module, t) if exact else t in CLASSES for t in targets):
                    return packing
        raise ValueError("is stored quantised, and is no target of config_groups")

    def skips(self, module: str) -> bool:
        return any(
            matches(module, str(name)) or (is_listed(module, [name]) and ":" not in str(name)) for name in self.ignored
        )


def matches(module: str, target: str) -> bool:
    """As the library reads targets: "re:…" from the beginning of the name, else the name itself."""
    try:
        return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module
    except re.error as error:
        raise ValueError(f"target {target!r} is no regular expression: {error}") from None


def make_packing(form: Any, weights: Mapping[str, Any]) -> Packing:
    """What a format and the arguments of its weights say; ValueError names what is not read."""
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    zero, size = not weights.get("symmetric", True), weights.get("group_size")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise ValueError(f"actorder {weights['actorder']!r} is not read")
    if strategy is None:
        strategy = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    if form == "nvfp4-pack-quantized":
        whole(size, "group_size", (16,))
        return FP4("NVFP4", 16)
    if form == "mxfp4-pack-quantized":
        whole(size, "group_size", (32,))
        return FP4("MXFP4", 32, power=True)
    if form == "mxfp8-quantized":
        return Scaled(torch.float8_e4m3fn, (1, whole(size, "group_size", (32,))), power=True)
    if form == "pack-quantized" and kind == "int":
        bits = whole(bits, "num_bits", BITS)
        groups = {"channel": 0, "tensor": -1}
        if strategy == "group":
            groups["group"] = whole(size, "group_size")
        if strategy not in groups:
            raise ValueError(f"strategy {strategy!r} is not read; expected tensor, channel or group")
        return PackedLinear(bits, groups[strategy], zero)
    if form not in NAIVE:
        raise ValueError(
            f"format {form!r} is not read; expected {', '.join(NAIVE)}, pack-, nvfp4-pack- or mxfp4-pack-quantized"
        )
    if bits != 8 or kind not in ("int", "float"):
        raise ValueError(
            f"weights of {bits} bits and type {kind!r} are not read in format {form}; expected 8, int or float"
        )
    block = weights.get("block_structure")
    block = [int(n) for n in block.split("x")] if isinstance(block, str) and re.fullmatch(r"\d+x\d+", block) else block
    sizes = {"tensor": TENSOR, "channel": CHANNEL}
    if strategy == "group":
        sizes["group"] = (1, whole(size, "group_size"))
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        sizes["block"] = (whole(block[0], "block_structure"), whole(block[1], "block_structure"))
    if strategy not in sizes:
        raise ValueError(
            f"strategy {strategy!r} (block {block!r}) is not read; expected tensor, channel, group or block"
        )
    return Scaled(torch.float8_e4m3fn if kind == "float" else torch.int8, sizes[strategy], zero=zero)
