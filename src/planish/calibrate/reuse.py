"""What the last linear of a submodule read in one run of a block, reused by later runs where only what comes behind it has
changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, MemoryLimits
from planish.modelling.blocks import get_linear, has_linear
from planish.modelling.families import Family
from planish.modelling.modules import Bypass

LAST = {"attention": "o", "mlp": "down"}  # the last linear of a submodule
BEHIND = {
    "attention": {"o", "gate", "up", "down", "mlp", "ffn"},
    "mlp": {"down"},
}  # units that leave what it reads as it is


class Part(NamedTuple):
    """A submodule of the block and its last linear; `seen`: somebody looks at what happens before that."""

    module: nn.Module
    last: nn.Module
    seen: bool


class Reuse:
    """What `o` and `down` read in all `batches` of one block, kept from run to run.

    Inputs of `o` go to disk where they do not fit into memory; those of `down`, which are wider and can be had from those of
    `o`, are kept where they fit twice.
    """

    def __init__(self, limits: MemoryLimits, batches: int):
        self.starts = {name: Start(limits, batches, spill=name == "attention") for name in LAST}
        self.active: set[str] = set(LAST)

    def enter(self, solved: Sequence[str] = ()) -> Reuse | None:
        """Before a run for solving these units, or the last run of the block: itself, if this one has a use for it.

        A match on the first batch is no proof, so what comes behind the units is always dropped; and what the last run would
        be the first to see is not kept.
        """
        names = set(solved)
        self.active = {n for n, s in self.starts.items() if (names <= BEHIND[n] if names else s.kept is not None)}
        for name in self.starts.keys() - self.active:
            self.starts[name].forget()
        return self if self.active else None

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
    alone. Else the whole block runs, and what is seen in this run is kept from then on.

    The other batches give the same bits too, whatever the kernels: no linear before this one changed (`Reuse.enter` forgets
    what a solved unit may change), so the same operations on numbers of the same shapes made what was kept, and this linear
    gets a contiguous tensor of the same shape either way. The first batch proves nothing about batches of other linears:
    that slices of a product have the bits of the product of slices, kernels do not promise, and a vectorised activation
    rounds the last few numbers of a tensor in another way than the rest. So nothing is kept where neurons are taken away.
    """

    def __init__(self, limits: MemoryLimits, batches: int, spill: bool = True):
        self.limits, self.batches, self.spill = limits, batches, spill
        self.forget()

    def forget(self) -> None:
        self.kept: Activations | None = None
        self.start()

    def start(self) -> None:
        self.fresh = Activations(self.limits)
        self.same = False
        self.fits = True
        self.result: Callable[[Tensor], Any] | None = None  # the linear's output → what the submodule returns

    @contextmanager
    def batch(self, n: int, part: Part) -> Iterator[None]:
        if n == 0:
            self.start()
        handles = []
        if n and not part.seen and self.result is not None:
            assert self.kept is not None
            part.module.forward = self.follow(self.kept[n], part.last, self.result)
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
            self.same = self.kept is not None and torch.equal(self.kept[0], x)
            if not self.same:
                self.kept = None
                free = self.limits.limit - self.limits.used
                self.fits = x.is_contiguous() and (self.spill or 2 * self.batches * x.nbytes <= free)
        if not self.same and self.fits:
            self.fresh.append(x)
            if len(self.fresh) == self.batches:
                self.kept = self.fresh

    def check(self, last: nn.Module, out: Any) -> None:
        if self.same:
            assert self.kept is not None
            several = isinstance(out, tuple)
            if torch.equal(last.forward(self.kept[0]), out[0] if several else out):
                rest = (None,) * (len(out) - 1) if several else ()
                self.result = (lambda y: (y, *rest)) if several else (lambda y: y)


def lead(
    reuse: Reuse | None, n: int, block: nn.Module, family: Family, sites: Iterable[str] = ()
) -> AbstractContextManager:
    """Within the context batch n runs through the block, led by `reuse` as far as it can; these sites are looked at."""
    if reuse is None:
        return nullcontext()
    seen, parts = {s.rpartition(".")[0] for s in sites}, {}
    for name, role in LAST.items():
        if name in family.fixed and "keys" in family.fixed:  # this attention also gives keys and values to others
            continue
        path = getattr(family, name)  # a block may hold the linears of its MLP itself
        module = block.get_submodule(path) if path and has_linear(block, family, role) else None
        if module is not None and not isinstance(module, Bypass):
            before = {"attention": {"q", "k", "v"}, "mlp": {"gate", "up"}}[name]
            parts[name] = Part(module, get_linear(block, family, role), bool(before & seen))
    return reuse.batch(n, parts)
