"""Many methods and budgets from one calibration: every point compressed, measured and recorded."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf, isfinite, log
from pathlib import Path
from typing import Any

from planish import api
from planish.calibrate.activations import MemoryLimits
from planish.calibrate.cache import Cache, open_cache, tokenize
from planish.calibrate.stream import Stream
from planish.calibrate.text import Text as Tokens
from planish.calibrate.text import fingerprint, load_tokens, thin
from planish.checking import check_windows
from planish.compression import Calibration, Destination, Shared, compress, pick_dtype
from planish.core import Progress
from planish.errors import InputError, PlanishError
from planish.evaluate import drift, perplexity, speed
from planish.evaluate.report.page import write_report
from planish.evaluate.report.points import NAN, Point, read_points, write_points
from planish.folder.owner import is_full, owning
from planish.folder.safetensors import write_text
from planish.folder.source import FolderSource, Source, open_source
from planish.folder.tokenizer import load_tokenizer
from planish.plan.footprint import footprint
from planish.request import TEXT, Grid, Request, takes
from planish.sizes.ladder import choose_size
from planish.sizes.trials import Contest
from planish.sweep.grid import Trial, list_sizes, list_trials, tell_sweeping

PLAIN = 1 << 20  # bytes of what plain types came out as, where they are not kept on disk
Watch = Callable[[str, int, int], None]


@dataclass
class Sweep:
    """What a sweep measured and wrote."""

    output: str
    points: list[Point] = field(default_factory=list)
    skipped: int = 0  # finished by an earlier run
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@takes(*Grid.model_fields, "calibration", *TEXT, "device", "dtype", "round_to", "target")
@owning
def sweep(
    model: str | Path,
    *,
    output: str | Path,
    cache: bool = False,
    overwrite: bool = False,
    progress: Watch | None = None,
    **options: Any,
) -> Sweep:
    """Compress `model` by every method at every keep into output/points, measure, write results.csv and report.html.

    `keeps`, `kv_keeps`, `flops_keeps`: budgets; of two lists every pair holds together. `sizes`: curves of rounding alone,
    cuts in 16 bits, and both (`planish.sweep.grid`). All points share one calibration,
    and every statistic of the uncompressed model with the others that see the same windows (auto shuffles some). Points
    that results.csv already has are not run again; one that fails is recorded with its reason. A method's `sweeping`
    settings hold where `methods` says nothing else. `cache`: see `planish.api.compress`.
    """
    start, output = time.perf_counter(), Path(output)
    grid = Grid.ask(**{n: v for n, v in options.items() if n in Grid.model_fields})
    asked = Request.ask(model=str(model), **{n: v for n, v in options.items() if n not in Grid.model_fields})
    asked = asked.model_copy(update={"device": api.find_device(asked.device)})
    if is_full(output) and not (output / "sweep.json").is_file():
        raise InputError(f"output {output} exists and is not a sweep; choose another folder")
    trials = [] if grid.sizes else list_trials(grid, asked)
    runner, record = open_runner(asked, grid, options.get("calibration"), cache, output)
    trials = [*{t.name: t for t in trials or list_sizes(grid, asked, runner.source)}.values()]
    book = Book(output, record, overwrite)
    if not book.finished("dense"):
        book.record(runner.measure_dense())
    found, ran = Sweep(str(output)), set[str]()
    for n, trial in enumerate(trials):
        if book.finished(trial.name) and book.points[trial.name].settings == trial.point().settings:
            found.skipped += 1
        else:
            ran.add(trial.text)
            book.record(runner.measure(trial, book.folder(trial.name)))
            book.thin(grid.keep_models)
        if progress:
            progress(f"{trial.text} {trial.request.tell()}", n + 1, len(trials))
    found.points = list(book.points.values())
    found.warnings = runner.text.notes + list(
        dict.fromkeys(w for t in trials if t.text in ran for w in tell_sweeping(t))
    )
    if record["evaluation"].get("thinned"):
        n = record["evaluation"]["tokens"]
        found.warnings.append(f"measured on {n:,} tokens from all over builtin; --eval-text builtin takes all of them")
    found.seconds = time.perf_counter() - start
    write_report(output)
    return found


def open_runner(asked: Request, grid: Grid, ids: Any, cache: bool, output: Path) -> tuple[Runner, dict[str, Any]]:
    """What measures the points, and what sweep.json records: points of another model or text do not belong beside them."""
    source = open_source(asked.model)
    tokenizer = load_tokenizer(source.folder) if isinstance(source, FolderSource) else None
    text = api.read_calibration(source, tokenizer, asked.calibration, ids, cache)
    check_windows(text.windows, source)
    length = text.windows.shape[1]
    vocabulary, remember = source.config.vocab_size, tokenize if cache else None
    given = "builtin" if grid.eval_text is None else grid.eval_text
    held = load_tokens(
        given, tokenizer, split="evaluation", vocab_size=vocabulary, tokenize=remember, bos=asked.calibration.bos
    )
    tokens, thinned = held.tokens, {}
    if grid.eval_tokens is not None:
        tokens = tokens[: max(grid.eval_tokens, length)]
    elif grid.eval_text is None:
        tokens = thin(tokens, length, held.begin)
        thinned = {"thinned": True} if len(tokens) < len(held.tokens) else {}
    if held.begin is None:
        tokens = tokens[: len(tokens) // length * length]
    record = {
        "model": asked.model,
        "calibration": text.record,
        "evaluation": {"source": str(given) if isinstance(given, str | Path) else "ids", "tokens": len(tokens),
                       "seq_len": length, "begins": held.policy, "fingerprint": fingerprint(tokens), **thinned},
        "device": asked.device, "dtype": asked.dtype, "round_to": asked.round_to,
        "target": None if asked.target == "any" else asked.target,
    }  # fmt: skip
    held = replace(held, tokens=tokens)
    return Runner(source, text, held, asked, output, cached=cache, speed=grid.bench), record


class Book:
    """results.csv and the points' folders below `output`; what is finished stays finished."""

    def __init__(self, output: Path, request: dict[str, Any], overwrite: bool):
        self.output, self.points = output, dict[str, Point]()
        earlier = output / "sweep.json"
        if earlier.is_file() and not overwrite:
            self.points = {p.name: p for p in read_points(output)}
            try:
                old = json.loads(earlier.read_text(encoding="utf-8"))
            except ValueError:
                old = {}
            for key, value in json.loads(json.dumps(request)).items():
                if drop_begins(old.get(key)) != drop_begins(value):
                    raise InputError(
                        f"{output} holds a sweep with another {key} ({describe(old.get(key))}, now {describe(value)}); "
                        "choose another folder or pass --overwrite"
                    )
        elif overwrite:
            shutil.rmtree(output / "points", ignore_errors=True)
        try:
            (output / "points").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {output}: {error.strerror or error}") from None
        write_text(earlier, json.dumps(request, indent=2) + "\n")

    def folder(self, name: str) -> Path:
        return self.output / "points" / name

    def finished(self, name: str) -> bool:
        return name in self.points and not self.points[name].error

    def record(self, point: Point) -> None:
        dense = self.points.get("dense")
        if dense and not point.error:
            point.excess = log(point.perplexity / dense.perplexity) if isfinite(point.perplexity) else inf
            if not (dense.kv_bytes_per_token and dense.block_params and dense.bytes and dense.flops_per_token):
                r = self.manifest(point.name)
                dense.kv_bytes_per_token, dense.block_params = r["kv_bytes_per_token_before"], r["block_params_before"]
                dense.bytes, dense.flops_per_token = r["bytes_before"], r["flops_per_token_before"]
        self.points[point.name] = point
        write_points(self.output, list(self.points.values()))

    def manifest(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder(name) / "planish.json").read_text(encoding="utf-8"))["result"]

    def thin(self, keep_models: str) -> None:
        """Delete the weights that need not stay; manifests do."""
        done = [p for p in self.points.values() if p.name != "dense" and not p.error]
        best = {k: min((p for p in done if p.asked_text == k), key=lambda p: p.perplexity) for k in
                {p.asked_text for p in done}}  # fmt: skip
        for point in done:
            if point.kept and (
                keep_models == "none" or (keep_models == "best" and best[point.asked_text] is not point)
            ):
                point.kept = ""
                for path in self.folder(point.name).iterdir():
                    if path.name not in ("planish.json", "drift.json", "choices.json"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_points(self.output, list(self.points.values()))


class Runner:
    """Compresses, loads and measures points on one calibration text and one that is held out."""

    def __init__(
        self, source: Source, text: Calibration, held: Tokens, asked: Request, folder: Path,
        *, cached: bool = False, speed: bool = False, progress: Progress | None = None,
    ):  # fmt: skip
        self.source, self.text, self.held, self.asked, self.folder = source, text, held, asked, folder
        self.cached, self.speed, self.progress = cached, speed, progress
        self.length = text.windows.shape[1]
        self.dtype = asked.dtype or ("float32" if asked.device == "cpu" else None)
        self.model: Any = None  # the dense one, where it is needed beside others
        self.traced: drift.Trace | None = None
        self.plain = Cache(memory=PLAIN)

    @cached_property
    def shared(self) -> Shared:
        """The model's stream over the calibration windows and what it found: points use it again."""
        kind = api.find_dtype(self.asked.dtype) or pick_dtype(self.source, self.asked.device)
        limits = MemoryLimits(folder=self.folder)
        stream = Stream(self.source, self.text.windows, device=self.asked.device, dtype=kind, limits=limits)
        memory = limits.limit // 2
        return Shared(stream, (open_cache(stream, memory) if self.cached else None) or Cache(memory=memory))

    def load(self, folder: str | Path) -> Any:
        return api.load(folder, device=self.asked.device, dtype=self.dtype)

    def dense(self) -> Any:
        model = self.model or self.load(self.source.name)
        if self.speed:
            self.model = model
        return model

    def cache_bytes(self) -> int:
        """Bytes that the dense model's KV cache holds per token."""
        shapes = [self.source.shape(i) for i in range(self.source.n_blocks)]
        itemsize = next(self.source.block(0).parameters()).element_size()
        return itemsize * sum(footprint({}, shape).cache for shape in shapes)

    def measure_dense(self, trace: bool = True) -> Point:
        model = self.dense()
        point = Point("dense", "dense", keep=1.0, params=sum(p.numel() for p in model.parameters()), format="native")
        self.evaluate(point, model)
        point.excess = 0.0
        if self.speed:
            self.time(point, {"dense": model})
        if trace:
            self.trace(model)
        return point

    def evaluate(self, point: Point, model: Any) -> None:
        progress = self.progress and (lambda done, total: self.progress("windows", done, total))  # type: ignore[misc]
        batch = max(1, 2048 // self.length)
        measured = perplexity.evaluate(
            model, self.held.tokens, self.length, begin=self.held.begin, batch_size=batch, progress=progress
        )
        point.perplexity, point.nll = measured.perplexity, measured.nll

    def trace(self, model: Any) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        self.windows = drift.choose_windows(self.held.tokens, self.length, vocabulary, self.held.begin)
        self.traced = drift.trace(model, self.windows)

    def time(self, point: Point, models: dict[str, Any]) -> None:
        positions = getattr(next(iter(models.values())).config, "max_position_embeddings", None) or 512
        prompt = min(128, positions // 2)
        rows = {
            r.model: r for r in speed.bench(models, batch_sizes=(1,), prompt_len=prompt, new_tokens=min(32, prompt))
        }
        point.dense_decode_tokens_per_s = rows["dense"].decode_tokens_per_s.median
        row = rows.get(point.name, rows["dense"])
        point.decode_tokens_per_s = row.decode_tokens_per_s.median
        point.prefill_tokens_per_s = row.prefill_tokens_per_s.median

    def measure(self, trial: Trial, folder: Path, trace: bool = True) -> Point:
        """Compress and measure one point; what goes wrong becomes its `error`."""
        point = trial.point()
        try:
            stream = self.shared.stream
            asked = str(stream.dtype)[6:] if stream and self.asked.dtype else None
            request, place = trial.request.model_copy(update={"dtype": asked}), Destination(folder, overwrite=True)
            text, cache = replace(self.text, seconds=0.0, spare=self.text.spare[:0]), self.cached or self.plain
            contest = Contest(request, trial.method, self.source, text, place, self.progress, cache)
            request, tried, _ = choose_size(contest)
            if tried:
                place.files["choices.json"] = json.dumps([c.as_dict() for c in tried], indent=2) + "\n"
            result = compress(
                request, trial.method, self.source, text, place, shared=self.shared, progress=self.progress
            )
            point.bits = (request.bits or "16") + f", head {request.head_bits}" * (request.head_bits is not None)
            point.keep, point.params, point.block_params = result.keep, result.params_after, result.block_params_after
            point.kv_bytes_per_token, point.format = result.kv_bytes_per_token_after, result.format
            point.bytes, point.flops_per_token = result.bytes_after, result.flops_per_token_after
            point.seconds, point.peak_rss_bytes, point.kept = result.seconds["total"], result.peak_rss_bytes, "yes"
            notes = json.loads((folder / "planish.json").read_text(encoding="utf-8"))["notes"]
            point.predicted = float(notes.get("predicted_loss", NAN))
            small = self.load(folder)
            self.evaluate(point, small)
            if trace:
                self.compare(point, small, notes, folder)
            if self.speed:
                self.time(point, {"dense": self.dense(), point.name: small})
        except (PlanishError, RuntimeError, ValueError, ArithmeticError, LookupError, OSError, MemoryError) as error:
            kind = "" if isinstance(error, PlanishError) else type(error).__name__ + ": "
            point.error = " ".join(f"{kind}{error}".split())
            shutil.rmtree(folder, ignore_errors=True)
        return point

    def compare(self, point: Point, small: Any, notes: dict[str, Any], folder: Path) -> None:
        if self.traced is None:
            self.trace(self.dense())
        assert self.traced is not None
        gone = [set(r["blocks"]) for r in notes.get("removed", {}).values()]
        traced = drift.trace(small, self.windows)
        removed = sorted(set.intersection(*gone)) if gone and len(traced.blocks) < len(self.traced.blocks) else []
        found = drift.compare(self.traced, traced, removed)
        point.kl = found.kl
        write_text(folder / "drift.json", json.dumps(asdict(found)) + "\n")


def drop_begins(value: Any) -> Any:
    """Where windows begin and what is priced is in their fingerprint; sweeps of before there was a choice do not name it."""
    return (
        {k: v for k, v in value.items() if k not in ("bos", "begins", "objective")}
        if isinstance(value, dict)
        else value
    )


def describe(value: Any) -> str:
    """Short, for messages."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {str(v)[:12]}" for k, v in value.items())
    return str(value)
