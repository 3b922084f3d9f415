"""Joint reduction of values and the output projection, weighted by what attention makes of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Unit, Weights
from planish.shapes import Int
from planish.solvers.forms import ValueSolver, value_edits
from planish.solvers.linalg import balance
from planish.solvers.selection import nystrom, selection_losses
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class ValueOutput(ValueSolver):
    """Per kv group: v ← Pᵀ v with r columns, O_h ← O_h Q, so that the error of the heads' outputs O_h o_h is least.

    o_h is head h's slice of the input of o: attention mixes tokens, never channels, so P passes through it, and since
    a softmax row sums to one the bias of v passes too. `moments`:

    - "attention": E[o_h o_hᵀ], for one query head per kv head the optimum of E‖O_h (o_h − õ_h)‖² (A3's Theorem 3,
      from d × d moments instead of hidden × hidden ones); for a group the heads' moments and O_hᵀ O_h are pooled.
    - "values": E[v vᵀ], as if attention looked anywhere (A3's GQA form with R_kv; MoDeGPT's Type III).

    `refit`: afterwards o is solved by least squares over all heads together, O' = O C Zᵀ (Z C Zᵀ)⁻¹ with
    C = E[o oᵀ] (heads · v)² and Z the block-diagonal Pᵀ. Predicted loss: the squared error of o's output per token,
    exact with and without refit, every rank from one factorisation: in the coordinates Pᵀ o truncation is a selection.

    Reference: A3 (arXiv 2505.12942) Theorem 3 and its GQA form. Differs from the paper: the V bias; pooling; refit. The
    printed V ← … S Vᵀ R^-½ puts the inverse root on the wrong side; here no root is inverted at all.
    """

    name: ClassVar[str] = "value-output"
    moments: Literal["attention", "values"] = "attention"
    refit: bool = True
    damping: float = 1e-10

    @property
    def exempt(self) -> dict[str, str]:
        return {} if self.refit else {"monotone": "heads may cancel"}

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        values = [Tap("v.out", "head_gram", heads=shape.kv_heads)] if self.moments == "values" else []
        return [Tap("o.in", "gram"), *values]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        heads, kv, groups, d = shape.heads, shape.kv_heads, shape.groups, shape.v
        gram = stats.mean(Tap("o.in", "gram"))
        o = weights["o"].double().unflatten(1, (heads, d)).transpose(0, 1)  # (heads, hidden, d)
        left = (o.mT @ o).unflatten(0, (kv, groups)).sum(1)
        if self.moments == "values":
            right = stats.mean(Tap("v.out", "head_gram", heads=kv))
        else:
            own = gram.view(heads, d, heads, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # each head's own block
            right = own.unflatten(0, (kv, groups)).sum(1)
        p, q, _ = balance(left, right)
        p_h, q_h = (m.repeat_interleave(groups, 0) for m in (p, q))
        z = (p_h.mT @ gram.view(heads, d, heads * d)).view(heads * d, heads, d).transpose(0, 1)
        z = (z @ p_h).transpose(0, 1).reshape(heads * d, heads * d)  # E[z zᵀ], z_h = Pᵀ o_h
        w = (o @ q_h).transpose(0, 1).flatten(1)  # what o does to z
        loss = selection_losses(z, w, self.order(d, shape), self.refit, self.damping)[::heads]
        names = [n for n in ("v", "v.bias") if n in weights]
        return Frontier(unit, loss, {"P": p, "gram": z, "o": w, **{n: weights[n] for n in names}})

    def order(self, rank: int, shape: Shape) -> Int[Tensor, " channels"]:
        """Indices of the first `rank` channels of every head, best channels of all heads first."""
        return (torch.arange(rank)[:, None] + torch.arange(shape.heads) * shape.v).flatten()

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.v:
            return []
        f = frontier.factors
        kept = self.order(rank, shape).sort().values
        o = nystrom(f["gram"], kept, f["o"], self.damping) if self.refit else f["o"][:, kept]
        p = f["P"][..., :rank].mT
        v = (p @ f["v"].double().unflatten(0, (shape.kv_heads, -1))).flatten(0, 1)
        bias = (p @ f["v.bias"].double().view(shape.kv_heads, -1, 1)).flatten() if "v.bias" in f else None
        return value_edits(v, o, bias, rank)
