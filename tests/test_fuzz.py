"""Broken and hostile input: one clear error or a right result; never a traceback, never a write outside the output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from planish.calibrate.text import load_tokens
from planish.compression import resume
from planish.errors import InputError
from planish.evaluate.report.page import write_report
from planish.evaluate.report.points import Point, write_points
from planish.folder.load import load
from planish.folder.safetensors import Shard, write_shard
from planish.folder.source import open_source
from test_resume import hashes
from tiny import compress

WINDOWS = torch.randint(0, 90, (8, 16), generator=torch.Generator().manual_seed(0))
EXAMPLES = int(os.environ.get("PLANISH_FUZZ", "20"))  # per test
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63, -1, 10**30])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(tiny.save(tiny.build(tiny.NAMES[0]), tmp_path_factory.mktemp("fuzz") / "model"))


@pytest.fixture(scope="module")
def compressed(model) -> Path:
    out = model.parent / "compressed"
    compress(model, output=out, keep=0.6, method="flat-llm", windows=WINDOWS)
    return out


@pytest.fixture(scope="module")
def unfinished(model) -> Path:
    def stop(phase, done, total):
        if phase == "blocks" and done:
            raise KeyboardInterrupt

    out = model.parent / "stopped"
    with pytest.raises(KeyboardInterrupt):
        compress(model, output=out, keep=0.7, method="svd-llm", windows=WINDOWS, progress=stop)
    compress(model, output=model.parent / "whole", keep=0.7, method="svd-llm", windows=WINDOWS)
    return model.parent / "stopped.partial"


def read_all(folder: Path) -> None:
    source = open_source(folder)
    source.skeleton()
    source.outside()
    for i in range(source.n_blocks):
        source.block(i)


def survives(call) -> bool:
    """True for a result, False for one clear line; anything else is a failure."""
    try:
        call()
    except InputError as error:
        return len(str(error)) < 10
    return True


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8", "I64"]),
        "shape": st.lists(st.integers(-1, 2**50), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**50) | st.integers(0, 64), max_size=3),
    }
)
HOSTILE = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x\0.safetensors", "~.safetensors"]


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=6), VALUES | ENTRIES, max_size=4),
    size=st.integers(0, 64),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header(header, size, length, tmp_path):
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + b"\0" * size)

    def read():
        shard = Shard(path)
        assert sum(e.size for e in shard.entries.values()) == size
        for name, entry in shard.entries.items():
            assert shard.read(name).shape == entry.shape

    survives(read)


@fuzz
@given(data=st.data())
def test_damaged_shard(model, tmp_path, data):
    """Any byte changed, any length: read as it was (data), refused, or never loaded as another shape."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        assert not survives(lambda: read_all(folder))
        return
    at = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    survives(lambda: read_all(folder))


@fuzz
@given(kind=st.sampled_from(["I32", "F16", "BF16", "I64", "F64", "U8", "BOOL", "F8_E4M3", "", "f32"]), data=st.data())
def test_any_dtype(model, tmp_path, kind, data):
    """Another dtype in a header: other bytes than the shape needs, or no floating-point numbers. Refused."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    name = data.draw(st.sampled_from(sorted(k for k in header if k != "__metadata__")))
    header[name]["dtype"] = kind
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
    assert not survives(lambda: read_all(folder))


@pytest.mark.parametrize("pair", [("a", "b"), ("b", "a")])
def test_overlapping_tensors_and_gaps(pair, tmp_path):
    path = tmp_path / "x.safetensors"
    write_shard(path, {"a": torch.zeros(4), "b": torch.ones(4)})
    for start in (4, 20):
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        header[pair[0]]["data_offsets"] = [start, start + 16]
        text = json.dumps(header).encode()
        (tmp_path / "y.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :] + b"\0" * 4)
        with pytest.raises(InputError, match=r"overlaps|gap|expected"):
            Shard(tmp_path / "y.safetensors")


@fuzz
@given(data=st.data())
def test_any_config(model, tmp_path, data):
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    survives(lambda: read_all(folder))


@fuzz
@given(data=st.data())
def test_any_layout_of_a_compressed_folder(compressed, tmp_path, data):
    """Anything in place of a part of config.json's "planish" entry: the load fails in one line, or loads these weights."""
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(compressed, folder)
    config = json.loads((compressed / "config.json").read_text())
    parent, key = config, "planish"
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        key = data.draw(st.sampled_from(range(len(parent)) if isinstance(parent, list) else sorted(parent)))
    parent[key] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    survives(lambda: load(folder))


def replace_part(value, data):
    """Something else in place of some part of a JSON value."""
    parent, key = {"": value}, ""
    while isinstance(parent[key], dict | list) and parent[key] and (parent[key] is value or data.draw(st.booleans())):
        parent = parent[key]
        key = data.draw(st.sampled_from(range(len(parent)) if isinstance(parent, list) else sorted(parent)))
    parent[key] = data.draw(VALUES)


@fuzz
@given(data=st.data())
def test_any_manifest(compressed, tmp_path, data):
    """planish.json: read by `report`, and by `resume` where a run was stopped after the last rename."""
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(compressed, folder)
    manifest = json.loads((compressed / "planish.json").read_text())
    replace_part(manifest, data)
    (folder / "planish.json").write_text(json.dumps(manifest))
    (folder / "resume").mkdir()
    survives(lambda: write_report(folder, tmp_path / "report.html"))
    survives(lambda: resume(folder))
    shutil.rmtree(folder / "resume", ignore_errors=True)
    assert {p.name for p in tmp_path.iterdir()} <= {"m", "report.html"}


