"""What the model makes of last-block outputs: logits, loss, divergence, and the gradient that calibration goes back from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.calibrate.stream import Hidden, Stream, in_order
from planish.errors import InputError

LOGITS = 1 << 23  # numbers that the head gives at a time: 64 MiB in fp64, of which sampling labels takes a few copies
WORDS = 256  # of a vocabulary whose probabilities are summed at a time
NOTHING = -100  # label of a token that predicts none


def nll(stream: Stream, hidden: Hidden) -> float:
    """Mean NLL per predicted token of the calibration windows, from last-block outputs."""
    losses = []
    for piece, h in zip(stream.pieces, hidden, strict=True):
        target = nn.functional.pad(piece.ids[:, 1:], (0, 1), value=NOTHING).flatten()
        loss, done = 0.0, 0
        for few in split_tokens(stream, h):
            logits = compute_logits(stream, few).flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            words = target[done : done + len(logits)].to(stream.device)
            loss += nn.functional.cross_entropy(logits, words, ignore_index=NOTHING, reduction="sum").item()
            done += len(logits)
        losses.append((loss, piece.ids[:, 1:].numel()))
    stream.release()
    losses = in_order(stream, losses)
    if not sum(n for _, n in losses):
        raise InputError("windows of one token have no loss to compare by: use --seq-len 2 or more")
    return sum(loss for loss, _ in losses) / sum(n for _, n in losses)


def divergence(stream: Stream, hidden: Hidden, reference: Hidden) -> float:
    """Mean KL(reference ‖ model) in nats per token, from the last-block outputs of both."""
    sums = []
    for h, r in zip(hidden, reference, strict=True):
        lost = 0.0
        for pair in zip(*(split_tokens(stream, x) for x in (h, r)), strict=True):
            logits = [compute_logits(stream, x).flatten(0, 1) for x in pair]
            for few in zip(*(x.split(256) for x in logits), strict=True):
                own, other = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in few)
                lost += float((other.exp() * (other - own)).sum())
        sums.append((lost, h.shape[0] * h.shape[1]))
    stream.release()
    sums = in_order(stream, sums)
    return max(sum(s for s, _ in sums) / sum(n for _, n in sums), 0.0)


@torch.no_grad()
def compute_logits(stream: Stream, hidden: Tensor) -> Tensor:
    """Final norm and head, by the model's own forward, for one batch of last-block outputs."""
    h = hidden.to(stream.device)
    with stream.replace_blocks(lambda i, x, *a, **k: h):
        return stream.model(inputs_embeds=as_embeddings(stream, h), use_cache=False).logits


def output_gradient(stream: Stream, hidden: Tensor, seed: int, first: int) -> Tensor:
    """Gradient of Σ NLL at last-block outputs (batch, seq, hidden), labels sampled from the model's own predictions.

    Sampled labels make the second moment of the gradient the true Fisher information. Deterministic by `seed` and
    by each sequence's number, however sequences are grouped; `first` is the number of the batch's first sequence.
    """
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + first + n) for n in range(len(hidden))]
    noise = torch.cat([torch.rand(hidden.shape[1], generator=g, dtype=torch.float64) for g in draws])
    found, done = [], 0
    for few in split_tokens(stream, hidden):
        n = few.shape[0] * few.shape[1]
        found.append(sample_gradient(stream, few, noise[done : done + n]))
        done += n
    return torch.cat(found, 1).view(hidden.shape)


def sample_gradient(stream: Stream, hidden: Tensor, noise: Tensor) -> Tensor:
    """`output_gradient` of one piece; noise (n · seq,) in [0, 1) chooses the labels."""
    h = hidden.to(stream.device).detach().clone().requires_grad_(True)
    with torch.enable_grad(), stream.replace_blocks(lambda i, x, *a, **k: h if i == len(stream) - 1 else x):
        logits = stream.model(inputs_embeds=as_embeddings(stream, h.detach()), use_cache=False).logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gradient = logits.detach().softmax(-1)  # of the NLL of label y: the probabilities, less one at y
        at = torch.device("cpu") if stream.device.type == "mps" else stream.device  # that one has no fp64
        labels = draw_labels(gradient.to(at), noise.to(at)).to(stream.device)[:, None]
        gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
        logits.backward(gradient)
    assert h.grad is not None
    return h.grad


def draw_labels(p: Tensor, noise: Tensor) -> Tensor:
    """Per row of p (n, vocabulary), not negative, the first word (n,) at which the sum so far reaches noise (n,) in [0, 1) times
    the whole. Words are summed `WORDS` at a time, and one by one only where that is reached."""
    parts = nn.functional.pad(p, (0, -p.shape[-1] % WORDS)).unflatten(-1, (-1, WORDS))
    ends = parts.sum(-1).cumsum(-1, dtype=torch.float64)  # (n, parts)
    aim = noise[:, None] * ends[:, -1:]
    part = torch.searchsorted(ends, aim).clamp(max=ends.shape[1] - 1)
    before = nn.functional.pad(ends, (1, 0)).gather(1, part)
    inside = parts.take_along_dim(part[:, :, None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
    word = torch.searchsorted(inside, (aim - before).clamp(max=inside[:, -1:]))
    return (part * WORDS + word)[:, 0].clamp(max=p.shape[-1] - 1)


def split_tokens(stream: Stream, hidden: Tensor) -> tuple[Tensor, ...]:
    """One batch of last-block outputs (n, seq, hidden) in pieces for the head: itself, or (1, tokens, hidden) where all its
    tokens' logits would be more than `LOGITS` numbers."""
    n, length, _ = hidden.shape
    tokens = LOGITS // stream.source.config.vocab_size
    if n * length <= tokens:
        return (hidden,)
    return hidden.flatten(0, 1)[None].split(min(max(tokens, 1), length), 1)


def as_embeddings(stream: Stream, hidden: Tensor) -> Tensor:
    """Something the model takes for embeddings where its blocks are replaced: opt's may have another width."""
    width = getattr(stream.model.get_input_embeddings(), "embedding_dim", hidden.shape[-1])
    return hidden if width == hidden.shape[-1] else hidden.new_zeros(*hidden.shape[:-1], width)
