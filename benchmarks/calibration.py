"""Seconds of every phase of `auto` beside flat-llm's on the same text; writes docs/tables/calibration.md.

    python benchmarks/calibration.py                               # the embedded model, keep 0.8
    python benchmarks/calibration.py --repeats 1 --n-samples 16    # quick
    python benchmarks/calibration.py --model FOLDER --text FILE --name NAME

Methods take turns, so that a busy machine slows all of them; a cell is the median over turns, the ratio the median of the
turns' ratios. "Calibration" is everything that runs calibration text or takes sums over it (statistics, gradients, search
and the stream between solves); frontiers, choosing ranks, solving and writing are stated beside it. Text is tokenised once, before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import load_tokens

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "calibration.md"
CALIBRATION = ("statistics", "gradients", "search", "stream", "sums")
HEAD = """# Time of calibration

Written by `benchmarks/calibration.py`. Seconds; calibration = everything that runs text through blocks (statistics, gradients,
search, stream); CPU = the process's own seconds, which other work on the machine changes less. The aim is at most three times
flat-llm's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--methods", default="flat-llm,auto,auto:refit_share=0.25,auto:units=structural")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", type=Path, default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    tokens = load_tokens(args.text, AutoTokenizer.from_pretrained(args.model), bos="once").tokens.numpy()
    names = args.methods.split(",")
    turns: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.repeats):
            turn = {}
            for name in names:
                method, *settings = name.split(":")
                start = time.process_time()
                turn[name] = planish.compress(
                    args.model, method=method, settings=dict(s.split("=") for s in settings), keep=args.keep,
                    calibration=tokens, sampling="random", n_samples=args.n_samples, seq_len=args.seq_len,
                    output=Path(scratch) / "out", overwrite=True,
                ).seconds  # fmt: skip
                turn[name]["cpu"] = time.process_time() - start
                print(name, {k: round(v, 1) for k, v in turn[name].items()}, flush=True)
            turns.append(turn)
    phases = sorted({p.partition(" ")[0] for t in turns for s in t.values() for p in s} - {"total", "cpu"})
    phases.sort(key=lambda p: (p not in CALIBRATION, p))
    lines = ["| phase | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for phase in phases:
        lines.append(f"| {phase} | " + " | ".join(f"{median(turns, n, phase):.1f}" for n in names) + " |")
    for title, wanted in (
        ("**calibration**", CALIBRATION),
        ("**all phases**", tuple(phases)),
        ("**CPU, all**", ("cpu",)),
    ):
        cells = []
        for n in names:
            ratio = statistics.median(add(t[n], wanted) / add(t[names[0]], wanted) for t in turns)
            cells.append(f"{statistics.median(add(t[n], wanted) for t in turns):.1f} (× {ratio:.2f})")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    title = f"## {args.name}, keep {args.keep:g}"
    about = f"{args.n_samples} × {args.seq_len} tokens, {args.threads} thread(s), median of {args.repeats}."
    old = args.tables.read_text(encoding="utf-8") if args.tables.exists() else HEAD
    head, *sections = old.split("\n## ")
    sections = [s.strip() for s in sections if not f"## {s}".startswith(title + "\n")]
    sections.append("\n".join([title, "", about, "", *lines]).removeprefix("## "))
    args.tables.parent.mkdir(parents=True, exist_ok=True)
    args.tables.write_text("\n\n".join([head.strip(), *(f"## {s}" for s in sections)]) + "\n", encoding="utf-8")


def add(seconds: dict[str, float], phases: tuple[str, ...]) -> float:
    return sum(s for p, s in seconds.items() if p.partition(" ")[0] in phases)


def median(turns: list[dict[str, dict[str, float]]], name: str, phase: str) -> float:
    return statistics.median(add(t[name], (phase,)) for t in turns)


if __name__ == "__main__":
    main()
