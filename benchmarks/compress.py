"""Where `compress` spends its time, its floor, and its whitened truncation against the published procedure.

    python benchmarks/compress.py                  # all three, about half an hour
    python benchmarks/compress.py whole            # one of whole, calibration, truncation; the others' sections stay
    python benchmarks/compress.py calibration --methods a3 --samples 32

whole: 24 blocks of 0.5 B parameters and few tokens. calibration: two of these blocks and the default calibration, 128 windows
of 2048 tokens. Their floor: the products of one forward pass over the tokens at the rate this machine reaches on the
blocks' own linears in fp32, and reading the model's files and writing the result's (with fsync). Beside it the products
that the fp64 Grams need (half of them, because they are symmetric) at the rate of its fp64 products. Everything is measured
here, before and after each method's run, the better one counts.

truncation, published procedure (SVD-LLM): Cholesky factor S of the input Gram, SVD of W S, explicit inverse of S, factors
cut at the rank; in fp64, and in the published code's fp32. Ours: `planish.solvers.linalg.whitened_svd` and the balanced pair.
Seconds are CPU seconds of this process, so that a busy machine counts the same for both. Writes docs/tables/speed.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from random_model import write_model

import planish
from planish.solvers.forms import low_rank_edit
from planish.solvers.linalg import whitened_svd

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "speed.md"
LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
READ = {"k": "q", "v": "q", "gate": "up"}  # reads what that one reads
HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2816, 100_000
Say = Callable[..., None]


def published(w: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SVD-LLM's truncation as its code does it: B (out, rank), A (rank, in)."""
    s = torch.linalg.cholesky(gram)
    u, d, vh = torch.linalg.svd(w @ s, full_matrices=False)
    scale = d[:rank].sqrt()
    return u[:, :rank] * scale, (scale[:, None] * vh[:rank]) @ torch.linalg.inv(s)


