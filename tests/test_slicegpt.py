"""SliceGPT: rotations change nothing, slicing keeps what the principal components hold."""

from __future__ import annotations

import pytest
import torch

import tiny
from planish.apply import count_block
from planish.calibrate.stream import Stream
from planish.errors import InputError
from planish.folder.source import open_source
from planish.methods import find_method
from planish.methods.slicegpt import STREAM, slice_block
from planish.modelling.modules import SlicedBlock
from posed import Posed, pose_on
from tiny import compress, load

WINDOWS = tiny.windows(6, 20)
FAMILIES = ["llama_gqa", "llama_bias", "llama_tied", "qwen2", "qwen3", "phi3"]


def job(name: str, keep: float = 0.8, dtype: torch.dtype = torch.float64) -> Posed:
    stream = Stream(open_source(tiny.build(name, dtype)), WINDOWS, dtype=dtype)
    return pose_on(stream, find_method("slicegpt"), keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_alone_change_nothing(family):
    """Three random orthogonal bases, none cut: every block gives its own output in another basis."""
    stream = job(family).measure.stream
    hidden, d = stream.start(), stream.source.config.hidden_size
    g = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q for _ in range(3)]
    for i in range(len(stream)):
        block, _ = slice_block(stream, stream.source.shape(i), *bases)
        expected = stream.run(i, stream.block(i), hidden)
        found = stream.run(i, block, [h @ bases[0] for h in hidden])
        for x, y in zip(expected, found, strict=True):
            assert torch.allclose(x @ bases[2], y, atol=2e-5)  # stock norms compute in fp32
        hidden = expected


@pytest.mark.parametrize("family", FAMILIES)
def test_written_weights_meet_the_budget_and_load_again(family, tmp_path):
    model = tiny.build(family)
    result = compress(model, output=tmp_path / "a", keep=0.7, method="slicegpt", windows=WINDOWS)
    loaded = load(tmp_path / "a")
    blocks = [m for m in loaded.modules() if isinstance(m, SlicedBlock)]
    j = job(family, 0.7, torch.float32)
    width = j.plan().ranks[STREAM]
    assert sum(map(count_block, blocks)) == result.block_params_after == j.problem.cost(STREAM, width)
    assert result.block_params_after <= 0.7 * result.block_params_before < j.problem.cost(STREAM, width + 1)
    ids = tiny.windows(2, 9)
    assert torch.equal(loaded(input_ids=ids).logits, load(tmp_path / "a")(input_ids=ids).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **greedy), loaded.generate(ids, use_cache=False, **greedy))


def test_a_stream_of_low_rank_is_sliced_without_loss(tmp_path):
    """If embedding and every output projection write into a subspace, cutting the rest is exact."""
    model = tiny.build("llama_gqa", torch.float64)
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(32, 12, generator=g, dtype=torch.float64)).Q
    with torch.no_grad():
        e = model.model.embed_tokens.weight
        e.copy_(e @ q @ q.T)
        for block in model.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.copy_(q @ q.T @ linear.weight)
    result = compress(model, output=tmp_path / "a", keep=0.6, method="slicegpt", windows=WINDOWS, dtype=torch.float64)
    assert result.keep < 0.6
    ids = tiny.windows(2, 12, seed=9)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "a")(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)


def test_keep_one_leaves_the_model_as_it_is(tmp_path):
    model = tiny.build("llama_gqa")
    assert compress(model, output=tmp_path / "a", keep=1.0, method="slicegpt", windows=WINDOWS).keep == 1
    ids = tiny.windows(2, 9)
    assert torch.equal(load(tmp_path / "a")(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma2"])
def test_other_norms_are_refused(family):
    j = job(family)
    with pytest.raises(InputError, match=r"slicegpt needs blocks of the form"):
        j.plan()


def test_a_keep_out_of_reach_names_the_smallest():
    j = job("llama_gqa", 0.01)
    with pytest.raises(InputError, match="smallest keep is"):
        j.plan()
