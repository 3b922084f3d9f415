"""The embedded model, compressed by every method: offline, in minutes."""

from __future__ import annotations

import base64
import html
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import api
from planish.calibrate.cache import Cache
from planish.calibrate.documents import builtin_text
from planish.calibrate.stream import Stream
from planish.calibrate.text import check_ids, fingerprint
from planish.compression import Calibration, Destination, Shared, compress
from planish.errors import InputError, PlanishError
from planish.evaluate import perplexity
from planish.evaluate.report.chart import Point, draw_chart
from planish.folder.config import load_config
from planish.folder.hub import find_folder
from planish.folder.owner import owning
from planish.folder.source import open_source
from planish.folder.tokenizer import load_tokenizer
from planish.methods import find_method, list_methods
from planish.plan.footprint import kv_bytes
from planish.request import Request

MODEL = Path(__file__).parents[1] / "data" / "demo"
KEEPS = (0.8, 0.7, 0.9)  # in the order of work: if time runs out, every method has been seen once
# the quick ones before auto: a slow machine shows some
FIRST = ("flat-llm", "a3", "svd-llm", "auto", "erc-svd", "mpifa")
SEQ_LEN, CALIBRATION, EVALUATION = 256, 8, 16  # windows of SEQ_LEN tokens; a Gram of this model needs 576 tokens
LIMIT = 165.0  # seconds
SETTINGS: dict[str, dict[str, Any]] = {  # no searches: three minutes for everything
    "erc-svd": {"k": 8},
    "asvd": {"allocation": "uniform"},
    "subfit": {"attention_score": "influence", "ffn_score": "error", "fit": "sequential"},
    "sleb": {"windows": 2},
    "blockpruner": {"windows": 2},
}
PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n    with open(path) as f:\n       '

Report = Callable[[str, int, int], None]


@dataclass
class Row:
    """One method at one keep; `skipped` says why there is no measurement."""

    method: str
    keep_requested: float
    keep: float = float("nan")
    parameters: int = 0
    perplexity: float = float("nan")
    seconds: float = 0.0
    kv_bytes_per_token: int = 0
    skipped: str = ""


class Bench:
    """What all runs share: the model's stream over the calibration windows, what it found, and the evaluation tokens."""

    def __init__(self, folder: Path, windows: Tensor, evaluation: Tensor):
        self.windows, self.evaluation = windows, evaluation
        self.stream = Stream(open_source(folder), windows)
        self.cache = Cache(memory=1 << 30)

    def cache_bytes(self) -> int:
        """Bytes that the dense model's KV cache holds per token."""
        source = self.stream.source
        shapes = [source.shape(i) for i in range(source.n_blocks)]
        return kv_bytes([{}] * len(shapes), shapes, next(source.block(0).parameters()).element_size())

    def measure(self, model: Any, progress: Callable[[int, int], None] | None = None) -> float:
        seq_len = self.windows.shape[1]
        return perplexity.evaluate(model, self.evaluation, seq_len, batch_size=8, progress=progress).perplexity


@dataclass
class Demo:
    """What `planish demo` measured and wrote."""

    model: str
    dense: Row
    rows: list[Row] = field(default_factory=list)
    prompt: str = ""
    completions: dict[str, str] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class OutOfTime(PlanishError):
    """A run was stopped at its share of the time."""


