"""Calibration activations between blocks: on the accelerator and in memory up to a limit each, beyond it in an unnamed file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import lanes
from planish.calibrate.copies import Wait, find_copies

STORED = 64 << 20  # bytes


class MemoryLimits:
    """How many bytes all activations of one stream may hold in memory, and where the rest goes.

    Default: a quarter of the machine's memory, shared with the other processes on it; files in `folder` (the system's
    temporary one by default) have no name and vanish with the process, however it ends. `stored`: the limit of what is
    stored of all blocks at once. `device_limit`: bytes that may stay on an accelerator, see `find_device_limit`.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None, stored: int = STORED):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.limit = memory // 4 // lanes.neighbours() if limit is None else limit
        self.folder, self.used, self.stored_limit = folder, 0, stored
        self.device_limit, self.device_used = 0, 0

    @cached_property
    def stored(self) -> MemoryLimits:
        """The limits of what is stored of all blocks at once: their inputs, their statistics."""
        return MemoryLimits(min(self.limit, self.stored_limit), self.folder)


class Activations(Sequence[Tensor]):
    """One tensor per batch, on the CPU wherever it is kept; those beyond the room's limit are written out and read again when
    asked for.

    Plain reads and writes, no memory map: mapped pages would count as resident. An accelerator computes meanwhile: the last tensor
    comes from there while the next is made, and the next one goes there while one is used.
    """

    def __init__(self, limits: MemoryLimits, tensors: Iterable[Tensor] = ()):
        self.limits, self.held = limits, [0, 0]
        self.items: list[Tensor | tuple[int, torch.dtype, torch.Size]] = []
        self.coming: Wait | None = None  # the last tensor, if it is on its way here
        self.going: dict[int, Wait] = {}  # the one that is probably asked for next, on its way to the accelerator
        self.file: Any = None
        weakref.finalize(self, release, limits, self.held)
        for t in tensors:
            self.append(t)

    def __len__(self) -> int:
        return len(self.items) + (self.coming is not None)

    def append(self, tensor: Tensor) -> None:
        self.settle()
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_cpu and self.limits.device_used + size <= self.limits.device_limit:
            self.limits.device_used += size
            self.held[1] += size
            self.items.append(tensor if tensor.untyped_storage().nbytes() == size else tensor.clone())
            return
        if copies := find_copies(tensor.device):
            self.coming = copies.bring(tensor)
        else:
            self.keep(tensor.to("cpu"))

    def settle(self) -> None:
        """Keep the tensor that is on its way here, if there is one."""
        if self.coming is not None:
            tensor, self.coming = self.coming(), None
            self.keep(tensor)

    def keep(self, tensor: Tensor) -> None:
        """A tensor of the CPU, in memory or in the file."""
        size = tensor.numel() * tensor.element_size()
        if self.limits.used + size <= self.limits.limit:
            self.limits.used += size
            self.held[0] += size
            self.items.append(tensor)
            return
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self.limits.folder)  # noqa: SIM115
            weakref.finalize(self, self.file.close)
        start = self.file.seek(0, os.SEEK_END)
        self.file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.items.append((start, tensor.dtype, tensor.shape))

    def __getitem__(self, n):  # type: ignore[override]
        return self.read(n).to("cpu")

    def read(self, n: int) -> Tensor:
        """Batch n where it is kept."""
        self.settle()
        item = self.items[n]
        if not isinstance(item, tuple):
            return item
        start, dtype, shape = item
        tensor = torch.empty(shape, dtype=dtype)
        self.file.seek(start)
        if self.file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
            raise OSError("activations that were written out cannot be read back")
        return tensor

    def send(self, n: int, device: torch.device) -> Tensor:
        """Batch n on a device; if it has to go there, the one after it goes while this one is used."""
        copies = find_copies(device)
        if copies is None:
            return self.read(n).to(device)
        waiting, self.going = self.going.pop(n, None), {}
        tensor = self.read(n) if waiting is None else waiting()
        if waiting is None and tensor.is_cpu:
            tensor = copies.send(tensor)()
        if n + 1 < len(self) and (later := self.read(n + 1)).is_cpu:
            self.going[n + 1] = copies.send(later)
        return tensor


def release(limits: MemoryLimits, held: list[int]) -> None:
    limits.used -= held[0]
    limits.device_used -= held[1]


def find_device_limit(device: torch.device) -> int:
    """Bytes of activations that may stay on this device: a quarter of its memory; none on what is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(device).total_memory // 4


def fetch(tensors: Sequence[Tensor], n: int, device: torch.device) -> Tensor:
    """Tensor n on a device, without a way over the CPU where it is kept there."""
    return tensors.send(n, device) if isinstance(tensors, Activations) else tensors[n].to(device)
