"""Peak memory and disk of a compression, from shapes alone. docs/large-models.md holds the same formulas in words.

Notation: P_b weights of the largest block, P_o parameters outside the blocks, P_m of the larger of embedding and head;
s, c bytes of a stored and of a computed number; T calibration tokens, t = min(T, 8192) those of one batch; d hidden,
m intermediate; k channels of all tapped sites together; S fp64 numbers of one block's statistics, S_w of them in wide
Grams, of which there is only one copy; W fp64 numbers alive in the largest solve (`Solver.work`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from planish.core import Shape

LIBRARIES = 410 << 20  # Python, PyTorch and transformers, loaded and warm
BATCH = 8192  # tokens


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
    wide: int,
    sites: int,
    work: int,
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

    outside = P_o, largest = P_m, statistics = S, wide = S_w, sites = k, work = W, written = parameters of the output;
    `streams` 2 where the dense prefix runs beside the compressed one; `activation_limit`: bytes of activations held in
    memory before they go to disk.

    RAM = base + the largest of
    start    P_m (s + c) + T d c
    measure  streams · P_b (s + c if c ≠ s) + A + 8 S' + t (3 m + 6 d + k) c,  S' = S, or 2 S − S_w for several batches
    solve    streams · P_b s + P_b s for the edits + A + 8 S + 8 W
    end      P_o s
    with A = min(2 · streams · T d c, limit); the inputs of wide Grams, a lane's at a time, are among the activations.
    On an accelerator the computing copy of a block, the batch and 8 S' lie in VRAM while a block is measured.
    """
    shape = max(shapes, key=Shape.count)
    block = shape.count()
    copy = computed if accelerator or computed != stored else 0
    activations = 2 * streams * tokens * shape.hidden * computed
    lane = 0 if tokens <= BATCH or not wide else max(BATCH, tokens // 8) * shape.intermediate * computed
    held = activations + lane if activation_limit is None else min(activations + lane, activation_limit)
    batch = min(tokens, BATCH) * (3 * shape.intermediate + 6 * shape.hidden + sites) * computed
    sums = 8 * (statistics if tokens <= BATCH else 2 * statistics - wide)
    on_host, on_device = streams * block * stored + held, streams * block * copy
    measure = on_device + batch + sums
    solve = on_host + block * stored + 8 * (statistics + work)
    start = largest * (stored + computed) + min(tokens * shape.hidden * computed, held)
    vram = max(measure, largest * computed) if accelerator else 0
    ram = base + max(start, outside * stored, on_host + (8 * statistics if accelerator else measure), solve)
    return Prediction(ram, vram, written * stored, activations + lane - held)
