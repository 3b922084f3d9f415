"""Predicted against measured nats per token, per kind of cut and for whole plans; docs/tables/prediction.md, a chart.

    python benchmarks/prediction.py                                                   # the embedded model
    python benchmarks/prediction.py --model FOLDER --text FILE --name NAME --share 0.5 # any other; 3/4 of FILE calibrate

Single cuts: one unit at one rank, everything else whole, solved on the uncompressed model's statistics; the increase of the
loss on windows of the calibration text and of held-out text. Whole plans: `auto` at several keeps, solved as `compress` does,
so that later solves repair earlier ones. Each run replaces the rows of its model in prediction.csv, from which page and
chart are made anew. The chart needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from structural import split_text
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import cut_windows, load_tokens, sample_starts

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "prediction.md"
COLUMNS = ("model", "unit", "kind", "rank", "keep", "predicted", "measured", "held")
PLAN = "whole plan"
KINDS = ("low-rank linear", "value dimensions", "rotary pairs", "neurons", "bypass", PLAN)
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#222222")
HEAD = """# Predicted and measured loss

Written by `benchmarks/prediction.py`: nats per token, one unit cut at a time, everything else whole. ρ = Spearman's rank
correlation of predicted and measured; ratio = median of measured / predicted, with the quartiles. Cuts whose measured loss is
negative count in ρ and in the ratio; the chart cannot show them.

![predicted against measured](../prediction.png)
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to measure on (default: builtin)")
    parser.add_argument("--share", type=float, default=0.15, help="of all (unit, keep) pairs")
    parser.add_argument("--keep", default="0.9,0.7,0.5,0.3", help="of a unit's weights")
    parser.add_argument("--plans", default="0.9,0.8,0.7,0.5", help="keeps of whole plans")
    parser.add_argument("--n-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="windows measured per text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", type=Path, default=TABLE, help="where the page goes, its csv beside it")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held = split_text(args.text, Path(scratch))
        text = {"calibration": calibration, "n_samples": args.n_samples, "seq_len": args.seq_len}
        keeps = [float(k) for k in args.keep.split(",")]
        found = planish.measure_effects(
            args.model,
            settings={"bypass": True},
            held=held,
            keeps=keeps,
            share=args.share,
            windows=args.windows,
            **text,
        )
        rows = [
            (
                args.name,
                e.unit,
                e.kind,
                e.rank,
                f"{e.keep:.4f}",
                *(f"{x:.6g}" for x in (e.predicted, e.measured, e.held)),
            )
            for e in found
        ]
        rows += measure_plans(args, text, held, Path(scratch))
    store(args.tables, args.name, [dict(zip(COLUMNS, map(str, r), strict=True)) for r in rows])


def measure_plans(args: argparse.Namespace, text: dict, held: str, scratch: Path) -> list[tuple]:
    tokenizer, limit = AutoTokenizer.from_pretrained(args.model), args.windows * args.seq_len
    tokens = load_tokens(text["calibration"], tokenizer, bos="once").tokens
    own = (
        cut_windows(tokens, sample_starts(tokens, args.n_samples, args.seq_len), args.seq_len).flatten()[:limit].numpy()
    )
    other = load_tokens(held, tokenizer, split="evaluation", bos="once").tokens[:limit].numpy()

    def losses(folder: Path) -> list[float]:
        model = planish.load(folder, dtype="float32")
        return [planish.evaluate(model, ids, args.seq_len, tokenizer=tokenizer).nll for ids in (own, other)]

    dense, rows = losses(args.model), []
    for keep in map(float, args.plans.split(",")):
        planish.compress(args.model, keep=keep, method="auto", output=scratch / "out", overwrite=True, **text)
        notes = json.loads((scratch / "out" / "planish.json").read_text(encoding="utf-8"))["notes"]
        added = [a - b for a, b in zip(losses(scratch / "out"), dense, strict=True)]
        numbers = (f"{x:.6g}" for x in (notes["predicted_loss"], *added))
        rows.append((args.name, f"keep {keep:g}", PLAN, "", f"{keep:g}", *numbers))
    return rows


def store(table: Path, name: str, new: list[dict[str, str]]) -> None:
    path = table.with_suffix(".csv")
    rows = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["model"] != name]
    rows = sorted(rows + new, key=lambda r: (r["model"], KINDS.index(r["kind"])))
    table.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table.write_text(page(rows), encoding="utf-8")
    draw(rows, table.parent.parent / "prediction.png" if table == TABLE else table.with_suffix(".png"))


def page(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        lines += [f"## {name}", "", "| kind | cuts | ρ calibration | ρ held-out | ratio calibration | ratio held-out |"]
        lines += ["|---" * 6 + "|"]
        for kind in [k for k in KINDS if k != PLAN] + ["all"]:
            some = [r for r in mine if r["kind"] == kind or (kind == "all" and r["kind"] != PLAN)]
            if some:
                lines.append(f"| {kind} | {len(some)} | " + " | ".join(compare(some)) + " |")
        plans = [r for r in mine if r["kind"] == PLAN]
        lines += ["", "| plan | predicted | calibration | held-out |", "|---|---|---|---|"]
        lines += [
            f"| {r['unit']} | {float(r['predicted']):.4f} | {float(r['measured']):.4f} | {float(r['held']):.4f} |"
            for r in plans
        ]
        lines.append("")
    return "\n".join(lines)


def compare(rows: list[dict[str, str]]) -> list[str]:
    predicted = [float(r["predicted"]) for r in rows]
    cells, ratios = [], []
    for column in ("measured", "held"):
        measured = [float(r[column]) for r in rows]
        cells.append(f"{correlate(predicted, measured):.2f}" if len(rows) > 2 else "–")
        shares = sorted(m / p for m, p in zip(measured, predicted, strict=True) if p > 0)
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
        ratios.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return cells + ratios


def correlate(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    return statistics.correlation(*([rank(x) for x in (a, b)])) if len(set(a)) > 1 and len(set(b)) > 1 else math.nan


def rank(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.6 * len(names), 5.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        shown = [r for r in rows if r["model"] == name and float(r["predicted"]) > 0 and float(r["held"]) > 0]
        for kind, colour in zip(KINDS, COLOURS, strict=True):
            some = [r for r in shown if r["kind"] == kind]
            size, mark = (70, "*") if kind == PLAN else (22, "o")
            xs, ys = ([float(r[c]) for r in some] for c in ("predicted", "held"))
            axis.scatter(xs, ys, s=size, marker=mark, color=colour, alpha=0.75, linewidths=0, label=kind)
        values = [float(r[c]) for r in shown for c in ("predicted", "held")]
        low, high = max(min(values), 1e-6) / 2, max(values) * 2
        axis.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=name)
        axis.set_xlabel("predicted, nats per token")
        axis.grid(alpha=0.2)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel("measured on held-out text, nats per token")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
