"""Structural methods side by side: perplexity, parameters, KV cache, decode speed; writes docs/tables/structural.md.

    python benchmarks/structural.py                                          # the embedded model
    python benchmarks/structural.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate
    python benchmarks/structural.py --kv --methods a3,palu --keep 0.75,0.5   # budgets of the KV cache instead of weights
    python benchmarks/structural.py --parts                                  # a3's three parts cut one by one

Decode speed is measured in turns with the dense model, so that both see the same machine; the ratio is what counts.
Each run replaces the section of its model; the others stay.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import warnings
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer

import planish
from planish.errors import InputError
from planish.evaluate.speed import bench

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "structural.md"
START = "# Structural methods\n\nWritten by `benchmarks/structural.py`.\n"
ALL = ("qk", "vo", "mlp")
PARTS = (
    ("queries and keys, pairs by the paper's score", "a3", {"parts": ("qk",)}),
    ("queries and keys, pairs by energy", "a3", {"parts": ("qk",), "qk": "energy"}),
    ("values and output, refitted", "a3", {"parts": ("vo",)}),
    ("values and output, sliced", "a3", {"parts": ("vo",), "refit": False}),
    ("values and output, moments of the values, sliced", "a3", {"parts": ("vo",), "vo": "values", "refit": False}),
    ("neurons by energy, refitted", "a3", {"parts": ("mlp",)}),
    ("neurons by energy, sliced", "a3", {"parts": ("mlp",), "refit": False}),
    ("neurons by leverage, refitted", "a3", {"parts": ("mlp",), "mlp": "leverage"}),
    ("neurons by leverage, sliced", "a3", {"parts": ("mlp",), "mlp": "leverage", "refit": False}),
    ("all three, a3's defaults", "a3", {}),
    ("all three, sliced, moments of the values: the paper's a3", "a3", {"refit": False, "vo": "values"}),
    ("values and neurons: a3 without queries and keys, same total", "a3", {"parts": ("vo", "mlp")}),
    ("flat-llm", "flat-llm", {}),
)
HEAD = "| method | keep | ppl | parameters | KV bytes/token | decode vs dense |\n|---|---|---|---|---|---|"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument("--methods", default="a3,a3:allocation=mixed,modegpt,flat-llm,svd-llm")
    parser.add_argument("--keep", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument("--kv", action="store_true", help="--keep is a budget of the KV cache")
    parser.add_argument("--parts", action="store_true", help="a3's parts one by one instead of methods")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--repeats", type=int, default=7, help="turns in which decoding is timed")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        kind, rows = (
            ("parts", list_parts(bench)) if args.parts else ("KV cache" if args.kv else "weights", list_points(bench))
        )
        facts = (
            f"Dense: perplexity {bench.perplexity(bench.dense):.3f}, {bench.size}. Calibration {args.n_samples} × "
            f"{args.seq_len} tokens, {args.windows} windows evaluated, {args.threads} thread(s)."
        )
    write_section(TABLE, START, f"{args.name}, {kind}", f"{facts}\n\n" + "\n".join(rows) + "\n")


class Bench:
    """One model, one calibration text and one held-out text."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.out, self.size = args, scratch / "out", ""
        self.calibration, self.held_out = split_text(args.text, scratch)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.dense = planish.load(args.model, dtype="float32")

    def compress(self, method: str, settings: dict, **budget: float):
        result = planish.compress(
            self.args.model, method=method, settings=settings, calibration=self.calibration,
            n_samples=self.args.n_samples, seq_len=self.args.seq_len, output=self.out, overwrite=True, **budget,
        )  # fmt: skip
        self.size = f"{result.params_before:,} parameters, {result.kv_bytes_per_token_before:,} KV bytes/token"
        return result

    def load(self) -> torch.nn.Module:
        return planish.load(self.out, dtype="float32")

    def perplexity(self, model) -> float:
        return planish.evaluate(
            model,
            self.held_out,
            self.args.seq_len,
            tokenizer=self.tokenizer,
            max_windows=self.args.windows,
            batch_size=4,
        ).perplexity

    def decode_ratio(self, model) -> tuple[float, float]:
        """Tokens per second, and its ratio to the dense model's in the neighbouring turn (median)."""
        speeds = bench(
            {"dense": self.dense, "small": model}, batch_sizes=[1], prompt_len=self.args.prompt,
            new_tokens=self.args.new, repeats=self.args.repeats,
        )  # fmt: skip
        base, small = (s.decode_tokens_per_s for s in speeds)
        return small.median, median(b / a for a, b in zip(base.values, small.values))


