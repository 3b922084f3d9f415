"""What the result may cost: each budget is a cost of (unit, rank), and a limit on what all blocks cost together.

| asked | cost of a unit at a rank | unit of the cost |
|---|---|---|
| `keep`, `max_params` | weights that are left | numbers |
| `max_bytes` | what is stored: weights in their dtype, index tables | bytes |
| `kv_keep` | what the cache holds | numbers per token |
| `flops_keep` | two per weight, and attention over `context` tokens | FLOPs per token |
| `max_latency` | measured on this machine (`planish.plan.latency`) | nanoseconds per decoded token |

Limits on the whole model are turned into limits on the blocks by counting everything that no method cuts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from planish.core import SUBMODULES, Shape, Solver, Unit
from planish.errors import InputError
from planish.folder.source import Source
from planish.plan.footprint import count_attention, count_cache, count_flops, count_headers
from planish.request import SHARES, label, show


@dataclass(frozen=True)
class Budget(ABC):
    """`limit`: what all blocks may cost; `total`: what they cost uncut, what no unit holds included.

    `outside`: what the rest of the model costs, for limits on the whole model; `scale`: from the asked unit to the cost's.
    """

    name: str
    asked: float
    limit: float
    total: float
    outside: float = 0.0
    scale: float = 1.0
    unit: ClassVar[str]

    @property
    def share(self) -> float:
        """Of the uncut blocks' cost that may stay, at most 1."""
        return min(1.0, self.asked if self.name in SHARES else self.limit / self.total)

    @abstractmethod
    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int) -> float:
        """Of a unit at a rank."""

    def fixed(self, solver: Solver, unit: Unit, shape: Shape) -> float:
        """Of a unit at every rank: what cutting it cannot save, such as an attention's scores of low-rank keys."""
        return 0.0

    @abstractmethod
    def uncut(self, shape: Shape, role: str) -> float:
        """Of a linear that is left alone, with what attention does for its outputs."""

    def part(self, share: float) -> float:
        """The limit after this share of the cut."""
        return self.limit if share == 1 else int((1 - (1 - self.share) * share) * self.total + 1e-6)

    def tell(self, cost: float) -> str:
        """What a cost of all blocks is in the words of the request, rounded up: the least that can be asked."""
        if self.name in SHARES:
            return f"the smallest {label(self.name)} is {-(-cost / self.total * 10_000 // 1) / 10_000}"
        whole = (cost + self.outside) / self.scale
        return (
            f"the smallest is {-(-whole * 1000 // 1) / 1000:g} ms"
            if self.name == "max_latency"
            else f"the smallest is {-(-whole // 1):,.0f}"
        )

    def refuse(self, who: str, cost: float) -> InputError:
        return InputError(
            f"{label(self.name)} {show(self.name, self.asked)} cannot be reached by {who}: {self.tell(cost)}"
        )


@dataclass(frozen=True)
class Weights(Budget):
    unit: ClassVar[str] = "weights"

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int) -> float:
        return solver.cost(unit, shape, rank)

    def uncut(self, shape: Shape, role: str) -> float:
        return shape.count(role)


@dataclass(frozen=True)
class Bytes(Budget):
    """`itemsize`: of the stored weights; row orders of pivoted linears and kept rotary pairs are stored as int32.
    `entry`: at most so many bytes does one more tensor take in a file's header; a cut adds up to four."""

    unit: ClassVar[str] = "bytes"
    itemsize: int = 2
    entry: int = 0

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int) -> float:
        tables = 0
        if rank < solver.ranks(unit, shape)[-1]:
            tables = self.entry
            if read_form(solver, unit) == "pivoted":
                tables += shape.linear(unit.name)[0]
            elif unit.name == "qk" and shape.rotary:
                tables += shape.kv_heads * (rank // 2)
        return solver.cost(unit, shape, rank) * self.itemsize + 4 * tables

    def uncut(self, shape: Shape, role: str) -> float:
        return shape.count(role) * self.itemsize


@dataclass(frozen=True)
class CacheNumbers(Budget):
    unit: ClassVar[str] = "numbers per token"

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int) -> float:
        if unit.name == SUBMODULES["attention"]:
            return count_cache(shape) if rank == solver.ranks(unit, shape)[-1] else 0
        cached = solver.cache(unit, shape, solver.ranks(unit, shape)[-1])
        return solver.cache(unit, shape, rank) if cached else self.uncut(shape, unit.name)

    def uncut(self, shape: Shape, role: str) -> float:
        return {"k": shape.kv_heads * shape.qk, "v": shape.kv_heads * shape.v}.get(role, 0)


@dataclass(frozen=True)
class Flops(Budget):
    """Multiplications and additions of the blocks' linears and of attention for one token behind `context` others."""

    unit: ClassVar[str] = "FLOPs per token"
    context: int = 0

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int) -> float:
        full = solver.ranks(unit, shape)[-1]
        products = 2 * solver.cost(unit, shape, rank)
        if unit.name == SUBMODULES["attention"]:
            return products + (2 * self.context * count_attention(shape) if rank == full else 0)
        return products + self.fixed(solver, unit, shape) + 2 * self.context * solver.work(unit, shape, rank)

    def fixed(self, solver: Solver, unit: Unit, shape: Shape) -> float:
        return self.attention(shape, unit.name)

    def attention(self, shape: Shape, role: str) -> float:
        """What attention does with the outputs of a linear of full width: scores for k, sums of values for v."""
        return 2 * self.context * {"k": shape.heads * shape.qk, "v": shape.heads * shape.v}.get(role, 0)

    def uncut(self, shape: Shape, role: str) -> float:
        return (2 * shape.count(role) if shape.works(role) else 0) + self.attention(shape, role)


def make_budget(name: str, asked: float, source: Source, shapes: Sequence[Shape], context: int) -> Budget:
    """The budget that an asked limit amounts to for the blocks."""
    weights = sum(s.count() for s in shapes)
    sizes = source.sizes()
    if name == "keep":
        return Weights(name, asked, int(asked * weights + 1e-6), weights)
    if name == "max_params":
        outside = sum(n for n, dtype in sizes.values() if dtype.is_floating_point) - weights
        return Weights(name, asked, asked - outside, weights, outside)
    if name == "kv_keep":
        total = sum(count_cache(s) for s in shapes)
        return CacheNumbers(name, asked, int(asked * total + 1e-6), total)
    if name == "flops_keep":
        total = count_flops(shapes, [{}] * len(shapes), [s.working for s in shapes], context)
        return Flops(name, asked, int(asked * total + 1e-6), total, context=context)
    itemsize = next(
        d.itemsize for n, (_, d) in sizes.items() if n.startswith(source.family.blocks) and d.is_floating_point
    )
    outside = sum(n * dtype.itemsize for n, dtype in sizes.values()) - weights * itemsize + count_headers(source)
    entry = 100 + max(len(n) for n in sizes)  # dtype, shape, offsets; names of factors are longer by two
    return Bytes(name, asked, asked - outside, weights * itemsize, outside, itemsize=itemsize, entry=entry)


def read_form(solver: Solver, unit: Unit) -> str:
    """ "pivoted", "pair" or "head_pair" for a solver that makes a linear low-rank, else ""."""
    while hasattr(solver, "solver"):
        solver = solver.solver
    if unit.name not in ("q", "k", "v", "o", "gate", "up", "down"):
        return ""
    return getattr(solver, "form", "head_pair")
