"""What a written model has lost on text that nothing was fitted to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planish import lanes
from planish.calibrate.losses import window_losses
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Stream
from planish.folder.source import open_folder
from planish.folder.writer import Writer


@torch.no_grad()
def measure_loss(measure: Measurements, writer: Writer, windows: Tensor) -> dict[str, Any]:
    """Nats per token that the model which `writer` has written loses against the dense one on windows (n, seq) of the calibration
    text that were not calibrated on: `nats`, its standard error `stderr` as windows differ, the `dense` model's NLL, how many
    `windows` and `tokens`.

    Equivalent to the difference of both models' log(perplexity), with a block of one of them in memory at a time. Costs a forward
    pass of either. Empty without windows, and where several processes run, of which the first one alone has the folder.

    The sum of the predictions that a plan is chosen by is no such number: every cut counts by itself there, on the text that
    chose it (docs/tables/real.md).
    """
    if not len(windows) or lanes.count() > 1:
        return {}
    with measure.phase("loss"):
        writer.index()
        dense, source = measure.stream.part(windows), open_folder(writer.partial)
        small = Stream(source, windows, device=str(dense.device), dtype=dense.dtype, limits=dense.limits)
        small.products = dense.products
        found = []
        for n, stream in enumerate((dense, small)):
            found.append(window_losses(stream, stream.outputs()))
            if measure.progress:
                measure.progress("loss", n + 1, 2)
    (before, tokens), (after, _) = found
    lost, total, n = after - before, tokens.sum(), len(windows)
    nats = lost.sum() / total
    spread = (lost - nats * tokens).square().sum().mul(n / (n - 1)).sqrt() / total if n > 1 else None
    return {
        "nats": float(nats),
        "stderr": None if spread is None else float(spread),
        "dense": float(before.sum() / total),
        "windows": n,
        "tokens": int(total),
    }
