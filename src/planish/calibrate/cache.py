"""What calibration found in an uncompressed model, kept for the next budget: sums behind taps, predicted losses.

In memory for several runs of one process (then whole frontiers too, with their factors), on disk across commands.
Everything is kept under a fingerprint of the weights, the text, the arithmetic and the code that measures. What is read
back gives the same bits as measuring again; files carry their SHA-256 in their names and are never trusted without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planish import lanes, stats
from planish.calibrate.documents import Document
from planish.calibrate.encode import encode
from planish.calibrate.records import DISK, Record, RecordFiles
from planish.calibrate.stream import Stream
from planish.calibrate.text import fingerprint
from planish.core import Frontier, Solver, Unit
from planish.folder.safetensors import HEADER_LIMIT, hash_file
from planish.folder.source import FolderSource, Source
from planish.stats import Stats, Tap
from planish.version import __version__

FORMAT = 1
LONG = 1 << 18  # characters: ids of longer texts are kept
WHOLE = 1 << 30  # checkpoints up to this many bytes are hashed whole


class Cache:
    """Records (named groups of tensors) of one fingerprint: up to `memory` bytes in memory, and in files of a folder if given.

    The files of other fingerprints make room for new ones, the longest unused first; those of this one never do.
    """

    def __init__(self, folder: Path | None = None, memory: int = 0, disk: int = DISK):
        several = lanes.count() > 1  # several writers; every process would have to find the same
        self.files, self.memory = RecordFiles(None if several else folder, disk), 0 if several else memory
        self.in_memory: dict[str, Record] = {}
        self.frontiers: dict[tuple[str, Solver, Unit], Frontier] = {}
        self.others: dict[str, Cache] = {}

    def sibling(self, stream: Stream) -> Cache:
        """The cache of the same kind for other windows or products, always the same one for the same; it takes half of the
        memory left."""
        key = f"{fingerprint(torch.cat(stream.batches))} {stream.products}"
        if key not in self.others:
            self.memory //= 2
            on_disk = open_cache(stream, self.memory) if self.files.folder else None
            self.others[key] = on_disk or Cache(memory=self.memory)
            self.files.join(self.others[key].files)
        return self.others[key]

    @property
    def keeps(self) -> bool:
        """Whether what is measured now is there for the next run."""
        return self.files.folder is not None or self.memory > 0

    def has(self, records: Iterable[str]) -> bool:
        """Whether all of these can be had; files are checked here, once."""
        return all(r in self.in_memory or self.files.check(r) for r in records)

    def get(self, record: str) -> Record:
        """A record that `has` said is there; not to be changed."""
        if record in self.in_memory:
            return self.in_memory[record]
        found = self.files.read(record)
        self._put({record: found})
        return found

    def keep(self, records: dict[str, Record]) -> None:
        new = {name: r for name, r in records.items() if name not in self.in_memory and name not in self.files.found}
        self._put(new)
        self.files.write(new)

    def _put(self, records: dict[str, Record]) -> None:
        for name, record in records.items():
            size = measure(record)
            if size <= self.memory and all(t.nbytes < stats.WIDE for t in record.values()):  # those are used up
                self.in_memory[name] = record
                self.memory -= size

    def missing(self, origin: str, i: int, taps: Iterable[Tap]) -> list[Tap]:
        """Those of block i's taps that have not been measured in a pass called `origin`."""
        return [t for t in taps if not self.has([name_tap(origin, i, t)])]

    def stats(self, origin: str, i: int, taps: Iterable[Tap]) -> Stats:
        """What is known of these taps."""
        found = Stats()
        for tap in sorted(set(taps)):
            if self.has([name := name_tap(origin, i, tap)]):
                record = dict(self.get(name))
                found.tokens[tap] = int(record.pop("tokens"))
                found.sums[tap] = record
        return found

    def keep_stats(self, origin: str, i: int, measured: Stats) -> None:
        records = {}
        for tap, sums in measured.sums.items():
            here = all(t.device.type == "cpu" for t in sums.values())  # elsewhere reading back would move them
            if here and tap.kind != "rows":
                tokens = torch.tensor(measured.tokens[tap])
                records[name_tap(origin, i, tap)] = {"tokens": tokens, **{n: t.contiguous() for n, t in sums.items()}}
        self.keep(records)

    def losses(self, origin: str, solver: Solver, unit: Unit) -> Frontier | None:
        """A unit's frontier without factors."""
        name = name_frontier(origin, solver, unit)
        if not name or not self.has([name]):
            return None
        record = self.get(name)
        return Frontier(unit, record["loss"], {}, bool(record["nats"]), float(record["rough"]), record.get("by_tokens"))

    def keep_losses(self, origin: str, found: Iterable[tuple[Solver, Frontier]]) -> None:
        records = {}
        for solver, f in found:
            name = name_frontier(origin, solver, f.unit)
            if name and isinstance(f.loss, Tensor) and f.loss.device.type == "cpu":
                records[name] = {"loss": f.loss.detach().clone(), "nats": torch.tensor(f.nats)}
                records[name]["rough"] = torch.tensor(f.rough, dtype=torch.float64)
                records[name] |= {} if f.by_tokens is None else {"by_tokens": f.by_tokens.detach().clone()}
        self.keep(records)

    def has_frontier(self, origin: str, solver: Solver, unit: Unit) -> bool:
        """Whether a unit's frontier is in memory, with its factors."""
        return bool(self.frontiers) and (origin, solver, unit) in self.frontiers

    def frontier(self, origin: str, solver: Solver, unit: Unit, make: Callable[[], Frontier]) -> Frontier:
        """A unit's frontier with its factors: from memory, or made by `make` and then put there if it fits."""
        if self.has_frontier(origin, solver, unit):
            return self.frontiers[origin, solver, unit]
        made = make()
        size = measure(made) if self.memory and origin else 0
        if 0 < size <= self.memory:
            self.frontiers[origin, solver, unit] = made
            self.memory -= size
        return made


