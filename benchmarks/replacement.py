"""Perplexity, cache and speed of removed and replaced submodules: writes docs/tables/replacement.md.

    python benchmarks/replacement.py                      # the embedded model
    python benchmarks/replacement.py --model FOLDER --text FILE --name stories260k
    python benchmarks/replacement.py --levels 0.25 --windows 32 --no-speed      # a quick look

Every run adds or replaces the sections of the models it was asked for; the other sections stay.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import planish
from planish import load
from planish.checkpoint import load_tokenizer
from planish.errors import InputError
from planish.evaluate.perplexity import evaluate
from planish.evaluate.speed import bench
from planish.methods import list_methods
from planish.submodules import round_half_up
from planish.text import load_tokens

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "replacement.md"
LEVELS = (0.125, 0.1875, 0.25, 0.3125, 0.375)

FREE = "same keep"  # as published: as many weights go as in n whole blocks, of whichever kind
WHOLE: dict[
    str, tuple[str, dict[str, Any]]
] = {  # attentions and feed-forwards, or whole blocks: the same share of both goes
    "subfit": ("subfit", {}),
    "subfit, one shot": ("subfit", {"fit": "once", "basis": "pca", "ffn_score": "error"}),
    "llm-drop": ("llm-drop", {}),
    "shortgpt": ("shortgpt", {}),
    "sleb": ("sleb", {}),
    "blockpruner, as many of each kind": ("blockpruner", {}),
    "blockpruner, free numbers": ("blockpruner", {FREE: True}),
    "replaceme": ("replaceme", {}),
    "replaceme, cosine": ("replaceme", {"objective": "cosine"}),
    "llm-streamline": ("llm-streamline", {}),
}
ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {  # attentions only
    "subfit, attention only": ("subfit", {"submodules": "attention", "attention_rank": 1.0}),
    "nbl": ("nbl", {}),
    "llm-drop, attention only": ("llm-drop", {"submodules": "attention"}),
}


def measure(args: argparse.Namespace, model: Path, out: Path) -> dict:
    """Every method at every level: perplexity, share of weights kept, cache bytes."""
    tokenizer = load_tokenizer(model)
    dense = load(model)
    vocabulary = dense.config.vocab_size
    if args.text is None:
        fit, test = (
            load_tokens("builtin", tokenizer, split=s, vocab_size=vocabulary).tokens
            for s in ("calibration", "evaluation")
        )
    else:
        text = load_tokens(args.text, tokenizer, vocab_size=vocabulary).tokens
        fit, test = text[: -len(text) // 5], text[-len(text) // 5 :]
    test = test[: args.tokens]
    reference = evaluate(dense, test, args.seq_len, batch_size=16)
    blocks = dense.config.num_hidden_layers
    rows: dict[str, dict[float, dict]] = {}
    chosen: dict[str, Path] = {}
    for name, (method, settings) in {**WHOLE, **ATTENTION}.items():
        rows[name] = {}
        searches = "windows" in {f.name for f in fields(list_methods()[method])}
        search = {"windows": args.search_windows} if searches else {}
        for level in args.levels:
            n = round_half_up(level * blocks)
            same = [r for r in rows[name].values() if r.get("n") == n]
            if same:  # rounds to the same number of submodules
                rows[name][level] = same[0]
                continue
            folder = out / re.sub(r"\W+", "-", f"{name}-{level}")
            start = time.perf_counter()
            try:
                result = planish.compress(
                    model,
                    output=folder,
                    method=method,
                    keep=1 - n / blocks,
                    settings=search if FREE in settings else {**settings, **search, "sparsity": level},
                    calibration=fit,
                    n_samples=args.windows,
                    seq_len=args.seq_len,
                    sampling="random",
                    device="cpu",
                )
            except InputError as refusal:
                rows[name][level] = {"n": n, "refused": str(refusal)}
                continue
            notes = json.loads((folder / "planish.json").read_text(encoding="utf-8"))["notes"]
            rows[name][level] = {
                "n": n,
                "ppl": evaluate(load(folder), test, args.seq_len, batch_size=16).perplexity,
                "keep": result.keep,
                "kv": result.kv_bytes_per_token_after,
                "kv_before": result.kv_bytes_per_token_before,
                "format": result.format,
                "removed": {k: v["blocks"] for k, v in notes["removed"].items()},
                "seconds": time.perf_counter() - start,
            }
            print(name, level, rows[name][level], flush=True)
            if n == round_half_up(args.speed_level * blocks) and method not in chosen and name in WHOLE:
                chosen[name] = folder
            else:
                shutil.rmtree(folder)
    speeds = [] if args.no_speed else speed(model, chosen)
    return {
        "dense": reference.perplexity,
        "blocks": blocks,
        "hidden": dense.config.hidden_size,
        "windows": [args.windows, args.seq_len],
        "text": args.text.name if args.text else "builtin",
        "tokens": reference.tokens,
        "rows": rows,
        "speeds": speeds,
    }


def speed(model: Path, chosen: dict[str, Path]) -> list[dict]:
    """Time to first token and decode rate beside the dense model, medians over alternating repeats."""
    models = {"dense": load(model), **{n: load(f) for n, f in chosen.items() if n in ("subfit", "sleb", "llm-drop")}}
    found = bench(models, batch_sizes=(1,), prompt_len=128, new_tokens=64, repeats=7)
    first = {s.model: s for s in found}
    base = first["dense"]
    return [
        {
            "model": s.model,
            "ttft_ms": 1000 * s.time_to_first_token_s.median,
            "ttft_gain": base.time_to_first_token_s.median / s.time_to_first_token_s.median,
            "decode": s.decode_tokens_per_s.median,
            "decode_gain": s.decode_tokens_per_s.median / base.decode_tokens_per_s.median,
            "kv": s.kv_bytes,
        }
        for s in found
    ]


def write(name: str, r: dict, args: argparse.Namespace) -> str:
    """One model's section in markdown."""
    blocks, levels = r["blocks"], args.levels
    counts = {s: round_half_up(s * blocks) for s in levels}
    lines = [
        f"## {name}",
        "",
        f"{blocks} blocks, hidden size {r['hidden']}; dense perplexity {r['dense']:.3f} "
        f"({r['tokens']} tokens, windows of {args.seq_len}); "
        f"calibration {r['windows'][0]} × {r['windows'][1]} tokens of {r['text']}.",
        "",
        "Sparsity is the share of attentions and of feed-forwards (or blocks) that goes, rounded half up: "
        + ", ".join(f"{100 * s:g} % → {n} of {blocks} ({100 * n / blocks:.1f} %)" for s, n in counts.items())
        + ". In brackets: the share of the blocks' weights that is kept, net of what replacements add, counted.",
        "",
    ]
    for title, group in (("Attentions and feed-forwards, or whole blocks", WHOLE), ("Attentions only", ATTENTION)):
        lines += [f"### {title}", "", "| method | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |"]
        lines += ["|---|" + "---|" * len(levels)]
        for method in group:
            cells = [cell(r["rows"][method][s]) for s in levels]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", "Cache, bytes per token (dense " + str(next_kv(r)) + "):", ""]
        lines += ["| method | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |", "|---|" + "---|" * len(levels)]
        for method in group:
            cells = [str(r["rows"][method][s].get("kv", "–")) for s in levels]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += verdict(r, levels)
    if r["speeds"]:
        lines += [
            "",
            f"### Speed at {100 * args.speed_level:g} %, batch 1, prompt 128, 64 new tokens, {torch.get_num_threads()} thread(s)",
            "",
            "| model | time to first token, ms | gain | decode, tokens/s | gain | cache after the run, bytes |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {s['model']} | {s['ttft_ms']:.1f} | × {s['ttft_gain']:.2f} "
            f"| {s['decode']:.0f} | × {s['decode_gain']:.2f} | {s['kv']} |"
            for s in r["speeds"]
        ]
    return "\n".join(lines) + "\n"


