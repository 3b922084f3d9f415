"""Predicted against measured peak memory and disk, on random-weight models of several shapes; docs/tables/predict.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from random_model import write_model

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "predict.md"
CASES = [  # hidden, intermediate, blocks, vocabulary, method, windows of 128 tokens
    (512, 1408, 3, 16_000, "flat-llm", 16),
    (1024, 2816, 2, 32_000, "flat-llm", 32),
    (1024, 2816, 2, 32_000, "svd-llm", 32),
    (2048, 5632, 2, 32_000, "flat-llm", 48),
]
HEAD = """# Predicted and measured peaks

`python benchmarks/predict.py`: `planish plan` before, `planish compress` after, random bf16 weights, keep 0.8.

| hidden / intermediate | method | tokens | RAM predicted | RAM measured | off | disk predicted | disk measured | off |
|---|---|---|---|---|---|---|---|---|
"""


def run(*words: object) -> dict:
    done = subprocess.run([sys.executable, "-m", "planish", *map(str, words)], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> None:
    rows = []
    for hidden, intermediate, blocks, vocabulary, method, windows in CASES[
        : int(sys.argv[1]) if sys.argv[1:] else None
    ]:
        with tempfile.TemporaryDirectory(prefix="planish-predict-") as folder:
            model, out, text = (Path(folder) / n for n in ("model", "out", "text.npy"))
            write_model(
                model, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
                num_hidden_layers=blocks, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
            )  # fmt: skip
            np.save(text, np.random.default_rng(0).integers(0, vocabulary, windows * 128))
            flags = [model, "--keep", 0.8, "--method", method, "--calibration", text, "--n-samples", windows]
            flags += ["--seq-len", 128, "--json"]
            flags += ["--set", "damping=0.01", "--set", "allocation=uniform"] if method == "flat-llm" else []
            plan, done = run("plan", *flags), run("compress", *flags, "-o", out, "--no-cache")
            disk = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        ram, peak, space = plan["peak_ram_bytes"], done["peak_rss_bytes"], plan["disk_bytes"]
        rows.append(
            f"| {hidden} / {intermediate} | {method} | {windows * 128} | {ram / 1e9:.2f} GB | {peak / 1e9:.2f} GB | "
            f"{ram / peak - 1:+.0%} | {space / 1e6:.1f} MB | {disk / 1e6:.1f} MB | {space / disk - 1:+.1%} |"
        )
        print(rows[-1], flush=True)
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
