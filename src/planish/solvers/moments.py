"""Sufficient statistics of a linear fit of one activation on another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.shapes import Float
from planish.stats import Stats, Tap

RIDGES = tuple(10.0**e for e in range(-7, 1))  # relative ridges to choose from


@dataclass(frozen=True)
class Moments:
    """Sums over n tokens of x (n, d) and f (n, e): all that least squares of f on x can ever use."""

    n: float
    x: Float[Tensor, " d"]  # Σ x
    f: Float[Tensor, " e"]  # Σ f
    xx: Float[Tensor, "d d"]  # Σ x xᵀ
    xf: Float[Tensor, "d e"]  # Σ x fᵀ
    ff: Float[Tensor, " e"]  # Σ f²

    @classmethod
    def read(cls, stats: Stats, tap: Tap) -> Moments | None:
        sums = stats.sums.get(tap)
        return (
            None
            if sums is None or not sums["n"]
            else cls(float(sums["n"]), *(sums[k] for k in ("x", "f", "xx", "xf", "ff")))
        )

    def __add__(self, other: Moments | None) -> Moments:
        if other is None:
            return self
        return Moments(*(getattr(self, k) + getattr(other, k) for k in ("n", "x", "f", "xx", "xf", "ff")))

    def shift(self, c: Float[Tensor, " e"]) -> Moments:
        """The sums with f − c in place of f."""
        ff = self.ff - 2 * c * self.f + self.n * c.square()
        return Moments(self.n, self.x, self.f - self.n * c, self.xx, self.xf - torch.outer(self.x, c), ff)

    @property
    def means(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " e"]]:
        """μ = E[x], ν = E[f]."""
        return self.x / self.n, self.f / self.n

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """S = E[(x − μ)(x − μ)ᵀ] (d, d), raised by what rounding leaves of the difference, or a constant x has S < 0."""
        mu, _ = self.means
        second = self.xx / self.n
        noise = 4 * self.n**0.5 * torch.finfo(second.dtype).eps * second.trace()
        return second - torch.outer(mu, mu) + noise * torch.eye(len(mu), dtype=second.dtype, device=second.device)

    @property
    def cross(self) -> Float[Tensor, "d e"]:
        """C = E[(x − μ)(f − ν)ᵀ]."""
        return self.xf / self.n - torch.outer(*self.means)

    def error(self, a: Float[Tensor, "d e"], c: Float[Tensor, " e"]) -> float:
        """Mean over the tokens of |f − (x A + c)|², for these A and c: no pass over the data is needed."""
        mu, nu = self.means
        second = self.xx / self.n
        inner = (a * (self.xf / self.n)).sum() + c @ nu
        own = (a * (second @ a)).sum() + 2 * (mu @ a) @ c + c @ c
        return max(float(self.ff.sum() / self.n - 2 * inner + own), 0.0)