def cell(row: dict) -> str:
    return "refused" if "refused" in row else f"{row['ppl']:.3f} ({row['keep']:.3f})"


def next_kv(r: dict) -> int:
    return next(x["kv_before"] for row in r["rows"].values() for x in row.values() if "kv_before" in x)


def verdict(r: dict, levels: tuple[float, ...]) -> list[str]:
    """Who is ahead at every level, and by how much, said by the measurements."""
    lines = [
        "Perplexity over the dense model's, subfit against the best of the others, and the weights that each keeps: at the "
        "same sparsity subfit keeps more of them, its bypasses.",
        "",
    ]
    for s in levels:
        ppl = {m: r["rows"][m][s]["ppl"] / r["dense"] for m in WHOLE if "ppl" in r["rows"][m][s]}
        others = {m: p for m, p in ppl.items() if not m.startswith("subfit")}
        best = min(others, key=others.__getitem__)
        own, other = (r["rows"][m][s]["keep"] for m in ("subfit", best))
        lines.append(
            f"- {100 * s:g} %: × {ppl['subfit']:.3f} (keep {own:.3f}) against × {others[best]:.3f} ({best}, keep {other:.3f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--text", type=Path, help="a text file: its last fifth is evaluated; default: builtin")
    parser.add_argument("--name", default="The embedded model")
    parser.add_argument("--levels", type=lambda t: tuple(map(float, t.split(","))), default=LEVELS)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64 * 256, help="evaluated tokens")
    parser.add_argument("--search-windows", type=int, default=8, help="of those, on which losses are compared")
    parser.add_argument("--speed-level", type=float, default=0.25)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--output", type=Path, default=TABLE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        section = write(args.name, measure(args, args.model, Path(folder)), args)
    head = "# Removing and replacing submodules\n\nWritten by `benchmarks/replacement.py`.\n\n"
    old = args.output.read_text(encoding="utf-8") if args.output.is_file() else head
    sections = {s.splitlines()[0]: s.rstrip() + "\n" for s in re.split(r"(?m)^## ", old)[1:]}
    sections[args.name] = section.removeprefix("## ")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(head + "\n".join(f"## {s}" for s in sections.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
