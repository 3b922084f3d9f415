"""Experts that transformers stacks in one module, as linears of their own. (This file travels with compressed models.)"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .family import ExpertsRow
from .modules import make_linear


class StackedRows(NamedTuple):
    """How a stacked parameter holds the linears of one expert: see `ExpertsRow.transposed` and `ExpertsRow.alternating`."""

    transposed: bool = False
    alternating: bool = False

    @classmethod
    def of(cls, row: ExpertsRow) -> StackedRows:
        return cls(row.transposed, row.alternating)

    def split(self, x: Tensor, count: int) -> list[Tensor]:
        """One expert's matrix as it is stacked → `count` weights (out, in); or its vector → their biases (out,)."""
        x = x.mT if self.transposed and x.ndim > 1 else x
        return [x[n::count] for n in range(count)] if self.alternating else list(x.chunk(count))

    def join(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Channels of several linears, along an axis, in one."""
        return (
            torch.stack(list(parts), dim % parts[0].ndim + 1).flatten(dim % parts[0].ndim, dim % parts[0].ndim + 1)
            if (self.alternating)
            else torch.cat(list(parts), dim)
        )

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        x = self.join(parts)
        return x.mT if self.transposed and x.ndim > 1 else x


class Experts(nn.Module):
    """Stacked experts as linears of their own: child "17" has those of expert 17. They hold the same memory, unless they are
    stacked transposed or in turns.

    y_t = Σ over the experts j that token t reaches: w_tj · down_j(act(gate_j x_t) ⊙ up_j x_t), or whatever else the stock module
    does between them; or with w_tj inside, at x_t. Every expert is called, if on no token, so that hooks see each of them once
    in every pass.
    """

    def __init__(self, stock: nn.Module, row: ExpertsRow):
        super().__init__()
        self.names, self.rows, self.stacks = tuple(n for n in row.names if n), StackedRows.of(row), row.stacks
        self.act_fn, self.inside = getattr(stock, "act_fn", None), row.inside
        every = range(len(stock.get_parameter("down_proj")))
        self.origins: list[int] = getattr(stock, "origins", [*every])  # what numbers they had when none was gone
        hollow = copy.copy(stock)  # the stock module without weights, for `stack`
        hollow._parameters = {}
        self.__dict__["hollow"] = hollow
        for number in every:
            self.add_module(str(number), nn.ModuleDict(self.unstack(stock, number)))

    def unstack(self, stock: nn.Module, number: int) -> dict[str, nn.Module]:
        """Linears of one expert."""
        found = dict[str, nn.Module]()
        for stack, names in self.stacks.items():
            weights, bias = (stock._parameters.get(n) for n in (stack, f"{stack}_bias"))
            assert weights is not None
            parts = self.rows.split(weights.data[number], len(names))
            biases = [None] * len(names) if bias is None else self.rows.split(bias.data[number], len(names))
            found |= dict(zip(names, map(make_linear, parts, biases), strict=True))
        return found

    @property
    def numbers(self) -> range:
        return range(sum(name.isdecimal() for name in self._modules))

    def linears(self, number: int) -> list[nn.Module]:
        """Gate, where there is one, up and down of one expert."""
        return [self.get_submodule(f"{number}.{name}") for name in self.names]

    def keep(self, kept: Sequence[int]) -> None:
        """Only these experts, numbered anew in this order."""
        chosen = [self._modules[str(n)] for n in kept]
        for number in self.numbers:
            del self._modules[str(number)]
        self._modules |= {str(n): module for n, module in enumerate(chosen)}
        self.origins = [self.origins[n] for n in kept]

    @property
    def alike(self) -> bool:
        """Whether all linears are dense and of one size: they can be stacked again."""
        every = [self.linears(n) for n in self.numbers]
        sizes = [[tuple(p.shape) for m in linears for p in m.parameters()] for linears in every]
        return all(type(m) is nn.Linear for linears in every for m in linears) and all(s == sizes[0] for s in sizes)

    def stack(self) -> nn.Module:
        """The module of transformers with these experts' weights in memory of its own."""
        stock = copy.copy(self.hollow)
        stock._parameters = {}
        for stack, names in self.stacks.items():
            for end, leaf in (("", "weight"), ("_bias", "bias")):
                every = [[getattr(self.get_submodule(f"{n}.{name}"), leaf) for name in names] for n in self.numbers]
                if every[0][0] is None:
                    continue
                stacked = torch.stack([self.rows.stack([p.data for p in parts]) for parts in every])
                stock._parameters[stack + end] = nn.Parameter(stacked.contiguous(), requires_grad=False)
        stock.num_experts = len(self.numbers)  # type: ignore[assignment]
        stock.origins = self.origins  # type: ignore[assignment]
        return stock

    def activate(self, *wide: Tensor) -> Tensor:
        """What down reads, of what gate and up, or up alone, put out."""
        if hasattr(self.hollow, "_apply_gate") and len(wide) > 1:
            return self.hollow._apply_gate(self.rows.join(wide, -1))  # type: ignore[operator, no-any-return]
        assert self.act_fn is not None
        first = self.act_fn(wide[0])
        return first * wide[1] if len(wide) > 1 else first

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shares: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden), the experts that each reaches and their weights (tokens, top) → (tokens, hidden). `shares` (tokens,
        top): what outputs are multiplied by besides."""
        out = torch.zeros_like(hidden_states)
        for number in self.numbers:
            *wide, down = self.linears(number)
            if (
                torch.compiler.is_exporting()
            ):  # graphs hold no choice of tokens: all of them, times 0 where it is not reached
                x, gates = hidden_states, torch.where(top_k_index == number, top_k_weights, 0).sum(-1, keepdim=True)
            else:
                token, slot = torch.where(top_k_index == number)
                x, gates = hidden_states[token], top_k_weights[token, slot, None]
            x = x * gates if self.inside else x
            y = down(self.activate(*(linear(x) for linear in wide)))
            y = y if self.inside else y * gates
            if torch.compiler.is_exporting():
                out = out + y.to(out.dtype)
                continue
            y = y if shares is None else y * shares[token, slot, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out


class GatingRouter(nn.Linear):
    """Logits, gates and which experts a token reaches, as other routers say it; each gate is the sigmoid of its logit."""

    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(hidden_states)
        largest, chosen = torch.topk(logits, self.top_k, dim=1)
        return logits, torch.sigmoid(largest.float()).to(logits.dtype), chosen


class InsideMixture(nn.Module):
    """A mixture whose gates multiply what experts read: the stock module runs all experts on all tokens, most on zeros."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.flatten(0, -2)
        logits, gates, chosen = self.router(x)
        return self.shared_expert(x) + self.experts(x, chosen, gates), logits


def read_top(router: nn.Module, row: ExpertsRow) -> int:
    """How many experts a token reaches, as the router itself knows it, or its configuration for it."""
    return int(getattr(router, "top_k", None) or getattr(router.config, row.top))


def set_top(router: nn.Module, row: ExpertsRow, top: int) -> None:
    if hasattr(router, "top_k"):
        router.top_k = top  # type: ignore[assignment]
    else:  # a configuration of its own: blocks may differ, and others read theirs
        router.config = copy.copy(router.config)
        setattr(router.config, row.top, top)


def open_mixture(mixture: nn.Module, router: nn.Module) -> None:
    """Give a stock mixture whose experts are linears of their own, and its router, what says which tokens reach which."""
    if not isinstance(mixture, InsideMixture):
        mixture.__dict__["stock"] = type(mixture), type(router)
        mixture.__class__, router.__class__ = InsideMixture, GatingRouter


def close_mixture(mixture: nn.Module, router: nn.Module) -> None:
    """Undo `open_mixture`."""
    if isinstance(mixture, InsideMixture):
        mixture.__class__, router.__class__ = mixture.__dict__.pop("stock")
