"""Predicted and measured decode latency of compressed random-weight models; docs/tables/latency.md.

    python benchmarks/latency.py [--shares 0.9,0.8,0.7,0.6] [--blocks 8] [--threads 1]

For every share s of the uncompressed model's predicted latency, `--max-latency` s × that; then the dense and the
compressed models decode in turns, batch 1, behind the same context, least and median of all tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_model import write_model

import planish
from planish.errors import InputError

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "latency.md"
HEAD = """# Predicted and measured decode latency

`python benchmarks/latency.py`: {count:.2f} B random weights, {blocks} blocks, hidden {hidden}, fp32, {threads} thread(s), batch 1,
{context} tokens of context. The models decode in turns, {tokens} tokens each; milliseconds per token.

| method | asked | keep | predicted | measured: least | off | median | measured / dense (median) |
|---|---|---|---|---|---|---|---|
"""


@torch.no_grad()
def decode(model, context: int, tokens: int, times: list[float]) -> None:
    """Append the seconds of each of `tokens` decoded tokens behind `context` others."""
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    for n in range(tokens + 1):
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        if n:
            times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shares", default="0.9,0.8,0.7,0.6")
    parser.add_argument("--methods", default="auto,flat-llm")
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE, help="where the page goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="planish-latency-") as folder:
        model = Path(folder) / "model"
        write_model(
            model, torch.float32, vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
            num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128,
        )  # fmt: skip
        ids = torch.randint(args.vocabulary, (args.windows * args.context,), generator=torch.Generator().manual_seed(0))
        common = {
            "calibration": ids,
            "n_samples": args.windows,
            "seq_len": args.context,
            "device": "cpu",
            "cache": True,
        }
        os.environ["PLANISH_CACHE"] = str(Path(folder) / "cache")  # a table of its own
        dense = planish.forecast(model, method="svd", max_latency=1e6, context=args.context, device="cpu")
        rows = [("", None, dense.latency_ms_before, 1.0)]
        models = [planish.load(model, dtype="float32")]
        for method in args.methods.split(","):
            for share in map(float, args.shares.split(",")):
                out = Path(folder) / f"{method}-{share}"
                asked = share * dense.latency_ms_before
                try:
                    found = planish.compress(model, output=out, method=method, max_latency=asked, **common)
                except InputError as error:
                    print(f"{method} {asked:.2f} ms: {error}", flush=True)
                    continue
                rows.append((method, asked, found.latency_ms_after, found.keep))
                models.append(planish.load(out, dtype="float32"))
                print(
                    f"{method} asked {asked:.2f} ms, predicted {found.latency_ms_after:.2f}, keep {found.keep:.3f}",
                    flush=True,
                )
        times: list[list[float]] = [[] for _ in models]
        for _ in range(args.rounds):
            for m, found in zip(models, times, strict=True):
                decode(m, args.context, 16, found)
        count = sum(p.numel() for p in models[0].parameters()) / 1e9
    text = HEAD.format(
        count=count, blocks=args.blocks, hidden=args.hidden, threads=torch.get_num_threads(), context=args.context,
        tokens=16 * args.rounds,
    )  # fmt: skip
    for (method, asked, predicted, keep), found in zip(rows, times, strict=True):
        least, median = (f(found) * 1e3 for f in (min, statistics.median))
        # of pairs of tokens that lie next to each other in time
        ratio = statistics.median(a / b for a, b in zip(found, times[0], strict=True))
        text += (
            f"| {method or 'dense'} | {'' if asked is None else f'{asked:.2f}'} | {keep:.3f} | {predicted:.2f} | {least:.2f} | "
            f"{predicted / least - 1:+.0%} | {median:.2f} | {ratio:.2f} |\n"
        )
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
