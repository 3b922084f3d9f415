"""What every export reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from planish.errors import InputError

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Written:
    """A file or folder that an export wrote."""

    target: str
    output: str
    architecture: str
    dtype: str
    parameters: int  # written
    stored_parameters: int  # of the folder that was exported
    bytes: int
    tokenizer: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def keep_dtype(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Floating tensors in `dtype`; as they are (products in float32, the rest as stored) without one."""
    if dtype is None:
        return tensors
    return {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()}


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown type {dtype!r} for a folder; expected one of {', '.join(DTYPES)}")


def describe_products(total: int, size: int, stored: int) -> list[str]:
    """What keeping products in float32 costs in a folder of `total` numbers and `size` bytes, `stored` bytes a number."""
    extra = size - total * stored
    if extra <= 0:
        return []
    return [f"products are kept in float32: {extra:+,} bytes over rounding them (--dtype bf16 or f16 rounds)"]