def list_points(bench: Bench) -> list[str]:
    """One row for every method and budget."""
    rows = [HEAD]
    for name in bench.args.methods.split(","):
        method, *settings = name.split(":")
        for keep in map(float, bench.args.keep.split(",")):
            try:
                budget = {"kv_keep" if bench.args.kv else "keep": keep}
                result = bench.compress(method, dict(s.split("=") for s in settings), **budget)
            except InputError as error:
                rows.append(f"| {name} | {keep:g} | {error} | | | |")
                continue
            model = bench.load()
            speed, ratio = bench.decode_ratio(model)
            rows.append(
                f"| {name} | {keep:g} | {bench.perplexity(model):.3f} | {result.params_after:,} "
                f"| {result.kv_bytes_per_token_after:,} | {speed:.0f} tok/s, × {ratio:.2f} |"
            )
            print(rows[-1], flush=True)
    return rows


def list_parts(bench: Bench) -> list[str]:
    """Perplexity when a3 cuts one part alone, to the same share of that part's weights; all of them; flat-llm."""
    keeps = list(map(float, bench.args.keep.split(",")))
    rows = ["| cut | " + " | ".join(f"{k:g}" for k in keeps) + " |", "|---" * (1 + len(keeps)) + "|"]
    bench.compress("a3", {}, keep=keeps[0])
    weights = json.loads((bench.out / "planish.json").read_text(encoding="utf-8"))["weights"]
    total = sum(before for before, _ in weights.values())
    for title, method, settings in PARTS:
        parts = settings.get("parts", ALL)
        alone = len(parts) == 1  # then the budget is that part's; otherwise the whole model's
        share = sum(w for u, (w, _) in weights.items() if u.partition(".")[2] in parts) / total if alone else 1.0
        cells = []
        for keep in keeps:
            bench.compress(method, settings, keep=1 - (1 - keep) * share)
            cells.append(f"{bench.perplexity(bench.load()):.3f}")
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def split_text(text: Path | None, scratch: Path) -> tuple[str, str]:
    """Calibration and evaluation sources: nothing is calibrated on what it is evaluated on."""
    if text is None:
        return "builtin", "builtin"
    content = text.read_text(encoding="utf-8")
    cut = content.rfind("\n", 0, len(content) * 3 // 4)
    (scratch / "fit.txt").write_text(content[:cut], encoding="utf-8")
    (scratch / "test.txt").write_text(content[cut:], encoding="utf-8")
    return str(scratch / "fit.txt"), str(scratch / "test.txt")


def read_section(table: Path, title: str) -> str:
    """What is under the heading `title` of a page; empty where there is no such."""
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    return next((p.partition("\n\n")[2] for p in split_sections(text) if p.startswith(f"## {title}\n")), "")


def split_sections(text: str) -> list[str]:
    return re.split(r"(?m)^(?=## )", text)


def write_section(table: Path, start: str, title: str, text: str) -> None:
    """Put `text` under the heading `title` of a page that begins with `start`, where that section is or behind the others."""
    table.parent.mkdir(parents=True, exist_ok=True)
    sections = split_sections(table.read_text(encoding="utf-8"))[1:] if table.exists() else []
    found = [n for n, s in enumerate(sections) if s.startswith(f"## {title}\n")] or [len(sections)]
    sections[found[0] : found[0] + 1] = [f"## {title}\n\n{text}"]
    table.write_text("\n\n".join(s.strip() for s in [start, *sections]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
