"""Whose output a folder or file is while a run writes it: a lock beside it, held from the run's start to its end.

The lock goes with the process, however that ends. The file `<output>.lock` says who holds it; a killed run leaves the file
and no lock, and whoever comes next takes it over.
"""

from __future__ import annotations

import fcntl
import functools
import inspect
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from planish import lanes
from planish.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])
_held: set[Path] = set()  # by this process


@contextmanager
def own(output: str | Path) -> Iterator[None]:
    """Within the context no other process may write this output. Raises InputError where one does, naming it.

    Of several processes of one run the first holds the lock; a process may enter again what it holds already.
    """
    path = Path(output)
    place = path.parent.resolve() / f"{path.name}.lock"
    if not lanes.is_first() or place in _held:
        yield
        return
    missing = [p for p in place.parents if not p.exists()]
    file = take(place, path)
    _held.add(place)
    try:
        yield
    finally:
        _held.remove(place)
        with suppress(OSError):
            place.unlink()
        if file is not None:
            file.close()
        for folder in missing:  # made for the lock alone, where nothing came of the run
            with suppress(OSError):
                folder.rmdir()


def owning(function: F) -> F:
    """The function, which owns its argument `output` while it runs (nothing, where that is None)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        output = signature.bind_partial(*args, **given).arguments.get("output")
        with own(output) if output is not None else nullcontext():
            return function(*args, **given)

    return cast(F, call)


def take(place: Path, output: Path) -> IO[str] | None:
    """The lock file, open and locked; None where the file system has no locks."""
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.open("a+", encoding="utf-8")
        except OSError as error:
            if inside := next((p for p in place.parents if p.exists() and not p.is_dir()), None):
                raise InputError(f"cannot write {output}: {inside} is a file") from None
            raise InputError(f"cannot create {place}: {error.strerror or error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise InputError(
                    f"{describe(file)} is writing {output}: wait for it, or choose another output"
                ) from None
        except OSError:  # a file system without locks
            file.close()
            with suppress(OSError):
                place.unlink()
            return None
        with suppress(OSError):
            if os.fstat(file.fileno()).st_ino == place.stat().st_ino:
                break
        file.close()  # its last owner removed it in between
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}))
    file.flush()
    return file


def describe(file: IO[str]) -> str:
    """Who says to hold a lock."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
