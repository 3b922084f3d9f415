"""Predicted losses of every rank, corrected by what was measured at a few."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-300  # below which no loss is told from none


def follow(loss: Tensor, at: Tensor, factor: Tensor) -> Tensor:
    """A curve (full + 1,) times factors, of which the logarithms at some rising ranks are given: piecewise linear between these,
    constant beyond the ends."""
    ranks, last = torch.arange(len(loss)), max(len(at) - 1, 1)
    right = torch.searchsorted(at, ranks).clamp(1, last)
    left = right - 1
    right = right.clamp(max=len(at) - 1)
    share = ((ranks - at[left]) / (at[right] - at[left]).clamp(min=1)).clamp(0, 1)
    return loss * (factor[left] + share * (factor[right] - factor[left])).exp()
