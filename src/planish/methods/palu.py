"""Palu: the KV cache as latents; keys are rebuilt before they are rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.core import Method, Solver
from planish.solvers.key_latent import KeyLatent
from planish.solvers.value_pca import ValuePCA


@dataclass(frozen=True)
class Palu(Method):
    """K and V by the SVD of what they put out, K in groups of `group` kv heads; V's rebuilding is folded into o.

    Meant for --kv-keep. Differs from the paper: uniform ranks instead of Fisher's; values per kv head, because a latent
    of several heads would widen o by their number; the cache must grow (DynamicCache), rope types whose frequencies
    change with the length are rebuilt at the current length.
    """

    title: ClassVar[str] = "grouped low-rank keys and values: a cache of latents"
    reference: ClassVar[str] = "Palu, arXiv 2407.21118"

    group: int = 4

    def solvers(self) -> list[Solver]:
        return [KeyLatent(self.group), ValuePCA()]
