"""A simulated accelerator: its tensors are the CPU's, but say that they are elsewhere, and no operation takes both kinds.

What runs on it runs on a real one as far as places of tensors go: a tensor made on the CPU by mistake, or one that numpy is to
read, is an error here as it is there. torch's "lazy" device stands in, which no build implements.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from planish.solvers import offload

DEVICE = torch.device("lazy")
INDEXED = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")
aten = torch.ops.aten
AT_ONCE = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}  # bits would be lost here
COPIES = ("aten._to_copy.default", "aten.copy_.default")


class There(Tensor):
    """A tensor that seems to be on the accelerator."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Simulate(TorchDispatchMode):
    """Within the context the accelerator takes tensors, and makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, int] = {}
        self.here: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(function, args, kwargs or {})
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        where = self.there if any(isinstance(t, There) for t in made) else self.here
        where[str(function)] = where.get(str(function), 0) + sum(t.numel() for t in made)
        return out


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class SimulateCalls(TorchFunctionMode):
    """Calls of which `Simulate` sees nothing, or too late: tensors of Python's numbers, and products with vectors, whose results
    torch gives another shape in place."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in PRODUCTS and any(isinstance(a, There) for a in args) and any(a.dim() == 1 for a in args):
            assert all(isinstance(a, There) for a in args), "product of tensors on different devices"
            return There(torch.matmul(*map(lookup, args)))
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], There):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(p) if isinstance(p, list) else p for p in places)
            return function(args[0], places, *args[2:])
        if function is Tensor.new_tensor and isinstance(args[0], There):
            return There(args[0].here.new_tensor(*args[1:], **kwargs))
        if torch.device(kwargs.get("device") or "cpu") != DEVICE:
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            return args[0] if isinstance(args[0], There) else There(function(*args, **{**kwargs, "device": "cpu"}))
        try:
            return function(*args, **kwargs)
        except NotImplementedError:  # made by C++ in one go
            return There(function(*args, **{**kwargs, "device": "cpu"}))


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there, name = any(isinstance(t, There) for t in tensors), str(function)
    if there and name not in COPIES:
        places = args[1] if name in INDEXED and isinstance(args[0], There) else ()  # these may be the CPU's
        away = [t for t in tensors if not isinstance(t, There) and t.dim() and not any(t is p for p in places)]
        assert not away, (
            f"{name}: expected all tensors to be on the same device, not one of {tuple(away[0].shape)} on the CPU"
        )
    if name == "aten.copy_.default":
        there = isinstance(args[0], There)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device) == DEVICE
        assert not there or kwargs.get("generator") is None, f"{name}: expected a generator of the same device"
        kwargs = {**kwargs, "device": torch.device("cpu")} if there else kwargs
    known = {id(t.here): t for t in tensors if isinstance(t, There)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = known.get(id(value))  # what is changed in place, unless its shape was
        return There(value) if same is None or same.shape != value.shape else same

    out = AT_ONCE.get(function, function)(*tree_map(lookup, args), **tree_map(lookup, kwargs))
    return tree_map(wrap, out) if there else out


def lookup(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


@contextmanager
def solving_there(monkeypatch: Any, large: int = 0):
    """Solves go to the simulated accelerator, as they would go to a real one."""
    monkeypatch.setattr(offload, "LARGE", large)
    token = offload._device.set(DEVICE)
    try:
        with SimulateCalls(), Simulate() as seen:
            yield seen
    finally:
        offload._device.reset(token)
