"""Degenerate models and texts: every method gives finite weights within the budget, or one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.errors import InputError
from planish.folder.load import load
from planish.methods import find_class, list_methods
from test_resume import one_thread  # noqa: F401
from tiny import compress

QUICK = ("flat-llm", "a3", "svd-llm", "erc-svd", "subfit", "shortgpt", "auto")  # one or two of every kind of method
KEEP = {"nbl": 0.85, "palu": 0.85}  # what they cut of the tiny model, attentions or the cache alone, does not reach 0.7
METHODS = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in list_methods()]
SEARCHING = ("erc-svd", "subfit", "auto")  # of these, what solves many times: each tries every third case


def randomly(n: int = 24, seq: int = 16) -> Tensor:
    return tiny.windows(n, seq)


def constant_activations(model: nn.Module) -> None:
    table = model.get_input_embeddings().weight
    table.copy_(table[:1].expand_as(table))


def dead_neurons(model: nn.Module) -> None:
    """A third of the neurons never fire, another third is never read, two are copies of each other."""
    for block in model.model.layers:
        block.mlp.up_proj.weight[:15] = 0
        block.mlp.down_proj.weight[:, 15:30] = 0
        block.mlp.up_proj.weight[40], block.mlp.gate_proj.weight[40] = (
            block.mlp.up_proj.weight[41],
            block.mlp.gate_proj.weight[41],
        )


def dead_heads(model: nn.Module) -> None:
    """Values of one kv head and queries of another one are zero."""
    for block in model.model.layers:
        block.self_attn.v_proj.weight[:8] = 0
        block.self_attn.q_proj.weight[-8:] = 0


def low_rank(model: nn.Module) -> None:
    """Every input lies in a space of four dimensions."""
    table = model.get_input_embeddings().weight
    table.copy_(table[:, :4] @ torch.randn(4, table.shape[1], generator=torch.Generator().manual_seed(0)))


def massive(model: nn.Module) -> None:
    """One channel of the residual stream is ten thousand times the others."""
    model.get_input_embeddings().weight[:, 3] *= 1e4


def padded_vocabulary(model: nn.Module) -> None:
    """Rows beyond the tokenizer's words, as padding to a multiple leaves them."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[80:] = 0


CASES: dict[str, tuple[Callable[[nn.Module], object], Tensor]] = {
    "duplicated tokens": (lambda model: None, torch.full((24, 16), 7)),
    "two tokens": (lambda model: None, torch.tensor([5, 9]).repeat(24, 8)),
    "constant activations": (constant_activations, randomly()),
    "dead neurons": (dead_neurons, randomly()),
    "dead heads": (dead_heads, randomly()),
    "rank-deficient inputs": (low_rank, randomly()),
    "fewer tokens than channels": (lambda model: None, randomly(3, 6)),
    "massive activations": (massive, randomly()),
    "sequences of length 1": (lambda model: None, randomly(200, 1)),
    "one sample": (lambda model: None, randomly(1, 60)),
    "padded vocabulary": (padded_vocabulary, randomly().clamp(max=79)),
}


def try_it(model: Path, output: Path, method: str, windows: Tensor, **more: object) -> nn.Module | None:
    """The compressed model, or None where one line says what is wrong."""
    fields = find_class(method)[1].__dataclass_fields__
    settings = {"damping": 0.01} if "damping" in fields and windows.numel() < 50 else {}
    keep = KEEP.get(method, 0.7)
    try:
        result = compress(model, output=output, keep=keep, method=method, windows=windows, settings=settings, **more)
    except InputError as error:
        refused = str(error)
    else:
        assert 0 < result.keep <= keep + 1e-9
        return load(output)
    assert "\n" not in refused and len(refused) > 20
    assert not output.exists() and not output.with_name("out.partial").exists()
    return None


DEGENERATE = [(m, case) for m in list_methods() for case in CASES]
SOON = [(m, case) for m in QUICK if m not in SEARCHING for case in CASES]
SOON += [(m, case) for i, m in enumerate(SEARCHING) for case in list(CASES)[i :: len(SEARCHING)]]


@pytest.mark.parametrize(("method", "case"), tiny.pick(SOON, DEGENERATE))
@pytest.mark.filterwarnings("ignore:damping raised")  # some have no factor without
def test_degenerate(method, case, tmp_path):
    change, windows = CASES[case]
    model = tiny.build("llama_gqa")
    with torch.no_grad():
        change(model)
    small = try_it(tiny.save(model, tmp_path / "model"), tmp_path / "out", method, windows)
    if small is None:  # only what a Gram of these texts cannot hold may be refused
        assert case in ("fewer tokens than channels", "sequences of length 1", "one sample")
        return
    with torch.no_grad():
        logits = small(input_ids=windows[:4]).logits
        dense = model(input_ids=windows[:4]).logits
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p).all() for p in small.parameters())
    # cutting 30 % never makes it worse than no model at all: scores of the same size, not exploded
    assert float(logits.abs().max()) < 10 * float(dense.abs().max()) + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:damping raised")  # some have no factor without
def test_overflow(method, kind, tmp_path):
    """Activations beyond the computing dtype: one line, or a finite model; never a silent infinity."""
    model = tiny.build("llama_gqa")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight *= 1e3 if kind == torch.float16 else 1e18
            block.mlp.gate_proj.weight *= 1e2 if kind == torch.float16 else 1e19
    model = model.to(kind)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    small = try_it(tiny.save(model, tmp_path / "model"), tmp_path / "out", method, randomly(), dtype=kind)
    assert small is None or all(torch.isfinite(p).all() for p in small.parameters())
