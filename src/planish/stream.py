"""A model as a sequence of blocks: one at a time in memory, calibration activations on the CPU between them.

The model's own forward runs once per batch with its blocks replaced by recorders, so that masks, positions and rotary
tables reach each block exactly as its family makes them, without a line of any family's forward being copied.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish.checkpoint import Source, apply_edits
from planish.core import Edit, Progress, Shape
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

    def block(self, i: int, edits: Sequence[Edit] = ()) -> nn.Module:
        """Block i in the source's own dtype on the CPU, canonical (fused linears split); the caller's to change.

        `edits` are made to it first.
        """
        block = self.source.block(i)
        apply_edits(block, list(edits), self.family, self.source.config, self.source.shape(i))
        return block

    def subset(self, n: int) -> Stream:
        """The same model with the first n calibration windows only (rounded up to whole batches' worth, at most all)."""
        few = copy.copy(self)
        few.batches = list(torch.cat(self.batches)[:n].split(len(self.batches[0]))) if self.batches else []
        few.calls = {}
        return few

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
        gaps = {s.removesuffix(".gap") for s in own_sites if s.endswith(".gap")}
        own_sites = {s for s in own_sites if not s.endswith(".gap")} | {f"{g}.raw" for g in gaps}
        dense_sites |= {f"{g}.{end}" for g in gaps for end in ("raw", "add")}
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
            for where in gaps:
                dense_sum = values[f"dense:{where}.raw"] + values[f"dense:{where}.add"]
                values[f"{where}.gap"] = dense_sum.view_as(values[f"{where}.raw"]) - values[f"{where}.raw"]
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
        edits: Mapping[int, list[Edit]] | None = None,
    ) -> Hidden:
        """Walk the uncompressed model (or the one that `edits` make): measure every block's taps, hand (i, block, stats)
        to `use`; last outputs."""
        hidden = self.start()
        for i in range(len(self)):
            block = self.block(i, (edits or {}).get(i, ()))
            stats, hidden = self.measure(i, self.place(block), taps(self.source.shape(i)), hidden)
            use(i, block, stats)
            if progress:
                progress(phase, i + 1, len(self))
        return hidden


    def output_gradient(self, hidden: Tensor, seed: int, first: int) -> Tensor:
        """Gradient of Σ NLL at last-block outputs (batch, seq, hidden), labels sampled from the model's own predictions.

        Sampled labels make the second moment of the gradient the true Fisher information. Deterministic by `seed` and
        by each sequence's number, however sequences are grouped; `first` is the number of the batch's first sequence.
        """
        h = hidden.to(self.device).detach().requires_grad_(True)
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + first + n) for n in range(len(hidden))]
        noise = torch.cat([torch.rand(hidden.shape[1], generator=g, dtype=torch.float64) for g in draws])
        with torch.enable_grad(), self.replace_blocks(lambda i, x, *a, **k: h if i == len(self) - 1 else x):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
            steps = logits.detach().double().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(steps, noise[:, None].to(self.device))
            labels = labels.clamp(max=logits.shape[-1] - 1).squeeze(1)
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert h.grad is not None
        return h.grad.to("cpu")

    def sweep_back(
        self,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        progress: Progress | None = None,
        phase: str = "gradients",
        seed: int = 0,
        blocks: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """Walk the model forwards keeping every block's inputs, then backwards from sampled labels, block by block.

        Each block is recomputed from its kept inputs; `use` gets (i, block, stats) from the last block to the first, with
        forward sites and "grad:" sites measured together. `blocks` replaces `self.block` (a compressed model, say).
        """
        get = blocks or self.block
        inputs = [self.start()]
        for i in range(len(self)):
            inputs.append(self.run(i, self.place(get(i)), inputs[-1]))
        outputs = inputs.pop()
        starts = [0, *itertools.accumulate(len(h) for h in outputs)]
        gradients = [self.output_gradient(h, seed, first) for first, h in zip(starts, outputs, strict=False)]
        for i in reversed(range(len(self))):
            block = get(i)
            placed = self.place(block).requires_grad_(False)
            wanted = taps(self.source.shape(i))
            stats = Stats(wanted)
            forward = {s.removeprefix("dense:") for t in wanted for s in t.sites if not s.startswith("grad:")}
            backward = sorted({s.removeprefix("grad:") for t in wanted for s in t.sites if s.startswith("grad:")})
            for n, h in enumerate(inputs.pop()):
                leaf = h.to(self.device).detach().requires_grad_(True)
                with torch.enable_grad(), tap_sites(placed, self.family, forward | set(backward)) as seen:
                    out = self.forward(i, placed, leaf)
                    found = torch.autograd.grad(
                        out, [leaf, *(seen[s] for s in backward)], gradients[n].to(self.device), allow_unused=True
                    )
                gradients[n] = found[0].to("cpu")
                values = {p + s: seen[s].detach() for s in forward for p in ("", "dense:")}
                values |= {f"grad:{s}": g for s, g in zip(backward, found[1:], strict=True) if g is not None}
                stats.update(values)
            use(i, block, stats)
            if progress:
                progress(phase, len(self) - i, len(self))


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
