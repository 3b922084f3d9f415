"""planish bench"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from planish.cli import options as o
from planish.cli.run import format_bytes, make_table, session

if TYPE_CHECKING:
    from planish.evaluate.speed import Speed


@o.asks(*o.COMPUTE)
def bench(
    folder: o.FolderArgument,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="measure this one in turns with it", show_default=False)
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="repeatable", show_default="1 and 8")] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="tokens of the prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to decode")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="measured runs; the median is shown")] = 5,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="decode steps as one graph over a static cache (minutes to make on a CPU), or as they are",
        ),
    ] = True,
    *,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Measure prefill and decode tokens per second, time to first token, memory and KV bytes.

    Decode steps are compiled, as they are for serving; what cannot be is measured as it is, and says so.
    """
    with session(as_json) as run:
        place = run.api.find_device(options["device"])
        kind = run.api.find_dtype(options["dtype"])
        if kind is None and place == "cpu":
            kind = run.api.find_dtype("float32")
        from planish.evaluate.speed import bench as measure

        models = {
            name: run.api.load(name, **({"dtype": kind} if kind else {})) for name in filter(None, (against, folder))
        }
        rows = measure(
            models,
            batch_sizes=batch_size or (1, 8),
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            repeats=repeats,
            device=place,
            compile=compiled,
            progress=lambda done, total: run.progress("runs", done, total),
        )
        run.give(
            {"runs": [asdict(r) for r in rows]},
            make_speeds(rows, against),
            "median (lowest–highest); models run in turns",
            *describe_compiling(rows),
        )


def describe_compiling(rows: Sequence[Speed]) -> list[str]:
    """How long each model took, or why it was measured as it is."""
    found = [f"{r.model}, batch {r.batch_size}: {r.note}; measured uncompiled" for r in rows if r.note]
    return [*found, *(f"{r.model}, batch {r.batch_size}: compiled in {r.compile_s:.1f} s" for r in rows if r.compile_s)]


def make_speeds(rows: Sequence[Speed], against: str | None) -> Table:
    """A row per model and batch size; rates also as multiples of the dense model's."""
    columns = ("batch", "prefill tok/s", "decode tok/s", "first token", "weights", "KV cache", "peak")
    table = make_table("model", *columns)
    dense = {r.batch_size: r for r in rows if r.model == against}
    short = {r.model: Path(r.model).resolve().name for r in rows}
    short = short if len(set(short.values())) == len(short) else {name: name for name in short}

    def rate(r: Speed, name: str) -> str:
        s, base = getattr(r, name), dense.get(r.batch_size)
        times = f" ×{s.median / getattr(base, name).median:.2f}" if base and r.model != against else ""
        return f"{s.median:,.0f} ({s.low:,.0f}–{s.high:,.0f}){times}"

    for r in rows:
        rates = [rate(r, name) for name in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        first = f"{r.time_to_first_token_s.median * 1000:.1f} ms"
        sizes = [format_bytes(n) for n in (r.weight_bytes, r.kv_bytes, r.peak_bytes)]
        table.add_row(escape(short[r.model]), str(r.batch_size), *rates, first, *sizes)
    return table
