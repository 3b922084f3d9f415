"""A model as a sequence of blocks: one at a time in memory, calibration activations on the CPU between them.

The model's own forward runs once per batch with its blocks replaced by recorders, so that masks, positions and rotary
tables reach each block exactly as its family makes them, without a line of any family's forward being copied.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from planish import lanes
from planish.apply import apply_edits
from planish.calibrate.activations import Activations, MemoryLimits, fetch, find_device_limit
from planish.calibrate.reuse import Reuse, lead
from planish.calibrate.shared import list_shared, pack, unpack
from planish.calibrate.text import unmark
from planish.core import Edit, Progress, Weights
from planish.folder.source import Source
from planish.folder.stored_linear import StoredLinear
from planish.modelling.blocks import find_blocks, get_linear, read_layout
from planish.modelling.families import Family

T = TypeVar("T")
Hidden = Sequence[Tensor]  # for each of this process's batches: (batch, seq, hidden), on the CPU unless fetched
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
BATCH = 2048  # tokens that run at a time
LARGE = 1 << 20  # parameters; of modules outside the blocks these are in memory only while they are needed


class Piece(NamedTuple):
    """A batch of calibration windows (batch, seq), as `planish.calibrate.text.mark` may have made them: its lane and the number of
    its first window."""

    lane: int
    first: int
    ids: Tensor


class NothingMeasuredError(Exception):
    """Something was to be measured where only shapes are to be looked at."""


@dataclass
class Awaited:
    """A stream whose text is read when something is first measured on it: what is known until then, and how to make it.
    `products`: as a stream's."""

    source: Source
    device: torch.device
    dtype: torch.dtype
    limits: MemoryLimits
    make: Callable[[], Stream]
    products: torch.dtype

    def __post_init__(self) -> None:
        self.limits.device_limit = find_device_limit(self.device)


