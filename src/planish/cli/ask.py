"""planish ask"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import session


@o.asks(*o.COMPUTE)
def ask(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="chat model: Hugging Face folder, GGUF file or hub id", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl file to write", show_default=False)],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="five of nine questions are about it: builtin, wikitext2, c4, a .txt, .jsonl or .parquet",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="of questions and answers, at least")] = 1 << 14,
    new_tokens: Annotated[int, typer.Option(min=1, help="of an answer, at most")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of questions and answers")] = 0,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Let a chat model answer questions, and write the conversations: calibration text with which its answers stay."""
    with session(as_json) as run:
        found = run.api.ask(
            model, output, text=text, tokens=tokens, new_tokens=new_tokens, seed=seed, overwrite=overwrite,
            progress=run.progress, **options,
        )  # fmt: skip
        mixed = f"TEXT:0.7,{found.output}:0.3"
        run.give(
            asdict(found),
            f"[bold]{escape(found.output)}[/] · {found.conversations} conversations, {found.tokens:,} tokens",
            f"next: planish compress {escape(shlex.quote(model))} --calibration {escape(shlex.quote(mixed))} -o OUT",
        )
