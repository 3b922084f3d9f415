"""planish resume"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import session


def resume(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="the folder that the interrupted command was to write")],
    as_json: o.JsonOption = False,
) -> None:
    """Finish an interrupted compress: the same weights as without the interruption."""
    with session(as_json) as run:
        from planish.compression import resume as finish

        result = finish(output, run.progress)
        run.note(result.warnings)
        run.give(result.as_dict(), f"[bold]{result.method}[/] · keep {result.keep:.4f} · {result.output}")
