"""Runs of one block that start midway: what the last linear of a submodule read is kept, and where only what comes behind it
has changed, later runs need not compute it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, Room

LAST = {"attention": "o", "mlp": "down"}  # the last linear of a submodule
BEHIND = {  # units whose solution leaves what that linear reads as it is, or takes some of its channels away
    "attention": {"o", "gate", "up", "down", "mlp", "ffn"},
    "mlp": {"down", "mlp"},
}


class Part(NamedTuple):
    """A submodule of the block and its last linear; `seen`: somebody looks at what happens before that."""

    module: nn.Module
    last: nn.Module
    seen: bool


class Midway:
    """What `o` and `down` read in all `batches` of one block, kept from run to run.

    Inputs of `o` go to disk where they do not fit the room; those of `down`, which are wider and can be had from those of
    `o`, are kept where they fit twice.
    """

    def __init__(self, room: Room, batches: int):
        self.starts = {name: Start(room, batches, spill=name == "attention") for name in LAST}
        self.active: set[str] = set(LAST)

    def enter(self, solved: Sequence[str] = ()) -> Midway | None:
        """Before a run for solving these units, or the last run of the block: itself, if this one has a use for it.

        One batch is a check and no proof, so what the units change is forgotten, and what the last run would be the first to
        see is not kept.
        """
        names = set(solved)
        self.active = {n for n, s in self.starts.items() if (names <= BEHIND[n] if names else s.kept is not None)}
        for name in self.starts.keys() - self.active:
            self.starts[name].forget()
        return self if self.active else None

    def pick(self, rows: Mapping[str, Tensor | None]) -> None:
        """After solving: `rows` of the linears that changed, which of their old outputs they give (None: others)."""
        chosen = [rows[role] for role in ("gate", "up") if role in rows]
        if chosen and chosen[0] is not None:
            self.starts["mlp"].pick(chosen[0])
        elif chosen:
            self.starts["mlp"].forget()

    @contextmanager
    def batch(self, n: int, parts: dict[str, Part]) -> Iterator[None]:
        """Within the context the block runs batch n, in order."""
        with ExitStack() as stack:
            for name in sorted(parts.keys() & self.active):
                stack.enter_context(self.starts[name].batch(n, parts[name]))
            yield


class Start:
    """What the last linear of one submodule reads in all batches. A run with the same linears before it can start there.

    The first batch of every run goes through the whole block. Where the linear reads in it what was kept, bit for bit, and
    the submodule returns what the linear makes of that, the other batches are led from what was kept through the linear
    alone: the same results. Else what is seen in this run is kept from then on.
    """

    def __init__(self, room: Room, batches: int, spill: bool = True):
        self.room, self.batches, self.spill = room, batches, spill
        self.forget()

    def forget(self) -> None:
        self.kept: Activations | None = None
        self.channels: Tensor | None = None  # of what was kept, those that the linear still reads
        self.start()

    def pick(self, channels: Tensor) -> None:
        self.channels = channels if self.channels is None else self.channels[channels]

    def read(self, n: int) -> Tensor | None:
        """What the linear reads in batch n, from what was kept. None where the first batch does not speak for this one: fewer
        channels of another number of tokens might be added up in another order."""
        assert self.kept is not None
        x = self.kept[n]
        if self.channels is None:
            return x
        if n == 0:
            self.shape = x.shape
        if x.shape != self.shape:
            return None
        return x.flatten(0, -2).index_select(1, self.channels).view(*x.shape[:-1], -1)  # of a matrix it is faster

    def start(self) -> None:
        self.fresh = Activations(self.room)
        self.same = False
        self.fits = True
        self.result: Callable[[Tensor], Any] | None = None  # the linear's output → what the submodule returns

    @contextmanager
    def batch(self, n: int, part: Part) -> Iterator[None]:
        if n == 0:
            self.start()
        handles = []
        if n and not part.seen and self.result is not None:
            if (x := self.read(n)) is not None:
                part.module.forward = self.follow(x, part.last, self.result)
        elif n == 0:
            handles.append(
                part.module.register_forward_hook(lambda m, args, out: self.check(part.last, out), prepend=True)
            )
        if not self.same:
            handles.append(part.last.register_forward_pre_hook(lambda m, args: self.see(n, args[0]), prepend=True))
        try:
            yield
        finally:
            part.module.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    def follow(self, x: Tensor, last: nn.Module, result: Callable[[Tensor], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: result(last(x))

    def see(self, n: int, x: Tensor) -> None:
        if n == 0:
            known = self.read(0) if self.kept is not None else None
            self.same = known is not None and torch.equal(known, x)
            if not self.same:
                self.kept = self.channels = None
                free = self.room.limit - self.room.used
                self.fits = self.spill or 2 * self.batches * x.numel() * x.element_size() <= free
        if not self.same and self.fits:
            self.fresh.append(x)
            if len(self.fresh) == self.batches:
                self.kept = self.fresh

    def check(self, last: nn.Module, out: Any) -> None:
        known = self.read(0) if self.same else None
        if known is not None:
            several = isinstance(out, tuple)
            if torch.equal(last.forward(known), out[0] if several else out):
                rest = (None,) * (len(out) - 1) if several else ()
                self.result = (lambda y: (y, *rest)) if several else (lambda y: y)
