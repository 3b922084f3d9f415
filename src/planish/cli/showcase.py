"""The embedded model, compressed by every method: offline, in minutes."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from planish.calibrate.documents import builtin_text
from planish.calibrate.text import Text as Tokens
from planish.calibrate.text import check_ids, fingerprint
from planish.compression import Calibration
from planish.errors import InputError, PlanishError
from planish.evaluate.report.page import render
from planish.evaluate.report.points import Point
from planish.evaluate.report.svg import Mark, Quantity, Series, chart, stand_alone
from planish.folder.hub import find_folder
from planish.folder.owner import check_output, owning
from planish.folder.source import open_source
from planish.folder.tokenizer import load_tokenizer
from planish.methods import find_method, list_methods
from planish.request import Request
from planish.sweep import Runner, Trial

MODEL = Path(__file__).parents[1] / "data" / "demo"
KEEPS = (0.6, 0.4, 0.8)  # in the order of work: if time runs out, every method has been seen once
SHOWN = KEEPS[0]  # where the best one's model is kept, and completes code: it does not show at 0.8 who is better
# the quick ones before auto: a slow machine shows some
FIRST = ("flat-llm", "a3", "svd-llm", "auto", "erc-svd", "mpifa")
SEQ_LEN, CALIBRATION, EVALUATION = 256, 8, 16  # windows of SEQ_LEN tokens; a Gram of this model needs 576 tokens
LIMIT = 165.0  # seconds
TOP = 6  # times the dense model's perplexity: the top of the chart
NAMED = 6  # so many of the best methods have a colour in the chart
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


@dataclass
class Line:
    """What one method did: a row per keep, from the largest down; None where it was skipped, but not everywhere."""

    method: str
    rows: list[Row | None]

    @property
    def smallest(self) -> Row:
        return [r for r in self.rows if r][-1]

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.rows if r)


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

    @property
    def keeps(self) -> list[float]:
        """What was asked, from the largest down."""
        return sorted({r.keep_requested for r in self.rows}, reverse=True)

    @property
    def least(self) -> dict[float, float]:
        """Keep → the least perplexity there."""
        done = sorted((r for r in self.rows if not r.skipped), key=lambda r: -r.perplexity)
        return {r.keep_requested: r.perplexity for r in done}

    @property
    def lines(self) -> list[Line]:
        """The methods, the best at the smallest keep first; those that are not measured everywhere last."""
        found = dict[str, list[Row]]()
        for row in self.rows:
            if not row.skipped:
                found.setdefault(row.method, []).append(row)
        keeps = self.keeps
        lines = [
            Line(m, [next((r for r in rows if r.keep_requested == k), None) for k in keeps])
            for m, rows in found.items()
        ]
        return sorted(lines, key=lambda e: (e.rows.count(None), e.smallest.perplexity))


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

    `quick`: keep 0.6 alone, a third of the text. `limit`: seconds after which what is left is skipped with a reason.
    Every method is given the same calibration windows and is measured on the same evaluation windows.
    """
    start = time.perf_counter()
    check_output(output / "model", overwrite=True)
    folder = find_demo_model(model)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"the demo needs a tokenizer beside the model; {folder} has none")
    with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as scratch:
        runner = open_runner(folder, tokenizer, EVALUATION // 3 if quick else EVALUATION, Path(scratch))
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {output}: {error.strerror or error}") from None
        dense = replace(runner.measure_dense(trace=False), kv_bytes_per_token=runner.cache_bytes())
        found = Demo("embedded demo model" if model is None else folder.name, make_row(dense, 0.0), prompt=PROMPT)
        found.text = {
            "calibration_tokens": runner.text.windows.numel(), "evaluation_tokens": len(runner.held.tokens),
            "seq_len": runner.length, "fingerprint": fingerprint(runner.held.tokens), "settings": SETTINGS,
        }  # fmt: skip
        best = run_all(found, runner, (SHOWN,) if quick else KEEPS, (start, limit), output, progress)
        found.completions["dense"] = complete(runner.dense(), tokenizer, PROMPT)
        if best is not None:
            small = complete(runner.load(output / "model"), tokenizer, PROMPT)
            found.completions[f"{best.method}, keep {best.keep:.2f}"] = small
            found.files.append(str(output / "model"))
    found.rows.sort(key=lambda r: (-r.keep_requested, bool(r.skipped), r.perplexity, r.method))
    found.seconds = time.perf_counter() - start
    write_files(found, output)
    return found


def open_runner(folder: Path, tokenizer: Any, n: int, scratch: Path) -> Runner:
    source = open_source(folder)
    seq_len = min(SEQ_LEN, source.config.max_position_embeddings)
    windows = sample_builtin(tokenizer, "train", CALIBRATION, seq_len)
    tokens = sample_builtin(tokenizer, "heldout", n, seq_len).flatten()
    check_ids(tokens.numpy(), "the demo's text", source.config.vocab_size)
    text = Calibration(windows, {"source": "builtin", "n_samples": CALIBRATION, "seq_len": seq_len})
    held = Tokens(tokens, "builtin", bos=False, is_ids=False)
    return Runner(source, text, held, Request(model=source.name, device="cpu"), scratch)


def run_all(
    found: Demo,
    runner: Runner,
    keeps: Sequence[float],
    time_left: tuple[float, float],
    output: Path,
    progress: Report | None,
) -> Row | None:
    """A row for every method and keep, within `time_left` (since when, so many seconds); the best one at `SHOWN`, whose model
    is copied to the output."""
    best: Row | None = None
    took: dict[str, float] = {}
    methods, (start, limit), folder = order_methods(), time_left, runner.folder / "model"
    total = len(methods) * len(keeps)
    for n in range(total):
        if n % len(methods) == 0:
            methods.sort(key=lambda m: (m not in FIRST, took.get(m, 0.0)))  # later rounds: then the quick ones
        method, keep = methods[n % len(methods)], keeps[n // len(methods)]
        left = limit - (time.perf_counter() - start)
        row = Row(method, keep)
        if took.get(method, 0.0) > left or left < 1:
            row.skipped = f"no time left (limit {limit:g} s)"
        else:
            row = run_one(runner, method, keep, folder, left if method in FIRST else min(left, max(10.0, limit / 10)))
            took[method] = row.seconds
        if keep == SHOWN and not row.skipped and (best is None or row.perplexity < best.perplexity):
            best = row
            shutil.rmtree(output / "model", ignore_errors=True)
            shutil.copytree(folder, output / "model")
        found.rows.append(row)
        if progress:
            progress(f"{method} {keep:g}", n + 1, total)
    return best


def run_one(runner: Runner, method: str, keep: float, folder: Path, seconds: float) -> Row:
    """Compress into `folder` and measure; at most so many seconds."""
    start = time.perf_counter()

    def watch(*_: object) -> None:
        if time.perf_counter() - start > seconds:
            raise OutOfTime(f"stopped after {seconds:.0f} s")

    runner.progress, settings = watch, SETTINGS.get(method, {})
    request = runner.asked.model_copy(update={"keep": keep, "settings": settings})
    point = runner.measure(Trial(method, find_method(method, settings), request), folder, trace=False)
    return make_row(point, time.perf_counter() - start)


def make_row(p: Point, elapsed: float) -> Row:
    seconds = p.seconds if p.seconds == p.seconds else elapsed
    return Row(p.method, p.keep_requested, p.keep, p.params, p.perplexity, seconds, p.kv_bytes_per_token, p.error)


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
    """demo.svg, demo.html and demo.json."""
    series, picture = find_series(found), draw_chart(found)
    lead = (
        f"{found.model}, {found.dense.parameters / 1e6:.1f} M parameters · "
        f"{found.text['evaluation_tokens']:,} tokens of held-out Python source"
    )
    page = render(
        "demo.html", title="planish demo", lead=lead, tiles=find_tiles(found), chart=Markup(picture),
        small_chart=Markup(draw_chart(found, names=False)), series=series, text=found.text, dense=found.dense, keeps=found.keeps,
        least=found.least, lines=found.lines, skipped=group_skipped(found.rows), completions=found.completions,
        prompt=found.prompt,
    )  # fmt: skip
    files = [output / f"demo.{kind}" for kind in ("svg", "html", "json")]
    found.files += map(str, files)
    texts = (stand_alone(picture), page, json.dumps(found.as_dict(), indent=2) + "\n")
    for path, text in zip(files, texts, strict=True):
        path.write_text(text, encoding="utf-8")


def find_tiles(found: Demo) -> list[tuple[str, str, list[str]]]:
    """For every keep at which time was left for two methods the best one and the next: heading, figure, lines."""
    tiles = []
    for keep in found.keeps:
        best = sorted(
            (r for r in found.rows if r.keep_requested == keep and not r.skipped), key=lambda r: r.perplexity
        )[:2]
        if len(best) == 2:
            first, second = best
            lines = [f"perplexity, {100 * (first.perplexity / found.dense.perplexity - 1):+.1f} % on dense"]
            lines.append(f"next: {second.method} {second.perplexity:,.2f}")
            tiles.append((f"keep {keep:g} · {first.method}", f"{first.perplexity:,.2f}", lines))
    return tiles


def find_series(found: Demo) -> list[Series]:
    """A line per method, from the dense model to its smallest one; the best have colours, the others are thin and grey."""
    return [
        Series(e.method, n if n < NAMED else None, [make_mark(r) for r in (found.dense, *e.rows) if r])
        for n, e in enumerate(found.lines)
    ]


def make_mark(r: Row) -> Mark:
    lines = [f"{r.method}, keep {r.keep:.3f}", f"perplexity {r.perplexity:,.2f}", f"{r.parameters:,} parameters"]
    lines.append(f"{r.kv_bytes_per_token:,} KV bytes per token")
    return Mark(r.keep, r.perplexity, "\n".join(lines + ([f"{r.seconds:.1f} s"] if r.seconds else [])))


def draw_chart(found: Demo, names: bool = True) -> str:
    """Perplexity against keep from 1 downwards."""
    dense = found.dense.perplexity
    keep = Quantity("keep: share of the blocks' weights that stays", log=False, falling=True)
    level = (dense, f"dense {dense:.1f}")
    return chart(find_series(found), keep, Quantity("perplexity", log=True), level=level, top=TOP * dense, names=names)


def group_skipped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Reason → what was skipped for it."""
    groups: dict[str, list[str]] = {}
    for r in rows:
        if r.skipped:
            groups.setdefault(r.skipped, []).append(f"{r.method} {r.keep_requested:g}")
    return groups
