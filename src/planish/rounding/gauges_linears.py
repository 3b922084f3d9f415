"""The matrices of a linear in any of its forms, and what changes of basis on either side make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from planish.modelling.modules import HeadPair, Pair, Pivoted, is_dense


@dataclass(frozen=True)
class Linear:
    """y = W x + bias in fp64: W = `right` (out, in), or `left` `right` of a pair, or with coefficients `left` of a pivoted form.

    `left` of a pair for each head: (heads, d, rank).
    """

    right: Tensor
    left: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """W (out, in)."""
        if self.left is None:
            return self.right
        if self.left.ndim == 3:
            return (self.left @ self.right.unflatten(0, (len(self.left), -1))).flatten(0, 1)
        product = self.left @ self.right
        return product if self.order is None else torch.cat([self.right, product]).index_select(0, self.order)

    def behind(self) -> Tensor | None:
        """J (out, rows of `right`) with W = J `right`; None where that is the identity."""
        if self.left is None:
            return None
        if self.left.ndim == 3:
            return torch.block_diag(*self.left)
        if self.order is None:
            return self.left
        eye = torch.eye(self.left.shape[1], dtype=self.left.dtype)
        return torch.cat([eye, self.left]).index_select(0, self.order)

    def weigh_right(self, weights: Tensor) -> Tensor:
        """What a squared error in the rows of `right` costs, from what one of the outputs does (out,): diag(Jᵀ diag(w) J)."""
        behind = self.behind()
        return weights if behind is None else (behind.square() * weights[:, None]).sum(0)

    @property
    def mixes(self) -> bool:
        """Whether outputs can be mixed: not those of a pivoted form, some of which are its coefficients' inputs."""
        return self.left is None or (self.order is None and self.left.ndim == 2)

    def read(self, maps: Tensor) -> Linear:
        """For inputs that are multiplied: W M⁻¹ given `maps`, M⁻¹ as a vector (in,) or blocks on its diagonal (n, d, d)."""
        return replace(self, right=apply(maps.mT if maps.ndim == 3 else maps, self.right.T).T)

    def give(self, maps: Tensor) -> Linear:
        """M W and M bias, M a vector (out,) or blocks on its diagonal (n, d, d)."""
        bias = None if self.bias is None else apply(maps, self.bias[:, None])[:, 0]
        if self.left is None:
            return replace(self, right=apply(maps, self.right), bias=bias)
        return replace(self, left=apply(maps, self.left), bias=bias)


def apply(maps: Tensor, m: Tensor) -> Tensor:
    """Rows of m (rows, columns) multiplied by a vector (rows,), or by blocks (n, d, d), n · d = rows."""
    if maps.ndim == 1:
        return maps[:, None] * m
    return (maps @ m.unflatten(0, (len(maps), -1))).flatten(0, 1)


def find_matrices(module: nn.Module) -> dict[str, str] | None:
    """Parts of `Linear` → names of the module's tensors; None for a module that is no linear."""
    if isinstance(module, Pair):
        return {"right": "A.weight", "left": "B.weight", "bias": "B.bias"}
    if isinstance(module, Pivoted):
        return {"right": "P.weight", "left": "C.weight", "order": "order", "bias": "bias"}
    if isinstance(module, HeadPair):
        return {"right": "A.weight", "left": "U", "bias": "bias"}
    return {"right": "weight", "bias": "bias"} if is_dense(module) else None


def find_tensor(module: nn.Module, name: str) -> Tensor | None:
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf, None)


def read_linear(module: nn.Module) -> Linear | None:
    """A module's matrices, or None where it is no linear of a known form."""
    names = find_matrices(module)
    if names is None:
        return None
    found = {part: find_tensor(module, name) for part, name in names.items()}
    return Linear(
        **{
            p: t.detach().cpu() if p == "order" else t.detach().cpu().double()
            for p, t in found.items()
            if t is not None
        }
    )


def fits(linear: Linear, dtype: torch.dtype) -> bool:
    """Whether a dtype can hold these matrices."""
    return all(bool(t.to(dtype).isfinite().all()) for t in (linear.right, linear.left, linear.bias) if t is not None)


def write_linear(module: nn.Module, linear: Linear) -> None:
    """Put matrices into a module that has as large ones, in its dtype."""
    for part, name in (find_matrices(module) or {}).items():
        old, new = find_tensor(module, name), getattr(linear, part)
        if old is not None and part != "order":
            set_data(module, name, new.to(old.device, old.dtype).contiguous())


def set_data(module: nn.Module, name: str, value: Tensor) -> None:
    """A parameter's new value in memory of its own."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = owner._parameters[leaf]
    assert old is not None
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
