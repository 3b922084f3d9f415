"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import typer

from planish import request
from planish.declare import find_default, read_extra
from planish.errors import InputError
from planish.request import FIELDS, LIMITS, Limits, Request, label

F = TypeVar("F", bound=Callable[..., None])


BUDGETS = tuple(Limits.model_fields)
TEXT = ("calibration", *request.TEXT)
COMPUTE = ("device", "dtype")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file or hub id", show_default=False)
]
FolderArgument = Annotated[
    str,
    typer.Argument(metavar="DIR", help="compressed or Hugging Face folder, GGUF file or hub id", show_default=False),
]
OVERWRITE = "replace the model in the output folder, if planish wrote it; other files there stay"
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        help="instead of --keep, for methods that remove submodules: share of each kind that goes, in [0, 1)",
        show_default=False,
    ),
]
CacheOption = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache", help="keep the text's tokens and calibration statistics on disk and use them again"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]


def asks(*names: str) -> Callable[[F], F]:
    """Give a command the flags of these options of a request, as keywords in the place of its `**options`.

    Flags are shown in the order of `names`, in which the command's own keywords can stand too; the others come last.
    """

    def wrap(command: F) -> F:
        hints = get_type_hints(command, include_extras=True)
        own = {
            n: p.replace(annotation=hints[n])
            for n, p in inspect.signature(command).parameters.items()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        }
        given = {n: own[n] if n in own else make_flag(n) for n in names}
        first = [p for n, p in own.items() if n not in given and p.kind is not inspect.Parameter.KEYWORD_ONLY]
        last = [p for n, p in own.items() if n not in given and p.kind is inspect.Parameter.KEYWORD_ONLY]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            command(**{n: v.value if n in FIELDS and isinstance(v, StrEnum) else v for n, v in values.items()})

        call.__signature__ = inspect.Signature([*first, *given.values(), *last])  # type: ignore[attr-defined]
        call.__annotations__ = {}
        return cast(F, call)

    return wrap


def make_flag(name: str) -> inspect.Parameter:
    """The parameter from which typer makes an option's flag."""
    field = FIELDS[name]
    flag: dict[str, Any] = read_extra(field, "flag")
    kind: Any = flag.get("type", field.annotation)
    default: Any = find_default(field)
    literals = [v for t in (kind, *get_args(kind)) if get_origin(t) is Literal for v in get_args(t)]
    if choices := flag.get("choices", literals):
        kind = cast(Any, StrEnum)(name, {c: c for c in choices})
        default = None if default is None else kind(default)
    if not default and default is not False and default != 0:  # nothing: none was given
        kind, default = kind | None, None
    shown: dict[str, Any] = {"show_default": flag["shown"]} if "shown" in flag else {}
    declared = [flag["name"]] if "name" in flag else []
    option = typer.Option(
        *declared,
        help=field.description,
        min=flag.get("least"),
        metavar=flag.get("metavar"),
        parser=flag.get("parser"),
        **shown,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def parse_settings(
    pairs: list[str] | None, sparsity: float | None = None, limits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """["a=1", "b=x"] → {"a": "1", "b": "x"}; the method converts the values. `sparsity` is a setting of its own, which
    stands in the place of a budget (`limits`)."""
    beside = [f"--{label(n)}" for n in LIMITS if (limits or {}).get(n) is not None]
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


def tell_asked(options: Mapping[str, Any], sparsity: float | None) -> str:
    """The budgets of a command's options in words; wrong ones raise InputError."""
    limits = Limits.ask(**{n: options[n] for n in BUDGETS})
    if options.get("fit") is not None:
        return f"fit {Request.ask(model='', fit=options['fit']).fit:,}"
    return limits.tell() if sparsity is None else f"sparsity {sparsity:g}"


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