def name_tap(origin: str, i: int, tap: Tap) -> str:
    return "|".join(map(str, (origin, i, tap.site, tap.kind, tap.other, tap.heads, tap.part)))


def name_frontier(origin: str, solver: Solver, unit: Unit) -> str:
    """Empty for a solver that plain values do not describe."""
    return f"{origin}|{describe(solver)}|{unit}" if origin and describe(solver) else ""


def describe(value: Any) -> str:
    """A text that tells solvers with other settings apart; empty where there is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple):
        parts = [describe(v) for v in value]
        return f"({','.join(parts)})" if all(parts) else ""
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: describe(getattr(value, f.name)) for f in fields(value)}
        inner = ",".join(f"{n}={s}" for n, s in settings.items())
        return f"{type(value).__name__}({inner})" if all(settings.values()) else ""
    return f"{type(value).__name__}()" if isinstance(value, Solver) and not vars(value) else ""


def measure(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors that an object holds."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        first = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if first else 0
    if isinstance(value, dict):
        return sum(measure(v, seen) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(measure(v, seen) for v in value)
    return sum(measure(v, seen) for v in vars(value).values()) if hasattr(value, "__dict__") else 0


# ---------------------------------------------------------------- fingerprints


def open_cache(calibrated: Stream, memory: int = 0) -> Cache | None:
    """The cache on disk for this model, text and arithmetic; None for a model in memory, which has no fingerprint."""
    source = calibrated.source
    if not isinstance(source, FolderSource) or not calibrated.batches:
        return None
    parts = {
        "format": FORMAT,
        "planish": __version__,
        "code": hash_code(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "arithmetic": [
            str(calibrated.device),
            str(calibrated.dtype),
            str(calibrated.products),
            torch.get_num_threads(),
        ],
        "processor": torch.backends.cpu.get_cpu_capability(),
        "attention": getattr(calibrated.model.config, "_attn_implementation", None),
        "windows": fingerprint(torch.cat(calibrated.batches)),
        "source": hash_source(source),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Cache(find_root() / key[:32], memory)


def tokenize(tokenizer: Any, documents: Sequence[Document], apart: bool = False) -> np.ndarray:
    """`planish.calibrate.encode.encode`, with the ids of long texts kept on disk for the next command."""
    plain = [d for d in documents if isinstance(d, str)]  # other ids depend on the template too
    long = len(plain) == len(documents) and sum(map(len, plain)) >= LONG
    known = hash_tokenizer(tokenizer) if long else None
    if known is None:
        return encode(tokenizer, documents, apart)
    key = hashlib.sha256(json.dumps([FORMAT, known, apart, *plain]).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the statistics' cache says as well
        cache = Cache(find_root() / key.hexdigest()[:32])
        if cache.has(["tokens"]):
            return cache.get("tokens")["ids"].numpy().astype(np.int64)
        ids = encode(tokenizer, documents, apart)
        cache.keep({"tokens": {"ids": torch.from_numpy(ids.astype(np.int32))}})
    return ids


def hash_tokenizer(tokenizer: Any) -> str | None:
    """Of everything that decides which ids a text gets; None where code that is not transformers' decides it."""
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers.") or not getattr(tokenizer, "is_fast", False):
        return None
    parts = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "kind": f"{kind.__module__}.{kind.__qualname__}",
        "split": getattr(tokenizer, "split_special_tokens", False),
        "special": [getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos")],
        "versions": [version("transformers"), version("tokenizers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_root() -> Path:
    """$PLANISH_CACHE, or planish in the user's cache folder."""
    named = os.environ.get("PLANISH_CACHE")
    return (
        Path(named).expanduser()
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "planish"
    )


@functools.cache
def hash_code() -> str:
    """Of all files of planish: whichever of them decide what is measured and predicted, they are among these."""
    here = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(here.rglob("*.py")))).hexdigest()


def hash_source(source: Source) -> str:
    """Of a checkpoint's configuration and weights: whole files up to a limit; of larger ones name, size, time of change,
    header and a sample of every sixteenth mebibyte."""
    assert isinstance(source, FolderSource)
    config = source.folder / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    paths = source.reader.paths
    whole = sum(p.stat().st_size for p in paths) <= WHOLE
    for path in paths:
        if whole:
            digest.update(hash_file(path).encode())
            continue
        status = path.resolve().stat()
        digest.update(json.dumps([path.name, status.st_size, status.st_mtime_ns]).encode())
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT)))
            for at in range(0, status.st_size, 16 << 20):
                file.seek(at)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
