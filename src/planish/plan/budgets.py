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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, ClassVar

from planish.core import Shape, Solver, Spec, Unit
from planish.errors import InputError
from planish.folder.origin import name_stored
from planish.folder.source import Source
from planish.plan.footprint import Footprint, count_headers, footprints
from planish.plan.latency import Table, UnmeasuredError
from planish.request import SHARES, label, show


@dataclass(frozen=True)
class Uncut:
    """The model that a budget limits; `seconds`: its measured latencies, where they are asked for."""

    source: Source
    shapes: Sequence[Shape]
    context: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Budget(ABC):
    """`limit`: what all blocks may cost; `total`: what they cost uncut, what no unit holds included.

    `outside`: what the rest of the model costs, for limits on the whole model; `scale`: from the asked unit to the cost's;
    `context`: tokens of attention; `itemsize`: bytes of a stored weight.
    """

    name: str
    asked: float
    limit: float
    total: float
    outside: float = 0.0
    scale: float = 1.0
    context: int = 0
    itemsize: int = 2
    unit: ClassVar[str]

    @classmethod
    def make(cls, name: str, asked: float, model: Uncut) -> Budget:
        """The budget that an asked limit, of one of the names in `BUDGETS`, amounts to for the blocks."""
        budget = cls(name, asked, 0, 0, context=model.context, **cls.read(model))
        total = sum(budget.uncut(s, r) for s in model.shapes for r in s.roles + s.rest)
        limit = int(asked * total + 1e-6) if name in SHARES else asked * budget.scale - budget.outside
        return replace(budget, total=total, limit=limit)

    @classmethod
    def read(cls, model: Uncut) -> dict[str, Any]:
        """Fields that say what a cost means for this model."""
        return {}

    @property
    def share(self) -> float:
        """Of the uncut blocks' cost that may stay, at most 1."""
        return min(1.0, self.asked if self.name in SHARES else self.limit / self.total)

    @abstractmethod
    def measure(self, found: Footprint) -> float:
        """Cost of a block, or of a part of it."""

    def attend(self, found: Footprint) -> float:
        """The part of `measure` that is attention's own, whatever its linears cost."""
        return 0.0

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int, beside: Spec | None = None) -> float:
        """Of a unit at a rank, in a block with this spec."""
        held = footprints(solver, unit, shape, rank, self.context, self.itemsize, beside)
        return sum(count * self.measure(found) for count, found in held)

    def fixed(self, solver: Solver, unit: Unit, shape: Shape) -> float:
        """Of a unit at every rank: what cutting it cannot save, such as an attention's scores of low-rank keys."""
        held = footprints(solver, unit, shape, solver.ranks(unit, shape)[0], self.context, self.itemsize)
        return sum(count * self.attend(found) for count, found in held if "attention" not in found.spec)

    def uncut(self, shape: Shape, role: str) -> float:
        """Of a linear that is left alone, with what attention does for its outputs."""
        return self.measure(Footprint({}, shape, (role,), self.context, self.itemsize))

    def achieved(self, cost: float) -> float:
        """What a cost of all blocks is in the unit of the request."""
        return cost / self.total if self.name in SHARES else (cost + self.outside) / self.scale

    def tell(self, cost: float) -> str:
        """What a cost of all blocks is in the words of the request, rounded up: the least that can be asked."""
        least = self.achieved(cost)
        if self.name in SHARES:
            return f"the smallest {label(self.name)} is {ceil(least * 10_000) / 10_000}"
        if self.name == "max_latency":
            return f"the smallest is {ceil(least * 1000) / 1000:g} ms"
        return f"the smallest is {ceil(least):,}"

    def refuse(self, who: str, cost: float) -> InputError:
        return InputError(
            f"{label(self.name)} {show(self.name, self.asked)} cannot be reached by {who}: {self.tell(cost)}"
        )


