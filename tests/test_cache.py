"""Cached statistics change nothing but the time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import planish
import tiny
from planish import api
from planish.calibrate import measure
from planish.calibrate.cache import LONG, Cache, open_cache, tokenize
from planish.calibrate.encode import encode
from planish.calibrate.stream import Stream, read_weights
from planish.calibrate.text import load_tokens
from planish.folder.source import open_source
from planish.methods import find_method
from planish.plan import scores
from planish.plan.frontiers import measure_frontiers
from planish.walks import solve
from posed import pose_on
from test_text import byte_tokenizer
from tiny import compress

WINDOWS = tiny.windows(12, 24)
DENSE = [("svd-llm", {}), ("svd-llm", {"allocation": "v2"}), ("a3", {}), ("auto", {"anchor": "0"})]
OTHERS = [("flat-llm", {}), ("llm-drop", {})]
SLOW = [("auto", {}), ("asvd", {}), ("mpifa", {}), ("erc-svd", {}), ("subfit", {})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    tiny.build("llama_gqa").save_pretrained(path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(folder: Path, output: Path, method: str, settings: dict, keep: float = 0.8, **more) -> str:
    """SHA-256 of everything that was written but the manifest."""
    compress(
        folder, output=output, keep=keep, method=method, settings=settings, windows=WINDOWS, overwrite=True, **more
    )
    files = [p for p in sorted(output.iterdir()) if p.suffix in (".safetensors",) or p.name == "config.json"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Names of the passes over the model that were run, as they are run."""
    seen: list[str] = []
    for where, name in (
        (measure, "sweep_forward"), (measure, "sweep_back"), (Stream, "start"), (solve, "measure_block"),
    ):  # fmt: skip
        old = getattr(where, name)

        def spy(*args, _name=name, _old=old, **kwargs):
            seen.append(_name)
            return _old(*args, **kwargs)

        monkeypatch.setattr(where, name, spy)
    return seen


@pytest.mark.parametrize(
    ("method", "settings"), DENSE + OTHERS + [pytest.param(*s, marks=pytest.mark.slow) for s in SLOW], ids=str
)
def test_cached_and_uncached_runs_are_bit_identical(folder, root, tmp_path, method, settings):
    plain = run(folder, tmp_path / "out", method, settings, 0.75)
    disk = [run(folder, tmp_path / "out", method, settings, keep, cache=True) for keep in (0.9, 0.75)]
    shared = Cache(memory=1 << 30)
    stream = Stream(open_source(folder), WINDOWS)
    memory = [
        run(folder, tmp_path / "out", method, settings, keep, cache=shared, stream=stream) for keep in (0.9, 0.75)
    ]
    assert disk[1] == memory[1] == plain
    assert disk[0] == memory[0] != plain


@pytest.mark.parametrize(("method", "settings"), DENSE, ids=str)
def test_a_second_budget_runs_no_calibration_text(folder, root, tmp_path, passes, method, settings):
    run(folder, tmp_path / "out", method, settings, 0.9, cache=True)
    assert "start" in passes
    passes.clear()
    run(folder, tmp_path / "out", method, settings, 0.7, cache=True)
    assert passes == []


def test_what_a_plan_measured_is_not_measured_again(folder, root, passes):
    more = {"keep": 0.8, "calibration": WINDOWS.flatten(), "n_samples": 12, "seq_len": 24, "settings": {"anchor": "0"}}
    alone = planish.forecast(folder, measure=True, **more)
    assert "start" in passes and not root.exists()
    kept = planish.forecast(folder, measure=True, cache=True, **more)
    passes.clear()
    again = planish.forecast(folder, measure=True, cache=True, **more)
    planish.compress(folder, output=root.parent / "out", cache=True, **more)
    assert passes == []
    assert alone.predicted == kept.predicted == again.predicted
    assert "plan" in {p["name"] for p in alone.phases} and "plan" not in {p["name"] for p in again.phases}


def test_methods_that_share_taps_share_measurements(folder, tmp_path):
    """Whatever one method left in memory must not change another's result, nor be changed by it."""
    shared, stream = Cache(memory=1 << 30), Stream(open_source(folder), WINDOWS)
    for method, settings in [("svd-llm", {}), ("a3", {}), ("flat-llm", {})]:
        alone = run(folder, tmp_path / "out", method, settings)
        sums = {n: {p: t.clone() for p, t in r.items()} for n, r in shared.in_memory.items()}
        assert run(folder, tmp_path / "out", method, settings, cache=shared, stream=stream) == alone, method
        for name, record in sums.items():
            assert all(torch.equal(t, shared.in_memory[name][p]) for p, t in record.items()), f"{method} changed {name}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "a bit flipped": flip,
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "empty": lambda p: p.write_bytes(b""),
    "not a tensor file": lambda p: p.write_bytes(b"pickle" * 50),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_measured_again(folder, root, tmp_path, damage):
    plain = run(folder, tmp_path / "out", "svd-llm", {})
    run(folder, tmp_path / "out", "svd-llm", {}, cache=True)
    files = sorted(root.rglob("*.safetensors"))
    assert files
    for path in files:
        DAMAGE[damage](path)
    assert run(folder, tmp_path / "out", "svd-llm", {}, cache=True) == plain
    assert run(folder, tmp_path / "out", "svd-llm", {}, cache=True) == plain


