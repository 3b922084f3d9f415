"""Perplexity, cache and speed of removed and replaced submodules: writes docs/tables/replacement.md.

    python benchmarks/replacement.py                      # the embedded model: the same sparsity, the same keep, ablation
    python benchmarks/replacement.py --model FOLDER --text FILE --name stories260k
    python benchmarks/replacement.py --sections speed     # the embedded model and random weights of 120 M parameters
    python benchmarks/replacement.py --sections sparsity --levels 0.25 --windows 32      # a quick look

Every run adds or replaces the sections it was asked for; the other sections stay. With `--partial FILE` what has been measured
is kept there and not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from random_model import write_model
from transformers import AutoTokenizer

import planish
from planish import load
from planish.calibrate.text import load_tokens
from planish.errors import InputError
from planish.evaluate.perplexity import evaluate
from planish.evaluate.speed import bench
from planish.methods import list_methods

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "planish" / "data" / "demo"
TABLE = ROOT / "docs" / "tables" / "replacement.md"
LEVELS = (0.125, 0.1875, 0.25, 0.3125, 0.375)
KEEPS = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65)

Runs = dict[str, tuple[str, dict[str, Any]]]  # name in the table → method, settings
FREE = "same keep"  # as published: as many weights go as in n whole blocks, of whichever kind
WHOLE: Runs = {  # attentions and feed-forwards, or whole blocks: the same share of both goes
    "subfit": ("subfit", {}),
    "subfit, free numbers": ("subfit", {"numbers": "free"}),
    "subfit, one shot": ("subfit", {"fit": "once", "basis": "pca", "ffn_score": "error"}),
    "subfit, repaired": ("subfit", {"repair": True}),
    "llm-drop": ("llm-drop", {}),
    "shortgpt": ("shortgpt", {}),
    "sleb": ("sleb", {}),
    "blockpruner, as many of each kind": ("blockpruner", {}),
    "blockpruner, free numbers": ("blockpruner", {FREE: True}),
    "replaceme": ("replaceme", {}),
    "replaceme, cosine": ("replaceme", {"objective": "cosine"}),
    "llm-streamline": ("llm-streamline", {}),
}
ATTENTION: Runs = {  # attentions only
    "subfit, attention only": ("subfit", {"submodules": "attention", "attention_rank": 1.0}),
    "nbl": ("nbl", {}),
    "llm-drop, attention only": ("llm-drop", {"submodules": "attention"}),
}
BLOCKS = ("shortgpt", "sleb", "replaceme", "llm-streamline")  # whole blocks go
KEPT: Runs = {n: run for n, run in WHOLE.items() if n != "blockpruner, as many of each kind"}
ABLATION: dict[str, dict[str, Any]] = {  # one change to the defaults at a time
    "defaults": {},
    "attentions by influence, rotation × magnitude": {"attention_score": "influence"},
    "attentions by influence, rotation + magnitude": {"attention_score": "influence", "combine": "sum"},
    "feed-forwards by what the fit leaves (base models)": {"ffn_score": "error"},
    "feed-forwards by cosine (instruct models)": {"ffn_score": "cosine"},
    "input raw": {"input": "raw"},
    "basis PCA, shared": {"basis": "pca"},
    "basis PCA, shared, feed-forwards of rank 1/4": {"basis": "pca", "ffn_rank": 0.25},
    "basis PCA, not shared, feed-forwards of rank 1/4": {"basis": "pca", "ffn_rank": 0.25, "shared": False},
    "reduced-rank regression, feed-forwards of rank 1/4": {"ffn_rank": 0.25},
    "attentions of rank 1/4": {"attention_rank": 0.25},
    "absolute ranks, 16 and 64": {"attention_rank": 16, "ffn_rank": 64},
    "no gate": {"gate": False},
    "massive activations out of the fit": {"tokens": "calm"},
    "fit once": {"fit": "once"},
    "fit once, joint refit": {"fit": "joint"},
    "fit sequential": {"fit": "sequential"},
    "fit sequential, error-compensating": {"fit": "compensated"},
    "down projections repaired": {"repair": True},
    "up to 4 swaps": {"swaps": 4},
    "free numbers": {"numbers": "free"},
    "as described: influence, error, shared PCA, once": {
        "attention_score": "influence", "ffn_score": "error", "basis": "pca", "fit": "once",
    },
}  # fmt: skip


class Bench:
    """One model with its texts, and what has been measured on it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, args.model
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        dense = load(self.model)
        vocabulary = dense.config.vocab_size
        if args.text is None:
            self.fit, test = (
                load_tokens("builtin", tokenizer, split=s, vocab_size=vocabulary).tokens
                for s in ("calibration", "evaluation")
            )
        else:
            text = load_tokens(args.text, tokenizer, vocab_size=vocabulary, bos="once").tokens
            self.fit, test = text[: -len(text) // 5], text[-len(text) // 5 :]
        self.test = test[: args.tokens]
        self.blocks, self.hidden = dense.config.num_hidden_layers, dense.config.hidden_size
        reference = evaluate(dense, self.test, args.seq_len, batch_size=16)
        self.dense, self.tokens = reference.perplexity, reference.tokens
        self.source = args.text.name if args.text else "builtin"
        self.rows: dict[str, dict] = {}
        if args.partial and args.partial.is_file():
            self.rows = json.loads(args.partial.read_text(encoding="utf-8"))

    def run(self, method: str, settings: dict[str, Any], keep: float, seed: int = 0) -> dict:
        """Perplexity, counted keep, cache bytes and what went, or why it was refused."""
        args = self.args
        if "windows" in {f.name for f in fields(list_methods()[method])}:
            settings = settings | {"windows": args.search_windows}
        key = json.dumps([args.name, args.windows, args.seq_len, args.tokens, method, settings, keep, seed])
        if key in self.rows:
            return self.rows[key]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "out"
            try:
                result = planish.compress(
                    self.model, output=folder, method=method, keep=keep, settings=settings, calibration=self.fit,
                    n_samples=args.windows, seq_len=args.seq_len, sampling="random", device="cpu", seed=seed,
                )  # fmt: skip
            except InputError as refusal:
                row: dict[str, Any] = {"refused": str(refusal)}
            else:
                notes = json.loads((folder / "planish.json").read_text(encoding="utf-8"))["notes"]
                row = {
                    "ppl": evaluate(load(folder), self.test, args.seq_len, batch_size=16).perplexity,
                    "keep": result.keep,
                    "kv": result.kv_bytes_per_token_after,
                    "kv_before": result.kv_bytes_per_token_before,
                    "removed": {k: v["blocks"] for k, v in notes["removed"].items()},
                    "seconds": time.perf_counter() - start,
                }
        print(method, settings, f"{keep:.4f}", seed, row, flush=True)
        self.rows[key] = row
        if args.partial:
            args.partial.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        return row

    def at_sparsity(self, run: tuple[str, dict[str, Any]], level: float) -> dict:
        method, settings = run
        n = floor(level * self.blocks + 0.5)
        sparsity = {} if FREE in settings else {"sparsity": n / self.blocks}  # what rounds to the same is measured once
        return self.run(method, {k: v for k, v in settings.items() if k != FREE} | sparsity, 1 - n / self.blocks)

    def at_keep(self, run: tuple[str, dict[str, Any]], keep: float) -> dict:
        method, settings = run
        if method in BLOCKS:  # the fewest blocks that meet the budget: the same runs as at equal sparsity
            return self.at_sparsity(run, ceil((1 - keep) * self.blocks - 1e-9) / self.blocks)
        return self.run(method, {k: v for k, v in settings.items() if k != FREE}, keep)

    def describe(self) -> str:
        return (
            f"{self.blocks} blocks, hidden size {self.hidden}; dense perplexity {self.dense:.3f} ({self.tokens} tokens, "
            f"windows of {self.args.seq_len}); calibration {self.args.windows} × {self.args.seq_len} tokens of "
            f"{self.source}, losses compared on {self.args.search_windows} of these windows."
        )


def write_sparsity(b: Bench) -> list[str]:
    """Every method with the same share of submodules gone."""
    levels = b.args.levels
    counts = {s: floor(s * b.blocks + 0.5) for s in levels}
    lines = [
        "Sparsity is the share of attentions and of feed-forwards (or blocks) that goes, rounded half up: "
        + ", ".join(f"{100 * s:g} % → {n} of {b.blocks} ({100 * n / b.blocks:.1f} %)" for s, n in counts.items())
        + ". In brackets: the share of the blocks' weights that is kept, net of what replacements add, counted. The methods "
        "with free numbers remove, net, at least the weights of that many whole blocks.",
        "",
    ]
    names = [f"{100 * s:g} %" for s in levels]
    for title, group in (("Attentions and feed-forwards, or whole blocks", WHOLE), ("Attentions only", ATTENTION)):
        rows = {m: [b.at_sparsity(run, s) for s in levels] for m, run in group.items()}
        lines += [f"### {title}", "", *grid(names, {m: list(map(cell, r)) for m, r in rows.items()}), ""]
        before = next(x["kv_before"] for r in rows.values() for x in r if "kv_before" in x)
        caches = {m: [str(x.get("kv", "–")) for x in r] for m, r in rows.items()}
        lines += [f"Cache, bytes per token (dense {before}):", "", *grid(names, caches), ""]
    return lines + compare(
        b, {n: {m: b.at_sparsity(run, s) for m, run in WHOLE.items()} for n, s in zip(names, levels)}
    )


def write_keep(b: Bench) -> list[str]:
    """Every method under the same budget of weights."""
    names = [f"{k:g}" for k in b.args.keeps]
    rows = {m: [b.at_keep(run, k) for k in b.args.keeps] for m, run in KEPT.items()}
    lines = [
        "At most this share of the blocks' weights stays, with what replacements add; in brackets: what stays, counted. Where "
        "whole blocks go, the next whole number of blocks does.",
        "",
        *grid(names, {m: list(map(cell, r)) for m, r in rows.items()}),
        "",
    ]
    return lines + compare(b, {n: {m: rows[m][i] for m in KEPT} for i, n in enumerate(names)})


def write_ablation(b: Bench) -> list[str]:
    """One change to the defaults at a time."""
    level, seeds = b.args.ablation_level, b.args.seeds
    n = floor(level * b.blocks + 0.5)
    rows = {
        m: [b.run("subfit", s | {"sparsity": level}, 1 - n / b.blocks, seed) for seed in seeds]
        for m, s in ABLATION.items()
    }
    return [
        f"{n} of {b.blocks} attentions and of feed-forwards go ({100 * n / b.blocks:.1f} %). In brackets: keep, counted. One "
        "change to the defaults at a time; a column is one draw of the calibration windows.",
        "",
        *grid([f"seed {s}" for s in seeds], {m: list(map(cell, r)) for m, r in rows.items()}),
    ]


def write_speed(args: argparse.Namespace) -> list[str]:
    """Time to first token and decode rate beside the dense model, medians over alternating repeats."""
    lines = [
        f"{100 * args.speed_level:g} % of the attentions and of the feed-forwards (or of the blocks) gone, batch 1, prompt 128, 64 "
        f"new tokens, {torch.get_num_threads()} thread(s), models measured in turns ({args.repeats} times), medians.",
        "",
        "| model | compressed by | time to first token, ms | gain | decode, tokens/s | gain | cache after the run, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    cheap = {"attention_score": "influence", "ffn_score": "error", "fit": "once", "ridge": 1e-3}
    with tempfile.TemporaryDirectory() as place:
        random = Path(place) / "random"
        write_model(
            random, torch.float32, hidden_size=768, intermediate_size=2048, num_hidden_layers=16,
            num_attention_heads=12, num_key_value_heads=4, vocab_size=4096,
        )  # fmt: skip
        for name, folder in (("embedded, 6.5 M", DEMO), ("random weights, 0.11 B, 16 blocks", random)):
            models = {"dense": load(folder, dtype=torch.float32)}
            ids = torch.randint(1, 4096, (4096,), generator=torch.Generator().manual_seed(0))
            for method, settings in (("subfit", cheap), ("llm-drop", {}), ("shortgpt", {})):
                out = Path(place) / f"{folder.name}-{method}"
                planish.compress(
                    folder, output=out, method=method, settings=settings | {"sparsity": args.speed_level},
                    calibration=ids, n_samples=16, seq_len=256, device="cpu",
                )  # fmt: skip
                models[method] = load(out, dtype=torch.float32)
            found = bench(models, batch_sizes=(1,), prompt_len=128, new_tokens=64, repeats=args.repeats)
            base = {s.model: s for s in found}["dense"]
            for s in found:
                first, decode = s.time_to_first_token_s.median, s.decode_tokens_per_s.median
                lines.append(
                    f"| {name} | {s.model} | {1000 * first:.1f} | × {base.time_to_first_token_s.median / first:.2f} "
                    f"| {decode:.0f} | × {decode / base.decode_tokens_per_s.median:.2f} | {s.kv_bytes} |"
                )
    return lines


def grid(columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def cell(row: dict) -> str:
    return "refused" if "refused" in row else f"{row['ppl']:.3f} ({row['keep']:.3f})"


def compare(b: Bench, columns: dict[str, dict[str, dict]]) -> list[str]:
    """Every column: subfit's defaults and options beside the best of the others, said by the measurements."""
    lines = [
        "Perplexity over the dense model's, and the weights kept; the other methods' best beside subfit's defaults and options.",
        "",
    ]
    for name, rows in columns.items():
        ratio = {m: r["ppl"] / b.dense for m, r in rows.items() if "ppl" in r}
        own = [m for m in ratio if m in ("subfit", "subfit, free numbers", "subfit, repaired")]
        best = min((m for m in ratio if not m.startswith("subfit")), key=lambda m: ratio[m])
        sides = [f"{m} × {ratio[m]:.3f} (keep {rows[m]['keep']:.3f})" for m in (best, *own)]
        lines.append(f"- {name}: {'; '.join(sides)}")
    return lines


SECTIONS: dict[str, tuple[str, Callable[[Bench], list[str]]]] = {
    "sparsity": ("{}: the same sparsity", write_sparsity),
    "keep": ("{}: the same keep", write_keep),
    "ablation": ("{}: ablation", write_ablation),
}


def main() -> None:
    def floats(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split(",")))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--text", type=Path, help="a text file: its last fifth is evaluated; default: builtin")
    parser.add_argument("--name", default="The embedded model")
    parser.add_argument("--sections", type=lambda t: t.split(","), default=list(SECTIONS), help="also: speed")
    parser.add_argument("--levels", type=floats, default=LEVELS)
    parser.add_argument("--keeps", type=floats, default=KEEPS)
    parser.add_argument("--ablation-level", type=float, default=0.25)
    parser.add_argument("--seeds", type=lambda t: tuple(map(int, t.split(","))), default=(0,), help="of the ablation")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64 * 256, help="evaluated tokens")
    parser.add_argument("--search-windows", type=int, default=16, help="of those, on which losses are compared")
    parser.add_argument("--speed-level", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--partial", type=Path, help="file in which what has been measured is kept")
    parser.add_argument("--output", type=Path, default=TABLE)
    args = parser.parse_args()
    chosen = [n for n in args.sections if n != "speed"]
    bench = Bench(args) if chosen else None
    for name in chosen:
        title, write = SECTIONS[name]
        assert bench is not None
        save(args.output, title.format(args.name), [bench.describe(), "", *write(bench)])
    if "speed" in args.sections:
        save(args.output, "Speed", write_speed(args))


def save(table: Path, title: str, lines: list[str]) -> None:
    """Add or replace one section of the table."""
    head = "# Removing and replacing submodules\n\nWritten by `benchmarks/replacement.py`.\n\n"
    old = table.read_text(encoding="utf-8") if table.is_file() else head
    sections = {s.splitlines()[0]: s.rstrip() + "\n" for s in re.split(r"(?m)^## ", old)[1:]}
    sections[title] = "\n".join([title, "", *lines]) + "\n"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(head + "\n".join(f"## {s}" for s in sections.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
