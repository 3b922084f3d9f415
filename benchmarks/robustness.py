"""Killed at random moments, run by several processes, fed broken input: what came out; docs/tables/robustness.md.

    python benchmarks/robustness.py                       # all three, some minutes
    python benchmarks/robustness.py kills --kills 100     # one of kills, processes, fuzz; the others' sections stay

Kills: the command line runs in a child process that is ended by SIGKILL after a random share of the time an undisturbed run
takes; `planish resume` (killed in the same way) goes on until a run survives; then every file is compared with the
undisturbed run's. Processes: `torchrun -m planish compress` with 2 and 4 processes against one process. Fuzz: the tests
that feed broken files and words, with more examples. One thread per process. Any difference ends with an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from random_model import write_model

from planish.cli import main as planish

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "robustness.md"
METHODS = ("flat-llm", "svd-llm", "erc-svd", "auto", "subfit", "a3")
BLOCKS = 6
MOMENTS = ("before a block is finished", "between blocks", "after the last block")
CLOCK = (
    "seconds",
    "peak_rss_bytes",
    "output",
)  # of the manifest: what a clock and the system say, and the folder's name


def write_inputs(folder: Path) -> list[object]:
    """A random model and token ids in `folder`; the words that `compress` needs besides method and output."""
    model, ids = folder / "model", folder / "ids.npy"
    write_model(
        model, torch.float32, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    np.save(ids, np.random.default_rng(0).integers(1, 97, 700 * 64))
    words = ["compress", model, "--keep", 0.7, "--calibration", ids, "--n-samples", 700, "--seq-len", 64, "--no-cache"]
    return [*words, "--json"]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, of the manifest without what the clock says."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "planish.json":
            manifest = json.loads(data)
            for key in CLOCK:
                del manifest["result"][key]
            data = json.dumps(manifest).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def check(folder: Path, whole: Path) -> int:
    """How many files are the same; an error where one is not."""
    found, expected = hashes(folder), hashes(whole)
    if found != expected:
        names = sorted(n for n in found | expected if found.get(n) != expected.get(n))
        raise SystemExit(f"{folder.name} differs from {whole.name} in {', '.join(names)}")
    return len(found)


def fork(*words: object) -> int:
    """`planish …` in a child process that has everything imported already; its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["planish", *map(str, words)]
    code = 1
    try:
        planish()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def find_moment(output: Path) -> str:
    """How far a killed run had come, by what is on disk."""
    if (output / "planish.json").exists():
        return MOMENTS[2]
    journal = output.with_name(output.name + ".partial") / "resume" / "journal.jsonl"
    lines = journal.read_text().count("\n") if journal.exists() else 0
    return MOMENTS[0] if not lines else MOMENTS[1] if lines < BLOCKS else MOMENTS[2]


def kill_often(folder: Path, words: list[object], method: str, kills: int, say: Callable[[str], None]) -> None:
    """Runs of one method until `kills` of them have been killed; every one that ends must give the whole run's files."""
    whole, out = folder / f"{method}-whole", folder / f"{method}-out"
    start = time.perf_counter()
    assert wait(fork(*words, "--method", method, "-o", whole)) == 0, f"{method} fails undisturbed"
    took = time.perf_counter() - start
    draw, moments, files, runs = random.Random(method), Counter(), 0, 0
    while sum(moments.values()) < kills:
        child = fork(*words, "--method", method, "-o", out)
        while True:
            time.sleep(draw.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"{method}: exit code {code}")
            moments[find_moment(out)] += 1
            begun = (out.with_name(out.name + ".partial") / "resume" / "request.json").exists()
            finished = (out / "planish.json").exists()
            if finished and not (out / "resume").exists():  # killed with nothing left to do
                break
            again = (
                ["resume", out, "--json"]
                if begun or finished
                else [*words, "--method", method, "-o", out, "--overwrite"]
            )
            child = fork(*again)
        files, runs = check(out, whole), runs + 1
        subprocess.run(["rm", "-r", str(out)], check=True)
    cells = " | ".join(str(moments[m]) for m in MOMENTS)
    say(f"| {method} | {sum(moments.values())} | {cells} | {runs} | {files} of {files} |")


