"""The KV cache's bits and its cuts at equal bytes; writes docs/tables/kv_cache.md and kv_cache.csv.

    python benchmarks/kv_cache.py                                                      # the embedded model
    python benchmarks/kv_cache.py --model FOLDER --name NAME --text FILE               # FILE is split: 3/4 to calibrate

Dense and cut models (`--kv-keep`) with caches of 16, 8, 4 bits and fewer (`planish.export.cache_bits`), and the dense model in
llama.cpp with its own types (`-ctk`, `-ctv`). KL: of the next token's distribution from the dense model's with a cache that is not
rounded, on text that nothing was calibrated on. Weights are not rounded. A row that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from book import append_row
from structural import ROOT, split_text
from torch import Tensor, nn
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import eval_windows, load_tokens
from planish.errors import PlanishError
from planish.export import export
from planish.export.cache_bits import CacheBits, caching
from planish.export.llama_cpp import LlamaCpp

TABLE = ROOT / "docs" / "tables" / "kv_cache.md"
FIELDS = ("model", "protocol", "stack", "kv_keep", "cache", "bytes", "kl", "stderr", "excess", "cpu_seconds")
GGML = {"f16": 16, "q8_0": 8.5, "q4_1": 5, "q4_0": 4.5}  # bits per number
HEAD = """# Bits of the KV cache

Written by `benchmarks/kv_cache.py` from kv_cache.csv. kv-keep: share of the numbers in the cache that stays. Cache: bits of a
number, in groups of 32 numbers of a token with a scale (8 bits), or a scale and a least number (fewer); "keys by channel": 32
tokens share a scale (KIVI), which lets every token know the range of up to 31 later ones. Bytes per token count scales. KL:
nats per token from the dense model with a cache that is not rounded, on text that nothing was calibrated on, with its standard
error; excess: of the loss there. llama.cpp: the dense model with its own types of caches (`-ctk`, `-ctv`) and flash attention, from
itself with an fp32 cache; it rounds only heads of a multiple of 32 dimensions. Best: nothing of this stack that is no larger
has a smaller KL.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and measure on (default: builtin)")
    parser.add_argument("--method", default="auto", help="what cuts the cache")
    parser.add_argument("--keeps", default="0.75,0.58,0.4")
    parser.add_argument("--bits", default="16,8,4,3,2")
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="of the text that is measured on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only-table", action="store_true", help="write the table of what the CSV has")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    args.book = args.table.with_suffix(".csv")
    if not args.only_table:
        with tempfile.TemporaryDirectory() as scratch:
            measure_all(args, Path(scratch))
    args.table.write_text(tabulate(read(args.book)))


@torch.no_grad()
def measure_all(args: argparse.Namespace, scratch: Path) -> None:
    args.fit, held = split_text(args.text, scratch)
    tokens = load_tokens(held, AutoTokenizer.from_pretrained(args.model), split="evaluation")
    windows = eval_windows(tokens.tokens, args.seq_len, tokens.begin)[: args.windows]
    dense = planish.load(args.model, dtype="float32")
    reference = [log_probabilities(dense, w) for w in windows]
    kinds = [CacheBits(int(b)) for b in args.bits.split(",")] + [CacheBits(b, channel=True) for b in (4, 3, 2)]
    for keep in (1.0, *map(float, args.keeps.split(","))):
        if all(known(args, "transformers", keep, name_cache(k)) for k in kinds):
            continue
        start = time.process_time()
        small = dense
        if keep < 1:
            folder = scratch / f"keep-{keep}"
            planish.compress(args.model, output=folder, method=args.method, kv_keep=keep, calibration=args.fit,
                             n_samples=args.n_samples, seq_len=args.seq_len, cache=False)  # fmt: skip
            small = planish.load(folder, dtype="float32")
        rows = list_rows(small, windows[0])
        for kind in kinds:
            with caching(small, kind) if kind.bits < 16 else nullcontext():
                found = compare(reference, windows, lambda w: log_probabilities(small, w))  # noqa: B023
            note(args, "transformers", keep, name_cache(kind), sum(map(kind.count, rows)), found, start)
            start = time.process_time()
    measure_llama_cpp(args, scratch, windows, list_rows(dense, windows[0]))