def test_another_model_or_text_is_another_fingerprint(folder, root, tmp_path):
    def key(path: Path, windows=WINDOWS, **more) -> str:
        cache = open_cache(Stream(open_source(path), windows, **more))
        assert cache is not None and cache.files.folder is not None
        return cache.files.folder.name

    other = tiny.build("llama_gqa")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 4] += 2.0**-10  # one weight; file names and sizes stay
    other.save_pretrained(tmp_path / "other")
    settled = tiny.build("llama_gqa")
    settled.config.rms_norm_eps *= 2
    settled.save_pretrained(tmp_path / "settled")
    windows = WINDOWS.clone()
    windows[3, 5] = (windows[3, 5] + 1) % tiny.VOCABULARY
    keys = [
        key(folder), key(tmp_path / "other"), key(tmp_path / "settled"), key(folder, windows),
        key(folder, WINDOWS.reshape(-1, 12)), key(folder, dtype=torch.float64),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(folder) == keys[0]


def test_a_model_in_memory_is_not_kept_on_disk(root, tmp_path):
    run(tiny.build("llama_gqa"), tmp_path / "out", "svd-llm", {}, cache=True)
    assert not root.exists()


def test_older_fingerprints_make_room_and_the_own_one_never_does(tmp_path):
    def record(n: int) -> dict:
        return {f"r{n}": {"x": torch.full((1000,), float(n))}}

    for n in range(3):
        cache = Cache(tmp_path / f"key{n}", disk=10_000)
        cache.keep(record(n))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["key1", "key2"]
    cache.keep(record(3))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["key2"]
    cache.keep(record(4))  # no room: kept nowhere
    assert cache.has(["r2", "r3"]) and not cache.has(["r4"])
    again = Cache(tmp_path / "key2", disk=10_000)
    assert again.has(["r3"]) and torch.equal(again.get("r3")["x"], record(3)["r3"]["x"])


def test_caches_beside_one_another_leave_each_other_alone(tmp_path):
    def record(n: int) -> dict:
        return {f"r{n}": {"x": torch.full((1000,), float(n))}}

    one, two = Cache(tmp_path / "one", disk=10_000), Cache(tmp_path / "two", disk=10_000)
    one.files.join(two.files)
    for n, cache in enumerate([one, two, two, one]):  # the last two find no room
        cache.keep(record(n))
    assert one.has(["r0"]) and two.has(["r1"]) and not two.has(["r2"]) and not one.has(["r3"])
    assert torch.equal(one.get("r0")["x"], record(0)["r0"]["x"])
    for path in (tmp_path / "one").iterdir():
        path.unlink()  # by another command
    assert not one.has(["r0"])


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "file" / "below"))
    plain = run(folder, tmp_path / "out", "svd-llm", {})
    assert run(folder, tmp_path / "out", "svd-llm", {}, cache=True) == plain


def test_statistics_of_an_edited_model_are_never_kept(folder):
    cache = Cache(memory=1 << 30)
    stream = Stream(open_source(folder), WINDOWS)
    job = pose_on(stream, find_method("svd-llm", {}), 0.5, cache=cache)
    plan = job.plan().ranks
    edits: dict = {}
    frontiers = measure_frontiers(job.problem, job.measure)
    assert frontiers and cache.in_memory
    kept = set(cache.in_memory)
    for i, shape in enumerate(job.problem.shapes):
        block = stream.block(i)
        taps = job.problem.taps(job.problem.block_units(i))
        stats = cache.stats("forward", i, taps)
        unit = job.problem.block_units(i)[0]
        frontier = job.problem.units[unit].decompose(unit, read_weights(block, stream), stats, shape)
        edits[i] = job.problem.units[unit].truncate(frontier, plan[unit], shape)
    taps = lambda shape: job.problem.taps(job.problem.block_units(shape.block))  # noqa: E731
    origins = [stats.origin for _, _, stats in job.measure.forward(taps, edits)]
    assert set(cache.in_memory) == kept
    assert origins == [""] * len(job.problem.shapes)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """Lengths of the texts that were tokenized, as they are tokenized."""
    from planish.calibrate import cache

    seen: list[int] = []

    def spy(tokenizer, documents, apart=False):
        seen.append(sum(map(len, documents)))
        return encode(tokenizer, documents, apart)

    monkeypatch.setattr(cache, "encode", spy)
    return seen


