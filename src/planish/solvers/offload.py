"""Large factorisations on the accelerator: what a function of matrices is given on the CPU goes there, its result comes back.

Solving needs statistics and weights of one block beside one another, which the CPU's memory holds; only what takes long
leaves it, one matrix or two at a time. Where they do not fit there, or the device's libraries fail, the CPU does it: then a result
may differ from another run's in its last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
LARGE = 512 * 512  # numbers of an argument from which the way there and back is worth it
FAILURES = (torch.OutOfMemoryError, torch.linalg.LinAlgError)
LIBRARIES = ("CUBLAS", "CUSOLVER", "cublas", "cusolver")  # they have no memory of their own left, or did not converge
_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def offload(device: torch.device | str) -> Iterator[None]:
    """Within the context `offloaded` functions compute with large matrices on this device, if it has fp64 (cuda)."""
    device = torch.device(device)
    usable = device.type == "cuda" and torch.cuda.is_available()  # what is planned for may be elsewhere
    token = _device.set(device if usable else None)
    try:
        yield
    finally:
        _device.reset(token)


def offloaded(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of tensors whose result is tensors (or a tuple of them, or None) on the device of the first."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        device = _device.get()
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if device is None or not any(t.numel() >= LARGE for t in tensors) or any(not t.is_cpu for t in tensors):
            return function(*args, **kwargs)
        try:
            with device:  # what the function makes is made there
                there = (move(a, device) for a in args)
                return move(function(*there, **{k: move(a, device) for k, a in kwargs.items()}), torch.device("cpu"))
        except RuntimeError as error:  # OutOfMemoryError and LinAlgError among them
            if not isinstance(error, FAILURES) and not any(name in str(error) for name in LIBRARIES):
                raise
        torch.cuda.empty_cache()  # not before the error is gone, which holds what was made there
        return function(*args, **kwargs)

    return call


def move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(move(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value
