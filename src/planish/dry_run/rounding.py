"""Peak memory and disk of rounding (`planish.walks.quantise`), from shapes alone. docs/large-models.md has the same in words.

Notation as in `planish.dry_run.memory`. Of the largest block: W weights, w those of one group that shares a basis (attention,
the feed-forward, an expert), o × n its largest matrix; R numbers of the second moments of all distinct inputs (v's are what
attention averages), r those of a group; G numbers of the gradients' moments: out² up to 2048 outputs, of more and of experts
out. D bytes of a rounded weight: in the dtype in which it is read, and one of its code.

RAM = libraries + tables of tensors + what is stored of all blocks, at most 64 MiB + hidden states h T d c + the largest of
gradients  P_b c + t (7 m + 13 d) c + 16 G
moments    W (s + c) + 8 (a R + G) + t (3 m + 3 d + a times all distinct inputs) c
rounding   W c + 8 (R + G) + W D + the largest group's w (c + D) + 8 r + work
           (R's part of experts goes as their W D comes: the larger of both)
work       the larger of `WEIGHT` o n and `MOMENT` n² + `LATER` o n; of small matrices `SMALL` o n + `MOMENT` n²
outside    P_o s + `OUTER` P_m where the head is rounded
spill      what of P_o s, 8 G of all blocks and min(T, 4096) d c for every block exceeds 64 MiB

Below 8 bits h is 3 and a, experts left out, is 2: what blocks would give unrounded runs beside. Else they are 2 and 1.

Weights count as what the plan leaves, moments as if nothing were cut. On an accelerator computing copies, batches and moments while
they are summed lie there.
"""

from __future__ import annotations

from typing import NamedTuple

from planish.calibrate.linears import FULL
from planish.calibrate.stream import BATCH
from planish.core import Shape
from planish.dry_run.memory import LIBRARIES, TENSOR, Peaks, count_peaks
from planish.dry_run.passes import Run
from planish.folder.stored_linear import count_held
from planish.rounding.blocks import FINE
from planish.walks.bits import EXPERT, SHARED, Asked, list_rounded
from planish.walks.quantise import SAMPLE

WEIGHT = 56  # bytes per weight of the matrix that is being rounded: it, drafts, two of their errors and these times R, in fp64
SMALL = 80  # in its place where tensors of this size, freed, are still there: more of them at once
MOMENT = 24  # per number of its inputs' moment: in another order, damped, its root
LATER = 14  # bytes per weight while the last root is found: the matrix and two drafts
HEAP = 32 << 20  # bytes: smaller tensors, freed, stay with the process (see `planish.calibrate.stream.reuse_memory`)
OUTER = 32  # per weight of the embedding or the head


class Moments(NamedTuple):
    """Of a group that shares a basis: `weights`; numbers of its `inputs`' moments and of its `gradients`'; channels of all
    distinct inputs (`width`), those of experts for the tokens that reach them; its `largest` matrix's (out, in)."""

    weights: int
    inputs: int
    gradients: int
    width: int
    largest: tuple[int, int]


def count_work(out: int, n: int) -> int:
    """Bytes that rounding a matrix (out, in) takes: what is below `HEAP` is still there when the rest is needed."""
    weights, roots = out * n, MOMENT * n * n
    return SMALL * weights + roots if 8 * weights < HEAP else max(WEIGHT * weights, LATER * weights + roots)


def count_moments(shape: Shape, expert: bool) -> dict[str, Moments]:
    """Group → what is known of it: all that a block rounds but experts', or of one `expert`, which are alike."""
    groups: dict[str, list[str]] = {}
    for role in list_rounded(shape):
        if role.startswith(f"{EXPERT}0." if expert else "") and (expert or not role.startswith(EXPERT)):
            name = "attention" if role in shape.attends else "shared" if role.startswith(SHARED) else "mlp"
            groups.setdefault(name, []).append(role)
    found = {}
    for name, roles in groups.items():
        sizes = {r: shape.linear(r) for r in roles}
        inputs = [*{(r.rpartition(".")[2] in ("o", "down"), n): n for r, (_, n) in sizes.items()}.values()]
        inputs += [shape.hidden] if name == "attention" and shape.averages else []
        full = [out * out if out <= FULL and not expert else out for out, _ in sizes.values()]
        found[name] = Moments(
            sum(out * n for out, n in sizes.values()), sum(n * n for n in inputs), sum(full), sum(inputs),
            max(sizes.values(), key=lambda s: count_work(*s)),
        )  # fmt: skip
    return found


