"""planish sweep, planish report"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from planish.cli import options as o
from planish.cli.run import format_seconds, make_table, say, session
from planish.errors import InputError
from planish.request import label

if TYPE_CHECKING:
    from planish.evaluate.report.points import Point


@o.asks(
    "methods", "keeps", "kv_keeps", "flops_keeps", "sizes", *o.TEXT, "eval_text", "eval_tokens", *o.COMPUTE, "round_to", "target",
    "keep_models", "bench", "cache", "overwrite",
)  # fmt: skip
def sweep(
    model: o.ModelArgument,
    output: o.OutputOption,
    *,
    cache: o.CacheOption = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin the output folder's sweep anew")] = False,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Compress MODEL by every method at every keep, or to every size, from one calibration: results.csv and report.html.

    Of two lists of budgets every pair holds together. Run again to go on after an interruption; finished points are not repeated.
    """
    options["methods"] = [m for m in options["methods"].split(",") if m.strip()]
    for name in ("keeps", "kv_keeps", "flops_keeps"):
        options[name] = parse_shares(label(name).removesuffix("s"), options[name])
    options["sizes"] = [s for s in (options["sizes"] or "").split(",") if s.strip()]
    with session(as_json) as run:
        run.api  # noqa: B018  (silences transformers)
        from planish.sweep import sweep as run_sweep

        found = run_sweep(
            model, output=output, cache=cache, overwrite=overwrite,
            progress=lambda what, done, total: run.progress("points", done, total), **options,
        )  # fmt: skip
        for warning in found.warnings:
            say(f"note: {warning}")
        finished = f" ({found.skipped} points were there already)" if found.skipped else ""
        run.give(
            found.as_dict(),
            make_points(found.points),
            f"{format_seconds(found.seconds)}{finished} · "
            + escape(f"{output / 'results.csv'} · {output / 'report.html'}"),
        )


def make_points(points: Sequence[Point]) -> Table:
    """A row per point; what failed is said on stderr too."""
    sizes = any(p.curve for p in points)
    more = ("bits", "bytes", "KL to dense") if sizes else ()
    table = make_table("method", "keep", *more, "parameters", "perplexity", "KV bytes/token", "seconds")
    for p in points:
        if p.error:
            table.add_row(p.label, p.asked_text, *[""] * len(more), "", "", "failed", "", style="dim")
            say(f"failed: {p.label} at {p.asked_text}: {p.error}")
            continue
        seconds = f"{p.seconds:.1f}" if p.seconds == p.seconds else ""
        own = (p.bits, f"{p.bytes:,}", f"{p.kl:.4f}" if p.kl == p.kl else "") if sizes else ()
        cells = (f"{p.keep:.4f}", *own, f"{p.params:,}", f"{p.perplexity:,.3f}", f"{p.kv_bytes_per_token:,}", seconds)
        table.add_row(p.label, *cells)
    return table


def parse_shares(name: str, text: str | None) -> list[float]:
    """ "0.9,0.8" → [0.9, 0.8]; nothing → []."""
    if text is None:
        return []
    try:
        found = [float(k) for k in text.split(",") if k.strip()]
    except ValueError:
        raise InputError(f"--{name} {text}: expected numbers separated by commas, such as 0.9,0.8") from None
    if not found:
        raise InputError(f"--{name} needs at least one number")
    return found


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="of a sweep, or one compressed folder", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file", show_default="OUT/report.html")] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Write report.html again from results.csv and the points' planish.json; or one for a compressed folder."""
    with session(as_json) as run:
        from planish.evaluate.report.page import write_report

        path = write_report(folder, output)
        run.give({"report": str(path)}, escape(str(path)))
