"""Experts dropped by every criterion, and a mixture of the same bytes by other means; writes docs/tables/mixture.{md,csv}.

    python tools/train_demo_model.py --experts 16 --fp32        # once: the mixture that is measured on, in the cache folder
    python benchmarks/mixture.py

drop: `--method reap` by each criterion and `hope`, at the keep of so many experts. auto: experts and what is inside them; "auto
plain": with no calibration window shuffled, as the others have them. neurons: `a3 --set parts=mlp` at the same keep. rank: a pair
of factors in place of every linear of every expert, by its own tokens (whitened SVD; planish writes no such pairs). bits: the
experts' weights alone rounded to nearest in groups of 64 (`--bits` feeds errors on, and rounds attention too). Nats: loss per
token on held-out text. The table is resumed: a row that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from book import append_row
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import planish
from planish.calibrate.text import cut_windows, load_tokens, sample_starts
from planish.errors import PlanishError
from planish.solvers.linalg import damp, whitened_svd

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "mixture.md"
CACHE = Path(os.environ.get("PLANISH_CACHE") or "~/.cache/planish").expanduser()
FIELDS = ("model", "way", "asked", "bytes", "nats", "kl", "stderr", "seconds", "note", "protocol")
CRITERIA = ("reap", "frequency", "mass", "gated", "man", "nats")
OURS = ("auto", "auto plain")
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
HEAD = """# Mixtures of experts

