"""planish compress"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import compare_sizes, format_bytes, format_seconds, say, session


def compress(
    command: typer.Context,
    model: o.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)],
    keep: o.KeepOption = None,
    kv_keep: o.KVKeepOption = None,
    flops_keep: o.FlopsKeepOption = None,
    max_params: o.MaxParamsOption = None,
    max_bytes: o.MaxBytesOption = None,
    max_latency: o.MaxLatencyOption = None,
    context: o.ContextOption = None,
    sparsity: o.SparsityOption = None,
    method: o.MethodOption = None,
    calibration: o.CalibrationOption = "builtin",
    n_samples: o.SamplesOption = None,
    seq_len: o.LengthOption = None,
    seed: o.SeedOption = 0,
    sampling: o.SamplingOption = None,
    device: o.DeviceOption = o.Device.auto,
    dtype: o.DTypeOption = None,
    round_to: o.RoundOption = 1,
    target: o.TargetOption = o.Target.any,
    settings: o.SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the model in the output folder")] = False,
    cache: o.CacheOption = True,
    as_json: o.JsonOption = False,
) -> None:
    """Make a smaller model from MODEL (or as a recipe, a .yaml file, says) and write it to a folder."""
    limits = {
        "keep": keep, "kv_keep": kv_keep, "flops_keep": flops_keep, "max_params": max_params, "max_bytes": max_bytes,
        "max_latency": max_latency,
    }  # fmt: skip
    values = o.parse_settings(settings, sparsity, limits)
    with session(as_json) as run:
        from planish import lanes

        arguments = {
            "model": model, **limits, "context": context, "method": method, "calibration": calibration,
            "n_samples": n_samples, "seq_len": seq_len, "seed": seed, "sampling": sampling and sampling.value,
            "device": device.value, "dtype": dtype and dtype.value, "round_to": round_to, "target": target.value,
            "settings": values,
        }  # fmt: skip
        if model.endswith((".yaml", ".yml")):  # options on the command line go before the recipe's
            from planish.methods import find_class
            from planish.recipe import read_recipe

            recipe = read_recipe(Path(model)).arguments()
            given = {n for n in arguments if str(command.get_parameter_source(n)).endswith("COMMANDLINE")} - {"model"}
            given |= set(limits) if given & set(limits) else set()  # other budgets replace the recipe's
            arguments = {n: arguments[n] if n in given else recipe[n] for n in arguments}
            asked_for, own_method = (
                find_class(str(m or run.api.default_method()))[0] for m in (arguments["method"], recipe["method"])
            )
            own = recipe["settings"] if asked_for == own_method else {}  # another method has other settings
            arguments["settings"] = own | values
        asked = (
            o.ask(**{n: arguments[n] for n in (*limits, "context")}) if sparsity is None else f"sparsity {sparsity:g}"
        )
        try:
            result = run.api.compress(
                **arguments, output=output, overwrite=overwrite, cache=cache, progress=run.progress
            )
        except (KeyboardInterrupt, lanes.ProcessLost):
            if output.with_name(output.name + ".partial").exists():
                say(f"to go on from here: planish resume {output}")
            raise
        run.note(result.warnings)
        how = "loads with plain transformers" if result.format == "native" else "loads after `import planish`"
        stock = []
        if result.format != "native":
            from planish.export.carriers import find_carrier

            names = {"mimo": "MiMo-V2-Flash, loads with plain transformers", "deci": "DeciLM, for vLLM, SGLang and MLX"}
            shown = escape(shlex.quote(result.output))
            if to := find_carrier(result.output):
                stock = [f"a stock architecture holds it ({names[to]}): planish export {shown} --to {to} -o FOLDER"]
        phases = ", ".join(f"{name} {format_seconds(s)}" for name, s in result.seconds.items() if name != "total")
        run.give(
            result.as_dict(),
            f"[bold]{result.method}[/] · keep {result.keep:.4f} (asked {asked}) · {escape(result.output)} ({how})",
            compare_sizes(result),
            *o.show_removed(result),
            *o.show_latency(result),
            f"{format_seconds(result.seconds['total'])} ({phases}) · peak memory {format_bytes(result.peak_rss_bytes)}",
            *stock,
            f"next: planish eval {escape(shlex.quote(result.output))} --text SOURCE",
        )
