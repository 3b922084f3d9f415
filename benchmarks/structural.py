"""Structural methods side by side: perplexity, parameters, KV cache, decode speed; writes docs/tables/structural.md.

    python benchmarks/structural.py                                          # the embedded model
    python benchmarks/structural.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate
    python benchmarks/structural.py --kv                                     # budgets of the KV cache instead of weights

Decode speed is measured in turns with the dense model, so that both see the same machine; the ratio is what counts.
Each run replaces the section of its model; the others stay.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import torch

import planish
from planish.checkpoint import load_tokenizer
from planish.errors import InputError
from planish.evaluate.speed import bench

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "structural.md"
HEAD = "| method | keep | ppl | parameters | KV bytes/token | decode vs dense |\n|---|---|---|---|---|---|"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument("--methods", default="a3,a3:allocation=mixed,modegpt,flat-llm,svd-llm")
    parser.add_argument("--keep", default="0.9,0.8,0.7,0.6,0.5")
    parser.add_argument("--kv", action="store_true", help="--keep is a budget of the KV cache")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--repeats", type=int, default=5, help="turns in which decoding is timed")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = split_text(args.text, Path(scratch))
        tokenizer = load_tokenizer(args.model)

        def perplexity(model) -> float:
            return planish.evaluate(
                model, held_out, args.seq_len, tokenizer=tokenizer, max_windows=args.windows, batch_size=4
            ).perplexity

        dense = planish.load(args.model, dtype="float32")
        rows = []
        for name in args.methods.split(","):
            method, *settings = name.split(":")
            for keep in map(float, args.keep.split(",")):
                try:
                    result = planish.compress(
                        args.model, method=method, settings=dict(s.split("=") for s in settings),
                        calibration=calibration, n_samples=args.n_samples, seq_len=args.seq_len,
                        output=Path(scratch) / "out", overwrite=True, **{"kv_keep" if args.kv else "keep": keep},
                    )  # fmt: skip
                except InputError as error:
                    rows.append(f"| {name} | {keep:g} | {error} | | | |")
                    continue
                model = planish.load(Path(scratch) / "out", dtype="float32")
                speeds = bench(
                    {"dense": dense, "small": model},
                    batch_sizes=[1],
                    prompt_len=32,
                    new_tokens=16,
                    repeats=args.repeats,
                )
                base, small = (s.decode_tokens_per_s for s in speeds)
                ratio = sorted(b / a for a, b in zip(base.values, small.values))[len(base.values) // 2]
                rows.append(
                    f"| {name} | {keep:g} | {perplexity(model):.3f} | {result.params_after:,} "
                    f"| {result.kv_bytes_per_token_after:,} | {small.median:.0f} tok/s, × {ratio:.2f} |"
                )
                print(rows[-1], flush=True)
        title = f"{args.name}, {'KV cache' if args.kv else 'weights'}"
        before = f"{result.params_before:,} parameters, {result.kv_bytes_per_token_before:,} KV bytes/token"
        write_section(
            title,
            f"Dense: perplexity {perplexity(dense):.3f}, {before}. Calibration {args.n_samples} × {args.seq_len} tokens, "
            f"{args.windows} windows evaluated, {args.threads} thread(s).\n\n" + "\n".join([HEAD, *rows]) + "\n",
        )


def split_text(text: Path | None, scratch: Path) -> tuple[str, str]:
    """Calibration and evaluation sources: nothing is calibrated on what it is evaluated on."""
    if text is None:
        return "builtin", "builtin"
    content = text.read_text(encoding="utf-8")
    cut = content.rfind("\n", 0, len(content) * 3 // 4)
    (scratch / "fit.txt").write_text(content[:cut], encoding="utf-8")
    (scratch / "test.txt").write_text(content[cut:], encoding="utf-8")
    return str(scratch / "fit.txt"), str(scratch / "test.txt")


def write_section(title: str, text: str) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    start = "# Structural methods\n\nWritten by `benchmarks/structural.py`.\n"
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else start
    parts = [p for p in re.split(r"(?m)^(?=## )", old) if not p.startswith(f"## {title}\n")]
    parts.append(f"## {title}\n\n{text}")
    TABLE.write_text("\n\n".join(p.strip() for p in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
