"""What commands print: help, durations, lines that can be copied."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from planish.calibrate.text import Text
from planish.cli.methods import reflow
from planish.cli.run import format_seconds
from planish.compression import Calibration
from planish.folder.source import open_source
from planish.request import Request
from planish.sweep import Runner
from planish.version import __version__


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (119.7, "2 min 0 s"), (166.58, "2 min 47 s"),
     (3599.4, "59 min 59 s"), (3599.6, "1.0 h"), (9000, "2.5 h")],
)  # fmt: skip
def test_durations(seconds, said):
    assert format_seconds(seconds) == said


def test_version(run):
    done = run("--version")
    assert done.exit_code == 0 and done.stdout == f"planish {__version__}\n"


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "sweep", "bench", "report", "verify"])
def test_help_shows_the_defaults(command, run):
    words = " ".join(run(command, "--help", env={"COLUMNS": "200"}).stdout.replace("│", " ").split())
    expected = {
        "eval": ("[default: (all)]", "2048, or"), "bench": ("1 and 8",), "report": ("OUT/report.html",),
        "verify": ("export one now",), "sweep": ("(128)", "(all)"),
    }  # fmt: skip
    for word in expected.get(command, ("(auto)", "(128)", "2048, or", "random; contiguous", "float32 on a CPU")):
        assert word in words, word


def test_paragraphs_of_a_method_are_not_broken_twice(run):
    assert reflow("One\nline.\n\nTwo\n   lines.") == "One line.\n\nTwo lines."
    done = run("methods", "asvd")
    assert "for every linear and each of the keeps 0.9 … 0.4 the loss with" in done.stdout


def test_paths_are_printed_as_they_are(run, tmp_path):
    """Brackets are no markup, spaces are quoted, and no line is broken where nothing shows it."""
    folder = tmp_path / "a [bold]model[/bold] with quite a long name, so long that eighty columns do not hold it"
    tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), folder)
    ids = tmp_path / "i[0].npy"
    np.save(ids, tiny.windows(40, 24).flatten().numpy())
    out = tmp_path / "out [/x]"
    done = run("compress", folder, "--method", "svd", "--calibration", ids, "-o", out)
    assert done.exit_code == 0, done.output
    assert f"· {out} (loads after" in done.stdout and f"planish eval '{out}' --text SOURCE\n" in done.stdout
    done = run("eval", out, "--text", ids, "--max-windows", "2")
    assert done.exit_code == 0 and f" · {ids} (no BOS)" in done.stdout
    assert str(out / "report.html") in run("report", out).stdout


def test_papers_are_listed_from_the_checkout(run):
    names = json.loads(run("reproduce", "--json").stdout)["recipes"]
    files = Path(__file__).resolve().parent.parent / "recipes" / "papers"
    assert sorted(names) == sorted(p.stem for p in files.glob("*.yaml"))


def test_wheel_holds_data_and_recipes(tmp_path):
    """What a checkout has beside the code is there after installation: demo model, page style, recipes."""
    pytest.importorskip("hatchling")
    root = Path(__file__).resolve().parent.parent
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=root, check=True
    )
    from zipfile import ZipFile

    names = set(ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    data = [p for p in (root / "src" / "planish").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {str(p.relative_to(root / "src")) for p in data} <= names
    assert {f"planish/recipes/papers/{p.name}" for p in (root / "recipes" / "papers").iterdir()} <= names


def test_demo_says_what_the_dense_cache_holds(tmp_path):
    """Also where no method had time to run."""
    folder = tiny.save(tiny.build("llama_gqa"), tmp_path / "model")
    windows = tiny.windows(2, 16)
    asked = Request(model=str(folder), device="cpu")
    runner = Runner(
        open_source(folder),
        Calibration(windows),
        Text(windows.flatten(), "ids", bos=False, is_ids=True),
        asked,
        tmp_path,
    )
    assert runner.cache_bytes() == 3 * 2 * 2 * 8 * 4  # blocks, K and V, heads, width, fp32


def test_readme_repeats_the_tables():
    """Figures in the README are those of docs/tables, which commands write (`test_real.py`: those of the table)."""
    root = Path(__file__).resolve().parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    speed, memory = ((root / "docs" / "tables" / f"{n}.md").read_text(encoding="utf-8") for n in ("speed", "memory"))
    times = re.search(r"solves ([\d.]+) × faster", readme).group(1)
    assert re.search(rf"^\| all \|.*\| {re.escape(times)}× \|", speed, re.M), (
        "the solve's speed-up is another in speed.md"
    )
    said = re.search(r"([\d.]+) GB of weights in (\d+) blocks peaked at ([\d.]+) GB resident, (\d+) %", readme).groups()
    row = re.search(
        r"\| [^|]+ \| (\d+) \| ([\d.]+) GB \| [^|]+ \| \d+ \| [\d.]+ GB \| ([\d.]+) GB \| \*\*([\d.]+)%", memory
    )
    blocks, size, peak, share = row.groups()
    assert (f"{float(size):.1f}", blocks, peak, f"{float(share):.0f}") == said
