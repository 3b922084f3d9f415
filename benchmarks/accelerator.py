"""Seconds per block and peak memory on an accelerator, for blocks of an 8 B model; writes docs/tables/accelerator.md.

    python benchmarks/accelerator.py                                        # two blocks, 128 × 2048 tokens
    python benchmarks/accelerator.py --methods auto --solve-on-cpu          # nothing is solved on the device
    python benchmarks/accelerator.py --all --table FILE                     # for a machine that is lent for a quarter of an hour
    python benchmarks/accelerator.py --expect                               # no device: what --all should find, by data sheets

--all: the device's rates, then flat-llm, a3 and auto, then a3 and auto with solving on the CPU, beside what is aimed at
and the floor that the rates make: one forward and, for auto, one backward pass (bfloat16), Grams of every linear's input and, for
auto, of every output's gradient (float64). A section is put above what the page has; nothing of it is lost, and it is written
again after every case, so that a run that is cut short leaves what it measured. Cases took up to 30 s per block where
factorisations were the device's and up to 90 s where they were the CPU's: two blocks end within ten minutes.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_model import write_model

import planish

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "accelerator.md"
AIMS = {"flat-llm": 6.0, "a3": 6.0, "auto": 15.0}  # seconds per block of 4096 / 14336 on one H100 or H200
HEAD = """# On an accelerator

Written by `benchmarks/accelerator.py`: random weights, seconds per block of one run, reading and writing included.
"""
# FLOP/s in bf16 (dense, 60 % of the data sheet's) and of sums as exact as fp64's: by tensor cores in fp64 (80 %), or by digits,
# of which `planish.slices.PRODUCTS` in TF32 make one product
SHEETS = {"H200": (6.0e14, 5.4e13), "RTX 4090": (1.0e14, 8.0e13 / 21), "L4": (3.6e13, 3.0e13 / 21)}
BEFORE = {
    "flat-llm": "28.5: solving 13.5, sums 6.5, passes 5.5",
    "a3": "18.8: solving 7.9, sums 6.6, passes 1.7",
    "auto": "61.1: solving 17.9, passes 19.8, sums 10.5, frontiers 9.1",
}  # of the H100's rows below
EXPECTED = """Expected, not measured: what passes and sums of one block of 4096 / 14336 channels cannot do without
(`python benchmarks/accelerator.py --expect`), by the data sheets' rates. `--all` should find that

- sums take their floor: they are formed where the activations are, in fp64 by tensor cores, on cards without those by digits;
- passes take two to three times theirs, for attention and element-wise work are not in it;
- solving is what is left of the aim: units are solved on the device, one after the other. What was measured before had flat-llm's
  and a3's feed-forwards solved on the CPU, and a sixth of the numbers of auto's solving made there ([count](solving.md)).
  If an aim is missed it is missed here, and the rows "solved on the CPU" say by how much.
"""
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
    parser.add_argument("--all", action="store_true", help="rates, and every case beside what is aimed at")
    parser.add_argument("--expect", action="store_true", help="write what is expected of some devices, and end")
    parser.add_argument("--rows", type=Path, help="append results to this file of JSON lines")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.expect:
        return write_expected(args)
    cases = [(m, args.solve_on_cpu) for m in args.methods.split(",")]
    if args.all:
        cases = [("flat-llm", False), ("a3", False), ("auto", False), ("a3", True), ("auto", True)]
    rates = measure_rates(torch.device(args.device), args.hidden) if args.all else {}
    print(json.dumps(rates), flush=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    title = (
        f"{args.blocks} blocks of {args.hidden} / {args.intermediate} channels, {args.n_samples} × {args.seq_len} tokens, keep "
        f"{args.keep:g}, {name}, {os.cpu_count()} cores."
    )
    old = args.table.read_text(encoding="utf-8").removeprefix(HEAD) if args.table.exists() else ""
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()] if args.rows else []
    with tempfile.TemporaryDirectory() as scratch:
        for row in measure(args, cases, Path(scratch)):
            rows.append(row)
            args.table.write_text(HEAD + write_section(title, rows, args, rates) + old, encoding="utf-8")


def write_expected(args: argparse.Namespace) -> None:
    """A section with the floors that data sheets' rates make, in the place of an earlier one."""
    lines = [
        EXPECTED,
        "| method | aim | " + " | ".join(f"floor, {d}" for d in SHEETS) + " | last measured: seconds, of which |",
    ]
    lines.append("|---" * (len(SHEETS) + 3) + "|")
    for method, aim in AIMS.items():
        floors = [
            f"{find_floor(args, method, dict(zip(('bfloat16', 'float64'), r, strict=True))):.1f}"
            for r in SHEETS.values()
        ]
        lines.append(f"| {method} | {aim:.0f} | {' | '.join(floors)} | {BEFORE[method]} |")
    text = args.table.read_text(encoding="utf-8")
    head, _, rest = text.partition(EXPECTED.splitlines()[0])
    if rest:  # up to the next section
        at = rest.find("\n\n", rest.index("|---"))
        rest = rest[at + 2 :] if at >= 0 else ""
    else:
        head, rest = HEAD, text.removeprefix(HEAD).lstrip()
    args.table.write_text(head.rstrip() + "\n\n" + "\n".join(lines) + "\n\n" + rest, encoding="utf-8")


