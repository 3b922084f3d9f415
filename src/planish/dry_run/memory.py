"""Peak memory and disk of a run, from shapes alone. docs/large-models.md holds the same formulas in words.

Notation: P_b weights of the largest block in memory, of experts that are read one by one a linear's; P_e those that are solved
anew, with all experts' where each is cut inside; P_o parameters outside the blocks, P_m of the larger of embedding and head;
s, c bytes of a stored and of a computed number; T calibration tokens, t = min(T, 2048) those of one batch; d hidden,
m intermediate; k channels of all tapped sites together; S fp64 numbers of one block's statistics, S_w of them in wide
Grams, of which there is only one copy; W fp64 numbers alive in the largest solve (`Solver.memory`).

RAM = libraries + 12 KiB for each of the model's tensors (modules and names) + 36 bytes for each rank of every unit (costs and
losses; fitted to a model of 345 blocks) + the largest of
start    P_m (s + c) + T d c
measure  streams · P_b (s + c if c ≠ s) + A + batch + sums
solve    streams · P_b s + P_e s for the edits + A + 8 S + 8 W
end      P_o s
streams  2 where the dense prefix runs beside the compressed one, else 1
A        min(2 · streams · T d c + T between c, limit) + kept, half of the streams' where a method measures on the compressed
         prefix: a block runs again for its outputs; between: see `count_between`, kept: see `count_kept`
f        a forward pass, t (3 m + 3 d + k − widest site) c, with gradients t (4 m + 10 d) c more, which autograd saves
batch + sums   8 (2 S − S_w) + f for several batches, for one the larger of f and 8 S + t k c + 8 · 1024 · widest site; where cuts
         are priced token by token (planish.plan.token_prices) also what linears see, and gradients at their outputs, in
         the windows that are set aside

The inputs of wide Grams, a lane's at a time, are among the activations. On an accelerator the computing copy of a block,
batch and sums lie in VRAM, with two rows of tiles in fp64 and the batch that goes there next, of each stream; solving takes what
is left there, or is the CPU's. Of A what fits there lies there too.
"""

from __future__ import annotations

from typing import NamedTuple

from planish import stats
from planish.calibrate.stream import BATCH
from planish.calibrate.text import list_aside
from planish.core import Shape, count_sums
from planish.dry_run.passes import Run, count_between
from planish.folder.source import MemorySource
from planish.folder.stored_linear import count_held
from planish.plan.frontiers import dense_taps, stored_taps
from planish.plan.token_prices import choose_aside, token_taps

LIBRARIES = 410 << 20  # bytes: Python, PyTorch and transformers, loaded and warm
TENSOR = 12 << 10  # of a module without values, its names and what is known of it
RANK = 36  # of a rank that a unit could have: its costs and its loss


class Peaks(NamedTuple):
    """Bytes. `ram` and `vram` at their peaks; `disk` of the output while the run goes on; `spill` of activations."""

    ram: int
    vram: int
    disk: int
    spill: int


def count_peaks(run: Run, params: int, written: int) -> Peaks:
    """Of a run on a model of `params` parameters that writes `written` of them."""
    problem, stream, shape = run.problem, run.measure.given, run.largest
    stored, computed = stream.source.stored.itemsize, stream.dtype.itemsize
    cut = is_cut(run)
    batch = count_batch(run) if cut else Batch(0, 0, 0, 0, 0)
    first, later = count_activations(run, batch.wide) if cut else (Activations(0, 0, 0),) * 2
    held = max(map(Shape.count if isinstance(stream.source, MemorySource) else count_held, problem.shapes))
    inside = {"neurons", *(r for r in shape.rest if r.startswith("expert."))} & {u.name for u in problem.units}
    blocks, accelerator = run.streams * held, stream.device.type != "cpu"
    copies = blocks * computed if cut and (accelerator or computed != stored) else 0
    measure, again = copies + batch.measuring, copies + batch.through
    solved = problem.block_units(shape.block) if cut else ()
    work = max((problem.units[u].memory(u, shape) for u in solved), default=0)
    head, outputs = stream.source.count_head(), run.streams * run.tokens * shape.hidden * computed
    start = head * (stored + computed * cut) + min(outputs, later.memory)
    solve = (blocks + (shape.count() if inside else held)) * stored + later.memory + 8 * (batch.sums + work)
    ram, vram = [start, solve, (params - sum(s.count() for s in problem.shapes)) * stored], 0
    if accelerator:
        tiles = 2 * 8 * stats.COARSE * batch.widest
        following = run.streams * min(run.tokens, BATCH) * shape.hidden * computed * cut
        vram = max(measure + tiles + first.device + following, again + later.device + following, head * computed * cut)
    else:
        ram.append(blocks * stored + max(measure + first.memory, again + later.memory))
    ranks = sum(len(solver.ranks(unit, problem.shapes[unit.block])) for unit, solver in problem.units.items())
    objects = TENSOR * len(stream.source.sizes()) + RANK * ranks
    return Peaks(LIBRARIES + objects + max(ram), vram, written * stored, later.disk)


