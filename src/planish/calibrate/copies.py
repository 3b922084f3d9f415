"""Copies between the CPU's memory and an accelerator that are made while it computes: on a stream of their own, by way of pinned
memory, of which there is never more than a batch in each direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Wait = Callable[[], Tensor]  # gives what was copied, once it is complete


class Copies:
    """Copies from and to one CUDA device. What is copied must not change before it is waited for."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def bring(self, tensor: Tensor) -> Wait:
        """A tensor of the device, on its way to the CPU."""
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            staged.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        done = self.stream.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return staged.clone()  # pinned memory is for the next one

        return wait

    def send(self, tensor: Tensor) -> Wait:
        """A tensor of the CPU, on its way to the device."""
        staged = tensor.pin_memory()
        with torch.cuda.stream(self.stream):
            there = staged.to(self.device, non_blocking=True)
        done = self.stream.record_event()

        def wait() -> Tensor:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(done)
            there.record_stream(now)
            return there

        return wait


@cache
def find_copies(device: torch.device) -> Copies | None:
    """Of a device; None of the CPU, and of devices that have no streams."""
    return Copies(device) if device.type == "cuda" and torch.cuda.is_available() else None
