"""Integer grids: a scale and, for some types, a zero point per group of a row's weights; found, rounded to and packed.

A group's numbers are (code − zero) · scale, codes and zeros in [−2^(b−1), 2^(b−1) − 1], zero = 0 for symmetric types; the scale
is stored in 16 bits, and the product is rounded to the dtype in which a model computes: all errors here are of that product.
compressed-tensors packs the codes and reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError
from planish.rounding.types import StorageType

SHRINK = 12  # ranges that are tried for every group: from all of it down to
LEAST = 0.45  # of it


class Grid(NamedTuple):
    """Of a matrix (out, in): `scale` (out, groups) in the dtype it is stored in, `zero` (out, groups) codes."""

    scale: Tensor
    zero: Tensor


def limits(kind: StorageType) -> tuple[int, int]:
    return -(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales are stored in: 16 bits, those of the model where it has 16."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def multiply(codes: Tensor, zero: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(code − zero) · scale in `dtype`."""
    return (codes - zero).to(dtype) * scale.to(dtype)


def nearest(w: Tensor, zero: Tensor, scale: Tensor, kind: StorageType) -> Tensor:
    """Codes of numbers, in the type of w."""
    return (w / scale.to(w.dtype)).add_(zero).round_().clamp_(*limits(kind))


class Lines:
    """The grid of one group per row, (out,) each, made ready for many columns: `multiply` and `nearest` of one after the other."""

    def __init__(self, scale: Tensor, zero: Tensor, kind: StorageType, dtype: torch.dtype):
        self.wide, self.narrow = scale.double().contiguous(), scale.to(dtype).contiguous()
        self.zero, self.dtype = zero.double().contiguous(), dtype
        self.low, self.high = limits(kind)

    def round(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, values) (out,) nearest to numbers (out,)."""
        codes = torch.div(target, self.wide).add_(self.zero).round_().clamp_(self.low, self.high)
        return codes, torch.sub(codes, self.zero).to(self.dtype).mul_(self.narrow)


def store_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive, and a number of the dtype: groups of zeros, and scales below its smallest number, get that one."""
    kind = scale_dtype(dtype)
    least = 2.0**-24 if kind == torch.float16 else torch.finfo(kind).tiny
    if not bool(torch.isfinite(scale).all()) or float(scale.max()) > torch.finfo(kind).max:
        raise InputError(
            f"a group's scale is NaN, infinite or too large for {str(kind)[6:]}: the weights reach beyond what rounding can hold"
        )
    return scale.clamp(min=least).to(kind)


def propose(w: Tensor, kind: StorageType, dtype: torch.dtype) -> list[Grid]:
    """Grids of groups w (…, group) worth trying: the group's range shrunk by degrees."""
    low, high = limits(kind)
    top, bottom = w.amax(-1).clamp(min=0), w.amin(-1).clamp(max=0)
    found = []
    for share in torch.linspace(1, LEAST, SHRINK).tolist():
        if kind.zero:
            scale = store_scale((top - bottom) * share / (high - low), dtype)
            zero = (low - bottom * share / scale.to(w.dtype)).round().clamp(low, high)
        else:
            scale, zero = store_scale(torch.maximum(top / (high + 0.5), -bottom / -(low - 0.5)) * share, dtype), None
        found.append(Grid(scale, torch.zeros_like(top) if zero is None else zero))
    return found


def find_exact(w: Tensor, kind: StorageType, dtype: torch.dtype) -> list[Grid]:
    """Grids that groups w (…, group) lie on, if they lie on one: its step is the smallest weight, or the smallest difference of
    two, or one of these divided by 2 or 3."""
    low, high = limits(kind)
    ordered = torch.cat([w, torch.zeros_like(w[..., :1])], -1).sort(-1).values
    span = (ordered[..., -1] - ordered[..., 0])[..., None]
    sizes, gaps = w.abs(), ordered.diff(dim=-1)
    found = []
    for steps in (sizes, gaps):
        least = torch.where(steps > span * 2.0**-12, steps, torch.inf).amin(-1)
        least = torch.where(least.isfinite(), least, 1.0)
        for part in (1, 2, 3):
            step = least / part
            if steps is gaps:  # over the whole range it is known best
                step = span[..., 0] / (span[..., 0] / step).round().clamp(min=1)
            scale = store_scale(torch.where(span[..., 0] > 0, step, 1.0), dtype)
            zero = torch.zeros_like(step)
            if kind.zero:
                zero = (low - (ordered[..., 0] / scale.to(w.dtype)).round()).clamp(low, high)
            found.append(Grid(scale, zero))
    return found


