"""planish compress"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import (
    compare_sizes,
    format_bytes,
    format_seconds,
    give_or_take,
    make_table,
    say,
    session,
    show_untouched,
)


@o.asks(
    *o.BUDGETS,
    "sparsity",
    "method",
    *o.TEXT,
    *o.COMPUTE,
    "round_to",
    "target",
    "bits",
    "head_bits",
    "fit",
    "ladder",
    "settings",
    "adapter",
    "overwrite",
    "cache",
)
def compress(
    command: typer.Context,
    model: o.ModelArgument,
    output: o.OutputOption,
    *,
    sparsity: o.SparsityOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=o.OVERWRITE)] = False,
    cache: o.CacheOption = True,
    as_json: o.JsonOption = False,
    **options: Any,
) -> None:
    """Make a smaller model from MODEL (or as a recipe, a .yaml file, says) and write it to a folder."""
    options["settings"] = o.parse_settings(options["settings"], sparsity, options)
    with session(as_json) as run:
        from planish import lanes

        if model.endswith((".yaml", ".yml")):
            given = {n for n in options if str(command.get_parameter_source(n)).endswith("COMMANDLINE")}
            model, options = read_request(Path(model), options, given, run.api.default_method())
        asked = o.tell_asked(options, sparsity)
        try:
            result = run.api.compress(
                model, output=output, overwrite=overwrite, cache=cache, progress=run.progress, begin=run.begin,
                **options,
            )  # fmt: skip
        except (KeyboardInterrupt, lanes.ProcessLost):
            if output.with_name(output.name + ".partial").exists():
                say(f"to go on from here: planish resume {output}")
            raise
        run.note(result.warnings)
        how = tell_loading(result)
        phases = ", ".join(f"{name} {format_seconds(s)}" for name, s in result.seconds.items() if name != "total")
        run.give(
            result.as_dict(),
            f"[bold]{result.method}[/] · keep {result.keep:.4f} (asked {asked}) · {escape(result.output)} ({how})",
            compare_sizes(result),
            *show_untouched(result),
            *o.show_removed(result),
            *show_choices(result),
            *show_ladder(result.ladder, competed=bool(result.choices)),
            *show_auto(result, options),
            *show_rounding(result),
            *show_loss(result.loss),
            *o.show_latency(result),
            f"{format_seconds(result.seconds['total'])} ({phases}) · peak memory {format_bytes(result.peak_rss_bytes)}",
            *find_stock(result),
            f"next: planish eval {escape(shlex.quote(result.output))} --text SOURCE",
        )


def read_request(
    path: Path, options: dict[str, Any], given: set[str], default_method: str
) -> tuple[str, dict[str, Any]]:
    """The model and the options of a recipe; those that were given on the command line go before the recipe's."""
    from planish.methods import find_class
    from planish.request import LIMITS, read_recipe

    recipe = read_recipe(path).arguments
    given |= set(LIMITS) if given & set(LIMITS) else set()  # other budgets replace the recipe's
    found = {n: options[n] if n in given else recipe[n] for n in options}
    method, own = (find_class(str(m or default_method))[0] for m in (found["method"], recipe["method"]))
    inherited = recipe["settings"] if method == own else {}  # another method has other settings
    return recipe["model"], found | {"settings": inherited | options["settings"]}


def show_choices(result: Any) -> list[str]:
    """Lines of plans that were compared for a size."""
    lines = []
    for c in result.choices:
        what = "all weights" if c["keep"] == 1 else f"keep {c['keep']:.4f}"
        found = c["error"] or (
            f"{format_bytes(c['bytes'])}, KL {c['kl']:.4f}" if c["bytes"] else "the finest that fits"
        )
        lines.append(f"{'→' if c['chosen'] else ' '} {tell_bits(c)}, {what}: {escape(found)}")
    return ["plans of this size, by their divergence on held-out windows:", *lines] if lines else []


LARGE = 0.2  # share of the bytes from which it is said how embedding and head can be smaller
VERDICTS = {
    "result": "the result is nearer to the dense model than every plain type of its size",
    "alike": "the result and {best} are alike within two standard errors",
    "plain": "plain rounding is nearer to the dense model: {best}",
    "same": "the result is plain rounding: {best}",
}