@owning
def run_demo(
    output: Path,
    *,
    model: Path | None = None,
    quick: bool = False,
    limit: float = LIMIT,
    progress: Report | None = None,
) -> Demo:
    """Compress by every method, measure on held-out text, write a table, a chart, a page and one compressed model.

    `quick`: keep 0.8 alone, a third of the text. `limit`: seconds after which what is left is skipped with a reason.
    Every method is given the same calibration windows and is measured on the same evaluation windows.
    """
    start = time.perf_counter()
    folder = find_demo_model(model)
    tokenizer = load_tokenizer(folder)
    config = load_config(folder)
    if tokenizer is None:
        raise InputError(f"the demo needs a tokenizer beside the model; {folder} has none")
    seq_len = min(SEQ_LEN, config.max_position_embeddings)
    calibration = sample_builtin(tokenizer, "train", CALIBRATION, seq_len)
    evaluation = sample_builtin(tokenizer, "heldout", EVALUATION // 3 if quick else EVALUATION, seq_len).flatten()
    check_ids(evaluation.numpy(), "the demo's text", config.vocab_size)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror or error}") from None

    dense_model = api.load(folder, dtype="float32")
    dense = Row("dense", 1.0, 1.0, sum(p.numel() for p in dense_model.parameters()))
    bench = Bench(folder, calibration, evaluation)
    dense.kv_bytes_per_token = bench.cache_bytes()
    dense.perplexity = bench.measure(dense_model)
    found = Demo("embedded demo model" if model is None else folder.name, dense)
    found.text = {
        "calibration_tokens": calibration.numel(),
        "evaluation_tokens": evaluation.numel(),
        "seq_len": seq_len,
        "fingerprint": fingerprint(evaluation),
        "settings": SETTINGS,
    }
    best: Row | None = None
    took: dict[str, float] = {}
    methods, keeps = order_methods(), (0.8,) if quick else KEEPS
    total = len(methods) * len(keeps)
    with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as scratch:
        for n in range(total):
            if n % len(methods) == 0:
                methods.sort(key=lambda m: (m not in FIRST, took.get(m, 0.0)))  # later rounds: then the quick ones
            method, keep = methods[n % len(methods)], keeps[n // len(methods)]
            left = limit - (time.perf_counter() - start)
            row = Row(method, keep)
            if took.get(method, 0.0) > left or left < 1:
                row.skipped = f"no time left (limit {limit:g} s)"
            else:
                share = left if method in FIRST else min(left, max(10.0, limit / 10))
                measure(row, bench, Path(scratch) / "model", share)
                took[method] = row.seconds
            if keep == 0.8 and not row.skipped and (best is None or row.perplexity < best.perplexity):
                best = row
                shutil.rmtree(output / "model", ignore_errors=True)
                shutil.copytree(Path(scratch) / "model", output / "model")
            found.rows.append(row)
            if progress:
                progress(f"{method} {keep:g}", n + 1, total)
    found.rows.sort(key=lambda r: (-r.keep_requested, bool(r.skipped), r.perplexity, r.method))
    found.prompt = PROMPT
    found.completions["dense"] = complete(dense_model, tokenizer, PROMPT)
    if best is not None:
        found.completions[f"{best.method}, keep {best.keep:.2f}"] = complete(
            api.load(output / "model", dtype="float32"), tokenizer, PROMPT
        )
        found.files.append(str(output / "model"))
    found.seconds = time.perf_counter() - start
    write_files(found, output)
    return found


def find_demo_model(model: Path | None) -> Path:
    if model is not None:
        return find_folder(model)
    if not (MODEL / "config.json").is_file():
        raise InputError(
            "the embedded demo model is missing from this installation (planish/data/demo); "
            "install planish again, or name a model folder: planish demo --model DIR"
        )
    return MODEL


def order_methods() -> list[str]:
    names = list(list_methods())
    return [m for m in FIRST if m in names] + [m for m in names if m not in FIRST]


def sample_builtin(tokenizer: Any, split: str, n: int, seq_len: int, seed: int = 0) -> Tensor:
    """Windows (n, seq_len) of Python's own source, each from another place; tokenizing all of it would take longer."""
    text = builtin_text(split)
    generator = random.Random(seed)
    windows: list[Tensor] = []
    while len(windows) < n:
        at = generator.randrange(max(1, len(text) - 16 * seq_len))
        at = text.find("\n", at) + 1
        ids = tokenizer(text[at : at + 16 * seq_len], verbose=False)["input_ids"]
        if len(ids) >= seq_len:
            windows.append(torch.tensor(ids[:seq_len]))
    return torch.stack(windows)


def measure(row: Row, bench: Bench, output: Path, share: float) -> None:
    """Fill a row: compress into `output`, load, perplexity; at most `share` seconds."""
    start = time.perf_counter()

    def watch(*_: object) -> None:
        if time.perf_counter() - start > share:
            raise OutOfTime(f"stopped after {share:.0f} s")

    try:
        settings = SETTINGS.get(row.method, {})
        source, record = (
            bench.stream.source,
            {"source": "builtin", "n_samples": len(bench.windows), "seq_len": bench.windows.shape[1]},
        )
        result = compress(
            Request(model=source.name, keep=row.keep_requested, settings=settings, device="cpu"),
            find_method(row.method, settings), source, Calibration(bench.windows, record),
            Destination(output, overwrite=True), shared=Shared(bench.stream, bench.cache), progress=watch,
        )  # fmt: skip
        row.keep, row.parameters = result.keep, result.params_after
        row.kv_bytes_per_token = result.kv_bytes_per_token_after
        row.seconds = time.perf_counter() - start
        row.perplexity = bench.measure(api.load(output, dtype="float32"), watch)
    except PlanishError as error:
        row.skipped = str(error)
    row.seconds = row.seconds or time.perf_counter() - start


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, lines: int = 2, tokens: int = 40) -> str:
    """The model's likeliest continuation of a prompt, by greedy choice, up to `lines` lines."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        pad_token_id=model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0,
    )  # fmt: skip
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return "\n".join(text.split("\n")[:lines]).rstrip()


def write_files(found: Demo, output: Path) -> None:
    """demo.json, demo.png and demo.html."""
    points = [Point(r.method, r.keep, r.perplexity) for r in found.rows if not r.skipped]
    subtitle = (
        f"{found.model}, {found.dense.parameters / 1e6:.1f} M parameters · "
        f"{found.text['evaluation_tokens']:,} tokens of held-out Python source"
    )
    chart = output / "demo.png"
    try:
        draw_chart(points, found.dense.perplexity, chart, "Compressed without training", subtitle)
        found.files.append(str(chart))
    except ImportError:
        chart.unlink(missing_ok=True)
    page = output / "demo.html"
    page.write_text(make_page(found, chart if chart.exists() else None, subtitle), encoding="utf-8")
    data = output / "demo.json"
    found.files += [str(page), str(data)]
    data.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { width: 100% } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15rem .9rem .15rem 0 } th:first-child, td:first-child { text-align: left }
tr.new td { border-top: 1px solid #ddd } .skipped { color: #767676; text-align: left }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } pre b { color: #0072b2 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } h2 { font-size: 1.1rem }
"""


