"""Models without weights, and tensors put into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
import transformers.initialization as initialization
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from planish.core import Shape
from planish.errors import InputError
from planish.folder.config import is_compressed
from planish.modelling.attentions import count_heads, head_width, rotary_width
from planish.modelling.blocks import find_blocks, get_linear, split_block
from planish.modelling.families import Family


def build_skeleton(config: Any, family: Family) -> PreTrainedModel:
    """The causal LM that a configuration describes, dense or compressed."""
    try:
        if is_compressed(config):
            return AutoModelForCausalLM.from_config(config)
        return getattr(transformers, family.classes[2])(config)
    except Exception as error:  # sizes that do not fit together, or into memory
        raise InputError(f"config.json is no valid {family.model_type}: {type(error).__name__}: {error}") from None


@contextmanager
def no_parameters() -> Iterator[None]:
    """Within the context modules are built with parameters on the meta device and buffers in memory."""
    register = nn.Module.register_parameter

    def register_meta(self, name, param):
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        with initialization.no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_empty(config: Any, family: Family) -> PreTrainedModel:
    """The causal LM in evaluation mode: parameters on the meta device, buffers with their values."""
    with no_parameters():
        return build_skeleton(config, family).eval()


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
    block = split_block(blocks[i], family, config)
    heads, kv_heads = count_heads(config)
    attention = block.get_submodule(family.attention)
    return Shape(
        block=i,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        qk=head_width(attention),
        v=get_linear(block, family, "v").out_features // kv_heads,
        intermediate=get_linear(block, family, "down").in_features,
        rotary=rotary_width(attention, family),
        gated=family.gated,
        qk_norm=family.qk_norm,
        parallel=family.parallel and bool(getattr(config, "use_parallel_residual", True)),
        blocks=len(blocks),
    )
