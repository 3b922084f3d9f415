"""A model as a sequence of blocks: one at a time in memory, calibration activations on the CPU between them.

The model's own forward runs once per batch with its blocks replaced by recorders, so that masks, positions and rotary
tables reach each block exactly as its family makes them, without a line of any family's forward being copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish.checkpoint import Source
from planish.core import Progress, Shape
from planish.families import Family
from planish.modules import find_blocks, get_linear
from planish.stats import Stats, Tap

Hidden = list[Tensor]  # per batch: (batch, seq, hidden), on the CPU


class Stream:
    """Blocks and calibration activations of one model. `windows` (n, seq) token ids."""

    def __init__(self, source: Source, windows: Tensor, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.family: Family = source.family
        self.model = source.skeleton().to(self.dtype)
        move_outside_blocks(self.model, self.family, self.device)
        self.blocks = find_blocks(self.model, self.family)
        tokens = max(1, 8192 // windows.shape[1]) if windows.numel() else 1
        self.batches = list(windows.split(tokens)) if windows.numel() else []
        self.calls: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def replace_blocks(self, function: Callable[..., Tensor]) -> Iterator[None]:
        """Within the context block i's forward is function(i, hidden, **kwargs)."""
        for i, block in enumerate(self.blocks):
            block.forward = lambda hidden_states, *a, _i=i, **k: function(_i, hidden_states, *a, **k)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @torch.no_grad()
    def start(self) -> Hidden:
        """Inputs of block 0 for every batch; remembers each block's call arguments per batch size."""
        inputs: Hidden = []

        def record(i: int, hidden: Tensor, *args, **kwargs) -> Tensor:
            if args:
                raise TypeError("blocks are expected to take everything but hidden states by keyword")
            if i == 0:
                inputs.append(hidden.to("cpu"))
            self.calls.setdefault(len(hidden), [{}] * len(self.blocks))[i] = kwargs
            return hidden

        with self.replace_blocks(record):
            for batch in self.batches:
                self.base_model(input_ids=batch.to(self.device), use_cache=False)
        return inputs

    @property
    def base_model(self) -> nn.Module:
        return self.model.base_model

    def block(self, i: int) -> nn.Module:
        """Block i in the source's own dtype on the CPU, canonical (fused linears split); the caller's to change."""
        return self.source.block(i)

    def place(self, block: nn.Module) -> nn.Module:
        """A copy of a block to compute with, in the stream's dtype on its device."""
        same = all(p.dtype == self.dtype and p.device == self.device for p in block.parameters())
        return block if same else copy.deepcopy(block).to(self.device, self.dtype)

    def forward(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One batch through block i, on the device."""
        out = block(hidden.to(self.device), **self.calls[len(hidden)][i])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(self, i: int, block: nn.Module, hidden: Hidden) -> Hidden:
        """All batches through block i."""
        return [self.forward(i, block, h).to("cpu") for h in hidden]

    @torch.no_grad()
    def measure(
        self,
        i: int,
        block: nn.Module,
        taps: list[Tap],
        hidden: Hidden,
        dense: tuple[nn.Module, Hidden] | None = None,
    ) -> tuple[Stats, Hidden]:
        """Statistics of block i over all batches, and its outputs.

        `dense`: the uncompressed block and its own inputs, for sites with the prefix "dense:".
        """
        parts = {p: Stats(t for t in taps if t.part == p) for p in {t.part for t in taps}}
        outputs: Hidden = []
        own_sites = {s for t in taps for s in t.sites if ":" not in s}
        dense_sites = {s.removeprefix("dense:") for t in taps for s in t.sites if s.startswith("dense:")}
        first = 0
        for n, h in enumerate(hidden):
            values = {}
            with tap_sites(block, self.family, own_sites) as seen:
                outputs.append(self.forward(i, block, h).to("cpu"))
                values |= seen
            if dense_sites:
                assert dense is not None
                with tap_sites(dense[0], self.family, dense_sites) as seen:
                    self.forward(i, dense[0], dense[1][n])
                    values |= {f"dense:{s}": v for s, v in seen.items()}
            held = (torch.arange(first, first + len(h)) % 8) == 7
            first += len(h)
            for part, stats in parts.items():
                rows = {"all": slice(None), "fit": ~held, "held": held}[part]
                chosen = {s: v.reshape(len(h), -1, v.shape[-1])[rows] for s, v in values.items()}
                if len(next(iter(chosen.values()), ())):
                    stats.update(chosen)
        total = Stats()
        for stats in parts.values():
            total.merge(stats)
        return total, outputs

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head, by the model's own forward, for one batch of last-block outputs."""
        with self.replace_blocks(lambda i, h, *a, **k: hidden.to(self.device)):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits

    def nll(self, hidden: Hidden) -> float:
        """Mean NLL per predicted token of the calibration windows, from last-block outputs."""
        total, count = 0.0, 0
        for batch, h in zip(self.batches, hidden, strict=True):
            logits = self.logits(h)[:, :-1].float()
            target = batch[:, 1:].to(self.device)
            total += nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            count += target.numel()
        return total / count

    def sweep(
        self,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        progress: Progress | None = None,
        phase: str = "statistics",
    ) -> Hidden:
        """Walk the uncompressed model: measure every block's taps, hand (i, block, stats) to `use`; last outputs."""
        hidden = self.start()
        for i in range(len(self)):
            block = self.block(i)
            stats, hidden = self.measure(i, self.place(block), taps(self.source.shape(i)), hidden)
            use(i, block, stats)
            if progress:
                progress(phase, i + 1, len(self))
        return hidden


def move_outside_blocks(model: nn.Module, family: Family, device: torch.device) -> None:
    """Move everything but the blocks."""
    inside = {id(m) for m in find_blocks(model, family).modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for name, p in list(module._parameters.items()):
            if p is not None and p.device != device and not p.is_meta:
                module._parameters[name] = nn.Parameter(p.to(device), requires_grad=False)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = b.to(device)


@contextmanager
def tap_sites(block: nn.Module, family: Family, sites: set[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context a forward of the block fills the yielded dict with the tensors at these sites."""
    seen: dict[str, Tensor] = {}
    handles = []

    def first(args, kwargs) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def tap_input(module: nn.Module, site: str) -> None:
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k: seen.__setitem__(site, first(a, k)), with_kwargs=True)
        )

    def tap_output(module: nn.Module, site: str) -> None:
        handles.append(
            module.register_forward_hook(
                lambda m, a, out: seen.__setitem__(site, out[0] if isinstance(out, tuple) else out)
            )
        )

    for site in sites:
        where, end = site.split(".")
        if where == "block":
            (tap_input if end == "in" else tap_output)(block, site)
        elif end == "raw":
            norm = family.attention_norm if where == "attention" else family.mlp_norm
            tap_input(block.get_submodule(norm), site)
        elif end == "add":
            post = family.attention_post_norm if where == "attention" else family.mlp_post_norm
            path = post or (family.attention if where == "attention" else family.mlp) or family.path("down")
            tap_output(block.get_submodule(path), site)
        else:
            (tap_input if end == "in" else tap_output)(get_linear(block, family, where), site)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
