"""planish eora"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from planish.cli import options as o
from planish.cli.run import format_bytes, session
from planish.request import UNPRICED


class Quantiser(StrEnum):
    round = "round"
    torchao = "torchao"


@o.asks("calibration", *UNPRICED, *o.COMPUTE)
def eora(
    folder: o.FolderArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the adapter", show_default=False)],
    bits: Annotated[int, typer.Option(help="of the integer weights: 4 or 8")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="of the adapter (each linear's own size at most)")] = 32,
    quantiser: Annotated[
        Quantiser, typer.Option(help="who rounds: torchao, or plain rounding to the nearest (no library)")
    ] = Quantiser.round,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an adapter that is there")] = False,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Write a LoRA adapter that compensates integer weights (EoRA): closed form, nothing is trained; PEFT loads it."""
    with session(as_json) as run:
        found = run.api.eora(
            folder, output, bits=bits, rank=rank, quantiser=quantiser.value, overwrite=overwrite, progress=run.progress,
            **options,
        )  # fmt: skip
        run.give(
            found.as_dict(),
            f"[bold]{found.output}[/] · {found.linears} linears at {found.bits} bits, rank {found.rank}",
            f"output energy lost by rounding, mean over linears: {found.error_before:.2e} → {found.error_after:.2e}",
            f"integer weights and scales {format_bytes(found.weight_bytes)}, adapter {format_bytes(found.adapter_bytes)}",
            f"next: PeftModel.from_pretrained(quantised model, {found.output})",
        )
