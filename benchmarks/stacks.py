"""Stack × compressed form: largest difference of a logit, equal greedy tokens, size, speed; writes docs/tables/stacks.md.

    python benchmarks/stacks.py                          # the embedded model in every stack that is installed
    python benchmarks/stacks.py --stacks gguf,dense --methods dense,flat-llm --keep 0.7
    python benchmarks/stacks.py --vllm PYTHON            # vLLM lives in another environment (with planish): its interpreter
    python benchmarks/stacks.py --speed                  # llama.cpp tokens/s of random weights, dense against keep 0.7

Each table replaces its own section of the file. Every number compares the stack with transformers in fp32 on 48 random
token ids; the scale is the largest logit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import fields
from pathlib import Path

import torch
import transformers

import planish
from planish import compress
from planish.apply import apply_edits
from planish.errors import InputError
from planish.export import export
from planish.export.verify import Comparison, LlamaCpp, OnnxRuntime, Runner, Transformers, verify
from planish.export.written import Written
from planish.folder.config import write_config
from planish.folder.source import open_source
from planish.folder.writer import Writer
from planish.modelling.blocks import get_linear
from planish.solvers.forms import neuron_edits, value_edits

sys.path.insert(0, str(Path(__file__).parent))
from random_model import write_model

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "stacks.md"
NEEDS = {"gguf": "xllamacpp", "onnx": "onnxruntime"}
IN_VLLM = ("vllm", "deci")  # the folder itself through planish's plugin; exported to an architecture of vLLM's own
ROWS = (
    "dense",
    "flat-llm",
    "flat-llm for gguf",
    "a3",
    "svd-llm",
    "mpifa",
    "subfit",
    "llm-drop",
    "auto",
    "auto for gguf",
)
CONTEXT = 56  # tokens of a timed run: 8 read, 48 decoded


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--methods", default=",".join(ROWS), help='"METHOD for TARGET" compresses with --target')
    parser.add_argument("--stacks", default="gguf,dense,mimo,onnx,vllm,deci")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM and planish")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--n-samples", type=int, default=16, help="calibration windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="timed turns")
    parser.add_argument("--dtypes", default="f16,q8_0", help="of --speed")
    parser.add_argument("--speed", action="store_true", help="only the table of llama.cpp's speed")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        (measure_speed if args.speed else compare)(args, Path(scratch))


# ------------------------------------------------------------------ the same numbers in every stack


def compare(args: argparse.Namespace, scratch: Path) -> None:
    """Both tables of the embedded model: differences in every stack, and decode speed where a stack runs here."""
    vllm = args.vllm or (sys.executable if importlib.util.find_spec("vllm") else None)
    stacks = [s for s in args.stacks.split(",") if s not in NEEDS or importlib.util.find_spec(NEEDS[s])]
    stacks = [s for s in stacks if vllm or s not in IN_VLLM]
    lines = [f"| compressed with (keep {args.keep:g}) | " + " | ".join(stacks) + " |", "|" + "---|" * (len(stacks) + 1)]
    runners: dict[tuple[str, str], Runner] = {}
    for row in args.methods.split(","):
        folder, label = args.model, row
        if row != "dense":
            method, _, target = row.partition(" for ")
            folder = scratch / row.replace(" ", "-")
            try:
                result = compress(
                    args.model, keep=args.keep, method=method, output=folder, n_samples=args.n_samples, seq_len=256,
                    target=target or "any",
                )  # fmt: skip
            except InputError as error:
                print(f"{row}: {error}")
                continue
            label = f"{row}, {result.params_after / 1e6:.2f} M parameters"
        cells = []
        runners[row, "transformers"] = Transformers(planish.load(folder, dtype="float32"))
        for stack in stacks:
            cell, runner = run(stack, folder, scratch, vllm)
            cells.append(cell)
            if runner is not None:
                runners[row, stack] = runner
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    write_section("Differences", LEGEND + "\n".join(lines))
    write_section("Decode speed of the embedded model", time_decode(runners, args))


LEGEND = (
    "What runs, largest difference of a logit from transformers in fp32 (vLLM: of a log-probability) on 48 random token ids, "
    "greedy tokens that agree, parameters. gguf in llama.cpp, fp32; dense and mimo in transformers; vllm: the folder itself in "
    "vLLM's Transformers backend; deci: its DeciLM form in vLLM's own class.\n\n"
)


def run(stack: str, folder: Path, scratch: Path, vllm: str | None) -> tuple[str, Runner | None]:
    """One cell: what the stack runs, largest difference, greedy tokens that agree, what it costs; and a runner to time."""
    runner: Runner | None = None
    try:
        if stack in ("dense", "mimo"):
            out = scratch / f"{stack}-{time.monotonic_ns()}"
            written = export(folder, stack, out)
            found, size = compare_folders(out, folder), written.parameters
            kind = {"native": "stock", "planish": "own"}.get(written.architecture, stack)
        elif stack == "vllm":
            found, size, kind = verify_in_vllm(vllm, folder), 0, "own"
        elif stack == "deci":
            out = scratch / f"deci-{time.monotonic_ns()}"
            size, kind = export(folder, stack, out).parameters, stack
            found = verify_in_vllm(vllm, out, "--dense-reference", str(folder))
        else:
            out = scratch / f"{time.monotonic_ns()}.{stack}"
            written = export(folder, stack, out, dtype="f32")
            found, size = verify(folder, stack, file=out), written.parameters
            kind = written.architecture if stack == "gguf" else "own"
            runner = LlamaCpp(out, CONTEXT) if stack == "gguf" else OnnxRuntime(out)
    except InputError as error:
        return f"refused: {str(error).split(';')[0].split(' · ')[0]}", None
    return f"{kind}, {found.max_logit_difference:.1e}, {found.greedy_equal}/{found.greedy_tokens}" + (
        f", {size / 1e6:.2f} M" if size else ""
    ), runner


def verify_in_vllm(python: str | None, folder: Path, *more: str) -> Comparison:
    """`planish verify --target vllm` in a process of its own, which vLLM wants clean."""
    assert python is not None
    command = [python, "-m", "planish", "verify", str(folder), "--target", "vllm", *more, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise InputError((done.stderr.splitlines() or ["nothing said"])[-1].removeprefix("error: ")) from None
    return Comparison(**{f.name: found[f.name] for f in fields(Comparison)})


def compare_folders(folder: Path, reference: Path):
    """A folder in transformers against another one: stock classes may have eager attention only."""
    return verify(folder, "hf", dense_reference=reference)


def time_decode(runners: dict[tuple[str, str], Runner], args: argparse.Namespace) -> str:
    """Greedy tokens per second at batch 1, fp32: every model in every stack in turns; ratios are of paired turns.

    One thread, as the runners have; its own seconds count, which other processes hardly disturb.
    """
    torch.set_num_threads(1)
    ids = torch.arange(8) + 5
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    for turn in range(args.repeats + 1):
        for key, runner in runners.items():
            start = time.thread_time()
            runner.greedy(ids, CONTEXT - len(ids))
            if turn:
                times[key].append((CONTEXT - len(ids)) / (time.thread_time() - start))
    rows = list(dict.fromkeys(row for row, _ in runners))
    stacks = list(dict.fromkeys(stack for _, stack in runners))
    names = {"gguf": "llama.cpp", "onnx": "ONNX Runtime"}
    lines = [
        "| tokens per second | " + " | ".join(names.get(s, s) for s in stacks) + " |",
        "|" + "---|" * (len(stacks) + 1),
    ]
    for row in rows:
        cells = []
        for stack in stacks:
            own, dense = times.get((row, stack), []), times.get(("dense", stack), [])
            ratio = "" if row == "dense" or not own or not dense else f" (× {paired_ratio(own, dense)[0]:.2f})"
            cells.append(f"{statistics.median(own):.0f}{ratio}" if own else "refused")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def paired_ratio(own: list[float], dense: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of measurements that lie next to each other in time."""
    ratios = [a / b for a, b in zip(own, dense, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


# ------------------------------------------------------------------ llama.cpp's speed

SIZES = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
UNEVEN = {m: [1600 + m * round(i * 1184 / 23 / m) for i in range(24)] for m in (32, 64)}  # MLP widths per block
FORMS: dict[str, tuple[int, list[int]]] = {  # value dimensions, MLP width per block
    "dense": (64, [3584] * 24),
    "value dimensions and neurons, equal (`--target gguf`)": (40, [2368] * 24),
    "neurons, equal": (64, [2176] * 24),
    "neurons per block, multiples of 64": (64, UNEVEN[64]),
    "neurons per block, multiples of 32": (64, UNEVEN[32]),
}


def measure_speed(args: argparse.Namespace, scratch: Path, new_tokens: int = 48, prompt: int = 64) -> None:
    """Decode and prefill tokens/s of random weights at batch 1, all files in turns."""
    from planish.export.llama_cpp import LlamaCpp

    clock = (
        time.thread_time if args.threads == 1 else time.perf_counter
    )  # one thread's own seconds are hardly disturbed
    write_model(scratch / "dense", **SIZES)
    files: dict[tuple[str, str], Written] = {}
    keeps: dict[str, float] = {}
    for name, (v, widths) in FORMS.items():
        folder = scratch / "dense"
        if name != "dense":
            folder = scratch / "form"
            cut(scratch / "dense", folder, v, widths)
        keeps[name] = sum(count_block(v, w) for w in widths) / sum(count_block(*s) for s in [(64, 3584)] * 24)
        for dtype in args.dtypes.split(","):
            files[name, dtype] = export(folder, "gguf", scratch / f"{len(files)}.gguf", dtype=dtype)
    lines = [
        "| form | keep | type, graph | bytes read per token | prefill tok/s | decode tok/s | prefill × dense | decode × dense | "
        "0.9 / keep | 1 / bytes read |",
        "|" + "---|" * 10,
    ]
    for dtype in args.dtypes.split(","):
        engines = {n: LlamaCpp(Path(files[n, dtype].output), 256, args.threads) for n in FORMS}
        prefill: dict[str, list[float]] = {n: [] for n in engines}
        decode: dict[str, list[float]] = {n: [] for n in engines}
        for turn in range(args.repeats + 1):
            for name, engine in engines.items():
                engine.reset()
                start = clock()
                engine.decode(list(range(prompt)), 0, last=True)
                first = clock()
                for token in range(new_tokens):
                    engine.decode([token], prompt + token)
                if turn:
                    prefill[name].append(prompt / (first - start))
                    decode[name].append(new_tokens / (clock() - first))
        read = {n: count_read(Path(files[n, dtype].output)) for n in engines}
        for name in engines:
            cells = [""] * 4
            if name != "dense":
                cells = [
                    "{:.2f} ({:.2f}–{:.2f})".format(*paired_ratio(rates[name], rates["dense"]))
                    for rates in (prefill, decode)
                ] + [f"{0.9 / keeps[name]:.2f}", f"{read['dense'] / read[name]:.2f}"]
            lines.append(
                f"| {name} | {keeps[name]:.3f} | {dtype}, {files[name, dtype].architecture} | {read[name] / 2**20:.0f} MiB | "
                f"{statistics.median(prefill[name]):.0f} | {statistics.median(decode[name]):.1f} | "
                + " | ".join(cells)
                + " |"
            )
            print(lines[-1], flush=True)
        del engines
    count = files["dense", args.dtypes.split(",")[0]].parameters
    about = (
        f"{count / 1e6:.0f} M random weights ({', '.join(f'{k} {n}' for k, n in SIZES.items())}), {args.threads} threads, "
        f"prompt {prompt}, {new_tokens} tokens, {args.repeats} turns; ratios of paired turns, median (lowest–highest).\n\n"
    )
    write_section("Speed of random weights in llama.cpp", about + "\n".join(lines))


def count_block(v: int, width: int) -> int:
    """Weights of one block's linears."""
    d, heads, kv, qk = (SIZES[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    return d * (qk + v) * (heads + kv) + 3 * d * width


def count_read(file: Path) -> int:
    """Bytes of tensors that one decoded token reads: all but the embedding, unless that is the head too."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    untied = any(t.name == "output.weight" for t in tensors)
    return sum(int(t.n_bytes) for t in tensors if not (untied and t.name == "token_embd.weight"))


def cut(folder: Path, output: Path, v: int, widths: list[int]) -> None:
    """Write a folder's model with the first `v` value dimensions of every head and the first neurons of every block."""
    source = open_source(folder)
    writer, specs, shapes = Writer(output, source.n_blocks, overwrite=True), [], []
    for i in range(source.n_blocks):
        block, shape = source.block(i), source.shape(i)
        w = {r: get_linear(block, source.family, r).weight for r in shape.roles}
        edits = neuron_edits(w, torch.arange(widths[i]), w["down"][:, : widths[i]])
        if v < shape.v:
            small = w["v"].unflatten(0, (shape.kv_heads, -1))[:, :v].flatten(0, 1)
            edits += value_edits(small, w["o"].unflatten(1, (shape.heads, -1))[..., :v].flatten(1), None, v)
        specs.append(apply_edits(block, edits, source.family, source.config, shape))
        shapes.append(shape)
        writer.block(i, block, source.family)
    writer.shard(0, source.outside())
    write_config(writer.text, source.config, source.family, specs, shapes)
    writer.close()


def write_section(title: str, text: str) -> None:
    """Replace one section of the table file; the others stay."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else "# Stacks\n\nWritten by `benchmarks/stacks.py`.\n"
    how = f"planish {planish.__version__}, torch {torch.__version__.partition('+')[0]}, CPU"
    section = f"## {title}\n\n{text}\n\n{how}.\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    new = pattern.sub(lambda m: section + "\n", old) if pattern.search(old) else old.rstrip() + "\n\n" + section
    TABLE.write_text(new.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
