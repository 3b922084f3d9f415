"""What leaving out parts of a model does to its predictions, and what leaving out two of them does together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.calibrate.activations import fetch
from planish.calibrate.losses import compute_logits
from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Hidden, Stream, in_order
from planish.calibrate.text import list_priced
from planish.modelling.blocks import get_linear
from planish.modelling.families import Family

TOKENS = 64  # whose logits are held at a time, of one part after the other
WORDS = 256  # the likeliest of a token, on which effects are compared


@dataclass(frozen=True, order=True)
class Part:
    """Some neurons of a block's feed-forward, first … last − 1, or its whole attention where there are none."""

    block: int
    first: int = 0
    last: int = 0


@contextmanager
def left_out(block: nn.Module, family: Family, part: Part) -> Iterator[None]:
    """Within the context the block is without the part: the linear that it goes through has zeros there."""
    linear = get_linear(block, family, "down" if part.last else "o")
    places = [linear.weight.data[:, part.first : part.last] if part.last else linear.weight.data]
    places += [linear.bias.data] if not part.last and linear.bias is not None else []
    kept = [p.clone() for p in places]
    for p in places:
        p.zero_()
    try:
        yield
    finally:
        for p, old in zip(places, kept, strict=True):
            p.copy_(old)


def measure_interactions(measure: Measurements, few: Stream, parts: Sequence[Part]) -> Tensor:
    """H (parts, parts) = mean over tokens of φ_uᵀ φ_v, in fp64: ½ 1ᵀ H 1 over a set of parts is what leaving out all of it is
    taken to lose, in nats per token, and ½ H_uu what one of them alone does, to second order.

    Per token, over its `WORDS` likeliest words with probabilities p that sum to 1: φ_u = √p ⊙ (d − pᵀ d), d = the uncompressed
    model's logits − those without u. Costs, per part, the windows of `few` through the blocks behind it, and the head.
    Reference: CoCurve (arXiv 2607.17568).
    """
    found = []
    for piece in few.pieces:
        alone = few.part(piece.ids)
        found.append(add_effects(alone, *run_without(measure, alone, parts)))
    few.release()
    sums = in_order(few, [(total.cpu(), n) for total, n in found])
    return torch.stack([total for total, _ in sums]).sum(0) / sum(n for _, n in sums)


@torch.no_grad()
def run_without(measure: Measurements, stream: Stream, parts: Sequence[Part]) -> tuple[Hidden, list[Hidden]]:
    """What the last block puts out of the whole model, and without each of the parts alone."""
    hidden, found = stream.start(), dict[Part, Hidden]()
    for i in range(len(stream)):
        block = stream.place(stream.block(i))
        flows: dict[Part, Hidden] = {}
        for part in (p for p in parts if p.block == i):
            with left_out(block, stream.family, part):
                flows[part] = stream.run(i, block, hidden)
        hidden = stream.run(i, block, hidden)
        for j in range(i + 1, len(stream)):
            behind = stream.place(stream.block(j))
            flows = {p: stream.run(j, behind, h) for p, h in flows.items()}
        found |= flows
        if measure.progress:
            measure.progress("ablations", i + 1, len(stream))
    return hidden, [found[p] for p in parts]


def add_effects(stream: Stream, whole: Hidden, without: Sequence[Hidden]) -> tuple[Tensor, int]:
    """Σ over tokens that are priced of φ_uᵀ φ_v (parts, parts), and how many tokens these are."""
    total, tokens = torch.zeros(len(without), len(without), dtype=torch.float64), 0
    for n, piece in enumerate(stream.pieces):
        priced = list_priced(piece.ids).flatten().to(stream.device)
        outputs = [fetch(h, n, stream.device).flatten(0, 1)[priced][None] for h in (whole, *without)]
        for pieces in zip(*(h.split(TOKENS, 1) for h in outputs), strict=True):
            dense = compute_logits(stream, pieces[0])[0].double()
            words = dense.topk(min(WORDS, dense.shape[1])).indices
            dense = dense.gather(1, words)
            p = dense.softmax(1)
            effects = []
            for h in pieces[1:]:
                d = dense - compute_logits(stream, h)[0].gather(1, words).double()
                effects.append((p.sqrt() * (d - (p * d).sum(1, keepdim=True))).flatten())
            phi = torch.stack(effects)
            total += (phi @ phi.T).cpu()
            tokens += len(dense)
    return total, tokens
