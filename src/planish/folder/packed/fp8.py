"""quant_method fp8 and fbgemm_fp8: E4M3 numbers and scales that multiply them.

    fp8         weight (out, in), weight_scale_inv (⌈out / 128⌉, ⌈in / 128⌉): DeepSeek, Qwen, GLM; transformers writes stacked
                experts as gate_up_proj (experts, out, in), gate_up_proj_scale_inv. Without weight_block_size one number
    fbgemm_fp8  weight (out, in), weight_scale (out, 1)

Scales of activations, which engines use while they run, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from planish.folder.packed.packing import Declared, Known, Packing, is_listed, whole
from planish.folder.packed.scaled import CHANNEL, TENSOR, Scaled, ScaledInverse

E4M3 = torch.float8_e4m3fn


class FP8(Declared):
    """`weight_block_size`: rows and columns of a block, none for one scale per tensor."""

    marks = {"_scale_inv": "_scale_inv", ".weight_scale": "_scale", "_proj_scale": "_scale"}

    def __init__(self, config: Mapping[str, Any]):
        self.name = str(config["quant_method"])
        if (form := config.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"fmt {form!r} is not read; expected e4m3")
        if (scales := config.get("scale_fmt") or "float") not in ("float", "ue8m0"):
            raise ValueError(f"scale_fmt {scales!r} is not read; expected float or ue8m0")
        self.power = scales == "ue8m0"
        size = config.get("weight_block_size")
        if size is not None and not (isinstance(size, list) and len(size) == 2):
            raise ValueError(f"weight_block_size {size!r} is not read; expected [rows, columns]")
        self.block = (
            TENSOR if size is None else (whole(size[0], "weight_block_size"), whole(size[1], "weight_block_size"))
        )
        if self.name == "fbgemm_fp8":
            self.block = CHANNEL
        self.listed = config.get("modules_to_not_convert")

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        inverse = "_scale_inv" in parts
        kind = ScaledInverse if inverse else Scaled
        scale = parts.get("_scale_inv" if inverse else "_scale")
        byte = scale is not None and scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
        return kind(E4M3, self.block, power=self.power and byte)  # scales of this form may be stored as floats, too

    def skips(self, module: str) -> bool:
        return is_listed(module, self.listed)
