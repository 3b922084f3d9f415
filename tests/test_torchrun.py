"""The command line under torchrun (gloo): the bytes of one process, and what happens when a process is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny
from test_resume import hashes

METHODS = ("flat-llm", "svd-llm", "erc-svd", "auto", "subfit", "a3", "mpifa", "modegpt", "shortgpt")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A model of eight blocks and token ids for six batches of 64-token windows: two lanes stay empty."""
    folder = tmp_path_factory.mktemp("torchrun")
    model = tiny.save(tiny.build("llama_gqa", num_hidden_layers=8), folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(1, 90, 700 * 64))
    return model, folder / "ids.npy"


def start(count: int, *words: object, **more: str) -> subprocess.Popen:
    """`planish …` in so many processes; with one, without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    line = [sys.executable, *torchrun, "-m", "planish", *map(str, words)]
    environment = os.environ | ENVIRONMENT | more
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and everything it said on stderr."""
    _, errors = process.communicate(timeout=280)
    return process.returncode, errors


def ask(inputs: tuple[Path, Path], method: str, output: Path) -> list[object]:
    model, ids = inputs
    flags = ["--keep", 0.7, "--method", method, "--calibration", ids, "--n-samples", 700, "--seq-len", 64, "--no-cache"]
    return ["compress", model, "-o", output, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_torchrun_writes_the_bytes_of_one_process(inputs, method, tmp_path):
    for count in (1, 2, 4):
        code, errors = finish(start(count, *ask(inputs, method, tmp_path / str(count))))
        assert code == 0, errors
    one = hashes(tmp_path / "1")
    assert hashes(tmp_path / "2") == one
    assert hashes(tmp_path / "4") == one


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(p) for p in found.read_text().split()] if found.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_lost_process(inputs, victim, count, tmp_path):
    """One of two processes is killed after some blocks: the other ends with one line; any number of processes finishes."""
    assert finish(start(1, *ask(inputs, "svd-llm", tmp_path / "whole")))[0] == 0
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(2, *ask(inputs, "svd-llm", out))
    journal = partial / "resume" / "journal.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    ranks = {Path(f"/proc/{p}/environ").read_text().partition("\0RANK=")[2][0]: p for p in children(process.pid)}
    os.kill(ranks[str(victim)], signal.SIGKILL)
    code, errors = finish(process)
    assert code != 0 and not out.exists() and partial.exists()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert all("planish resume" in line for line in lines)  # none where torchrun ended the other one first
    assert "bug in planish" not in errors
    code, errors = finish(start(count, "resume", out))
    assert code == 0, errors
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_processes_that_cannot_join(inputs, tmp_path):
    """Variables of torchrun without torchrun: one line."""
    alone = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    for more, words in ((alone, "torchrun"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE")):
        code, errors = finish(start(1, *ask(inputs, "svd-llm", tmp_path / "out"), **more))
        assert code == 2 and words in errors and "Traceback" not in errors, errors
        assert not list(tmp_path.iterdir())
