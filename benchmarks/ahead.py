"""What reading the next block ahead gains: `planish compress` on a model that is not in the system's cache, with and without.

    python benchmarks/ahead.py                      # 12 blocks of hidden 2048, 1.3 GB; Linux
    python benchmarks/ahead.py --method flat-llm --turns 5 --folder DIR     # elsewhere: another disk

Every turn is a process of its own, one thread, after the model's pages were dropped; without = `posix_fadvise` is taken away before
planish is imported. Waited: seconds of the clock in which the process did not compute. A table is written to docs/tables/ahead.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from random_model import write_model

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "ahead.md"
WITHOUT = "import os; del os.posix_fadvise\n"
MAIN = "from planish.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="shortgpt")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the model goes (default: the temporary folder)")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    if not hasattr(os, "posix_fadvise"):
        sys.exit("this system cannot be asked to read ahead")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        model, text = Path(scratch) / "model", Path(scratch) / "text.npy"
        size = write_model(
            model, torch.bfloat16, vocab_size=8000, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128,
        )  # fmt: skip
        np.save(text, np.random.default_rng(0).integers(0, 8000, args.tokens))
        command = [
            "compress", model, "--keep", "0.8", "--method", args.method, "--calibration", text, "--n-samples", "2",
            "--seq-len", args.tokens // 2, "-o", Path(scratch) / "out", "--overwrite", "--no-cache",
        ]  # fmt: skip
        found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        for _ in range(args.turns):
            for kind, turns in found.items():
                drop(model)
                turns.append(run([*map(str, command)], WITHOUT if kind == "without" else ""))
                print(kind, *(f"{s:.2f}" for s in turns[-1]), flush=True)
    args.table.write_text(tabulate(found, args, size), encoding="utf-8")


def drop(folder: Path) -> None:
    """Let the system forget the files of a folder."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())  # what is not on the disk yet cannot leave the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str], before: str) -> tuple[float, float]:
    """(Seconds of the clock, of these without work of the process) of a planish command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        sys.exit("compress failed")
    return wall, wall - usage.ru_utime - usage.ru_stime


def tabulate(found: dict[str, list[tuple[float, float]]], args: argparse.Namespace, size: int) -> str:
    lines = [
        "# The next block, read ahead", "",
        "Written by `python benchmarks/ahead.py`. While a block is computed, the system is asked to read the next one's weights.",
        "Waited: seconds of the clock in which the process did not compute. The model's files were not in the system's cache.", "",
        f"{args.blocks} blocks of hidden {args.hidden}, {size / 1e9:.2f} GB in bf16, {args.method} at keep 0.8, {args.tokens} "
        f"tokens; {args.turns} turns, median (lowest – highest); {platform.machine()}, one thread.", "",
        "| next block | seconds | waited |", "|---|---|---|",
    ]  # fmt: skip
    for kind, turns in found.items():
        cells = (f"{statistics.median(x):.1f} ({min(x):.1f} – {max(x):.1f})" for x in zip(*turns, strict=True))
        lines.append(f"| {'read ahead' if kind == 'with' else 'not read ahead'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
