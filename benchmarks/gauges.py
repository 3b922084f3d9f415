"""Cut models in 16 bits and rounded, in the basis that planish chooses; writes docs/tables/gauges.md and gauges.csv.

    python benchmarks/gauges.py                                          # the embedded model
    python benchmarks/gauges.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate
    python benchmarks/gauges.py --evaluate FILE --folders DIR ...        # another text; compressed folders are kept and used again

Every linear of the blocks is rounded as `planish compress --bits` does it, embedding and head stay in 16 bits. D: nats per token
more than the dense model in 16 bits. "own basis": without a choice of basis, in the one that the cut has left (--own). The table is
resumed: a row that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

import planish
from planish.calibrate.stream import Stream
from planish.calibrate.text import load_tokens, sample_windows
from planish.folder.source import open_folder
from planish.folder.writer import Writer
from planish.quantise import Asked, Quantiser
from planish.rounding.types import choose

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, split_text

TABLE = ROOT / "docs" / "tables" / "gauges.md"
FIELDS = ("model", "method", "keep", "bits", "basis", "protocol", "ppl", "nats", "bits_per_weight", "cpu_seconds")
HEAD = """# The basis that weights are rounded in

Written by `benchmarks/gauges.py` from gauges.csv. Cells: D, nats per token more than the dense model in 16 bits on the same
windows, log(perplexity / dense perplexity); all linears of the blocks rounded to integers in groups of at most 64 with zero points.
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
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--own", action="store_true", help="measure roundings without a choice of basis too")
    parser.add_argument("--folders", type=Path, help="where compressed folders are kept, METHOD each")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only-table", action="store_true", help="write the table of what the CSV has")
    return parser.parse_args()


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch = args, scratch
        self.folders = args.folders or scratch
        self.book = args.table.with_suffix(".csv")
        self.protocol = f"{args.n_samples} × {args.seq_len} tokens; {args.windows} windows"
        fit, test = split_text(None if args.evaluate else args.text, scratch)
        self.fit, self.test = (str(args.text), str(args.evaluate)) if args.evaluate else (fit, test)
        self.ids: Tensor | None = None

    def open(self, method: str) -> Path:
        """The folder that a method makes of the model, made unless it is there."""
        args, folder = self.args, self.folders / method
        if method == "dense" and args.model.is_dir():
            return args.model
        if not folder.exists():
            more = {"keep": 1.0, "method": "flat-llm"} if method == "dense" else {"keep": args.keep, "method": method}
            planish.compress(
                args.model, calibration=self.fit, n_samples=args.n_samples, seq_len=args.seq_len, output=folder, **more
            )
        return folder

    def measure(self, method: str, bits: str, basis: str) -> None:
        """One row of the CSV, unless it has it."""
        args = self.args
        key = {"model": args.name, "method": method, "keep": "1" if method == "dense" else f"{args.keep:g}", "bits": bits,
               "basis": basis, "protocol": self.protocol}  # fmt: skip
        if any(all(row[n] == v for n, v in key.items()) for row in read(self.book)):
            return
        folder, start, report = self.open(method), time.process_time(), None
        place = folder
        if bits != "16":
            place = self.scratch / "rounded"
            with patch("planish.rounding.blocks.balance", lambda *a: []) if basis == "own" else nullcontext():
                report = self.round(folder, place, bits)
        seconds = time.process_time() - start
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = planish.evaluate(
            planish.load(place, dtype="float32"), self.test, args.seq_len, tokenizer=tokenizer, max_windows=args.windows
        )
        row = key | {
            "ppl": f"{found.perplexity:.4f}",
            "cpu_seconds": f"{seconds:.0f}",
            "nats": "",
            "bits_per_weight": "16",
        }
        if report is not None:
            row |= {"nats": f"{report.nats:.4f}", "bits_per_weight": f"{report.bits_per_weight:.3f}"}
        new = not self.book.exists()
        with self.book.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*row.values(), flush=True)

    def round(self, folder: Path, place: Path, bits: str):
        """The folder rounded into another, as `planish compress --bits` rounds what it has cut."""
        args = self.args
        if self.ids is None:
            text = load_tokens(self.fit, AutoTokenizer.from_pretrained(folder))
            self.ids = sample_windows(text.tokens, args.n_samples, args.seq_len, 0)
        source, asked = open_folder(folder), choose(bits, "any")
        assert asked is not None
        shutil.rmtree(place, ignore_errors=True)
        writer = Writer(place, source.n_blocks)
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".index.json")):
                shutil.copy(file, writer.partial)
        report = Quantiser(source, lambda: Stream(source, self.ids), Asked(asked), writer).run()
        writer.close()
        return report


def read(book: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(book.open())) if book.exists() else []


def tabulate(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for model, protocol in dict.fromkeys((r["model"], r["protocol"]) for r in rows):
        own = [r for r in rows if (r["model"], r["protocol"]) == (model, protocol)]
        found = {(r["method"], r["bits"], r["basis"]): float(r["ppl"]) for r in own}
        dense = found.get(("dense", "16", "chosen"))
        columns = sorted({(b, s) for _, b, s in found}, key=lambda c: (-int(c[0]), c[1] != "own"))
        names = [f"{b} bits" + (", own basis" if s == "own" else "") for b, s in columns]
        lines += [f"## {model} ({protocol})\n", f"Dense: perplexity {dense:.2f}.\n" if dense else ""]
        lines += ["| method | keep | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in own):
            cells = [found.get((method, b, s)) for b, s in columns]
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
        for bits in ("16", *args.bits.split(",")) if not args.only_table else ():
            for method in args.methods.split(","):
                for basis in ("chosen", "own") if args.own and bits != "16" else ("chosen",):
                    bench.measure(method, bits, basis)
        args.table.write_text(tabulate(read(bench.book)), encoding="utf-8")


if __name__ == "__main__":
    main()
