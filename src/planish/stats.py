"""What is measured while calibration text flows through a block: additive fp64 sums, one per tap.

Every kind is a function from the tapped tensors (tokens, channels) to a dict of sums. Sums add, so batches, processes
and interrupted runs merge by addition, and nothing depends on how the tokens were grouped (up to fp64 rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Sums = dict[str, Tensor]
KINDS: dict[str, Callable[..., Sums]] = {}


@dataclass(frozen=True, order=True)
class Tap:
    """Measure `kind` at `site` (and `other`) of a block. Hashable, so that solvers share measurements.

    Sites: "q.in" (input of q, k and v), "o.in", "up.in" (of gate and up), "down.in", "<role>.out",
    "block.in", "block.out", "attention.raw" / "mlp.raw" (the residual stream that feeds the submodule's norm),
    "attention.add" / "mlp.add" (what the submodule adds to it). Prefix "dense:" = the same site in the uncompressed
    model; prefix "grad:" = gradient of the summed sampled NLL there. `heads` splits channels into heads.
    `part`: "all" sequences, or "fit" / "held" (every eighth is held out).
    """

    site: str
    kind: str
    other: str = ""
    heads: int = 0
    part: str = "all"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site, self.other) if self.other else (self.site,)


def kind(function: Callable[..., Sums]) -> Callable[..., Sums]:
    """Register a kind of measurement under the function's name."""
    KINDS[function.__name__] = function
    return function


@kind
def gram(x: Tensor) -> Sums:
    """Σ x xᵀ (in, in)."""
    x = x.double()
    return {"sum": x.T @ x}


@kind
def cross(y: Tensor, x: Tensor) -> Sums:
    """Σ y xᵀ (out, in)."""
    return {"sum": y.double().T @ x.double()}


@kind
def head_gram(x: Tensor, heads: int) -> Sums:
    """Σ x_h x_hᵀ per head: (heads, d, d)."""
    x = x.double().unflatten(-1, (heads, -1)).transpose(0, 1)
    return {"sum": x.transpose(1, 2) @ x}


@kind
def squares(x: Tensor) -> Sums:
    """Σ x² per channel (in,): the Gram's diagonal alone."""
    return {"sum": x.double().square().sum(0)}


@kind
def magnitudes(x: Tensor) -> Sums:
    """Σ |x| per channel (in,)."""
    return {"sum": x.double().abs().sum(0)}


@kind
def angle(x: Tensor, y: Tensor) -> Sums:
    """Σ over tokens of the cosine of x and y, and of their angle / π (the cosine clamped to [0, 1])."""
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    return {"cosine": cosine.sum(), "angle": (cosine.clamp(0, 1).arccos() / torch.pi).sum()}


@kind
def moments(x: Tensor, f: Tensor) -> Sums:
    """Everything a linear fit of f on x needs: Σx, Σf, Σ x xᵀ, Σ x fᵀ, Σ f²."""
    x, f = x.double(), f.double()
    return {"x": x.sum(0), "f": f.sum(0), "xx": x.T @ x, "xf": x.T @ f, "ff": f.square().sum(0)}


class Stats:
    """Sums and token counts behind a set of taps."""

    def __init__(self, taps: Iterable[Tap] = ()):
        self.sums: dict[Tap, Sums] = {}
        self.tokens: dict[Tap, int] = dict.fromkeys(sorted(set(taps)), 0)

    def update(self, values: dict[str, Tensor], part: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add one batch. `values`: site → (batch, seq, channels) or (tokens, channels), flattened by `part`'s choice."""
        for tap in self.tokens:
            tensors = [values[s] for s in tap.sites]
            tensors = [t.flatten(0, -2) for t in tensors]
            extra = {"heads": tap.heads} if tap.heads else {}
            add(self.sums.setdefault(tap, {}), KINDS[tap.kind](*tensors, **extra))
            self.tokens[tap] += len(tensors[0])

    def merge(self, other: Stats) -> None:
        for tap, sums in other.sums.items():
            add(self.sums.setdefault(tap, {}), sums)
            self.tokens[tap] = self.tokens.get(tap, 0) + other.tokens[tap]

    def mean(self, tap: Tap, name: str = "sum") -> Tensor:
        """A sum divided by its number of tokens."""
        return self.sums[tap][name] / max(self.tokens[tap], 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save: names encode the tap."""
        out = {}
        for tap, sums in self.sums.items():
            stem = "|".join([tap.site, tap.kind, tap.other, str(tap.heads), tap.part])
            out[f"{stem}|tokens"] = torch.tensor(self.tokens[tap])
            out |= {f"{stem}|{name}": t.contiguous() for name, t in sums.items()}
        return out

    @classmethod
    def load(cls, state: dict[str, Tensor]) -> Stats:
        stats = cls()
        for key, tensor in state.items():
            site, kind_name, other, heads, part, name = key.split("|")
            tap = Tap(site, kind_name, other, int(heads), part)
            if name == "tokens":
                stats.tokens[tap] = int(tensor)
            else:
                stats.sums.setdefault(tap, {})[name] = tensor
        return stats


def add(into: Sums, more: Sums) -> None:
    for name, tensor in more.items():
        if name in into:
            into[name] += tensor
        else:
            into[name] = tensor
