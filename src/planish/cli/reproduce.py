"""planish reproduce"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import session


def reproduce(
    name: Annotated[str | None, typer.Argument(help="a paper's recipe, or a recipe file; none: list them")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="keep the model here")] = None,
    model: Annotated[str | None, typer.Option(help="another folder with the same model")] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Run a paper's recipe and print what is measured beside what was published."""
    with session(as_json) as run:
        from planish.errors import InputError
        from planish.recipe import find_papers, read_recipe

        papers = find_papers()
        if name is None:
            run.give({"recipes": list(papers)}, *(f"{n}" for n in papers))
            return
        if name not in papers and not name.endswith((".yaml", ".yml")):
            raise InputError(f"no recipe {name!r}; known: {', '.join(papers)}; or give a .yaml file")
        recipe = read_recipe(papers.get(name, Path(name)))
        target = recipe.published
        if target is None:
            raise InputError(f"recipe {name} has nothing published to compare with")
        arguments = recipe.arguments() | ({"model": model} if model else {})
        with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder:
            place = output or Path(folder) / "model"
            result = run.api.compress(**arguments, output=place, progress=run.progress)
            dense, small = (
                run.api.evaluate(m, target.text, seq_len=target.seq_len).perplexity for m in (arguments["model"], place)
            )
        found = {
            "recipe": name, "paper": target.paper, "where": target.where, "keep": result.keep, "published": target.value,
            "measured": small, "published_dense": target.dense, "measured_dense": dense, "differs": target.differs,
        }  # fmt: skip
        run.give(
            found,
            f"[bold]{target.paper}[/] · {target.where} · perplexity of {target.text} in windows of {target.seq_len}",
            f"compressed: measured {small:.3f}, published {target.value:g}",
            f"dense:      measured {dense:.3f}, published {target.dense if target.dense is not None else 'not given'}",
            f"differs: {target.differs or 'nothing known'}",
        )
