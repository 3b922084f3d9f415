"""Rotated keys of several heads cached as one set of channels per frequency; nothing is rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights, compute_loss_tails
from planish.shapes import Float, Inexact, Int
from planish.solvers.forms import key_spec
from planish.solvers.linalg import eigh_descending
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class KeyFrequency(Solver):
    """Per group of up to `group` kv heads and per rotary frequency f: κ ≈ U z, z = V κ, complex, with few z per group.

    A rotary pair of head j is a complex number κ_jf = k_f + i k_{f + half}, and rotating it multiplies it by e^{iθ}. A
    complex-linear map of the heads' κ_f of one frequency therefore commutes with the rotation: z can be cached rotated,
    and Re(q̄ U e^{iθ} z) is the product of z with Uᴴ q, one complex number per query channel. The cache holds `rank`
    real numbers per group and token (rank/2 pairs, of any frequencies, the same number in every group); attention
    multiplies every query head with all of them, rank / d times the work of the dense scores, and keys are never rebuilt.

    U, V: eigenvectors of √D E[κ κᴴ] √D, D_j = Σ E|q_hf|² over the query heads of j, so that the score error of
    independent tokens at uniformly spread relative rotations, ½ Σ_j D_j E|κ_j − (U z)_j|², is least for every rank; the
    pairs kept are the largest eigenvalues of all frequencies together. Predicted loss: their tail, exact. Keeping
    whole rotary pairs of each head (A3) is the special case of U and V that select, so it is never better.

    Only where every channel is rotated and keys are not normalised: one norm's factor cannot go through z.
    Reference: the remark on Palu (arXiv 2407.21118) that a low rank within a frequency needs no rebuilding; no paper has it.
    """

    name: ClassVar[str] = "key-frequency"
    group: int = 4

    def heads(self, shape: Shape) -> int:
        """Kv heads that share channels: the largest divisor of their number up to `group`."""
        return max(n for n in range(1, self.group + 1) if shape.kv_heads % n == 0)

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "keys")] if 0 < shape.rotary == shape.qk and not shape.qk_norm else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        heads = self.heads(shape)
        full = heads * shape.qk
        below = (full * shape.hidden - 1) // (shape.hidden + heads)  # U costs `heads` complex numbers per pair
        return [*range(2, min(below, full - 1) + 1, 2), full]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return key_spec(shape, rank, self.heads(shape), k_form="frequency")

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("k.out", "head_gram", heads=shape.kv_heads // self.heads(shape)), Tap("q.out", "squares")]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        k, q = (stats.mean(tap) for tap in self.taps(unit, shape))
        heads, half = self.heads(shape), shape.qk // 2
        second = gram_by_frequency(k, heads, half)
        size = q.view(-1, heads, shape.groups, 2, half).sum((2, 3)).transpose(1, 2)  # (groups, half, heads)
        size = size if size.any() else torch.ones_like(size)  # queries that are zero want nothing of any key
        root = size.clamp(min=size.amax() * 1e-12).sqrt()
        values, vectors = eigh_descending(root[..., :, None] * second * root[..., None, :])
        energy = values.clamp(min=0).flatten(1)  # (groups, half · heads)
        order = energy.argsort(dim=1, descending=True, stable=True)
        pairs = compute_loss_tails(energy.gather(1, order).sum(0)) / 2
        loss = pairs.repeat_interleave(2)[: 2 * heads * half + 1]  # an odd rank holds no more than the even one below
        v = (vectors.conj() * root[..., None]).mT.flatten(1, 2)  # z_i = Σ_j v_ij κ_j
        u = (vectors / root[..., None]).mT.flatten(1, 2)  # κ_j ≈ Σ_i u_ij z_i, both (groups, half · heads, heads)
        held: Weights = {n: weights[n] for n in ("k", "k.bias") if n in weights}
        return Frontier(unit, loss, {"order": order, "u": u, "v": v, **held})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        f, heads = frontier.factors, self.heads(shape)
        if rank >= heads * shape.qk:
            return []
        kept = f["order"][:, : rank // 2].sort(1).values  # (groups, pairs)
        at = kept[..., None].expand(-1, -1, heads)
        frequencies = kept // heads
        u, v = (f[n].gather(1, at) for n in "uv")
        w = encode(f["k"].double(), v, frequencies)
        tensors = {"weight": w.flatten(0, 1)}
        if "k.bias" in f:
            tensors["bias"] = encode(f["k.bias"].double()[:, None], v, frequencies).flatten()
        form = self.spec(frontier.unit, shape, rank)
        table = torch.stack([u.real, u.imag]).transpose(2, 3).flatten(1, 2)  # (2, kv_heads, pairs)
        return [
            Edit("k", form["linears"]["k"], tensors),
            Edit("attention", form["attention"], {"U": table, "frequencies": frequencies}),
        ]


def gram_by_frequency(
    k: Float[Tensor, "groups channels channels"], heads: int, half: int
) -> Inexact[Tensor, "groups half heads heads"]:
    """E[κ κᴴ] (groups, half, heads, heads) from E[k kᵀ] (groups, heads · 2 half, same), κ = k_f + i k_{f + half}."""
    k = k.unflatten(2, (heads, 2, half)).unflatten(1, (heads, 2, half))  # (groups, j, part, f, l, part, f)
    k = k.diagonal(dim1=3, dim2=6)  # (groups, j, part, l, part, f)
    real, imaginary = k[:, :, 0, :, 0] + k[:, :, 1, :, 1], k[:, :, 1, :, 0] - k[:, :, 0, :, 1]
    return torch.complex(real, imaginary).movedim(-1, 1)


def encode(
    k: Float[Tensor, "keys n"], v: Inexact[Tensor, "groups pairs heads"], frequencies: Int[Tensor, "groups pairs"]
) -> Float[Tensor, "groups rank n"]:
    """Rows (groups, rank, n) that make z from rows of k (kv_heads · 2 half, n): real parts first, then imaginary ones."""
    groups, _, heads = v.shape
    k = k.unflatten(0, (groups, heads, 2, -1))  # (groups, heads, part, half, n)
    at = frequencies[:, None, :, None].expand(-1, heads, -1, k.shape[-1])
    a, b = (k[:, :, part].gather(2, at) for part in (0, 1))  # (groups, heads, pairs, n)
    weight = v.transpose(1, 2)[..., None]
    real = (weight.real * a - weight.imag * b).sum(1)
    return torch.cat([real, (weight.real * b + weight.imag * a).sum(1)], 1)
