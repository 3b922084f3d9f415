"""What a config.json declares about how its weights are stored: the formats that are read, by `quant_method`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from planish.errors import InputError
from planish.folder.packed.bitsandbytes import BitsAndBytes
from planish.folder.packed.compressed_tensors import CompressedTensors
from planish.folder.packed.fp4 import MXFP4
from planish.folder.packed.fp8 import FP8
from planish.folder.packed.ggml import Ggml
from planish.folder.packed.integers import AWQ, GPTQ
from planish.folder.packed.modelopt import ModelOpt
from planish.folder.packed.packing import Declared

METHODS: dict[str, Callable[[Mapping[str, Any]], Declared]] = {
    "fp8": FP8, "fbgemm_fp8": FP8, "mxfp4": MXFP4, "compressed-tensors": CompressedTensors, "modelopt": ModelOpt,
    "gptq": GPTQ, "awq": AWQ, "bitsandbytes": BitsAndBytes, "ggml": Ggml,
}  # fmt: skip
FIELDS = ("quantization_config", "compression_config")  # of config.json; the second in old checkpoints
MODELOPT = "hf_quant_config.json"  # where that library writes the declaration, if not into config.json
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_raw(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of the folder as it is; empty where there is none that can be read."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def find_declared(folder: Path) -> Declared | None:
    """How a folder's weights are packed; None where they are not, or in a way that is not read (which is refused elsewhere:
    other libraries may still load the folder). InputError names settings of a known method that are not read."""
    raw, where = read_raw(folder), "config.json"
    config = next((raw[n] for n in FIELDS if isinstance(raw.get(n), dict)), None)
    if config is None and isinstance(own := read_raw(folder, MODELOPT).get("quantization"), dict):
        config, where = {**own, "quant_method": "modelopt"}, MODELOPT
    if config is None:
        return None
    method = config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else config.get("format"))
    make = METHODS.get(method) if isinstance(method, str) else None
    if make is None:
        return None
    try:
        return make({**config, "quant_method": method})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{folder}/{where} declares {method} weights: {error}") from None


def find_dtype(folder: Path) -> torch.dtype | None:
    """The type that config.json says the model computes in."""
    raw = read_raw(folder)
    return FLOATS.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."))
