"""quant_method modelopt (TensorRT Model Optimizer): FP8 per tensor, NVFP4.

    FP8    weight (out, in), weight_scale ()
    NVFP4  weight (out, in / 2), weight_scale (out, in / 16), weight_scale_2 (), which multiplies

Modules that are left as they were are listed as `ignore` (`exclude_modules`), with * and ?.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from planish.folder.packed.fp4 import ModelOptFP4
from planish.folder.packed.packing import Declared, Known, Packing
from planish.folder.packed.scaled import TENSOR, Scaled

ALGORITHMS: dict[str, Packing] = {"FP8": Scaled(torch.float8_e4m3fn, TENSOR), "NVFP4": ModelOptFP4("NVFP4", 16)}


class ModelOpt(Declared):
    name = "modelopt"
    marks = {".weight_scale": "_scale", ".weight_scale_2": "_scale_2"}

    def __init__(self, config: Mapping[str, Any]):
        algorithm = config.get("quant_algo")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"quant_algo {algorithm!r} is not read; expected {' or '.join(ALGORITHMS)}")
        if (size := config.get("group_size")) not in (None, 16) and algorithm == "NVFP4":
            raise ValueError(f"group_size {size!r} is not read; expected 16")
        self.packing = ALGORITHMS[algorithm]
        self.listed = config.get("ignore") or config.get("exclude_modules") or []

    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        return self.packing

    def skips(self, module: str) -> bool:
        return any(fnmatchcase(module, str(pattern)) for pattern in self.listed)