def make_page(found: Demo, chart: Path | None, subtitle: str) -> str:
    """A page of its own: chart, table and completions, nothing loaded from elsewhere."""
    rows, last = [], None
    for r in [found.dense, *found.rows]:
        new = " class=new" if r.keep_requested != last else ""
        last = r.keep_requested
        head = f"<td>{html.escape(r.method)}</td><td>{r.keep_requested:g}</td>"
        if r.skipped:
            rows.append(f"<tr{new}>{head}<td colspan=4 class=skipped>{html.escape(r.skipped)}</td></tr>")
            continue
        cells = (f"{r.parameters:,}", f"{r.perplexity:,.2f}", f"{r.seconds:.1f}", f"{r.kv_bytes_per_token:,}")
        rows.append(f"<tr{new}>{head}{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    image = ""
    if chart is not None:
        data = base64.b64encode(chart.read_bytes()).decode()
        image = f'<img alt="perplexity against keep" src="data:image/png;base64,{data}">'
    pairs = "".join(
        f"<div><h2>{html.escape(name)}</h2><pre>{html.escape(found.prompt)}<b>{html.escape(text)}</b></pre></div>"
        for name, text in found.completions.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>planish demo</title><style>{STYLE}</style>
<h1>planish demo</h1><p>{html.escape(subtitle)}</p>
{image}
<table><tr><th>method<th>keep<th>parameters<th>perplexity<th>seconds<th>KV bytes/token</tr>
{chr(10).join(rows)}</table>
<div class="pair">{pairs}</div>
</html>
"""


def group_skipped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Reason → what was skipped for it."""
    groups: dict[str, list[str]] = {}
    for r in rows:
        if r.skipped:
            groups.setdefault(r.skipped, []).append(f"{r.method} {r.keep_requested:g}")
    return groups
