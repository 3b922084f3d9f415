"""What the attention of one block gives, kept: where only what comes behind it is solved, later runs need not attend again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish.activations import Activations, Room


class Attended:
    """What `o` reads in all batches of one block. A run of the block with the same q, k and v can start there.

    The first batch of every run goes through the whole block. Where `o` reads in it what was kept, bit for bit, and the
    attention returns what `o` makes of that, the other batches are led from what was kept through `o` alone: the same
    results. Else what is seen in this run is kept from then on. Whoever changes more than `o` and the MLP calls `forget`,
    because one batch is a check and no proof.
    """

    def __init__(self, room: Room, batches: int):
        self.room, self.batches = room, batches
        self.forget()

    def forget(self) -> None:
        self.kept: Activations | None = None
        self.start()

    @property
    def ready(self) -> Attended | None:
        """Itself where a run has been kept: what the last run of a block takes, behind which nothing is to be kept."""
        return self if self.kept is not None else None

    def start(self) -> None:
        self.fresh = Activations(self.room)
        self.same = False
        self.result: Callable[[Tensor], Any] | None = None  # o's output → what the attention returns

    @contextmanager
    def batch(self, n: int, attention: nn.Module, o: nn.Module, skip: bool = True) -> Iterator[None]:
        """Within the context the block runs batch n, in order; without `skip` all of it, for somebody looks at q, k or v."""
        if n == 0:
            self.start()
        handles = []
        if n and skip and self.result is not None:
            attention.forward = self.follow(n, o, self.result)
        elif n == 0:
            handles.append(attention.register_forward_hook(lambda m, args, out: self.check(o, out), prepend=True))
        if not self.same:
            handles.append(o.register_forward_pre_hook(lambda m, args: self.see(n, args[0]), prepend=True))
        try:
            yield
        finally:
            attention.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    def follow(self, n: int, o: nn.Module, result: Callable[[Tensor], Any]) -> Callable[..., Any]:
        assert self.kept is not None
        x = self.kept[n]
        return lambda *args, **kwargs: result(o(x))

    def see(self, n: int, x: Tensor) -> None:
        if n == 0:
            self.same = self.kept is not None and torch.equal(self.kept[0], x)
        if not self.same:
            self.kept = None
            self.fresh.append(x)
            if len(self.fresh) == self.batches:
                self.kept = self.fresh

    def check(self, o: nn.Module, out: Any) -> None:
        if self.same and self.kept is not None:
            several = isinstance(out, tuple)
            if torch.equal(o.forward(self.kept[0]), out[0] if several else out):
                rest = (None,) * (len(out) - 1) if several else ()
                self.result = (lambda y: (y, *rest)) if several else (lambda y: y)
