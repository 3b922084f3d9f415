"""Compressed folders for other stacks: one file per target.

`export(folder, to, output)` writes; `planish.export.verify` reloads there and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planish.errors import InputError
from planish.export.written import Written
from planish.folder.owner import owning

TARGETS = {
    "gguf": "one file for llama.cpp, ollama, LM Studio",
    "onnx": "one graph for ONNX Runtime, with the cache as inputs and outputs",
    "dense": "a folder without low-rank forms; --pad fills it up to the stock architecture",
    "mimo": "a MiMo-V2-Flash folder: fewer value dimensions without custom code",
    "deci": "a DeciLM (nemotron-nas) folder: MLP widths per block and removed submodules without planish",
}


@owning
def export(folder: str | Path, to: str, output: str | Path, **settings: Any) -> Written:
    """Write `folder` for the target `to` (a key of `TARGETS`); settings of its own exporter that are None are left out."""
    from planish.export.carriers import export_deci, export_mimo
    from planish.export.dense import export_dense
    from planish.export.gguf import export_gguf
    from planish.export.onnx import export_onnx

    exporters: dict[str, Any] = {
        "gguf": export_gguf, "onnx": export_onnx, "dense": export_dense, "mimo": export_mimo, "deci": export_deci,
    }  # fmt: skip
    if to not in exporters:
        raise InputError(f"unknown export target {to!r}; expected one of {', '.join(TARGETS)}")
    given = {k: v for k, v in settings.items() if v is not None}
    known = exporters[to].__kwdefaults__ or {}
    for name in given:
        if name not in known:
            raise InputError(f"export to {to} has no setting {name!r} (it has: {', '.join(known)})")
    return exporters[to](folder, output, **given)
