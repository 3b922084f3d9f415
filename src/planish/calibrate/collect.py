"""Statistics of one block: what its taps see in all calibration batches, summed in an order that depends on the batches alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish import lanes
from planish import stats as planish_stats
from planish.calibrate.activations import Activations, fetch
from planish.calibrate.reuse import Reuse, lead
from planish.calibrate.stream import Hidden, Stream, return_memory
from planish.calibrate.taps import AllSeen, Values, add_batch, choose_windows, find_gap, take_windows, tap_sites
from planish.core import Shape
from planish.errors import InputError
from planish.slices import Precision, choose_exact
from planish.stats import Stats, Tap, add_lane, is_finite


class Run(NamedTuple):
    """A placed block, its inputs, and where its runs may start."""

    block: nn.Module
    hidden: Hidden
    reuse: Reuse | None = None


@torch.no_grad()
def measure_block(
    stream: Stream,
    i: int,
    block: nn.Module,
    taps: list[Tap],
    hidden: Hidden,
    dense: Run | dict[str, Hidden] | None = None,
    outputs: bool = True,
    reuse: Reuse | None = None,
) -> tuple[Stats, Hidden]:
    """Statistics of block i over all batches, and its outputs (none without `outputs`: then only as much of the
    block runs as the sites need, led by `reuse` where what comes before has already run with these inputs).

    `dense`: the uncompressed block and its own inputs, for sites with the prefix "dense:", or what `capture` saw there.
    """
    results = Activations(stream.limits)
    own_sites = {s for t in taps for s in t.sites if ":" not in s}
    dense_sites = {s.removeprefix("dense:") for t in taps for s in t.sites if s.startswith("dense:")}
    gaps = {s.removesuffix(".gap") for s in own_sites if s.endswith(".gap")}
    own_sites = {s for s in own_sites if not s.endswith(".gap")}
    if gaps:
        own_sites |= {"attention.raw", "mlp.raw", "attention.add"}
        dense_sites |= {"attention.raw", "attention.add", "mlp.raw", "mlp.add"}

    def run(n: int) -> Values:
        h, values = fetch(hidden, n, stream.device), Values()
        if own_sites or outputs:
            with (
                lead(reuse, n, block, stream.family, own_sites),
                tap_sites(block, stream.family, own_sites, not outputs) as seen,
                suppress(AllSeen),
            ):
                results.append(stream.forward(i, block, h, n))
            values |= seen.fold(seen, len(h))
        if dense_sites and isinstance(dense, dict):
            values |= {f"dense:{s}": fetch(dense[s], n, stream.device) for s in dense_sites}
        elif dense_sites:
            assert isinstance(dense, Run)
            with (
                lead(dense.reuse, n, dense.block, stream.family, dense_sites),
                tap_sites(dense.block, stream.family, dense_sites, True) as seen,
                suppress(AllSeen),
            ):
                stream.forward(i, dense.block, fetch(dense.hidden, n, stream.device), n)
            values |= seen.fold({f"dense:{s}": v for s, v in seen.items()}, len(h))
        for where in gaps:
            values[f"{where}.gap"] = find_gap(where, values, stream.source.shape(i).parallel)
        return values

    return collect(stream, taps, run, stream.source.shape(i)), results


@torch.no_grad()
def capture(
    stream: Stream, i: int, block: nn.Module, sites: set[str], hidden: Hidden, outputs: bool = True
) -> tuple[dict[str, Hidden], Hidden]:
    """What is seen at these sites of block i in one run over all batches, and its outputs (none without `outputs`)."""
    found, results = {s: Activations(stream.limits) for s in sorted(sites)}, Activations(stream.limits)
    for n in range(len(hidden)):
        with tap_sites(block, stream.family, sites, not outputs) as seen, suppress(AllSeen):
            results.append(stream.forward(i, block, fetch(hidden, n, stream.device), n))
        for site, tensors in found.items():
            tensors.append(seen[site])
    return dict(found), results


def collect(stream: Stream, taps: list[Tap], run: Callable[[int], Values], shape: Shape, aside: int = 0) -> Stats:
    """Statistics over all batches of all processes. `run(n)`: what is seen at every site for piece n. `aside`: one window in so
    many is set aside (`planish.calibrate.taps.choose_windows`).

    total = ((lane 0 + lane 1) + lane 2) + …, each lane the sum of its batches in their order: so sums depend on the batches
    alone. Of a wide Gram (`planish.stats.WIDE`) only the total exists: a lane's inputs are kept until it is complete.
    """
    total, added, count = Stats(), Stats(), lanes.count()
    adds = count - 1  # the process that adds lanes up: the first one writes
    used = {lanes.find_lane(i, len(stream.batches)) for i in range(len(stream.batches))}
    wide = [t for t in taps if t.kind == "gram" and 8 * shape.width(t.site) ** 2 >= planish_stats.WIDE]
    narrow = [t for t in taps if t not in wide]
    for first in range(0, lanes.LANES, count):  # every process runs one of these lanes
        mine, inputs = sum_lane(stream, first + lanes.rank(), narrow, wide, run, aside)
        owners = [r for r in range(count) if first + r in used]
        with stream.clock("sums"):
            for owner in owners:
                added.merge(from_tensors(lanes.bring_tensors(as_tensors(mine), owner, adds)))
            for tap in wide:
                add_wide(stream, total, tap, inputs[tap], mine.tokens.get(tap, 0), owners, shape)
    with stream.clock("sums"):
        total.merge(from_tensors(lanes.share_tensors(as_tensors(added), adds)))
        total.complete(narrow)
    for tap, sums in total.sums.items():  # solved beside the weights, on the CPU
        sums.update({name: t.cpu() for name, t in sums.items()})
        if not all(is_finite(t) for t in sums.values()):
            raise InputError(
                f"activations of block {shape.block} ({tap.site}) are infinite or no numbers in {str(stream.dtype)[6:]}: "
                f"{'use --dtype float32' if stream.dtype != torch.float32 else 'the model overflows'}"
            )
    return_memory(shape.count())  # solving has other sizes
    return total


def choose_run(stream: Stream) -> Precision:
    """What the products of a run of tokens are summed in: no finer than fp32 where what is summed comes of coarser products, and
    by digits where the device is slow in fp64."""
    if stream.products != stream.dtype:
        return torch.float32
    return choose_exact(stream.device)


def sum_lane(
    stream: Stream, lane: int, narrow: list[Tap], wide: list[Tap], run: Callable[[int], Values], aside: int = 0
) -> tuple[Stats, dict[Tap, Activations]]:
    """(Sums of one lane's batches for the narrow taps, their inputs for the wide Grams)."""
    sums = Stats(run=choose_run(stream))
    inputs = {t: Activations(stream.limits) for t in wide}
    for n, piece in enumerate(stream.pieces):
        if piece.lane != lane:
            continue
        values = run(n)
        with stream.clock("sums"):
            if stream.device.type == "mps":  # it has no fp64
                values = {site: v.cpu() for site, v in values.items()}
            add_batch(sums, narrow, values, piece.first, len(piece.ids), aside)
            for tap in wide:
                x = take_windows(values[tap.site], choose_windows(tap.part, piece.first, len(piece.ids), aside))
                inputs[tap].append(x)
                sums.tokens[tap] = sums.tokens.get(tap, 0) + x.shape[:-1].numel()
    return sums, inputs


def add_wide(
    stream: Stream, total: Stats, tap: Tap, inputs: Hidden, tokens: int, owners: list[int], shape: Shape
) -> None:
    """Add the wide Grams of the lanes that `owners` have just run, this process's own from its `inputs`."""
    found = [n for n, r in zip(lanes.gather(tokens), range(lanes.count()), strict=True) if r in owners]
    n, device = shape.width(tap.site), "cpu" if stream.device.type == "mps" else stream.device
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
    add_lane(sums["sum"], lambda k: fetch(inputs, k, total_device), len(inputs), exchange, choose_run(stream))


def as_tensors(stats: Stats) -> dict[Any, Tensor]:
    """Sums by tap, name, and how many tokens they are of."""
    return {(tap, name, stats.tokens[tap]): t for tap, sums in stats.sums.items() for name, t in sums.items()}


def from_tensors(found: dict[Any, Tensor]) -> Stats:
    """What `as_tensors` was given; nothing of nothing."""
    out = Stats()
    for (tap, name, tokens), t in found.items():
        out.sums.setdefault(tap, {})[name], out.tokens[tap] = t, tokens
    return out
