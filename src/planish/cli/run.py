"""How every command runs: errors become exit codes, progress goes to stderr, `--json` owns stdout."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from planish.cli.left import TimeLeft
from planish.durations import tell
from planish.errors import InputError

if TYPE_CHECKING:
    from planish.dry_run import Forecast
    from planish.manifest import Result

DONE, BUG, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
WIDE = 160  # columns of tables that no terminal shows
EVERY = 10.0  # seconds between lines of progress, at least
LONG = 60.0  # seconds of a run that are told before it starts, at least

# What the system refuses because of what the user asked for: space, permissions, paths.
_REFUSED = {
    getattr(errno, n)
    for n in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EFBIG")
    if hasattr(errno, n)
}


class Commands(TyperGroup):
    """The group of all commands; turns every way to end into an exit code and at most one line on stderr."""

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        try:
            code = super().main(args, standalone_mode=False, **kwargs)
            code = code if isinstance(code, int) else DONE
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = explain(error)
        if code == INTERRUPTED:
            say("interrupted")
        if not standalone_mode:
            return code
        sys.exit(code)


def explain(error: Exception) -> int:
    """Say on stderr what went wrong; the exit code."""
    if os.environ.get("PLANISH_DEBUG"):
        traceback.print_exception(error)
    name = type(error).__name__
    if name == "NoArgsIsHelpError":
        print(error.format_message())  # type: ignore[attr-defined]
        return WRONG_INPUT
    if name == "Abort":
        return INTERRUPTED
    if hasattr(error, "format_message"):  # the parser's usage errors
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        say(f"error: {error.format_message().rstrip('.')}{where}")
        return WRONG_INPUT
    if isinstance(error, InputError):
        say(f"error: {error}")
        return WRONG_INPUT
    if name == "ProcessLost":
        say(f"error: {error}; take it up with planish resume where blocks were finished")
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in _REFUSED:
        say(f"error: {error.strerror}: {error.filename}" if error.filename else f"error: {error.strerror}")
        return WRONG_INPUT
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        say(f"error: out of memory ({error or name}); use fewer --n-samples, a smaller --seq-len, or --device cpu")
        return WRONG_INPUT
    say(f"planish failed: {name}: {error} · this is a bug in planish · PLANISH_DEBUG=1 shows where it happened")
    return BUG


def say(line: str) -> None:
    """One line on stderr."""
    print(" ".join(str(line).split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def session(as_json: bool) -> Iterator[Session]:
    """Within the context nothing but the command's result reaches stdout, and other libraries' bars are off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    found = Session(as_json, bars)
    level = logging.root.manager.disable
    if not os.environ.get("PLANISH_DEBUG"):
        logging.disable(logging.WARNING)  # what other libraries have to say while they are imported and used
    try:
        with bars, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield found
    finally:
        logging.disable(level)
    if is_first():
        found.show()


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning as one line, without the place in the source; other libraries' about their own future are left out."""
    if issubclass(category, UserWarning):
        say(f"note: {message}")


def is_first() -> bool:
    """Of several processes the first one speaks."""
    return os.environ.get("RANK", "0") == "0"


class Session:
    """Collects what a command has to say, and says it when the work is done."""

    def __init__(self, as_json: bool, bars: Any):
        self.as_json, self.bars = as_json, bars
        self.tasks: dict[str, Any] = {}
        self.began = self.said = time.monotonic()
        self.time = TimeLeft(began=self.began)
        self.result: dict[str, Any] = {}
        self.view: list[Any] = []
        self.noted: list[str] = []

    @property
    def api(self) -> Any:
        """`planish.api`, imported when it is needed, with transformers silenced."""
        from planish import api
        from planish.folder import load as loading

        loading.silence()
        return api

    def begin(self, phases: Sequence[Any], shorter: Mapping[str, float], notes: Sequence[str] = ()) -> None:
        """`planish.api.Begin`: what is known of a run before it starts, and what a long one is predicted to take."""
        self.note(notes)
        if not phases:
            return
        self.began = self.said = time.monotonic()
        self.time = TimeLeft([(p.name, p.steps) for p in phases], self.began)
        if sum(p.seconds for p in phases) < LONG:
            return
        parts = dict[str, float]()
        for p in phases:
            name = p.name.partition(" ")[0]
            parts[name] = parts.get(name, 0.0) + p.seconds
        took = ", ".join(f"{name} {tell(s)}" for name, s in parts.items())
        say(f"this takes about {tell(sum(parts.values()))} ({took})")
        if shorter:
            say(f"half of that or less: {', '.join(f'{flag} ({tell(s)})' for flag, s in shorter.items())}")

    def progress(self, phase: str, done: int, total: int) -> None:
        """`planish.core.Progress`: a bar per phase; where stderr is no terminal, a line for every block that took `EVERY`
        seconds, and for as many faster ones as take that long together."""
        now = time.monotonic()
        self.time.report(phase, done, total, now)
        left = self.time.left(now)
        rest = "" if left is None else f"about {tell(left)} left{' of this phase' * self.time.more}"
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=total, left=rest)
        self.bars.update(self.tasks[phase], completed=done, total=total, left=rest)
        if done and self.bars.disable and now - self.said >= EVERY and is_first():
            self.said = now
            say(" · ".join([f"{phase} {done} of {total}", f"{tell(now - self.began)} elapsed", *[rest][: bool(rest)]]))

    def note(self, warnings: Sequence[str]) -> None:
        """What a run has to say besides its result, once."""
        for warning in warnings if is_first() else ():
            if warning not in self.noted:
                say(f"note: {warning}")
                self.noted.append(warning)

    def give(self, result: dict[str, Any], *view: Any) -> None:
        """The command's result: as data for `--json`, and as renderables for people."""
        self.result, self.view = result, list(view)

    def show(self) -> None:
        if self.as_json:
            print(json.dumps(clean(self.result), default=str, allow_nan=False), flush=True)
            return
        console = Console()
        if console.is_terminal or "COLUMNS" in os.environ:
            wrap = True
        else:  # a file or a pipe has no edge: lines stay whole
            wrap, console = False, Console(width=WIDE)
        for part in self.view:
            console.print(part, soft_wrap=not wrap and isinstance(part, str))


def clean(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def make_table(*headings: str, title: str | None = None) -> Table:
    """A plain table: the first column left, the others right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", header_style="bold", overflow="fold")
    return table


def compare_sizes(found: Result | Forecast) -> Table:
    """What is counted before and after compressing, and the share that stays."""
    table = make_table("", "before", "after", "kept")
    for name, before, after in (
        ("parameters", found.params_before, found.params_after),
        ("parameters of the blocks' linears", found.block_params_before, found.block_params_after),
        ("bytes of weights", found.bytes_before, found.bytes_after),
        (
            f"FLOPs per token, {found.context} tokens of context",
            found.flops_per_token_before,
            found.flops_per_token_after,
        ),
        (
            f"KV cache at {found.kv_bits} bits, bytes per token",
            found.kv_bytes_per_token_before,
            found.kv_bytes_per_token_after,
        ),
    ):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else "")
    return table


def show_untouched(found: Result | Forecast) -> list[str]:
    """A line about what of a model around a language model is copied as it is."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.untouched.items())
    return [f"left untouched, copied as it is: {parts}"] if parts else []


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def give_or_take(error: float | None, digits: int) -> str:
    """A standard error as it stands behind a number; nothing, where a single measurement has none."""
    return "" if error is None or not math.isfinite(error) else f" ± {error:.{digits}f}"


def format_seconds(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{seconds / 3600:.1f} h"
