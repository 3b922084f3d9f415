"""What every export reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Written:
    """A file or folder that an export wrote."""

    target: str
    output: str
    architecture: str
    dtype: str
    parameters: int  # written
    stored_parameters: int  # of the folder that was exported
    bytes: int
    tokenizer: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
