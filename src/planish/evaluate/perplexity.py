"""Perplexity as the papers measure it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.calibrate.text import check_ids, eval_windows
from planish.errors import InputError

_LOGITS_AT_ONCE = 1 << 24  # elements; 64 MiB in fp32
NOT_FINITE = "the model's logits are not finite · check its weights, or load it in float32"


@dataclasses.dataclass(frozen=True)
class Perplexity:
    perplexity: float
    nll: float  # nats per predicted token
    tokens: int  # predicted: windows · (seq_len - 1)
    windows: int
    seq_len: int
    dtype: str  # of the model


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    seq_len: int,
    *,
    begin: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a Hugging Face causal LM over ``tokens`` (n,) int64.

    Equivalent to::

        windows = tokens[: n // seq_len * seq_len].view(-1, seq_len)     # no overlap, the tail is dropped
        logp = model(windows).logits[:, :-1].float().log_softmax(-1)
        nll = -logp.gather(-1, windows[:, 1:, None]).mean();  perplexity = nll.exp()

    but a batch at a time, and the logits of a batch in pieces, so that memory does not grow with the vocabulary.
    ``begin``: an id that every window begins with, which takes the place of one of the text's tokens (see
    `planish.calibrate.text.cut_window`). ``max_windows``: only the first so many windows.
    The forward pass runs in the model's own dtype; log-softmax in fp32; the sum over tokens in fp64.

    ``device``: the model is moved there first; None: the model stays where it is. ``progress(done, total)`` is called
    before the first batch and after each, with numbers of windows. Raises `InputError` for a sequence longer than the model's
    positions, ids beyond its vocabulary, too few tokens, and for logits that are not finite: a window is never skipped.
    """
    _check(model, tokens, seq_len)
    windows = eval_windows(tokens, seq_len, begin)[:max_windows]
    if device is not None:
        model.to(device)
    at = model.get_input_embeddings().weight.device
    dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    training = model.training
    model.eval()
    total = 0.0
    if progress is not None:
        progress(0, len(windows))
    try:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(at)
            losses = token_losses(model, batch)
            finite = losses.isfinite().all(dim=1)
            if not finite.all():
                first = start + int((~finite).nonzero()[0])
                other = "bfloat16 or float32" if dtype == "float16" else "float32"
                raise InputError(
                    f"the model's logits are not finite · window {first} of {len(windows)} "
                    f"(tokens {first * seq_len} to {(first + 1) * seq_len - 1}) · got a model in {dtype} · "
                    f"check its weights, or load it in {other}"
                )
            total += losses.double().sum().item()
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        model.train(training)
    count = len(windows) * (seq_len - 1)
    return Perplexity(_exp(total / count), total / count, count, len(windows), seq_len, dtype)


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p(ids[:, t+1] | ids[:, :t+1]) in nats, (batch, seq_len - 1) fp32, for ids (batch, seq_len) int64.

    The decoder runs once. The rest of the model's own ``forward`` (head, scaling, soft-capping) then runs on pieces of
    the decoder's output, so that at most some 16 million logits exist at a time.
    """
    step = max(1, _LOGITS_AT_ONCE // (len(ids) * model.config.get_text_config().vocab_size))
    losses = [
        F.cross_entropy(
            logits.float().flatten(0, 1), ids[:, a : a + logits.shape[1]].flatten().to(logits.device), reduction="none"
        ).view(len(ids), -1)
        for a, logits in pieces_of_logits(model, ids, step)
    ]
    return torch.cat(losses, dim=1)


def pieces_of_logits(model: nn.Module, ids: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (t, logits that predict ids[:, t], ids[:, t+1], …) in order, ``step`` positions at a time."""
    last = ids.shape[1] - 1
    if step >= last:
        yield 1, model(input_ids=ids, use_cache=False).logits[:, :-1]
        return
    hidden, head = split_forward(model, input_ids=ids)
    for a in range(0, last, step):
        yield a + 1, head(hidden[:, a : min(a + step, last)])


def split_forward(model: nn.Module, **inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The decoder's output (batch, seq, hidden), and what makes logits of any part of it, (batch', seq', hidden).

    The second is the rest of the model's own ``forward``: head, scaling, soft-capping. Where a forward cannot be split,
    logits of all positions, and a function that returns what it is given.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if decoder is None or decoder is model:
        return model(**inputs, use_cache=False).logits, lambda logits: logits
    seen: list[Any] = []
    hook = decoder.register_forward_hook(lambda module, args, output: seen.append(output))
    # One position is enough for now: what matters is the decoder's output. (As a tensor: the last one by an integer is a
    # strided slice, and products of bf16 with those take up to 30 times as long on a CPU.)
    few: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        few["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=next(iter(inputs.values())).device)
    try:
        logits = model(**inputs, use_cache=False, **few).logits
    finally:
        hook.remove()
    if len(seen) != 1 or not hasattr(seen[0], "last_hidden_state"):
        if few:
            logits = model(**inputs, use_cache=False).logits
        return logits, lambda logits: logits
    output = seen[0]

    def head(hidden: Tensor) -> Tensor:
        with _answering(decoder, dataclasses.replace(output, last_hidden_state=hidden.contiguous())):
            return model(**inputs, use_cache=False).logits

    return output.last_hidden_state, head


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Let ``module`` return ``output`` without computing anything."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _check(model: nn.Module, tokens: Tensor, seq_len: int) -> None:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        hint = f"use --seq-len {positions}" if positions > 1 else "no window of 2 tokens or more fits it"
        raise InputError(
            f"windows are longer than the model's context · got seq_len {seq_len} · "
            f"expected at most max_position_embeddings {positions} · {hint}"
        )
    check_ids(tokens.cpu().numpy(), "evaluation tokens", config.vocab_size)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
