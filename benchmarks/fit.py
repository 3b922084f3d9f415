"""A real model into so many bytes with its cache, run by llama.cpp; writes a section of docs/tables/fit.md.

    python benchmarks/fit.py --text FILE --evaluate FILE                       # SmolLM2 into 64 MiB at 512 tokens of context
    python benchmarks/fit.py --fit 96MiB --context 1024 --name NAME ...        # another section

The command is the user's: `planish compress MODEL --fit SIZE --context N --target gguf`, in a process of its own. Its folder is
exported, its file run by llama.cpp (`planish verify`), and both models read WikiText-2. --work keeps folder and file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch

import planish
from planish.export import export
from planish.export.verify import verify

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, write_section

TABLE = ROOT / "docs" / "tables" / "fit.md"
START = """# A size for everything

Written by `benchmarks/fit.py`. One command makes a model of a size that its 16-bit cache and what running takes are part of. KL: of
the next token's distribution from the dense model's, nats per token on the calibration windows held out, with its standard error.
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct, 64 MiB")
    parser.add_argument("--fit", default="64MiB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--text", required=True, help="to calibrate on")
    parser.add_argument("--evaluate", required=True, help="to compare both models on")
    parser.add_argument("--n-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--ladder", action="store_true", help="plain types beside the result too")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "fit")
    parser.add_argument("--table", type=Path, default=TABLE)
    return parser.parse_args()


def make(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What the command says, with its seconds; from the file of an earlier run where there is one."""
    told = args.work / "told.json"
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    words = [sys.executable, "-m", "planish", "compress", args.model, "--fit", args.fit, "--context", str(args.context)]
    words += ["--target", "gguf", "--calibration", args.text, "--n-samples", str(args.n_samples), "--json"]
    words += ["--seq-len", str(args.seq_len), "--overwrite", "-o", str(out), *([] if args.ladder else ["--no-ladder"])]
    print(shlex.join(words), flush=True)
    start = time.perf_counter()
    with Popen(words, stdout=PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    found = json.loads(said) | {"wall": time.perf_counter() - start, "cpu": used.ru_utime + used.ru_stime}
    told.write_text(json.dumps(found), encoding="utf-8")
    return found


def describe(args: argparse.Namespace, found: dict[str, Any], out: Path) -> str:
    file = args.work / "small.gguf"
    file.unlink(missing_ok=True)
    export(out, "gguf", file)
    seen = verify(out, "gguf", file=file)
    both = planish.compare(out, args.model, text=args.evaluate, seq_len=args.seq_len, max_windows=args.windows)
    told: Any = planish.forecast(args.model, fit=args.fit, context=args.context, target="gguf")
    room = told.cache + told.running
    size = file.stat().st_size
    lines = [
        f"`planish compress {args.model} --fit {args.fit} --context {args.context} --target gguf` on {args.n_samples} × "
        f"{args.seq_len} tokens: {found['cpu']:,.0f} processor seconds, {found['wall']:,.0f} by the clock, on a machine that did "
        f"other work. The file has {size:,} bytes, cache and running take {room:,}: {(size + room) / 2**20:.1f} MiB in all.",
        f"llama.cpp runs it: the largest difference of a logit is {seen.max_logit_difference:.2g} of {seen.max_logit:.3g}, "
        f"{seen.greedy_equal} of {seen.greedy_tokens} greedy tokens agree.",
        f"On WikiText-2 ({args.windows} windows) perplexity is {both.model.perplexity:.1f}, dense {both.dense.perplexity:.1f}, KL "
        f"{both.agreement.kl:.3f} ± {both.agreement.kl_stderr:.3f}.",
    ]  # fmt: skip
    rows = ["| bits | keep | embedding | bytes | KL | ± | |", "|---" * 7 + "|"]
    for c in found["choices"]:
        kl = ["–", "–"] if c["kl"] is None else [f"{c['kl']:.3f}", f"{c['stderr']:.3f}"]
        note = "chosen" if c["chosen"] else c["error"]
        rows.append(f"| {c['bits']} | {c['keep']:g} | {c['head'] or 8} | {c['bytes']:,} | {kl[0]} | {kl[1]} | {note} |")
    return "\n\n".join([*lines, "\n".join(rows)])


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.work / "small"
    found = make(args, out)
    write_section(args.table, START, args.name, describe(args, found, out))


if __name__ == "__main__":
    main()
