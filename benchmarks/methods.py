"""Every method at every budget: perplexity on held-out and on shifted text; writes docs/tables/methods.md.

    python benchmarks/methods.py                                            # the embedded model
    python benchmarks/methods.py --model FOLDER --text FILE --name NAME     # any other; FILE is split: 3/4 to calibrate
    python benchmarks/methods.py --shifted FILE ... --methods auto,mpifa --keep 0.9,0.8

Each run replaces the section of its model; the others stay. D = log(ppl / dense ppl). `auto/best` is D of auto over the
least D of all published methods at the same counted budget; `auto:structural` competes with those whose result has dense
shapes only.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
import warnings
from pathlib import Path

import torch

import planish
from planish.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "methods.md"
STRUCTURAL = ("a3", "flat-llm", "modegpt")
REPLACING = ("subfit", "shortgpt", "llm-drop", "sleb", "blockpruner", "replaceme", "llm-streamline", "nbl")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument(
        "--shifted", type=Path, action="append", default=[], help="text of another kind, to evaluate on"
    )
    parser.add_argument(
        "--methods", default="auto,auto:structural," + ",".join(sorted(set(planish.methods.list_methods()) - {"auto"}))
    )
    parser.add_argument("--keep", default="0.9,0.8,0.7,0.5")
    parser.add_argument("--n-samples", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows of --seq-len tokens per text")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    keeps = [float(k) for k in args.keep.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, texts = split_text(args, Path(scratch))

        def perplexities(folder: Path) -> list[float]:
            model, tokenizer = planish.load(folder, dtype="float32"), planish.checkpoint.load_tokenizer(args.model)
            limit = args.windows * args.seq_len
            found = []
            for text in texts.values():
                tokens = planish.text.load_tokens(text, tokenizer, split="evaluation").tokens[:limit]
                found.append(planish.evaluate(model, tokens.numpy(), args.seq_len, tokenizer=tokenizer).perplexity)
            return found

        dense = perplexities(args.model)
        rows: dict[str, dict[float, tuple[list[float], float, float] | str]] = {}
        for name in args.methods.split(","):
            method, _, units = name.partition(":")
            for keep in keeps:
                start = time.perf_counter()
                try:
                    result = planish.compress(
                        args.model, keep=keep, method=method, calibration=calibration, n_samples=args.n_samples,
                        seq_len=args.seq_len, output=Path(scratch) / "out", overwrite=True,
                        settings={"units": units} if units else None,
                    )  # fmt: skip
                    seconds = time.perf_counter() - start
                    rows.setdefault(name, {})[keep] = (perplexities(Path(scratch) / "out"), result.keep, seconds)
                except InputError as error:
                    rows.setdefault(name, {})[keep] = str(error)
                print(name, keep, rows[name][keep], flush=True)
                write_table(args.name, section(args, texts, dense, rows, keeps))


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


def section(args, texts, dense, rows, keeps) -> str:
    lines = [f"## {args.name}", ""]
    lines += [f"Calibration {args.n_samples} × {args.seq_len} tokens; {args.windows} windows evaluated per text.", ""]
    for t, text in enumerate(texts):
        lines += [f"### {text}: perplexity (dense {dense[t]:.3f})", ""]
        lines += ["| method | " + " | ".join(f"keep {k:g}" for k in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
        for name, points in rows.items():
            cells = [cell(points.get(k), t) for k in keeps]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        for mine, rivals in (("auto", None), ("auto:structural", STRUCTURAL)):
            ratios = [compare(rows, mine, rivals, k, t, dense[t]) for k in keeps]
            if any(ratios):
                lines.append(f"| *{mine}: D / best published D* | " + " | ".join(r or "–" for r in ratios) + " |")
        lines.append("")
    seconds = {n: [p[2] for p in points.values() if not isinstance(p, str)] for n, points in rows.items()}
    lines += [
        "Mean seconds per point: " + ", ".join(f"{n} {sum(s) / len(s):.0f}" for n, s in seconds.items() if s) + ".",
        "",
    ]
    return "\n".join(lines)


def cell(point, t: int) -> str:
    if point is None:
        return ""
    return "–" if isinstance(point, str) else f"{point[0][t]:.3f}"


def compare(rows, mine: str, rivals, keep: float, t: int, dense: float) -> str:
    def excess(name: str) -> float | None:
        point = rows.get(name, {}).get(keep)
        return None if point is None or isinstance(point, str) else math.log(point[0][t] / dense)

    own = excess(mine)
    others = {n: excess(n) for n in rows if not n.startswith("auto") and (rivals is None or n in rivals)}
    others = {n: d for n, d in others.items() if d is not None}
    if own is None or not others:
        return ""
    best = min(others, key=lambda n: others[n])
    return f"{own / others[best]:.2f} ({best})" if others[best] > 0 else ""


def write_table(name: str, text: str) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else "# Methods\n\nWritten by `benchmarks/methods.py`.\n"
    parts = re.split(r"(?m)^(?=## )", old)
    parts = [p for p in parts if not p.startswith(f"## {name}\n")]
    TABLE.write_text("".join(p.rstrip() + "\n\n" for p in [*parts, text]), encoding="utf-8")


if __name__ == "__main__":
    main()
