"""The command line: one file per command. A new command is a function in a file here and one line below."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from planish.cli import (
    ask,
    bench,
    compress,
    demo,
    doctor,
    eora,
    evaluate,
    export,
    methods,
    plan,
    push,
    reproduce,
    resume,
    sweep,
)
from planish.cli.run import Commands
from planish.version import __version__

app = typer.Typer(
    name="planish",
    cls=Commands,
    help="Make large language models smaller and faster without training them.",
    epilog="Start with: planish demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


SPINS = 3000  # rounds that a thread of OpenMP waits for others before it gives its core away (GNU's own count: 300,000)


def show_version(asked: bool) -> None:
    if asked:
        print(f"planish {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None: ...


app.command("compress")(compress.compress)
app.command("reproduce")(reproduce.reproduce)
app.command("resume")(resume.resume)
app.command("plan")(plan.plan)
app.command("sweep")(sweep.sweep)
app.command("report")(sweep.report)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("verify")(export.verify)
app.command("ask")(ask.ask)
app.command("eora")(eora.eora)
app.command("push")(push.push)
app.command("methods")(methods.methods)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the `planish` command.

    Where another program has one of the cores, threads that wait long for one without a core cost ten times their work; that is
    set here, because GNU's OpenMP reads it when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    app(prog_name="planish")
