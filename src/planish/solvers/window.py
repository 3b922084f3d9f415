"""A linear map, folded into a down projection, that stands for a window of removed blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.core import Edit, Weights
from planish.shapes import Float
from planish.solvers.linalg import damp, root
from planish.solvers.moments import RIDGES, Moments


def fit_map(m: Moments, ridge: float) -> Float[Tensor, "in out"]:
    """T (in, out) = argmin E|f − x T|² + λ|T|², λ = ridge · mean(diag E x xᵀ), no constant.

    Reference: ReplaceMe (arXiv 2505.02819) Eq. 6 with x the feed-forward's output and f = h_end − (h_mid), the paper's α = λN.
    """
    return torch.cholesky_solve(m.xf / m.n, root(damp(m.xx / m.n, ridge), 0.0))


def fit_map_held_out(train: Moments, held: Moments | None, ridge: float = 0.0) -> tuple[Float[Tensor, "in out"], float]:
    """`fit_map` on all tokens with the ridge (of `RIDGES`, unless given) that is best for held-out ones."""
    zero = torch.zeros_like(train.f)
    if not ridge:
        ridge = 1e-3 if held is None else min(RIDGES, key=lambda r: held.error(fit_map(train, r), zero))
    return fit_map(train + held, ridge), ridge


def fit_correction(
    train: Moments, held: Moments | None, t: Float[Tensor, "in out"], ridge: float = 0.0
) -> Float[Tensor, "in out"]:
    """T (in, out) = argmin E|f − x T|² + λ|T − t|², so that without evidence `t` stays; λ as in `fit_map_held_out`."""

    def fit(m: Moments, ridge: float) -> Float[Tensor, "in out"]:
        missing = (m.xf - m.xx @ t) / m.n
        return t + torch.cholesky_solve(missing, root(damp(m.xx / m.n, ridge), 0.0))

    zero = torch.zeros_like(train.f)
    if not ridge:
        ridge = 1e-3 if held is None else min(RIDGES, key=lambda r: held.error(fit(train, r), zero))
    return fit(train + held, ridge)


def fit_cosine(
    x: Float[Tensor, "n d"], f: Float[Tensor, "n d"], epochs: int, rate: float, batch: int = 1024, seed: int = 0
) -> Float[Tensor, "d d"]:
    """T (d, d) that minimises E[1 − cos(x T, f)] over tokens, by Adam from the identity. x, f (n, d).

    Reference: ReplaceMe (arXiv 2505.02819) Eq. 8 and its repository's defaults (10 epochs, rate 1e-4, 1024 tokens).
    """
    t = torch.eye(x.shape[1], dtype=torch.float32, device=x.device).requires_grad_()
    optimiser = torch.optim.Adam([t], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                loss = 1 - torch.nn.functional.cosine_similarity(x[rows].float() @ t, f[rows].float(), dim=-1).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return t.detach().double()


def fold_edit(weights: Weights, t: Float[Tensor, "d d"]) -> Edit:
    """Edit that puts T (d, d) behind the down projection: W ← Tᵀ W, bias ← bias T."""
    w = weights["down"].double()
    return down_edit(weights, t.T @ w, weights["down.bias"].double() @ t if "down.bias" in weights else None)


def down_edit(weights: Weights, w: Float[Tensor, "hidden neurons"], bias: Float[Tensor, " hidden"] | None) -> Edit:
    """Edit that gives the down projection another weight of the same shape."""
    tensors = {"weight": w} | ({} if bias is None else {"bias": bias})
    return Edit("down", {"kind": "dense", "out": w.shape[0], "in": w.shape[1]}, tensors)
