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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from planish import lanes
from planish import stats as planish_stats
from planish.apply import apply_edits
from planish.calibrate.activations import Activations, Room, fetch, find_near
from planish.calibrate.reuse import LAST, Midway, Part
from planish.calibrate.taps import AllSeen, Values, add_batch, choose_windows, find_gap, take_windows, tap_sites
from planish.core import Edit, Progress, Shape
from planish.errors import InputError
from planish.folder.source import Source
from planish.modelling.blocks import find_blocks, get_linear, has_linear
from planish.modelling.families import Family
from planish.modelling.modules import Bypass
from planish.stats import Stats, Tap, add_lane, is_finite

T = TypeVar("T")
Hidden = Sequence[Tensor]  # for each of this process's batches: (batch, seq, hidden), on the CPU unless fetched
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
BATCH = 2048  # tokens that run at a time
LOGITS = 1 << 23  # numbers that the head gives at a time: 64 MiB in fp64, of which sampling labels takes a few copies
NOTHING = -100  # label of a token that predicts none
LARGE = 1 << 20  # parameters; of modules outside the blocks these are in memory only while they are needed


class Piece(NamedTuple):
    """A batch of calibration windows (batch, seq): its lane and the number of its first window."""

    lane: int
    first: int
    ids: Tensor


class Stream:
    """Blocks and calibration activations of one model. `windows` (n, seq) token ids; `room` for activations."""

    def __init__(
        self,
        source: Source,
        windows: Tensor,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        room: Room | None = None,
    ):
        self.source, self.device, self.dtype, self.room = source, torch.device(device), dtype, room or Room()
        self.room.near = find_near(self.device)
        self.family: Family = source.family
        self.model = source.skeleton()
        for p in self.model.parameters():  # not buffers: rotary frequencies stay fp32
            p.data = p.data.to(self.dtype)
        self.resident: list[
            nn.Module
        ] = []  # the large module outside the blocks that is in memory, for all parts of it
        self.bring_outside()
        self.blocks = find_blocks(self.model, self.family)
        tokens = max(1, BATCH // windows.shape[1]) if windows.numel() else 1
        self.batches = list(windows.split(tokens)) if windows.numel() else []
        self.calls: dict[int, list[dict[str, Any]]] = {}
        self.clock: Callable[[str], AbstractContextManager] = lambda phase: nullcontext()  # who runs it may time "sums"

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def pieces(self) -> list[Piece]:
        """The batches that this process runs, in order; all of them where it is the only one."""
        firsts = itertools.accumulate((len(b) for b in self.batches), initial=0)
        places = [i * lanes.LANES // len(self.batches) for i in range(len(self.batches))]
        own = set(lanes.own_lanes())
        return [Piece(*p) for p in zip(places, firsts, self.batches) if p[0] in own]

    def bring_outside(self) -> None:
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
                self.bring(name, module)
            else:
                module.register_forward_pre_hook(lambda m, args, name=name: self.bring(name, m))

    def bring(self, name: str, module: nn.Module) -> None:
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
        """Inputs of block 0 for every batch; remembers each block's call arguments per batch size."""
        inputs = Activations(self.room)
        names = list(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]  # after self and hidden states

        def record(i: int, hidden: Tensor, *args, **kwargs) -> Tensor:
            kwargs |= dict(zip(names, args))
            if i == 0:
                inputs.append(hidden)
            self.calls.setdefault(len(hidden), [{}] * len(self.blocks))[i] = kwargs
            return hidden

        with self.replace_blocks(record):
            for piece in self.pieces:
                self.base_model(input_ids=piece.ids.to(self.device), use_cache=False)
        self.release()
        return inputs

    @property
    def base_model(self) -> nn.Module:
        return self.model.base_model

    def block(self, i: int, edits: Sequence[Edit] = ()) -> nn.Module:
        """Block i in the source's own dtype on the CPU, canonical (fused linears split); the caller's to change.

        `edits` are made to it first.
        """
        if self.source.shape(i).count() > LARGE:
            return_memory()
        block = self.source.block(i)
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

    def part(self, windows: Tensor) -> Stream:
        """The same model with other calibration windows (n, seq)."""
        other = copy.copy(self)
        other.batches, other.calls = list(windows.split(len(self.batches[0]))), {}
        return other

    def place(self, block: nn.Module) -> nn.Module:
        """A copy of a block to compute with, in the stream's dtype on its device."""
        same = all(p.dtype == self.dtype and p.device == self.device for p in block.parameters())
        return block if same else copy.deepcopy(block).to(self.device, self.dtype)

    def forward(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One batch through block i, on the device."""
        out = block(hidden.to(self.device), **self.calls[len(hidden)][i])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(
        self, i: int, block: nn.Module, hidden: Hidden, room: Room | None = None, midway: Midway | None = None
    ) -> Hidden:
        """All batches through block i; the outputs lie in `room`, unless told the stream's."""
        outputs = Activations(room or self.room)
        for n in range(len(hidden)):
            with self.follow(midway, n, block):
                outputs.append(self.forward(i, block, fetch(hidden, n, self.device)))
        return outputs

    def follow(
        self, midway: Midway | None, n: int, block: nn.Module, sites: Iterable[str] = ()
    ) -> AbstractContextManager:
        """Within the context batch n runs through the block, which starts `midway` if it can; these sites are looked at."""
        if midway is None:
            return nullcontext()
        seen, parts = {s.rpartition(".")[0] for s in sites}, {}
        for name, role in LAST.items():
            path = getattr(self.family, name)  # a block may hold the linears of its MLP itself
            module = block.get_submodule(path) if path and has_linear(block, self.family, role) else None
            if module is not None and not isinstance(module, Bypass):
                before = {"attention": {"q", "k", "v"}, "mlp": {"gate", "up"}}[name]
                parts[name] = Part(module, get_linear(block, self.family, role), bool(before & seen))
        return midway.batch(n, parts)

    @torch.no_grad()
    def measure(
        self,
        i: int,
        block: nn.Module,
        taps: list[Tap],
        hidden: Hidden,
        dense: tuple[nn.Module, Hidden] | dict[str, Hidden] | None = None,
        outputs: bool = True,
        midway: Midway | None = None,
        beside: Midway | None = None,
    ) -> tuple[Stats, Hidden]:
        """Statistics of block i over all batches, and its outputs (none without `outputs`: then only as much of the
        block runs as the sites need, from `midway` where what comes before has already run with these inputs).

        `dense`: the uncompressed block and its own inputs, for sites with the prefix "dense:", and `beside` where it
        starts; or what `capture` saw there.
        """
        results = Activations(self.room)
        own_sites = {s for t in taps for s in t.sites if ":" not in s}
        dense_sites = {s.removeprefix("dense:") for t in taps for s in t.sites if s.startswith("dense:")}
        gaps = {s.removesuffix(".gap") for s in own_sites if s.endswith(".gap")}
        own_sites = {s for s in own_sites if not s.endswith(".gap")}
        if gaps:
            own_sites |= {"attention.raw", "mlp.raw", "attention.add"}
            dense_sites |= {"attention.raw", "attention.add", "mlp.raw", "mlp.add"}

        def run(n: int) -> Values:
            h, values = fetch(hidden, n, self.device), Values()
            if own_sites or outputs:
                with (
                    self.follow(midway, n, block, own_sites),
                    tap_sites(block, self.family, own_sites, not outputs) as seen,
                    suppress(AllSeen),
                ):
                    results.append(self.forward(i, block, h))
                values |= seen.fold(seen, len(h))
            if dense_sites and isinstance(dense, dict):
                values |= {f"dense:{s}": fetch(dense[s], n, self.device) for s in dense_sites}
            elif dense_sites:
                assert isinstance(dense, tuple)
                with (
                    self.follow(beside, n, dense[0], dense_sites),
                    tap_sites(dense[0], self.family, dense_sites, True) as seen,
                    suppress(AllSeen),
                ):
                    self.forward(i, dense[0], fetch(dense[1], n, self.device))
                values |= seen.fold({f"dense:{s}": v for s, v in seen.items()}, len(h))
            for where in gaps:
                values[f"{where}.gap"] = find_gap(where, values, self.source.shape(i).parallel)
            return values

        return self.collect(taps, run, self.source.shape(i)), results

    @torch.no_grad()
    def capture(
        self, i: int, block: nn.Module, sites: set[str], hidden: Hidden, outputs: bool = True
    ) -> tuple[dict[str, Hidden], Hidden]:
        """What is seen at these sites of block i in one run over all batches, and its outputs (none without `outputs`)."""
        found, results = {s: Activations(self.room) for s in sorted(sites)}, Activations(self.room)
        for n in range(len(hidden)):
            with tap_sites(block, self.family, sites, not outputs) as seen, suppress(AllSeen):
                results.append(self.forward(i, block, fetch(hidden, n, self.device)))
            for site, tensors in found.items():
                tensors.append(seen[site])
        return dict(found), results

    def collect(self, taps: list[Tap], run: Callable[[int], Values], shape: Shape) -> Stats:
        """Statistics over all batches of all processes. `run(n)`: what is seen at every site for piece n.

        Sums are formed lane by lane and added in the order of lanes, so they depend on the batches alone. Of a wide Gram
        (`planish.stats.WIDE`) only the total exists: a lane's inputs are kept until it is complete, then added.
        """
        total, pieces, count = Stats(), self.pieces, lanes.count()
        used = {i * lanes.LANES // len(self.batches) for i in range(len(self.batches))}
        wide = [t for t in taps if t.kind == "gram" and 8 * shape.width(t.site) ** 2 >= planish_stats.WIDE]
        narrow = [t for t in taps if t not in wide]
        for first in range(0, lanes.LANES, count):
            mine, lane = Stats(), first + lanes.rank()
            kept = {t: Activations(self.room) for t in wide}
            for n, piece in enumerate(pieces):
                if piece.lane == lane:
                    values = run(n)
                    with self.clock("sums"):
                        if self.device.type == "mps":  # it has no fp64
                            values = {site: v.cpu() for site, v in values.items()}
                        add_batch(mine, narrow, values, piece.first, len(piece.ids))
                        for tap in wide:
                            chosen = choose_windows(tap.part, piece.first, len(piece.ids))
                            kept[tap].append(take_windows(values[tap.site], chosen))
                            mine.tokens[tap] = mine.tokens.get(tap, 0) + kept[tap][-1].shape[:-1].numel()
            owners = [r for r in range(count) if first + r in used]
            with self.clock("sums"):
                for owner in owners:
                    total.merge(share_stats(mine, owner))
                for tap in wide:
                    self.add_wide(total, tap, kept[tap], mine.tokens.get(tap, 0), owners, shape)
        with self.clock("sums"):
            total.complete(narrow)
        for tap, sums in total.sums.items():  # solved beside the weights, on the CPU
            sums.update({name: t.cpu() for name, t in sums.items()})
            if not all(is_finite(t) for t in sums.values()):
                raise InputError(
                    f"activations of block {shape.block} ({tap.site}) are infinite or no numbers in {str(self.dtype)[6:]}: "
                    f"{'use --dtype float32' if self.dtype != torch.float32 else 'the model overflows'}"
                )
        if shape.count() > LARGE:
            return_memory()  # solving has other sizes
        return total

    def add_wide(self, total: Stats, tap: Tap, inputs: Hidden, tokens: int, owners: list[int], shape: Shape) -> None:
        """Add the Grams of the lanes that `owners` have just run, this process's own from its `inputs`."""
        found = [n for n, r in zip(lanes.gather(tokens), range(lanes.count()), strict=True) if r in owners]
        n, device = shape.width(tap.site), "cpu" if self.device.type == "mps" else self.device
        sums = total.sums.setdefault(tap, {})
        if "sum" not in sums:
            sums["sum"] = torch.zeros(n, n, dtype=torch.float64, device=device)
        total.tokens[tap] = total.tokens.get(tap, 0) + sum(found)
        if not sum(found):
            return

        def exchange(row: Tensor) -> Iterator[Tensor]:
            for owner, count in zip(owners, found, strict=True):
                if count:
                    yield lanes.share_tensors({"": row}, owner)[""]

        total_device = sums["sum"].device
        add_lane(sums["sum"], lambda k: fetch(inputs, k, total_device), len(inputs), exchange)

    def embedded(self, hidden: Tensor) -> Tensor:
        """Something the model takes for embeddings where its blocks are replaced: opt's may have another width."""
        width = getattr(self.model.get_input_embeddings(), "embedding_dim", hidden.shape[-1])
        return hidden if width == hidden.shape[-1] else hidden.new_zeros(*hidden.shape[:-1], width)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head, by the model's own forward, for one batch of last-block outputs."""
        h = hidden.to(self.device)
        with self.replace_blocks(lambda i, x, *a, **k: h):
            return self.model(inputs_embeds=self.embedded(h), use_cache=False).logits

    def split_tokens(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """One batch of last-block outputs (n, seq, hidden) in pieces for the head: itself, or (1, tokens, hidden) where all its
        tokens' logits would be more than `LOGITS` numbers."""
        n, length, _ = hidden.shape
        tokens = LOGITS // self.source.config.vocab_size
        if n * length <= tokens:
            return (hidden,)
        return hidden.flatten(0, 1)[None].split(min(max(tokens, 1), length), 1)

    def nll(self, hidden: Hidden) -> float:
        """Mean NLL per predicted token of the calibration windows, from last-block outputs."""
        losses = []
        for piece, h in zip(self.pieces, hidden, strict=True):
            target = nn.functional.pad(piece.ids[:, 1:], (0, 1), value=NOTHING).flatten()
            loss, done = 0.0, 0
            for few in self.split_tokens(h):
                logits = self.logits(few).flatten(0, 1)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                words = target[done : done + len(logits)].to(self.device)
                loss += nn.functional.cross_entropy(logits, words, ignore_index=NOTHING, reduction="sum").item()
                done += len(logits)
            losses.append((loss, piece.ids[:, 1:].numel()))
        self.release()
        losses = self.in_order(losses)
        if not sum(n for _, n in losses):
            raise InputError("windows of one token have no loss to compare by: use --seq-len 2 or more")
        return sum(loss for loss, _ in losses) / sum(n for _, n in losses)

    def divergence(self, hidden: Hidden, reference: Hidden) -> float:
        """Mean KL(reference ‖ model) in nats per token, from the last-block outputs of both."""
        sums = []
        for h, r in zip(hidden, reference, strict=True):
            lost = 0.0
            for pair in zip(*(self.split_tokens(x) for x in (h, r)), strict=True):
                logits = [self.logits(x).flatten(0, 1) for x in pair]
                for few in zip(*(x.split(256) for x in logits), strict=True):
                    own, other = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in few)
                    lost += float((other.exp() * (other - own)).sum())
            sums.append((lost, h.shape[0] * h.shape[1]))
        self.release()
        sums = self.in_order(sums)
        return max(sum(s for s, _ in sums) / sum(n for _, n in sums), 0.0)

    def in_order(self, values: list[T]) -> list[T]:
        """One value for each of this process's batches → one for every batch of all processes, in order."""
        own = {p.first: v for p, v in zip(self.pieces, values, strict=True)}
        found = {first: v for part in lanes.gather(own) for first, v in part.items()}
        return [found[first] for first in sorted(found)]

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
            del stats  # or it lies beside the next block's
            if progress:
                progress(phase, i + 1, len(self))
        return hidden

    def output_gradient(self, hidden: Tensor, seed: int, first: int) -> Tensor:
        """Gradient of Σ NLL at last-block outputs (batch, seq, hidden), labels sampled from the model's own predictions.

        Sampled labels make the second moment of the gradient the true Fisher information. Deterministic by `seed` and
        by each sequence's number, however sequences are grouped; `first` is the number of the batch's first sequence.
        """
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + first + n) for n in range(len(hidden))]
        noise = torch.cat([torch.rand(hidden.shape[1], generator=g, dtype=torch.float64) for g in draws])
        found, done = [], 0
        for few in self.split_tokens(hidden):
            n = few.shape[0] * few.shape[1]
            found.append(self.sample_gradient(few, noise[done : done + n]))
            done += n
        return torch.cat(found, 1).view(hidden.shape)

    def sample_gradient(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """`output_gradient` of one piece; noise (n · seq,) in [0, 1) chooses the labels."""
        h = hidden.to(self.device).detach().clone().requires_grad_(True)
        with torch.enable_grad(), self.replace_blocks(lambda i, x, *a, **k: h if i == len(self) - 1 else x):
            logits = self.model(inputs_embeds=self.embedded(h.detach()), use_cache=False).logits.flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            gradient = logits.detach().softmax(-1)  # of the NLL of label y: the probabilities, less one at y
            at = torch.device("cpu") if self.device.type == "mps" else self.device  # that one has no fp64
            steps = gradient.to(at).cumsum(-1, dtype=torch.float64)
            labels = torch.searchsorted(steps, noise[:, None].to(at) * steps[:, -1:])
            del steps
            labels = labels.clamp(max=logits.shape[-1] - 1).to(self.device)
            gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
            logits.backward(gradient)
        assert h.grad is not None
        return h.grad

    def sweep_back(
        self,
        taps: Callable[[Shape], list[Tap]],
        use: Callable[[int, nn.Module, Stats], None],
        progress: Progress | None = None,
        phase: str = "gradients",
        seed: int = 0,
        edits: Mapping[int, list[Edit]] | None = None,
    ) -> None:
        """Walk the model forwards keeping every block's inputs, then backwards from sampled labels, block by block.

        Each block is recomputed from its kept inputs (in memory up to the room's `kept`, then on disk); `use` gets (i, block,
        stats) from the last block to the first, with forward sites and "grad:" sites measured together. `edits`: of the
        model that these edits make.
        """

        def get(i: int) -> nn.Module:
            return self.block(i, (edits or {}).get(i, ()))

        inputs = [self.start()]
        for i in range(len(self)):
            inputs.append(self.run(i, self.place(get(i)), inputs[-1], self.room.shelf))
        last = zip(self.pieces, inputs.pop(), strict=True)
        gradients = Activations(self.room, (self.output_gradient(h, seed, p.first) for p, h in last))
        self.release()
        for i in reversed(range(len(self))):
            block = get(i)
            placed = self.place(block).requires_grad_(False)
            wanted = taps(self.source.shape(i))
            forward = {s.removeprefix("dense:") for t in wanted for s in t.sites if not s.startswith("grad:")}
            grads = {s.removeprefix("grad:") for t in wanted for s in t.sites if s.startswith("grad:")}
            back, weights = dict[str, str](), dict[str, Tensor]()
            if (edits or {}).get(i):  # through the uncompressed weights all the same
                back = {s: s.replace(".back", ".out") for s in sorted(grads) if s.endswith(".back")}
                dense = self.place(self.block(i))
                weights = {s: get_linear(dense, self.family, s.removesuffix(".back")).weight.detach() for s in back}
            backward = sorted(grads - set(back) | set(back.values()))
            hidden, earlier = inputs.pop(), Activations(self.room)

            def run(n: int) -> Values:
                leaf = fetch(hidden, n, self.device).detach().requires_grad_(True)  # noqa: B023
                with torch.enable_grad(), tap_sites(placed, self.family, forward | set(backward)) as seen:  # noqa: B023
                    out = self.forward(i, placed, leaf)  # noqa: B023
                    leaves = [leaf, *(seen[s] for s in backward)]  # noqa: B023
                    into = fetch(gradients, n, self.device)  # noqa: B023
                    found = torch.autograd.grad(out, leaves, into, allow_unused=True)
                earlier.append(found[0])  # noqa: B023
                values = {p + s: seen[s].detach() for s in forward for p in ("", "dense:")}  # noqa: B023
                values |= {f"grad:{s}": g for s, g in zip(backward, found[1:], strict=True) if g is not None}  # noqa: B023
                through = {s: values.get(f"grad:{at}") for s, at in back.items()}  # noqa: B023
                values |= {f"grad:{s}": g @ weights[s] for s, g in through.items() if g is not None}  # noqa: B023
                return seen.fold(values, len(leaf))

            stats = self.collect(wanted, run, self.source.shape(i))
            gradients = earlier
            use(i, block, stats)
            del stats  # or it lies beside the next block's
            if progress:
                progress(phase, len(self) - i, len(self))


def reuse_memory() -> None:
    """From here on freed tensors of less than 32 MiB stay with the process until `return_memory`: pages that come from the
    system anew for every tensor are zeroed first, which took a tenth of a run. Larger ones go back at once."""
    if LIBC is not None and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, and this is the most that glibc takes
        LIBC.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def return_memory() -> None:
    """Give freed heap pages back to the system."""
    if LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def share_stats(stats: Stats, source: int) -> Stats:
    """One process's sums on every process."""
    if lanes.count() == 1:
        return stats
    tensors = {(tap, name): t for tap, sums in stats.sums.items() for name, t in sums.items()}
    out = Stats()
    out.tokens = lanes.share(stats.tokens, source)
    for (tap, name), t in lanes.share_tensors(tensors, source).items():
        out.sums.setdefault(tap, {})[name] = t
    return out
