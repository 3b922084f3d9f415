"""planish eval"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import session


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="Hugging Face or compressed folder, or hub id", show_default=False)
    ],
    text: Annotated[str, typer.Option("--text", metavar="SOURCE", help=o.SOURCE_HELP)] = "builtin",
    seq_len: o.LengthOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows at a time")] = 1,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="stop after so many  [default: all]", show_default=False)
    ] = None,
    device: o.DeviceOption = o.Device.auto,
    dtype: o.DTypeOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Measure perplexity: non-overlapping windows, the tail dropped, as the papers do."""
    with session(as_json) as run:
        found = run.api.evaluate(
            model,
            text,
            seq_len,
            device=device.value,
            dtype=dtype and dtype.value,
            batch_size=batch_size,
            max_windows=max_windows,
            progress=lambda done, total: run.progress("windows", done, total),
        )
        bos = "begins with BOS" if found.bos else "no BOS"
        run.give(
            asdict(found),
            f"perplexity [bold]{found.perplexity:.4f}[/] · {found.nll:.5f} nats per token",
            f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len} · {found.source} ({bos}) · {found.dtype}",
        )
