"""planish push"""

from __future__ import annotations

from typing import Annotated

import typer

from planish.cli import options as o
from planish.cli.run import session


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="compressed folder", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hugging Face hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="create it private")] = False,
    message: Annotated[str | None, typer.Option(help="commit message", show_default=False)] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Upload a compressed folder, with its model card, to the Hugging Face hub."""
    with session(as_json) as run:
        _ = run.api
        from planish.export.hub import push as upload

        address = upload(folder, repo, private=private, message=message)
        run.give({"repo": repo, "address": address}, address)
