"""planish sweep, planish report"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import format_seconds, make_table, say, session
from planish.errors import InputError
from planish.request import SOURCE_HELP


class KeepModels(StrEnum):
    best = "best"
    all = "all"
    none = "none"


@o.asks(
    *o.TEXT, "eval_text", "eval_tokens", *o.COMPUTE, "round_to", "keep_models", "bench", "cache", "overwrite",
)  # fmt: skip
def sweep(
    model: o.ModelArgument,
    output: o.OutputOption,
    methods: Annotated[
        str, typer.Option(metavar="NAME,…", help="methods, with settings as in auto:anchor=0", show_default=False)
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,…",
            help="shares of the blocks' weights that stay  [default: 0.9,0.8,0.7 where no other is given]",
            show_default=False,
        ),
    ] = None,
    kv_keep: Annotated[
        str | None, typer.Option(metavar="SHARE,…", help="shares of the KV cache that stay", show_default=False)
    ] = None,
    flops_keep: Annotated[
        str | None, typer.Option(metavar="SHARE,…", help="shares of the blocks' FLOPs that stay", show_default=False)
    ] = None,
    *,
    eval_text: Annotated[str, typer.Option("--eval-text", metavar="SOURCE", help=SOURCE_HELP)] = "builtin",
    eval_tokens: Annotated[
        int | None, typer.Option(min=2, help="measure on so many tokens", show_default="all")
    ] = None,
    keep_models: Annotated[
        KeepModels, typer.Option(help="whose weights stay on disk; best: of the best method at every keep")
    ] = KeepModels.best,
    bench: Annotated[bool, typer.Option("--bench", help="measure tokens per second too")] = False,
    cache: o.CacheOption = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="begin anew")] = False,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Compress MODEL by every method at every keep from one calibration: results.csv and report.html.

    Of two lists of budgets every pair holds together. Run again to go on after an interruption; finished points are not repeated.
    """
    keeps, kv_keeps, flops_keeps = (
        parse_shares(n, v) for n, v in (("keep", keep), ("kv-keep", kv_keep), ("flops-keep", flops_keep))
    )
    with session(as_json) as run:
        run.api  # noqa: B018  (silences transformers)
        from planish.sweep import sweep as run_sweep

        found = run_sweep(
            model,
            methods=[m for m in methods.split(",") if m.strip()],
            keeps=keeps,
            kv_keeps=kv_keeps,
            flops_keeps=flops_keeps,
            output=output,
            eval_text=eval_text,
            eval_tokens=eval_tokens,
            keep_models=keep_models.value,
            bench=bench,
            cache=cache,
            overwrite=overwrite,
            **options,
            progress=lambda what, done, total: run.progress("points", done, total),
        )
        for warning in found.warnings:
            say(f"note: {warning}")
        table = make_table("method", "keep", "parameters", "perplexity", "KV bytes/token", "seconds")
        for p in found.points:
            if p.error:
                table.add_row(p.label, p.asked_text, "", "", "failed", "", style="dim")
                say(f"failed: {p.label} at {p.asked_text}: {p.error}")
                continue
            table.add_row(
                p.label,
                f"{p.keep:.4f}",
                f"{p.params:,}",
                f"{p.perplexity:,.3f}",
                f"{p.kv_bytes_per_token:,}",
                f"{p.seconds:.1f}" if p.seconds == p.seconds else "",
            )
        finished = f" ({found.skipped} points were there already)" if found.skipped else ""
        run.give(
            found.as_dict(),
            table,
            f"{format_seconds(found.seconds)}{finished} · "
            + escape(f"{output / 'results.csv'} · {output / 'report.html'}"),
        )


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
