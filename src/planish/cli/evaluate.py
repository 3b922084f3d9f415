"""planish eval"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from planish.cli import options as o
from planish.cli.run import make_table, session
from planish.errors import InputError
from planish.request import SOURCE_HELP


@o.asks("text", "seq_len", "bos", "batch_size", "max_windows", "tasks", "against", "limit", *o.COMPUTE)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Hugging Face or compressed folder, GGUF file or hub id", show_default=False
        ),
    ],
    *,
    text: Annotated[
        str | None, typer.Option("--text", metavar="SOURCE", help=SOURCE_HELP, show_default="builtin")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows at a time")] = 1,
    max_windows: Annotated[int | None, typer.Option(min=1, help="stop after so many", show_default="all")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE_OR_NAME",
            help="instead of --text: zero-shot accuracy on a .jsonl file or a task of lm_eval (repeatable, or a,b)",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="measure this model beside it", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="with --tasks: only so many examples", show_default=False)
    ] = None,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Measure perplexity (non-overlapping windows, the tail dropped, as the papers do), or zero-shot accuracy."""
    with session(as_json) as run:
        if tasks and text is not None:
            raise InputError("--text and --tasks are two measurements: run planish eval twice")
        if not tasks and limit is not None:
            raise InputError("--limit goes with --tasks; --max-windows limits a text")
        if tasks:
            names = [t for group in tasks for t in group.split(",") if t]
            found = {
                m: run.api.evaluate_tasks(
                    m, names, limit=limit, device=options["device"], dtype=options["dtype"], progress=run.progress
                )
                for m in filter(None, (against, model))
            }
            run.give({"tasks": {m: [asdict(s) for s in scores] for m, scores in found.items()}}, make_scores(found))
            return
        found, *dense = (
            run.api.evaluate(
                m,
                text or "builtin",
                **options,
                batch_size=batch_size,
                max_windows=max_windows,
                cache=True,
                progress=lambda done, total: run.progress("windows", done, total),
            )
            for m in filter(None, (model, against))
        )
        bos = {"every": "BOS in every window", "once": "begins with BOS", "never": "no BOS"}[found.begins]
        beside = []
        for other in dense:
            if (other.tokens, other.seq_len) != (found.tokens, found.seq_len):
                raise InputError(f"{against} splits the text otherwise: give --seq-len, and models of one tokenizer")
            beside = [
                f"{escape(str(against))}: perplexity {other.perplexity:.4f} · {found.nll - other.nll:+.5f} nats per token"
            ]
        run.give(
            asdict(found) | ({"against": asdict(dense[0])} if dense else {}),
            f"perplexity [bold]{found.perplexity:.4f}[/] · {found.nll:.5f} nats per token",
            *beside,
            f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len} · "
            f"{escape(found.source)} ({bos}) · {found.dtype}",
        )


def make_scores(found: dict[str, list[Any]]) -> Table:
    """A row per task and model: accuracies in percent with standard errors."""
    table = make_table("task", "model", "examples", "acc", "acc_norm")

    def percent(value: float | None, error: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f} ± {100 * (error or 0):.2f}"

    for rows in zip(*found.values(), strict=True):
        for name, s in zip(found, rows, strict=True):
            accs = percent(s.acc, s.acc_stderr), percent(s.acc_norm, s.acc_norm_stderr)
            table.add_row(escape(s.task), escape(name), f"{s.examples:,}", *accs)
    return table
