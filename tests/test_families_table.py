"""docs/families.md says of every family what `python benchmarks/families.py` found."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import tiny
from planish.modelling.families import FAMILIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = {"GGUF": 3, "ONNX": 4, "vLLM": 5}  # of the first table

SAID = {"ran": "yes", "refused": "refused", "failed": "fails", "not run": "not tried"}


def read_rows() -> list[list[str]]:
    """Cells of the rows of docs/families.md that begin with families."""
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    rows = [
        [c.strip() for c in line.split("|")] for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")
    ]
    return [r for r in rows if len(r) == 7 and {f.strip() for f in r[1].split(",")} <= set(FAMILIES)]


def read_found() -> dict[tuple[str, str], str]:
    """(Family, step) → outcome, as the last run had it."""
    with (DOCS / "tables" / "families.csv").open(newline="", encoding="utf-8") as file:
        return {(r["family"], r["step"]): r["outcome"] for r in csv.DictReader(file)}


def test_every_family_has_a_row():
    listed = [f.strip() for row in read_rows() for f in row[1].split(",")]
    assert len(listed) == len(set(listed)) and set(tiny.name_families()) <= set(listed) <= set(FAMILIES)


@pytest.mark.parametrize("step", COLUMNS)
def test_the_page_says_what_was_found(step):
    found = read_found()
    for row in read_rows():
        for family in row[1].split(","):
            outcome = found.get((family.strip(), step))
            if outcome is not None:
                said = re.sub(r"[^a-z ]", "", row[COLUMNS[step]])
                assert said == SAID.get(outcome), (family, step, outcome, said)


def test_what_compresses_also_generates_and_loads():
    """No family fails at a step that every one has to take."""
    steps = ("dense shapes", "any shapes", "KV budget", "generate", "save and load")
    failed = {at for at, outcome in read_found().items() if at[1] in steps and outcome == "failed"}
    assert not failed
