"""planish demo"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import format_seconds, make_table, session

if TYPE_CHECKING:
    from planish.cli.showcase import Demo


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for chart, table and model")] = Path(
        "planish-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="keep 0.8 alone, less text")] = False,
    model: Annotated[
        Path | None, typer.Option(help="another folder than the embedded model", show_default=False)
    ] = None,
    limit: Annotated[float, typer.Option(help="seconds after which the rest is skipped")] = 165,
    as_json: o.JsonOption = False,
) -> None:
    """Compress the embedded model by every method, offline: a table, a chart, and code completed side by side."""
    with session(as_json) as run:
        run.api  # noqa: B018  (silences transformers)
        from planish.cli.showcase import run_demo

        found = run_demo(
            output,
            model=model,
            quick=quick,
            limit=limit,
            progress=lambda what, done, total: run.progress("runs", done, total),
        )
        run.give(
            found.as_dict(),
            *make_views(found),
            f"wrote {escape(', '.join(found.files))} · {format_seconds(found.seconds)}",
        )


def make_views(found: Demo) -> list[Any]:
    """The table and the completions."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    from planish.cli.showcase import group_skipped

    table = make_table("method", "keep", "parameters", "perplexity", "seconds", "KV bytes/token")
    last = None
    for row in [found.dense, *found.rows]:
        if last is not None and row.keep_requested != last:
            table.add_section()
        last = row.keep_requested
        if row.skipped:
            continue
        table.add_row(
            row.method,
            f"{row.keep:.3f}",
            f"{row.parameters:,}",
            f"{row.perplexity:,.2f}",
            f"{row.seconds:.1f}" if row.seconds else "",
            f"{row.kv_bytes_per_token:,}",
        )
    panels = [
        Panel(Text.assemble((found.prompt, "dim"), (text, "bold")), title=name, title_align="left", width=58)
        for name, text in found.completions.items()
    ]
    skipped = [
        Text(f"skipped, {reason}: {', '.join(names)}", style="dim")
        for reason, names in group_skipped(found.rows).items()
    ]
    skipped.append(
        Text("seconds: compressing alone; what all keeps share is measured in the first round, 0.8", style="dim")
    )
    return [table, *skipped, Columns(panels)]
