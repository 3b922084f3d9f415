"""planish reproduce"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import make_table, session


def reproduce(
    name: Annotated[str | None, typer.Argument(help="a paper's recipe, or a recipe file; none: list them")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="keep the model here")] = None,
    model: Annotated[str | None, typer.Option(help="another folder with the same model")] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Run a paper's recipe and print what is measured beside what was published."""
    with session(as_json) as run:
        from planish.errors import InputError
        from planish.request import read_recipe

        papers = find_papers()
        if name is None:
            recipes = {n: read_recipe(path) for n, path in papers.items()}
            table = make_table("recipe", "model", "keep", "published", "where")
            for n, r in recipes.items():
                p = r.published
                value = "" if p is None else f"{p.value:g}" if p.value is not None else f"{p.factor:g} × dense"
                table.add_row(n, r.model, f"{r.keep:g}", value, p.where if p else "")
            run.give({"recipes": {n: r.recipe() for n, r in recipes.items()}}, table)
            return
        if name not in papers and not name.endswith((".yaml", ".yml")):
            raise InputError(f"no recipe {name!r}; known: {', '.join(papers)}; or give a .yaml file")
        recipe = read_recipe(papers.get(name, Path(name)))
        target = recipe.published
        if target is None:
            raise InputError(f"recipe {name} has nothing published to compare with")
        arguments = recipe.arguments | ({"model": model} if model else {})
        with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder:
            place = output or Path(folder) / "model"
            result = run.api.compress(**arguments, output=place, progress=run.progress)
            dense, small = (
                run.api.evaluate(m, target.text, seq_len=target.seq_len, bos="once").perplexity
                for m in (arguments["model"], place)
            )
        run.note(result.warnings)
        found = {
            "recipe": name, "paper": target.paper, "where": target.where, "model": arguments["model"], "method": result.method,
            "keep": result.keep, "published": target.value, "measured": small, "published_dense": target.dense,
            "measured_dense": dense, "published_factor": find_factor(target.value, target.dense, target.factor),
            "measured_factor": small / dense, "differs": target.differs,
        }  # fmt: skip
        table = make_table("", "published", "measured")
        for label, key in (("dense", "_dense"), ("compressed", ""), ("compressed / dense", "_factor")):
            published, measured = found[f"published{key}"], found[f"measured{key}"]
            table.add_row(label, "not given" if published is None else f"{published:.4g}", f"{measured:.4g}")
        run.give(
            found,
            f"[bold]{target.paper}[/] · {target.where}",
            f"{result.method}, keep {result.keep:.4f} · perplexity of {target.text} in windows of {target.seq_len}",
            table,
            f"differs: {target.differs or 'nothing known'}" + (f"; measured on {model}" if model else ""),
        )


def find_factor(value: float | None, dense: float | None, factor: float | None) -> float | None:
    """How many times the dense perplexity was published, given or worked out."""
    return factor if value is None else None if dense is None else value / dense


def find_papers() -> dict[str, Path]:
    """Name → file of the papers' recipes."""
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes"):
        if (folder / "papers").is_dir():
            return {p.stem: p for p in sorted((folder / "papers").glob("*.yaml"))}
    return {}
