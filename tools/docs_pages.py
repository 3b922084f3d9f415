"""Pages of the documentation that are made from the code, the tables and the log: one function per kind of page.

`make_pages()` returns path → Markdown. `make docs` puts them into the site (see `docs_hook.py`); none is checked in.
"""

from __future__ import annotations

import ast
import csv
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
DOCS = ROOT / "docs"
NAME = re.compile(r"`(planish(?:\.\w+)+)`")
LABELS = ("Problem", "Equation", "Differs from")
FAILED = "**Outcome (did not work).**"
FAILURES = """Ideas that were tried and dropped, expectations that turned out wrong, and aims that were missed, collected
from the [log](index.md). Each links to its entry with the figures."""
MEASURED = """Perplexity on held-out text at a kept share of the blocks' weights; a dash where the method refused or was not run.
Other methods, and other text: [methods side by side](../tables/methods.md)."""
COMMANDS = """Written from the program: `planish COMMAND --help` says the same. Exit status: 0 done, 2 the user's input is wrong
(one line says what, where and what to do next), 1 a defect of planish, 130 interrupted."""


def make_pages() -> dict[str, str]:
    """Every generated page: path below docs/ → Markdown."""
    from planish.methods import list_methods

    linked: set[str] = set()
    pages = {f"methods/{name}.md": make_method_page(name, cls, linked) for name, cls in list_methods().items()}
    pages["reference/commands.md"] = make_commands_page()
    pages["log/did-not-work.md"] = make_failures_page()
    for module in sorted(linked):
        pages[f"source/{module}.md"] = make_source_page(module)
    return pages


# One page per method: its docstring, its solvers' docstrings, its settings, its measured rows.


def make_method_page(name: str, cls: type, linked: set[str]) -> str:
    """The page of one method; modules whose lines it links to are added to `linked`."""
    sections, settings = split_doc(inspect.getdoc(cls) or "", [f.name for f in fields(cls)])
    solvers = list_solvers(cls)
    lines = [f"# {name}", "", f"*{cls.title}*", "", f"Reference: {link_papers(cls.reference)}.", ""]
    if cls.aliases:
        lines += [f"Also known as {', '.join(f'`{a}`' for a in cls.aliases)}.", ""]
    lines += [sections["text"], "", "## Problem", "", sections["Problem"], ""]
    lines += ["## Equation", "", sections["Equation"], "", "In the source:", ""]
    lines += [f"- {x}" for x in link_equations(cls, solvers, linked)] + [""]
    for solver in solvers:
        lines += show_solver(solver)
    lines += [
        "## Departures from the paper",
        "",
        sections["Differs from"] or "None known beyond those of its solvers.",
        "",
    ]
    lines += make_settings(cls, settings) + make_measured(name)
    notes = DOCS / "methods" / f"{name}.notes.md"
    if notes.exists():
        lines += [notes.read_text(encoding="utf-8")]
    return "\n".join(lines)


