"""What every export reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.errors import InputError
from planish.stats import is_finite

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
    """Floating tensors in `dtype`; as they are (products in float32, the rest as stored) without one. Raises InputError
    where one of them is, or becomes, infinite or NaN."""
    if dtype is not None:
        tensors = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()}
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"tensor {name} holds NaN or infinity as {kind}: its products or values exceed that type; choose a wider --dtype"
        )


def check_apart(output: Path, folder: Path) -> None:
    """An exported folder must not replace the model that it is made from, nor a folder that holds it."""
    model, place = folder.resolve(), output.resolve()
    if place == model or place in model.parents:
        raise InputError(f"output {output} would replace the model {folder}; choose another folder")


def check_file(output: Path, folder: Path, suffix: str) -> None:
    """An exported file must not replace a file of the model's; earlier exports (`suffix`) may be replaced."""
    model, place = folder.resolve(), output.resolve()
    if output.is_dir():
        raise InputError(f"output {output} is a folder; give the file to write")
    same_place = output.parent.resolve() / output.name
    for file in model.iterdir() if model.is_dir() else [model]:
        if (place in (file, file.resolve()) or same_place == file) and (file.suffix != suffix or file == model):
            raise InputError(f"output {output} would replace a file of the model {folder}; choose another name")


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown type {dtype!r} for a folder; expected one of {', '.join(DTYPES)}")


def describe_products(total: int, size: int, stored: int) -> list[str]:
    """What keeping products in float32 costs in a folder of `total` numbers and `size` bytes, `stored` bytes a number."""
    extra = size - total * stored
    if extra <= 0:
        return []
    return [f"products are kept in float32: {extra:+,} bytes over rounding them (--dtype bf16 or f16 rounds)"]
