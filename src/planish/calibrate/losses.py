"""What the model makes of last-block outputs: logits, loss, divergence, and the gradient that calibration goes back from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from planish.calibrate.stream import Hidden, Stream, in_order
from planish.calibrate.text import list_aside, list_priced, unmark
from planish.errors import InputError

LOGITS = 1 << 23  # numbers that the head gives at a time: 64 MiB in fp64, of which sampling labels takes a few copies
WORDS = 256  # of a vocabulary whose probabilities are summed at a time
NOTHING = -100  # label of a token that predicts none
TOP = 5  # words of a token whose curvature is sent back (IO-SVD, arXiv 2605.15626)

BITS = 31  # signs that a number of 32 bits holds

Probe = Literal["sampled", "text", "curvature", "signs"]  # what is sent back: see `output_gradient`


def nll(stream: Stream, hidden: Hidden) -> float:
    """Mean NLL per predicted token of the calibration windows that is priced, from last-block outputs."""
    sums, counts = window_losses(stream, hidden)
    return float(sums.sum() / counts.sum())


def window_losses(stream: Stream, hidden: Hidden) -> tuple[Tensor, Tensor]:
    """(Summed NLL, number) of the predicted tokens of every calibration window that are priced, both (windows,) fp64."""
    losses = []
    for piece, h in zip(stream.pieces, hidden, strict=True):
        target, found, done = list_labels(piece.ids), list[Tensor](), 0
        for few in split_tokens(stream, h):
            logits = compute_logits(stream, few).flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            words = target[done : done + len(logits)].to(stream.device)
            found.append(nn.functional.cross_entropy(logits, words, ignore_index=NOTHING, reduction="none").cpu())
            done += len(logits)
        of_windows = [x.view(len(piece.ids), -1).double().sum(1) for x in (torch.cat(found), target != NOTHING)]
        losses.append(torch.stack(of_windows))
    stream.release()
    sums, counts = torch.cat(in_order(stream, losses), 1)
    if not counts.sum():
        raise InputError(
            "windows of one token, or without an answer, have no loss to compare by: use a larger --seq-len"
        )
    return sums, counts


def divergence(
    stream: Stream, hidden: Hidden, reference: Hidden, temperature: float = 1.0, behind: float = 0.0
) -> float:
    """Mean KL(reference ‖ model) in nats per token that is priced, from the last-block outputs of both.

    `temperature`: both logits are divided by it. `behind`: share of every window, from its start, that is left out.
    """
    sums = []
    for piece, h, r in zip(stream.pieces, hidden, reference, strict=True):
        lost, start, done = 0.0, int(behind * h.shape[1]), 0
        h, r, priced = h[:, start:], r[:, start:], list_priced(piece.ids[:, start:]).flatten().to(stream.device)
        for pair in zip(*(split_tokens(stream, x) for x in (h, r)), strict=True):
            logits = [compute_logits(stream, x).flatten(0, 1) for x in pair]
            logits = logits if temperature == 1 else [x / temperature for x in logits]
            for few in zip(*(x.split(256) for x in logits), strict=True):
                own, other = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in few)
                some, done = priced[done : done + len(own)], done + len(own)
                lost += float((other.exp() * (other - own))[some].sum())
        sums.append((lost, int(priced.sum())))
    stream.release()
    sums = in_order(stream, sums)
    if not sum(n for _, n in sums):
        raise InputError("windows without an answer have no divergence to compare by: use a larger --seq-len")
    return max(sum(s for s, _ in sums) / sum(n for _, n in sums), 0.0)


@torch.no_grad()
def compute_logits(stream: Stream, hidden: Tensor) -> Tensor:
    """Final norm and head, by the model's own forward, for one batch of last-block outputs."""
    h = hidden.to(stream.device)
    with stream.replace_blocks(lambda i, x, *a, **k: h):
        return stream.model(**as_embeddings(stream, h), use_cache=False).logits


def output_gradients(
    stream: Stream, outputs: Hidden, seed: int = 0, probe: Probe = "sampled", aside: int = 0
) -> Iterator[Tensor]:
    """What is sent back from every batch's last-block outputs: `output_gradient` of tokens that predict what is priced, else 0.

    Second moments are means over all tokens, and losses are of one that is priced: gradients are longer by the root of how many
    tokens there are for one, among the windows that are set aside, one in `aside`, and among the others.
    """
    priced = list_priced(torch.cat(stream.batches))
    out = torch.zeros(len(priced), dtype=torch.bool)
    out[list_aside(0, len(priced), aside)] = True
    longer = torch.ones(len(priced), dtype=torch.float64)
    for some in (out, ~out):
        longer[some] = priced[some].double().mean().clamp(min=1 / priced.numel()).rsqrt()
    for piece, hidden in zip(stream.pieces, outputs, strict=True):
        found = output_gradient(stream, hidden, seed, piece.first, probe, piece.ids)
        if not priced.all():
            here = slice(piece.first, piece.first + len(found))
            weight = (priced[here] * longer[here, None])[..., None]
            found = found * weight.to(found.device, found.dtype)
        yield found


