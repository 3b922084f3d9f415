"""Folders loaded as models in memory."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from planish.errors import InputError
from planish.folder.config import NO_SOFT_CAP, is_compressed, load_config, open_config, read_layout
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.gguf_tokenizer import read_generation_config
from planish.folder.hub import find_folder
from planish.folder.origin import name_stored
from planish.folder.packed.declared import find_declared
from planish.folder.skeleton import find_whole, set_parameter
from planish.folder.source import FolderSource, open_folder
from planish.folder.weights import open_weights
from planish.modelling.heads import needs_eager


def build_random(seed: int = 0) -> PreTrainedModel:
    """A two-block LLaMA of random weights, small enough for a self-test; the caller's random state is left alone."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def silence() -> None:
    """Turn off transformers' progress bars and advice in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(folder: str | Path, **kwargs) -> PreTrainedModel:
    """A causal LM, or the whole model that a language model is in, from a dense or compressed folder; runs no code but planish's
    own and transformers'.

    Its attention computes all that the configuration says, unless `attn_implementation` asks for another. `kwargs` are
    `from_pretrained`'s.
    """
    path = find_folder(folder)
    config = load_config(path)
    text, tower = open_config(config)
    if needs_eager(text) and "attn_implementation" not in kwargs:
        kwargs["attn_implementation"] = "eager"
        warnings.warn(NO_SOFT_CAP.format(f"{folder} is loaded"), stacklevel=2)
    if is_gguf(path) or find_declared(path):
        return load_dequantised(path, **kwargs)
    row = read_layout(text)[0].experts
    if row is not None and not is_compressed(text) and (getattr(text, row.width) or 0) % 8:
        kwargs.setdefault("experts_implementation", "eager")  # grouped products refuse rows of no multiple of 16 bytes
    if getattr(config, "quantization_config", None):  # transformers' own matter
        open_weights(path)
    else:
        open_folder(path)  # says what is missing or not what the configuration asks for
    try:
        kwargs |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        auto = AutoModelForCausalLM if tower is None else AutoModelForImageTextToText
        model, found = auto.from_pretrained(path, **kwargs)
    except Exception as error:  # whatever a damaged folder makes the model's own code raise
        raise InputError(f"cannot load {folder}: {type(error).__name__}: {error}") from None
    for name in sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise InputError(f"tensor {name} is missing in {folder}: the checkpoint is incomplete")
    return model.eval()


def load_dequantised(
    path: Path, *, dtype: torch.dtype | str | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM from a GGUF file or a checkpoint in low precision, dequantised tensor by tensor into `dtype` (unless given,
    what the weights are read in)."""
    source = open_folder(path)
    kind = dtype if isinstance(dtype, torch.dtype) else None
    if source.tower is not None:
        return load_whole(source, kind, attn_implementation)
    model = source.model
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    if is_gguf(path):
        model.config.dtype = kind = kind or model.config.dtype
    for name in list(model.state_dict()):  # tables of indices among them
        weight = source.weight(name)
        set_parameter(model, name, weight.to(kind) if kind is not None and weight.is_floating_point() else weight)
    model.config.dtype = kind or source.stored
    model.tie_weights()
    if is_gguf(path):
        model.generation_config = read_generation_config(open_gguf(path).file)
    elif (path / "generation_config.json").is_file():
        with suppress(Exception):  # whatever settings it holds: advice for `generate`
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


def load_whole(source: FolderSource, dtype: torch.dtype | None, attention: str | None) -> PreTrainedModel:
    """The whole model that a folder's language model is in, dequantised as in `load_dequantised`."""
    assert source.tower is not None
    names = [n for n in source.model.state_dict() if n in source.reader]
    tensors = {name_stored(source, n): source.weight(n) for n in names}
    tensors |= {n: source.untouched.read(n) for n in source.untouched.sizes}
    cls, config = find_whole(source.tower), source.tower.config
    settings = {} if attention is None else {"attn_implementation": attention}
    model = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype or source.stored, **settings)
    with suppress(Exception):  # whatever settings it holds: advice for `generate`
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.folder)
    return model.eval()