class Stream:
    """Blocks and calibration activations of one model. `windows` (n, seq) token ids; `limits` of its activations."""

    def __init__(
        self,
        source: Source,
        windows: Tensor,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        limits: MemoryLimits | None = None,
    ):
        self.source, self.device, self.dtype, self.limits = (
            source,
            torch.device(device),
            dtype,
            limits or MemoryLimits(),
        )
        self.products = dtype  # in which the blocks' products are formed; may be coarser than `dtype`
        self.limits.device_limit = find_device_limit(self.device)
        self.family: Family = source.family
        self.model = source.skeleton(experts=False)
        if getattr(self.model.config, "output_router_logits", False):  # without blocks there are none to balance
            self.model.config = copy.copy(self.model.config)
            self.model.config.output_router_logits = False
        for p in self.model.parameters():  # not buffers: rotary frequencies stay fp32
            p.data = p.data.to(self.dtype)
        self.resident: list[
            nn.Module
        ] = []  # the large module outside the blocks that is in memory, for all parts of it
        self._bring_outside()
        self.blocks = find_blocks(self.model, self.family)
        tokens = max(1, BATCH // windows.shape[1]) if windows.numel() else 1
        self.batches = list(windows.split(tokens)) if windows.numel() else []
        self.calls: dict[int, list[dict[str, Any]]] = {}  # of every size of batch, or of every batch
        self.shared = list_shared(self.blocks, self.family, self.source.config)
        self.clock: Callable[[str], AbstractContextManager] = lambda phase: nullcontext()  # who runs it may time "sums"
        self.report: Progress = lambda phase, done, total: None  # and hear which blocks are done

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def pieces(self) -> list[Piece]:
        """The batches that this process runs, in order; all of them where it is the only one."""
        firsts = itertools.accumulate((len(b) for b in self.batches), initial=0)
        places = [lanes.find_lane(i, len(self.batches)) for i in range(len(self.batches))]
        own = set(lanes.own_lanes())
        return [Piece(*p) for p in zip(places, firsts, self.batches) if p[0] in own]

    def _bring_outside(self) -> None:
        """Load small modules outside the blocks; let large ones (embedding, head) load themselves when called.

        At most one of these is in memory at a time; `release` lets it go.
        """
        inside = {id(m) for m in find_blocks(self.model, self.family).modules()}
        for name, module in self.model.named_modules():
            if id(module) in inside:
                continue
            for key, b in module._buffers.items():
                module._buffers[key] = None if b is None else b.to(self.device)
            if sum(p.numel() for p in module._parameters.values() if p is not None) <= LARGE:
                self._bring(name, module)
            else:
                module.register_forward_pre_hook(lambda m, args, name=name: self._bring(name, m))

    def _bring(self, name: str, module: nn.Module) -> None:
        empty = [k for k, p in module._parameters.items() if p is not None and p.is_meta]
        if empty and sum(module._parameters[k].numel() for k in empty) > LARGE:  # type: ignore[union-attr]
            self.release()
            self.resident.append(module)
        for key in empty:
            weight = self.source.weight(f"{name}.{key}" if name else key)
            module._parameters[key] = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)

    def release(self) -> None:
        """Let the large module outside the blocks go, if one is in memory."""
        while self.resident:
            parameters = self.resident.pop()._parameters
            for key, p in parameters.items():
                parameters[key] = None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)

    @contextmanager
    def replace_blocks(self, function: Callable[..., Tensor]) -> Iterator[None]:
        """Within the context block i's forward is function(i, hidden, **kwargs)."""

        def call(i: int, hidden_states: Tensor, *args, **kwargs):
            out = function(i, hidden_states, *args, **kwargs)
            return (out, None) if self.family.tuples else out

        for i, block in enumerate(self.blocks):
            block.forward = functools.partial(call, i)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @torch.no_grad()
    def start(self) -> Hidden:
        """Inputs of block 0 for every batch; remembers each block's call arguments per batch size, or where these say what tokens
        they are of, per batch."""
        inputs = Activations(self.limits)
        names = list(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]  # after self and hidden states

        def record(n: int, i: int, hidden: Tensor, *args, **kwargs) -> Tensor:
            kwargs |= dict(zip(names, args))
            if i == 0:
                inputs.append(hidden)
            if self.family.per_token and (of_tokens := kwargs.get(self.family.per_token[1])) is not None:
                kwargs[self.family.per_token[1]] = of_tokens.to("cpu")
            self.calls.setdefault(self._key(len(hidden), n), [{}] * len(self.blocks))[i] = kwargs
            return hidden

        for n, piece in enumerate(self.pieces):
            with self.replace_blocks(functools.partial(record, n)):
                self.model.base_model(input_ids=unmark(piece.ids).to(self.device), use_cache=False)
        self.release()
        return inputs

    def block(self, i: int, edits: Sequence[Edit] = (), whole: bool = False) -> nn.Module:
        """Block i in the source's own dtype on the CPU, canonical (fused linears split); the caller's to change.

        `edits` are made to it first. Weights of large experts stay in their file, unless it is to be `whole` in memory.
        """
        return_memory(self.source.shape(i).count())
        block = self.source.block(i, apart=not whole)
        apply_edits(block, list(edits), self.family, self.source.config, self.source.shape(i))
        return block

    def subset(self, n: int) -> Stream:
        """The same model with the first n calibration windows only (all, if there are fewer)."""
        return self.part(torch.cat(self.batches)[:n]) if self.batches else self

    def spread(self, n: int) -> Stream:
        """The same model with n of the calibration windows, evenly spaced (all, if there are no more)."""
        windows = torch.cat(self.batches) if self.batches else torch.empty(0)
        count = len(windows)
        return self.part(windows[torch.arange(n) * count // n]) if 0 < n < count else self

    def part(self, windows: Tensor, products: torch.dtype | None = None) -> Stream:
        """The same model with other calibration windows (n, seq); `products` of the blocks formed in another dtype."""
        other = copy.copy(self)
        other.batches, other.calls = list(windows.split(len(self.batches[0]))), {}
        other.products = products or self.products
        return other

    def place(self, block: nn.Module) -> nn.Module:
        """A copy of a block to compute with, in the stream's dtype on its device."""
        here = (self.device, torch.device("meta"))  # that is where weights seem to be that are in a file
        same = all(p.dtype == self.dtype and p.device in here for p in block.parameters())
        return block if same else copy.deepcopy(block).to(self.device, self.dtype)

    def _key(self, size: int, n: int) -> int:
        """Which call arguments are the n-th batch's."""
        return n if self.family.per_token else size

    def forward(self, i: int, block: nn.Module, hidden: Tensor, n: int = -1) -> Tensor:
        """The n-th batch through block i, on the device; which one it is matters where calls say what tokens they are of."""
        call = dict(self.calls[self._key(len(hidden), n)][i])
        if self.family.per_token and (of_tokens := call.get(self.family.per_token[1])) is not None:
            call[self.family.per_token[1]] = of_tokens.to(self.device)
        own = hidden.to(self.device)
        if "shared_kv_states" in call:
            own, call["shared_kv_states"] = unpack(own, self.shared[i], self.source.config.hidden_size)
        with torch.autocast(self.device.type, self.products) if self.products != self.dtype else nullcontext():
            out = block(own, **call)
        out = out[0] if isinstance(out, tuple) else out
        return pack(out, call["shared_kv_states"], self.shared[i + 1]) if "shared_kv_states" in call else out

    @torch.no_grad()
    def run(
        self, i: int, block: nn.Module, hidden: Hidden, limits: MemoryLimits | None = None, reuse: Reuse | None = None
    ) -> Hidden:
        """All batches through block i; the outputs count against `limits`, unless told the stream's."""
        outputs = Activations(limits or self.limits)
        for n in range(len(hidden)):
            with lead(reuse, n, block, self.family):
                outputs.append(self.forward(i, block, fetch(hidden, n, self.device), n))
        return outputs

    def outputs(self, edits: Mapping[int, Sequence[Edit]] | None = None) -> Hidden:
        """All batches through all blocks, as they are or as `edits` make them: the last block's outputs."""
        hidden = self.start()
        for i in range(len(self)):
            hidden = self.run(i, self.place(self.block(i, (edits or {}).get(i, ()))), hidden)
        return hidden


class BlockWeights(Mapping[str, Tensor]):
    """Weights and biases of a canonical block's linears, in the stored dtype, on the CPU; those that are in a file are read
    whenever they are asked for."""

    def __init__(self, block: nn.Module, family: Family, config: Any):
        self.held: dict[str, Tensor | StoredLinear] = {}
        for role in (r for group in read_layout(block, family, config).groups for r in group.linears):
            linear = get_linear(block, family, role)
            self.held[role] = linear if isinstance(linear, StoredLinear) else linear.weight.detach()
            if linear.bias is not None:
                self.held[f"{role}.bias"] = linear.bias.detach()

    def __getitem__(self, role: str) -> Tensor:
        found = self.held[role]
        return found.weight if isinstance(found, StoredLinear) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def read_weights(block: nn.Module, stream: Stream) -> Weights:
    """Weights and biases of a canonical block's linears, as they are now."""
    return BlockWeights(block, stream.family, stream.source.config)


def in_order(stream: Stream, values: list[T]) -> list[T]:
    """One value for each of this process's batches → one for every batch of all processes, in order."""
    own = {p.first: v for p, v in zip(stream.pieces, values, strict=True)}
    found = {first: v for part in lanes.gather(own) for first, v in part.items()}
    return [found[first] for first in sorted(found)]


def reuse_memory() -> None:
    """From here on freed tensors of less than 32 MiB stay with the process until `return_memory`: pages that come from the
    system anew for every tensor are zeroed first, which took a tenth of a run. Larger ones go back at once."""
    if LIBC is not None and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, and this is the most that glibc takes
        LIBC.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def return_memory(weights: int) -> None:
    """Give freed heap pages back to the system, where what was worked on has many weights."""
    if weights > LARGE and LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
