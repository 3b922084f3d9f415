"""SliceGPT: the residual stream is rotated to its principal components, and the last ones are cut off."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.calibrate.collect import measure_block
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream
from planish.core import Edit, Frontier, Shape, Solver, Spec, Unit, Weights
from planish.errors import InputError
from planish.folder.source import Source
from planish.methods.method import Method
from planish.modelling.blocks import get_linear, install
from planish.modelling.canonical import split_block
from planish.modelling.families import ATTENTION
from planish.plan.footprint import count_weights
from planish.plan.planned import Emit, Planned
from planish.plan.problem import Problem
from planish.solvers.forms import dense
from planish.solvers.linalg import eigh_descending
from planish.stats import Stats, Tap

STREAM = Unit(0, "stream")


@dataclass(frozen=True)
class StreamWidth(Solver):
    """The width of the residual stream: one rank for the whole model, which `slice_model` cuts block by block."""

    name: ClassVar[str] = "stream-width"

    def units(self, shape: Shape) -> list[Unit]:
        if shape.rest:
            raise InputError(
                f"slicegpt needs blocks of attention and dense feed-forward; block {shape.block} has others"
            )
        return [STREAM] if shape.block == STREAM.block else []

    def ranks(self, unit: Unit, shape: Shape) -> Sequence[int]:
        whole = count_weights(self, unit, shape, shape.hidden)
        cut = range(1, shape.hidden)
        return [*cut[: bisect_left(cut, whole, key=lambda w: count_weights(self, unit, shape, w))], shape.hidden]

    def blocks(self, unit: Unit, shape: Shape) -> list[tuple[Shape, int]]:
        first, last = replace(shape, block=0), replace(shape, block=shape.blocks - 1)
        between = [(replace(shape, block=1), shape.blocks - 2)] if shape.blocks > 2 else []
        return [(first, 1), *between, (last, 1)] if shape.blocks > 1 else [(first, 1)]

    def spec(self, unit: Unit, shape: Shape, rank: int) -> Spec:
        """The first block's input and the last block's output keep their width. At full width there are no shortcuts."""
        if rank == shape.hidden:
            return {}
        before = shape.hidden if shape.block == 0 else rank
        after = shape.hidden if shape.block == shape.blocks - 1 else rank
        linears = {r: dense(shape.linear(r)[0], before if r in ATTENTION else rank) for r in shape.roles}
        linears |= {"o": dense(rank, shape.linear("o")[1]), "down": dense(after, shape.linear("down")[1])}
        return {"linears": linears, "slice": {"in": before, "mid": rank, "out": after}}

    def memory(self, unit: Unit, shape: Shape) -> int:
        return 3 * shape.blocks * shape.count()

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return []

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        """Nothing is predicted: every block's error depends on what is sliced before it."""
        return Frontier(unit, [float("nan")] * shape.hidden + [0.0])

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        """A stream's width is no edit of one block: see `slice_model`."""
        if rank < shape.hidden:
            raise TypeError("slicegpt cuts all blocks together and cannot be mixed with other solvers")
        return []


@dataclass(frozen=True)
class SliceGPT(Method):
    """The residual stream is rotated to its principal components, and the last ones are cut off.

    Problem: narrow the residual stream itself, so that every linear of every block gets smaller.

    Equation: RMSNorm without its weight commutes with rotations, so x ↦ Qᵀ x may change from sublayer to sublayer, Q being
    absorbed into the linears around it, with Q_prevᵀ Q_next as a shortcut matrix on the residual path. Q holds the top
    eigenvectors of Σ x xᵀ of the stream between sublayers, measured behind what is already sliced; one width for all.

    Shortcuts count as weights of the block. Only for blocks x + f(norm(x)) with RMSNorm (not LayerNorm).

    Differs from the paper: the embedding keeps its width (the first block's first shortcut rotates), as the last
    block's output does in the paper's code, so that nothing outside the blocks changes and tied matrices stay tied.

    Differs from the repository: no mean is subtracted from the embedding, which RMSNorm models do not allow; no damping
    of Σ x xᵀ, which leaves its eigenvectors as they are.
    """

    title: ClassVar[str] = "principal components of the residual stream"
    reference: ClassVar[str] = "SliceGPT, arXiv 2401.15024"
    prefix: ClassVar[str] = "compressed"

    def solvers(self) -> list[Solver]:
        return [StreamWidth()]

    def plan(self, problem: Problem, measure: Measurements) -> Planned:
        if problem.target.name not in ("any", "hf"):
            raise InputError(
                f"slicegpt changes the width of the residual stream, which {problem.target.name} cannot hold"
            )
        check_family(measure.source)
        ranks = problem.spread(lambda unit: 1.0)
        return self.decide(problem, ranks, make=partial(slice_model, measure, ranks[STREAM]))

    def plan_cache(self, problem: Problem, measure: Measurements) -> Planned:
        raise InputError("slicegpt leaves the KV cache as it is: give --keep instead of --kv-keep")