@fuzz
@given(data=st.data())
def test_any_sweep(compressed, tmp_path, data):
    """results.csv and sweep.json, read by `report`."""
    folder = tmp_path / "s"
    (folder / "points" / "a").mkdir(parents=True, exist_ok=True)
    shutil.copy(compressed / "planish.json", folder / "points" / "a")
    points = [
        Point("dense", "dense", keep=1.0, perplexity=9.0),
        Point("a", "flat-llm", "{}", 0.6, 0.6, 10, 10, 4, perplexity=12.0),
    ]
    write_points(folder, points)
    rows = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
    row = data.draw(st.integers(0, len(rows) - 1))
    rows[row][data.draw(st.integers(0, len(rows[row]) - 1))] = json.dumps(data.draw(VALUES))
    (folder / "results.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    (folder / "sweep.json").write_text(
        json.dumps(data.draw(VALUES | st.just({"model": "x", "calibration": {}, "evaluation": {}})))
    )
    survives(lambda: write_report(folder, tmp_path / "report.html"))
    assert {p.name for p in tmp_path.iterdir()} <= {"s", "report.html"}


@fuzz
@given(
    content=st.binary(max_size=60) | st.text(max_size=30).map(str.encode),
    end=st.sampled_from([".npy", ".jsonl", ".parquet"]),
)
def test_any_text_file(tmp_path, content, end):
    path = tmp_path / f"text{end}"
    path.write_bytes((b"\x93NUMPY\x01\x00" if end == ".npy" and content[:1] > b"a" else b"") + content)
    survives(lambda: load_tokens(str(path), vocab_size=90))


@fuzz
@given(name=st.text(max_size=12) | st.sampled_from(HOSTILE))
def test_any_shard_name(model, tmp_path, name):
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", folder)
    write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError):
        open_source(folder)


@fuzz
@given(index=VALUES | st.fixed_dictionaries({"weight_map": VALUES}))
def test_any_index(model, tmp_path, index):
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError):
        open_source(folder)


def test_links_out_of_the_folder(model, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(InputError, match="outside the model's folder"):
        compress(folder, output=tmp_path / "out", keep=0.7, method="svd-llm", windows=WINDOWS)
    shard = next(folder.glob("*.safetensors"))
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="outside the model's folder"):
        open_source(folder)


def test_output_that_is_a_link(model, tmp_path):
    """Neither the output nor its unfinished form may lead elsewhere."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("x")
    for name in ("out", "out.partial"):
        (tmp_path / name).symlink_to(tmp_path / "target")
        with pytest.raises(InputError, match="link"):
            compress(model, output=tmp_path / "out", keep=0.7, method="svd-llm", windows=WINDOWS, overwrite=True)
        (tmp_path / name).unlink()
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["precious"]


@fuzz
@given(data=st.data())
def test_any_journal(model, unfinished, tmp_path, data):
    """A request or journal that is not what was written: refused, or the right result."""
    out = tmp_path / "out"
    for path in (out, tmp_path / "out.partial"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(unfinished, tmp_path / "out.partial")
    name = data.draw(st.sampled_from(["request.json", "journal.jsonl"]))
    path = tmp_path / "out.partial" / "resume" / name
    value = json.loads(path.read_text())
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(VALUES)
    path.write_text(json.dumps(value) + "\n")
    before = {p.name for p in tmp_path.iterdir()}
    if survives(lambda: resume(out)):
        assert hashes(out) == hashes(unfinished.parent / "whole")
    assert {p.name for p in tmp_path.iterdir()} <= before | {"out"}


WORDS = [
    "0.8",
    "nan",
    "inf",
    "-1",
    "0",
    "1e-9",
    "",
    "x",
    "../y",
    "a=b",
    "=",
    "damping=x",
    "flat-llm",
    "2",
    "9" * 20,
    "☃",
]
OPTIONS = ["keep", "kv-keep", "method", "calibration", "n-samples", "seq-len", "seed", "sampling", "round-to", "set"]
OPTIONS += ["device", "dtype", "target", "flops-keep", "max-params", "max-bytes", "context"]


@fuzz
@given(
    command=st.sampled_from(["compress", "plan"]),
    pairs=st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(WORDS)), min_size=1, max_size=3),
)
def test_any_command_line(model, tmp_path, monkeypatch, capsys, command, pairs):
    from typer.main import get_command

    from planish.cli import app

    monkeypatch.chdir(tmp_path)
    line = [command, str(model), "--calibration", str(model / "none.npy")]
    line += ["-o", str(tmp_path / "out")] if command == "compress" else ["--measure"]
    before = sorted(tmp_path.iterdir())
    code = get_command(app).main(
        [*line, *(word for option, value in pairs for word in (f"--{option}", value))], standalone_mode=False
    )
    errors = capsys.readouterr().err
    assert code == 2 and "Traceback" not in errors and "bug in planish" not in errors, (pairs, errors)
    assert sorted(tmp_path.iterdir()) == before
