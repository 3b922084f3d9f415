"""Is a compressed model faster than the dense one, as it is and compiled? docs/tables/decode.md.

    python benchmarks/decode.py [--methods flat-llm,a3,svd-llm,mpifa] [--keeps 0.8,0.7] [--hidden 1024] [--context 128]
    python benchmarks/decode.py --model MODEL --calibration builtin     # a real one, in the place of random weights

Every method at every keep, on few calibration tokens: only shapes matter for speed. Dense and compressed models decode in turns at
batch 1, first as they are, then with compiled steps; times are CPU seconds of the process, which other processes hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_model import write_model
from structural import write_section

import planish
from planish.evaluate.speed import Speed, bench

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "decode.md"
HEAD = """# Decode speed, as it is and compiled

Written by `benchmarks/decode.py`: one token after the other, batch 1, in turns with the dense model; CPU ms per token, median.
"× dense" is the median of paired turns (lowest – highest). "Compiled": `planish bench --compile`, decode steps as one graph over a
static cache, the dense model's too. Weights are random unless a model is named: only shapes matter for speed.
"""


def compress_all(model: Path, folder: Path, args: argparse.Namespace, calibration: Any) -> dict[str, Path]:
    """The dense model and every method at every keep, unless `folder` holds it: a label for the table → folder."""
    found = {"dense | 1.000": model}
    for method in args.methods.split(","):
        for keep in map(float, args.keeps.split(",")):
            out = folder / f"{method}-{keep}"
            if not out.exists():
                planish.compress(
                    model, output=out, method=method, keep=keep, calibration=calibration, n_samples=24, seq_len=128,
                    round_to=args.round_to, device="cpu",
                )  # fmt: skip
            found[f"{method} | {json.loads((out / 'planish.json').read_text())['result']['keep']:.3f}"] = out
            print(f"{method}, keep {keep}", flush=True)
    return found


def show(s: Speed, dense: Speed) -> str:
    """Cells of one model's decoding."""
    if not s.compiled and s.note:
        return f"{s.note} |"
    ratios = sorted(b / a for a, b in zip(s.decode_cpu_s.values, dense.decode_cpu_s.values, strict=True))
    ms = s.decode_cpu_s.median / s.new_tokens * 1e3
    return f"{ms:.1f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="flat-llm,a3,svd-llm,mpifa")
    parser.add_argument("--keeps", default="0.8,0.7")
    parser.add_argument("--model", help="in the place of random weights")
    parser.add_argument("--calibration", default="builtin", help="text for --model")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=4, help="tokens of a turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--round-to", default="1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the models in this folder, and use those that are there")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    args = parser.parse_args()
    args.round_to = int(args.round_to) if args.round_to.isdigit() else args.round_to
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="planish-decode-") as scratch:
        work = args.work or Path(scratch)
        model, calibration = Path(args.model or work / "dense"), args.calibration
        if not args.model:
            calibration = torch.randint(args.vocabulary, (24 * 128,), generator=torch.Generator().manual_seed(0))
        if not model.exists():
            write_model(
                model, torch.float32, vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
                num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256,
                head_dim=64,
            )  # fmt: skip
        folders = compress_all(model, work, args, calibration)
        models = {n: planish.load(f, dtype=args.dtype) for n, f in folders.items()}
        ways: list[list[Speed]] = []
        for compiled in (False,) if args.no_compile else (False, True):
            ways.append(
                bench(
                    models,
                    batch_sizes=(1,),
                    prompt_len=args.context,
                    new_tokens=args.new,
                    repeats=args.repeats,
                    device="cpu",
                    compile=compiled,
                )
            )
            write(args, list(folders), ways)


def write(args: argparse.Namespace, names: list[str], ways: list[list[Speed]]) -> None:
    """The section of these measurements: as they are, and compiled where that was measured."""
    rows = "| method | keep |" + "".join(f" {how}: ms | × dense |" for how in ("as it is", "compiled")[: len(ways)])
    rows += f"{' compile s |' * (len(ways) - 1)}\n{'|---' * (3 * len(ways) + 1)}|\n"
    for i, name in enumerate(names):
        last = ways[-1][i].compile_s
        seconds = [] if len(ways) == 1 else ["" if last is None else f"{last:.0f}"]
        rows += f"| {' | '.join([name, *(show(speeds[i], speeds[0]) for speeds in ways), *seconds])} |\n"
    random = f"random, hidden {args.hidden}, {args.blocks} blocks, vocabulary {args.vocabulary}"
    what = Path(args.model).name if args.model else random
    how = f"{what}, {args.context} tokens of context, {args.dtype}, round-to {args.round_to}"
    where = f"{platform.machine()}, {args.threads} thread(s), PyTorch {torch.__version__}"
    text = f"{args.repeats} turns of {args.new} tokens, {where}.\n\n{rows}"
    print(text, flush=True)
    if args.write:
        write_section(TABLE, HEAD, how, text.rstrip())


if __name__ == "__main__":
    main()
