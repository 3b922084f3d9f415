"""Every method at every budget: perplexity on held-out and on shifted text; writes docs/tables/methods.{csv,md}.

    python benchmarks/methods.py                                            # the embedded model
    python benchmarks/methods.py --model FOLDER --text FILE --name NAME     # any other; FILE is split: 3/4 to calibrate
    python benchmarks/methods.py --shifted FILE ... --methods auto,mpifa --keep 0.9,0.8
    python benchmarks/methods.py --budget flops ...                         # or bytes, latency, kv; docs/tables/budgets.md

Each point replaces its row of methods.csv, from which methods.md is written anew; other rows stay, so a run may be cut
into pieces (`--missing` runs only what the table lacks). D = log(ppl / dense ppl). `auto/best` is D of auto over the
least D of all published methods at the same counted budget; `auto:structural` competes with those whose result has dense
shapes only.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import load_tokens
from planish.errors import InputError
from planish.methods import list_methods

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "methods.md"
BUDGETS = {  # what --keep is a share of → the option that it becomes, what it is called
    "weights": ("keep", ""), "kv": ("kv_keep", "KV cache"), "flops": ("flops_keep", "FLOPs per token"),
    "bytes": ("max_bytes", "bytes of the whole model"), "latency": ("max_latency", "predicted latency of a token"),
}  # fmt: skip
COLUMNS = ("model", "text", "method", "keep", "perplexity", "counted", "seconds", "refused")
STRUCTURAL = ("a3", "flat-llm", "modegpt")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument(
        "--shifted", type=Path, action="append", default=[], help="text of another kind, to evaluate on"
    )
    parser.add_argument("--methods", default="auto,auto:structural," + ",".join(sorted(set(list_methods()) - {"auto"})))
    parser.add_argument("--keep", default="0.9,0.8,0.7,0.5")
    parser.add_argument("--n-samples", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows of --seq-len tokens per text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--missing", action="store_true", help="leave points alone that the table has")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="weights", help="what --keep is a share of")
    parser.add_argument(
        "--tables", type=Path, help="where the page goes, its csv beside it (default: docs/tables/methods.md)"
    )
    args = parser.parse_args()
    args.tables = args.tables or (TABLE if args.budget == "weights" else TABLE.with_name("budgets.md"))
    return args


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    keeps = [float(k) for k in args.keep.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, texts = split_text(args, Path(scratch))

        def perplexities(folder: Path) -> list[float]:
            model, tokenizer = (
                planish.load(folder, dtype="float32"),
                AutoTokenizer.from_pretrained(args.model),
            )
            limit = args.windows * args.seq_len
            found = []
            for text in texts.values():
                tokens = load_tokens(text, tokenizer, split="evaluation", bos="once").tokens[:limit]
                found.append(planish.evaluate(model, tokens.numpy(), args.seq_len, tokenizer=tokenizer).perplexity)
            return found

        dense = perplexities(args.model)
        option, title = BUDGETS[args.budget]
        whole = measure_whole(args) if option.startswith("max_") else 1.0
        label = f"{args.name}{title and f': {title}'}, {args.n_samples} × {args.seq_len} calibration tokens, {args.windows} windows"
        store(args.tables, [point(label, t, "dense", 1.0, p, 1.0, 0.0) for t, p in zip(texts, dense, strict=True)])
        present = {(r["model"], r["method"], float(r["keep"])) for r in read(args.tables)}
        for name in args.methods.split(","):
            method, _, units = name.partition(":")
            for keep in keeps:
                if args.missing and (label, name, keep) in present:
                    continue
                start = time.perf_counter()
                try:
                    result = planish.compress(
                        args.model, method=method, **{option: keep * whole}, calibration=calibration, n_samples=args.n_samples,
                        seq_len=args.seq_len, output=Path(scratch) / "out", overwrite=True,
                        settings={"units": units} if units else None,
                    )  # fmt: skip
                    seconds = time.perf_counter() - start
                    found = perplexities(Path(scratch) / "out")
                    rows = [
                        point(label, t, name, keep, p, result.keep, seconds) for t, p in zip(texts, found, strict=True)
                    ]
                except InputError as error:
                    rows = [point(label, t, name, keep, refused=str(error)) for t in texts]
                print(*(list(r.values())[1:] for r in rows), sep="\n", flush=True)
                store(args.tables, rows)


def measure_whole(args: argparse.Namespace) -> float:
    """What the uncompressed model has of the budget: bytes, or predicted milliseconds per token."""
    if args.budget == "bytes":
        return sum(p.stat().st_size for p in args.model.glob("*.safetensors"))
    found = planish.forecast(
        args.model, method="svd", max_latency=1e9, n_samples=8, seq_len=args.seq_len
    ).latency_ms_before
    assert found
    return found


def point(model, text, method, keep, perplexity=math.nan, counted=math.nan, seconds=math.nan, refused="") -> dict:
    numbers = (f"{keep:g}", f"{perplexity:.6g}", f"{counted:.5f}", f"{seconds:.1f}")
    return dict(zip(COLUMNS, (model, text, method, *numbers, refused), strict=True))


def read(table: Path) -> list[dict[str, str]]:
    path = table.with_suffix(".csv")
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def store(table: Path, new: list[dict]) -> None:
    """Put rows into the csv and write the page anew; runs beside one another wait their turn."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with (Path(tempfile.gettempdir()) / "planish-methods.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = {tuple(r[c] for c in COLUMNS[:4]) for r in new}
        rows = [r for r in read(table) if tuple(r[c] for c in COLUMNS[:4]) not in keys] + new
        rows.sort(key=lambda r: (r["model"], r["text"] != "held-out", r["text"], order(r["method"]), -float(r["keep"])))
        with table.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        table.write_text(page(rows), encoding="utf-8")


