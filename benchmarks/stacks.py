"""Stack × compressed form: largest difference of a logit, equal greedy tokens, size; writes docs/tables/stacks.md.

    python benchmarks/stacks.py                          # the embedded model in every stack that is installed
    python benchmarks/stacks.py --stacks gguf,dense --methods flat-llm,svd-llm --keep 0.7
    python benchmarks/stacks.py --speed                  # llama.cpp tokens/s of random weights, dense against keep 0.7

Each table replaces its own section of the file. Every number compares the stack with transformers in fp32 on 48 random
token ids; the scale is the largest logit.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

import planish
from planish.api import compress
from planish.checkpoint import silence
from planish.errors import InputError
from planish.evaluate.verify import verify
from planish.export import export

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "stacks.md"
NEEDS = {"gguf": "llama_cpp", "onnx": "onnxruntime", "vllm": "vllm"}
ROWS = ("dense", "flat-llm", "flat-llm for gguf", "a3", "svd-llm", "mpifa", "subfit", "llm-drop")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--methods", default=",".join(ROWS), help='"METHOD for TARGET" compresses with --target')
    parser.add_argument("--stacks", default="gguf,dense,mimo,onnx,vllm")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", action="store_true", help="only the table of llama.cpp's speed")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    silence()
    with tempfile.TemporaryDirectory() as scratch:
        (measure_speed if args.speed else compare)(args, Path(scratch))


# ------------------------------------------------------------------ the same numbers in every stack


def compare(args: argparse.Namespace, scratch: Path) -> None:
    stacks = [s for s in args.stacks.split(",") if s not in NEEDS or importlib.util.find_spec(NEEDS[s])]
    lines = [f"| compressed with (keep {args.keep:g}) | " + " | ".join(stacks) + " |", "|" + "---|" * (len(stacks) + 1)]
    for row in args.methods.split(","):
        folder, label = args.model, row
        if row != "dense":
            method, _, target = row.partition(" for ")
            folder = scratch / row.replace(" ", "-")
            try:
                result = compress(
                    args.model,
                    keep=args.keep,
                    method=method,
                    output=folder,
                    n_samples=48,
                    seq_len=256,
                    target=target or "any",
                )
            except InputError as error:
                print(f"{row}: {error}")
                continue
            label = f"{row}, {result.params_after / 1e6:.2f} M parameters"
        cells = [run(stack, folder, scratch) for stack in stacks]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        write_section("Differences", "\n".join(lines))


def run(stack: str, folder: Path, scratch: Path) -> str:
    """One cell: largest difference, greedy tokens that agree, what the stack runs and what it costs."""
    try:
        if stack in ("dense", "mimo"):
            out = scratch / f"{stack}-{time.monotonic_ns()}"
            written = export(folder, stack, out)
            found, size = compare_folders(out, folder), written.parameters
            kind = {"native": "stock", "planish": "own"}.get(written.architecture, stack)
        elif stack == "vllm":
            found, size, kind = verify(folder, stack), 0, "own"
        else:
            out = scratch / f"{time.monotonic_ns()}.{stack}"
            written = export(folder, stack, out, dtype="f32")
            found, size = verify(folder, stack, file=out), written.parameters
            kind = written.architecture if stack == "gguf" else "own"
            out.unlink()
    except InputError as error:
        return f"refused: {str(error).split(';')[0].split(' · ')[0]}"
    return f"{kind}, {found.max_logit_difference:.1e}, {found.greedy_equal}/{found.greedy_tokens}" + (
        f", {size / 1e6:.2f} M" if size else ""
    )


def compare_folders(folder: Path, reference: Path):
    """A folder in transformers against another one: stock classes may have eager attention only."""
    return verify(folder, "hf", dense_reference=reference)


# ------------------------------------------------------------------ llama.cpp's speed


def measure_speed(args: argparse.Namespace, scratch: Path, repeats: int = 7, new_tokens: int = 48) -> None:
    """Decode and prefill tokens/s at batch 1, the two files in turns; shapes as `--target gguf` makes them."""
    from llama_cpp import Llama
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
    shape |= {"head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": True}
    wide, narrow = 3584, 2496  # × 0.7, multiples of 32
    files = {}
    for name, width in (("dense", wide), ("keep 0.7", narrow)):
        config = LlamaConfig(**shape, intermediate_size=width)
        model = LlamaForCausalLM(config).to(torch.float16)
        if name != "dense":
            model = planish_values(model, scratch / "small", 40)
        else:
            model.save_pretrained(scratch / name)
        for dtype in ("f16", "q8_0"):
            source = scratch / ("dense" if name == "dense" else "small")
            written = export(source, "gguf", scratch / f"{name}.{dtype}.gguf", dtype=dtype)
            files[name, dtype] = written
        del model
    lines = [
        "| file | architecture | parameters | bytes | prefill tok/s | decode tok/s | decode × dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in ("f16", "q8_0"):
        engines = {
            n: Llama(files[n, dtype].output, n_ctx=256, n_threads=args.threads, verbose=False)
            for n in ("dense", "keep 0.7")
        }
        times: dict[str, list[tuple[float, float]]] = {n: [] for n in engines}
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                engine.reset()
                start = time.perf_counter()
                engine.eval(list(range(64)))
                first = time.perf_counter()
                for token in range(new_tokens):
                    engine.eval([token])
                if turn:
                    times[name].append((64 / (first - start), new_tokens / (time.perf_counter() - first)))
        ratios = [b[1] / a[1] for a, b in zip(times["dense"], times["keep 0.7"], strict=True)]
        for name, rows in times.items():
            w = files[name, dtype]
            decode = [d for _, d in rows]
            against = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if name != "dense" else ""
            )
            lines.append(
                f"| {name} {dtype} | {w.architecture} | {w.parameters / 1e6:.0f} M | {w.bytes / 2**20:.0f} MiB | "
                f"{statistics.median(p for p, _ in rows):.0f} | "
                f"{statistics.median(decode):.1f} ({min(decode):.1f}–{max(decode):.1f}) | {against} |"
            )
            print(lines[-1], flush=True)
    write_section("Speed of random weights in llama.cpp", "\n".join(lines))


def planish_values(model: torch.nn.Module, folder: Path, v: int) -> None:
    """Write a model with `v` value dimensions per head, as a compressed folder."""
    from planish.checkpoint import Writer, apply_edits, open_source, write_config
    from planish.edits import value_edits
    from planish.modules import get_linear

    source = open_source(model)
    writer, specs, shapes = Writer(folder, source.n_blocks), [], []
    for i in range(source.n_blocks):
        block, shape = source.block(i), source.shape(i)
        w = {r: get_linear(block, source.family, r).weight for r in "vo"}
        small = w["v"].unflatten(0, (shape.kv_heads, -1))[:, :v].flatten(0, 1)
        edits = value_edits(small, w["o"].unflatten(1, (shape.heads, -1))[..., :v].flatten(1), None, v)
        specs.append(apply_edits(block, edits, source.family, source.config, shape))
        shapes.append(shape)
        writer.block(i, block, source.family)
    writer.shard(0, {n: t for n, t in source.outside().items() if n != "lm_head.weight"})
    write_config(writer, source, specs, shapes)
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
