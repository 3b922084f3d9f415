"""What do several processes cost and gain? docs/tables/processes.md.

    python benchmarks/processes.py [--methods flat-llm,a3,auto] [--counts 1,2,4] [--windows 128] [--turns 2] [--write]

`planish.compress` under torchrun, one thread per process, on the CPU, counts in turns. Efficiency is the CPU seconds of one process
over those of all processes together: what is computed twice, and what talking costs, lowers it. "× faster" is what as many free
cores would give, whatever this machine's do: between two exchanges of all processes the slowest one counts, T₁ / Σ max. Imports are
left out of both and have a column of their own. Files that differ end with an error. `--write` keeps the table's rows of
methods that are not measured anew, where all else is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_model import write_model
from robustness import check
from structural import read_section, write_section

import planish
from planish.methods import list_methods

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "processes.md"
HEAD = """# Several processes

Written by `benchmarks/processes.py`: CPU seconds of all processes together, one thread each. Efficiency: one process's over them.
"× faster on free cores": between two exchanges of all processes the slowest one counts. Imports are left out.
"""


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    write_model(
        folder / "model", torch.float32, vocab_size=args.vocabulary, hidden_size=args.hidden, num_hidden_layers=args.blocks,
        intermediate_size=args.hidden * 11 // 4, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(1, args.vocabulary, args.windows * args.seq_len)
    np.save(folder / "ids.npy", ids)


def watch_exchanges(marks: list[float]) -> None:
    """Note this process's CPU seconds after every exchange of all processes."""

    def watched(exchange: Callable) -> Callable:
        def call(*words: Any, **more: Any) -> Any:
            found = exchange(*words, **more)
            marks.append(time.process_time())
            return found

        return call

    dist.broadcast_object_list = watched(dist.broadcast_object_list)


def run_rank(folder: Path, output: Path, method: str, args: argparse.Namespace) -> None:
    """One process's part; its CPU seconds, before and between exchanges, go to a file beside the output."""
    torch.set_num_threads(1)
    list_methods()  # imports all there is
    marks = [time.process_time()]
    watch_exchanges(marks)
    planish.compress(
        folder / "model", output=output, method=method, keep=args.keep, calibration=folder / "ids.npy",
        n_samples=args.windows, seq_len=args.seq_len, device="cpu",
    )  # fmt: skip
    marks.append(time.process_time())
    output.with_name(f"{output.name}.rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(marks))


def measure(folder: Path, output: Path, method: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one run by `count` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    options = [f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("windows", "seq-len", "keep")]
    own = ["--rank-of", str(folder), "--output", str(output), "--methods", method]
    line = [sys.executable, *torchrun, __file__, *own, *options]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    marks = np.array([json.loads(output.with_name(f"{output.name}.rank{r}.json").read_text()) for r in range(count)])
    parts = np.diff(marks, axis=1)
    return {
        "start": float(marks[:, 0].mean()), "cpu": float(parts.sum()), "slowest": float(parts.max(0).sum()),
    }  # fmt: skip


def show_scaling(folder: Path, args: argparse.Namespace) -> tuple[str, str]:
    """Heading and table."""
    write_inputs(folder, args)
    counts = [int(n) for n in args.counts.split(",")]
    rows = "| method | processes | CPU s, all together | efficiency | × faster on free cores | imports, CPU s each | files |\n"
    rows += f"{'|---' * 7}|\n"
    for method in args.methods.split(","):
        found: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
        for turn in range(args.turns):
            for n in counts:
                found[n].append(measure(folder, folder / f"{method}-{n}-{turn}", method, n, args))
                print(method, n, found[n][-1], flush=True)
                check(folder / f"{method}-{n}-{turn}", folder / f"{method}-{counts[0]}-0")
        for n in counts:
            pairs = list(zip(found[counts[0]], found[n], strict=True))
            cells = [spread([b["cpu"] for _, b in pairs], 1)]
            cells += [spread([a["cpu"] / b[way] for a, b in pairs], 2) for way in ("cpu", "slowest")]
            cells += [f"{statistics.median(b['start'] for _, b in pairs):.1f}"]
            rows += f"| {method} | {n} | {' | '.join(cells)} | the same |\n"
    what = f"{args.blocks} blocks of hidden {args.hidden}, {args.windows} × {args.seq_len} tokens, keep {args.keep}"
    text = (
        f"Random weights in fp32, gloo, {args.turns} turns, median (lowest – highest); {describe_machine()}.\n\n{rows}"
    )
    return what, text


def keep_rows(text: str, old: str, methods: list[str]) -> str:
    """A section with the rows that an old one has of other methods, before its own, where these were measured alike."""
    start, head, rows = re.match(r"(.*?\n\n)(\|.*?\n\|.*?\n)(.*)", text, re.DOTALL).groups()
    known = [line for line in old.splitlines() if line.startswith("| ") and line.split("|")[1].strip() not in methods]
    return start + head + "".join(f"{r}\n" for r in known[1:] if start + head in f"{old}\n") + rows


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def describe_machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="flat-llm,a3,auto")
    parser.add_argument("--counts", default="1,2,4", help="the first is what the others are compared with")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.output, args.methods, args)
        return
    with tempfile.TemporaryDirectory(prefix="planish-processes-") as folder:
        title, text = show_scaling(Path(folder), args)
    print(f"## {title}\n\n{text}", flush=True)
    if args.write:
        write_section(TABLE, HEAD, title, keep_rows(text, read_section(TABLE, title), args.methods.split(",")).rstrip())


if __name__ == "__main__":
    main()