def output_gradient(
    stream: Stream, hidden: Tensor, seed: int, first: int, probe: Probe = "sampled", ids: Tensor | None = None
) -> Tensor:
    """What calibration sends back from last-block outputs (batch, seq, hidden), per token ∂(vᵀ logits)/∂h.

    `probe` says which v, p being the model's probabilities and e_y the unit vector of word y:

    - "sampled": p − e_y, the gradient of the NLL of a label y drawn from p. E[v vᵀ] = diag(p) − p pᵀ: the true Fisher
      information, which is also the curvature of the KL from the model.
    - "text": p − e_y with y the next token of the text, `ids` (batch, seq): the empirical Fisher. The last token of a window has
      none, and sends nothing back.
    - "curvature": Σ_k ε_k √p_k (e_k − p) over the `TOP` most likely words k, with random signs ε: E[v vᵀ] =
      Σ_k p_k (e_k − p)(e_k − p)ᵀ, which over all words is the curvature again; here without the noise of a drawn label.
    - "signs": the same over all words. E[v vᵀ] is that of "sampled" exactly, and where the model is sure of a word v is small for
      every draw, in place of large for a few.

    Deterministic by `seed` and by each sequence's number, however sequences are grouped; `first` is the number of the batch's
    first sequence.
    """
    aims, done, found = aim(hidden, seed, first, probe, ids, stream.source.config.vocab_size), 0, []
    for few in split_tokens(stream, hidden):
        n = few.shape[0] * few.shape[1]
        found.append(probe_gradient(stream, few, probe, aims[done : done + n]))
        done += n
    return torch.cat(found, 1).view(hidden.shape)


def aim(hidden: Tensor, seed: int, first: int, probe: Probe, ids: Tensor | None, words: int) -> Tensor:
    """What decides v per token (n · seq, …): a number in [0, 1) that chooses a label, the label itself, `TOP` signs, or `BITS` of
    the signs of all `words` in every number."""
    if probe == "text":
        assert ids is not None
        return list_labels(ids)
    length = hidden.shape[1]
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + first + n) for n in range(len(hidden))]
    if probe == "sampled":
        return torch.cat([torch.rand(length, generator=g, dtype=torch.float64) for g in draws])
    if probe == "signs":
        size, most = (length, -(-words // BITS)), 1 << BITS
        return torch.cat([torch.randint(most, size, generator=g).to(torch.int32) for g in draws])
    return torch.cat([torch.randint(2, (length, TOP), generator=g) for g in draws]) * 2 - 1


def list_labels(ids: Tensor) -> Tensor:
    """The next token (n · seq,) of every token in windows (n, seq), `NOTHING` where there is none or it is not priced."""
    following = unmark(ids[:, 1:]).masked_fill(~list_priced(ids[:, :-1]), NOTHING)
    return nn.functional.pad(following, (0, 1), value=NOTHING).flatten()


def probe_gradient(stream: Stream, hidden: Tensor, probe: Probe, aims: Tensor) -> Tensor:
    """`output_gradient` of one piece; `aims` (n · seq, …) as `aim` gives them."""
    h = hidden.to(stream.device).detach().clone().requires_grad_(True)
    with torch.enable_grad(), stream.replace_blocks(lambda i, x, *a, **k: h if i == len(stream) - 1 else x):
        logits = stream.model(**as_embeddings(stream, h.detach()), use_cache=False).logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = logits.detach().softmax(-1)
        if probe in ("curvature", "signs"):
            mix = mix_words if probe == "curvature" else sign_words
            logits.backward(mix(p, aims.to(stream.device)))
        else:
            at = torch.device("cpu") if stream.device.type == "mps" else stream.device  # that one has no fp64
            labels = aims if probe == "text" else draw_labels(p.to(at), aims.to(at))
            logits.backward(miss_labels(p, labels.to(stream.device)))
    assert h.grad is not None
    return h.grad


def miss_labels(p: Tensor, labels: Tensor) -> Tensor:
    """p − e_y for labels y (n,), in place of p (n, vocabulary); 0 where there is none."""
    known = labels >= 0
    at = labels.clamp(min=0)[:, None]
    return p.scatter_add_(1, at, p.new_full(at.shape, -1.0)).mul_(known[:, None])


def mix_words(p: Tensor, signs: Tensor) -> Tensor:
    """Σ_k ε_k √p_k (e_k − p) (n, vocabulary) over the most likely words, as many as there are signs ε (n, words)."""
    top, words = p.topk(min(signs.shape[1], p.shape[1]))
    weight = top.sqrt() * signs[:, : top.shape[1]]
    return (p * -weight.sum(1, keepdim=True)).scatter_add_(1, words, weight)


def sign_words(p: Tensor, bits: Tensor) -> Tensor:
    """Σ_k ε_k √p_k (e_k − p) (n, vocabulary) over all words, ε_k the k-th of the `bits` (n, numbers), `BITS` in each."""
    signs = (bits[:, :, None] >> torch.arange(BITS, dtype=bits.dtype, device=bits.device)).bitwise_and_(1)
    weight = p.sqrt() * signs.flatten(1)[:, : p.shape[1]].mul_(2).sub_(1)
    return weight.addcmul_(p, weight.sum(1, keepdim=True), value=-1)


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


def as_embeddings(stream: Stream, hidden: Tensor) -> dict[str, Tensor]:
    """Something the model takes for embeddings where its blocks are replaced: opt's may have another width, and gemma4 is given
    what every block gets of its tokens."""
    width = getattr(stream.model.get_input_embeddings(), "embedding_dim", hidden.shape[-1])
    given = {"inputs_embeds": hidden if width == hidden.shape[-1] else hidden.new_zeros(*hidden.shape[:-1], width)}
    if stream.family.per_token and (each := getattr(stream.source.config, stream.family.per_token[0])):
        given[f"{stream.family.per_token[1]}s"] = hidden.new_zeros(*hidden.shape[:-1], len(stream), each)
    return given
