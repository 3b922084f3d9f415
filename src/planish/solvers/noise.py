"""Noise beside moments of few tokens, so that what they call cheap is cheap on other text too.

    R' = R + a · mean(diag R) · I, G' likewise with b; a, b fall as 1 / tokens

A cut chosen by E[x xᵀ] and E[g gᵀ] of n tokens costs more on other text than on theirs: of SmolLM2 with 16,384 tokens of C4 1.25 to
1.6 times. With noise that is alike in every direction the moments say what other text says, to about a tenth, for low-rank
linears, value dimensions and neurons alike, and the cuts chosen cost less there (docs/log/2026-12-01.md). In a refit the noise
is a ridge that draws the change of the weights to nothing, not the weights.
Reference: KFAC-SVD (arXiv 2610.32878) draws both moments to their mean diagonals, by 0.1 and 0.3 whatever their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.shapes import Float
from planish.solvers.linalg import damp
from planish.stats import Stats, Tap

TOKENS = {"inputs": 500, "gradients": 1600}  # at which the noise would be as large as the mean square itself
MOST = {"inputs": 0.1, "gradients": 0.3}  # times the mean square


@dataclass(frozen=True)
class Noise:
    """Noise beside moments, `share` times what their tokens call for. Where ranks are chosen, by moments of the uncompressed
    model's activations, `priced` times as much as where weights are solved for."""

    share: float = 0.0
    priced: float = 1.0

    def find(self, stats: Stats, tap: Tap, behind: bool) -> float:
        """Noise beside a tap's moment, in its mean squares; `behind`: weights are solved for, behind the compressed prefix."""
        kind = "gradients" if tap.site.startswith("grad:") else "inputs"
        share = self.share * (1 if behind else self.priced)
        return share * min(TOKENS[kind] / max(stats.tokens[tap], 1), MOST[kind])


NONE = Noise()


def add_noise(
    gram: Float[Tensor, "n n"], level: float, along: Float[Tensor, "n n"] | None = None
) -> Float[Tensor, "n n"]:
    """gram + level · mean(diag gram) · I; with `along` = Wᵀ W that of noise before Wᵀ, as much of it in all."""
    if not level:
        return gram
    if along is None:
        return damp(gram, level)
    tiny = torch.finfo(along.dtype).tiny
    return gram + along * (level * gram.diagonal().sum() / along.diagonal().sum().clamp(min=tiny))