def is_cut(run: Run) -> bool:
    """Whether anything is measured or solved at all: with --keep 1 blocks are written as they are."""
    return run.measures or bool(run.planned.edits) or any(run.solved(s.block) for s in run.problem.shapes)


class Batch(NamedTuple):
    """`sums`: fp64 numbers of one block's statistics, `wide` of them in wide Grams; `widest`: channels of the widest site.
    Bytes: `through`, of a batch on its way through a block; `measuring`, with sums and what they are made of."""

    sums: int
    wide: int
    widest: int
    through: int
    measuring: int


def count_batch(run: Run) -> Batch:
    """What the batches of the largest block hold besides the block."""
    problem, shape, planned = run.problem, run.largest, run.planned
    dense = dense_taps(problem, shape.block)  # measured for the plan; then one stage after another
    parts = [*(problem.taps(stage) for stage in planned.stages(problem.block_units(shape.block))), dense]
    taps = max(parts, key=lambda part: count_sums(shape, part))
    sums, grams = count_sums(shape, taps), [count_sums(shape, [t]) for t in taps if t.kind == "gram"]
    wide = sum(n for n in grams if 8 * n >= stats.WIDE)
    sites = max(([shape.width(s) for s in {s for t in part for s in t.sites}] for part in parts), key=sum)
    widest, size = max(sites, default=0), min(run.tokens, BATCH) * run.measure.given.dtype.itemsize
    backward = run.measures and any(t.site.startswith("grad:") for t in dense)
    through = size * (7 * shape.inner + 13 * shape.hidden if backward else 3 * shape.inner + 3 * shape.hidden)
    measuring = through + size * (sum(sites) - widest)
    if run.tokens > BATCH:
        measuring += 8 * (2 * sums - wide)
    else:
        measuring = max(measuring, 8 * sums + size * sum(sites) + 8 * 1024 * widest)
    if backward:
        aside = list_aside(0, run.windows, choose_aside(problem, run.windows, run.seq_len))
        rows = sum(shape.width(t.site) for t in token_taps(problem, shape.block))
        measuring += len(aside) * run.seq_len * rows * run.measure.given.dtype.itemsize
    return Batch(sums, wide, widest, through, measuring)


class Activations(NamedTuple):
    """Bytes on the accelerator, in memory and on disk."""

    device: int
    memory: int
    disk: int


def count_activations(run: Run, wide: int) -> tuple[Activations, Activations]:
    """While a block is measured, and while it is solved or run again; `wide`: fp64 numbers of wide Grams."""
    stream, shape = run.measure.given, run.largest
    outputs = run.streams * run.tokens * shape.hidden
    inside = run.tokens * max(count_between(run, s) for s in run.problem.shapes)
    inside += max(BATCH, run.tokens // 8) * shape.inner if wide and run.tokens > BATCH else 0
    kept, shelved = count_kept(run)

    def place(channels: int) -> Activations:
        size = channels * stream.dtype.itemsize
        device = min(size, stream.limits.device_limit)
        memory = min(size - device, stream.limits.limit)
        return Activations(device, memory + kept, size - device - memory + shelved)

    later = place(2 * outputs + inside)
    return later if run.planned.prefix == "dense" else place(outputs + inside), later


def count_kept(run: Run) -> tuple[int, int]:
    """Bytes that are kept of all blocks at once, in memory and on disk: their inputs and their statistics, where the plan
    measures gradients."""
    problem, stream = run.problem, run.measure.given
    taps = {s.block: dense_taps(problem, s.block) for s in problem.shapes}
    if not (run.measures and any(t.site.startswith("grad:") for own in taps.values() for t in own)):
        return 0, 0
    refit = run.planned.refit(run.windows) < run.windows
    total = sum(s.hidden for s in problem.shapes) * run.tokens * stream.dtype.itemsize
    total += sum(8 * count_sums(s, {*taps[s.block]} & stored_taps(problem, s.block, refit)) for s in problem.shapes)
    kept = min(total, stream.limits.stored.limit)
    return kept, total - kept
