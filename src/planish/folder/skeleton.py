"""Models without weights, and tensors put into them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from planish.core import ExpertShape, Shape
from planish.errors import InputError
from planish.folder.config import is_compressed
from planish.folder.towers import Tower
from planish.modelling.blocks import find_blocks, get_linear, has_linear, has_mixer, read_layout
from planish.modelling.canonical import has_module, split_block, split_experts
from planish.modelling.families import ATTENTION, Family
from planish.modelling.heads import has_norms, head_width, rotary_width
from planish.modelling.modelling import find_classes


def build_stock(config: Any, family: Family) -> PreTrainedModel:
    """The causal LM that a configuration describes, dense or compressed, as transformers builds it."""
    try:
        if is_compressed(config):
            return AutoModelForCausalLM.from_config(config)
        return find_classes(family.model_type)[2](config)  # type: ignore[return-value]
    except Exception as error:  # sizes that do not fit together, or into memory
        raise refuse(family.model_type, error) from None


def refuse(kind: str, error: Exception) -> InputError:
    """What transformers says of a configuration that it cannot build a model from, in one line."""
    said = [*str(error).splitlines(), ""][0]
    why = f"transformers knows no {said}" if isinstance(error, KeyError) else f"{type(error).__name__}: {said}"
    return InputError(f"config.json is no valid {kind}: {why}")


def find_whole(tower: Tower) -> type[PreTrainedModel]:
    """The class of the whole model that a language model is in."""
    return AutoModelForImageTextToText._model_mapping[type(tower.config)]


def build_whole(tower: Tower) -> PreTrainedModel:
    """The whole model, dense or compressed, that a language model is in; the caller says where."""
    try:
        return find_whole(tower)(tower.config)
    except Exception as error:
        raise refuse(tower.wrapper.model_type, error) from None


def build_skeleton(config: Any, family: Family) -> PreTrainedModel:
    """The causal LM that a configuration describes; of stacked experts each has linears of its own."""
    model = build_stock(config, family)
    for block in find_blocks(model, family):
        split_experts(block, family)
    return model


@torch.no_grad()
def build_empty(config: Any, family: Family) -> PreTrainedModel:
    """The causal LM in evaluation mode: parameters on the meta device, buffers with the values that transformers gives them.

    As `from_pretrained` does it: built on the meta device, then buffers are filled by the class's own initialisation.
    """
    with torch.device("meta"):
        model = build_skeleton(config, family).eval().requires_grad_(False)
    filled = []
    for module in model.modules():
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in buffers.items():
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
        if buffers or isinstance(module, PreTrainedModel):
            filled.append(module)
    for module in reversed(filled):  # models, which may fill those of their blocks, last
        model._init_weights(module)
    return model


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def find_embedding(model: PreTrainedModel) -> str:
    """Name of the input embedding's weight."""
    embedding = model.get_input_embeddings()
    return next(n for n, m in model.named_modules() if m is embedding) + ".weight"


def read_shape(model: PreTrainedModel, family: Family, i: int) -> Shape:
    """Sizes of block i of a stock causal LM, with or without weights; the block is made canonical."""
    blocks, config = find_blocks(model, family), model.config
    check_rotation(blocks[i], family)
    block = split_block(blocks[i], family, config)
    layout = read_layout(block, family, config)
    heads, kv_heads = layout.heads, layout.kv_heads
    attention = block.get_submodule(family.attention) if heads else nn.Module()
    attends = next((tuple(g.linears) for g in layout.groups if g.name == "attention"), ())
    others = [(r, get_linear(block, family, r).weight) for g in layout.groups for r in g.linears if r in family.others]
    others += [(name.removesuffix(".weight"), block.get_parameter(name)) for name in layout.rest]
    experts = sum(g.name.startswith("expert.") for g in layout.groups)
    return Shape(
        block=i,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        qk=head_width(attention) if heads else 0,
        v=read_values(block, family, kv_heads) if heads else 0,
        intermediate=get_linear(block, family, "down").in_features if layout.has("mlp") else 0,
        rotary=rotary_width(attention, family) if heads else 0,
        gated=family.gated,
        qk_norm=has_norms(attention, family),
        parallel=layout.parallel,
        blocks=len(blocks),
        experts=read_experts(block, family, config, experts) if experts else None,
        others=tuple((role, len(w), w.numel() // len(w)) for role, w in others),
        cached=tuple(r for r, _ in others if r in family.cached),
        further=tuple(r for r, _ in others if r in family.others and r.partition(".")[0] in ("mixer", "attention")),
        state=read_state(config, family) if has_mixer(block, family) else 0,
        fixed=layout.fixed,
        attends=tuple(r for r in attends if r in ATTENTION),
        stays=find_obstacle(blocks, family),
        mrope=family.mrope,
    )


def find_obstacle(blocks: nn.ModuleList, family: Family) -> str:
    """What some block does or has, for which no attention of the model may go whole."""
    if any(has_mixer(b, family) for b in blocks):
        return "has a mixer"
    return "shares keys and values, or is given more than the stream" if "keys" in family.fixed else ""


def read_values(block: nn.Module, family: Family, kv_heads: int) -> int:
    """Value dimensions of a head: those of keys where values are keys, or another block's."""
    if not has_linear(block, family, "v"):
        return head_width(block.get_submodule(family.attention))
    return get_linear(block, family, "v").out_features // kv_heads


def read_state(config: Any, family: Family) -> int:
    """Numbers that a mixer keeps of a sequence, however long it is."""
    sizes = ([n if isinstance(n, int) else getattr(config, n) for n in names] for names in family.state)
    return sum(map(prod, sizes))


def check_rotation(block: nn.Module, family: Family) -> None:
    """InputError where a stock block's heads rotate channels that make no pairs, which transformers finds out when it runs."""
    attention = block.get_submodule(family.attention) if has_module(block, family.attention) else None
    if not any(hasattr(attention, n) for n in ("head_dim", "head_size")):  # none, or one on latents
        return
    assert attention is not None
    if (width := rotary_width(attention, family)) % 2:
        raise InputError(
            f"config.json is no valid {family.model_type}: partial_rotary_factor rotates {width} of a head's "
            f"{head_width(attention)} channels, expected an even number; correct it"
        )


def read_experts(block: nn.Module, family: Family, config: Any, number: int) -> ExpertShape:
    row = family.experts
    assert row is not None
    top = getattr(config, row.top)
    groups = (getattr(config, row.groups, None) if row.groups else None) or 1
    top_groups = (getattr(config, row.top_groups, None) if groups > 1 else None) or 1
    if number % groups or top_groups > groups:
        raise InputError(
            f"config.json: {row.groups} {groups} does not divide {row.count} {number}, or is below {row.top_groups} {top_groups}"
        )
    hidden, width = get_linear(block, family, "expert.0.down").weight.shape
    router = tuple(path.removesuffix(".weight") for path in row.router if path.endswith(".weight"))
    found = ExpertShape(
        number, top, width, hidden, groups, top_groups, router, row.gates(config), row.roles, row.fewest
    )
    if top > found.lower_top(number):
        within = f" in {top_groups} of {groups} groups" if groups > 1 else ""
        raise InputError(f"config.json: a token cannot reach {row.top} {top} of {row.count} {number}{within}")
    return found