def order(method: str) -> tuple[int, str]:
    return (0 if method == "dense" else 1 if method.startswith("auto") else 2), method


def split_text(args: argparse.Namespace, scratch: Path) -> tuple[str, dict[str, str]]:
    """Calibration source, and evaluation sources by name: nothing is calibrated on what it is evaluated on."""
    shifted = {p.stem: str(p) for p in args.shifted}
    if args.text is None:
        return "builtin", {"held-out": "builtin", **shifted}
    text = args.text.read_text(encoding="utf-8")
    cut = text.rfind("\n", 0, len(text) * 3 // 4)
    (scratch / "fit.txt").write_text(text[:cut], encoding="utf-8")
    (scratch / "test.txt").write_text(text[cut:], encoding="utf-8")
    return str(scratch / "fit.txt"), {"held-out": str(scratch / "test.txt"), **shifted}


def page(rows: list[dict[str, str]]) -> str:
    title = "Methods under other budgets" if any(": " in r["model"] for r in rows) else "Methods"
    lines = [f"# {title}", "", "Written by `benchmarks/methods.py`. D = log(perplexity / dense perplexity).", ""]
    for model in dict.fromkeys(r["model"] for r in rows):
        name, _, protocol = model.partition(", ")
        lines += [f"## {name}", "", f"{protocol.capitalize()} evaluated per text.", ""]
        mine = [r for r in rows if r["model"] == model]
        for text in dict.fromkeys(r["text"] for r in mine):
            lines += section(text, [r for r in mine if r["text"] == text])
        seconds: dict[str, list[float]] = {}
        for r in mine:
            if r["method"] != "dense" and not r["refused"]:
                seconds.setdefault(r["method"], []).append(float(r["seconds"]))
        means = ", ".join(f"{n} {sum(s) / len(s):.0f}" for n, s in seconds.items())
        lines += [f"Mean seconds per point, on a machine that may have done other work: {means}.", ""]
        refusals = {f"{r['method']} at {r['keep']}: {r['refused']}" for r in mine if r["refused"]}
        lines += [f"– {line}" + "  " for line in sorted(refusals)] + [""] * bool(refusals)
    return "\n".join(lines)


def section(text: str, rows: list[dict[str, str]]) -> list[str]:
    """One table: methods down, keeps across, and how auto stands against the best of the published."""
    found = {(r["method"], float(r["keep"])): float(r["perplexity"]) for r in rows if not r["refused"]}
    dense = found.pop(("dense", 1.0))
    methods = dict.fromkeys(r["method"] for r in rows if r["method"] != "dense")
    keeps = sorted({float(r["keep"]) for r in rows if r["method"] != "dense"}, reverse=True)
    lines = [f"### {text}: perplexity (dense {dense:.3f})", ""]
    lines += ["| method | " + " | ".join(f"keep {k:g}" for k in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for name in methods:
        cells = [f"{found[name, k]:.3f}" if (name, k) in found else "–" for k in keeps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, rivals in (("auto", None), ("auto:structural", STRUCTURAL)):
        ratios = [compare(found, name, rivals, k, dense) for k in keeps]
        if any(ratios):
            lines.append(f"| *{name}: D / best published D* | " + " | ".join(r or "–" for r in ratios) + " |")
    return [*lines, ""]


def compare(found: dict[tuple[str, float], float], mine: str, rivals, keep: float, dense: float) -> str:
    excess = {n: math.log(p / dense) for (n, k), p in found.items() if k == keep}
    others = {n: d for n, d in excess.items() if not n.startswith("auto") and (rivals is None or n in rivals)}
    if mine not in excess or not others:
        return ""
    best = min(others, key=lambda n: others[n])
    return f"{excess[mine] / others[best]:.2f} ({best})" if others[best] > 0 else ""


if __name__ == "__main__":
    main()
