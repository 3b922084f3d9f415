"""planish demo"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.evaluate import show_answers
from planish.cli.run import format_bytes, format_seconds, make_table, session
from planish.errors import InputError

if TYPE_CHECKING:
    from planish.cli.showcase import Demo


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for chart, table and model")] = Path(
        "planish-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="keep 0.6 alone, less text")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="another folder than the embedded model; smollm2 or a .gguf file: a chat model, compressed once",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[float, typer.Option(help="seconds after which the rest is skipped")] = 165,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="chat models: text to compress with", show_default="its own answers, Python source"
        ),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="chat models: text to measure on", show_default="Python's reference manual"
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="chat models: share of the blocks' weights that stays", show_default="0.9"),
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Compress the embedded model by every method, offline: a table, a chart, and code completed side by side.

    With --model smollm2 a real chat model: both models' answers, perplexity, KL, speed here and in llama.cpp, file sizes.
    """
    if model is not None and (model == "smollm2" or model.endswith(".gguf")):
        return show_chat(output, model, as_json, calibration=calibration, eval_text=eval_text, keep=keep, quick=quick)
    with session(as_json) as run:
        if calibration or eval_text or keep:
            raise InputError("--calibration, --eval-text and --keep go with --model smollm2, or with a .gguf file")
        run.api  # noqa: B018  (silences transformers)
        from planish.cli.showcase import run_demo

        run.time.ends = time.monotonic() + limit
        found = run_demo(
            output,
            model=None if model is None else Path(model),
            quick=quick,
            limit=limit,
            progress=lambda what, done, total: run.progress("runs", done, total),
        )
        run.give(
            found.as_dict(),
            *make_views(found),
            f"wrote {escape(', '.join(found.files))} · {format_seconds(found.seconds)}",
        )


def show_chat(output: Path, model: str, as_json: bool, **options: Any) -> None:
    """The demo of a chat model."""
    with session(as_json) as run:
        run.api  # noqa: B018  (silences transformers)
        from planish.cli.chat import run_chat

        found = run_chat(output, model, progress=run.progress, **options)
        q, agreed = found.quality, found.quality.agreement
        rates = make_table("program", "model", "type", "size", "prefill tok/s", "decode tok/s")
        for r in found.rates:
            speeds = (f"{r.prefill_tokens_per_s:,.0f}", f"{r.decode_tokens_per_s:,.1f}")
            rates.add_row(r.where, r.model, r.type, format_bytes(r.bytes), *speeds)
        run.give(
            found.as_dict(),
            f"{escape(found.model)}: {found.method}, keep {found.result.keep:.3f}",
            f"perplexity {q.dense.perplexity:.2f} → [bold]{q.model.perplexity:.2f}[/] on {q.model.tokens:,} tokens of "
            f"{escape(found.evaluation)} · KL {agreed.kl:.3f} · the same likeliest token at {agreed.top1:.1%}",
            *show_answers(found.answers),
            rates,
            f"wrote {escape(', '.join(found.files))} · {format_seconds(found.seconds)} "
            f"({format_seconds(found.cpu_seconds)} of processor time)",
        )


def make_views(found: Demo) -> list[Any]:
    """The table and the completions."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    from planish.cli.showcase import group_skipped

    table = make_table("method", *(f"keep {k:g}" for k in found.keeps), "KV bytes/token", "seconds")
    dense = [f"{found.dense.perplexity:,.2f}"] * len(found.keeps)
    table.add_row("dense", *dense, f"{found.dense.kv_bytes_per_token:,}", "", end_section=True)
    for line in found.lines:
        cells = [f"{r.perplexity:,.2f}" if r else "–" for r in line.rows]
        table.add_row(line.method, *cells, f"{line.smallest.kv_bytes_per_token:,}", f"{line.seconds:.1f}")
    panels = [
        Panel(Text.assemble((found.prompt, "dim"), (text, "bold")), title=name, title_align="left", width=58)
        for name, text in found.completions.items()
    ]
    skipped = [
        Text(f"skipped, {reason}: {', '.join(names)}", style="dim")
        for reason, names in group_skipped(found.rows).items()
    ]
    skipped.append(
        Text(
            "perplexity by keep, lower is better · KV bytes of the smallest model · seconds of compressing", style="dim"
        )
    )
    return [table, *skipped, Columns(panels)]
