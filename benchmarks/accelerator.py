"""Seconds per block and peak memory on an accelerator, for blocks of an 8 B model; writes docs/tables/accelerator.md.

    python benchmarks/accelerator.py                                        # two blocks, 128 × 2048 tokens
    python benchmarks/accelerator.py --methods auto --solve-on-cpu          # large factorisations stay on the CPU

Weights are random, text is random: times do not depend on what is in them. What is per model and not per block (embedding,
head, writing what is outside) is small beside it. A run of all 32 blocks takes as many times longer as it has more blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch
from random_model import write_model

import planish

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "accelerator.md"
PHASES = ("statistics", "gradients", "stream", "sums", "frontiers", "solve", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="flat-llm,a3,svd-llm,auto")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--n-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--solve-on-cpu", action="store_true")
    parser.add_argument("--rows", type=Path, help="append results to this file of JSON lines")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.solve_on_cpu:
        from planish.solvers import offload

        offload.LARGE = 1 << 60
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        write_model(
            model, vocab_size=32768, hidden_size=args.hidden, intermediate_size=args.intermediate,
            num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 128, num_key_value_heads=args.hidden // 512,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(32768, (args.n_samples * args.seq_len,), generator=draw).numpy()
        options = {"n_samples": args.n_samples, "seq_len": args.seq_len, "device": args.device, "calibration": ids}
        for method in args.methods.split(","):
            start = time.perf_counter()
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            r = planish.compress(model, method=method, keep=args.keep, output=out, overwrite=True, **options)
            wall = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
            phases: dict[str, float] = {}
            for name, s in r.seconds.items():
                phases[name.partition(" ")[0]] = phases.get(name.partition(" ")[0], 0.0) + s
            row = {
                "method": method + (", solved on the CPU" if args.solve_on_cpu else ""),
                "per_block": wall / args.blocks, "vram": peak, "rss": r.peak_rss_bytes,
                "phases": {p: phases.get(p, 0.0) / args.blocks for p in PHASES},
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.rows:
                with args.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if args.rows:
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    title = (
        f"{args.blocks} blocks of {args.hidden} / {args.intermediate} channels, {args.n_samples} × {args.seq_len} tokens, keep "
        f"{args.keep:g}, {name}, {os.cpu_count()} cores."
    )
    args.table.write_text(write_page(title, rows), encoding="utf-8")


def write_page(title: str, rows: list[dict]) -> str:
    lines = [
        "# On an accelerator", "",
        "Written by `benchmarks/accelerator.py`: random weights, seconds per block of one run, reading and writing included.", "",
        title, "",
        "| method | seconds per block | " + " | ".join(PHASES) + " | VRAM GB | RAM GB |",
        "|---" * (len(PHASES) + 4) + "|",
    ]  # fmt: skip
    for r in rows:
        cells = [f"{r['phases'][p]:.1f}" for p in PHASES]
        lines.append(
            f"| {r['method']} | {r['per_block']:.1f} | {' | '.join(cells)} | {r['vram'] / 1e9:.1f} | {r['rss'] / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
