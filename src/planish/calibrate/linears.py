"""Every `nn.Linear` of a block as it is stored, factors of low-rank forms among them: inputs, and gradients at outputs.

Unlike taps these know no roles, only modules' names; they run in one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, fetch
from planish.calibrate.losses import output_gradient
from planish.calibrate.stream import Hidden, Stream
from planish.stats import Sums, add_gram, mirror

FULL = 2048  # outputs up to which all products of their gradients are summed, of more only the squares


def list_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """What weight-only quantisation rounds in a block, of every form: name → linear."""
    return {n: m for n, m in block.named_modules() if type(m) is nn.Linear}


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
        add_gram(sums[name], flat.cpu() if flat.device.type == "mps" else flat)

    handles = [block.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: see(n, args[0])) for n in names]
    try:
        for h in hidden:
            stream.forward(i, block, h)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name in set(leader.values()):
        mirror(sums[name]["sum"])
    return {n: sums[leader[n]]["sum"].cpu() for n in names}


def measure_gradients(stream: Stream, seed: int = 0) -> tuple[list[dict[str, Tensor]], Hidden]:
    """Per block and linear the second moment of the gradient at its output, and what the last block puts out.

    Gradients are of the NLL of labels that the model's own predictions draw (see `planish.calibrate.losses.output_gradient`);
    the moment is (out, out) in fp64, or (out,) its diagonal where out exceeds `FULL`.
    """
    inputs = [stream.start()]
    for i in range(len(stream)):
        inputs.append(stream.run(i, stream.place(stream.block(i)), inputs[-1], stream.limits.stored))
    outputs = inputs.pop()
    last = zip(stream.pieces, outputs, strict=True)
    into: Hidden = Activations(stream.limits, (output_gradient(stream, h, seed, p.first) for p, h in last))
    stream.release()
    found: list[dict[str, Tensor]] = [{} for _ in range(len(stream))]
    for i in reversed(range(len(stream))):
        found[i], into = step_back(stream, i, inputs.pop(), into)
    return found, outputs


def step_back(stream: Stream, i: int, hidden: Hidden, into: Hidden) -> tuple[dict[str, Tensor], Hidden]:
    """Moments of block i from its inputs and the gradients at its outputs; the gradients at its inputs."""
    block = stream.place(stream.source.stored_block(i)).requires_grad_(False)  # type: ignore[attr-defined]
    linears, seen, earlier = list_linears(block), dict[str, Tensor](), Activations(stream.limits)
    sums: dict[str, Sums] = {n: {} for n in linears}
    squares: dict[str, Tensor] = {}
    tokens = 0
    handles = [m.register_forward_hook(lambda m, args, out, n=n: seen.update({n: out})) for n, m in linears.items()]
    try:
        for n in range(len(hidden)):
            leaf = fetch(hidden, n, stream.device).detach().requires_grad_(True)
            with torch.enable_grad():
                out = stream.forward(i, block, leaf)
                wanted = [leaf, *seen.values()]
                gradients = torch.autograd.grad(out, wanted, fetch(into, n, stream.device), allow_unused=True)
            earlier.append(gradients[0])
            tokens += leaf.shape[0] * leaf.shape[1]
            for name, g in zip(seen, gradients[1:], strict=True):
                if g is not None and g.shape[-1] > FULL:
                    squares[name] = squares.get(name, 0) + g.flatten(0, -2).double().square().sum(0).cpu()
                elif g is not None:
                    add_gram(sums[name], g.flatten(0, -2).cpu() if g.device.type == "mps" else g.flatten(0, -2))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    full = {n: s["sum"] for n, s in sums.items() if "sum" in s}
    for total in full.values():
        mirror(total)
    return {n: t.cpu() / tokens for n, t in (full | squares).items()}, earlier
