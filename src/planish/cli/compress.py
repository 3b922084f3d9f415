"""planish compress"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import format_bytes, format_seconds, make_comparison, say, session


def compress(
    context: typer.Context,
    model: o.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)],
    keep: o.KeepOption = 0.8,
    kv_keep: o.KVKeepOption = None,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    cache: o.CacheOption = True,
    as_json: o.JsonOption = False,
) -> None:
    """Make a smaller model from MODEL (or as a recipe, a .yaml file, says) and write it to a folder."""
    values = o.parse_settings(settings, sparsity)
    asked = f"{keep:g}" if kv_keep is None else f"kv-keep {kv_keep:g}"
    asked = asked if sparsity is None else f"sparsity {sparsity:g}"
    with session(as_json) as run:
        from planish import processes

        arguments = {
            "model": model, "keep": keep, "kv_keep": kv_keep, "method": method, "calibration": calibration,
            "n_samples": n_samples, "seq_len": seq_len, "seed": seed, "sampling": sampling and sampling.value,
            "device": device.value, "dtype": dtype and dtype.value, "round_to": round_to, "target": target.value,
            "settings": values,
        }  # fmt: skip
        if model.endswith((".yaml", ".yml")):  # options on the command line go before the recipe's
            from planish.recipe import read_recipe

            recipe = read_recipe(Path(model)).arguments()
            given = {n for n in arguments if str(context.get_parameter_source(n)).endswith("COMMANDLINE")} - {"model"}
            arguments = {n: arguments[n] if n in given else recipe[n] for n in arguments}
            arguments["settings"] = recipe["settings"] | values
            asked = f"{arguments['keep']:g}"
        try:
            result = run.api.compress(
                **arguments, output=output, overwrite=overwrite, cache=cache, progress=run.progress
            )
        except (KeyboardInterrupt, processes.ProcessLost):
            if output.with_name(output.name + ".partial").exists():
                say(f"to go on from here: planish resume {output}")
            raise
        run.note(result.warnings)
        how = "loads with plain transformers" if result.format == "native" else "loads after `import planish`"
        phases = ", ".join(f"{name} {format_seconds(s)}" for name, s in result.seconds.items() if name != "total")
        run.give(
            result.as_dict(),
            f"[bold]{result.method}[/] · keep {result.keep:.4f} (asked {asked}) · {result.output} ({how})",
            make_comparison(
                [
                    ("parameters", result.params_before, result.params_after),
                    ("parameters of the blocks' linears", result.block_params_before, result.block_params_after),
                    ("KV cache, bytes per token", result.kv_bytes_per_token_before, result.kv_bytes_per_token_after),
                ]
            ),
            f"{format_seconds(result.seconds['total'])} ({phases}) · peak memory {format_bytes(result.peak_rss_bytes)}",
            f"next: planish eval {result.output} --text SOURCE",
        )
