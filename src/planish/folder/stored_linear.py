"""Linears whose weights stay in their file: those of experts, of which a block has more than memory should hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planish.core import Shape
from planish.folder.safetensors import Later
from planish.folder.skeleton import set_parameter
from planish.modelling.canonical import has_module
from planish.modelling.experts import Experts
from planish.modelling.families import Family

APART = 4 << 20  # weights; a block's experts of more than these together are read one by one, whenever they run


class StoredLinear(nn.Linear):
    """y = W x + bias, with W (out, in) as `read` gives it, in memory only while it is used: once on the way forward,
    and once more on the way back where gradients pass.

    `weight` is read anew whenever it is asked for. Among the parameters it has its shape and type, and no values. On no
    rows nothing is read.
    """

    def __init__(
        self, read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, bias: Tensor | None = None
    ):
        nn.Module.__init__(self)
        self.read, (self.out_features, self.in_features) = read, shape
        self.place, self.kind = torch.device("cpu"), dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._parameters["weight"] = self._hollow()

    def _hollow(self) -> nn.Parameter:
        size = (self.out_features, self.in_features)
        return nn.Parameter(torch.empty(size, dtype=self.kind, device="meta"), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.read().to(self.place, self.kind)

    def pieces(self) -> tuple[Tensor]:
        """The weight, to be written."""
        return (self.weight,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """What `to` does with the weight is done whenever it is read."""
        asked = fn(torch.empty(0, dtype=self.kind, device=self.place))
        self.place, self.kind = asked.device, asked.dtype
        self._parameters["weight"] = self._hollow()
        if self.bias is not None:
            self._parameters["bias"] = nn.Parameter(fn(self.bias.data), requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # the same graph, and a weight that takes no memory
            nothing = torch.zeros((), dtype=self.kind, device=self.place)
            return nn.functional.linear(x, nothing.expand(self.out_features, self.in_features), self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return Product.apply(x, self)  # type: ignore[no-any-return]
        return nn.functional.linear(x, self.weight, self.bias)


class Product(torch.autograd.Function):
    """x Wᵀ + bias of a `StoredLinear`; gradients reach x alone, and W is not kept for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: StoredLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return g @ ctx.linear.weight.to(g.dtype), None


def find_experts(block: nn.Module, family: Family) -> Experts | None:
    """A canonical block's experts, each with linears of its own."""
    row = family.experts
    found = block.get_submodule(row.path) if row is not None and has_module(block, row.path) else None
    return found if isinstance(found, Experts) else None


def list_apart(block: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """Of a canonical block, full or empty, the linears that are to stay in their file, by path; none of small experts."""
    row, experts = family.experts, find_experts(block, family)
    if row is None or experts is None:
        return {}
    found = {
        f"{row.path}.{n}.{name}": linear
        for n in experts.numbers
        for name, linear in zip(experts.names, experts.linears(n), strict=True)
    }
    plain = {path: m for path, m in found.items() if isinstance(m, nn.Linear)}
    return plain if is_apart(sum(m.in_features * m.out_features for m in plain.values())) else {}


def list_tensors(block: nn.Module, family: Family) -> dict[str, Tensor | Later]:
    """What is written of a joined block, by name. Weights that stay in a file are read when they are written; stacked again where
    checkpoints of the family stack them."""
    found: dict[str, Tensor | Later] = dict(block.state_dict())
    for path, module in block.named_modules():
        if isinstance(module, StoredLinear):
            found[f"{path}.weight"] = Later(module.kind, (module.out_features, module.in_features), module.pieces)
    row, experts = family.experts, find_experts(block, family)
    if row is None or experts is None or not (row.stacked and can_stack(experts)):
        return found
    for stack, names in experts.stacks.items():
        for end, leaf in (("", "weight"), ("_bias", "bias")):
            each = [[experts.get_submodule(f"{n}.{name}") for name in names] for n in experts.numbers]
            if each[0][0]._parameters[leaf] is not None:
                found[f"{row.path}.{stack}{end}"] = lay_stack(experts, each, leaf)
    apart = tuple(f"{row.path}.{n}." for n in experts.numbers)
    return {name: t for name, t in found.items() if not name.startswith(apart)}


def can_stack(experts: Experts) -> bool:
    """Whether all linears are dense and of one size, wherever their weights are."""
    linears = [experts.linears(n) for n in experts.numbers]
    sizes = [[tuple(p.shape) for m in own for p in m.parameters()] for own in linears]
    return all(isinstance(m, nn.Linear) for own in linears for m in own) and all(s == sizes[0] for s in sizes)


def lay_stack(experts: Experts, linears: Sequence[Sequence[nn.Module]], leaf: str) -> Later:
    """Weights or biases of every expert's linears in one tensor, an expert at a time."""
    first = [m._parameters[leaf] for m in linears[0]]
    one = experts.rows.stack([torch.empty_like(p, device="meta") for p in first])  # type: ignore[arg-type]
    shape = (len(linears), *one.shape)
    return Later(one.dtype, shape, lambda: (experts.rows.stack([getattr(m, leaf) for m in own]) for own in linears))


def set_read(block: nn.Module, name: str, read: Callable[[], Tensor]) -> None:
    """A block's tensor is what `read` gives: now, or whenever it is asked for where weights stay in a file."""
    owner = block.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, StoredLinear):
        owner.read = read
    else:
        set_parameter(block, name, read())


def is_apart(weights: int) -> bool:
    """Whether experts of so many weights together stay in their file."""
    return weights > APART


def count_held(shape: Shape) -> int:
    """Weights of a block that are in memory where its experts, if they are large, stay in their file: of these one linear's."""
    experts = shape.count(*(r for r in shape.rest if r.startswith("expert."))) if shape.experts else 0
    return shape.count() - experts + shape.count("expert.0.up") if is_apart(experts) else shape.count()
