"""planish plan"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

import typer
from rich.table import Table

from planish.cli import options as o
from planish.cli.run import compare_sizes, format_bytes, format_seconds, make_table, say, session, show_untouched


@o.asks(*o.BUDGETS, "sparsity", "method", *o.TEXT, *o.COMPUTE, "round_to", "target", "bits", "head_bits", "fit", "settings",
        "adapter")  # fmt: skip
def plan(
    model: o.ModelArgument,
    *,
    sparsity: o.SparsityOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="find ranks that depend on the text, as compress would: may take long")
    ] = False,
    cache: o.CacheOption = True,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Say what compressing would give and take, from shapes; no model is changed or written."""
    options["settings"] = o.parse_settings(options["settings"], sparsity, options)
    with session(as_json) as run:
        found = run.api.forecast(model, measure=measure, cache=cache, progress=run.progress, **options)
        for warning in found.warnings:
            say(f"note: {warning}")
        if isinstance(found, run.api.SizeForecast):
            return run.give(found.as_dict(), *show_sizes(found))
        asked = o.tell_asked(options, sparsity)
        run.give(
            found.as_dict(),
            f"[bold]{found.method}[/] · keep {found.keep:.4f} (asked {asked}) · {tell_ranks(found)} · nothing is written",
            make_ranks(found.units, found.blocks, "" if found.measured else "~"),
            *tell_measuring(found),
            compare_sizes(found),
            *tell_types(found.rounding),
            *show_untouched(found),
            *make_losses(found),
            *o.show_latency(found),
            f"compressing on {found.n_samples} × {found.seq_len} tokens takes about {format_seconds(found.seconds)}"
            + (
                " on this machine's CPU, for it has no such device: one takes a small part of that"
                if found.elsewhere
                else ""
            )
            + f", {format_bytes(found.peak_ram_bytes)} of memory"
            + (f", {format_bytes(found.peak_vram_bytes)} on the device" if found.peak_vram_bytes else "")
            + f" and {format_bytes(found.disk_bytes)} of disk",
            f"[dim]time: {found.how['seconds']}\nmemory: {found.how['peak_ram']}\nFLOPs: {found.how['flops']}[/]",
        )


def show_sizes(found: Any) -> list[Any]:
    """What competes for a size, and what every type would take."""
    room = f", of {found.fit:,} bytes" if found.fit else ""
    lines = [f"[bold]{found.size:,} bytes[/] for weights{room} · --target {found.target} · nothing is written"]
    if found.fit:
        cache, running = format_bytes(found.cache), format_bytes(found.running)
        lines.append(f"16-bit KV cache of {found.context} tokens {cache}, what running takes beside it {running}")
        lines += [f"tokenizer and other metadata of the file {format_bytes(found.file)}"] if found.file else []
    plans = make_table("plans that would compete", "weights kept", "embedding, head", "bytes, about")
    for c in found.plans:
        plans.add_row(
            f"{c['bits']} bits", f"{c['keep']:.1%}", f"{c['head']} bits" if c["head"] else "", f"{c['bytes']:,}"
        )
    more = f"the best of them is made again with embedding and head in {' and in '.join(found.heads)} bits"
    types = make_table("all weights", "matrices of the blocks", "bytes, about")
    for t in found.types:
        what = f"{t['bits']} bits" if t["rounded"] else "not rounded"
        types.add_row(what, name_types(t["rounded"]), f"{t['bytes']:,}")
    device = f", {format_bytes(found.peak_vram_bytes)} on the device" if found.peak_vram_bytes else ""
    return [
        *lines,
        plans,
        *([more] if found.heads else []),
        types,
        f"the plan that takes most needs about {format_bytes(found.peak_ram_bytes)} of memory{device}",
    ]


def name_types(types: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in types.items())


def tell_types(rounding: dict[str, Any]) -> list[str]:
    """A line about what is rounded to what."""
    if not rounding:
        return []
    head = f"; embedding and head {rounding['head']}" if rounding["head"] else "; embedding and head in 16 bits"
    return [f"rounded: {name_types(rounding['types']) or 'a type for every matrix, by what it costs'}{head}"]


def tell_ranks(found: Any) -> str:
    if not found.measured:
        return "ranks as expected, not measured"
    return "ranks from calibration statistics" if found.needed_statistics else "ranks from shapes alone"


def tell_measuring(found: Any) -> list[str]:
    """What is not known before the text is read."""
    if found.measured:
        return []
    names = ", ".join(dict.fromkeys(u["unit"] for u in found.units))
    planning = sum(p["seconds"] for p in found.phases if p["name"] not in ("blocks", "loss"))
    return [
        f"{found.method} chooses the ranks of {names} by what it measures on the calibration text: those shown (~), the cache, "
        f"FLOPs, memory and time are what to expect; `planish plan --measure` finds them, in about {format_seconds(planning)}"
    ]


def make_ranks(units: list[dict[str, Any]], blocks: list[dict[str, Any]], sign: str = "") -> Table:
    """One row per block: every unit's rank (with a sign in front) of its full rank, and the weights that stay."""
    names = list(dict.fromkeys(u["unit"] for u in units))
    table = make_table("block", *names, "weights", "kept")
    for each, (block, rows) in zip(blocks, groupby(units, key=lambda u: u["block"]), strict=True):
        found = {u["unit"]: u for u in rows}
        cells = [f"{sign}{found[n]['rank']}/{found[n]['full']}" if n in found else "" for n in names]
        table.add_row(str(block), *cells, f"{each['after']:,}", f"{each['after'] / each['before']:.1%}")
    return table


def make_losses(found: Any) -> list[Any]:
    """What the target asks for, and the predicted loss with and without that, where it is known."""
    parts: list[Any] = [f"for {found.target}: {line}" for line in found.limits]
    if not found.predicted:
        return parts
    unit = "nats per token" if found.nats else "squared error of the units' outputs"
    columns = [found.predicted] + ([found.predicted_any] if found.predicted_any else [])
    table = make_table(f"predicted loss, {unit}", *([f"for {found.target}", "without its limits"][: len(columns)]))
    for name in sorted({n for c in columns for n in c}):
        table.add_row(name, *(f"{c.get(name, 0.0):.4g}" for c in columns))
    if found.nats:
        table.add_row("sum", *(f"{sum(c.values()):.4g}" for c in columns))
    return [*parts, table]
