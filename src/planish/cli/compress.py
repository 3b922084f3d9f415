"""planish compress"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import compare_sizes, format_bytes, format_seconds, say, session, show_untouched


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the model in the output folder")] = False,
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
        how = "loads with plain transformers" if result.format == "native" else "loads after `import planish`"
        phases = ", ".join(f"{name} {format_seconds(s)}" for name, s in result.seconds.items() if name != "total")
        run.give(
            result.as_dict(),
            f"[bold]{result.method}[/] · keep {result.keep:.4f} (asked {asked}) · {escape(result.output)} ({how})",
            compare_sizes(result),
            *show_untouched(result),
            *o.show_removed(result),
            *show_choices(result),
            *show_rounding(result),
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
        lines.append(f"{'→' if c['chosen'] else ' '} {c['bits']} bits, {what}: {escape(found)}")
    return ["plans of this size, by their divergence on held-out windows:", *lines] if lines else []


def show_rounding(result: Any) -> list[str]:
    """Lines of a result whose weights are rounded: to what, and what that costs."""
    r = result.rounding
    if not r:
        return []
    types = ", ".join(f"{n} {kind}" for kind, n in r["types"].items())
    lines = [
        f"rounded: {types} · {r['bits_per_weight']:.2f} bits per weight · predicted loss {r['nats']:.4f} nats per token, "
        f"measured {r['measured']:.4f} on {r['windows']} calibration windows"
    ]
    shown = escape(shlex.quote(result.output))
    return [*lines, *([f"for llama.cpp: planish export {shown} --to gguf -o FILE"] if r["target"] == "gguf" else [])]


def find_stock(result: Any) -> list[str]:
    """A line that names the stock architecture which could hold the result, if there is one."""
    if result.format == "native":
        return []
    from planish.export.carriers import find_carrier

    names = {"mimo": "MiMo-V2-Flash, loads with plain transformers", "deci": "DeciLM, for vLLM, SGLang and MLX"}
    shown, to = escape(shlex.quote(result.output)), find_carrier(result.output)
    return [f"a stock architecture holds it ({names[to]}): planish export {shown} --to {to} -o FOLDER"] if to else []
