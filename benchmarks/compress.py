"""Where `compress` spends its time, its floor, and its whitened truncation against the published procedure, in one run.

    python benchmarks/compress.py               # 24 blocks, 0.5 B parameters
    python benchmarks/compress.py --blocks 2    # the same shapes, fewer blocks

Floor: the products of one forward pass over the tokens at the rate this machine reaches on the blocks' own linears in fp32,
and reading the model's files and writing the result's (with fsync), both measured here, in turns with the methods.

Published procedure (SVD-LLM): Cholesky factor S of the input Gram, SVD of W S, explicit inverse of S, factors cut at the
rank; in fp64, and in the published code's fp32. Ours: `planish.linalg.whitened_svd` and the balanced pair. Seconds are CPU
seconds of this process, so that a busy machine counts the same for both. Writes docs/tables/speed.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from random_model import write_model

from planish.checkpoint import open_source
from planish.compress import Job, compress
from planish.core import Unit
from planish.edits import low_rank_edit
from planish.linalg import whitened_svd
from planish.methods import find_method
from planish.stats import Tap
from planish.stream import Stream

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "speed.md"
SITES = {"q": "q.in", "k": "q.in", "v": "q.in", "o": "o.in", "gate": "up.in", "up": "up.in", "down": "down.in"}


def published(w: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SVD-LLM's truncation as its code does it: B (out, rank), A (rank, in)."""
    s = torch.linalg.cholesky(gram)
    u, d, vh = torch.linalg.svd(w @ s, full_matrices=False)
    scale = d[:rank].sqrt()
    return u[:, :rank] * scale, (scale[:, None] * vh[:rank]) @ torch.linalg.inv(s)


def ours(w: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    edit = low_rank_edit("q", *whitened_svd(w, gram).at(rank), "pair", orthogonal=True)
    return edit.tensors["B.weight"], edit.tensors["A.weight"]


def measure_rate(job: Job, tokens: int) -> float:
    """FLOP/s of a block's linears in fp32 on `tokens` inputs."""
    pairs = []
    for role in job.shapes[0].roles:
        out, n = job.shapes[0].linear(role)
        pairs.append((torch.randn(tokens, n), torch.randn(out, n)))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * job.shapes[0].count() / best


def measure_files(model: Path, result: Path, scratch: Path) -> float:
    """Seconds to read a folder's weights and to write another's, durably."""
    buffer = bytearray(64 << 20)
    start = time.perf_counter()
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in result.glob("*.safetensors"):
        with (scratch / "copy").open("wb", buffering=0) as file:
            file.write(memoryview(bytes(path.stat().st_size)))
            os.fsync(file.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--methods", default="svd-llm,flat-llm,a3", help="whose seconds are measured")
    args = parser.parse_args()
    lines = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory(prefix="planish-speed-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Path(folder) / "model"
        write_model(
            model, vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
            num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128,
        )  # fmt: skip
        windows = torch.randint(
            0, args.vocabulary, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0)
        )
        say("# Seconds per phase, and the solve against the published procedure")
        say()
        say(
            f"`python benchmarks/compress.py`: {args.blocks} blocks of hidden {args.hidden}, intermediate "
            f"{args.intermediate}, random bf16 weights, {windows.numel()} tokens, {torch.get_num_threads()} thread(s)."
        )
        say()
        say("| method | plan | stream + statistics | solve | write | total | one forward | files | total / floor |")
        say("|---|---|---|---|---|---|---|---|---|")
        shapes = Job(Stream(open_source(model), windows), find_method("svd-llm"), 0.8)
        for method in args.methods.split(","):
            settings = {"allocation": "uniform"} if method == "flat-llm" else {}
            rate = measure_rate(shapes, windows.numel())
            out = Path(folder) / method
            result = compress(model, output=out, keep=0.8, method=method, windows=windows, settings=settings)
            seconds = result.seconds
            rate = max(rate, measure_rate(shapes, windows.numel()))
            attend = 2 * sum(2 * s.heads * (s.qk + s.v) for s in shapes.shapes) * args.seq_len / 2
            forward = windows.numel() * (2 * shapes.weights + attend) / rate
            files = measure_files(model, out, Path(folder))
            phases = sum(v for p, v in seconds.items() if p not in ("solve", "write", "total", "plan"))
            cells = [
                seconds.get("plan", 0.0),
                phases,
                seconds.get("solve", 0.0),
                seconds.get("write", 0.0),
                seconds["total"],
            ]
            cells += [forward, files]
            ratio = seconds["total"] / (forward + files)
            say(f"| {method} | " + " | ".join(f"{s:.1f} s" for s in cells) + f" | **{ratio:.1f}** |")
        say()
        say(f"The floor's forward pass runs at {rate / 1e9:.0f} GFLOP/s: fp32 products of a block's own linears.")
        stream = Stream(open_source(model), windows)
        job = Job(stream, find_method("svd-llm"), 0.8)
        plan = job.method.plan(job)
        spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        gaps: dict[str, list[float]] = defaultdict(list)

        def use(i: int, block: torch.nn.Module, stats) -> None:
            for role, site in SITES.items():
                w = stream.source.block(i).get_submodule(stream.family.path(role)).weight.double()
                gram, rank = stats.mean(Tap(site, "gram")), plan[Unit(i, role)]
                errors = {}
                for name, solve, dtype in (
                    ("ours", ours, torch.float64),
                    ("published", published, torch.float64),
                    ("published, fp32", published, torch.float32),
                ):
                    start = time.process_time()
                    b, a = solve(w.to(dtype), gram.to(dtype), rank)
                    spent[role][name] += time.process_time() - start
                    e = w - b.double() @ a.double()
                    errors[name] = float(((e @ gram) * e).sum())
                for name in errors:
                    gaps[name].append(errors[name] / errors["published"] - 1)

        taps = sorted({Tap(site, "gram") for site in SITES.values()})
        stream.sweep(lambda shape: taps, use)
    names = ("ours", "published", "published, fp32")
    say()
    say("| linear (out × in) | ours | published, fp64 | published, fp32 | fp64 / ours | fp32 / ours |")
    say("|---|---|---|---|---|---|")
    spent["all"] = {n: sum(s[n] for s in spent.values()) for n in names}
    for role, s in spent.items():
        size = "" if role == "all" else " ({} × {})".format(*job.shapes[0].linear(role))
        mine, exact, single = (s[n] for n in names)
        say(
            f"| {role}{size} | {mine:.2f} s | {exact:.2f} s | {single:.2f} s | {exact / mine:.1f}× | {single / mine:.1f}× |"
        )
    say()
    say(
        f"Largest relative gap of the output error to the published fp64 result: ours {max(map(abs, gaps['ours'])):.0e}, "
        f"published in fp32 {max(map(abs, gaps['published, fp32'])):.0e}."
    )
    say()
    say(
        "The limit is the symmetric fp64 eigenproblem of each linear's smaller side: most of what is left for square linears."
    )
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
