"""Every linear of a block, of any form: inputs, gradients at outputs, and what attention makes of the inputs of values.

Unlike taps these know modules' names, not roles alone, and a block may be compressed; they run in one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, fetch
from planish.calibrate.losses import output_gradients
from planish.calibrate.store import Named
from planish.calibrate.stream import Hidden, Stream
from planish.folder.stored_linear import find_experts
from planish.modelling.blocks import Layout, read_layout
from planish.modelling.families import Family
from planish.modelling.modules import is_dense, set_module
from planish.slices import choose_exact
from planish.stats import Sums, add_gram, mirror

ROWS = 1 << 14  # averages of attention that are summed per batch
PRIOR = 4.0  # tokens of the mean length, in no direction, that count for every expert beside its own
FULL = 2048  # outputs up to which all products of their gradients are summed, of more only the squares


def list_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """What weight-only quantisation rounds in a block, of every form: name → linear."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and is_dense(m)}


def list_seen(block: nn.Module, layout: Layout) -> list[str]:
    """Modules of a canonical block with a weight of a linear's: every role's, whatever its form, and linears of no role."""
    paths = [p for g in layout.groups for p in g.linears.values()]
    return paths + [n for n in list_linears(block) if not any(n == p or n.startswith(f"{p}.") for p in paths)]


def list_experts(block: nn.Module, family: Family) -> list[list[str]]:
    """Of a canonical block's experts the modules, by what they are in each: all gates, all ups, all downs."""
    row, experts = family.experts, find_experts(block, family)
    if row is None or experts is None:
        return []
    return [[f"{row.path}.{n}.{name}" for n in experts.numbers] for name in experts.names]


def damp_experts(grams: dict[str, Tensor], experts: list[list[str]], reached: float) -> None:
    """Add to the second moments of experts' inputs, in place, those of `PRIOR` tokens more, of the mean length and the same in all
    directions. `reached`: tokens that reach experts, of each as often as it reaches one, where moments are Σ x xᵀ."""
    damped = set[int]()
    for own in experts:
        mean = sum(float(grams[n].trace()) for n in own) / max(reached, 1) / len(grams[own[0]])
        for gram in (grams[n] for n in own if id(grams[n]) not in damped):  # gate and up share theirs
            gram.diagonal().add_(PRIOR * mean)
        damped |= {id(grams[n]) for n in own}


def add_exactly(sums: Sums, x: Tensor) -> None:
    """`add_gram` as exact as in fp64, on the device if it has that."""
    x = x.cpu() if x.device.type == "mps" else x
    add_gram(sums, x, choose_exact(x.device))


@torch.no_grad()
def measure_grams(stream: Stream, i: int, block: nn.Module, names: list[str], hidden: Any) -> dict[str, Tensor]:
    """Σ x xᵀ (in, in) in fp64 of every named linear's inputs; linears that read the same tensor share it."""
    sums: dict[str, Sums] = {n: {} for n in names}
    leader = {n: n for n in names}
    seen: list[tuple[Tensor, str]] = []

    def see(name: str, x: Tensor) -> None:
        for other, first in seen:
            if other is x:
                leader[name] = first
                return
        seen.append((x, name))
        leader[name] = name
        flat = x.flatten(0, -2)
        add_exactly(sums[name], flat)

    handles = [block.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: see(n, args[0])) for n in names]
    try:
        for n, h in enumerate(hidden):
            stream.forward(i, block, h, n)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name in set(leader.values()):
        mirror(sums[name]["sum"])
    return {n: sums[leader[n]]["sum"].cpu() for n in names}


class Values(nn.Module):
    """In the place of v while attention is watched: gives some channels of its input as the values of every kv head."""

    def __init__(self, width: int, kv_heads: int):
        super().__init__()
        self.width, self.kv_heads, self.first, self.channels = width, kv_heads, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.channels = x.shape[-1]
        part = x[..., self.first : self.first + self.width]
        return nn.functional.pad(part, (0, self.width - part.shape[-1])).repeat(1, 1, self.kv_heads)


