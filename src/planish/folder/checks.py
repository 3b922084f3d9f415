"""What a model holds against what its class asks for: tensors of folders and of models in memory alike."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from planish.errors import InputError
from planish.folder.config import find_family, open_config
from planish.folder.safetensors import NAMES
from planish.folder.stored import Stored
from planish.modelling.blocks import find_blocks
from planish.modelling.modelling import find_classes
from planish.modelling.wrappers import find_language_model

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTISED = re.compile(  # what GPTQ, AWQ, bitsandbytes, AQLM, compressed-tensors and ModelOpt store beside or for weights
    r"(^|[._])(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|quant_state|quantizer|codebooks?|codes|weight_packed"
    r"|weight_shape|weight_format|\w*zero_point|(weight|input|output|activation|act|q|k|v|kv|qkv|prob)_scale(_\w+)?)([._]|$)"
)
ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_\w+|vera_\w+|adapter_\w+)(\.|$)")


def check_tensors(
    stored: Mapping[str, Stored], model: PreTrainedModel, tied: Mapping[str, str], where: str
) -> list[str]:
    """All that the class asks for is there, in its shape and as numbers of a type that is read (InputError).

    `stored`: by names in the causal LM; `tied`: either name of a tied matrix → the other. Returns the names of tensors that
    are no part of the class: passed over as transformers does, unless they say that others are not what they seem (scales
    of quantised weights, adapters, biases that the configuration has none of), which is refused.
    """
    asked = model.state_dict()
    strange = [n for n in stored if n not in asked]
    for name in strange:
        refuse_strange(name, model, where)
    for name, tensor in asked.items():
        entry = stored.get(name, stored.get(tied.get(name, "")))
        if entry is None:
            raise InputError(f"tensor {name} is missing in {where}: the checkpoint is incomplete or another model's")
        if tensor.is_floating_point() and entry.dtype not in FLOATS:
            raise InputError(
                f"tensor {name} in {where} is stored as {name_dtype(entry.dtype)}, which is not read: the checkpoint is "
                "quantised; start from the original weights (BF16, F16 or F32)"
            )
        if tuple(entry.shape) != tuple(tensor.shape):
            raise InputError(
                f"tensor {name} in {where} has shape {tuple(entry.shape)}, expected {tuple(tensor.shape)} from config.json"
            )
    ignored = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["^$"]))
    told = [n for n in strange if not ignored.search(n) and not n.endswith("inv_freq")]
    if told:
        count = f"{len(told)} tensors that are" if len(told) > 1 else "a tensor that is"
        warnings.warn(
            f"{where} stores {count} no part of {type(model).__name__}, passed over as transformers does: "
            f"{', '.join(told[:3])}{' …' if len(told) > 3 else ''}",
            stacklevel=2,
        )
    return strange


def refuse_strange(name: str, model: PreTrainedModel, where: str) -> None:
    """InputError for a stored tensor without a place in the model that changes what the others mean."""
    if QUANTISED.search(name):
        raise InputError(
            f"{where} stores {name}: the checkpoint is quantised; start from the original weights (BF16, F16 or F32)"
        )
    if ADAPTER.search(name):
        raise InputError(
            f"{where} stores {name}, part of an adapter: merge it first (merge_and_unload) and save the result"
        )
    parent, _, leaf = name.rpartition(".")
    try:
        unset = leaf in model.get_submodule(parent)._parameters
    except AttributeError:
        return
    if unset:
        raise InputError(f"unexpected tensor {name} in {where}: by its config.json the model has none")


def name_dtype(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


def check_model(model: nn.Module) -> None:
    """InputError, with what to do, for a model in memory that is no plain causal LM of a supported family."""
    kind, wrapped = type(model).__name__, {"module": "its .module", "_orig_mod": "the model before torch.compile"}
    for name, instead in wrapped.items():
        if isinstance(getattr(model, name, None), nn.Module) and not isinstance(model, PreTrainedModel):
            raise InputError(f"the model is wrapped ({kind}): give {instead}")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"the model ({kind}) carries an adapter: merge it (merge_and_unload of peft's model) and give the result"
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"the model in memory is a {kind}, not a causal language model of transformers")
    config, tower = open_config(model.config)
    family = find_family(config)
    if tower is not None:
        name, auto = tower.wrapper.classes[2], "AutoModelForImageTextToText"
        right = isinstance(model, getattr(transformers, name))
    else:
        name, auto = family.classes[2], "AutoModelForCausalLM"
        right = isinstance(model, find_classes(family.model_type)[2])
    if not right:
        raise InputError(f"the model in memory is a {kind}, not a causal language model: load it as {name} ({auto})")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InputError(
                f"tensor {name} of the model in memory is not there (meta device: offloaded, or never loaded): load it without "
                "offload, or give the folder, which is read block by block"
            )
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor):
            raise InputError(
                f"tensor {name} of the model in memory is a {type(tensor).__name__}: quantised or sharded ones are not read, give "
                "the original model"
            )
    told, held = config.num_hidden_layers, len(find_blocks(find_language_model(model) if tower else model, family))
    if told != held:
        kinds = " and leave as many in model.config.layer_types" if getattr(config, "layer_types", None) else ""
        raise InputError(
            f"the model in memory has {held} blocks, its configuration says {told}: set "
            f"model.config.num_hidden_layers = {held}{kinds}"
        )
