"""How much of solving is an accelerator's: numbers that operations make there and on the CPU; writes docs/tables/solving.md.

    python tools/count_solving.py                       # this checkout
    python tools/count_solving.py --beside CHECKOUT     # and another one's planish before it

On a device that is simulated on the CPU (tests/accelerator.py), so that it needs none: one block of random weights, units whose
sums have 256 × 256 numbers or more go there, views count. Seconds are `benchmarks/accelerator.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "solving.md"
METHODS = ("flat-llm", "a3", "svd-llm", "auto")
HEAD = """# How much of solving is the accelerator's

Written by `python tools/count_solving.py{beside}`: of the numbers that solving and pricing one block make (512 / 1792 channels,
16 × 256 tokens, keep 0.8), those made on an accelerator, which is simulated; millions. Before: commit {before}.

| method | there, before | on the CPU, before | share | there | on the CPU | share |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="a checkout whose planish is counted too")
    parser.add_argument("--count", action="store_true", help="count with the planish that is imported, as JSON")
    args = parser.parse_args()
    if args.count:
        print(json.dumps({m: count(m) for m in METHODS}))
        return
    before, now = ask(args.beside) if args.beside else {}, ask(ROOT)
    rows = [f"| {m} | {describe(before.get(m))} | {describe(now[m])} |" for m in METHODS]
    named = subprocess.run(
        ["git", "-C", args.beside or ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    head = HEAD.format(beside=" --beside CHECKOUT" if args.beside else "", before=named if args.beside else "none")
    TABLE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))


def describe(found: list[int] | None) -> str:
    if found is None:
        return "– | – | –"
    there, here = found
    return f"{there / 1e6:.0f} | {here / 1e6:.0f} | {there / (there + here):.1%}"


def ask(checkout: Path) -> dict[str, list[int]]:
    """The counts of a checkout's planish, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "PYTHONWARNINGS": "ignore"}
    asked = [sys.executable, __file__, "--count"]
    done = subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def count(method: str) -> list[int]:
    """[Numbers made there, on the CPU] while units of one block are priced and solved."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
    import pytest
    import torch
    from random_model import write_model

    import planish
    from accelerator import solving_there
    from planish.plan import frontiers
    from planish.walks.solve import Walk

    torch.set_num_threads(1)
    found, patch = [0, 0], pytest.MonkeyPatch()

    def watch(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with solving_there(patch, large=256 * 256) as seen:
                out = function(*args)
            found[0] += sum(seen.there.values())
            found[1] += sum(seen.here.values())
            return out

        return call

    patch.setattr(Walk, "solve_units", watch(Walk.solve_units))
    patch.setattr(frontiers, "decompose_block", watch(frontiers.decompose_block))
    with tempfile.TemporaryDirectory() as scratch:
        write_model(
            Path(scratch) / "model", vocab_size=2048, hidden_size=512, intermediate_size=1792, num_hidden_layers=1,
            num_attention_heads=8, num_key_value_heads=2,
        )  # fmt: skip
        ids = torch.randint(2048, (16 * 256,), generator=torch.Generator().manual_seed(0)).numpy()
        planish.compress(
            Path(scratch) / "model", method=method, keep=0.8, output=Path(scratch) / "out", calibration=ids, n_samples=16,
            seq_len=256,
        )  # fmt: skip
    patch.undo()
    return found


if __name__ == "__main__":
    main()
