"""Keys of several heads cached as one latent and rebuilt before they are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights, compute_loss_tails
from planish.solvers.forms import key_spec
from planish.solvers.linalg import eigh_descending, metric_svd
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class KeyLatent(Solver):
    """Per group of up to `group` kv heads: z = Qᵀ k of the heads' keys side by side, cached; k ≈ Q z.

    Q: top eigenvectors of E[k kᵀ] of the group before norm and rotation, biases included, which is the whitened SVD of
    the group's W_k without a root. Costs r · groups · (hidden + group · d) and the product Q z per cached token at every
    step; works with rotary positions (one of each token) and with normalised keys. Predicted loss: Σ of dropped eigenvalues.
    `nats`: in place of Q the best k ≈ B A k in the metric of E[g gᵀ], g the gradient of the loss at the keys (sampled
    labels); predicted loss ½ tr(E[g gᵀ] E[e eᵀ]) summed over the groups, in nats per token.
    Reference: Palu (arXiv 2407.21118), G-LRD. Differs from the paper: biases are part of the latent.
    """

    name: ClassVar[str] = "key-latent"
    exempt: ClassVar[dict[str, str]] = {"exact": "keys are rebuilt inside the attention, where no site shows them"}
    group: int = 4
    nats: bool = False

    def heads(self, shape: Shape) -> int:
        """Kv heads that share a latent: the largest divisor of their number up to `group`."""
        return max(n for n in range(1, self.group + 1) if shape.kv_heads % n == 0)

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "keys")] if shape.heads and not shape.mrope and "keys" not in shape.fixed else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        full = self.heads(shape) * shape.qk
        below = (full * shape.hidden - 1) // (shape.hidden + full)
        return [*range(1, min(below, full - 1) + 1), full]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return key_spec(shape, rank, self.heads(shape))

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        groups = shape.kv_heads // self.heads(shape)
        if self.nats:
            return [Tap(f"{prefix}:k.out", "head_gram", heads=groups) for prefix in ("dense", "grad")]
        return [Tap("k.out", "head_gram", heads=groups)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        held: Weights = {n: weights[n] for n in ("k", "k.bias") if n in weights}
        found = [stats.mean(tap) for tap in self.taps(unit, shape)]
        if self.nats:
            eye = torch.eye(self.heads(shape) * shape.qk, dtype=torch.float64)
            low = [metric_svd(eye, gram, metric) for gram, metric in zip(*found, strict=True)]
            return Frontier(unit, torch.stack([f.tails() for f in low]).sum(0) / 2, {"low": low, **held}, nats=True)
        values, vectors = eigh_descending(found[0])
        return Frontier(unit, compute_loss_tails(values.clamp(min=0).sum(0)), {"Q": vectors, **held})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        f = frontier.factors
        if rank >= self.heads(shape) * shape.qk:
            return []
        if self.nats:
            pairs = [low.at(rank) for low in f["low"]]
            up, down = torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs])
        else:
            up = f["Q"][..., :rank]  # (groups, heads of a group · qk, rank)
            down = up.mT
        w = (down @ f["k"].double().unflatten(0, (len(up), -1))).flatten(0, 1)
        tensors: dict[str, torch.Tensor] = {"weight": w}
        if "k.bias" in f:
            tensors["bias"] = (down @ f["k.bias"].double().view(len(up), -1, 1)).flatten()
        form = self.spec(frontier.unit, shape, rank)
        return [Edit("k", form["linears"]["k"], tensors), Edit("attention", form["attention"], {"U": up})]
