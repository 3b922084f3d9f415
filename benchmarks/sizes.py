"""Bytes against nats: rounding alone, cutting alone, and both under one size; writes docs/tables/sizes.md and sizes.csv.

    python benchmarks/sizes.py                                               # the embedded model
    python benchmarks/sizes.py --model FOLDER --name NAME --text FILE --method auto   # FILE is split: 3/4 to calibrate
    python benchmarks/sizes.py ... --held FILE                               # all of --text for calibration

bits: all weights, the blocks' linears in 8, 4, 3, 2 bits. llama.cpp (`--target gguf`): the same types by its own quantiser with
the mean squares of the inputs as importance matrix, without feedback or fit, in the basis that is there. cuts: 16 bits, fewer
weights. both: `--bits auto` at sizes between and below those of the types. plan (`--plans 3@0.7`, bits and keep): one of those that
compete there, for models of which a whole contest takes too long. Nats: mean KL(dense ‖ result) on text that nothing was
calibrated on, its standard error, and the excess of the loss. The table is resumed: a row that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from book import append_row
from safetensors import safe_open

import planish
from planish.errors import PlanishError
from planish.rounding.round import round_matrix

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, split_text

TABLE = ROOT / "docs" / "tables" / "sizes.md"
BITS = ("8", "4", "3", "2")
PLAIN = ("bits", "llama.cpp")  # where no method cuts
FIELDS = ("model", "method", "curve", "asked", "bytes", "kl", "stderr", "excess", "plan", "cpu_seconds", "protocol")
HEAD = """# Bytes against nats

