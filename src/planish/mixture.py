"""Several texts with weights, as one word of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from planish.errors import InputError


def split_mixture(source: str) -> dict[str, float]:
    """ "c4:0.5,code.jsonl:0.3" → {"c4": 0.5, "code.jsonl": 0.3}; any other SOURCE is a mixture of itself."""
    parts = [re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", p.strip()) for p in source.split(",")]
    if Path(source).exists() or not all(parts):
        return {source: 1.0}
    shares = [(p[1], float(p[2])) for p in parts if p]
    if len(dict(shares)) < len(shares) or min(w for _, w in shares) <= 0:
        raise InputError(f"mixture {source!r}: every source once, with a weight above 0")
    return dict(shares)


def join_mixture(shares: Mapping[str, float]) -> str:
    """What `split_mixture` reads."""
    return next(iter(shares)) if [*shares.values()] == [1.0] else ",".join(f"{s}:{w:g}" for s, w in shares.items())
