"""Blocks with edits, the configuration that describes them, and compressed folders loaded again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from planish import attentions as attentions_file
from planish import blocks as blocks_file
from planish import families as families_file
from planish import modelling as modelling_file
from planish import modules as modules_file
from planish.attentions import needs_eager
from planish.blocks import Spec, get_linear, install, split_block
from planish.core import Edit, Shape
from planish.errors import InputError
from planish.families import Family
from planish.modelling import FORMAT, class_names, model_type
from planish.modules import Bypass
from planish.shards import Shard
from planish.sources import NO_SOFT_CAP, Source, find_folder, index_tensors, is_finite, load_config
from planish.writer import Writer


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


def merge_forms(shape: Shape, edits: list[Edit]) -> Spec:
    """The block's spec from all its edits; edits of the attention's q–k and v parts become one module."""
    spec: Spec = {}
    for edit in edits:
        if edit.target in ("attention", "mlp"):
            form = spec.setdefault(edit.target, {})
            if edit.form["kind"] == "own" and not form:
                form |= {"kind": "own", "qk": shape.qk, "v": shape.v}
            form |= edit.form
        else:
            spec.setdefault("linears", {})[edit.target] = dict(edit.form)
    return spec


def apply_edits(block: nn.Module, edits: list[Edit], family: Family, config, shape: Shape) -> Spec:
    """Replace modules of a canonical block in place, in its own dtype; returns its spec (empty when nothing changed)."""
    spec = merge_forms(shape, edits)
    if not spec:
        return spec
    install(block, spec, family, config)
    split_block(block, family, config)
    for edit in edits:
        if not edit.tensors:
            continue
        if edit.target == "attention":
            module = block.get_submodule(family.attention)
        elif edit.target == "mlp":
            module = block.get_submodule(family.mlp or family.path("up"))
        else:
            module = get_linear(block, family, edit.target)
        for name, tensor in edit.tensors.items():
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            old = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if old is None or old.shape != tensor.shape:
                raise ValueError(f"edit of {edit.target}: {name} has shape {tuple(tensor.shape)}, form {edit.form}")
            value = narrow(tensor, old.dtype, f"block {shape.block}, {edit.target}").contiguous()
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
    return spec


def narrow(tensor: Tensor, kind: torch.dtype, where: str) -> Tensor:
    """The tensor in the dtype that weights are stored in (whole numbers as they are), or an error where it does not fit."""
    if not tensor.is_floating_point():
        return tensor
    value = tensor.to(kind)
    if not is_finite(value):
        if not is_finite(tensor):
            raise ValueError(f"edit of {where} is not finite")
        raise InputError(
            f"the new weights of {where} do not fit into {str(kind)[6:]}: they reach {float(tensor.abs().max()):.3g}; "
            "store the model in bfloat16 or float32 first"
        )
    return value


def count_block(block: nn.Module) -> int:
    """Weights of a block's linears, as they are: matrices of every form, gates and shifts of bypasses; no norms, no biases."""
    matrices = sum(p.numel() for p in block.parameters() if p.ndim >= 2)
    vectors = [v for m in block.modules() if isinstance(m, Bypass) for v in (m.gate, m.shift)]
    return matrices + sum(v.numel() for v in vectors if v is not None)


def is_empty(spec: Spec) -> bool:
    """Whether a block's submodules both contribute nothing: it is left out of the written model."""
    forms = [spec.get("attention", {}), spec.get("mlp", {})]
    return all(f.get("kind") == "bypass" and not (f["rank"] or f["gate"] or f["shift"]) for f in forms)


def find_native(specs: list[Spec], shape: Shape, family: Family) -> dict[str, int] | None:
    """Config overrides under which the stock architecture holds every block, or None."""
    widths = {shape.intermediate if not spec else None for spec in specs}
    for spec in specs:
        if not spec:
            continue
        linears = spec.get("linears", {})
        if set(spec) - {"linears"} or set(linears) - {"gate", "up", "down"}:
            return None
        if any(f["kind"] != "dense" or "bias" in f for f in linears.values()):
            return None
        widths |= {f["in"] if r == "down" else f["out"] for r, f in linears.items()}
    widths.discard(None)
    if not family.intermediate:
        return {} if widths == {shape.intermediate} else None
    return {family.intermediate: widths.pop()} if len(widths) == 1 else None  # type: ignore[dict-item]


