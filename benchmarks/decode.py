"""Is a compressed model faster than the dense one, as it is, compiled, and in other stacks? docs/tables/decode.md.

    python benchmarks/decode.py [--methods flat-llm,a3,svd-llm,mpifa] [--keeps 0.8,0.7] [--hidden 1024] [--context 128]
    python benchmarks/decode.py --model MODEL --calibration builtin     # a real one, in the place of random weights
    python benchmarks/decode.py --stacks llama.cpp,onnx,vllm --methods flat-llm,auto/units=structural,svd-llm

Every method (with settings behind a stroke) at every keep, on few calibration tokens: only shapes matter for speed. Dense and
compressed models decode in turns at batch 1, as they are, then with compiled steps; or in other stacks, exported in fp32,
after they were compressed for these (`--for-any`: for any stack, to whatever widths). Times are CPU seconds of the
process, which other processes hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import write_model
from structural import write_section

import planish
from planish.errors import InputError
from planish.evaluate.speed import Speed, bench
from planish.export.gguf import export_gguf
from planish.export.llama_cpp import LlamaCpp
from planish.export.onnx import export_onnx
from planish.export.verify import OnnxRuntime, Vllm

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "decode.md"
HEAD = """# Decode speed, as it is and compiled

Written by `benchmarks/decode.py`: one token after the other, batch 1, in turns with the dense model; CPU ms per token, median.
"× dense" is the median of paired turns (lowest – highest). "Compiled": as `planish bench` does it, decode steps as one graph over a
static cache, the dense model's too. Weights are random unless a model is named: only shapes matter for speed. In llama.cpp and
ONNX Runtime: what `planish export` writes in fp32; in vLLM: the folder itself, fp32, eager; the kept share is that of the model
compressed for that stack, to widths that its kernels like ("in steps of the target") or to any.
"""
KEEPS = "0.8,0.7"
Turn = Callable[[], float]  # reads the prompt, decodes: CPU seconds of the decoding


def compress_all(
    model: Path, folder: Path, args: argparse.Namespace, calibration: Any, target: str = "any"
) -> dict[str, Path | str]:
    """The dense model and every method at every keep, unless `folder` holds it: method and keep → folder, or why the target has
    none."""
    found: dict[str, Path | str] = {"dense | 1.000": model}
    for text in args.methods.split(","):
        method, _, settings = text.partition("/")
        for keep in map(float, args.keeps.split(",")):
            out = folder / f"{text.replace('/', '-')}-{keep}{'' if target == 'any' else f'-{target}'}"
            name = f"{method}{f' ({settings})' if settings else ''} | {keep:.3f}"
            found[name] = out
            try:
                if not out.exists():
                    planish.compress(
                        model, output=out, method=method, keep=keep, calibration=calibration, n_samples=args.n_samples,
                        seq_len=128, round_to=args.round_to, device="cpu", target=target,
                        settings=dict(s.split("=") for s in settings.split("/") if s),
                    )  # fmt: skip
            except InputError as error:
                if target == "any":
                    raise
                found[name] = f"refused: {error}"
            print(f"{text}, keep {keep}, {target}: {found[name]}", flush=True)
    return found


def read_keep(folder: Path) -> float:
    """The kept share that was counted."""
    path = folder / "planish.json"
    return json.loads(path.read_text())["result"]["keep"] if path.exists() else 1.0


def start_llama_cpp(folder: Path, scratch: Path, prompt: list[int], new: int) -> Turn:
    file = scratch / f"{folder.name}.gguf"
    export_gguf(folder, file, dtype="f32")
    return start_file(file, prompt, new)


def start_file(file: Path, prompt: list[int], new: int) -> Turn:
    """Turns of a GGUF file in llama.cpp, one thread: CPU seconds of `new` tokens after a prompt."""
    runner = LlamaCpp(file, len(prompt) + new)

    def turn() -> float:
        runner.reset()
        logits = runner.decode(prompt, 0, last=True)
        start = time.process_time()
        for n in range(new):
            logits = runner.decode([int(logits[0].argmax())], len(prompt) + n, last=True)
        return time.process_time() - start

    return turn


def start_onnx(folder: Path, scratch: Path, prompt: list[int], new: int) -> Turn:
    file = scratch / f"{folder.name}.onnx"
    export_onnx(folder, file, dtype="f32")
    runner = OnnxRuntime(file)

    def turn() -> float:
        logits, past = runner.run(np.array([prompt]), None)
        start = time.process_time()
        for _ in range(new):
            logits, past = runner.run(np.array([[int(logits[0, -1].argmax())]]), past)
        return time.process_time() - start

    return turn


def start_vllm(folder: Path, scratch: Path, prompt: list[int], new: int) -> Turn:
    runner = Vllm(folder, len(prompt) + new + 1)
    engine, turns = runner.engine.llm_engine, count()
    settings = runner.sampling(temperature=0.0, max_tokens=new + 1, ignore_eos=True)

    def turn() -> float:
        engine.reset_prefix_cache()
        engine.add_request(str(next(turns)), {"prompt_token_ids": prompt}, settings)
        done: list[int] = []
        while not done:  # reads the prompt
            done = [t for o in engine.step() for t in o.outputs[0].token_ids]
        start = time.process_time()
        while engine.has_unfinished_requests():
            engine.step()
        return time.process_time() - start

    return turn


STACKS = {"llama.cpp": (start_llama_cpp, "gguf"), "onnx": (start_onnx, "onnx"), "vllm": (start_vllm, "vllm")}


def bench_stack(
    folders: dict[str, Path | str], start: Callable[..., Turn], args: argparse.Namespace, scratch: Path
) -> dict[str, str]:
    """Cells of every model in one stack."""
    prompt, turns = list(range(1, args.context + 1)), dict[str, Turn]()
    for name, folder in folders.items():
        if isinstance(folder, Path):
            turns[name] = start(folder, scratch, prompt, args.new)
            turns[name]()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(args.repeats):
        for name, turn in turns.items():
            seconds[name].append(turn())
    cells = {name: f"{folder} | |" for name, folder in folders.items()}
    for name, values in seconds.items():
        share = read_keep(Path(folders[name]))
        cells[name] = f"{share:.3f} | {compare(values, seconds['dense | 1.000'], args.new)}"
    return cells


def show(s: Speed, dense: Speed) -> str:
    """Cells of one model's decoding."""
    if not s.compiled and s.note:
        return f"{s.note} |"
    return compare(s.decode_cpu_s.values, dense.decode_cpu_s.values, s.new_tokens)


