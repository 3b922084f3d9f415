"""Whether a GGUF file holds another one's tensors, but for the rounding of its types.

Logits do not tell: where llama.cpp rounds weights and activations to few bits, single ones of a real model that is written without
a fault differ by a third of the largest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FEWEST = 1e-3  # of a tensor's root mean square: what a type with as many bits as there are may lose


def measure_rounding(file: Path, exact: Path) -> tuple[float, str]:
    """(Error, name) of the worst tensor of `file` beside the one of its name in `exact`, a file of the same model in fp32.

    An error is the root mean square of the difference over what rounding may make of it: 4 · 2^−b of the tensor's own for a type
    of b bits per weight, twice what types of 2 to 8 bits lose of normal numbers; above 1 no type explains it. Another tensor, or
    one whose rows are in another order, differs by 1.4 of its root mean square. Infinite where one is not there.
    """
    from gguf import GGML_QUANT_SIZES, GGUFReader
    from gguf.quants import dequantize

    own, other = ({t.name: t for t in GGUFReader(path).tensors} for path in (file, exact))
    if missing := sorted(own.keys() ^ other.keys()):
        return float("inf"), missing[0]
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
