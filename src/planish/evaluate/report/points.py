"""The rows of results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from planish.errors import InputError
from planish.folder.safetensors import write_text

NAN = float("nan")
CURVES = {"bits": "rounding alone", "cuts": "{}, 16 bits", "both": "{} and rounding"}


@dataclass
class Point:
    """A row of results.csv: one method within one budget (or two), or the dense model. Empty cells were not measured."""

    name: str  # of its folder below points/
    method: str
    settings: str = "{}"  # JSON, those that differ from compress's: given, or the sweep's own
    keep_requested: float = 1.0
    keep: float = NAN
    params: int = 0
    block_params: int = 0
    kv_bytes_per_token: int = 0
    perplexity: float = NAN
    nll: float = NAN
    excess: float = NAN  # log(perplexity / dense perplexity), nats per token
    predicted: float = NAN  # the same, as the method predicted it
    kl: float = NAN  # KL(dense ‖ compressed) of the next token, nats
    prefill_tokens_per_s: float = NAN
    decode_tokens_per_s: float = NAN
    dense_decode_tokens_per_s: float = NAN  # measured in turns with it
    seconds: float = NAN  # of compressing, with whatever statistics were there already
    peak_rss_bytes: int = 0
    format: str = ""
    kept: str = ""  # "yes" where the weights are still in the folder
    error: str = ""
    budgets: str = "{}"  # JSON, name → what was asked; a keep alone is in keep_requested
    bytes: int = 0  # of the weight files
    flops_per_token: int = 0  # at a calibration window's context
    curve: str = ""  # of a sweep over sizes: bits, cuts or both
    asked_bits: str = ""  # auto, a type's number of bits, a mean of them
    bits: str = ""  # that the blocks' weights were rounded to

    @property
    def asked(self) -> dict[str, float]:
        """Name → limit of every budget."""
        return json.loads(self.budgets or "{}") or {"keep": self.keep_requested}

    @property
    def speedup(self) -> float:
        """Decoded tokens per second as a multiple of the dense model's in the same turns; rates of other turns say little."""
        return self.decode_tokens_per_s / (self.dense_decode_tokens_per_s or NAN)

    @property
    def asked_text(self) -> str:
        bits = [f"bits {self.asked_bits}"] if self.asked_bits else []
        shown = {n: f"{v:,.0f}" if n in ("max_bytes", "max_params") else f"{v:g}" for n, v in self.asked.items()}
        return ", ".join([*(f"{n.replace('_', '-')} {v}" for n, v in shown.items()), *bits])

    @property
    def label(self) -> str:
        """The method and the settings that were given: one line in the charts."""
        given = json.loads(self.settings or "{}")
        name = " ".join([self.method, *(f"{k}={v}" for k, v in given.items())])
        return CURVES[self.curve].format(name) if self.curve in CURVES else name


def write_points(output: Path, points: Sequence[Point]) -> None:
    """results.csv, complete or not at all. Numbers are written so that reading them gives the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Point)], lineterminator="\n")
    writer.writeheader()
    for point in points:
        writer.writerow({k: "" if v != v else v for k, v in asdict(point).items()})
    write_text(output / "results.csv", text.getvalue())


def read_points(output: Path) -> list[Point]:
    path = output / "results.csv"
    if not path.is_file():
        return []
    kinds = {f.name: str(f.type) for f in fields(Point)}
    empty: dict[str, Any] = {"float": NAN, "int": 0, "str": ""}
    convert: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        values: list[dict[str, Any]] = [
            {k: convert[kinds[k]](v) if v else empty[kinds[k]] for k, v in r.items()} for r in rows
        ]
        return [Point(**v) for v in values]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error!r}; choose another folder or pass --overwrite") from None
