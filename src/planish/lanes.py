"""Several processes, one result: everything is summed in an order that does not depend on how many there are.

Calibration batches belong to `LANES` lanes, contiguous runs of batches. A process runs whole lanes; lane sums are
added in the order of lanes. One process without torch.distributed follows the same order.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from planish.errors import InputError

LANES = 8
JOINING = timedelta(minutes=10)
PATIENCE = timedelta(hours=24)  # one process may solve a large unit for long while the others wait

S = TypeVar("S")
T = TypeVar("T")


class ProcessLost(Exception):
    """Another process has ended; what was finished is on disk."""


@contextmanager
def together() -> Iterator[None]:
    """Within the context an error of torch.distributed means that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"process {rank()} of {count()} lost another one ({' '.join(str(error).split())[:200]})"
        ) from None


def start(device: str = "cpu") -> bool:
    """Join the processes that torchrun started, once; False where there is only this one."""
    if dist.is_available() and dist.is_initialized():
        return True
    if read("WORLD_SIZE", 1) < 2:
        return False
    if device.startswith("cuda"):
        torch.cuda.set_device(read("LOCAL_RANK", 0))
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=JOINING))
        store.set_timeout(JOINING)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        store = dist.PrefixStore("planish", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot join: {' '.join(str(error).split())[:200]}; "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None
    atexit.register(dist.destroy_process_group)
    return True


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world() -> int:
    """How many processes torchrun started, joined or not."""
    return count() if count() > 1 else read("WORLD_SIZE", 1)


def neighbours() -> int:
    """How many of them run on this machine."""
    return max(1, read("LOCAL_WORLD_SIZE", 1)) if count() > 1 else 1


def read(name: str, default: int) -> int:
    """A whole number from the environment."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}, expected a whole number; unset it")
    return int(text)


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the first, or only, of the processes that torchrun started, joined or not."""
    return rank() == 0 if count() > 1 else read("RANK", 0) == 0


def find_lane(i: int, n: int) -> int:
    """Lane of the i-th of n batches. Fewer batches than lanes are in the first ones, so that no process is left without."""
    return i * min(LANES, n) // n


def own_lanes() -> Iterator[int]:
    """Lane numbers of this process, rising."""
    return iter(range(rank(), LANES, count()))


def share_out(tasks: Sequence[S], cost: Callable[[S], float], do: Callable[[S], T]) -> list[T]:
    """`do` of every task, on every process; each task is done by one of them."""
    own = {n: do(tasks[n]) for n in own_work([cost(t) for t in tasks])}
    found = {n: value for part in gather(own) for n, value in part.items()}
    return [found[n] for n in range(len(tasks))]


def own_work(costs: Sequence[float]) -> list[int]:
    """Numbers of the tasks this process does, rising: costliest first to whoever has least, so all know who does what."""
    loads = [0.0] * count()
    owner = {}
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owner[n] = loads.index(min(loads))
        loads[owner[n]] += costs[n]
    return sorted(n for n, who in owner.items() if who == rank())


def gather(value: T) -> list[T]:
    """Every process's value, by rank, on every process. One after the other: together, all would be as long as the longest."""
    return [share(value, source) for source in range(count())]


def share(value: T, source: int = 0) -> T:
    """One process's value on every process."""
    if count() == 1:
        return value
    box = [value]
    with together():
        dist.broadcast_object_list(box, src=source)
    return box[0]


def share_tensors(tensors: dict[Any, Tensor], source: int) -> dict[Any, Tensor]:
    """One process's tensors on every process, without pickling them."""
    if count() == 1:
        return tensors
    out = make_room(share(describe(tensors), source), tensors if rank() == source else None)
    for t in out.values():
        with together():
            dist.broadcast(t, src=source)
    return out


def bring_tensors(tensors: dict[Any, Tensor], source: int, target: int) -> dict[Any, Tensor]:
    """One process's tensors on another one, where they may be its own; nothing on all others."""
    if source == target or rank() not in (source, target):
        return tensors if rank() == target else {}
    with together():
        if rank() == source:
            dist.send_object_list([describe(tensors)], target)
            for t in tensors.values():
                dist.send(t.contiguous(), target)
            return {}
        box: list[Any] = [None]
        dist.recv_object_list(box, source)
        out = make_room(box[0])
        for t in out.values():
            dist.recv(t, source)
        return out


Layout = dict[Any, tuple[torch.Size, torch.dtype, str]]


def describe(tensors: dict[Any, Tensor]) -> Layout:
    return {k: (t.shape, t.dtype, t.device.type) for k, t in tensors.items()}


def make_room(layout: Layout, held: dict[Any, Tensor] | None = None) -> dict[Any, Tensor]:
    """Tensors to receive into, or those that are `held` already."""
    if held is not None:
        return {k: t.contiguous() for k, t in held.items()}
    return {k: torch.empty(shape, dtype=dtype, device=device) for k, (shape, dtype, device) in layout.items()}
