"""The inside of experts, cut in predicted nats: neurons, every expert its own ones.

A mixture puts out y = Σ_j g_j f_j(x). A cut inside expert j changes that by e = g_j (f'_j − f_j) for the tokens that reach it and
for no other, which costs ½ E[(uᵀ e)²] ≈ ½ tr(G E[e eᵀ]) nats per token: u the gradient at y, G = E[u uᵀ] over all tokens, gates
within e. So neurons are priced as whole experts are (`planish.solvers.experts`), but for u and e being taken for independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.core import Edit, Frontier, Shape, Unit, Weights
from planish.shapes import Float
from planish.solvers.forms import ExpertSolver, find_experts, neuron_edits, of_expert, read_expert
from planish.solvers.linalg import eigh_root, multiply
from planish.solvers.selection import nystrom, select_greedily
from planish.stats import Stats, Tap

METRIC = Tap("grad:experts.out", "gram")


@dataclass(frozen=True)
class FisherExpertNeurons(ExpertSolver):
    """Keep the r neurons of every expert that matter most to the loss; down is refitted. One width for all experts of a block.

    As `planish.solvers.fisher_structural.FisherNeurons` for every expert, on the inputs of its down times the token's gate.
    Predicted loss: the sum over experts, per token of the block.

    Damping follows the tokens: each expert's Gram gets those of `prior` tokens more, of the mean length and in no direction. An
    expert of a few tokens then has a Gram of full rank, is not fitted to these alone, and is not free to cut.
    """

    name: ClassVar[str] = "fisher-expert-neurons"
    prior: float = 4.0
    damping: float = 1e-4

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [*(Tap(f"expert.{n}.down.gated", "gram") for n in range(find_experts(shape).number)), METRIC]

    def dense_taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [t.twin or t for t in self.taps(unit, shape)]

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        e, root = find_experts(shape), eigh_root(stats.mean(METRIC))[0].T
        grams = gather_grams(stats, [t for t in self.taps(unit, shape) if t != METRIC], e.top, self.prior)
        loss, factors = torch.zeros(e.intermediate + 1, dtype=torch.float64), dict[str, Any]()
        for n, gram in enumerate(grams):
            own = read_expert(weights, n, e)
            order, lost = select_greedily(gram, multiply(root, own["down"].double()), self.damping)
            loss += lost / 2
            factors[str(n)] = own | {"order": order, "gram": gram}
        return Frontier(unit, loss, factors, nats=True)

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        edits = list[Edit]()
        for n, f in frontier.factors.items() if rank < find_experts(shape).intermediate else ():
            kept = f["order"][:rank].sort().values
            edits += of_expert(n, neuron_edits(f, kept, nystrom(f["gram"], kept, f["down"], self.damping)))
        return edits


def gather_grams(stats: Stats, taps: Sequence[Tap], top: int, prior: float) -> list[Float[Tensor, "inner inner"]]:
    """Of every expert's tap Σ x xᵀ over the tokens of the block, per token of it; where only the uncompressed prefix was
    measured, of that one. The Gram of `prior` tokens of the mean length is added to each, the same in all directions."""
    own = [t if t in stats.sums else t.twin or t for t in taps]
    sums, number = [stats.sums[t]["sum"] for t in own], sum(stats.tokens[t] for t in own)
    level = prior * sum(float(s.trace()) for s in sums) / max(number, 1) / len(sums[0])
    return [(s + level * torch.eye(len(s), dtype=s.dtype)) / max(number // top, 1) for s in sums]