Written by `benchmarks/sizes.py` from sizes.csv. bits: all weights in so many bits (integers in groups of up to 64 with zero points,
error feedback, fitted to unrounded inputs). cuts: so many of the blocks' weights; counted in 16 bits where the model is stored
in 32. both: `--bits auto --max-bytes`, the plan that it chose. KL: of the next token's distribution from the dense model's, nats
per token on text that nothing was calibrated on, with its standard error; excess: of the loss there. plan: one of those that
compete under `--bits auto --max-bytes`, bits and keep. Everything that is no linear of a block is in 16 bits.
For llama.cpp (gguf): its types, embedding and head in 8 bits; llama.cpp: its own quantiser with an importance matrix.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate on (default: builtin)")
    parser.add_argument("--held", type=Path, help="text to measure on (default: the last quarter of --text)")
    parser.add_argument("--method", default="flat-llm", help="what cuts")
    parser.add_argument("--target", default="any", help="any: packed integers; gguf: types of llama.cpp")
    parser.add_argument("--bits", default=",".join(BITS), help="of all weights")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="of the text that is measured on")
    parser.add_argument("--curves", default="bits,cuts,both", help="which to measure; bits are needed for both")
    parser.add_argument("--keeps", default="0.9,0.8,0.65,0.5,0.35")
    parser.add_argument(
        "--shares", default="0.85,0.7,0.6", help="sizes of both, beside the types' own: shares of the smallest"
    )
    parser.add_argument("--sizes", help="bytes of both, instead of these")
    parser.add_argument("--plans", default="", help="these alone, like 3@0.7,2.7@1: bits and keep")
    parser.add_argument(
        "--cache", action="store_true", help="keep statistics and plain types for the next row ($PLANISH_CACHE)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only-table", action="store_true", help="write the table of what the CSV has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    book = args.table.with_suffix(".csv")
    if args.only_table:
        args.table.write_text(tabulate(read(book)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        fit, held = split_text(None if args.held else args.text, Path(scratch))
        args.fit, args.held = (str(args.text or "builtin"), str(args.held)) if args.held else (fit, held)
        measure_all(args, book)
    args.table.write_text(tabulate(read(book)))


def measure_all(args: argparse.Namespace, book: Path) -> None:
    curves, sizes = args.curves.split(","), {}
    for plan in filter(None, args.plans.split(",")):
        bits, _, keep = plan.partition("@")
        measure(args, book, "plan", plan, keep=float(keep), bits=bits)
    if args.plans:
        return
    for bits in args.bits.split(","):
        sizes[bits] = int(measure(args, book, "bits", bits, keep=1, bits=bits)["bytes"])
        if args.target == "gguf":
            measure(args, book, "llama.cpp", bits, keep=1, bits=bits)
    for keep in args.keeps.split(",") if "cuts" in curves else ():
        measure(args, book, "cuts", keep, keep=float(keep))
    between = [(a + b) // 2 for a, b in zip([*sizes.values()], [*sizes.values()][1:], strict=False)]
    below = [int(float(s) * min(sizes.values())) for s in args.shares.split(",")]
    wanted = map(int, args.sizes.split(",")) if args.sizes else sorted([*sizes.values(), *between, *below])
    for size in wanted if "both" in curves else ():
        measure(args, book, "both", str(size), max_bytes=size, bits="auto")


def read(book: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(book.open())) if book.exists() else []


def measure(args: argparse.Namespace, book: Path, curve: str, asked: str, **options: Any) -> dict[str, Any]:
    """One row: from the CSV, or made, measured and added to it."""
    protocol = f"{args.n_samples} × {args.seq_len} tokens; {args.windows} windows"
    protocol += "; gguf" if args.target == "gguf" else ""
    key = {"model": args.name, "method": args.method, "curve": curve, "asked": asked, "protocol": protocol}
    for row in read(book):
        if all(row[n] == v for n, v in key.items() if curve not in PLAIN or n != "method"):  # where no method cuts
            return row
    start, row = time.process_time(), {**dict.fromkeys(FIELDS, ""), **key}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        out = Path(scratch) / "out"
        if curve == "llama.cpp":
            stack.enter_context(patch("planish.rounding.blocks.balance", lambda *a: []))
            stack.enter_context(patch("planish.walks.quantise.anchor_block", lambda *a: a[5]))  # inputs beside, unused
            stack.enter_context(patch("planish.walks.quantise.round_matrix", partial(round_matrix, feedback=False)))
        try:
            done = planish.compress(
                args.model, output=out, method=args.method, calibration=args.fit, n_samples=args.n_samples,
                seq_len=args.seq_len, cache=args.cache, ladder=False, target=args.target, **options,
            )  # fmt: skip
            found = planish.compare(out, args.model, text=args.held, seq_len=args.seq_len, max_windows=args.windows)
            excess = found.model.nll - found.dense.nll
            chosen = [c for c in done.choices if c["chosen"]]
            plan = "".join(f"{c['bits']} bits, keep {c['keep']:g}" for c in chosen)
            size = done.bytes_after // (2 if curve == "cuts" and in_fp32(out) else 1)
            row |= {"bytes": size, "kl": f"{found.agreement.kl:.5f}",
                    "stderr": f"{found.agreement.kl_stderr:.5f}", "excess": f"{excess:.5f}", "plan": plan}  # fmt: skip
        except PlanishError as error:
            row["plan"] = f"refused: {error}"
    row["cpu_seconds"] = f"{time.process_time() - start:.1f}"
    append_row(book, FIELDS, row)
    print(*(row[n] for n in ("curve", "asked", "bytes", "kl", "excess", "plan", "cpu_seconds")), flush=True)
    return row


def in_fp32(folder: Path) -> bool:
    """Whether a model that was stored in fp32 was cut: it is counted in 16 bits, which everything beside it is in."""
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as file:
        names = file.keys()
        return all(file.get_slice(name).get_dtype() == "F32" for name in names)


def tabulate(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for model, method, protocol in dict.fromkeys((r["model"], r["method"], r["protocol"]) for r in rows):
        alike = [r for r in rows if (r["model"], r["protocol"]) == (model, protocol)]
        own = [r for r in alike if r["method"] == method or r["curve"] in PLAIN]
        lines += [f"## {model}, cuts by {method} ({protocol})\n", "| bytes | curve | asked | KL | ± | excess | plan |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for r in sorted(own, key=lambda r: -int(r["bytes"] or 0)):
            asked = f"{int(r['asked']):,}" if r["curve"] == "both" else r["asked"]
            if not r["bytes"]:
                lines.append(f"| – | {r['curve']} | {asked} | | | | {r['plan']} |")
                continue
            lines.append(
                f"| {int(r['bytes']):,} | {r['curve']} | {asked} | {float(r['kl']):.4f} | {float(r['stderr']):.4f} | "
                f"{float(r['excess']):.4f} | {r['plan']} |"
            )
        lines += ["", tell(own), ""]
    return "\n".join(lines)


def tell(rows: list[dict[str, str]]) -> str:
    """Whether both is nowhere above what the others have at no more bytes, within twice the standard error."""
    done = [r for r in rows if r["bytes"]]
    worst, above = -math.inf, []
    for r in (r for r in done if r["curve"] == "both"):
        others = [o for o in done if o["curve"] != "both" and int(o["bytes"]) <= int(r["asked"])]
        best = min(others, key=lambda o: float(o["kl"]), default=None)
        if best is not None:
            gap = float(r["kl"]) - float(best["kl"])
            worst = max(worst, gap)
            above += [r["asked"]] if gap > 2 * math.hypot(float(r["stderr"]), float(best["stderr"])) else []
    where = f"above the other curves by more than two standard errors at {', '.join(above)} bytes" if above else (
        "nowhere above the other curves by more than two standard errors")  # fmt: skip
    if worst > -math.inf:
        return f"Both together is {where}; at most {worst:.4f} nats above."
    made = any(r["curve"] == "both" for r in done)
    return "Of these sizes no other curve has a model." if made else "Not measured: both."


if __name__ == "__main__":
    main()
