"""Peak memory and disk of a compression, from shapes alone. docs/large-models.md holds the same formulas in words.

Notation: P_b weights of the largest block, P_o parameters outside the blocks, P_m of the larger of embedding and head;
s, c bytes of a stored and of a computed number; T calibration tokens, t = min(T, 8192) those of one batch; d hidden,
m intermediate; S fp64 numbers of one block's statistics; n the widest channel count with a Gram.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from planish.core import Shape

LIBRARIES = 400 << 20  # Python, PyTorch and transformers, loaded
BATCH = 8192  # tokens
COPIES = 7  # fp64 matrices of the widest Gram's size alive in the largest solve (mean, damped, factor, reordered, …)


@dataclass(frozen=True)
class Prediction:
    """Bytes. `ram` and `vram` at their peaks; `disk` of the output while the run goes on; `spill` of activations."""

    ram: int
    vram: int
    disk: int
    spill: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def predict(
    shapes: list[Shape],
    *,
    outside: int,
    largest: int,
    statistics: int,
    tokens: int,
    written: int,
    stored: int = 2,
    computed: int = 4,
    streams: int = 1,
    accelerator: bool = False,
    activation_limit: int | None = None,
    base: int = LIBRARIES,
) -> Prediction:
    """Peaks of a run that compresses every block.

    outside = P_o, largest = P_m, statistics = S, written = parameters of the output; `streams` 2 where the dense prefix runs
    beside the compressed one; `activation_limit`: bytes of activations held in memory before they go to disk.

    RAM = base + max(at the start: P_m (s + c); at the end: P_o s; in a block: streams · P_b (s + c if c ≠ s) + A + 8 S' +
    max(batch, COPIES · 8 n²)), A = min(2 · streams · T d c, limit), batch = t (3 m + 6 d) c, S' = 2 S where there is more
    than one batch. On an accelerator the computing copy of a block, the batch and 8 S' lie in VRAM while it is measured.
    """
    shape = max(shapes, key=Shape.count)
    block, wide = shape.count(), max(shape.intermediate, shape.heads * shape.v, shape.hidden)
    copy = computed if accelerator or computed != stored else 0
    activations = 2 * streams * tokens * shape.hidden * computed
    held = activations if activation_limit is None else min(activations, activation_limit)
    batch = min(tokens, BATCH) * (3 * shape.intermediate + 6 * shape.hidden) * computed
    sums = (2 if tokens > BATCH else 1) * 8 * statistics
    rooted = 8 * max(wide**2, 2 * max(prod(shape.linear(r)) for r in shape.roles) // COPIES)
    on_host, on_device = streams * block * stored + held, streams * block * copy
    if accelerator:
        vram = max(on_device + batch + sums, largest * computed)
        inside = on_host + sums + COPIES * rooted
    else:
        vram, inside = 0, on_host + on_device + sums + max(batch, COPIES * rooted)
    ram = base + max(largest * (stored + computed), outside * stored, inside)
    return Prediction(ram, vram, written * stored, activations - held)
