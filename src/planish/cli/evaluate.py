"""planish eval"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from planish.cli import options as o
from planish.cli.run import Session, give_or_take, make_table, session
from planish.errors import InputError
from planish.request import SOURCE_HELP


@o.asks("text", "seq_len", "bos", "batch_size", "max_windows", "tasks", "against", "generate", "limit", *o.COMPUTE)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Hugging Face or compressed folder, GGUF file or hub id", show_default=False
        ),
    ],
    *,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="SOURCE", help=SOURCE_HELP, show_default="32,768 tokens from all over builtin"),
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
        str | None,
        typer.Option(metavar="DENSE", help="measure this model beside it, and how far they agree", show_default=False),
    ] = None,
    generate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="instead of --text: what both models write to prompts (a .txt, or a .jsonl with prompt or messages)",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="with --tasks: only so many examples", show_default=False)
    ] = None,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Measure perplexity (non-overlapping windows, the tail dropped, as the papers do), or zero-shot accuracy."""
    with session(as_json) as run:
        chosen = [n for n, v in (("text", text), ("tasks", tasks), ("generate", generate)) if v]
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} are two measurements: run planish eval twice")
        if not tasks and limit is not None:
            raise InputError("--limit goes with --tasks; --max-windows limits a text")
        if generate is not None and against is None:
            raise InputError("--generate shows answers side by side: give the dense model as --against")
        if tasks:
            names = [t for group in tasks for t in group.split(",") if t]
            measure_tasks(run, model, against, names, limit, options)
        elif generate is not None:
            answers = run.api.answer_both(model, against, generate, device=options["device"], dtype=options["dtype"])
            run.give({"answers": [asdict(a) for a in answers]}, *show_answers(answers))
        else:
            options |= {"batch_size": batch_size, "max_windows": max_windows, "cache": True}
            measure_text(run, model, against, text, options)


def measure_tasks(
    run: Session, model: str, against: str | None, names: list[str], limit: int | None, options: dict[str, Any]
) -> None:
    """Accuracies of one model, or of two and the share of answers that differ."""
    from planish.evaluate.tasks import count_flips

    place = {n: options[n] for n in ("device", "dtype")}
    found = {
        m: run.api.evaluate_tasks(m, names, limit=limit, progress=run.progress, **place)
        for m in filter(None, (against, model))
    }
    flips = [count_flips(*pair) for pair in zip(*found.values())] if len(found) == 2 else []
    data: dict[str, Any] = {"tasks": {m: [s.as_dict() for s in scores] for m, scores in found.items()}}
    if flips:
        data["flips"] = {s.task: f for s, f in zip(found[model], flips, strict=True)}
    run.give(data, make_scores(found, flips))


def measure_text(run: Session, model: str, against: str | None, text: str | None, options: dict[str, Any]) -> None:
    """Perplexity, beside the dense model's where there is one, and how far their predictions agree."""
    data, beside = {}, []
    if against is None:
        watch = lambda done, total: run.progress("windows", done, total)  # noqa: E731
        found = run.api.evaluate(model, text, progress=watch, **options)
    else:
        both = run.api.compare(model, against, text, progress=run.progress, **options)
        found, a = both.model, both.agreement
        data = {"against": asdict(both.dense), "agreement": asdict(a)}
        beside = [
            f"{escape(against)}: perplexity {both.dense.perplexity:.4f} · {found.nll - both.dense.nll:+.5f} nats per token",
            f"KL to its predictions {a.kl:.5f}{give_or_take(a.kl_stderr, 5)} nats per token · 99 % of tokens below {a.kl_99:.4f}, "
            f"99.9 % below {a.kl_999:.4f}",
            f"the same likeliest token at {100 * a.top1:.2f} ± {100 * a.top1_stderr:.2f} % of {a.tokens:,} tokens",
        ]
    bos = {"every": "BOS in every window", "once": "begins with BOS", "never": "no BOS"}[found.begins]
    run.give(
        asdict(found) | data,
        f"perplexity [bold]{found.perplexity:.4f}[/] · {found.nll:.5f} nats per token",
        *beside,
        f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len} · "
        f"{escape(found.source)} ({bos}) · {found.dtype}",
        *["these windows are evenly spaced; --text builtin measures all of it"][: found.thinned],
    )


def show_answers(answers: list[Any]) -> list[str]:
    """Every prompt with both answers."""
    lines = []
    for a in answers:
        lines += [
            f"[bold]{escape(a.prompt)}[/]",
            f"  dense  {escape(a.dense.strip())}",
            f"  model  {escape(a.model.strip())}",
        ]
    shares = [(a.repeated_dense, a.repeated) for a in answers]
    dense, own = (sum(x) / len(shares) for x in zip(*shares))
    return [*lines, f"repeated 4-grams: dense {dense:.1%}, model {own:.1%}"]


def make_scores(found: dict[str, list[Any]], flips: Sequence[tuple[float, float] | None] = ()) -> Table:
    """A row per task and model: accuracies in percent with standard errors; `flips`: of a task's last model, answers that are
    not the first one's."""
    table = make_table("task", "model", "examples", "acc", "acc_norm", *(["flips"] if flips else []))

    def percent(value: float | None, error: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}{give_or_take(error and 100 * error, 2)}"

    for n, rows in enumerate(zip(*found.values(), strict=True)):
        for name, s in zip(found, rows, strict=True):
            cells = [percent(s.acc, s.acc_stderr), percent(s.acc_norm, s.acc_norm_stderr)]
            if flips:
                cells.append(percent(*(flips[n] or (None, None))) if s is rows[-1] else "")
            table.add_row(escape(s.task), escape(name), f"{s.examples:,}", *cells)
    return table
