"""Solving on the accelerator: what is solved is given on the CPU and goes there, its result comes back.

Statistics and weights of one block lie beside one another in the CPU's memory. A unit is solved on the device as a whole
(`solve_there`): a matrix goes there once, when it is first asked for. If it does not fit, the CPU solves the unit, and only
single factorisations leave it, one matrix or two at a time (`offloaded`). Where these do not fit either, or the device's
libraries fail, the CPU does them: then a result may differ from another run's in its last bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from planish.core import Weights
from planish.stats import Stats, Tap

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
        there = functools.partial(move, device=device)
        return attempt(
            lambda: function(*map(there, args), **{k: there(a) for k, a in kwargs.items()}),
            lambda: function(*args, **kwargs),
            device,
        )

    return call


def solve_there(solve: Callable[[Weights, Stats], T], weights: Weights, stats: Stats, taps: Iterable[Tap]) -> T:
    """`solve` of a block's weights and statistics, on the accelerator if one of the sums of `taps`, which it asks for, is large;
    what it gives is on the CPU."""
    device = _device.get()
    sizes = [t.numel() for tap in taps for t in stats.sums.get(tap, {}).values()]
    if device is None or max(sizes, default=0) < LARGE:
        return solve(weights, stats)

    def there() -> T:
        moved = copy.copy(stats)
        moved.sums = Arriving(stats.sums, device)  # type: ignore[assignment]
        return solve(Arriving(weights, device), moved)

    return attempt(there, lambda: solve(weights, stats), device)


def attempt(there: Callable[[], T], here: Callable[[], T], device: torch.device) -> T:
    """What `there` gives, on the CPU; or if the device has no room for it or fails, what `here` gives."""
    try:
        with device:  # what is made on the way is made there
            return move(there(), torch.device("cpu"))
    except RuntimeError as error:  # OutOfMemoryError and LinAlgError among them
        if not isinstance(error, FAILURES) and not any(name in str(error) for name in LIBRARIES):
            raise
    torch.cuda.empty_cache()  # not before the error is gone, which holds what was made there
    return here()


class Arriving(Mapping[Any, Any]):
    """The values of another mapping on a device, each brought there when it is first asked for."""

    def __init__(self, here: Mapping[Any, Any], device: torch.device):
        self.here, self.device, self.there = here, device, dict[Any, Any]()

    def __getitem__(self, key: Any) -> Any:
        if key not in self.there:
            self.there[key] = move(self.here[key], self.device)
        return self.there[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.here)

    def __len__(self) -> int:
        return len(self.here)


def move(value: Any, device: torch.device) -> Any:
    """A tensor, or all that tuples, lists, dictionaries and dataclasses hold, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [move(v, device) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: move(v, device) for name, v in vars(value).items()})
    return value
