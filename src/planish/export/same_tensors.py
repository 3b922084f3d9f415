"""Whether a GGUF file holds another one's model, but for the rounding of its tensors' types.

Logits do not tell: where llama.cpp rounds weights and activations to few bits, single ones of a real model that is written without
a fault differ by a third of the largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FEWEST = 1e-3  # of a tensor's root mean square: what a type with as many bits as there are may lose


def measure_rounding(file: Path, exact: Path) -> tuple[float, str]:
    """(Error, name) of the worst tensor of `file` beside the one of its name in `exact`, a file of the same model in fp32.

    An error is the root mean square of the difference over what rounding may make of it: 4 · 2^−b of the tensor's own for a type
    of b bits per weight, twice what types of 2 to 8 bits lose of normal numbers; above 1 no type explains it. Another tensor, or
    one whose rows are in another order, differs by 1.4 of its root mean square. Infinite where one is not there, or what the
    files say of the architecture (widths, rotary bases, norms' ε) is not the same.
    """
    from gguf import GGML_QUANT_SIZES, GGUFReader
    from gguf.quants import dequantize

    readers = [GGUFReader(path) for path in (file, exact)]
    own, other = ({t.name: t for t in reader.tensors} for reader in readers)
    if unlike := find_unlike(*readers) or sorted(own.keys() ^ other.keys()):
        return float("inf"), unlike[0]
    found = [(0.0, "")]
    for name, tensor in own.items():
        numbers, size = GGML_QUANT_SIZES[tensor.tensor_type]
        want = dequantize(other[name].data, other[name].tensor_type).astype(np.float64).ravel()
        got = dequantize(tensor.data, tensor.tensor_type).astype(np.float64).ravel()
        if got.shape != want.shape or not np.isfinite(got).all():
            return float("inf"), name
        scale = float(np.sqrt(np.square(want).mean())) or 1.0
        may = max(min(4 * 2.0 ** (-8 * size / numbers), 1.0), FEWEST)
        found.append((float(np.sqrt(np.square(got - want).mean())) / scale / may, name))
    return max(found)


def find_unlike(*readers: Any) -> list[str]:
    """What two files say differently of the architecture and its numbers."""
    told = []
    for reader in readers:
        kind = reader.get_field("general.architecture").contents()
        fields = {n: f.contents() for n, f in reader.fields.items() if n.startswith(f"{kind}.")}
        told.append({"general.architecture": kind} | fields)
    own, other = told
    return sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