class Averages(nn.Module):
    """In the place of o: keeps (tokens, heads, width) of what attention has averaged."""

    def __init__(self, heads: int, hidden: int, rows: int):
        super().__init__()
        self.heads, self.hidden, self.rows = heads, hidden, rows
        self.parts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        each = x.flatten(0, -2).unflatten(-1, (self.heads, -1))
        self.parts.append(each[:: max(1, each.shape[0] * self.heads // self.rows)])
        return x.new_zeros(*x.shape[:-1], self.hidden)


class Watched(Exception):
    """Attention has been watched: the rest of the block need not run."""


@torch.no_grad()
def measure_attended(stream: Stream, i: int, block: nn.Module, layout: Layout, hidden: Any) -> Tensor | None:
    """Mean over tokens and heads of x̄ x̄ᵀ (in, in), x̄ = Σ_t a_t x_t what attention averages v's inputs to; fp64.

    The naive program: attention's weights (heads, tokens, tokens) times x. Here attention itself averages x, given as values a
    head's width of channels at a time, so that every family's kind of attention does it. Of a batch with more than `ROWS`
    averages evenly spaced tokens count. None for a block without attention, and where more happens to values.
    """
    paths = next((g.linears for g in layout.groups if g.name == "attention"), {})
    if not {"v", "o"} <= paths.keys() or "attention" in layout.fixed or not layout.kv_heads:
        return None
    v, o = (block.get_submodule(paths[r]) for r in "vo")
    width, wide = v.out_features // layout.kv_heads, layout.heads // layout.kv_heads * v.out_features
    if o.in_features != wide or not width:
        return None
    values, averages = Values(width, layout.kv_heads), Averages(layout.heads, o.out_features, ROWS)  # type: ignore[arg-type]
    sums: Sums = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        values.first = 0
        averages.parts.clear()
        while not averages.parts or values.first < values.channels:
            module(*args, **kwargs)
            values.first += width
        x = torch.cat(averages.parts, -1)[..., : values.channels].flatten(0, 1)
        add_exactly(sums, x)
        raise Watched

    attention = block.get_submodule(stream.family.attention)
    set_module(block, paths["v"], values)
    set_module(block, paths["o"], averages)
    count = 0
    try:
        for n in range(len(hidden)):
            handle = attention.register_forward_pre_hook(watch, with_kwargs=True)
            try:
                stream.forward(i, block, fetch(hidden, n, stream.device), n)
            except Watched:
                count += len(averages.parts[0]) * layout.heads
    finally:
        set_module(block, paths["v"], v)
        set_module(block, paths["o"], o)
    if not count:
        return None
    mirror(sums["sum"])
    return sums["sum"].cpu() / count


def measure_gradients(stream: Stream, seed: int = 0) -> tuple[list[Mapping[str, Tensor]], Hidden]:
    """Per block and module (`list_seen`) the second moment of the gradient at its output, and what the last block puts out.

    Gradients are of random signs of all words (see `planish.calibrate.losses.output_gradient`): so many tokens say more than with
    drawn labels. The moment is (out, out) in fp64, or (out,) its diagonal where out exceeds `FULL`, and of experts, whose moments
    are per token that reaches them, `PRIOR` tokens of the mean length of all experts' counted beside these. Of all blocks they
    may be more than the model: what exceeds the stream's limit of what is stored lies on disk.
    """
    inputs = [stream.start()]
    for i in range(len(stream)):
        inputs.append(stream.run(i, stream.place(stream.block(i)), inputs[-1], stream.limits.stored))
    outputs = inputs.pop()
    into: Hidden = Activations(stream.limits, output_gradients(stream, outputs, seed, "signs"))
    stream.release()
    found: list[Mapping[str, Tensor]] = [{} for _ in range(len(stream))]
    for i in reversed(range(len(stream))):
        own, into = step_back(stream, i, inputs.pop(), into)
        found[i] = Named(stream.limits.stored, own)
    return found, outputs


def step_back(stream: Stream, i: int, hidden: Hidden, into: Hidden) -> tuple[dict[str, Tensor], Hidden]:
    """Moments of block i from its inputs and the gradients at its outputs; the gradients at its inputs."""
    block = stream.place(stream.block(i)).requires_grad_(False)
    names = list_seen(block, read_layout(block, stream.family, stream.source.config))
    linears = {n: block.get_submodule(n) for n in names}
    seen, earlier = dict[str, Tensor](), Activations(stream.limits)
    experts = list_experts(block, stream.family)
    rows: defaultdict[str, float] = defaultdict(float)
    diagonal = {n for own in experts for n in own}
    sums: dict[str, Sums] = {n: {} for n in linears}
    squares: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(lambda m, args, out, n=n: seen.update({n: out})) for n, m in linears.items()]
    try:
        for n in range(len(hidden)):
            leaf = fetch(hidden, n, stream.device).detach().requires_grad_(True)
            with torch.enable_grad():
                out = stream.forward(i, block, leaf, n)
                wanted = [leaf, *seen.values()]
                gradients = torch.autograd.grad(out, wanted, fetch(into, n, stream.device), allow_unused=True)
            earlier.append(gradients[0])
            for name, g in zip(seen, gradients[1:], strict=True):
                rows[name] += 0 if g is None else g[..., 0].numel()
                if g is not None and (g.shape[-1] > FULL or name in diagonal):
                    squares[name] = squares.get(name, 0) + g.flatten(0, -2).double().square().sum(0).cpu()
                elif g is not None:
                    add_exactly(sums[name], g.flatten(0, -2))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    full = {n: s["sum"] for n, s in sums.items() if "sum" in s}
    for total in full.values():
        mirror(total)
    for own in experts:
        level = PRIOR * float(sum(squares[n].mean() for n in own)) / max(sum(rows[n] for n in own), 1)
        for name in own:
            squares[name], rows[name] = squares[name] + level, rows[name] + PRIOR
    return {n: t.cpu() / max(rows[n], 1) for n, t in (full | squares).items()}, earlier