def show_ladder(ladder: dict[str, Any], competed: bool = False) -> list[Any]:
    """A table of what plain rounding of the dense model gives at the size of a result, and who won."""
    if not ladder:
        return []
    if ladder["why"]:
        return [f"plain rounding of this size was not measured: {escape(ladder['why'])}"]
    table = make_table("plain rounding of the dense model", "bytes", "KL, nats per token", "")
    best, result = None, ladder["result"]
    for r in ladder["rungs"]:
        if r["kl"] is None:
            table.add_row(tell_bits(r), "", "", escape(r["error"] or "not made"))
            continue
        fits = r["fits"]
        best = r if fits and (best is None or r["kl"] < best["kl"]) else best
        table.add_row(tell_bits(r), f"{r['bytes']:,}", tell_divergence(r), "" if fits else "larger than asked")
    what = f"{tell_bits(result)}, keep {result['keep']:.4f}"
    table.add_row(f"the result ({what})", f"{result['bytes']:,}", tell_divergence(result), "", style="bold")
    if best is None:
        return [table, "no plain type is of this size"]
    same = all(best[n] == result[n] for n in ("bits", "keep", "head"))
    name = f"{tell_bits(best)}, {format_bytes(best['bytes'])}, KL {best['kl']:.4f}"
    more = ": --bits auto lets both compete" if ladder["verdict"] == "plain" and not (same or competed) else ""
    line = VERDICTS["same" if same else ladder["verdict"]].format(best=name) + more
    return [table, f"{line} (measured on {ladder['windows']} windows held out from these plans)"]


def show_auto(result: Any, options: dict[str, Any]) -> list[str]:
    """A line for a cut in 16 bits to a size, where nothing was said of bits and the ladder does not say it already."""
    asked = options["max_bytes"] is not None and options["bits"] is None and options["target"] == "any"
    if not asked or result.keep == 1 or result.ladder.get("verdict") == "plain":
        return []
    return ["cut in 16 bits: --bits auto lets rounding compete for the size as well, and may do better"]


def tell_bits(plan: dict[str, Any]) -> str:
    return f"{plan['bits']} bits" + (f", embedding and head {plan['head']}" if plan["head"] else "")


def tell_divergence(plan: dict[str, Any]) -> str:
    return f"{plan['kl']:.4f}{give_or_take(plan['stderr'], 4)}"


def tell_loading(result: Any) -> str:
    if result.rounding.get("target") == "gguf":
        return "in blocks of llama.cpp, loads with `planish.load`"
    return "loads with plain transformers" if result.format == "native" else "loads after `import planish`"


def show_rounding(result: Any) -> list[str]:
    """Lines of a result whose weights are rounded: to what, and what that costs."""
    r = result.rounding
    if not r:
        return []
    types = ", ".join(f"{n} {kind}" for kind, n in r["types"].items())
    lines = [
        f"rounded: {types} · {r['bits_per_weight']:.2f} bits per weight · predicted loss {r['nats']:.4f} nats per token, "
        f"measured {r['measured']:z.4f} on {r['windows']} calibration windows"
    ]
    shown, heads = escape(shlex.quote(result.output)), r["heads"].values()
    share = sum(h["bytes"] for h in heads) / result.bytes_after
    kinds = ", ".join(dict.fromkeys(h["type"] for h in heads))
    more = (
        ""
        if r["target"] == "gguf" or share < LARGE
        else f"; --target gguf has types for {'both' if len(heads) > 1 else 'it'}{', --head-bits for the head' * (len(heads) > 1)}"
    )
    lines.append(f"embedding and head: {kinds}, {share:.0%} of the bytes{more}")
    return [*lines, *([f"for llama.cpp: planish export {shown} --to gguf -o FILE"] if r["target"] == "gguf" else [])]


def show_loss(loss: dict[str, Any]) -> list[str]:
    """A line of what the result loses on text that nothing was fitted to."""
    if not loss:
        return []
    return [
        f"loss: {loss['nats']:z.4f}{give_or_take(loss['stderr'], 4)} nats per token more than the dense model, in "
        f"{loss['windows']} windows of the calibration text that were not calibrated on; text of another kind usually loses more"
    ]


def find_stock(result: Any) -> list[str]:
    """A line that names the stock architecture which could hold the result, if there is one."""
    if result.format == "native":
        return []
    from planish.export.carriers import find_carrier

    names = {"mimo": "MiMo-V2-Flash, loads with plain transformers", "deci": "DeciLM, for vLLM, SGLang and MLX"}
    shown, to = escape(shlex.quote(result.output)), find_carrier(result.output)
    return [f"a stock architecture holds it ({names[to]}): planish export {shown} --to {to} -o FOLDER"] if to else []
