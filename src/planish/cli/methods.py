"""planish methods"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import make_table, session


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="show this method alone", show_default=False)
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """List the methods, or explain one of them."""
    with session(as_json) as run:
        from planish.methods import find_class, list_methods

        if name is None:
            found = {n: describe(n, cls) for n, cls in list_methods().items()}
            run.give({"methods": list(found.values())}, make_list(found), "planish methods NAME explains one")
            return
        canonical, cls = find_class(name)
        one = describe(canonical, cls)
        table = make_table("--set", "type", "default")
        for setting in one["settings"]:
            table.add_row(setting["name"], escape(setting["type"]), escape(str(setting["default"])))
        aliases = f" (also {', '.join(one['aliases'])})" if one["aliases"] else ""
        run.give(
            one,
            f"[bold]{canonical}[/]{aliases}: {escape(one['title'])}",
            escape(one["reference"]),
            "",
            escape(reflow(one["doc"])),
            *(("", table) if one["settings"] else ("", "no hyper-parameters")),
        )


def make_list(found: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="bold")
    for heading in ("method", "what it does", "hyper-parameters (--set)"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for name, one in found.items():
        settings = ", ".join(f"{s['name']}={s['default']}" for s in one["settings"])
        table.add_row(
            f"[bold]{name}[/]", f"{escape(one['title'])}\n[dim]{escape(one['reference'])}[/]", escape(settings)
        )
    return table


def describe(name: str, cls: type) -> dict[str, Any]:
    """A method's words and hyper-parameters, read off its class."""
    hints = get_type_hints(cls)
    settings = []
    for f in fields(cls):
        default = f.default if f.default is not MISSING else None
        settings.append({"name": f.name, "type": name_type(hints[f.name]), "default": default})
    generated = f"{cls.__name__}("
    doc = inspect.getdoc(cls) or ""
    return {
        "name": name,
        "title": cls.title,  # type: ignore[attr-defined]
        "reference": cls.reference,  # type: ignore[attr-defined]
        "aliases": list(cls.aliases),  # type: ignore[attr-defined]
        "doc": "" if doc.startswith(generated) else doc,
        "settings": settings,
    }


def reflow(doc: str) -> str:
    """A docstring with every paragraph on one line: the terminal breaks them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))


def name_type(hint: Any) -> str:
    """A type hint in words: "float", "a | b", "int | none"."""
    if hint is type(None):
        return "none"
    if get_origin(hint) is tuple:
        return "names separated by commas"
    options = get_args(hint)
    if options:
        return " | ".join(x if isinstance(x, str) else name_type(x) for x in options)
    return getattr(hint, "__name__", str(hint))