def slice_model(measure: Measurements, width: int, emit: Emit) -> None:
    """Cut the residual stream to `width` and hand every block with its spec to `emit`."""
    stream = measure.stream
    hidden = stream.start()
    basis: Tensor | None = None  # (hidden, width) of the block's input; None: as it is
    for i, shape in enumerate(measure.shapes):
        if width == shape.hidden:
            emit(i, stream.block(i), {}, {})
            continue
        with measure.phase("stream"):
            block, _ = slice_block(stream, shape, basis, None, None)
            if i == 0:
                check_block(stream, block, hidden)
            mid = principal(stream, i, block, "mlp.raw", hidden, width)
            after = None
            if i < len(measure.shapes) - 1:
                block, _ = slice_block(stream, shape, basis, mid, None)
                after = principal(stream, i, block, "block.out", hidden, width)
                hidden = stream.run(i, stream.place(block), hidden)
                hidden = [(h.double() @ after.to(h.device)).to(h.dtype) for h in hidden]
        block, spec = slice_block(stream, shape, basis, mid, after)
        emit(i, block, spec, {})
        basis = after
        if measure.progress:
            measure.progress("blocks", i + 1, len(measure.shapes))


def check_family(source: Source) -> None:
    """Only blocks x + f(norm(x)) with RMSNorm can be rotated."""
    family, block = source.family, source.block(0)
    norms = [
        n for n in (family.attention_norm, family.mlp_norm) if n and hasattr(block.get_submodule(n), "variance_epsilon")
    ]
    sandwich = family.attention_post_norm or family.mlp_post_norm
    if len(norms) < 2 or sandwich or family.factor or family.parallel or family.mlp is None or family.tuples:
        raise InputError(f"slicegpt needs blocks of the form x + f(RMSNorm(x)); {family.model_type} has others")


@torch.no_grad()
def check_block(stream: Stream, block: nn.Module, hidden: Hidden) -> None:
    """The first block, with norms folded and nothing cut, must still do what it did."""
    x = next(iter(hidden))
    one, two = (stream.forward(0, stream.place(b), x, 0).double() for b in (stream.block(0), block))
    error = float((one - two).norm() / one.norm())
    if not error < 0.05:
        raise InputError(
            f"slicegpt: {stream.family.model_type}'s blocks are not of the form x + f(RMSNorm(x)): folding the norms "
            f"changes the first block's output by {error:.0%}"
        )


def principal(stream: Stream, i: int, block: nn.Module, site: str, hidden: Hidden, width: int) -> Tensor:
    """Top eigenvectors (channels, width) of Σ x xᵀ at a site."""
    tap = Tap(site, "gram")
    stats, _ = measure_block(stream, i, stream.place(block), [tap], hidden, outputs=False)
    return eigh_descending(stats.mean(tap))[1][:, :width].cpu()


def slice_block(
    stream: Stream, shape: Shape, before: Tensor | None, mid: Tensor | None, after: Tensor | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Block with its stream in these bases (hidden, width) at its input, middle and output (None: as it is), and spec."""
    family, config = stream.family, stream.source.config
    block = stream.block(shape.block)
    weights = {r: get_linear(block, family, r) for r in shape.roles}
    gains = {r: block.get_submodule(family.mlp_norm).weight.double() for r in ("gate", "up")} | dict.fromkeys(
        "qkv", block.get_submodule(family.attention_norm).weight.double()
    )
    tensors: dict[str, Tensor] = {}
    for role in shape.roles:
        w, bias = weights[role].weight.double(), weights[role].bias
        if role in gains:
            basis = before if role in "qkv" else mid
            w = w * gains[role]
            w = w if basis is None else w @ basis
        else:
            basis = mid if role == "o" else after
            w = w if basis is None else basis.T @ w
            bias = bias if bias is None or basis is None else basis.T @ bias.double()
        tensors[f"{role}.weight"] = w
        if bias is not None:
            tensors[f"{role}.bias"] = bias
    eye = torch.eye(shape.hidden, dtype=torch.float64)
    first, second, third = (eye if q is None else q for q in (before, mid, after))
    spec = {
        "linears": {r: dense(*tensors[f"{r}.weight"].shape) for r in shape.roles},
        "slice": {"in": first.shape[1], "mid": second.shape[1], "out": third.shape[1]},
    }
    sliced = split_block(install(block, spec, family, config), family, config)
    modules = {r: get_linear(sliced, family, r) for r in shape.roles}
    modules |= {"attention_shortcut": sliced.attention_shortcut, "mlp_shortcut": sliced.mlp_shortcut}  # type: ignore[dict-item]
    tensors |= {"attention_shortcut.weight": second.T @ first, "mlp_shortcut.weight": third.T @ second}
    for name, tensor in tensors.items():
        role, _, leaf = name.partition(".")
        dtype = getattr(modules[role], leaf).dtype
        setattr(modules[role], leaf, nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False))
    return sliced.eval(), spec
