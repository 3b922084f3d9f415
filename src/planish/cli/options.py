"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from planish.errors import InputError


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Target(StrEnum):
    any = "any"
    hf = "hf"
    vllm = "vllm"
    gguf = "gguf"
    onnx = "onnx"


class Sampling(StrEnum):
    contiguous = "contiguous"
    random = "random"


SOURCE_HELP = "builtin, wikitext2, c4, or a file: .txt, .jsonl (field text), .parquet, .npy (token ids)"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file or hub id", show_default=False)
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        help="share of the decoder blocks' linear weights that stays, in (0, 1]  [default: 0.8 where no other budget is given]",
        show_default=False,
    ),
]
KVKeepOption = Annotated[
    float | None,
    typer.Option(
        help="share of the KV cache's bytes per token that stays; alone it cuts only what the cache holds",
        show_default=False,
    ),
]
FlopsKeepOption = Annotated[
    float | None,
    typer.Option(help="share of the blocks' FLOPs per token that stays, attention included", show_default=False),
]
MaxParamsOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="parameters of the whole model: 1.5B, 800M, 12345678", show_default=False),
]
MaxBytesOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="bytes of the whole model's weight files: 2.5GB, 800MiB", show_default=False),
]
MaxLatencyOption = Annotated[
    float | None,
    typer.Option(metavar="MS", help="milliseconds per decoded token on this machine, batch 1", show_default=False),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="tokens of context that FLOPs and latency count  [default: a calibration window's]",
        show_default=False,
    ),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        help="instead of --keep, for methods that remove submodules: share of each kind that goes, in [0, 1)",
        show_default=False,
    ),
]
MethodOption = Annotated[str | None, typer.Option(help="see `planish methods`", show_default="auto")]
CalibrationOption = Annotated[str, typer.Option(metavar="SOURCE", help=SOURCE_HELP)]
SamplesOption = Annotated[int | None, typer.Option(min=1, help="calibration windows", show_default="128")]
LengthOption = Annotated[
    int | None,
    typer.Option(min=2, help="tokens per window", show_default="2048, or the model's positions"),
]
SeedOption = Annotated[int, typer.Option(help="of the random windows")]
SamplingOption = Annotated[
    Sampling | None, typer.Option(help="of windows", show_default="random; contiguous for token ids")
]
DeviceOption = Annotated[Device, typer.Option(help="auto: CUDA where there is one, else the CPU")]
DTypeOption = Annotated[
    DType | None, typer.Option(help="to compute in", show_default="float32 on a CPU, else as stored")
]
TargetOption = Annotated[
    Target, typer.Option("--target", help="where the result has to run: ranks are chosen to suit it")
]
RoundOption = Annotated[int, typer.Option(min=1, help="make ranks multiples of this (8, 16, 32, 64 suit hardware)")]
CacheOption = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache", help="keep the text's tokens and calibration statistics on disk and use them again"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="a hyper-parameter of the method (repeatable)", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]


def parse_settings(
    pairs: list[str] | None, sparsity: float | None = None, limits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """["a=1", "b=x"] → {"a": "1", "b": "x"}; the method converts the values. `sparsity` is a setting of its own, which
    stands in the place of a budget (`limits`)."""
    beside = [f"--{n.replace('_', '-')}" for n, value in (limits or {}).items() if value is not None]
    if sparsity is not None and beside:
        raise InputError(f"--sparsity says how much goes, {beside[0]} cannot hold beside it: give one of them")
    settings: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"--set {pair!r} has no value; write --set name=value")
        if name in settings:
            raise InputError(f"--set {name} is given twice")
        settings[name] = value.strip()
    return settings


def ask(**values: Any) -> Any:
    """`planish.plan.budgets.Asked` of a command's options."""
    from planish.plan.budgets import read_asked

    return read_asked(**values)


def show_removed(result: Any) -> list[str]:
    """A line of a result from which whole submodules have gone."""
    names = {"attention": "attentions", "ffn": "feed-forwards"}
    parts = [f"{r['count']} of {r['of']} {names[n]} ({r['sparsity']:.1%})" for n, r in result.submodules.items()]
    return [f"removed or replaced: {', '.join(parts)}"] if parts else []


def show_latency(found: Any) -> list[str]:
    """A line of a result or forecast whose latency was asked for."""
    if found.latency_ms_after is None:
        return []
    before, after = found.latency_ms_before, found.latency_ms_after
    return [f"predicted {after:.3g} ms per decoded token behind {found.context} others (uncompressed {before:.3g} ms)"]
