"""Results row by row in a .csv, so that a run that was stopped goes on."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def append_row(book: Path, fields: Sequence[str], row: Mapping[str, object]) -> None:
    """Add a row to a .csv file, which gets its head with the first one."""
    new = not book.exists()
    with book.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
