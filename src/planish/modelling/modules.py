"""Modules that replace a block's linears or submodules. (This file travels with compressed models.)

Linear forms: a dense `nn.Linear` of another shape, `Pair`, `Pivoted`, `HeadPair`. Whole submodules: `Bypass`. `Fused` stands for a
family's fused linear while its roles have different forms. Attentions are in `attentions`; `blocks` puts all of them in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .families import Family

Spec = dict[str, Any]  # what a block is made of; see `blocks`


def take(x: Tensor, at: Tensor) -> Tensor:
    """Channels `at` (m,) of x (..., n). As a matrix: of more axes torch gathers the last one over thirty times slower (CPU)."""
    rows = prod(x.shape[:-1])  # said, because of nothing -1 could be anything
    return x.reshape(rows, x.shape[-1]).index_select(-1, at).view(*x.shape[:-1], len(at))


def is_dense(module: nn.Module) -> bool:
    """Whether it is a linear and nothing else: PyTorch's own class, or Falcon's, which does the same in two steps."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear"


class Pair(nn.Module):
    """y = B (A x) + bias: A (rank, in), B (out, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False, **kw)
        self.B = nn.Linear(rank, out_features, bias=bias, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def dense(self) -> Tensor:
        return self.B.weight @ self.A.weight


class Pivoted(nn.Module):
    """y = [P x, C (P x)][order], plus bias: P (rank, in), C (out − rank, rank), `order` (out,) a permutation.

    r(in + out − r) numbers for any linear of rank r, and as many multiplications; `benchmarks/pivoted.py` times it.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.P = nn.Linear(in_features, rank, bias=False, **kw)
        self.C = nn.Linear(rank, out_features - rank, bias=False, **kw)
        self.bias = nn.Parameter(torch.zeros(out_features, **kw)) if bias else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=kw.get("device")))

    def forward(self, x: Tensor) -> Tensor:
        base = self.P(x)
        y = take(torch.cat([base, self.C(base)], dim=-1), self.order)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        return torch.cat([self.P.weight, self.C.weight @ self.P.weight]).index_select(0, self.order)


