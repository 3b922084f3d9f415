"""A real model into so many bytes with its cache, run by llama.cpp; writes a section of docs/tables/fit.md.

    python benchmarks/fit.py --text FILE --evaluate FILE                       # SmolLM2 into 64 MiB at 512 tokens of context
    python benchmarks/fit.py --fit 96MiB --context 1024 --name NAME ...        # another section

The command is the user's: `planish compress MODEL --fit SIZE --context N --target gguf`, in a process of its own. Its folder is
exported, its file run by llama.cpp (`planish verify`), and both models read WikiText-2. --work keeps folder and file. --beside
lets it decode in turns with all weights of the dense model in these types of llama.cpp, rounded to nearest: speed hangs on shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch
from transformers import AutoTokenizer

import planish
from planish.export import export
from planish.export.llama_cpp import LlamaCpp
from planish.export.verify import verify

sys.path.insert(0, str(Path(__file__).parent))
from decode import start_file
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
    parser.add_argument("--beside", default="q8_0,q4_0", help="types of llama.cpp to decode beside it")
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


def race(args: argparse.Namespace, own: Path, new: int = 16, turns: int = 9) -> str:
    """A table of files: bytes, and tokens per second of one thread in turns."""
    dense, files = args.work / "dense", {"this file": own}
    if args.beside and not dense.exists():
        planish.compress(args.model, output=dense, keep=1)
    for kind in filter(None, args.beside.split(",")):
        files[f"all weights in {kind}"] = file = args.work / f"{kind}.gguf"
        if not file.exists():
            export(dense, "gguf", file, dtype=kind)
    starts = {name: start_file(file, list(range(1, 33)), new) for name, file in files.items()}
    for turn in starts.values():
        turn()
    seconds = [{name: turn() for name, turn in starts.items()} for _ in range(turns)]
    rows = [
        "| in llama.cpp, one thread | bytes | tokens per second | this file beside it (least and most) |",
        "|---" * 4 + "|",
    ]
    for name, file in files.items():
        ratios = sorted(s[name] / s["this file"] for s in seconds)
        beside = f"× {statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})" if file != own else ""
        rate = new / statistics.median(s[name] for s in seconds)
        rows.append(f"| {name} | {file.stat().st_size:,} | {rate:.0f} | {beside} |")
    return "\n".join(rows)


def read_text(args: argparse.Namespace, out: Path, file: Path, tokens: int = 256) -> tuple[float, float]:
    """What llama.cpp makes of the first tokens of a text beside what transformers makes of the folder: KL in nats per token, and
    how often both find the same token likeliest."""
    text = Path(args.evaluate).read_text(encoding="utf-8")[: 8 * tokens]
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(text).input_ids[:tokens])
    with torch.no_grad():
        want = planish.load(out, dtype="float32")(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    got = LlamaCpp(file, len(ids)).logits(ids).double().log_softmax(-1)
    same = (got.argmax(-1) == want.argmax(-1)).double().mean()
    return float((want.exp() * (want - got)).sum(-1).mean()), float(same)


def describe(args: argparse.Namespace, found: dict[str, Any], out: Path) -> str:
    file = args.work / "small.gguf"
    file.unlink(missing_ok=True)
    export(out, "gguf", file)
    seen, (off, same) = verify(out, "gguf", file=file), read_text(args, out, file)
    both = planish.compare(out, args.model, text=args.evaluate, seq_len=args.seq_len, max_windows=args.windows)
    told: Any = planish.forecast(args.model, fit=args.fit, context=args.context, target="gguf")
    verdict, room = "passes" if seen.passed else "does not pass", told.cache + told.running
    size = file.stat().st_size
    lines = [
        f"`planish compress {args.model} --fit {args.fit} --context {args.context} --target gguf` on {args.n_samples} × "
        f"{args.seq_len} tokens: {found['cpu']:,.0f} processor seconds, {found['wall']:,.0f} by the clock, on a machine that did "
        f"other work. The file has {size:,} bytes, cache and running take {room:,}: {(size + room) / 2**20:.1f} MiB in all.",
        f"llama.cpp, which rounds activations to 8 bits too, runs it. On 256 tokens of WikiText-2 its KL from the folder in "
        f"transformers is {off:.4f} nats per token, and both find the same token likeliest in {same:.0%}. `planish verify`, on 48 "
        f"random ids, {verdict}: the largest difference of a logit is {seen.max_logit_difference:.2g} of {seen.max_logit:.3g}; "
        f"{seen.greedy_equal} of {seen.greedy_tokens} greedy tokens agree.",
        f"On WikiText-2 ({args.windows} windows) perplexity is {both.model.perplexity:.1f}, dense {both.dense.perplexity:.1f}, KL "
        f"{both.agreement.kl:.3f} ± {both.agreement.kl_stderr:.3f}.",
    ]  # fmt: skip
    rows = ["| bits | keep | embedding | bytes | KL | ± | |", "|---" * 7 + "|"]
    for c in found["choices"]:
        kl = ["–", "–"] if c["kl"] is None else [f"{c['kl']:.3f}", f"{c['stderr']:.3f}"]
        note = "chosen" if c["chosen"] else c["error"]
        rows.append(f"| {c['bits']} | {c['keep']:g} | {c['head'] or 8} | {c['bytes']:,} | {kl[0]} | {kl[1]} | {note} |")
    return "\n\n".join([*lines, "\n".join(rows), race(args, file)])


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.work / "small"
    found = make(args, out)
    write_section(args.table, START, args.name, describe(args, found, out))


if __name__ == "__main__":
    main()