def show_kills(folder: Path, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    words = write_inputs(folder)
    say(f"A random model of {BLOCKS} blocks, 44,800 tokens; runs are killed again while they are being resumed.")
    say("")
    say("| method | kills | " + " | ".join(MOMENTS) + " | runs that ended | files the same |")
    say("|---|---|---|---|---|---|---|")
    for method in METHODS:
        kill_often(folder, words, method, args.kills, say)


def show_processes(folder: Path, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    words = write_inputs(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    say("SHA-256 of all files together (of the manifest without times), first twelve digits.")
    say("")
    say("| method | 1 process | 2 processes | 4 processes | same |")
    say("|---|---|---|---|---|")
    for method in METHODS:
        found = []
        for count in (1, 2, 4):
            out = folder / f"{method}-{count}"
            torchrun = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
            )
            line = [sys.executable, *torchrun, "-m", "planish", *map(str, words), "--method", method, "-o", str(out)]
            subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            check(out, folder / f"{method}-1")
            found.append(hashlib.sha256(json.dumps(hashes(out)).encode()).hexdigest()[:12])
        say(f"| {method} | " + " | ".join(found) + " | yes |")


def show_fuzz(folder: Path, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-show-statistics",
        "--timeout=0",
    ]
    files = ["tests/test_fuzz.py", "tests/test_recipes.py"]
    environment = os.environ | {"PLANISH_FUZZ": str(args.fuzz), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    say(f"`PLANISH_FUZZ={args.fuzz} pytest {' '.join(files)}`: every example ends with a right result or one line.")
    say("")
    say("| what is broken | examples | failures |")
    say("|---|---|---|")
    total = 0
    for section in re.split(r"^(?=tests/\w+\.py::test_)", done.stdout, flags=re.M)[1:]:
        name = section.partition("::test_")[2].partition(":")[0]
        counts = re.findall(r"(\d+) passing[^,]*, (\d+) failing", section)
        passing, failing = (sum(int(c[i]) for c in counts) for i in (0, 1))
        if not passing or failing:
            raise SystemExit(f"{name}: {passing} passing and {failing} failing examples")
        total += passing
        say(f"| {name.replace('_', ' ')} | {passing} | {failing} |")
    say(f"| all | {total} | 0 |")


SECTIONS = {
    "kills": ("Killed at random moments, then resumed", show_kills),
    "processes": ("One, two and four processes", show_processes),
    "fuzz": ("Broken and hostile input", show_fuzz),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", choices=[*SECTIONS, []], help="all by default")
    parser.add_argument("--kills", type=int, default=25, help="per method")
    parser.add_argument("--fuzz", type=int, default=200, help="examples per test")
    args = parser.parse_args()
    torch.set_num_threads(1)
    old = TABLE.read_text(encoding="utf-8").split("\n## ")[1:] if TABLE.exists() else []
    texts = {title: text for title, _, text in (s.partition("\n") for s in old)}
    for part in args.part or SECTIONS:
        title, show = SECTIONS[part]
        lines: list[str] = []

        def say(line: str) -> None:
            print(line, flush=True)
            lines.append(line)  # noqa: B023

        with tempfile.TemporaryDirectory(prefix="planish-robustness-") as folder:
            show(Path(folder), args, say)
        texts[title] = "\n" + "\n".join(lines) + "\n"
        page = (
            "# Interrupted, spread over processes, fed broken input\n\nMeasured by `python benchmarks/robustness.py`.\n"
        )
        page += "".join(f"\n## {title}\n{texts[title].rstrip()}\n" for title, _ in SECTIONS.values() if title in texts)
        TABLE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