def measure(args: argparse.Namespace, cases: list[tuple[str, bool]], scratch: Path) -> Iterator[dict[str, Any]]:
    """A row per case (method, whether nothing is solved on the device)."""
    from planish.solvers import offload

    large, model = offload.LARGE, scratch / "model"
    write_model(
        model, vocab_size=32768, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 128, num_key_value_heads=max(args.hidden // 512, 1),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(32768, (args.n_samples * args.seq_len,), generator=draw).numpy()
    options = {"n_samples": args.n_samples, "seq_len": args.seq_len, "device": args.device, "calibration": ids}
    for method, on_cpu in cases:
        offload.LARGE = 1 << 60 if on_cpu else large
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        r = planish.compress(model, method=method, keep=args.keep, output=scratch / "out", overwrite=True, **options)
        wall = time.perf_counter() - start
        phases: dict[str, float] = {}
        for name, s in r.seconds.items():
            phases[name.partition(" ")[0]] = phases.get(name.partition(" ")[0], 0.0) + s
        row = {
            "method": method + (", solved on the CPU" if on_cpu else ""), "per_block": wall / args.blocks,
            "vram": torch.cuda.max_memory_allocated() if args.device == "cuda" else 0, "rss": r.peak_rss_bytes,
            "phases": {p: phases.get(p, 0.0) / args.blocks for p in PHASES},
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if args.rows:
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def measure_rates(device: torch.device, n: int) -> dict[str, float]:
    """FLOP/s of n × n products by dtype, bytes/s to the device and back, seconds of an eigenproblem (n) there and on the CPU."""
    square = torch.randn(n, n, device=device)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = square.to(dtype)
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / clock(lambda x=x: x @ x, device)
    host = torch.empty(1 << 26, pin_memory=device.type == "cuda")
    there = host.to(device)
    rates["bytes there"] = host.nbytes / clock(lambda: there.copy_(host), device)
    rates["bytes back"] = host.nbytes / clock(lambda: host.copy_(there), device)
    gram = (square @ square.T).double()
    rates["eigh"] = clock(lambda: torch.linalg.eigh(gram), device, 1)
    rates["eigh, CPU"] = clock(lambda: torch.linalg.eigh(gram.cpu()), device, 1)
    return rates


def clock(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Least seconds of some runs, after one that is not counted."""
    taken = []
    for n in range(times + (times > 1)):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken += [time.perf_counter() - start] * (n > 0 or times == 1)
    return min(taken)


def find_floor(args: argparse.Namespace, method: str, rates: dict[str, float]) -> float:
    """Seconds that a block's passes and Grams, on and above their diagonals, take at these rates."""
    h, m, kv, tokens = args.hidden, args.intermediate, max(args.hidden // 512, 1) * 128, args.n_samples * args.seq_len
    passes = 2 * tokens * (2 * h * h + 2 * h * kv + 3 * h * m) * (3 if method == "auto" else 1)
    inputs, outputs = 3 * h * h + m * m, (3 * h * h + 2 * kv * kv + 2 * m * m) * (method == "auto")
    return passes / rates["bfloat16"] + tokens * (inputs + outputs) / rates["float64"]


def describe_rates(rates: dict[str, float]) -> str:
    products = ", ".join(f"{rates[n] / 1e12:.3g} ({n})" for n in ("bfloat16", "float32", "float64"))
    return (
        f"Rates: {products} TFLOP/s; {rates['bytes there'] / 1e9:.3g} GB/s there, {rates['bytes back'] / 1e9:.3g} back; an "
        f"eigenproblem of this width {rates['eigh']:.3g} s, on the CPU {rates['eigh, CPU']:.3g} s."
    )


def write_section(title: str, rows: list[dict[str, Any]], args: argparse.Namespace, rates: dict[str, float]) -> str:
    more = ("aim", "floor") if rates else ()
    lines = ["", title, *(["", describe_rates(rates)] if rates else []), ""]
    lines += ["| " + " | ".join(("method", "seconds per block", *more, *PHASES, "VRAM GB", "RAM GB")) + " |"]
    lines += ["|---" * (len(PHASES) + len(more) + 4) + "|"]
    for r in rows:
        method = r["method"].partition(",")[0]
        beside = [f"{AIMS[method]:.1f}", f"{find_floor(args, method, rates):.1f}"] if rates else []
        cells = [f"{r['per_block']:.1f}", *beside, *(f"{r['phases'][p]:.1f}" for p in PHASES)]
        lines.append(f"| {r['method']} | {' | '.join(cells)} | {r['vram'] / 1e9:.1f} | {r['rss'] / 1e9:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
