"""Cut models in 8 bits and fewer, in the basis that planish chooses; writes docs/tables/gauges.md and gauges.csv.

    python benchmarks/gauges.py                                          # the embedded model
    python benchmarks/gauges.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate
    python benchmarks/gauges.py --evaluate FILE --cache ...              # another text; statistics are kept and used again

Every linear of the blocks is rounded as `planish compress --bits` does it, embedding and head stay in 16 bits. D: nats per token
more than the dense model in 16 bits. "own basis": without a choice of basis, in the one that the cut has left (--own). The table is
resumed: a row that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from book import append_row
from transformers import AutoTokenizer

import planish

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, split_text

TABLE = ROOT / "docs" / "tables" / "gauges.md"
FIELDS = ("model", "method", "keep", "bits", "basis", "protocol", "ppl", "nats", "bits_per_weight", "cpu_seconds")
HEAD = """# The basis that weights are rounded in

Written by `benchmarks/gauges.py` from gauges.csv. Cells: D, nats per token more than the dense model in 16 bits on the same
windows, log(perplexity / dense perplexity); all linears of the blocks rounded to integers in groups of at most 64 with zero points.
Ranks are such that groups divide them: the cut in 8 bits, which cost next to nothing, is what fewer bits are to be compared with.
"own basis": the one that the cut has left; else the one that planish chooses. A dash was not measured.
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument("--evaluate", type=Path, help="another text to evaluate on; all of --text is for calibration")
    parser.add_argument("--methods", default="dense,flat-llm,a3,svd-llm,auto")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--bits", default="8,4,3")
    parser.add_argument("--own", action="store_true", help="measure roundings without a choice of basis too")
    parser.add_argument(
        "--cache", action="store_true", help="keep what calibration finds, for the next bits of a method"
    )
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only-table", action="store_true", help="write the table of what the CSV has")
    return parser.parse_args()


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.out = args, scratch / "out"
        self.book = args.table.with_suffix(".csv")
        self.protocol = f"{args.n_samples} × {args.seq_len} tokens; {args.windows} windows"
        fit, test = split_text(None if args.evaluate else args.text, scratch)
        self.fit, self.test = (str(args.text), str(args.evaluate)) if args.evaluate else (fit, test)

    def measure(self, method: str, bits: str, basis: str) -> None:
        """One row of the CSV, unless it has it."""
        args, whole = self.args, method == "dense"
        key = {"model": args.name, "method": method, "keep": "1" if whole else f"{args.keep:g}", "bits": bits,
               "basis": basis, "protocol": self.protocol}  # fmt: skip
        if any(all(row[n] == v for n, v in key.items()) for row in read(self.book)):
            return
        start = time.process_time()
        with patch("planish.rounding.blocks.balance", lambda *a: []) if basis == "own" else nullcontext():
            done = planish.compress(
                args.model, output=self.out, overwrite=True, method="flat-llm" if whole else method,
                keep=1.0 if whole else args.keep, bits=bits, calibration=self.fit, n_samples=args.n_samples,
                seq_len=args.seq_len, cache=args.cache,
            )  # fmt: skip
        seconds = time.process_time() - start
        found = planish.evaluate(
            planish.load(self.out, dtype="float32"), self.test, args.seq_len, max_windows=args.windows,
            tokenizer=AutoTokenizer.from_pretrained(self.out),
        )  # fmt: skip
        rounding = done.rounding or {"nats": 0.0, "bits_per_weight": 16.0}
        row = key | {"ppl": f"{found.perplexity:.4f}", "nats": f"{rounding['nats']:.4f}",
                     "bits_per_weight": f"{rounding['bits_per_weight']:.3f}", "cpu_seconds": f"{seconds:.0f}"}  # fmt: skip
        append_row(self.book, FIELDS, row)
        print(*row.values(), flush=True)


def read(book: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(book.open())) if book.exists() else []


def tabulate(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for model, protocol in dict.fromkeys((r["model"], r["protocol"]) for r in rows):
        own = [r for r in rows if (r["model"], r["protocol"]) == (model, protocol)]
        found = {(r["method"], r["keep"], r["bits"], r["basis"]): float(r["ppl"]) for r in own}
        dense = found.get(("dense", "1", "16", "chosen"))
        columns = sorted({(b, s) for *_, b, s in found}, key=lambda c: (-int(c[0]), c[1] != "own"))
        names = [f"{b} bits" + (", own basis" if s == "own" else "") for b, s in columns]
        lines += [f"## {model} ({protocol})\n", f"Dense: perplexity {dense:.2f}.\n" if dense else ""]
        lines += ["| method | keep | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in own):
            cells = [found.get((method, keep, b, s)) for b, s in columns]
            shown = ["–" if c is None or dense is None else f"{math.log(c / dense):.3f}" for c in cells]
            lines.append(f"| {method} | {keep} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        if not args.only_table:
            bench.measure("dense", "16", "chosen")
        for bits in args.bits.split(",") if not args.only_table else ():
            for method in args.methods.split(","):
                for basis in ("chosen", "own") if args.own and bits != "8" else ("chosen",):
                    bench.measure(method, bits, basis)
        args.table.write_text(tabulate(read(bench.book)), encoding="utf-8")


if __name__ == "__main__":
    main()
