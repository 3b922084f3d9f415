"""What some families do otherwise than llama, against their own forward in transformers: how heads rotate, which blocks rotate,
one norm for two submodules, queries of several heads beside one key."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import tiny
from compressed import bypass, make_folder, rotary_pairs, values
from planish.calibrate.taps import tap_sites
from planish.errors import InputError
from planish.folder.source import MemorySource
from planish.modelling.attentions import rotate_pairs
from planish.modelling.blocks import find_blocks, get_linear
from planish.modelling.heads import count_heads
from planish.solvers.rotary_pairs import RotaryPairs

IDS = tiny.windows(3, 16)
NEIGHBOURS = ("ernie4_5", "glm4", "cohere", "cohere2")
SHARED = ("cohere", "phi", "stablelm_parallel", "falcon", "falcon_new_shared")


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2j, 2j + 1) of x (…, 2p) as one complex number, times cos + i sin (…, p)."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("name", [*NEIGHBOURS, "llama4"])
def test_a_canonical_head_rotates_halves(name):
    """Scores of rotated neighbours as stored = scores of rotated halves of what the canonical block's q and k give."""
    model = tiny.build(name, torch.float64)
    source = MemorySource(model)
    shape, stock, block = source.shape(0), find_blocks(model, source.family)[0], source.block(0)
    x = torch.randn(5, shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] / 3 ** torch.arange(shape.rotary // 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    scores = []
    for q, k in ((stock.self_attn.q_proj, stock.self_attn.k_proj), [get_linear(block, source.family, r) for r in "qk"]):
        heads = [m(x).unflatten(-1, (-1, shape.qk)) for m in (q, k)]
        if q is stock.self_attn.q_proj:
            turned = [rotate_neighbours(h[..., : shape.rotary], cos, sin) for h in heads]
            heads = [torch.cat([t, h[..., shape.rotary :]], -1) for t, h in zip(turned, heads)]
        else:
            heads = [rotate_pairs(h, cos, sin) for h in heads]
        scores.append(torch.einsum("thd,shd->hts", heads[0], heads[1].repeat_interleave(shape.groups, 1)))
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_pairs_that_go_are_neighbours(name, tmp_path):
    """A folder whose kv groups kept some rotary pairs = the stock model with all other neighbours zeroed by hand."""
    model = tiny.build(name)
    make_folder(model, tmp_path / "m", [rotary_pairs(2), None])
    small = tiny.load(tmp_path / "m")
    kept = small.model.layers[0].self_attn.pairs
    shape = MemorySource(model).shape(0)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for head in range(shape.kv_heads):
            for pair in set(range(shape.rotary // 2)) - set(kept[head].tolist()):
                for channel in (2 * pair, 2 * pair + 1):
                    attention.k_proj.weight[head * shape.qk + channel] = 0
                    if attention.k_proj.bias is not None:
                        attention.k_proj.bias[head * shape.qk + channel] = 0
        torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "exaone4_windows"])
def test_blocks_without_rotation_do_not_mind_positions(name):
    """Only in those: the shape says so, and the order of the tokens before the last does not matter there."""
    model = tiny.build(name, torch.float64)
    source = MemorySource(model)
    rotates = [source.shape(i).rotary > 0 for i in range(source.n_blocks)]
    assert rotates == [True, False]
    seen = []
    block = find_blocks(model, source.family)[1]
    handle = block.self_attn.register_forward_hook(lambda m, a, k, out: seen.append((k, out[0])), with_kwargs=True)
    with torch.no_grad():
        model(IDS[:, :6])  # within every window
        handle.remove()
        kwargs, out = seen[0]
        x = kwargs.pop("hidden_states")
        order = [3, 1, 4, 0, 2, 5]
        swapped = block.self_attn(hidden_states=x[:, order], **kwargs)[0]
        torch.testing.assert_close(swapped[:, -1], out[:, -1])
    assert bool(RotaryPairs().units(source.shape(0))) == (not source.shape(0).qk_norm)
    assert RotaryPairs().units(source.shape(1)) == []


def test_what_is_left_of_blocks_without_rotation_is_without_it(tmp_path):
    """The configuration's lists of blocks lose the entries of those that are removed."""
    model = tiny.build("smollm3", num_hidden_layers=3, no_rope_layers=[1, 0, 1])
    make_folder(model, tmp_path / "m", [values(5), values(5), values(5)])
    assert [b.self_attn.rotary for b in tiny.load(tmp_path / "m").model.layers] == [True, False, True]
    tiny.compress(model, output=tmp_path / "s", keep=0.7, method="shortgpt", windows=IDS)
    small = tiny.load(tmp_path / "s")
    assert small.config.num_hidden_layers == 2
    kept = [i for i, b in enumerate(model.model.layers) if any(is_same(b, left) for left in small.model.layers)]
    assert small.config.no_rope_layers == [model.config.no_rope_layers[i] for i in kept]


def is_same(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("target", ["attention", "mlp"])
@pytest.mark.parametrize("name", SHARED)
def test_a_bypass_of_the_stream_reads_past_a_norm_that_both_share(name, target, tmp_path):
    """x + f(x) + mlp(norm(x)), or x + attention(norm(x)) + f(x): the stock model with that submodule's output put in its place."""
    model = tiny.build(name)
    make_folder(model, tmp_path / "m", [bypass(target, 4, gate=True, shift=True, raw=True), None])
    small = tiny.load(tmp_path / "m")
    family = MemorySource(model).family
    ours, stock = (find_blocks(m, family)[0] for m in (small, model))
    own, theirs = (b.get_submodule(getattr(family, target)) for b in (ours, stock))
    stream = []
    stock.register_forward_pre_hook(lambda m, a, k: stream.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    theirs.register_forward_hook(lambda m, a, out: own(stream[-1]))
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    hidden = small(IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and not torch.equal(hidden[0], hidden[1])


@torch.no_grad()
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_norm_stays_with_the_submodule_that_is_left(name, tmp_path):
    """A removed attention leaves x + mlp(norm(x))."""
    model = tiny.build(name)
    make_folder(model, tmp_path / "m", [bypass("attention", raw=True), None])
    small = tiny.load(tmp_path / "m")
    family = MemorySource(model).family
    attention = find_blocks(model, family)[0].get_submodule(family.attention)
    attention.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), None))
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon", "falcon_new"])
def test_rows_of_grouped_heads_are_those_of_the_stock_split(name):
    model = tiny.build(name, torch.float64)
    source = MemorySource(model)
    shape, attention = source.shape(0), model.transformer.h[0].self_attention
    x = torch.randn(2, 5, shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    q, k, v = attention._split_heads(attention.query_key_value(x))
    if name == "falcon_new":  # which repeats keys and values for every query head
        k, v = (t[:, :, :: shape.groups] for t in (k, v))
    for role, stock in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(get_linear(source.block(0), source.family, role)(x), stock.flatten(2))


@torch.no_grad()
def test_what_a_feed_forward_adds_is_seen_before_attention_is_added_to_it():
    """Falcon's blocks add in place."""
    model = tiny.build("falcon", torch.float64)
    source = MemorySource(model)
    block, inputs = source.block(0), []
    model.transformer.h[0].register_forward_pre_hook(lambda m, a, k: inputs.append((a, k)), with_kwargs=True)
    model(IDS, use_cache=False)
    args, kwargs = inputs[0]
    with tap_sites(block, source.family, {"mlp.add", "down.out", "attention.add", "up.in"}) as seen:
        out = block(*args, **kwargs)[0]
    torch.testing.assert_close(seen["mlp.add"], block.mlp(seen["up.in"]))
    torch.testing.assert_close(seen["down.out"], seen["mlp.add"])
    torch.testing.assert_close(args[0] + seen["attention.add"] + seen["mlp.add"], out)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("falcon", {"alibi": True}, "falcon with alibi=true is not supported: its attention adds a bias"),
        ("phi", tiny._rope("default", partial_rotary_factor=0.4), "no valid phi: .* rotates 3 of a head's 8 channels"),
        (
            "glm4",
            tiny._rope("default", partial_rotary_factor=0.45),
            "no valid glm4: .* rotates 5 of a head's 12 channels",
        ),
        ("falcon", {"parallel_attn": False}, "parallel_attn=false"),
    ],
)
def test_what_is_not_read_is_refused_by_name(name, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny.compress(tiny.build(name, **change), output=tmp_path / "m", keep=0.8, method="a3", windows=IDS)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "opt"])
def test_kv_heads_that_a_family_does_not_have_are_not_read(name):
    """A configuration may hold any name; transformers passes over those that it does not know."""
    config = tiny.build(name).config
    heads = config.num_attention_heads
    config.num_key_value_heads = heads // 2
    assert count_heads(config, None) == (heads, heads)