def ours(w: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    edit = low_rank_edit("q", *whitened_svd(w, gram).at(rank), "pair", orthogonal=True)
    return edit.tensors["B.weight"], edit.tensors["A.weight"]


def measure_rate(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """FLOP/s of the products x wᵀ of these pairs, one after another; the best of three rounds."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for x, w in pairs:
            torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return sum(2 * len(x) * w.numel() for x, w in pairs) / best


def find_sizes() -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of a block."""
    kv = HIDDEN // 2
    attention = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
    return attention | {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}


def measure_rates() -> tuple[float, float]:
    """FLOP/s of a block's linears in fp32, and of the products of its Grams in fp64 (all of them, not half)."""
    single = measure_rate([(torch.randn(4096, n), torch.randn(out, n)) for out, n in find_sizes().values()])
    wide = torch.randn(INTERMEDIATE, 4096, dtype=torch.float64)
    return single, measure_rate([(wide, wide)])


def measure_files(model: Path, result: Path, scratch: Path) -> float:
    """Seconds to read a folder's weights and to write another's, durably."""
    buffer = bytearray(64 << 20)
    start = time.perf_counter()
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in result.glob("*.safetensors"):
        with (scratch / "copy").open("wb", buffering=0) as file:
            file.write(memoryview(bytes(path.stat().st_size)))
            os.fsync(file.fileno())
    return time.perf_counter() - start


def draw(vocabulary: int, samples: int, seq_len: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (samples, seq_len), generator=torch.Generator().manual_seed(0))


def write_blocks(folder: Path, blocks: int, vocabulary: int) -> Path:
    write_model(
        folder, vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks, num_attention_heads=HIDDEN // 64, num_key_value_heads=HIDDEN // 128,
    )  # fmt: skip
    return folder


def show_phases(folder: Path, blocks: int, vocabulary: int, windows: torch.Tensor, methods: str, say: Say) -> None:
    model = write_blocks(folder / "model", blocks, vocabulary)
    say(
        f"{blocks} blocks of hidden {HIDDEN}, intermediate {INTERMEDIATE}, {vocabulary:,} words, random bf16 weights, "
        f"{len(windows)} × {windows.shape[1]} tokens, {torch.get_num_threads()} thread(s)."
    )
    say()
    say("| method | plan | forward | Grams | solve | write | rest | total | floor: forward | files | total / floor |")
    say("|---|---|---|---|---|---|---|---|---|---|---|")
    rates: list[float] = []
    for method in methods.split(","):
        before = measure_rates()
        out = folder / method
        settings = {"allocation": "uniform"} if method == "flat-llm" else {}
        seconds = planish.compress(
            model, output=out, keep=0.8, method=method, calibration=windows.flatten(), n_samples=len(windows),
            seq_len=windows.shape[1], settings=settings, device="cpu",
        ).seconds  # fmt: skip
        rates = [max(pair) for pair in zip(before, measure_rates(), strict=True)]
        attend = 4 * HIDDEN * windows.shape[1] / 2  # scores and values, of what lies before a token
        weights = sum(out * n for out, n in find_sizes().values())
        forward = windows.numel() * blocks * (2 * weights + attend) / rates[0]
        files = measure_files(model, out, folder)
        phases = {"plan": "plan", "stream": "forward", "sums": "Grams", "solve": "solve", "write": "write"}
        cells = [seconds.get(p, 0.0) for p in phases]
        total = seconds["total"]
        cells = [*cells, total - sum(cells), total, forward, files]
        ratio = total / (forward + files)
        say(f"| {method} | " + " | ".join(f"{s:.1f} s" for s in cells) + f" | **{ratio:.2f}** |")
    say()
    say(
        f"fp32 products of a block's own linears: {rates[0] / 1e9:.0f} GFLOP/s; fp64 products: {rates[1] / 1e9:.0f} GFLOP/s."
    )


def show_whole(folder: Path, args: argparse.Namespace, say: Say) -> None:
    show_phases(folder, 24, VOCABULARY, draw(VOCABULARY, 16, 256), args.methods, say)


def show_calibration(folder: Path, args: argparse.Namespace, say: Say) -> None:
    vocabulary = VOCABULARY // 12  # as large beside two blocks as 100,000 words beside 24
    show_phases(folder, 2, vocabulary, draw(vocabulary, args.samples, 2048), args.methods, say)


@torch.no_grad()
def measure_grams(folder: Path, windows: torch.Tensor) -> list[tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """Every block and the mean x xᵀ of what its linears read."""
    model, found = planish.load(folder, dtype="float32"), []
    for block in model.model.layers:
        sums: dict[str, torch.Tensor] = {}

        def add(module, args, role, sums=sums) -> None:
            x = args[0].flatten(0, 1).double()
            sums[role] = sums.get(role, 0) + x.T @ x / windows.numel()

        for role in LINEARS.keys() - READ.keys():
            block.get_submodule(LINEARS[role]).register_forward_pre_hook(partial(add, role=role))
        found.append((block, sums))
    for few in windows.split(4):
        model.model(input_ids=few, use_cache=False)
    return found


def show_truncation(folder: Path, args: argparse.Namespace, say: Say) -> None:
    vocabulary = VOCABULARY // 12  # more words than channels, or the first Gram is singular
    model = write_blocks(folder / "model", args.blocks, vocabulary)
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    gaps: dict[str, list[float]] = defaultdict(list)
    solvers = (
        ("ours", ours, torch.float64),
        ("published", published, torch.float64),
        ("published, fp32", published, torch.float32),
    )

    for block, grams in measure_grams(model, draw(vocabulary, 16, 256)):
        for role, path in LINEARS.items():
            w, gram = block.get_submodule(path).weight.detach().double(), grams[READ.get(role, role)]
            rank = int(0.8 * w.numel() / sum(w.shape))
            errors = {}
            for name, solve, dtype in solvers:
                start = time.process_time()
                b, a = solve(w.to(dtype), gram.to(dtype), rank)
                spent[role][name] += time.process_time() - start
                e = w - b.double() @ a.double()
                errors[name] = float(((e @ gram) * e).sum())
            for name in errors:
                gaps[name].append(errors[name] / errors["published"] - 1)

    names = [name for name, _, _ in solvers]
    say(f"CPU seconds of {args.blocks} blocks, 4096 tokens.")
    say()
    say("| linear (out × in) | ours | published, fp64 | published, fp32 | fp64 / ours | fp32 / ours |")
    say("|---|---|---|---|---|---|")
    spent["all"] = {n: sum(s[n] for s in spent.values()) for n in names}
    for role, s in spent.items():
        size = "" if role == "all" else " ({} × {})".format(*find_sizes()[role])
        mine, exact, single = (s[n] for n in names)
        ratios = f"{exact / mine:.1f}× | {single / mine:.1f}×"
        say(f"| {role}{size} | {mine:.2f} s | {exact:.2f} s | {single:.2f} s | {ratios} |")
    say()
    say(
        f"Largest relative gap of the output error to the published fp64 result: ours {max(map(abs, gaps['ours'])):.0e}, "
        f"published in fp32 {max(map(abs, gaps['published, fp32'])):.0e}."
    )
    say()
    say(
        "The limit is the symmetric fp64 eigenproblem of each linear's smaller side: most of what is left for square linears."
    )


SECTIONS = {
    "whole": ("A whole model, few tokens", show_whole),
    "calibration": ("The default calibration", show_calibration),
    "truncation": ("The solve against the published procedure", show_truncation),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", choices=[*SECTIONS, []], help="all by default")
    parser.add_argument("--methods", default="svd-llm,flat-llm,a3", help="whose seconds are measured")
    parser.add_argument("--samples", type=int, default=128, help="windows of 2048 tokens of the long calibration")
    parser.add_argument("--blocks", type=int, default=24, help="of the truncation")
    args = parser.parse_args()
    old = TABLE.read_text(encoding="utf-8").split("\n## ")[1:] if TABLE.exists() else []
    texts = {title: text for title, _, text in (s.partition("\n") for s in old)}
    for part in args.part or SECTIONS:
        title, show = SECTIONS[part]
        lines: list[str] = []

        def say(line: str = "") -> None:
            print(line, flush=True)
            lines.append(line)  # noqa: B023

        with tempfile.TemporaryDirectory(prefix="planish-speed-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            show(Path(folder), args, say)
        texts[title] = "\n" + "\n".join(lines) + "\n"
        page = "# Seconds per phase, and the solve against the published procedure\n\n"
        page += "Measured by `python benchmarks/compress.py`: seconds of the clock but for the last table.\n"
        page += "".join(f"\n## {t}\n{texts[t].rstrip()}\n" for t, _ in SECTIONS.values() if t in texts)
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