def measure_llama_cpp(args: argparse.Namespace, scratch: Path, windows: Tensor, rows: list[int]) -> None:
    """The dense model with every type of its cache, beside itself with fp32."""
    try:
        export(args.model, "gguf", scratch / "m.gguf", dtype="f32")
        plain = LlamaCpp(scratch / "m.gguf", args.seq_len)
        reference = [plain.logits(w).double().log_softmax(-1) for w in windows]
    except PlanishError as error:
        print(error)
        return
    for name, bits in GGML.items():
        if known(args, "llama.cpp", 1.0, name):
            continue
        start = time.process_time()
        try:
            runner = LlamaCpp(scratch / "m.gguf", args.seq_len, cache=name)
        except PlanishError as error:  # heads of a multiple of 32 dimensions alone
            print(error)
            continue
        found = compare(reference, windows, lambda w: runner.logits(w).double().log_softmax(-1))  # noqa: B023
        note(args, "llama.cpp", 1.0, name, sum(rows) * bits / 8, found, start)


def list_rows(model: nn.Module, window: Tensor) -> list[int]:
    """Numbers of a token in every row that is cached: of keys, and of values, in every block."""
    cached = model(input_ids=window[None, :4], use_cache=True).past_key_values
    return [t.shape[1] * t.shape[3] for layer in cached.layers for t in (layer.keys, layer.values)]


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    return model(input_ids=window[None]).logits[0].double().log_softmax(-1)


def compare(reference: list[Tensor], windows: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """KL, its standard error, and the loss over the reference's, in nats per token."""
    kl, excess = [], []
    for p, window in zip(reference, windows, strict=True):
        q = run(window)
        kl.append((p.exp() * (p - q)).sum(-1)[:-1])
        excess.append((p - q)[:-1].gather(1, window[1:, None])[:, 0])
    values = torch.cat(kl)
    return float(values.mean()), float(values.std() / math.sqrt(len(values))), float(torch.cat(excess).mean())


def name_cache(kind: CacheBits) -> str:
    return f"{kind.bits} bits" + ", keys by channel" * kind.channel


def read(book: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(book.open())) if book.exists() else []


def key(args: argparse.Namespace, stack: str, keep: float, cache: str) -> dict[str, str]:
    protocol = f"{args.method}, {args.n_samples} × {args.seq_len} tokens; {args.windows} windows"
    return {"model": args.name, "protocol": protocol, "stack": stack, "kv_keep": f"{keep:g}", "cache": cache}


def known(args: argparse.Namespace, stack: str, keep: float, cache: str) -> bool:
    wanted = key(args, stack, keep, cache)
    return any(all(row[n] == v for n, v in wanted.items()) for row in read(args.book))


def note(args: argparse.Namespace, stack: str, keep: float, cache: str, size: float, found: Any, start: float) -> None:
    kl, error, excess = found
    row = key(args, stack, keep, cache) | {
        "bytes": f"{size:.0f}", "kl": f"{kl:.6f}", "stderr": f"{error:.6f}", "excess": f"{excess:.6f}",
        "cpu_seconds": f"{time.process_time() - start:.1f}",
    }  # fmt: skip
    append_row(args.book, FIELDS, row)
    print(*row.values(), flush=True)


def tabulate(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for model, protocol in dict.fromkeys((r["model"], r["protocol"]) for r in rows):
        own = [r for r in rows if (r["model"], r["protocol"]) == (model, protocol)]
        lines += [
            f"## {model} ({protocol})\n",
            "| stack | kv-keep | cache | bytes per token | KL | ± | excess | best |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for r in sorted(own, key=lambda r: (r["stack"], -int(r["bytes"]), float(r["kl"]))):
            alike = [o for o in own if o["stack"] == r["stack"] and int(o["bytes"]) <= int(r["bytes"])]
            best = "yes" if min(float(o["kl"]) for o in alike) == float(r["kl"]) else ""
            lines.append(
                f"| {r['stack']} | {r['kv_keep']} | {r['cache']} | {int(r['bytes']):,} | {float(r['kl']):.5f} | "
                f"{float(r['stderr']):.5f} | {float(r['excess']):.5f} | {best} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
