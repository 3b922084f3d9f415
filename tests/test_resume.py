"""A run that is stopped at any moment and taken up again writes what an uninterrupted run writes, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from planish.compression import resume
from planish.errors import InputError
from planish.folder import writer
from tiny import compress

WINDOWS = torch.randint(0, 90, (16, 16), generator=torch.Generator().manual_seed(0))
METHODS = (
    "flat-llm",
    "svd-llm",
    "auto",
)  # statistics on the compressed, on the dense prefix, and kept of a backward pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tiny.build(tiny.NAMES[0]), tmp_path_factory.mktemp("resume") / "model")


def run(model: Path, output: Path, method: str) -> None:
    compress(model, output=output, keep=0.7, method=method, windows=WINDOWS)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file; of the manifest without what a clock or the system measured."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "planish.json":
            manifest = json.loads(data)
            for key in ("seconds", "peak_rss_bytes", "output"):
                del manifest["result"][key]
            data = json.dumps(manifest).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child cannot use its parent's OpenMP threads; and equal bytes need equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fork(task: Callable[[], object]) -> int:
    """Run a task in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take_up(model: Path, output: Path, method: str) -> None:
    """What a user does after a crash: resume, or start again where nothing had been kept."""
    try:
        resume(output)
    except InputError as error:
        if not any(words in str(error) for words in ("nothing to resume", "cannot read")):
            raise
        if not (output / "planish.json").exists():
            compress(model, output=output, keep=0.7, method=method, windows=WINDOWS, overwrite=True)


def die_at(n: int, task: Callable[[], object]) -> None:
    """Run a task and end the process, without any cleaning up, just before its n-th call that makes a write durable."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace, Path.replace = counted(os.fsync), counted(os.replace), counted(Path.replace)
    task()


def check_crash(model: Path, folder: Path, method: str, n: int) -> bool:
    """Whether the run still reached call n."""
    output = folder / str(n)
    code = wait(fork(lambda: die_at(n, lambda: run(model, output, method))))
    assert code in (0, 9)
    if code == 9:
        assert wait(fork(lambda: take_up(model, output, method))) == 0
    assert hashes(output) == hashes(folder / "whole")
    assert sorted(p.name for p in folder.iterdir()) == sorted(["whole", str(n)])
    shutil.rmtree(output)
    return code == 9


@pytest.mark.parametrize("method", [m if m == "svd-llm" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_crash_before_some_durable_writes(model, tmp_path, method):
    run(model, tmp_path / "whole", method)
    assert all(check_crash(model, tmp_path, method, n) for n in (5, 14, 30))


def test_the_model_was_reached_by_a_link_that_is_gone(model, tmp_path):
    link, output = tmp_path / "link", tmp_path / "out"
    link.symlink_to(model)
    assert wait(fork(lambda: die_at(14, lambda: run(link, output, "svd-llm")))) == 9
    link.unlink()
    assert resume(output).keep <= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_crash_before_every_durable_write(model, tmp_path, method):
    run(model, tmp_path / "whole", method)
    n = 1
    while check_crash(model, tmp_path, method, n):
        n += 1
    assert n > 30


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "erc-svd", "auto", "subfit", "a3"])
def test_kill_at_random_moments(model, tmp_path, method):
    """At least 25 kills per method, spread over all phases; resumed runs are killed as well."""
    start = time.perf_counter()
    assert wait(fork(lambda: run(model, tmp_path / "whole", method))) == 0
    whole = time.perf_counter() - start
    draw, kills, output = random.Random(0), 0, tmp_path / "out"
    while kills < 25:
        child = fork(lambda: run(model, output, method))
        while True:
            time.sleep(draw.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
            if wait(child) == 0:
                break
            kills += 1
            child = fork(lambda: take_up(model, output, method))
        assert hashes(output) == hashes(tmp_path / "whole")
        shutil.rmtree(output)


def stop_after(model: Path, output: Path, method: str, blocks: int) -> None:
    def stop(phase, done, total):
        if phase == "blocks" and done == blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, output=output, keep=0.7, method=method, windows=WINDOWS, progress=stop)


def test_full_disk_while_resuming_keeps_finished_blocks(model, tmp_path, monkeypatch):
    """One clear error; what was finished stays, is not thrown away by a new run, and is taken up."""
    run(model, tmp_path / "whole", "flat-llm")
    stop_after(model, tmp_path / "out", "flat-llm", 2)

    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(InputError, match="No space left"):
        resume(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="planish resume"):
        run(model, tmp_path / "out", "flat-llm")
    resume(tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_stopped_after_the_last_rename(model, tmp_path, monkeypatch):
    """The folder is complete, what was needed to resume still lies in it: resume takes it away, once."""
    run(model, tmp_path / "whole", "svd-llm")
    monkeypatch.setattr(writer, "tidy", lambda output: False)
    run(model, tmp_path / "out", "svd-llm")
    monkeypatch.undo()
    assert (tmp_path / "out" / "resume").is_dir()
    assert resume(tmp_path / "out").keep < 0.7 + 1e-9
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    with pytest.raises(InputError, match="it is complete"):
        resume(tmp_path / "out")


def test_stopped_while_replacing(model, tmp_path, monkeypatch):
    """--overwrite: the old folder is there until the new one is; nobody else's folder is touched."""
    for name in ("out", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    (tmp_path / "out" / "planish.json").write_text("{}")
    rename, seen = os.replace, []

    def stop(source, target):
        if Path(target) == tmp_path / "out" and not seen:
            seen.append(target)
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(model, output=tmp_path / "out", keep=0.7, method="svd-llm", windows=WINDOWS, overwrite=True)
    monkeypatch.undo()
    resume(tmp_path / "out")
    run(model, tmp_path / "whole", "svd-llm")
    (tmp_path / "out" / "precious").unlink()  # put back: no saver of models wrote it
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert (tmp_path / "out.old" / "precious").exists()


def test_someone_elses_folder_in_the_way(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("x")
    with pytest.raises(InputError, match="not of planish's making"):
        compress(model, output=tmp_path / "out", keep=0.7, method="svd-llm", windows=WINDOWS, overwrite=True)
    assert (tmp_path / "out.partial" / "precious").exists()


def test_damaged_shard_is_solved_again(model, tmp_path):
    run(model, tmp_path / "whole", "svd-llm")
    stop_after(model, tmp_path / "out", "svd-llm", 2)
    shard = next((tmp_path / "out.partial").glob("model-00003-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    resume(tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_bad_input_leaves_nothing(model, tmp_path):
    with pytest.raises(InputError):
        compress(model, output=tmp_path / "out", keep=1e-6, method="svd-llm", windows=WINDOWS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="nothing to resume"):
        resume(tmp_path / "out")
