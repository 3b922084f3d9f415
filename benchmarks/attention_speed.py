"""Prefill and decode of a model cut by a3 against the dense one, in turns: it must not be slower.

    python benchmarks/attention_speed.py                       # 0.33 billion random weights, keep 0.7, batch 1 and 8, CPU
    python benchmarks/attention_speed.py --attention eager,sdpa
    python benchmarks/attention_speed.py --compile --batch 1
    python benchmarks/attention_speed.py --kv-keep 0.5 --prompt 1024 --method palu:allocation=uniform:keys=frequency
    python benchmarks/attention_speed.py --device cuda --dtype bfloat16

Every run with --write replaces its own section of the table; the others stay.

Prints a table; --write puts it into docs/tables/attention_speed.md. Weights are random: only shapes matter for speed.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch
from random_model import write_model
from structural import write_section

import planish
from planish.evaluate.speed import Speed, bench

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "attention_speed.md"
PHASES = ("prefill", "decode")
SIZES = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--kv-keep", type=float, help="a budget of the KV cache, instead of --keep")
    parser.add_argument("--method", default="a3:refit=false:damping=0.01", help="NAME[:setting=value…]")
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa", help="implementations of attention: eager,sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name, *settings = args.method.split(":")
    with tempfile.TemporaryDirectory() as scratch:
        dense, small = Path(scratch) / "dense", Path(scratch) / "small"
        write_model(dense, **SIZES)
        ids = torch.randint(SIZES["vocab_size"], (4 * 128,))
        budget = {"keep": args.keep} if args.kv_keep is None else {"kv_keep": args.kv_keep}
        result = planish.compress(
            dense, method=name, settings=dict(s.split("=") for s in settings), calibration=ids.numpy(), n_samples=4,
            seq_len=128, output=small, round_to=args.round_to, **budget,
        )  # fmt: skip
        rows = [
            "| attention | batch | phase | dense tok/s | cut tok/s | ratio (median of turns, lowest – highest) |",
            "|---|---|---|---|---|---|",
        ]
        for attention in args.attention.split(","):
            folders = (("dense", dense), (name, small))
            models = {n: planish.load(f, dtype=args.dtype, attn_implementation=attention) for n, f in folders}
            speeds = bench(
                models, batch_sizes=[int(b) for b in args.batch.split(",")], prompt_len=args.prompt,
                new_tokens=args.new, repeats=args.repeats, device=args.device, compile=args.compile,
            )  # fmt: skip
            for a, b in zip(speeds[::2], speeds[1::2]):
                rows += [f"| {attention} | {a.batch_size} | {describe(a, b, phase)} |" for phase in PHASES]
    size = f"{result.params_before / 1e9:.2f} → {result.params_after / 1e9:.2f} billion parameters"
    how = f"{args.method}, prompt {args.prompt}, {args.device}, {args.dtype}{', compiled' if args.compile else ''}"
    text = (
        f"{name} at keep {result.keep:.3f}, {size}, KV bytes/token {result.kv_bytes_per_token_before:,} → "
        f"{result.kv_bytes_per_token_after:,} (as stored). Prompt {args.prompt}, {args.new} new tokens, "
        f"{platform.machine()}, {args.threads} threads.\n\n"
    ) + "\n".join(rows)
    print(text)
    if args.write:
        write_section(TABLE, "# Speed of cut attention\n\nWritten by `benchmarks/attention_speed.py`.\n", how, text)


def describe(dense: Speed, cut: Speed, phase: str) -> str:
    """Cells of one phase: both rates and the ratio of neighbouring turns."""
    a, b = (getattr(s, f"{phase}_tokens_per_s") for s in (dense, cut))
    ratios = sorted(y / x for x, y in zip(a.values, b.values))
    spread = f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"
    return f"{phase} | {a.median:.1f} | {b.median:.1f} | {spread}"


if __name__ == "__main__":
    main()
