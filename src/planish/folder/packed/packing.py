"""How one weight is stored in several tensors: what every format says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from planish.folder.safetensors import NAMES

Rows = Callable[[int, int], Tensor]


class Known(NamedTuple):
    """A stored tensor: what its header says of it, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Packing(ABC):
    """One weight's storage. Its parts are the tensors named stem + suffix.

    `needed`, `optional`: role of a part → suffix. `result`: suffix of the weight's own name. Of a weight of three axes the first
    axis of every part counts matrices, which can be opened without the others. ValueErrors say what is wrong in words that
    follow the tensor's name.
    """

    needed: ClassVar[Mapping[str, str]]
    optional: ClassVar[Mapping[str, str]] = {}
    result: ClassVar[str] = ""

    @abstractmethod
    def describe(self) -> str:
        """The storage type in few words, for reports."""

    @abstractmethod
    def measure(self, parts: Mapping[str, Known]) -> tuple[int, ...]:
        """Shape of the weight, from the parts by role, which have to fit one another. Of these only small ones are read that
        say more about the shape."""

    @abstractmethod
    def open(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        """(first, count) → these rows of the weight, as a matrix of shape[-1] columns, in fp32."""


class Declared(ABC):
    """A checkpoint's quantization_config, understood. `marks`: endings that only names of packed weights' parts have → what
    of them comes behind the stem."""

    name: str
    marks: Mapping[str, str]

    @abstractmethod
    def pick(self, stem: str, parts: Mapping[str, Known]) -> Packing:
        """How the weight of this stem is stored; `parts` by suffix. ValueError where the configuration does not say."""

    def skips(self, module: str) -> bool:
        """Whether a module is listed as not converted."""
        return False


def expect_type(part: Known, role: str, *dtypes: torch.dtype) -> None:
    if part.dtype not in dtypes:
        names = " or ".join(NAMES[d] for d in dtypes)
        raise ValueError(f"has {role} of type {NAMES.get(part.dtype, part.dtype)}, expected {names}")


def expect_shape(part: Known, role: str, *shapes: tuple[int, ...]) -> None:
    if tuple(part.shape) not in shapes:
        raise ValueError(f"has {role} of shape {tuple(part.shape)}, expected {' or '.join(map(str, shapes))}")


def expect_zero(declared: bool, parts: Mapping[str, Known], role: str) -> None:
    """A zero point is there where the configuration says so, and nowhere else."""
    if declared != (role in parts):
        raise ValueError("has no zero point" if declared else "has a zero point, and its configuration declares none")


def check_scale(scale: Tensor, role: str = "scales") -> Tensor:
    """The scale in fp32; no NaN or infinity in it (ValueError)."""
    wide = scale.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError(f"has NaN or infinity among its {role}")
    return wide


def is_listed(module: str, patterns: Any) -> bool:
    """Whether a name, or a module around or ending it, is in a list of modules ("lm_head", "mlp.gate")."""
    dotted = f".{module}."
    return any(isinstance(p, str) and p and f".{p.strip('.')}." in dotted for p in patterns or ())


def whole(value: Any, name: str, allowed: tuple[int, ...] = ()) -> int:
    """A positive whole number of a configuration, one of `allowed` if there are any (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (allowed and value not in allowed):
        expected = ", ".join(map(str, allowed)) or "a positive whole number"
        raise ValueError(f"{name} {value!r} is not read; expected {expected}")
    return value