Written by `benchmarks/mixture.py` from mixture.csv, on a mixture that `tools/train_demo_model.py --experts 16` trains
([how](../demo_model.md#a-mixture)). Nats: held-out loss per token more than the dense model's. KL: of its next token's distribution
from the dense model's on the same text, with its standard error: far less noisy. s: CPU seconds of one thread for calibrating,
choosing and writing, over the number of experts.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CACHE / "mixture")
    parser.add_argument("--name", default="small mixture")
    parser.add_argument("--n-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=160, help="of held-out text")
    parser.add_argument("--ways", default=",".join([*CRITERIA, "hope", *OURS, "neurons", "rank", "bits"]))
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not (args.model / "config.json").exists():
        raise SystemExit(f"no mixture at {args.model}: python tools/train_demo_model.py --experts 16 --fp32")
    measure(args, "dense", "", lambda out: planish.load(args.model))
    for way in args.ways.split(","):
        if way == "bits":
            for bits in (8, 4, 3, 2):
                measure(args, way, str(bits), partial(round_experts, args.model, bits))
            continue
        for share in SHARES:
            make = {"rank": factor_experts, "neurons": compress}.get(way, compress)
            measure(args, way, f"{share:g}", partial(make, args, way, find_keep(args.model, share)))
    args.table.write_text(tabulate([r for r in read(args.table.with_suffix(".csv")) if r["model"] == args.name]))


def find_keep(model: Path, share: float) -> float:
    """The keep that is left without this share of the experts and of their rows of the router."""
    layers = planish.load(model).model.layers
    total = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    return 1 - share * sum(p.numel() for n, p in layers.named_parameters() if ".mlp." in n) / total


def measure(args: argparse.Namespace, way: str, asked: str, make: Callable[[Path], Any]) -> None:
    """One row, unless the CSV has it. `make`: a folder to write to → a model, or what `planish.compress` returns."""
    book = args.table.with_suffix(".csv")
    protocol = f"{args.n_samples} × {args.seq_len} tokens; {args.windows} windows"
    key = {"model": args.name, "way": way, "asked": asked, "protocol": protocol}
    if any(all(row[n] == v for n, v in key.items()) for row in read(book)):
        return
    row: dict[str, Any] = {**dict.fromkeys(FIELDS, ""), **key}
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        try:
            done = make(Path(scratch) / "out")
        except PlanishError as error:
            row["note"], done = f"refused: {error}", None
        row["seconds"] = f"{time.process_time() - start:.2f}"
        if done is not None:
            lm, row["bytes"], row["note"] = unpack(done, Path(scratch) / "out")
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            found = planish.compare(
                lm.float(), planish.load(args.model).float(), "builtin", args.seq_len, tokenizer=tokenizer,
                max_windows=args.windows, batch_size=8, cache=True,
            )  # fmt: skip
            row |= {"nats": f"{found.model.nll:.5f}", "kl": f"{found.agreement.kl:.5f}"}
            row["stderr"] = f"{found.agreement.kl_stderr:.5f}"
    append_row(book, FIELDS, row)
    print(*(row[n] for n in ("way", "asked", "bytes", "nats", "kl", "seconds", "note")), flush=True)


def unpack(done: Any, out: Path) -> tuple[Any, int, str]:
    """(model, its bytes, a note) of what a way to make it returns."""
    if isinstance(done, tuple):
        return *done, ""
    if isinstance(done, torch.nn.Module):
        return done, sum(t.nbytes for t in {id(p): p for p in done.parameters()}.values()), ""
    plan = json.loads((out / "planish.json").read_text())["plan"]
    kept, widths = ({r for u, r in plan.items() if u.endswith(name)} for name in (".experts", ".neurons"))
    notes = [f"{min(kept)} experts left"] if kept else []
    notes += [f"{min(widths)} to {max(widths)} neurons in each"] if kept and min(widths, default=128) < 128 else []
    return planish.load(out), done.bytes_after, "; ".join(notes)


def compress(args: argparse.Namespace, way: str, keep: float, out: Path) -> Any:
    method, settings = ("a3", {"parts": ("mlp",)}) if way == "neurons" else (way, {})
    if way == "auto plain":
        method, settings = "auto", {"shuffled": 0.0}
    if way in CRITERIA:
        method, settings = "reap", {"criterion": way}
    return planish.compress(
        args.model, output=out, method=method, keep=keep + 1e-6, settings=settings, calibration="builtin",
        n_samples=args.n_samples, seq_len=args.seq_len, cache=True, dtype="float32",
    )  # fmt: skip


def round_experts(model: Path, bits: int, out: Path) -> tuple[Any, int]:
    """Every expert's linears in so many bits, with a scale of 16 bits and a zero of `bits` for 64 weights."""
    lm = AutoModelForCausalLM.from_pretrained(model)
    size = sum(t.nbytes for t in {id(p): p for p in lm.parameters()}.values())
    for module in find_experts(lm):
        for p in (module.gate_up_proj, module.down_proj):
            p.data = round_groups(p.data.float(), bits).to(p.dtype)
            size -= p.numel() * (16 - bits - (16 + bits) / 64) / 8
    return lm, int(size)


def round_groups(w: Tensor, bits: int, group: int = 64) -> Tensor:
    """w on 2^bits levels between the least and the largest (and zero) of every `group` inputs of a row."""
    groups = w.unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(w.dtype).tiny)
    zero = (-low / step).round()
    return (((groups / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step).flatten(-2)


def factor_experts(args: argparse.Namespace, way: str, keep: float, out: Path) -> tuple[Any, int]:
    """B A in place of every expert's W, of the rank that leaves this keep, best for the inputs that its tokens bring."""
    lm = planish.load(args.model, dtype="float32")
    text = load_tokens("builtin", AutoTokenizer.from_pretrained(args.model)).tokens
    windows = cut_windows(text, sample_starts(text, args.n_samples, args.seq_len, 0), args.seq_len)
    grams = measure_grams(lm, windows)
    gone = (1 - keep) * sum(p.numel() for p in lm.model.layers.parameters() if p.ndim > 1)
    held = sum(m.gate_up_proj.numel() + m.down_proj.numel() for m in find_experts(lm))
    size = sum(t.nbytes for t in {id(p): p for p in lm.parameters()}.values()) // 2
    for module, (wide, narrow) in grams.items():
        number, hidden, inner = module.down_proj.shape
        rank = int((1 - gone / held) * inner * hidden / (inner + hidden))
        size -= 2 * 3 * number * (inner * hidden - rank * (inner + hidden))
        for n in range(number):
            gate, up = module.gate_up_proj.data[n].chunk(2)
            for w, gram in ((gate, wide[n]), (up, wide[n]), (module.down_proj.data[n], narrow[n])):
                b, a = whitened_svd(w, damp(gram, 1e-2)).at(rank)
                w.copy_(b @ a)
    return lm, size


@torch.no_grad()
def measure_grams(lm: Any, windows: Tensor) -> dict[Any, tuple[Tensor, Tensor]]:
    """Of every module of experts: Σ x xᵀ of their inputs (experts, hidden, hidden), and of their down's."""
    found, handles = {}, []
    for module in find_experts(lm):
        number, hidden, inner = module.down_proj.shape
        found[module] = tuple(1e-9 * torch.eye(n, dtype=torch.float64).repeat(number, 1, 1) for n in (hidden, inner))

        def look(m, args, wide=found[module][0], narrow=found[module][1]):
            hidden, chosen, _ = args
            for n in range(len(wide)):
                x = hidden[(chosen == n).any(1)]
                gate, up = (x @ m.gate_up_proj[n].T).chunk(2, -1)
                for total, rows in ((wide, x), (narrow, m.act_fn(gate) * up)):
                    total[n] += rows.double().T @ rows.double()

        handles.append(module.register_forward_pre_hook(look))
    for few in windows.split(8):
        lm(few)
    for handle in handles:
        handle.remove()
    return found


def find_experts(lm: Any) -> list[Any]:
    return [m for m in lm.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]


def read(book: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(book.open())) if book.exists() else []


def tabulate(rows: list[dict[str, str]]) -> str:
    lines = [HEAD]
    for protocol in dict.fromkeys(r["protocol"] for r in rows):
        own = {(r["way"], r["asked"]): r for r in rows if r["protocol"] == protocol}
        dense, shares = own["dense", ""], [f"{s:g}" for s in SHARES]
        ways = list(dict.fromkeys(w for w, a in own if a in shares))
        lines += [f"## {protocol}\n", f"Dense: {float(dense['nats']):.4f} nats, {int(dense['bytes']):,} bytes.\n"]
        head = " | ".join(f"{float(s):.1%}" for s in shares) + " |"
        lines += ["| nats; experts' share that goes | " + head + " s |", "|---" * (len(shares) + 2) + "|"]
        for way in ways:
            found = [own.get((way, s), {}) for s in shares]
            cells = [f"{float(r['nats']) - float(dense['nats']):.4f}" if r.get("nats") else "–" for r in found]
            spent = [float(r["seconds"]) for r in found if r.get("seconds")]
            lines.append(f"| {way} | {' | '.join(cells)} | {sum(spent) / len(spent) / 64:.2f} |")
        sizes = [own.get(("reap", s), {}).get("bytes") for s in shares]
        lines.append(f"| bytes | {' | '.join(f'{int(n):,}' if n else '–' for n in sizes)} | |")
        lines += ["", "| KL ± | " + head, "|---" * (len(shares) + 1) + "|"]
        for way in ways:
            cells = [
                f"{r['kl'][:-1]} ± {r['stderr'][:-1]}" if (r := own.get((way, s), {})).get("kl") else "–"
                for s in shares
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines += ["", "| experts in | nats | KL | bytes |", "|---|---|---|---|"]
        for (way, asked), r in own.items():
            if way == "bits":
                lost = float(r["nats"]) - float(dense["nats"])
                lines.append(f"| {asked} bits | {lost:.4f} | {r['kl'][:-1]} | {int(r['bytes']):,} |")
        lines += ["", tell(own, shares), ""]
    return "\n".join(lines)


def tell(own: dict[tuple[str, str], dict[str, str]], shares: list[str]) -> str:
    """Where auto is behind, by nats and by KL and however little, against all ways to drop experts and to take neurons out of them
    at the same keep."""
    behind, best = [], dict[str, str]()
    for s in shares:
        auto = own.get(("auto", s), {})
        for measure in ("nats", "kl"):
            others = {w: r for (w, a), r in own.items() if a == s and w not in (*OURS, "rank") and r.get(measure)}
            if not others or not auto.get(measure):
                continue
            first = min(others, key=lambda w: float(others[w][measure]))
            gap = float(auto[measure]) - float(others[first][measure])
            noise = 2 * math.hypot(float(auto["stderr"]), float(others[first]["stderr"]))
            if measure == "kl":
                best[s] = first
            within = f", two standard errors {noise:.5f}" if measure == "kl" else ""
            what = "KL" if measure == "kl" else "nats"
            behind += [f"{float(s):.1%} ({gap:.5f} of {what} behind {first}{within})"] * (gap > 0)
    if not best:
        return "Not measured: auto."
    first = ", ".join(f"{best[s]} at {float(s):.1%}" for s in best)
    return f"By KL the best of the others: {first}. auto is " + (
        f"behind at {'; '.join(behind)}." if behind else "never behind."
    )


if __name__ == "__main__":
    main()