@dataclass(frozen=True)
class Weights(Budget):
    unit: ClassVar[str] = "weights"

    @classmethod
    def read(cls, model: Uncut) -> dict[str, Any]:
        numbers = sum(n for n, dtype in model.source.sizes().values() if dtype.is_floating_point)
        numbers += model.source.untouched.count
        return {"outside": numbers - sum(s.count() for s in model.shapes)}

    def measure(self, found: Footprint) -> float:
        return found.weights


@dataclass(frozen=True)
class Bytes(Budget):
    """`entry`: at most so many bytes does one more tensor take in a file's header; a cut adds up to four."""

    unit: ClassVar[str] = "bytes"
    entry: int = 0

    @classmethod
    def read(cls, model: Uncut) -> dict[str, Any]:
        sizes, blocks = model.source.sizes(), model.source.family.blocks
        itemsize = next(d.itemsize for n, (_, d) in sizes.items() if n.startswith(blocks) and d.is_floating_point)
        whole = sum(n * dtype.itemsize for n, dtype in sizes.values()) + count_headers(model.source)
        whole += model.source.untouched.bytes
        return {
            "itemsize": itemsize,
            "outside": whole - itemsize * sum(s.count() for s in model.shapes),
            # dtype, shape, offsets; names of factors are longer by two
            "entry": 100 + max(len(name_stored(model.source, n)) for n in sizes),
        }

    def measure(self, found: Footprint) -> float:
        return found.bytes

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int, beside: Spec | None = None) -> float:
        return super().cost(solver, unit, shape, rank, beside) + 4 * self.entry * bool(solver.spec(unit, shape, rank))


@dataclass(frozen=True)
class CacheNumbers(Budget):
    unit: ClassVar[str] = "numbers per token"

    def measure(self, found: Footprint) -> float:
        return found.cache


@dataclass(frozen=True)
class Flops(Budget):
    """Multiplications and additions of the blocks' linears and of attention for one token behind `context` others."""

    unit: ClassVar[str] = "FLOPs per token"

    def measure(self, found: Footprint) -> float:
        return found.flops

    def attend(self, found: Footprint) -> float:
        return 2 * self.context * found.scores


@dataclass(frozen=True)
class Latency(Budget):
    """Nanoseconds, rounded up, that the blocks take per decoded token."""

    unit: ClassVar[str] = "nanoseconds per token"
    table: Table = field(default_factory=lambda: Table({}, ()))

    @classmethod
    def read(cls, model: Uncut) -> dict[str, Any]:
        if others := next((s.rest for s in model.shapes if s.rest), ()):
            raise InputError(f"--max-latency: {others[0]} is not in the latency table; use another budget")
        table = Table(model.seconds, tuple(model.shapes))
        return {"table": table, "outside": table.rest * 1e9, "scale": 1e6}

    def measure(self, found: Footprint) -> float:
        return ceil(self.table.time(found) * 1e9)

    def attend(self, found: Footprint) -> float:
        return 1e9 * self.table.attend(found)

    def cost(self, solver: Solver, unit: Unit, shape: Shape, rank: int, beside: Spec | None = None) -> float:
        try:
            return super().cost(solver, unit, shape, rank, beside)
        except UnmeasuredError as error:
            what = f"what {solver.name} makes of {unit.name} is not in the latency table"
            raise InputError(f"--max-latency: {what}; use another budget") from error


BUDGETS: dict[str, type[Budget]] = {
    "keep": Weights,
    "max_params": Weights,
    "max_bytes": Bytes,
    "kv_keep": CacheNumbers,
    "flops_keep": Flops,
    "max_latency": Latency,
}


def make_budget(
    name: str,
    asked: float,
    source: Source,
    shapes: Sequence[Shape],
    context: int = 0,
    seconds: Mapping[str, float] | None = None,
) -> Budget:
    """The budget that an asked limit amounts to for the blocks."""
    return BUDGETS[name].make(name, asked, Uncut(source, shapes, context, seconds or {}))
