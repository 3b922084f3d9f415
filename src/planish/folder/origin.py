"""Where a source's tensors come from: their names in checkpoints, and what was changed while they were read."""

from __future__ import annotations

from typing import Any

from planish.folder.adapter import Adapter
from planish.folder.source import FolderSource, Source


def name_stored(source: Source, name: str) -> str:
    """What checkpoints call a tensor of the causal LM."""
    stored = source.family.store_name(name)
    return stored if source.tower is None else source.tower.store_name(stored)


def name_module(source: Source, name: str) -> str:
    """What a module of the causal LM is called in the whole model."""
    return name if source.tower is None else source.tower.wrapper.prefix + name.removeprefix("model.")


def find_origin(source: Source) -> dict[str, Any] | None:
    """What there is to say about how the model was stored, where it was dequantised; None where it was stored as it is."""
    return source.reader.weights.origin() if isinstance(source, FolderSource) else None


def find_adapter(source: Source) -> Adapter | None:
    """The adapter that is merged into the model as it is read."""
    return source.reader.adapter if isinstance(source, FolderSource) else None


def list_changes(source: Source) -> list[str]:
    """What of the stored model was changed or left out while it was read, a line each."""
    if not isinstance(source, FolderSource):
        return []
    lines, gone, adapter = [], source.reader.left_out, source.reader.adapter
    if gone:
        lines.append(
            f"{len(gone)} tensors of next-token prediction layers are left out, as transformers does ({gone[0]}, …)"
        )
    if adapter:
        name, merged, replaced = (adapter.record[n] for n in ("name", "merged", "replaced"))
        lines.append(f"The adapter {name} is merged into {merged} weights and takes the place of {replaced}.")
    return lines