def write_config(writer: Writer, source: Source, specs: list[Spec], shapes: list[Shape]) -> str:
    """config.json (and the modelling files where no stock architecture holds the shapes); returns "native" or "planish"."""
    config = source.config.to_dict()
    for name in ("_name_or_path", "auto_map"):  # code of the source's own is not carried
        config.pop(name, None)
    family = source.family
    if len(specs) < source.n_blocks:
        config["num_hidden_layers"] = len(specs)
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][s.block] for s in shapes]
    native = find_native(specs, shapes[0], family)
    if native is not None:
        config |= native
        config["architectures"] = [family.classes[2]]
        if needs_eager(source.config):
            config["attn_implementation"] = "eager"  # what transformers then takes unless it is told
    else:
        config_name, base_name, lm_name = class_names(family.model_type)
        config |= {
            "architectures": [lm_name],
            "model_type": model_type(family.model_type),
            "auto_map": {
                "AutoConfig": f"modelling.{config_name}",
                "AutoModel": f"modelling.{base_name}",
                "AutoModelForCausalLM": f"modelling.{lm_name}",
            },
            "planish": {"format": FORMAT, "family": family.model_type, "blocks": specs},
            "per_layer_config": per_layer(specs, shapes, family),
        }
        for module in (families_file, modules_file, attentions_file, blocks_file, modelling_file):
            path = Path(str(module.__file__))
            writer.text(path.name, path.read_text(encoding="utf-8"))
    config["transformers_version"] = transformers.__version__
    writer.text("config.json", json.dumps(config, indent=2, default=str) + "\n")
    return "native" if native is not None else "planish"


def per_layer(specs: list[Spec], shapes: list[Shape], family: Family) -> dict[str, dict[str, Any]]:
    """The transformers-standard per-layer overrides that describe these blocks."""
    out: dict[str, dict[str, Any]] = {}
    digits = len(str(len(specs) - 1))
    for i, (spec, shape) in enumerate(zip(specs, shapes, strict=True)):
        layer: dict[str, Any] = {}
        down = spec.get("linears", {}).get("down", {})
        if family.intermediate:
            layer[family.intermediate] = down.get("in", shape.intermediate)
        skip = [
            n for n, key in (("attention", "attention"), ("mlp", "mlp")) if spec.get(key, {}).get("kind") == "bypass"
        ]
        if skip:
            layer["skip"] = skip
        out[str(i).zfill(digits)] = layer
    return out


def kv_bytes(specs: list[Spec], shapes: list[Shape], itemsize: int) -> int:
    """Bytes the KV cache grows by per token and sequence."""
    total = 0
    for spec, shape in zip(specs, shapes, strict=True):
        form = spec.get("attention", {})
        if form.get("kind") == "bypass":
            continue
        keys = form["k_rank"] * form["k_groups"] if "k_rank" in form else shape.kv_heads * form.get("qk", shape.qk)
        total += (keys + shape.kv_heads * form.get("v", shape.v)) * itemsize
    return total


def load(folder: str | Path, **kwargs) -> PreTrainedModel:
    """A causal LM from a dense or compressed folder; runs no code but planish's own and transformers'.

    Its attention computes all that the configuration says, unless `attn_implementation` asks for another.
    """
    path = find_folder(folder)
    config = load_config(path)
    if needs_eager(config) and "attn_implementation" not in kwargs:
        kwargs["attn_implementation"] = "eager"
        warnings.warn(NO_SOFT_CAP.format(f"{folder} is loaded"), stacklevel=2)
    files = index_tensors(path)  # says what is missing, and that pickles are not read
    if not getattr(config, "quantization_config", None):
        for file in sorted(set(files.values())):
            Shard(file)
    try:
        kwargs |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except Exception as error:  # whatever a damaged folder makes the model's own code raise
        raise InputError(f"cannot load {folder}: {type(error).__name__}: {error}") from None
    for name in sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise InputError(f"tensor {name} is missing in {folder}: the checkpoint is incomplete")
    return model.eval()
