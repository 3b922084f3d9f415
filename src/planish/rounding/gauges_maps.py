"""Changes of basis that rounding a product of two matrices costs little in, and a plain rounding to compare them by."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from planish.solvers.linalg import root, svd

DAMPING = 1e-8
EXPONENTS = ((0.25, 0.25), (0.25, 0.5), (0.35, 0.5), (0.5, 0.25), (0.5, 0.5))  # of inputs and of columns
SHARES = (0.0, 0.3, 0.7)  # of the inner factor's own error


def round_to_nearest(w: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """w (out, in) on 2^bits levels between the least and the largest (and zero) of every `group` inputs of a row.

    The last group may be shorter.
    """
    out, n = w.shape
    groups = pad(w, (0, -n % group), value=math.nan).unflatten(1, (-1, group)) if n % group else w.view(out, -1, group)
    low = groups.nan_to_num(0.0).amin(-1, keepdim=True).clamp(max=0)
    high = groups.nan_to_num(0.0).amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(w.dtype).tiny)
    zero = (-low / step).round()
    return (((groups / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step).flatten(1)[:, :n]


def spread(n: int) -> Tensor:
    """An orthogonal (n, n), no entry larger than √(2/n): Hartley's matrix with random signs, the same every time.

    Hadamard's, whose entries are 1/√n, exist for few n; this one for all.
    """
    at = torch.arange(n, dtype=torch.float64)
    turns = 2 * math.pi * (at[:, None] * at % n) / n
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)).double() * 2 - 1
    return (turns.cos() + turns.sin()) / n**0.5 * signs


def scale_columns(weights: list[Tensor], energy: Tensor) -> Iterator[Tensor]:
    """Scales s (in,) to try for the columns of matrices (out, in) whose inputs, of mean squares `energy` (in,), are divided by s.

    s = x^a / w^b, x the inputs' and w the columns' root mean squares: a column whose input is large becomes longer, one that
    is long itself, and so sets the step of its groups, shorter. For a = b = ½ the product of both sums of squares is least
    (Cauchy–Schwarz); the step follows the largest weight of a row's group, not their mean square, and less is mostly better.

    Reference: AWQ (arXiv 2306.00978), §3.2, which takes mean magnitudes, b = 0 (in its code b = 1 − a), and any scale.
    """
    squares = torch.stack([w.square().mean(0) / w.square().mean().clamp(min=1e-300) for w in weights]).mean(0)
    x = energy.clamp(min=1e-6 * float(energy.mean()) + 1e-300).log2() / 2
    w = squares.clamp(min=1e-6 * float(squares.mean()) + 1e-300).log2() / 2
    for a, b in EXPONENTS:
        s = a * (x - x.mean()) - b * (w - w.mean())
        yield s.exp2()


def mix_channels(outer: Tensor, seen: Tensor, inner: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps (M, M⁻¹) (n, d, d) to try between two factors: U V becomes (U M⁻¹)(M V), for each of n products.

    `outer` Uᵀ U, `seen` the second moments of V's outputs, `inner` V Vᵀ, all (n, d, d). Rounding U costs about tr(M⁻ᵀ outer M⁻¹)
    tr(M seen Mᵀ), which is least, ‖outer^½ seen^½‖_*², where both are one diagonal matrix; rounding V costs Σ_j of the products of
    the diagonals of M⁻ᵀ outer M⁻¹ and M inner Mᵀ, least with these two so, and spread: every channel alike. Tried are
    mixtures of `seen` and `inner`, spread and not. Roots are damped, so that M is invertible where they are not.
    """
    seen, inner = (m / (outer * m).sum((-1, -2), keepdim=True).clamp(min=1e-300) for m in (seen, inner))
    left = root(outer, DAMPING)
    q = spread(outer.shape[-1])
    for share in SHARES:
        right = root((1 - share) * seen + share * inner, DAMPING)
        u, s, vh = svd(left.mT @ right)
        s = s.clamp(min=1e-300).sqrt()
        forth, back = (left @ u).mT / s[..., None], right @ vh.mT / s[..., None, :]
        yield forth, back
        yield q @ forth, back @ q.T