def split_doc(doc: str, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(label → text, setting → text) of a docstring: paragraphs that begin with a label or with a setting's name."""
    sections, settings = dict.fromkeys(("text", *LABELS), ""), {}
    start = re.compile(rf"(?:^|(?<=[.:;] ))`({'|'.join(names)})`(?=[ :,(])" if names else r"(?!)")
    for paragraph in doc.split("\n\n"):
        flat = " ".join(paragraph.split())
        label = next((x for x in LABELS if flat.startswith(x)), None)
        if label:
            text = flat.partition(":")[2].strip()
            sections[label] += ("\n\n" if sections[label] else "") + (
                text[:1].upper() + text[1:] if re.match("[a-z]{4}", text) else text
            )
        elif start.match(flat):
            found = list(start.finditer(flat))
            for this, after in zip(found, [*found[1:], None]):
                text = flat[this.end() : after.start() if after else None].strip(" :")
                settings[this[1]] = text
        else:
            sections["text"] += ("\n\n" if sections["text"] else "") + (paragraph if "\n- " in paragraph else flat)
    return sections, settings


def list_solvers(cls: type) -> list[type]:
    """Classes of the solvers that the method takes with its default settings."""
    return list(dict.fromkeys(type(s) for s in cls().solvers()))


def show_solver(solver: type) -> list[str]:
    """A solver's docstring as a section of its own."""
    doc = re.sub(r"\n(?=Predicted loss:|Reference:|Differs from|Cost:)", "\n\n", inspect.getdoc(solver) or "")
    return [f"### Solver `{solver.__name__}`", "", doc, ""]


def link_equations(cls: type, solvers: list[type], linked: set[str]) -> list[str]:
    """Links to the source lines: what the docstrings name, the solvers' `decompose` and `truncate`, the method's plan."""
    named = [n for x in (cls, *solvers) for n in NAME.findall(inspect.getdoc(x) or "")]
    named += [f"{s.__module__}.{s.__qualname__}" for s in solvers]
    named += [f"{cls.__module__}.{cls.__qualname__}"]
    found = []
    for name in dict.fromkeys(named):
        if (place := locate(name)) is not None:
            module, first, last = place
            linked.add(module)
            short = name.removeprefix(f"{module}.")
            path = module.replace(".", "/")
            found.append(
                f"[`{short}`, {path}.py lines {first} to {last}](../source/{module}.md#__codelineno-0-{first})"
            )
    return found


def locate(name: str) -> tuple[str, int, int] | None:
    """(module, first line, last line) of a dotted name of the package; None where there is no such thing."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        file = SOURCE / Path(*parts[:cut]).with_suffix(".py")
        if file.exists():
            body: Any = ast.parse(file.read_text(encoding="utf-8"))
            for part in parts[cut:]:
                body = next((n for n in body.body if getattr(n, "name", None) == part), None)
                if body is None:
                    return None
            return ".".join(parts[:cut]), body.lineno, body.end_lineno
    return None


def make_settings(cls: type, meaning: dict[str, str]) -> list[str]:
    """The table of a method's settings."""
    from planish.cli.methods import describe

    lines = ["## Settings", ""]
    settings = describe("", cls)["settings"]
    if not settings:
        return [*lines, "None.", ""]
    lines += ["Given as `--set name=value`.", "", "| name | type | default | meaning |", "|---|---|---|---|"]
    for s in settings:
        text = meaning.get(s["name"], "").replace("|", "\\|")
        kind = s["type"].replace("|", "or")
        default = ",".join(s["default"]) if isinstance(s["default"], tuple) else s["default"]
        lines.append(f"| `{s['name']}` | {kind} | {default} | {text} |")
    return [*lines, ""]


def make_measured(name: str) -> list[str]:
    """Held-out perplexity of the method beside the dense model and auto, from docs/tables/methods.csv."""
    with (DOCS / "tables" / "methods.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["text"] == "held-out"]
    lines = ["## Measured", "", MEASURED, ""]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        keeps = list(dict.fromkeys(r["keep"] for r in mine if r["method"] not in ("dense",)))
        lines += [f"**{model}**", "", f"| | dense | {' | '.join(f'keep {k}' for k in keeps)} |"]
        lines += ["|---" * (len(keeps) + 2) + "|"]
        dense = next(float(r["perplexity"]) for r in mine if r["method"] == "dense")
        for method in dict.fromkeys((name, "auto")):
            cells = {r["keep"]: r["perplexity"] for r in mine if r["method"] == method}
            shown = [f"{float(cells[k]):.3f}" if cells.get(k) else "–" for k in keeps]
            lines.append(f"| {method} | {dense:.3f} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def link_papers(reference: str) -> str:
    """arXiv numbers become links."""
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", reference)


def make_source_page(module: str) -> str:
    """One module's source with numbered lines that can be linked to."""
    file = (SOURCE / Path(*module.split("."))).with_suffix(".py")
    text = file.read_text(encoding="utf-8").rstrip()
    return f'# {module}\n\n```python linenums="1"\n{text}\n```\n'


# The command line, from the program itself.


def make_commands_page() -> str:
    """Every command with its arguments and options."""
    import typer

    from planish.cli import app

    lines = ["# Commands", "", COMMANDS, ""]
    for name, command in typer.main.get_command(app).commands.items():
        words = [p.metavar or p.name.upper() for p in command.params if is_argument(p)]
        lines += [
            f"## {name}",
            "",
            clean(command.help or ""),
            "",
            f"    planish {' '.join([name, *words])} [options]",
            "",
        ]
        lines += ["| | | default |", "|---|---|---|"]
        lines += [show_parameter(p) for p in command.params if getattr(p, "hidden", False) is False]
        lines.append("")
    return "\n".join(lines)


def is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def show_parameter(parameter: Any) -> str:
    """One row: the flag or argument, its help, its default."""
    word = parameter.metavar or parameter.name.upper() if is_argument(parameter) else ", ".join(parameter.opts)
    text = clean(getattr(parameter, "help", None) or "").replace("|", "\\|")
    default = parameter.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"| `{word}` | {text} | {getattr(default, 'value', default) if plain else ''} |"


def clean(text: str) -> str:
    """Help text on one line, with brackets that Markdown leaves alone."""
    return " ".join(text.split()).replace("[", "\\[").replace("<", "&lt;")


# The log: what did not work, collected from its pages.


def make_failures_page() -> str:
    """Every entry of the log that ended in a negative result, newest first."""
    lines = ["# What did not work", "", FAILURES, ""]
    for page in sorted((DOCS / "log").glob("20*.md"), reverse=True):
        if found := find_failures(page.read_text(encoding="utf-8")):
            lines += [f"## {page.stem}", ""]
            lines += [f"- [{title}]({page.name}#{slug(title)}): {text}" for title, text in found] + [""]
    return "\n".join(lines)


def find_failures(text: str) -> list[tuple[str, str]]:
    """(title, question and outcome) of the entries marked as failed."""
    found = []
    for entry in re.split(r"^### ", text, flags=re.M)[1:]:
        title = entry.partition("\n")[0].strip()
        question = re.search(r"^- \*\*Question\.\*\* (.*)$", entry, re.M)
        outcome = re.search(rf"^- {re.escape(FAILED)} (.*)$", entry, re.M)
        if question and outcome:
            found.append((title, f"{question[1]} {outcome[1]}"))
    return found


def slug(title: str) -> str:
    """The anchor that a heading gets."""
    import unicodedata

    plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", title)).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