def test_long_texts_are_tokenized_once(root, tmp_path, encoded):
    path = tmp_path / "a.txt"
    path.write_text("né " * (LONG // 2), encoding="utf-8")
    plain = load_tokens(path, byte_tokenizer(with_bos=True))
    for again in range(2):
        found = load_tokens(path, byte_tokenizer(with_bos=True), tokenize=tokenize)
        assert torch.equal(found.tokens, plain.tokens) and found.tokens.dtype == torch.int64
        assert found.bos and found.source == plain.source and len(encoded) == 1, again
    assert not load_tokens(path, byte_tokenizer(), tokenize=tokenize).bos and len(encoded) == 2  # another tokenizer
    path.write_text("nè " * (LONG // 2), encoding="utf-8")
    changed = load_tokens(path, byte_tokenizer(with_bos=True), tokenize=tokenize).tokens  # the same path and size
    assert not torch.equal(changed, plain.tokens) and len(encoded) == 3
    for file in root.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"\1\0\0\0")
    assert torch.equal(load_tokens(path, byte_tokenizer(with_bos=True), tokenize=tokenize).tokens, changed)
    assert len(encoded) == 4


def test_short_texts_and_other_tokenizers_are_not_kept(root):
    class Own(type(byte_tokenizer())):
        pass

    tokenize(byte_tokenizer(), ["a" * (LONG - 1)])
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Own
    assert len(tokenize(tokenizer, ["a" * LONG])) == LONG
    assert not root.exists()


def test_seconds_count_the_text(root, tmp_path, encoded, monkeypatch):
    folder = tiny.save(tiny.build("llama_gqa", vocab_size=300), tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "a.txt").write_text("a b c " * (LONG // 5))
    clock = [0.0]

    def slow(source, *args, **more):
        clock[0] += 1000
        return load_tokens(source, *args, **more)

    monkeypatch.setattr(api, "load_tokens", slow)
    real = api.time.perf_counter
    monkeypatch.setattr(api.time, "perf_counter", lambda: real() + clock[0])
    options = {"method": "svd-llm", "calibration": tmp_path / "a.txt", "n_samples": 8, "seq_len": 16, "overwrite": True}
    for cached in (False, True, True):
        found = api.compress(folder, output=tmp_path / "out", cache=cached, **options)
        assert 1000 <= found.seconds["text"] < 1100 and found.seconds["text"] <= found.seconds["total"] < 1200
    assert len(encoded) == 1
    assert np.isclose(api.evaluate(folder, tmp_path / "a.txt", 16, max_windows=2, cache=True).perplexity,
                      api.evaluate(folder, tmp_path / "a.txt", 16, max_windows=2).perplexity, rtol=0)  # fmt: skip
    assert len(encoded) == 1


@pytest.mark.parametrize("on_disk", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_method_with_windows_of_its_own_shares_no_statistics_with_others(folder, root, tmp_path, on_disk):
    stream = Stream(open_source(folder), WINDOWS)
    shared = open_cache(stream, 1 << 30) if on_disk else Cache(memory=1 << 30)
    cases = [("svd-llm", {}), ("auto", {"shuffled": 0.5}), ("auto", {"shuffled": 0.25}), ("auto", {"shuffled": 0.5})]
    found = []
    for method, settings in cases:
        found.append(run(folder, tmp_path / "out", method, settings, cache=shared, stream=stream))
        assert found[-1] == run(folder, tmp_path / "out", method, settings), settings
    assert len(set(found)) == 3 and len(shared.others) == 2
    folders = [cache.files.folder for cache in (shared, *shared.others.values())]
    assert len(set(folders)) == (3 if on_disk else 1), "one each on disk, none else"


def test_measured_errors_of_pairs_are_kept(folder, root, tmp_path, monkeypatch):
    calls = []
    old = scores.cut_errors
    monkeypatch.setattr(scores, "cut_errors", lambda *args: calls.append(args[2]) or old(*args))
    settings = {"units": "structural"}
    run(folder, tmp_path / "out", "auto", settings, 0.9, cache=True)
    assert len(calls) == 1 and calls[0]
    cached = run(folder, tmp_path / "out", "auto", settings, 0.4, cache=True)
    assert len(calls) == 1
    assert cached == run(folder, tmp_path / "out", "auto", settings, 0.4)
    assert len(calls) == 2, "this plan drops pairs"


@pytest.mark.slow
def test_a_cache_given_without_a_stream_is_kept_apart_too(folder, tmp_path):
    shared = Cache(memory=1 << 30)
    for settings in ({"shuffled": 0.0}, {"shuffled": 0.5}, {"shuffled": 0.0}):
        with_it = run(folder, tmp_path / "out", "auto", settings, cache=shared)
        assert with_it == run(folder, tmp_path / "out", "auto", settings), settings