def compare(own: Sequence[float], dense: Sequence[float], tokens: int) -> str:
    """Cells of paired turns' CPU seconds: ms per token, times as fast as the dense model."""
    ratios = sorted(b / a for a, b in zip(own, dense, strict=True))
    ms = statistics.median(own) / tokens * 1e3
    return f"{ms:.1f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f})"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="flat-llm,a3,svd-llm,mpifa")
    parser.add_argument("--keeps", default=KEEPS)
    parser.add_argument("--model", help="in the place of random weights")
    parser.add_argument("--calibration", default="builtin", help="text for --model")
    parser.add_argument("--n-samples", type=int, default=24, help="windows of 128 tokens to calibrate on")
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
    parser.add_argument("--stacks", help=f"in the place of transformers: {', '.join(STACKS)}; one thread")
    parser.add_argument("--for-any", action="store_true", help="with --stacks: compressed for any, to whatever widths")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    args = parser.parse_args()
    args.round_to = int(args.round_to) if args.round_to.isdigit() else args.round_to
    return args


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="planish-decode-") as scratch:
        work = args.work or Path(scratch)
        model, calibration = Path(args.model or work / "dense"), args.calibration
        if not args.model:
            calibration = torch.randint(
                args.vocabulary, (args.n_samples * 128,), generator=torch.Generator().manual_seed(0)
            )
        if not model.exists():
            write_model(
                model, torch.float32, vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
                num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 256,
                head_dim=64,
            )  # fmt: skip
        if args.stacks:
            for stack in args.stacks.split(","):
                start, target = STACKS[stack]
                folders = compress_all(model, work, args, calibration, "any" if args.for_any else target)
                write_stack(args, stack, bench_stack(folders, start, args, Path(scratch)))
            return
        bench_transformers(compress_all(model, work, args, calibration), args)


def bench_transformers(folders: dict[str, Path | str], args: argparse.Namespace) -> None:
    """As they are, and compiled."""
    models = {n: planish.load(f, dtype=args.dtype) for n, f in folders.items()}
    names = [f"{n.partition(' | ')[0]} | {read_keep(Path(folders[n])):.3f}" for n in models]
    ways: list[list[Speed]] = []
    for compiled in (False,) if args.no_compile else (False, True):
        ways.append(
            bench(
                models, batch_sizes=(1,), prompt_len=args.context, new_tokens=args.new, repeats=args.repeats, device="cpu",
                compile=compiled,
            )
        )  # fmt: skip
        write(args, names, ways)


def write_stack(args: argparse.Namespace, stack: str, cells: dict[str, str]) -> None:
    """The section of one stack."""
    rows = f"| method | keep asked | keep | ms | × dense |\n{'|---' * 5}|\n"
    rows += "".join(f"| {name} | {own} |\n" for name, own in cells.items())
    steps = "" if args.for_any else ", in steps of the target"
    put(args, f"in {stack}: {describe(args)}, round-to {args.round_to}{steps}", rows)


def write(args: argparse.Namespace, names: list[str], ways: list[list[Speed]]) -> None:
    """The section of these measurements: as they are, and compiled where that was measured."""
    rows = "| method | keep |" + "".join(f" {how}: ms | × dense |" for how in ("as it is", "compiled")[: len(ways)])
    rows += f"{' compile s |' * (len(ways) - 1)}\n{'|---' * (3 * len(ways) + 1)}|\n"
    for i, name in enumerate(names):
        last = ways[-1][i].compile_s
        seconds = [] if len(ways) == 1 else ["" if last is None else f"{last:.0f}"]
        rows += f"| {' | '.join([name, *(show(speeds[i], speeds[0]) for speeds in ways), *seconds])} |\n"
    put(args, f"{describe(args)}, {args.dtype}, round-to {args.round_to}", rows)


def describe(args: argparse.Namespace) -> str:
    random = f"random, hidden {args.hidden}, {args.blocks} blocks, vocabulary {args.vocabulary}"
    return f"{Path(args.model).name if args.model else random}, {args.context} tokens of context"


def put(args: argparse.Namespace, title: str, rows: str) -> None:
    where = f"{platform.machine()}, {args.threads} thread(s), PyTorch {torch.__version__}"
    text = f"{args.repeats} turns of {args.new} tokens, {where}.\n\n{rows}"
    print(text, flush=True)
    if args.write:
        keeps = "" if args.keeps == KEEPS else f", keeps {args.keeps}"
        write_section(TABLE, HEAD, title + keeps, text.rstrip())


if __name__ == "__main__":
    main()
