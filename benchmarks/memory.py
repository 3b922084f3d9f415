"""Peak memory of `planish compress` on a random-weight model of several gigabytes, against the model's size.

    python benchmarks/memory.py                     # 4.2 GB of bf16 weights in 168 blocks
    python benchmarks/memory.py --method svd-llm --blocks 80 --dtype float32
    python benchmarks/memory.py --method auto --blocks 40      # statistics of every block kept on disk in between
    python benchmarks/memory.py --dtype float8_e4m3fn --size 4.2   # a checkpoint in FP8 of so many GB, dequantised as it is read
    python benchmarks/memory.py --experts 64 --intermediate 512 --size 4.2 --method reap    # Qwen3-MoE, 8 of them per token
    python benchmarks/memory.py --shape 70b --blocks 2 --method a3    # blocks of 0.86 B weights, Grams of 28,672² (6.6 GB)

Writes the model to a temporary folder, or one that stays (twice its size is needed on disk), runs the compression in a process of
its own and reads that process's peak resident memory from the kernel. One row is put into docs/tables/memory.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from random_model import write_model

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "memory.md"
HEAD = """# Peak memory of `planish compress`

Measured by `python benchmarks/memory.py`: peak resident memory of the whole process (Python and its libraries included)
on random-weight LLaMA folders, with experts Qwen3-MoE of which a token reaches 8; "predicted" = `planish plan`; "of it" = peak /
size of the weights on disk. The aim for whole models is below 35 %. Shape 70b: real blocks of a 70 B model (hidden 8192,
intermediate 28,672, 64 / 8 heads), a few of them. Minutes of the clock, of its phases, and predicted; on a busy machine more than
predicted.

| model | blocks | on disk | method | tokens | predicted | peak | of it | minutes |
|---|---|---|---|---|---|---|---|---|
"""
SHAPES = {"70b": (8192, 28672, 64, 8, 8000)}  # hidden, intermediate, heads, kv heads, vocabulary


def read_peak(process: int) -> tuple[int, int]:
    """Of a running process, in bytes, from the kernel (Linux): resident memory at its highest so far; pages of files in it now."""
    found = {"VmHWM:": 0, "RssFile:": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
            if (name := line.partition("\t")[0]) in found:
                found[name] = int(line.split()[1]) * 1024
    return found["VmHWM:"], found["RssFile:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="flat-llm")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--shape", choices=SHAPES, help="in place of hidden and intermediate")
    parser.add_argument("--blocks", type=int, default=168)
    parser.add_argument("--experts", type=int, default=0, help="in every block, each of --intermediate neurons")
    parser.add_argument("--dtype", default="bfloat16", help="float8_e4m3fn: FP8 in blocks of 128 × 128")
    parser.add_argument("--size", type=float, help="in place of blocks: about so many GB on disk")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--table", type=Path, default=TABLE, help="where the row goes")
    parser.add_argument("--first", type=int, default=0, help="stop after so many blocks: every one of them is alike")
    parser.add_argument("--folder", type=Path, help="the model is written here and stays, or is here from a run before")
    parser.add_argument("--set", action="append", help="settings; by default the damping that few tokens need")
    args = parser.parse_args()
    if args.set is None:
        args.set = {"auto": ["ridge=0.001"], "reap": [], "hope": []}.get(args.method, ["damping=0.01"])
    with tempfile.TemporaryDirectory(prefix="planish-memory-") as folder:
        chosen = SHAPES.get(args.shape, (args.hidden, args.intermediate, args.hidden // 64, args.hidden // 128, 32000))
        args.hidden, args.intermediate, heads, kv_heads, vocabulary = chosen
        if args.size:
            width, inner = args.hidden, args.intermediate
            weights = width * (width + 2 * width * kv_heads // heads + width + 3 * inner * max(args.experts, 1))
            kind = getattr(torch, args.dtype)
            outer = 2 * vocabulary * width * max(kind.itemsize, 2)
            args.blocks = max(1, round((args.size * 1e9 - outer) / (weights * kind.itemsize)))
        sizes = {
            "vocab_size": vocabulary, "hidden_size": args.hidden, "intermediate_size": args.intermediate,
            "num_hidden_layers": args.blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        }  # fmt: skip
        if args.experts:
            sizes |= {"num_experts": args.experts, "moe_intermediate_size": args.intermediate, "head_dim": 64}
        model, out, text = (Path(folder) / n for n in ("model", "out", "text.npy"))
        model = args.folder or model
        if not (model / "model.safetensors.index.json").is_file():
            write_model(model, getattr(torch, args.dtype), **sizes)
        size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
        np.save(text, np.random.default_rng(0).integers(0, vocabulary, args.samples * args.seq_len))
        words = [
            str(model), "--keep", "0.8", "--method", args.method, "--calibration", str(text), "--n-samples", str(args.samples),
            "--seq-len", str(args.seq_len), "--json",
        ]  # fmt: skip
        for setting in args.set:
            words += ["--set", setting]
        planish = [sys.executable, "-m", "planish"]
        done = subprocess.run([*planish, "plan", *words], check=True, stdout=subprocess.PIPE)
        plan = json.loads(done.stdout)
        predicted = plan["peak_ram_bytes"]
        print(f"predicted {predicted / 1e9:.2f} GB, {plan['seconds'] / 60:.1f} minutes", flush=True)
        start = time.perf_counter()
        command = [*planish, "compress", *words, "-o", str(out), "--no-cache"]
        result, shards = Path(folder) / "result.json", out.with_name("out.partial")
        peak = of_files = 0
        with result.open("w") as file:
            process = subprocess.Popen(command, stdout=file)
        while process.poll() is None:
            peak, of_files = map(max, (peak, of_files), read_peak(process.pid))
            time.sleep(0.2)
            if args.first and len(list(shards.glob("*.safetensors"))) > args.first:
                process.kill()
        if process.returncode and not args.first:
            raise SystemExit(f"compress failed with {process.returncode}")
        minutes = f"{(time.perf_counter() - start) / 60:.1f}"
        if not process.returncode:
            phases = json.loads(result.read_text())["seconds"]
            parts = [f"{phase} {s / 60:.1f}" for phase, s in phases.items() if phase != "total" and s >= 3]
            minutes += f" ({', '.join(parts)}; predicted {plan['seconds'] / 60:.1f})"
            if args.experts:
                own = {
                    n: 1e3 * phases.get(n, 0) / args.blocks / args.experts
                    for n in ("statistics", "gradients", "stream", "write")
                }
                minutes += f"; ms per expert: {', '.join(f'{n} {t:.1f}' for n, t in own.items() if t)}"
    shape = (f"{args.shape}: " if args.shape else "") + f"{args.hidden}/{args.intermediate} {args.dtype}"
    shape += f", {args.experts} experts" if args.experts else ""
    blocks = f"first {args.first} of {args.blocks}" if args.first else str(args.blocks)
    row = (
        f"| {shape} | {blocks} | {size / 1e9:.2f} GB | {args.method} | {args.samples * args.seq_len} | "
        f"{predicted / 1e9:.2f} GB | {peak / 1e9:.2f} GB | **{peak / size:.1%}** | {minutes} |"
    )
    print(json.dumps({"model_bytes": size, "peak_rss_bytes": peak, "of_files": of_files, "share": peak / size}))
    print(row)
    keep = args.table.read_text(encoding="utf-8") if args.table.exists() else HEAD
    keep = keep if keep.startswith(HEAD) else HEAD  # rows of other columns
    same = " | ".join(row.split(" | ")[:4])
    rows = [r for r in keep.splitlines() if not r.startswith(same)]
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text("\n".join([*rows, row]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