def search(w: Tensor, metric: Tensor, kind: StorageType, dtype: torch.dtype, exact: bool = False) -> Grid:
    """The best of the proposed grids for groups w (out, groups, group), each in its own metric; in fp32.

    `metric`: (groups, group) weighs the squares of errors, (groups, group, group) is a second moment M: least e M eᵀ.
    `exact`: propose also the grids that w may lie on already.
    """
    best: tuple[Tensor, Tensor, Tensor] | None = None
    w, metric = w.float(), metric.float()
    for scale, zero in propose(w, kind, dtype) + (find_exact(w, kind, dtype) if exact else []):
        codes = nearest(w, zero[..., None], scale[..., None], kind)
        error = w - multiply(codes, zero[..., None], scale[..., None], dtype).float()
        if metric.ndim == 2:
            lost = (error.square() * metric).sum(-1)
        else:
            lost = ((error.transpose(0, 1) @ metric).transpose(0, 1) * error).sum(-1)
        if best is None:
            best = lost, scale, zero
            continue
        better = lost < best[0]
        best = (
            torch.where(better, lost, best[0]), torch.where(better, scale, best[1]), torch.where(better, zero, best[2]),
        )  # fmt: skip
    assert best is not None
    return Grid(best[1], best[2])


# ------------------------------------------------------------------ packing


def load_library() -> Any:
    try:
        from compressed_tensors.compressors.pack_quantized import helpers
    except ImportError:
        raise InputError("packed integers need compressed-tensors · pip install 'planish[pack]'") from None
    return helpers


def pack(codes: Tensor, grid: Grid, kind: StorageType) -> dict[str, Tensor]:
    """A matrix's tensors in compressed-tensors' format pack-quantized, by the ends of their names."""
    library = load_library()
    stored = {
        "weight_packed": library.pack_to_int32(codes.to(torch.int8), kind.bits),
        "weight_scale": grid.scale.contiguous(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if kind.zero:
        stored["weight_zero_point"] = library.pack_to_int32(grid.zero.to(torch.int8), kind.bits, packed_dim=0)
    return {
        end: torch.empty(t.shape, dtype=t.dtype).copy_(t) for end, t in stored.items()
    }  # rows of one word have odd strides


def unpack(stored: dict[str, Tensor], kind: StorageType) -> tuple[Tensor, Grid]:
    """(codes (out, in), grid) of what `pack` made."""
    library, scale = load_library(), stored["weight_scale"]
    out, n = (int(s) for s in stored["weight_shape"])
    codes = library.unpack_from_int32(stored["weight_packed"], kind.bits, torch.Size((out, n)))
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    if kind.zero:
        packed = stored["weight_zero_point"]
        rows = torch.empty(packed.shape[::-1], dtype=packed.dtype).copy_(packed.T)  # the library needs these strides
        zero = library.unpack_from_int32(rows.T, kind.bits, scale.shape, packed_dim=0)
    return codes, Grid(scale, zero.float())


def read(stored: dict[str, Tensor], kind: StorageType, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) in `dtype` that packed tensors stand for."""
    codes, grid = unpack(stored, kind)
    groups = codes.float().unflatten(1, (-1, kind.group))
    if not bool(torch.isfinite(grid.scale).all()):
        raise InputError("a packed matrix has scales that are NaN or infinite: the file is damaged")
    return multiply(groups, grid.zero[..., None], grid.scale[..., None], dtype).flatten(1)