def sum_moments(shape: Shape, expert: bool) -> Moments:
    """Of all groups of a block together, or of those of all its experts."""
    groups = [*count_moments(shape, expert).values()]
    times = shape.experts.number if expert and shape.experts else 1
    return Moments(
        times * sum(g.weights for g in groups), times * sum(g.inputs for g in groups), times * sum(g.gradients for g in groups),
        times * sum(g.width for g in groups), max((g.largest for g in groups), default=(0, 0)),
    )  # fmt: skip


def count_all(asked: Asked | None, run: Run, keep: float, params: tuple[int, int]) -> Peaks:
    """Of a run on a model of so many parameters, before and after, that leaves this share of the blocks' weights, and rounds them
    where that is `asked`."""
    cut = count_peaks(run, *params)
    if asked is None:
        return cut
    ram, vram, _, spill = count_rounding(asked, run, keep)
    return Peaks(max(cut.ram, ram), max(cut.vram, vram), cut.disk, max(cut.spill, spill))


def count_rounding(asked: Asked, run: Run, keep: float) -> Peaks:
    """Of rounding what a plan leaves, this share of the blocks' weights; of the disk what is spilled."""
    stream, source, shape = run.measure.given, run.measure.source, run.largest
    s, c = source.stored.itemsize, stream.dtype.itemsize
    draft = 1 + (min(s, 2) if asked.packed else 4)
    dense, experts = sum_moments(shape, False), sum_moments(shape, True)
    weights, gradients = int(keep * shape.count()), 8 * (dense.gradients + experts.gradients)
    moments, theirs = 8 * dense.inputs, 8 * experts.inputs
    drafts, late = (draft * int(keep * g.weights) for g in (dense, experts))
    choosing = max(
        int(keep * ((c + draft) * g.weights + count_work(*g.largest))) + 8 * g.inputs
        for expert in (False, True) for g in count_moments(shape, expert).values()
    )  # fmt: skip
    batch, d, width = min(run.tokens, BATCH) * c, shape.hidden, dense.width
    anchored = asked.blocks.bits < FINE
    beside = moments + batch * width if anchored else 0
    if shape.experts:
        width += experts.width * shape.experts.top // shape.experts.number
    outer = sum(n for n, _ in source.sizes().values()) - sum(x.count() for x in run.problem.shapes)
    blocks = 8 * sum(sum_moments(x, expert).gradients for x in run.problem.shapes for expert in (False, True))
    kept, spill = count_stored(run, blocks + outer * s)
    steps = [
        int(keep * count_held(shape)) * c + batch * (7 * shape.inner + 13 * d) + 2 * gradients,
        weights * (s + c) + moments + theirs + gradients + beside + batch * (3 * shape.inner + 3 * d + width),
        weights * c + moments + gradients + drafts + max(theirs, late) + choosing,
    ]
    outside = outer * s + (OUTER * source.count_head() if asked.head else 0)
    always = LIBRARIES + TENSOR * len(source.sizes()) + kept
    hidden = (3 if anchored else 2) * run.tokens * d * c
    here = min(hidden, stream.limits.limit)
    if stream.device.type == "cpu":
        return Peaks(always + max(outside, here + max(steps)), 0, 0, spill + hidden - here)
    vram = max(steps[0], weights * c + moments + theirs + beside + batch * (3 * shape.inner + 3 * d + width))
    return Peaks(always + max(outside, here + steps[2]), vram, 0, spill + hidden - here)


def count_stored(run: Run, size: int) -> tuple[int, int]:
    """Of so many bytes and the sample's inputs of all blocks those that stay in memory, and those on disk."""
    stream = run.measure.given
    size += min(run.tokens, SAMPLE) * sum(s.hidden for s in run.problem.shapes) * stream.dtype.itemsize
    kept = min(size, stream.limits.stored.limit)
    return kept, size - kept
