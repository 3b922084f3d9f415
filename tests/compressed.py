"""Compressed folders made directly from edits with random tensors: every form that a folder can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from planish.apply import apply_edits, count_block
from planish.core import Edit, Shape, Weights
from planish.folder.config import write_config
from planish.folder.source import open_source
from planish.folder.writer import Writer, copy_untouched
from planish.modelling.blocks import get_linear
from planish.solvers.experts import keep_form
from planish.solvers.forms import find_experts, low_rank_edit, neuron_edits, value_edits

Make = Callable[[Shape, Weights, torch.Generator], list[Edit]]


def make_folder(model: nn.Module, output: Path, forms: list[Make | None], tokenizer=None) -> Path:
    """Write `model` with block i edited by forms[i]."""
    source = open_source(model, tokenizer)
    writer = Writer(output, source.n_blocks, tower=source.tower)
    specs, shapes = [], []
    generator = torch.Generator().manual_seed(7)
    for i in range(source.n_blocks):
        block, shape, form = source.block(i), source.shape(i), forms[i % len(forms)]
        weights: Weights = {}
        for role in shape.roles:
            linear = get_linear(block, source.family, role)
            weights[role] = linear.weight.detach()
            if linear.bias is not None:
                weights[f"{role}.bias"] = linear.bias.detach()
        edits = [] if form is None else form(shape, weights, generator)
        specs.append(apply_edits(block, edits, source.family, source.config, shape))
        shapes.append(shape)
        assert count_block(block) > 0 or form is not None
        writer.block(i, block, source.family)
    outside = source.outside()
    if source.config.tie_word_embeddings:
        outside.pop("lm_head.weight", None)
    writer.shard(0, outside)
    copy_untouched(source, writer)
    write_config(writer.text, source.config, source.family, specs, shapes, source.tower)
    source.copy_files(writer.partial)
    writer.close()
    return output


def values(v: int) -> Make:
    """`v` value dimensions per head."""

    def make(shape: Shape, w: Weights, _) -> list[Edit]:
        small = w["v"].unflatten(0, (shape.kv_heads, -1))[:, :v].flatten(0, 1)
        out = w["o"].unflatten(1, (shape.heads, -1))[..., :v].flatten(1)
        bias = None if "v.bias" not in w else w["v.bias"].view(shape.kv_heads, -1)[:, :v].flatten()
        return value_edits(small, out, bias, v)

    return make


def neurons(width: int) -> Make:
    return lambda shape, w, _: neuron_edits(w, torch.arange(width), w["down"][:, :width])


def experts(number: int) -> Make:
    """The first `number` experts."""

    def make(shape: Shape, w: Weights, _) -> list[Edit]:
        return [Edit("experts", keep_form(find_experts(shape), number), {"kept": torch.arange(number)})]

    return make


def low_rank(form: str, rank: int, *roles: str) -> Make:
    def make(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
        edits = []
        for role in roles or shape.roles:
            out, n = shape.linear(role)
            b, a = torch.randn(out, rank, generator=g).double(), torch.randn(rank, n, generator=g).double()
            edit = low_rank_edit(role, b / rank**0.5, a / n**0.5, form)
            if f"{role}.bias" in w:
                edit.tensors["B.bias" if form == "pair" else "bias"] = w[f"{role}.bias"]
            edits.append(edit)
        return edits

    return make


def head_pairs(rank: int) -> Make:
    def make(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
        edits = []
        for role, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            tensors: dict[str, Tensor] = {
                "A.weight": torch.randn(heads * rank, shape.hidden, generator=g) / shape.hidden**0.5,
                "U": torch.randn(heads, shape.qk, rank, generator=g),
            }
            edits.append(Edit(role, {"kind": "head_pair", "rank": rank, "heads": heads}, tensors))
        return edits

    return make


def rotary_pairs(kept: int) -> Make:
    """Each kv group keeps `kept` rotary pairs of its own."""

    def make(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
        half = shape.rotary // 2
        pairs = torch.stack([torch.randperm(half, generator=g)[:kept].sort().values for _ in range(shape.kv_heads)])
        rest = torch.arange(shape.rotary, shape.qk).repeat(shape.kv_heads, 1)
        at = torch.cat([pairs, pairs + half, rest], 1)
        edits = []
        for role, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            rows = at.repeat_interleave(heads // shape.kv_heads, 0)
            pick = lambda t, heads=heads, rows=rows: torch.stack(  # noqa: E731
                [t.unflatten(0, (heads, -1))[h][rows[h]] for h in range(heads)]
            ).flatten(0, 1)
            tensors = {n: pick(w[s]) for n, s in (("weight", role), ("bias", f"{role}.bias")) if s in w}
            out = heads * at.shape[1]
            edits.append(Edit(role, {"kind": "dense", "out": out, "in": shape.hidden}, tensors))
        form = {"kind": "own", "qk": at.shape[1], "pairs": kept}
        return [*edits, Edit("attention", form, {"pairs": pairs.int()})]

    return make


def cached_keys(rank: int, frequency: bool) -> Make:
    """Keys of all kv heads as `rank` channels: a latent that is rebuilt, or pairs that the heads share per frequency."""

    def make(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
        tensors = {"weight": torch.randn(rank, shape.hidden, generator=g) / shape.hidden**0.5}
        if "k.bias" in w:
            tensors["bias"] = torch.randn(rank, generator=g)
        form = {"kind": "own", "k_rank": rank, "k_groups": 1}
        if frequency:
            at = torch.randint(shape.rotary // 2, (1, rank // 2), generator=g).sort().values
            own = {"U": torch.randn(2, shape.kv_heads, rank // 2, generator=g), "frequencies": at.int()}
            form |= {"k_form": "frequency"}
        else:
            own = {"U": torch.randn(1, shape.kv_heads * shape.qk, rank, generator=g) / rank**0.5}
        return [Edit("k", {"kind": "dense", "out": rank, "in": shape.hidden}, tensors), Edit("attention", form, own)]

    return make


def bypass(target: str, rank: int = 0, *, gate: bool = False, shift: bool = False, raw: bool = False) -> Make:
    """A removed submodule, or a linear map in its place."""

    def make(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
        d = shape.hidden
        form = {"kind": "bypass", "rank": rank, "gate": gate, "shift": shift, "raw": raw}
        tensors: dict[str, Tensor] = {}
        if gate:
            tensors["gate"] = torch.randn(d, generator=g)
        if shift:
            tensors["shift"] = torch.randn(d, generator=g)
        if rank:
            tensors |= {
                "V.weight": torch.randn(rank, d, generator=g),
                "W.weight": torch.randn(d, rank, generator=g) / d,
            }
        return [Edit(target, form, tensors)]

    return make


def both(*makes: Make) -> Make:
    return lambda shape, w, g: [e for m in makes for e in m(shape, w, g)]


FORMS: dict[str, list[Make | None]] = {
    "dense": [None],
    "narrow MLP": [neurons(24)],
    "MLP widths per block": [neurons(24), None, neurons(8)],
    "fewer value dimensions": [values(5)],
    "value dimensions and MLP widths per block": [both(values(3), neurons(24)), values(6), neurons(40)],
    "low-rank pairs": [low_rank("pair", 8)],
    "pivoted low rank": [low_rank("pivoted", 8)],
    "low-rank heads": [head_pairs(3)],
    "fewer rotary pairs": [rotary_pairs(2), both(rotary_pairs(3), values(4)), None],
    "keys rebuilt from latents": [cached_keys(10, False), both(cached_keys(6, False), values(4)), None],
    "keys shared within frequencies": [cached_keys(10, True), both(cached_keys(6, True), values(4)), None],
    "attention removed": [None, bypass("attention"), None],
    "first attention removed": [bypass("attention"), None],
    "MLP removed": [None, bypass("mlp"), both(bypass("mlp"), bypass("attention"))],
    "attention → linear": [bypass("attention", 4), bypass("attention", 6, gate=True), None],
    "attention → linear with a constant": [
        bypass("attention", 4, gate=True, shift=True),
        None,
        bypass("attention", 3, shift=True),
    ],
    "blocks removed": [both(bypass("mlp"), bypass("attention")), None],
    "MLP → linear": [bypass("mlp", 4, shift=True), bypass("mlp", 5, gate=True), None],
    "submodules → linear before the norm": [bypass("attention", 4, gate=True, shift=True, raw=True), None],
}


def train_tokenizer(folder: Path, byte_level: bool) -> None:
    """A BPE tokenizer of 97 ids, byte-level like GPT-2's or with byte fallback like LLaMA 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["the cat sat on the mat", "then the hat sat on that cat", "a bat and a rat"] * 3
    if byte_level:
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<s>", "</s>"] if byte_level else ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>"]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False))
    t.add_special_tokens([AddedToken("<s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
