"""Whose output a folder is: what may be replaced, and a lock beside it, held from a run's start to its end.

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
WRITER = {"writer": "planish"}  # what the index of weights says of its folder


@contextmanager
def own(output: str | Path) -> Iterator[None]:
    """Within the context no other process may write this output. Raises InputError where one does, naming it.

    Of several processes of one run the first holds the lock; a process may enter again what it holds already.
    """
    path = Path(output)
    path = path.resolve() if path.name in ("", "..") else path
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


def check_output(output: Path, overwrite: bool) -> None:
    """InputError where a folder, or what a run into it left unfinished, is there and may not be replaced."""
    check_free(output, overwrite)
    partial = output.with_name(output.name + ".partial")
    if (partial / "resume" / "journal.jsonl").exists() and not overwrite:
        raise InputError(f"{partial} holds an unfinished run: planish resume {output}, or pass --overwrite")
    if partial.is_symlink():
        raise InputError(f"{partial} is a link; give the folder itself")
    if is_full(partial) and not (partial / "resume").is_dir():
        raise InputError(f"{partial} exists and is not of planish's making; move it or choose another output")


def check_free(output: Path, overwrite: bool) -> None:
    """InputError where something is there that may not be replaced: what planish has not written or, without `overwrite`, all."""
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(
            f"output {output} holds the folder that this runs in, and cannot be replaced: give one inside it"
        )
    if output.is_symlink():
        raise InputError(f"output {output} is a link; give the folder itself")
    if output.is_file():
        raise InputError(f"output {output} is a file")
    if is_full(output) and not wrote(output):
        raise InputError(
            f"output {output} holds what planish has not written, and is never replaced; choose another folder"
        )
    if is_full(output) and not overwrite:
        raise InputError(f"output {output} exists and is not empty; choose another or pass --overwrite")


def is_full(path: Path) -> bool:
    """Whether something is there, other than an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def wrote(folder: Path) -> bool:
    """Whether planish wrote the model in a folder: its record is there or, of an export, the index of the weights says so."""
    if (folder / "planish.json").is_file():
        return True
    try:
        found = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return bool(WRITER.items() <= found["metadata"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def describe(file: IO[str]) -> str:
    """Who says to hold a lock."""
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
