"""Does one product for q, k, v (or gate, up) beat several? Dense reduced shapes and pivoted linears. docs/tables/fused.md

    python benchmarks/fused.py --write                                 # CPU, one thread, fp32 and bf16
    python benchmarks/fused.py --device cuda --dtypes bfloat16

Eight blocks of hidden 1024, batch 1, one token, in turns; ratios of paired turns, median. "stacked": the first factors of
all pivoted linears over one input as one product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from pivoted import HEAD, TABLE, build
from structural import write_section
from torch import Tensor, nn

from planish.modelling.modules import Pivoted

HIDDEN, BLOCKS = 1024, 8
GROUPS = {  # name → dense outputs, reduced outputs at keep 0.7
    "q, k, v": ((1024, 512, 512), (1024, 512, 320)),
    "gate, up": ((3584, 3584), (2368, 2368)),
}


def stack(weights: list[Tensor]) -> nn.Linear:
    """One linear with all these rows."""
    like = weights[0]
    linear = nn.Linear(like.shape[1], sum(map(len, weights)), bias=False, device=like.device, dtype=like.dtype)
    linear.weight.data = torch.cat([w.data for w in weights])
    return linear


def make_forms(dense: tuple[int, ...], reduced: tuple[int, ...], x: Tensor) -> dict[str, Callable[[], object]]:
    """Every way to compute the group in all blocks."""
    kw = {"device": x.device, "dtype": x.dtype}

    def linears(sizes: tuple[int, ...]) -> list[list[nn.Linear]]:
        return [[nn.Linear(HIDDEN, n, bias=False, **kw) for n in sizes] for _ in range(BLOCKS)]

    full, small = linears(dense), linears(reduced)
    fused = [stack([m.weight for m in row]) for row in small]
    pivoted: list[list[Pivoted]] = [[build(n, HIDDEN, 0.7, **kw)["pivoted"] for n in dense] for _ in range(BLOCKS)]  # type: ignore[misc]
    firsts = [(stack([m.P.weight for m in row]), [m.rank for m in row], row) for row in pivoted]

    def run_stacked() -> None:
        for first, ranks, row in firsts:
            for base, m in zip(first(x).split(ranks, -1), row, strict=True):
                torch.cat([base, m.C(base)], -1).index_select(-1, m.order)

    return {
        "dense": lambda: [m(x) for row in full for m in row],
        "reduced": lambda: [m(x) for row in small for m in row],
        "reduced, fused": lambda: [m(x).split(reduced, -1) for m in fused],
        "pivoted": lambda: [m(x) for row in pivoted for m in row],
        "pivoted, stacked": run_stacked,
    }


@torch.no_grad()
def measure(forms: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every turn; on the CPU the thread's own."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.thread_time
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 2):
        for name, form in forms.items():
            wait()
            start = clock()
            form()
            wait()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "| type, linears | ms per block: dense | reduced | fused: times faster | pivoted | stacked: times faster |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for dtype in options.dtypes.split(","):
        x = torch.randn(1, 1, HIDDEN, device=options.device, dtype=getattr(torch, dtype))
        for name, sizes in GROUPS.items():
            t = measure(make_forms(*sizes, x), options.device, options.repeats)
            ms = {k: f"{statistics.median(v) / BLOCKS * 1e3:.3f}" for k, v in t.items()}
            gain = {
                k: f"{statistics.median(a / b for a, b in zip(t[k], t[f'{k}, {how}'], strict=True)):.2f}"
                for k, how in (("reduced", "fused"), ("pivoted", "stacked"))
            }
            row = (ms["dense"], ms["reduced"], gain["reduced"], ms["pivoted"], gain["pivoted"])
            lines.append(f"| {dtype}, {name} | " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    if options.write:
        write_section(
            TABLE, HEAD, f"q, k, v and gate, up in one product: {options.device}, one token", "\n".join(lines)
        )


if __name__ == "__main__":
    main()
