"""Inputs of a block's linears behind blocks that have changed, beside those behind the same blocks as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from planish.calibrate.activations import Activations, fetch
from planish.calibrate.stream import Hidden, Stream
from planish.slices import choose_exact
from planish.stats import Sums, add_cross

See = Callable[[str, Tensor], None]  # name, inputs


@torch.no_grad()
def measure_beside(
    stream: Stream, i: int, block: nn.Module, names: Sequence[str], hidden: Hidden, beside: Hidden
) -> tuple[dict[str, Tensor], Hidden]:
    """Σ x x̂ᵀ (in, in) in fp64 of every named linear's inputs, x̂ where block i gets `hidden` and x where it gets `beside`, and what
    the block makes of `beside`. Linears that read the same tensor share it; no sums where both are the same to the bit.

    The block has to treat all tokens alike: not for experts, which other tokens reach.
    """
    sums: dict[str, Sums] = {}
    leader: dict[str, str] = {}
    outputs = Activations(stream.limits)
    same = all(
        torch.equal(fetch(hidden, n, stream.device), fetch(beside, n, stream.device)) for n in range(len(hidden))
    )
    for n in range(len(hidden)):
        known: dict[str, Tensor] = {}
        outputs.append(
            watch(stream, i, block, () if same else names, fetch(beside, n, stream.device), n, known.__setitem__)
        )
        if same:
            continue
        seen: list[tuple[Tensor, str]] = []

        def see(name: str, x: Tensor, known: dict[str, Tensor] = known, seen: list[tuple[Tensor, str]] = seen) -> None:
            first = next((own for other, own in seen if other is x), None)
            leader[name] = first or name
            if first is None:
                seen.append((x, name))
                y, x = known.pop(name).flatten(0, -2), x.flatten(0, -2)
                y, x = (y.cpu(), x.cpu()) if x.device.type == "mps" else (y, x)
                add_cross(sums.setdefault(name, {}), y, x, choose_exact(x.device))

        watch(stream, i, block, names, fetch(hidden, n, stream.device), n, see)
    return {name: sums[own]["sum"].cpu() for name, own in leader.items()}, outputs


def watch(stream: Stream, i: int, block: nn.Module, names: Sequence[str], hidden: Tensor, n: int, see: See) -> Tensor:
    """The n-th batch through block i; what named modules get is shown."""
    handles = [block.get_submodule(m).register_forward_pre_hook(lambda _, args, m=m: see(m, args[0])) for m in names]
    try:
        return stream.forward(i, block, hidden, n)
    finally:
        for handle in handles:
            handle.remove()