class HeadPair(nn.Module):
    """y_h = U_h (A_h x) + bias_h per head: A (heads · rank, in), U (heads, d, rank); one low-rank pair for each head."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, heads: int, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, heads * rank, bias=False, **kw)
        self.U = nn.Parameter(torch.zeros(heads, out_features // heads, rank, **kw))
        self.bias = nn.Parameter(torch.zeros(out_features, **kw)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x).unflatten(-1, (self.U.shape[0], 1, -1))
        y = (z @ self.U.transpose(1, 2)).flatten(-3)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        return (self.U @ self.A.weight.unflatten(0, (self.U.shape[0], -1))).flatten(0, 1)


class FusedRows(NamedTuple):
    """How a family's own linear lays out the rows of its roles (see `families.Fused`).

    `sizes`: rows of each role. `heads`: kv heads ("heads"), or the role's own ("neighbours"), of whose channels the first
    `rotary` are rotated.
    """

    layout: str
    sizes: Sequence[int]
    heads: int = 1
    rotary: int = 0

    def split(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """All rows, along an axis → those of each role."""
        if self.layout == "rows":
            return list(x.split(list(self.sizes), dim))
        dim %= x.ndim
        by_head = x.unflatten(dim, (self.heads, -1))
        if self.layout == "heads":
            return [t.flatten(dim, dim + 1) for t in by_head.split([n // self.heads for n in self.sizes], dim + 1)]
        return [self.transpose(by_head, dim + 1, (self.rotary // 2, 2)).flatten(dim, dim + 1)]

    def join(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The inverse of `split`."""
        if self.layout == "rows":
            return torch.cat(list(parts), dim)
        dim %= parts[0].ndim
        by_head = torch.cat([p.unflatten(dim, (self.heads, -1)) for p in parts], dim + 1)
        if self.layout == "neighbours":
            by_head = self.transpose(by_head, dim + 1, (2, self.rotary // 2))
        return by_head.flatten(dim, dim + 1)

    def transpose(self, x: Tensor, dim: int, shape: tuple[int, int]) -> Tensor:
        """The rotated channels of every head along an axis, a matrix of this shape read row by row → column by column."""
        rotated, rest = x.split([self.rotary, x.shape[dim] - self.rotary], dim)
        return torch.cat([rotated.unflatten(dim, shape).transpose(dim, dim + 1).flatten(dim, dim + 1), rest], dim)


class Fused(nn.Module):
    """Linears over one input whose outputs are laid out as a family's own linear lays them out."""

    def __init__(self, parts: dict[str, nn.Module], rows: FusedRows):
        super().__init__()
        self.roles, self.rows = tuple(role.rpartition(".")[2] for role in parts), rows
        for role, module in zip(self.roles, parts.values(), strict=True):
            setattr(self, role, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.join([getattr(self, r)(x) for r in self.roles], -1)

    def join(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the family's own linear; all parts must be dense."""
        weights, biases = ([getattr(getattr(self, r), n) for r in self.roles] for n in ("weight", "bias"))
        return self.rows.join(weights), None if biases[0] is None else self.rows.join(biases)


def list_matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """A block's matrices by their names: no vectors, no weights of norms, which some models have a row of per head."""
    return {
        f"{path}.{n}".lstrip("."): p
        for path, module in block.named_modules() if not type(module).__name__.endswith("Norm")
        for n, p in module.named_parameters(recurse=False) if p.ndim >= 2
    }  # fmt: skip


def make_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=bias.requires_grad)
    return linear


class Bypass(nn.Module):
    """What is added to the residual stream in place of a removed submodule: g ⊙ x + b + (x − μ) U, U = V W of low rank.

    Stored with the constant folded (b − μ U): `gate` (d,), `shift` (d,), `V` (rank, d), `W` (d, rank); each optional.
    `rank` ≥ d/2 stores one d × d matrix in `V`. With nothing at all it contributes zero.
    """

    def __init__(self, width: int, rank: int, gate: bool, shift: bool, as_tuple: bool, factored: bool = True, **kw):
        super().__init__()
        self.rank, self.as_tuple = rank, as_tuple
        self.gate = nn.Parameter(torch.zeros(width, **kw)) if gate else None
        self.shift = nn.Parameter(torch.zeros(width, **kw)) if shift else None
        self.V = nn.Linear(width, rank if factored else width, bias=False, **kw) if rank else None
        self.W = nn.Linear(rank, width, bias=False, **kw) if rank and factored else None

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        x = hidden_states
        y = torch.zeros_like(x) if self.gate is None else self.gate * x
        if self.shift is not None:
            y = y + self.shift
        if self.V is not None:
            z = self.V(x)
            y = y + (z if self.W is None else self.W(z))
        return (y, None) if self.as_tuple else y


class Apart:
    """Mixed into the class of a block with one norm for two submodules, of which one reads the residual stream itself.

    y = x + attention(norm(x)) + mlp(norm(x)), where what is `apart` ("attention" or "mlp") reads x in place of norm(x).
    """

    apart: str
    paths: Sequence[str]  # of norm, attention, mlp
    tuples: bool

    def forward(self, hidden_states: Tensor, **kwargs):
        norm, attention, mlp = (self.get_submodule(p) for p in self.paths)  # type: ignore[attr-defined]
        x = norm(hidden_states)
        attended = attention(hidden_states if self.apart == "attention" else x, **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended
        y = hidden_states + attended + mlp(hidden_states if self.apart == "mlp" else x)
        return (y, None) if self.tuples else y


@functools.cache
def make_apart(stock: type) -> type:
    """A family's class of blocks with `Apart` mixed in."""
    made = type(stock.__name__, (Apart, stock), {"__module__": __name__})
    globals()[made.__name__] = made  # for pickle
    return made


class SlicedNorm(nn.Module):
    """RMSNorm without weight of a `full`-wide vector that is given in a basis of fewer directions."""

    def __init__(self, full: int, epsilon: float):
        super().__init__()
        self.full, self.epsilon = full, epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.full + self.epsilon)).to(x.dtype)


class SlicedBlock(nn.Module):
    """A block whose residual stream has `in`, `mid` and `out` channels, each in a basis of its own (SliceGPT).

    h = S_a x + attention(norm(x)), y = S_m h + mlp(norm(h)): the shortcuts S_a (mid, in) and S_m (out, mid) change
    from one basis to the next. Everything else keeps the stock block's names.
    """

    def __init__(self, stock: nn.Module, family: Family, form: Spec, full: int):
        super().__init__()
        p = next(stock.parameters())
        kw = {"device": p.device, "dtype": p.dtype, "bias": False}
        for name, module in stock.named_children():
            self.add_module(name, module)
        for path in (family.attention_norm, family.mlp_norm):
            norm = stock.get_submodule(path)
            set_module(self, path, SlicedNorm(full, norm.variance_epsilon))  # type: ignore[arg-type]
        self.attention_shortcut = nn.Linear(form["in"], form["mid"], **kw)
        self.mlp_shortcut = nn.Linear(form["mid"], form["out"], **kw)
        self.paths = (family.attention_norm, family.attention, family.mlp_norm, family.mlp)
        for name in ("attention_type", "layer_idx"):
            if hasattr(stock, name):
                setattr(self, name, getattr(stock, name))

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attention_norm, attention, mlp_norm, mlp = (self.get_submodule(p) for p in self.paths)
        attended = attention(hidden_states=attention_norm(hidden_states), **kwargs)
        h = self.attention_shortcut(hidden_states) + (attended[0] if isinstance(attended, tuple) else attended)
        return self.mlp_shortcut(h) + mlp(mlp_norm(h))


def get_module(root: nn.Module, path: str) -> nn.Module:
    return root.get_submodule(path)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
