"""The nouns: Shape, Unit, Frontier, Plan, Edit, Solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from planish.modelling.families import ATTENTION, MLP
from planish.modelling.modules import Spec
from planish.shapes import Float
from planish.stats import KINDS, Stats, Tap

Weights = Mapping[str, Tensor]  # role → weight (out, in), "role.bias" → bias (out,)


HELD = {  # unit of several linears → their roles
    "qk": ("q", "k"), "keys": ("k",), "vo": ("v", "o"), "mlp": MLP, "attention": ATTENTION, "ffn": MLP,
    "stream": ATTENTION + MLP,
}  # fmt: skip
WHOLE = {"stream"}  # units of all blocks
INSIDE = ("neurons",)  # units that cut all experts of a block alike


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a block's experts: `number` feed-forwards alike, of linears in these `roles`, of which every token reaches `top`.
    They read and give `hidden` channels.

    The router chooses among `groups` of neighbours first and takes `top_groups` of them. `router`: roles (of `Shape.others`)
    that have a row for each expert. `gates`, where an expert is missing: those of the "chosen" others add up to what they did
    before, all of a "softmax" grow by 1 / (1 − g), or each is "apart" and stays. `fewest`: that the router can choose among.
    """

    number: int
    top: int
    intermediate: int
    hidden: int
    groups: int = 1
    top_groups: int = 1
    router: tuple[str, ...] = ()
    gates: str = "chosen"
    roles: tuple[str, ...] = MLP
    fewest: int = 1

    @property
    def least(self) -> int:
        """The fewest that can be left: `fewest`; of a group two, by whose sum it is chosen."""
        return self.fewest if self.groups == 1 else 2 * self.groups

    def lower_top(self, number: int) -> int:
        """How many of `number` experts a token reaches: as many as before, if the groups it reaches have so many."""
        return min(self.top, number // self.groups * self.top_groups)


@dataclass(frozen=True)
class Shape:
    """Sizes of one block. `qk`, `v`: dimensions per head; `rotary`: how many of the qk channels are rotated.

    A block without attention has no heads, one without a dense feed-forward `intermediate` 0. `experts` and `others` (a
    router, a shared expert, a mixer that is no attention: role, out, in) are what it has beside or in place of these.
    """

    block: int
    hidden: int
    heads: int
    kv_heads: int
    qk: int
    v: int
    intermediate: int
    rotary: int
    gated: bool
    qk_norm: bool = False
    parallel: bool = False
    blocks: int = 1  # of the whole model
    experts: ExpertShape | None = None
    others: tuple[tuple[str, int, int], ...] = ()
    cached: tuple[str, ...] = ()  # of `others`: their outputs lie in the KV cache
    further: tuple[str, ...] = ()  # of `others`: linears that may be cut alone, those of a mixer
    state: int = 0  # numbers that a mixer keeps of a sequence, however long it is
    fixed: tuple[str, ...] = ()  # see `Family.fixed`
    attends: tuple[str, ...] = ATTENTION  # its linears: some are absent where keys are values too, or another block's
    stays: str = ""  # what some block of the model does or has, for which no attention may go whole
    mrope: bool = False  # a token has several positions: keys cannot be turned anew from one

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def averages(self) -> bool:
        """Whether attention does no more with values than to average them over tokens."""
        return bool(self.heads) and "attention" not in self.fixed

    @property
    def roles(self) -> tuple[str, ...]:
        """Linears of attention and of the dense feed-forward."""
        mlp = (MLP if self.gated else MLP[1:]) if self.intermediate else ()
        return (self.attends if self.heads else ()) + mlp

    @property
    def linears(self) -> tuple[str, ...]:
        """Linears that may be cut alone."""
        return self.roles + self.further

    @property
    def rest(self) -> tuple[str, ...]:
        """Weights outside attention and the dense feed-forward: `others`, and the linears of every expert ("expert.17.up")."""
        e = self.experts
        experts = (f"expert.{n}.{r}" for n in range(e.number) for r in e.roles) if e else ()
        return (*(role for role, _, _ in self.others), *experts)

    def linear(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's weight."""
        if role.startswith("expert.") and self.experts:
            hidden, inner = self.experts.hidden, self.experts.intermediate
            return (hidden, inner) if role.endswith(".down") else (inner, hidden)
        for other, out, n in self.others:
            if role == other:
                return out, n
        return {
            "q": (self.heads * self.qk, self.hidden),
            "k": (self.kv_heads * self.qk, self.hidden),
            "v": (self.kv_heads * self.v, self.hidden),
            "o": (self.hidden, self.heads * self.v),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[role]

    def width(self, site: str) -> int:
        """Channels of the tensor at a tap's site."""
        where, _, end = site.rpartition(":")[2].rpartition(".")
        if where == "experts" and self.experts:
            return self.experts.hidden if end == "out" else self.experts.number
        if where not in self.roles + self.rest:
            return self.hidden
        out, n = self.linear(where)
        return out if end in ("out", "product") else n

    def count(self, *roles: str) -> int:
        """Weights (without biases) of the given roles, by default of all: those that are stored."""
        return sum(a * b for a, b in map(self.linear, roles or self.roles + self.rest))

    def held(self, name: str) -> tuple[str, ...]:
        """Roles whose weights a unit of this name holds."""
        if name in ("experts", *INSIDE):
            own = self.experts.router if self.experts and name == "experts" else ()
            return tuple(r for r in self.rest if r.startswith("expert.") or r in own)
        return tuple(r for r in HELD.get(name, (name,)) if r in self.linears)

    @property
    def inner(self) -> int:
        """Neurons that one token meets."""
        return self.intermediate + (self.experts.top * self.experts.intermediate if self.experts else 0)

    @property
    def working(self) -> int:
        """Weights that one token meets: all but those of the experts that it does not reach."""
        return sum(self.count(r) for r in self.roles + self.rest if self.works(r))

    def works(self, role: str) -> bool:
        """Whether a token meets this weight; of experts, which are alike, the first ones stand for those that it reaches."""
        return not (role.startswith("expert.") and self.experts) or int(role.split(".")[1]) < self.experts.top


@dataclass(frozen=True, order=True)
class Unit:
    """The smallest thing that gets one rank: "vo", "qk", "mlp", a role, a submodule ("attention", "ffn"), how many "experts" a
    block has, or how many "neurons" each of them."""

    block: int
    name: str

    def __str__(self) -> str:
        return f"{self.block}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> Unit:
        block, _, name = text.partition(".")
        return cls(int(block), name)


@dataclass
class Frontier:
    """For one unit: predicted loss of every rank 0 … full, and the factors that realise any of them.

    `loss` (full + 1,) is the mean squared error per token of the unit's output (nats per token where `nats`). `rough`: what
    rounding the uncut unit costs (`planish.plan.rough.forecast`). `by_tokens` (full + 1,): the loss token by
    token, where it is known (`planish.plan.token_prices`).
    """

    unit: Unit
    loss: Tensor | Sequence[float]
    factors: dict[str, Any] = field(default_factory=dict)
    nats: bool = False
    rough: float = 0.0
    by_tokens: Tensor | None = None

    @property
    def price(self) -> Tensor | Sequence[float]:
        """The loss that plans go by."""
        return self.loss if self.by_tokens is None else self.by_tokens


@dataclass(frozen=True)
class Edit:
    """Give `target` (a role, "attention" or "mlp") the module `form` names (see `planish.modelling.modules`) with these tensors.
    Of "experts" the tensor "kept" names those that stay, in their order."""

    target: str
    form: dict[str, Any]
    tensors: dict[str, Tensor]


def list_untouched(units: Iterable[Unit], shapes: Iterable[Shape]) -> list[tuple[int, str, int]]:
    """What no unit holds: (block, role or "experts", weights). With what units hold it makes all of `Shape.count`."""
    units, found = list(units), []
    for shape in shapes:
        held = {r for u in units if u.block == shape.block or u.name in WHOLE for r in shape.held(u.name)}
        weights: dict[str, int] = {}
        for role in (r for r in shape.roles + shape.rest if r not in held):
            name = "experts" if role.startswith("expert.") else role
            weights[name] = weights.get(name, 0) + shape.count(role)
        found += [(shape.block, name, n) for name, n in weights.items()]
    return found


def describe_rest(units: Iterable[Unit], shapes: Sequence[Shape]) -> list[str]:
    """What blocks have beside attention and a dense feed-forward, and no unit holds: a line for each kind."""
    weights, blocks = dict[str, int](), dict[str, list[str]]()
    for i, what, n in list_untouched(units, shapes):
        if what not in shapes[i].roles:
            weights[what] = weights.get(what, 0) + n
            blocks.setdefault(what, []).append(str(i))
    return [f"untouched: {what} of blocks {', '.join(blocks[what])}, {n:,} weights" for what, n in weights.items()]


def describe_state(shapes: Sequence[Shape], itemsize: int) -> list[str]:
    """What mixers keep of a sequence beside the cache."""
    size = itemsize * sum(s.state for s in shapes)
    blocks = ", ".join(str(s.block) for s in shapes if s.state)
    return [f"mixers of blocks {blocks} keep {size:,} bytes of a sequence of any length"] if size else []


FEW = 256  # calibration tokens of an expert below which its statistics say little


def describe_experts(units: Iterable[Unit], shapes: Sequence[Shape], tokens: int) -> list[str]:
    """How many of the calibration's tokens an expert sees where experts are cut, if the router chooses all alike."""
    cut = {e for u in units if u.name in ("experts", *INSIDE) and (e := shapes[u.block].experts)}
    lines = []
    for e in sorted(cut, key=lambda e: (e.number, e.top)):
        seen = tokens * e.top // e.number
        few = "; that is few: use more text (--n-samples)" if seen < FEW else ""
        lines.append(f"each of {e.number} experts sees about {seen:,} of the {tokens:,} calibration tokens{few}")
    return lines


SUBMODULES = {"attention": "attention", "mlp": "ffn"}  # edit target → name of the unit that is the whole submodule

Plan = dict[Unit, int]  # unit → rank; units that are not in it stay as they are


def count_sums(shape: Shape, taps: Iterable[Tap]) -> int:
    """fp64 numbers that taps accumulate."""
    total = 0
    for tap in taps:
        inputs = [torch.empty(1, shape.width(s), device="meta") for s in tap.sites]
        extra = {"heads": tap.heads} if tap.heads else {}
        total += sum(t.numel() for t in KINDS[tap.kind](*inputs, **extra).values())
    return total


class Tokens(NamedTuple):
    """What a linear sees, and the gradients at its output."""

    x: Float[Tensor, "tokens in"]
    g: Float[Tensor, "tokens out"]


class Solver(ABC):
    """One piece of mathematics. Knows no other solver, no transformers, no files."""

    name: ClassVar[str]

    @abstractmethod
    def units(self, shape: Shape) -> list[Unit]:
        """What it can cut in a block."""

    @abstractmethod
    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        """Admissible ranks, rising; the last one leaves the unit as it is."""

    @abstractmethod
    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        """What `truncate` makes of the block at this rank: the part of its spec that changes (see `merge_forms`), without
        tensors. At full rank: {}. What it costs: `planish.plan.footprint`."""

    def blocks(self, unit: Unit, shape: Shape) -> list[tuple[Shape, int]]:
        """Shapes of the blocks that the unit's rank changes, and how many there are of each: its own, unless told."""
        return [(shape, 1)]

    @abstractmethod
    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        """What it must know about the block's activations."""

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        """What a frontier to plan by needs, of the uncompressed model alone; unless told what `taps` names of it."""
        return [t for t in self.taps(unit, shape) if all(s.startswith(("grad:", "dense:")) for s in t.sites)]

    @abstractmethod
    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        """The expensive, rank-free part."""

    @abstractmethod
    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        """The cheap part: replacements for one rank. At full rank: no edits."""

    def effect_role(self, unit: Unit) -> str | None:
        """The linear at whose output cuts of the unit are priced token by token; None: they are not."""
        return None

    def effects(
        self, frontier: Frontier, ranks: Sequence[int], tokens: Tokens, shape: Shape
    ) -> Float[Tensor, "ranks tokens"]:
        """gᵀe for the error e that a cut to each rank makes at the output of the linear that `effect_role` names, on the
        uncompressed model's inputs."""
        raise NotImplementedError

    def memory(self, unit: Unit, shape: Shape) -> int:
        """fp64 numbers alive at the peak of `decompose` and `truncate`, statistics and weights themselves not counted: what
        `planish plan` predicts memory from. By default two copies of what the unit's taps measure, three of its weights.
        """
        return 2 * count_sums(shape, self.taps(unit, shape)) + 3 * shape.count(*shape.held(unit.name))


def compute_loss_tails(squares: Tensor) -> Tensor:
    """Loss of keeping the first r of falling `squares`: (k + 1,), last 0."""
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


Progress = Callable[[str, int, int], None]  # phase, done (0: its first step begins), total
