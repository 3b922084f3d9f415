"""Peak memory and disk of a compression, from shapes alone. docs/large-models.md holds the same formulas in words.

Notation: P_b weights of the largest block, P_o parameters outside the blocks, P_m of the larger of embedding and head;
s, c bytes of a stored and of a computed number; T calibration tokens, t = min(T, 2048) those of one batch; d hidden,
m intermediate; k channels of all tapped sites together; S fp64 numbers of one block's statistics, S_w of them in wide
Grams, of which there is only one copy; W fp64 numbers alive in the largest solve (`Solver.memory`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from planish.calibrate.stream import BATCH
from planish.core import Shape
from planish.stats import COARSE

LIBRARIES = 410 << 20  # Python, PyTorch and transformers, loaded and warm


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
    sites: list[int],
    work: int,
    tokens: int,
    written: int,
    stored: int = 2,
    computed: int = 4,
    streams: int = 1,
    sequential: bool = False,
    between: int = 0,
    kept: int = 0,
    shelved: int = 0,
    backward: bool = False,
    accelerator: bool = False,
    activation_limit: int | None = None,
    near: int = 0,
    base: int = LIBRARIES,
) -> Prediction:
    """Peaks of a run that compresses every block.

    outside = P_o, largest = P_m, statistics = S, wide = S_w, sites = their widths (together k), work = W, written =
    parameters of the output; `sequential`: statistics on the compressed prefix;
    `streams` 2 where the dense prefix runs beside the compressed one; `between`: channels per token kept from within a block
    while it is solved: what stages behind a solved attention start from, what is captured of the uncompressed block;
    `kept`, `shelved`: bytes of block inputs and statistics kept of all blocks, in memory and on disk; `backward`: gradients
    are measured; `activation_limit`: bytes of activations held in memory before they go to disk; `near`: bytes of them that
    stay on the accelerator.

    RAM = base + the largest of
    start    P_m (s + c) + T d c
    measure  streams · P_b (s + c if c ≠ s) + A + batch + sums
    solve    streams · P_b s + P_b s for the edits + A + 8 S + 8 W
    end      P_o s
    with A = min(2 · streams · T d c + T between c, limit) + kept, half of the streams' where a method measures on the
    compressed prefix (`sequential`: a block runs again for its outputs); forward f = t (3 m + 3 d + k − widest site) c, with
    `backward` t (4 m + 10 d) c more, which autograd saves; batch + sums = 8 (2 S − S_w) + f for several batches, for one the
    larger of f and 8 S + t k c + 8 · 1024 · widest site. The inputs of wide Grams, a lane's at a time, are among the
    activations. On an accelerator the computing copy of a block, batch and sums lie in VRAM, with two rows of tiles in fp64; large
    factorisations take what is left there, or run on the CPU. Of A what fits `near` lies there too.
    """
    shape = max(shapes, key=Shape.count)
    block, d, m = shape.count(), shape.hidden, shape.inner
    copy = computed if accelerator or computed != stored else 0
    limit = float("inf") if activation_limit is None else activation_limit
    one = streams * tokens * d * computed
    lane = 0 if tokens <= BATCH or not wide else max(BATCH, tokens // 8) * m * computed
    lane += tokens * between * computed
    there = min(2 * one + lane, near)
    activations = int(min(2 * one + lane - there, limit))
    held = activations + kept
    batch = min(tokens, BATCH) * computed
    through = (7 * m + 13 * d) if backward else (3 * m + 3 * d)
    tapped, widest = sum(sites), max(sites, default=0)
    if tokens > BATCH:
        measure = 8 * (2 * statistics - wide) + batch * (through + tapped - widest)
    else:
        measure = max(batch * (through + tapped - widest), 8 * statistics + batch * tapped + 8 * 1024 * widest)
    measure += streams * block * copy
    rest = streams * block * copy + batch * through  # a block runs again for its outputs
    solve = streams * block * stored + held + block * stored + 8 * (statistics + work)
    on_host = streams * block * stored
    start = largest * (stored + computed) + min(one, held)
    if accelerator:
        measuring = min(one + lane, near) if sequential else there
        vram = max(measure + 2 * 8 * COARSE * widest + int(measuring), rest + int(there), largest * computed)
        inside = on_host + held + 8 * statistics
    else:
        while_measuring = int(min(one + lane, limit)) + kept if sequential else held
        vram, inside = 0, on_host + max(measure + while_measuring, rest + held)
    ram = base + max(start, outside * stored, inside, solve)
    return Prediction(ram, vram, written * stored, int(2 * one + lane - there) - activations + shelved)
