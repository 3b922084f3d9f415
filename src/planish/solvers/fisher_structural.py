"""Structural cuts measured in predicted nats: neurons, value dimensions and rotary pairs in the output metric.

G = E[g gᵀ] is the second moment of the summed NLL's gradient at a linear's output, labels sampled from the model (true
Fisher). A cut that changes that output by e costs ½ E[(gᵀe)²] ≈ ½ tr(G E[e eᵀ]) nats per token.

`anchor` > 0 (needs the dense prefix beside the compressed one): o and down are refitted to (1 − a) W x̂ + a W x on the
compressed prefix's inputs x̂, so that they repair what earlier cuts broke. `noise`: beside x̂ and g
(`planish.solvers.noise.Noise`); it is part of the predicted loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Solver, Spec, Tokens, Unit, Weights
from planish.shapes import Float, Int
from planish.solvers.forms import NeuronSolver, ValueSolver, neuron_edits, qk_edits, qk_spec, value_edits
from planish.solvers.linalg import balance, compute_tails, damp, eigh_root, multiply, solve
from planish.solvers.noise import NONE, Noise, add_noise
from planish.solvers.selection import select_greedily, selection_losses
from planish.stats import Stats, Tap, kind


@kind
def pair_effects(
    q: Float[Tensor, "tokens channels"], g: Float[Tensor, "tokens channels"], heads: int
) -> dict[str, Tensor]:
    """Σ s sᵀ (heads · half)² with s_{h,f} = Σ q_j g_j over the two channels (f, f + half) of head h's rotary pair f.

    q, g (tokens, heads · 2 half) before rotation. −s is what zeroing a pair does, to first order, to the summed NLL.
    """
    s = (q.double() * g.double()).unflatten(-1, (heads, 2, -1)).sum(2).flatten(1)
    return {"sum": s.T @ s}


def anchored(
    stats: Stats, role: str, w: Float[Tensor, "out in"], anchor: float, noise: Noise
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"], Float[Tensor, "out out"]]:
    """E[x̂ x̂ᵀ] and E[W t x̂ᵀ] with t = (1 − a) x̂ + a x of a linear, and S with Sᵀ S = G = E[g gᵀ] at its output; noise beside x̂
    and g. Where only the uncompressed prefix was measured x̂ = x."""
    behind = bool(anchor) and Tap(f"{role}.in", "gram") in stats.sums
    tap = Tap(f"{role}.in" if behind else f"dense:{role}.in", "gram")
    gram = stats.mean(tap)
    cross = multiply(w, gram)
    if behind:
        cross = (1 - anchor) * cross + anchor * stats.mean(Tap(f"dense:{role}.product", "cross", tap.site))
    level = noise.find(stats, tap, behind)
    back = Tap(f"grad:{role}.out", "gram")
    metric = eigh_root(add_noise(stats.mean(back), noise.find(stats, back, behind)))[0].T
    return add_noise(gram, level), cross + level * gram.diagonal().mean() * w, metric


def anchored_taps(role: str, anchor: float) -> list[Tap]:
    site = f"{role}.in"
    return (
        [Tap(site, "gram"), Tap(f"dense:{role}.product", "cross", site)] if anchor else [Tap(f"dense:{site}", "gram")]
    )


def refit(
    gram: Float[Tensor, "in in"], cross: Float[Tensor, "out in"], kept: Int[Tensor, " k"], damping: float
) -> Float[Tensor, "out k"]:
    """W' (out, k) with least E‖y − W' x_J‖² from gram = E[x xᵀ] and cross = E[y xᵀ] (out, in)."""
    return solve(gram[kept][:, kept], cross[:, kept].T, damping).T


def refit_effects(
    tokens: Tokens,
    w: Float[Tensor, "out in"],
    refitted: Iterable[tuple[Int[Tensor, " k"], Float[Tensor, "out k"]]],
) -> Float[Tensor, "ranks tokens"]:
    """gᵀ (W' x_J − W x) for every (J, W')."""
    x, g = tokens
    whole = (multiply(g, w.to(g.dtype)) * x).sum(1)
    return torch.stack([(multiply(g, new.to(g.dtype)) * x[:, kept]).sum(1) - whole for kept, new in refitted])


@dataclass(frozen=True)
class FisherNeurons(NeuronSolver):
    """Keep the neurons of an MLP that matter most to the loss; down is refitted by least squares.

    Order: by forward selection in the metric G, in 64 steps (see `select_greedily`). Predicted loss: ½ of the output error
    in the metric G, exact for the refit at every rank.
    """

    name: ClassVar[str] = "fisher-neurons"
    anchor: float = 0.0
    damping: float = 1e-4
    noise: Noise = NONE

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [*anchored_taps("down", self.anchor), Tap("grad:down.out", "gram")]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [*anchored_taps("down", 0), Tap("grad:down.out", "gram")]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        w = weights["down"].double()
        gram, cross, metric = anchored(stats, "down", w, self.anchor, self.noise)
        order, loss = select_greedily(gram, metric @ w, self.damping)
        roles = [n for r in ("gate", "up", "down") for n in (r, f"{r}.bias") if n in weights]
        factors = {"order": order, "gram": gram, "cross": cross, **{n: weights[n] for n in roles}}
        return Frontier(unit, loss / 2, factors, nats=True)

    def effect_role(self, unit: Unit) -> str | None:
        return "down"

    def effects(
        self, frontier: Frontier, ranks: Sequence[int], tokens: Tokens, shape: Shape
    ) -> Float[Tensor, "ranks tokens"]:
        f = frontier.factors
        kept = [f["order"][:rank] for rank in ranks]
        return refit_effects(tokens, f["down"], ((k, refit(f["gram"], f["cross"], k, self.damping)) for k in kept))

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.intermediate:
            return []
        f = frontier.factors
        kept = f["order"][:rank].sort().values
        return neuron_edits(f, kept, refit(f["gram"], f["cross"], kept, self.damping))


@dataclass(frozen=True)
class FisherValues(ValueSolver):
    """Per kv group: value directions that matter most to the loss, v ← Pᵀ v, o refitted by least squares.

    P balances the pooled second moment of the group's heads' o inputs against Σ_h O_hᵀ G O_h. Predicted loss: ½ of o's
    output error in the metric G, exact for the refit at every rank.
    """

    name: ClassVar[str] = "fisher-values"
    anchor: float = 0.0
    damping: float = 1e-4
    noise: Noise = NONE

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [*anchored_taps("o", self.anchor), Tap("grad:o.out", "gram")]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [*anchored_taps("o", 0), Tap("grad:o.out", "gram")]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        heads, groups, d = shape.heads, shape.groups, shape.v
        o = weights["o"].double()
        gram, cross, root = anchored(stats, "o", o, self.anchor, self.noise)
        by_head = (root @ o).unflatten(1, (heads, d)).transpose(0, 1)  # (heads, hidden, d)
        left = (by_head.mT @ by_head).unflatten(0, (-1, groups)).sum(1)
        own = gram.view(heads, d, heads, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        p, q, _ = balance(left, own.unflatten(0, (-1, groups)).sum(1))
        full_p = torch.block_diag(*p.repeat_interleave(groups, 0))  # z = Pᵀ o, all heads
        full_q = torch.block_diag(*q.repeat_interleave(groups, 0))
        z = multiply(full_p.T, multiply(gram, full_p))
        loss = selection_losses(z, root @ o @ full_q, self.order(d, shape), True, self.damping)[::heads] / 2
        factors = {"P": p, "gram": z, "cross": multiply(cross, full_p)}
        factors |= {n: weights[n] for n in ("v", "v.bias", "o") if n in weights}
        return Frontier(unit, loss, factors, nats=True)

    def order(self, rank: int, shape: Shape) -> Int[Tensor, " channels"]:
        """Indices of the first `rank` channels of every head, best channels of all heads first."""
        return (torch.arange(rank)[:, None] + torch.arange(shape.heads) * shape.v).flatten()

    def effect_role(self, unit: Unit) -> str | None:
        return "o"

    def effects(
        self, frontier: Frontier, ranks: Sequence[int], tokens: Tokens, shape: Shape
    ) -> Float[Tensor, "ranks tokens"]:
        f, full = frontier.factors, torch.block_diag(*frontier.factors["P"].repeat_interleave(shape.groups, 0))
        whole = torch.arange(tokens.x.shape[1])

        def fit(kept: Int[Tensor, " k"]) -> Float[Tensor, "out in"]:
            return multiply(refit(f["gram"], f["cross"], kept, self.damping), full[:, kept].T)

        return refit_effects(tokens, f["o"], ((whole, fit(self.order(rank, shape))) for rank in ranks))

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.v:
            return []
        f = frontier.factors
        kept = self.order(rank, shape).sort().values
        o = refit(f["gram"], f["cross"], kept, self.damping)
        p = f["P"][..., :rank].mT
        v = (p @ f["v"].double().unflatten(0, (shape.kv_heads, -1))).flatten(0, 1)
        bias = (p @ f["v.bias"].double().view(shape.kv_heads, -1, 1)).flatten() if "v.bias" in f else None
        return value_edits(v, o, bias, rank)


@dataclass(frozen=True)
class FisherPairs(Solver):
    """Every kv group keeps the rotary pairs that the loss needs most, their keys rescaled to stand in for what is dropped.

    With kept pairs times c_f and the others gone, the summed NLL changes by −Σ_f x_f s_f to first order (s_f: see
    `pair_effects`; x_f = 1 − c_f if kept, 1 if dropped). Predicted loss: least ½ xᵀ E x, E = E[s sᵀ] with `damping` times its
    mean diagonal added, so that factors stay near 1. Only where every channel is rotated and q, k are not normalised.
    """

    name: ClassVar[str] = "fisher-pairs"
    damping: float = 0.1

    def units(self, shape: Shape) -> list[Unit]:
        return [Unit(shape.block, "qk")] if 0 < shape.rotary == shape.qk and not shape.qk_norm else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        return range(2, shape.qk + 1, 2)

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        return qk_spec(shape, rank, rank // 2)

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("dense:q.out", "pair_effects", "grad:q.out", heads=shape.heads)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        size = (shape.kv_heads, shape.groups, shape.qk // 2)
        effects = stats.mean(self.taps(unit, shape)[0]).view(*size, *size).sum((1, 4))  # over the group's query heads
        effects = effects.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (kv_heads, half, half)
        used = effects.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) > 0  # else what is damped is nothing
        effects = damp(effects, self.damping)
        order, growth = eliminate(effects)
        loss = compute_tails((growth * used).sum(0)).repeat_interleave(2)[: shape.qk + 1] / 2
        names = [n for r in "qk" for n in (r, f"{r}.bias") if n in weights]
        factors = {"order": order, "effects": effects, **{n: weights[n] for n in names}}
        return Frontier(unit, loss, factors, nats=True)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.qk:
            return []
        f, half = frontier.factors, shape.qk // 2
        kept = f["order"][:, : rank // 2].sort(1).values
        scale = rescale(f["effects"], kept)[0].repeat(1, 2)
        pick = torch.eye(shape.qk, dtype=torch.float64)[torch.cat([kept, kept + half], 1)].mT
        return qk_edits(f, pick.repeat_interleave(shape.groups, 0), pick * scale[:, None], rank, kept)


def rescale(
    effects: Float[Tensor, "b n n"], kept: Int[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """Factors c (b, m) of the kept variables with least E(Σ_f s_f − Σ_{f kept} c_f s_f)², and what that grows by without each.

    effects: E[s sᵀ] (b, n, n), positive definite; kept (b, m) indices.
    """
    rows = effects.take_along_dim(kept[:, :, None], 1)
    factor = torch.linalg.cholesky(rows.take_along_dim(kept[:, None], 2))
    scale = torch.cholesky_solve(rows.sum(2, keepdim=True), factor)[..., 0]
    roots = torch.linalg.solve_triangular(factor, torch.eye(kept.shape[1], dtype=factor.dtype), upper=False)
    return scale, scale.square() / roots.square().sum(1)


def eliminate(effects: Float[Tensor, "b n n"]) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Order (b, n) of variables by backward elimination, the first to go last, and what dropping each adds (b, n) to the error.

    The next to go is the one whose absence, all others rescaled, adds least. About n⁴ / 4 products.
    """
    kept = torch.arange(effects.shape[1]).expand(len(effects), -1)
    gone, growth = [], []
    while kept.shape[1]:
        grows = rescale(effects, kept)[1]
        least = grows.argmin(1, keepdim=True)
        gone.append(kept.gather(1, least))
        growth.append(grows.gather(1, least))
        rest = torch.ones_like(kept, dtype=torch.bool).scatter(1, least, False)
        kept = kept[rest].view(len(kept), -1)
    return torch.cat(gone[::-1], 1), torch.cat(growth[::-1], 1)
