"""Speed of one linear: dense, pair and pivoted at the same share of weights: dense time / time. docs/tables/fused.md

Beside them the pivoted form's two products alone, without joining and ordering what comes out: as fast as a kernel that does
both could be, if it forms its products as fast.

    python benchmarks/pivoted.py --write                            # CPU, one thread, fp32
    python benchmarks/pivoted.py --device cuda --dtype bfloat16 --compile

They run in turns (A B C D A B C D …), so that a busy machine slows all of them; medians of --repeats rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import torch
from structural import write_section
from torch import Tensor, nn

from planish.modelling.modules import Pair, Pivoted

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "fused.md"
HEAD = """# One product in the place of several

Written by `python benchmarks/fused.py --write` and `python benchmarks/pivoted.py --write`: random weights, batch 1, in turns,
ratios of paired turns, one thread. Fused: the narrower q, k and v (or gate and up) as one product. Stacked: the first factors
of all pivoted linears over one input as one. "Its two products": a pivoted linear without joining and ordering what comes out,
which is as fast as a kernel for both could be. None of this is built. Fused dense linears are between a tenth slower and a fifth
faster, a kernel would make single pivoted ones faster by an eighth at most; weights would have to be copied at load, or lie in
memory twice, and `torch.compile` ([decode speed](decode.md)) gains more.
"""
SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096))  # out, in
KEEPS = (0.8, 0.7, 0.5)
TOKENS = (1, 8, 256)


class Products(nn.Module):
    """Of a pivoted linear."""

    def __init__(self, form: Pivoted):
        super().__init__()
        self.P, self.C = form.P, form.C

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        base = self.P(x)
        return base, self.C(base)


def build(out: int, n: int, keep: float, **kw) -> dict[str, nn.Module]:
    """The forms; ranks are the largest within keep · out · in weights."""
    pair = int(keep * out * n / (out + n))
    pivoted = int((out + n - sqrt((out + n) ** 2 - 4 * keep * out * n)) / 2)
    found = {
        "dense": nn.Linear(n, out, bias=False, **kw),
        "pair": Pair(n, out, pair, bias=False, **kw),
        "pivoted": Pivoted(n, out, pivoted, bias=False, **kw),
    }
    order = torch.randperm(out)  # pivots anywhere, as they are; both parts rising
    found["pivoted"].order.copy_(torch.cat([order[:pivoted].sort().values, order[pivoted:].sort().values]).argsort())
    return found | {"products": Products(found["pivoted"])}


@torch.no_grad()
def measure(forms: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each form; on one CPU thread its own seconds, which other processes hardly disturb."""
    clock = time.thread_time if not x.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 2):
        for name, form in forms.items():
            wait()
            start = clock()
            form(x)
            wait()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kw = {"device": options.device, "dtype": getattr(torch, options.dtype)}

    columns = "times faster than dense: pair / pivoted / its two products"
    lines = [
        "| out × in | keep | " + " | ".join(f"{t} tokens" for t in TOKENS) + " |",
        "|---|---|" + "---|" * len(TOKENS),
    ]
    for out, n in SHAPES:
        for keep in KEEPS:
            forms = build(out, n, keep, **kw)
            if options.compile:
                forms = {name: torch.compile(m, fullgraph=True) for name, m in forms.items()}
            cells = []
            for tokens in TOKENS:
                t = measure(forms, torch.randn(1, tokens, n, **kw), options.repeats)
                cells.append(" / ".join(f"{t['dense'] / t[name]:.2f}" for name in list(forms)[1:]))
            lines.append(f"| {out} × {n} | {keep} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if options.write:
        how = f"{options.device}, {options.dtype}{', compiled' if options.compile else ''}"
        write_section(TABLE, HEAD, f"One linear, {how}: {columns}", "\n".join(lines))


if __name__ == "__main__":
    main()
