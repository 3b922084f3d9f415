"""The configuration that describes a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from planish.core import Shape
from planish.folder.source import Source
from planish.folder.writer import Writer
from planish.modelling import attentions as attentions_file
from planish.modelling import blocks as blocks_file
from planish.modelling import families as families_file
from planish.modelling import modelling as modelling_file
from planish.modelling import modules as modules_file
from planish.modelling.attentions import needs_eager
from planish.modelling.blocks import Spec
from planish.modelling.families import Family
from planish.modelling.modelling import FORMAT, class_names, model_type


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
