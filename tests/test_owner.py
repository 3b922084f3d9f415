"""An output has one owner at a time, however runs end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings
from multiprocessing import get_context

import pytest

import planish
import planish.export
from planish import api
from planish.cli.showcase import MODEL, run_demo
from planish.errors import InputError
from planish.folder.owner import WRITER, check_output, own
from planish.sweep import sweep

FORK = get_context("fork")  # quick: the children need nothing that starts threads


def start(target, *args):
    process = FORK.Process(target=target, args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks of processes with threads
        process.start()
    return process


def hold(output, held, done):
    with own(output):
        held.set()
        done.wait()


@pytest.fixture
def holder(tmp_path):
    """(Another process that owns tmp_path/out, what lets it go.)"""
    held, done = FORK.Event(), FORK.Event()
    process = start(hold, tmp_path / "out", held, done)
    assert held.wait(60)
    yield process, done
    process.kill()
    process.join()


def test_a_live_owner_is_named(holder, tmp_path):
    process, done = holder
    with pytest.raises(InputError, match=rf"process {process.pid} on {socket.gethostname()} .*writing .*out") as error:
        own(tmp_path / "out").__enter__()
    assert len(str(error.value).splitlines()) == 1
    with own(tmp_path / "other"):  # nobody's
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is writing"), own(tmp_path / "link" / "out"):  # the same place
        pass
    done.set()
    process.join()
    with own(tmp_path / "out"):
        pass
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_owns_nothing(holder, tmp_path, how):
    os.kill(holder[0].pid, how)
    holder[0].join()
    with own(tmp_path / "out"):
        pass
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("error", [None, ValueError])
def test_an_owner_may_enter_again_and_leaves_nothing(tmp_path, error):
    def run():
        with own(tmp_path / "new" / "out"), own(tmp_path / "new" / "out"):
            assert len(list((tmp_path / "new").iterdir())) == 1
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert not list(tmp_path.iterdir())


def take_often(output):
    done = 0
    while done < 100:
        try:
            with own(output):
                os.close(os.open(f"{output}.mark", os.O_CREAT | os.O_EXCL))
                os.unlink(f"{output}.mark")
                done += 1
        except InputError:
            pass


def test_many_runs_at_once_never_own_together(tmp_path):
    """Locks that are removed and taken at the same moment: at no time two owners, and nothing is left."""
    runs = [start(take_often, tmp_path / "out") for _ in range(3)]
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file.out: .*file is a file"), own(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, True),
        ({"planish.json": "{}", "notes.txt": ""}, True),
        ({"model.safetensors.index.json": json.dumps({"metadata": WRITER, "weight_map": {}})}, True),  # an export
        ({"model.safetensors.index.json": json.dumps({"metadata": {"total_size": 1}})}, False),
        ({"model.safetensors.index.json": "[1]"}, False),
        ({"config.json": "{}", "model.safetensors": ""}, False),
        ({"notes.txt": ""}, False),
    ],
)
def test_overwrite_replaces_only_what_planish_wrote(files, free, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    for name, text in files.items():
        (out / "model" / name).write_text(text)
    if free:
        (tmp_path / "out" / "model.partial" / "resume").mkdir(parents=True)  # an interrupted run
        return check_output(out / "model", overwrite=True)
    monkeypatch.setattr(api, "fit_windows", None)  # nothing is read and nothing measured before
    with pytest.raises(InputError, match="out/model holds what planish has not written"):
        planish.compress(MODEL, output=out / "model", overwrite=True)
    with pytest.raises(InputError, match="out/model holds what planish has not written"):
        run_demo(out)
    with pytest.raises(InputError, match="out/model exists and is not a sweep"):
        sweep("nothing", output=out / "model", methods=("svd",), overwrite=True)
    left = {p.name: p.read_text() for p in (out / "model").iterdir()}
    assert left == files


@pytest.mark.parametrize("output", [".", "..", "", "/"])
def test_the_folder_that_it_runs_in_is_not_replaced(output, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setattr(api, "fit_windows", None)
    with pytest.raises(InputError, match=r"holds the folder that this runs in|would replace the model"):
        planish.compress(MODEL, output=output)
    export = sys.modules["planish.export"].export
    with pytest.raises(InputError, match=r"holds the folder that this runs in|would replace the model"):
        export(MODEL, "dense", output)
    with own("."):  # beside the folder, not in it
        assert not list(tmp_path.glob("a/b/.lock")) and list(tmp_path.glob("a/b.lock"))
