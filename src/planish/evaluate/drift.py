"""How far a compressed model's activations and predictions are from the dense model's, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.calibrate.text import eval_windows
from planish.folder.config import is_compressed
from planish.modelling.blocks import find_blocks
from planish.modelling.families import FAMILIES
from planish.modelling.wrappers import find_language_model

TOKENS, LOGITS = 1024, 1 << 26  # at most so many tokens, and so many logits


@dataclass
class Trace:
    """What a model makes of windows (n, seq): every block's output and the logits, on the CPU."""

    blocks: list[Tensor]  # (n, seq, hidden)
    logits: Tensor  # (n, seq, vocabulary)


@dataclass
class Drift:
    """`blocks`: Σ|x − x_dense|² / Σ|x_dense|² of each block's output; a removed block's output is its input.

    `kl`: mean KL(dense ‖ compressed) of the next token's distribution, in nats per token.
    """

    kl: float
    blocks: list[float]


def choose_windows(tokens: Tensor, seq_len: int, vocabulary: int, begin: int | None = None) -> Tensor:
    """The first few windows (n, seq) of a text, small enough to keep a trace of."""
    seq = min(seq_len, 256, len(tokens))
    n = max(1, min(TOKENS // seq, LOGITS // (seq * vocabulary), len(tokens) // seq))
    return eval_windows(tokens, seq, begin)[:n]


@torch.no_grad()
def trace(model: nn.Module, windows: Tensor) -> Trace:
    """Run a dense or compressed causal LM and keep what its blocks put out."""
    config = model.config.get_text_config()
    family = FAMILIES[config.planish["family"] if is_compressed(config) else config.model_type]
    seen: list[Tensor] = []

    def see(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).float().cpu())

    handles = [block.register_forward_hook(see) for block in find_blocks(find_language_model(model), family)]
    try:
        logits = model(input_ids=windows.to(model.get_input_embeddings().weight.device), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return Trace(seen, logits.float().cpu())


def compare(dense: Trace, other: Trace, removed: Sequence[int] = ()) -> Drift:
    """`removed`: numbers of the dense model's blocks that the other one has not."""
    p, q = dense.logits.log_softmax(-1), other.logits.log_softmax(-1)
    kl = float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double().mean())
    left = [i for i in range(len(dense.blocks)) if i not in removed]
    drifts: list[float] = []
    if len(left) == len(other.blocks):
        at = dict(zip(left, other.blocks, strict=True))
        current: Tensor | None = None
        for i, x in enumerate(dense.blocks):
            current = at.get(i, current)
            error = float("nan") if current is None else float((current - x).square().sum() / x.square().sum())
            drifts.append(error)
    return Drift(kl, drifts)
