"""Many methods and budgets from one calibration: every point compressed, measured and recorded."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from math import inf, isfinite, log
from pathlib import Path
from typing import Any, Literal

from planish import api
from planish.calibrate.activations import Room
from planish.calibrate.cache import Cache, open_cache, tokenize
from planish.calibrate.stream import Stream
from planish.calibrate.text import Text as Tokens
from planish.calibrate.text import fingerprint, load_tokens
from planish.compression import Destination, Shared, check_windows, compress, pick_dtype
from planish.errors import InputError, PlanishError
from planish.evaluate import drift, perplexity, speed
from planish.evaluate.report.page import write_report
from planish.evaluate.report.points import NAN, Point, read_points, write_points
from planish.folder.owner import owning
from planish.folder.safetensors import write_text
from planish.folder.source import FolderSource, open_source
from planish.folder.tokenizer import load_tokenizer
from planish.manifest import Result
from planish.methods import find_method
from planish.methods.method import Method
from planish.request import Bos, Limits, Request, Sampling, Text

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


@owning
def sweep(
    model: str | Path,
    *,
    methods: Sequence[str],
    keeps: Sequence[float] = (),
    kv_keeps: Sequence[float] = (),
    flops_keeps: Sequence[float] = (),
    output: str | Path,
    calibration: Any = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    bos: Bos = "auto",
    eval_text: Any = "builtin",
    eval_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    round_to: int = 1,
    keep_models: Literal["best", "all", "none"] = "best",
    bench: bool = False,
    cache: bool = False,
    overwrite: bool = False,
    progress: Watch | None = None,
) -> Sweep:
    """Compress `model` by every method at every keep into output/points, measure, write results.csv and report.html.

    `keeps` (by default 0.9, 0.8, 0.7), `kv_keeps`, `flops_keeps`: budgets; of two lists every pair holds together.
    `methods`: names, with settings as in "auto:anchor=0". All points share one calibration, and every statistic of the
    uncompressed model with the others that see the same windows (auto shuffles some). Points that results.csv already has
    are not run again; one that fails is recorded with its reason. `keep_models`: whose weights stay on disk, "best" = the
    best method's at every keep. A method's `sweeping` settings hold where `methods` says nothing else. `bench`: measure
    tokens per second too.
    `cache`: see `planish.api.compress`.
    """
    start = time.perf_counter()
    chosen = [parse_method(text) for text in methods]
    budgets = list_budgets(keeps, kv_keeps, flops_keeps)
    if not chosen:
        raise InputError("a sweep needs at least one method")
    place, output = api.find_device(device), Path(output)
    source = open_source(model)
    tokenizer = load_tokenizer(source.folder) if isinstance(source, FolderSource) else None
    wanted = Text.ask(n_samples=n_samples, seq_len=seq_len, seed=seed, sampling=sampling, bos=bos)
    text = api.read_calibration(source, tokenizer, wanted, calibration, cache)
    check_windows(text.windows, source)
    length = text.windows.shape[1]
    held = load_tokens(
        eval_text,
        tokenizer,
        split="evaluation",
        vocab_size=source.config.vocab_size,
        tokenize=tokenize if cache else None,
        bos=bos,
    )
    tokens = held.tokens
    if eval_tokens is not None:
        tokens = tokens[: max(eval_tokens, length)]
    if held.begin is None:
        tokens = tokens[: len(tokens) // length * length]
    recorded = {
        "model": str(model),
        "calibration": text.record,
        "evaluation": {"source": str(eval_text) if isinstance(eval_text, str | Path) else "ids", "tokens": len(tokens),
                       "seq_len": length, "begins": held.policy, "fingerprint": fingerprint(tokens)},
        "device": place, "dtype": dtype, "round_to": round_to,
    }  # fmt: skip
    book = Book(output, recorded, overwrite)
    # the smallest budget first: it measures whatever the others need
    order = sorted(budgets, key=lambda asked: list(asked.given.values()))
    names = [(label, settings, method, asked) for label, settings, method in chosen for asked in order]
    runner = Runner(source.name, replace(held, tokens=tokens), length, place, dtype, bench)
    if not book.finished("dense"):
        book.record(runner.measure_dense())
    kind = api.find_dtype(dtype) or pick_dtype(source, place)
    stream: Stream | None = None
    shared: Cache | None = None
    found, ran = Sweep(str(output)), set[str]()
    for n, (label, settings, method, asked) in enumerate(names):
        limits = [f"{v:g}" if k == "keep" else f"{k.replace('_', '-')}{v:g}" for k, v in asked.given.items()]
        name = re.sub(r"[^A-Za-z0-9.=_+-]+", "-", "-".join([label, *limits]))
        if book.finished(name) and json.loads(book.points[name].settings or "{}") == settings:
            found.skipped += 1
        else:
            if stream is None or shared is None:
                room = Room(folder=output)
                stream = Stream(source, text.windows, device=place, dtype=kind, room=room)
                memory = room.limit // 2
                shared = (open_cache(stream, memory) if cache else None) or Cache(memory=memory)
            ran.add(label)
            point = Point(name, method.name, json.dumps(settings), next(iter(asked.given.values())))
            point.budgets = json.dumps(asked.given)

            request = Request(
                **asked.limits, model=str(model), method=point.method, settings=settings, device=place,
                dtype=str(kind)[6:], round_to=round_to,
            )  # fmt: skip
            run = partial(
                compress, request, method, source, replace(text, seconds=0.0), Destination(book.folder(name), overwrite=True),
                shared=Shared(stream, shared),
            )  # fmt: skip
            runner.measure(point, run, book)
            book.record(point)
            book.thin(keep_models)
        if progress:
            progress(f"{label} {asked.tell()}", n + 1, len(names))
    found.points = list(book.points.values())
    found.warnings = text.notes + [
        f"{label} ran with {name}={value}, so that further points cost little; "
        f"{label}:{name}={show(getattr(type(method), name))} gives what compress does"
        for (label, settings, method), text in zip(chosen, methods, strict=True)
        for name, value in method.sweeping.items()
        if label in ran and settings[name] == value and f"{name}=" not in text.replace("-", "_").replace(" ", "")
    ]
    found.seconds = time.perf_counter() - start
    write_report(output)
    return found


def show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def list_budgets(keeps: Sequence[float], kv_keeps: Sequence[float], flops_keeps: Sequence[float]) -> list[Limits]:
    """Every combination of the lists that are not empty."""
    if not (keeps or kv_keeps or flops_keeps):
        keeps = (0.9, 0.8, 0.7)
    lists = [values or (None,) for values in (keeps, kv_keeps, flops_keeps)]
    return [Limits.ask(keep=k, kv_keep=v, flops_keep=f) for k, v, f in product(*lists)]


def parse_method(text: str) -> tuple[str, dict[str, str], Method]:
    """ "auto:anchor=0:units=linear" → (the text, {"anchor": "0", …}, the method)."""
    name, *pairs = text.strip().split(":")
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--methods {text}: {pair!r} has no value; write {name}:name=value")
        settings[key.strip().replace("-", "_")] = value.strip()
    more = find_method(name, settings).sweeping
    settings = more | settings
    return text.strip(), settings, find_method(name, settings)


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
        elif output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
            raise InputError(f"output {output} exists and is not a sweep; choose another or pass --overwrite")
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
                    if path.name not in ("planish.json", "drift.json"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_points(self.output, list(self.points.values()))


class Runner:
    """Measures points on one evaluation text (n · length tokens), beside the dense model `name`."""

    def __init__(self, name: str, text: Tokens, length: int, device: str, dtype: str | None, bench: bool):
        self.name, self.text, self.length, self.device, self.bench = name, text, length, device, bench
        self.dtype = dtype or ("float32" if device == "cpu" else None)
        self.model: Any = None  # the dense one, where it is needed beside others
        self.traced: drift.Trace | None = None

    def dense(self) -> Any:
        if self.model is None:
            model = api.load(self.name, device=self.device, dtype=self.dtype)
            if not self.bench:
                return model
            self.model = model
        return self.model

    def measure_dense(self) -> Point:
        model = self.dense()
        point = Point("dense", "dense", keep=1.0, params=sum(p.numel() for p in model.parameters()), format="native")
        self.evaluate(point, model)
        point.excess = 0.0
        if self.bench:
            self.time(point, {"dense": model})
        self.trace(model)
        return point

    def evaluate(self, point: Point, model: Any) -> None:
        measured = perplexity.evaluate(
            model, self.text.tokens, self.length, begin=self.text.begin, batch_size=max(1, 2048 // self.length)
        )
        point.perplexity, point.nll = measured.perplexity, measured.nll

    def trace(self, model: Any) -> None:
        vocabulary = model.config.get_text_config().vocab_size
        self.windows = drift.choose_windows(self.text.tokens, self.length, vocabulary, self.text.begin)
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

    def measure(self, point: Point, run: Callable[[], Result], book: Book) -> None:
        """Compress and measure one point; what goes wrong becomes its `error`."""
        folder = book.folder(point.name)
        try:
            result = run()
            point.keep, point.params, point.block_params = result.keep, result.params_after, result.block_params_after
            point.kv_bytes_per_token, point.format = result.kv_bytes_per_token_after, result.format
            point.bytes, point.flops_per_token = result.bytes_after, result.flops_per_token_after
            point.seconds, point.peak_rss_bytes, point.kept = result.seconds["total"], result.peak_rss_bytes, "yes"
            notes = json.loads((folder / "planish.json").read_text(encoding="utf-8"))["notes"]
            point.predicted = float(notes.get("predicted_loss", NAN))
            small = api.load(folder, device=self.device, dtype=self.dtype)
            self.evaluate(point, small)
            if self.traced is None:
                self.trace(self.dense())
            self.compare(point, small, notes, folder)
            if self.bench:
                self.time(point, {"dense": self.dense(), point.name: small})
        except (PlanishError, RuntimeError, ValueError, ArithmeticError, LookupError, OSError, MemoryError) as error:
            point.error = " ".join(
                f"{'' if isinstance(error, PlanishError) else type(error).__name__ + ': '}{error}".split()
            )
            shutil.rmtree(folder, ignore_errors=True)

    def compare(self, point: Point, small: Any, notes: dict[str, Any], folder: Path) -> None:
        assert self.traced is not None
        gone = [set(r["blocks"]) for r in notes.get("removed", {}).values()]
        traced = drift.trace(small, self.windows)
        removed = sorted(set.intersection(*gone)) if gone and len(traced.blocks) < len(self.traced.blocks) else []
        found = drift.compare(self.traced, traced, removed)
        point.kl = found.kl
        write_text(folder / "drift.json", json.dumps(asdict(found)) + "\n")


def drop_begins(value: Any) -> Any:
    """Where windows begin is in their fingerprint; sweeps of before there was a choice do not name it."""
    return {k: v for k, v in value.items() if k not in ("bos", "begins")} if isinstance(value, dict) else value


def describe(value: Any) -> str:
    """Short, for messages."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {str(v)[:12]}" for k, v in value.items())
    return str(value)
