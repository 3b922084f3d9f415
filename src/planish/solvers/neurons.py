"""Selection of MLP neurons with a least-squares (Nyström) refit of the down projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from planish import stats as stats_file
from planish.core import Edit, Frontier, Shape, Unit, Weights
from planish.solvers.forms import NeuronSolver, keep_neurons, neuron_edits
from planish.solvers.grams import TILE, Refits, order_neurons, slicing_losses
from planish.stats import Stats, Tap


@dataclass(frozen=True)
class Neurons(NeuronSolver):
    """Keep the r best neurons of an MLP: rows of gate and up, columns of down, which is then refitted.

    `score`: "leverage" = ridge leverage diag(C (C + λI)⁻¹) with λ = ridge · mean diag C (FLAT-LLM, MoDeGPT);
    "energy" = E[x_i²] ‖w_i‖² (A3, equal to its λ_i because R^½ is symmetric). `refit`: least squares of down on the
    kept neurons; otherwise its columns are sliced. Predicted loss: E‖W x − W' x_J‖² exactly, at every rank, from one
    Cholesky factor in the order of the scores, inside the Gram (see `planish.solvers.grams`).

    Differs from FLAT-LLM's repository: λ is relative to the Gram's scale (its λ = 1 on an unnormalised Gram
    saturates every score near 1), and the refit is damped (its inverse is not).
    """

    name: ClassVar[str] = "neurons"
    score: Literal["leverage", "energy"] = "leverage"
    ridge: float = 1e-2
    refit: bool = True
    damping: float = 1e-10

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return [Tap("down.in", "gram")]

    def memory(self, unit: Unit, shape: Shape) -> int:
        n = shape.intermediate
        own = n * n if 8 * n * n < stats_file.WIDE else 0  # a copy of the Gram, unless it is wide
        return own + 3 * shape.hidden * n + 4 * TILE * n

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        gram, tokens = stats.take(Tap("down.in", "gram"))
        down = weights["down"]
        order = order_neurons(gram, down, self.score, self.ridge)
        factors = {n: weights[n] for r in ("gate", "up", "down") for n in (r, f"{r}.bias") if n in weights}
        if not self.refit:
            return Frontier(unit, slicing_losses(gram, down, order) / tokens, factors | {"order": order})
        refits = Refits(gram, down, order, self.damping)
        return Frontier(unit, refits.losses() / tokens, factors | {"order": order, "refits": refits})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.intermediate:
            return []
        return neuron_edits(frontier.factors, *keep_neurons(frontier.factors, rank))


@dataclass(frozen=True)
class ChosenNeurons(Neurons):
    """The neurons `kept` stay, whatever the activations; their columns of down are multiplied by `gains`, if there are any.

    Nothing is predicted.
    """

    name: ClassVar[str] = "chosen-neurons"
    kept: tuple[int, ...] = ()
    gains: tuple[float, ...] = ()

    def taps(self, unit: Unit, shape: Shape) -> list[Tap]:
        return []

    def decompose(self, unit: Unit, weights: Weights, stats: Stats, shape: Shape) -> Frontier:
        loss = torch.full((shape.intermediate + 1,), torch.nan, dtype=torch.float64)
        loss[-1] = 0.0
        return Frontier(unit, loss, {n: w for n, w in weights.items() if n.partition(".")[0] in ("gate", "up", "down")})

    def truncate(self, frontier: Frontier, rank: int, shape: Shape) -> list[Edit]:
        if rank >= shape.intermediate:
            return []
        f, kept = frontier.factors, torch.tensor(self.kept)
        down = f["down"].double()[:, kept]
        gains = (
            torch.tensor(self.gains, dtype=torch.float64) if self.gains else torch.ones(len(kept), dtype=torch.float64)
        )
        return neuron_edits(f, kept, down * gains)
