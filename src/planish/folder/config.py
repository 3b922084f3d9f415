"""config.json: read and checked, and written for a compressed model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig

import planish.modelling
from planish.core import Shape
from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.packed.declared import FIELDS, METHODS, find_declared
from planish.folder.recognise import refuse_deep, refuse_file, refuse_unlike
from planish.folder.towers import Tower, split_config
from planish.modelling.blocks import Spec
from planish.modelling.families import FAMILIES, MLP, Family
from planish.modelling.heads import needs_eager
from planish.modelling.modelling import FORMAT, class_names, find_classes, list_auto, model_type, register
from planish.modelling.wrappers import WRAPPERS, Wrapper

register()  # the Auto classes know compressed models from here on

PER_BLOCK = ("layer_types", "no_rope_layers")  # fields that hold a value for every block
VISION = ("_vision", "_vision_model", "pixtral")  # what model types of vision towers end with
NO_SOFT_CAP = "{} with eager attention: transformers' sdpa leaves out the soft cap of attention scores"


def load_config(folder: Path) -> Any:
    """A folder's configuration; models built from it have an attention that computes all that it says."""
    config = copy.deepcopy(open_gguf(folder).config) if is_gguf(folder) else read_config(folder)
    if needs_eager(split_config(config)[0]):
        config._attn_implementation = "eager"
    return config


def read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        refuse_file(folder)
        refuse_unlike(folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(kind, str):
        raise InputError(f"{path} names no model_type")
    refuse_deep(found, path)
    if wrapper := WRAPPERS.get(kind):
        check_text(found, wrapper, path)
    elif not kind.startswith("planish"):
        check_kind(kind)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path} is not a valid {kind} configuration: {error}") from None
    if find_declared(folder):  # weights are dequantised as they are read
        for name in FIELDS:
            if hasattr(config, name):
                delattr(config, name)
    return config


def check_kind(kind: str, inside: str = "") -> None:
    """InputError for a model_type that no row of the tables has, with the nearest ones; `inside`: the wrapper it is in."""
    known = FAMILIES if inside else {**FAMILIES, **WRAPPERS}
    if kind in known:
        return
    if kind.endswith(VISION) and not inside:
        raise InputError(f"{kind!r} is a vision tower, without a language model: give the whole model's folder")
    near = get_close_matches(kind, known, n=3, cutoff=0.4)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    what = f"{inside} around a language model of the family {kind!r}" if inside else f"model family {kind!r}"
    raise InputError(f"{what} is not supported{nearest} (supported: {', '.join(sorted(known))})")


def check_text(found: dict[str, Any], wrapper: Wrapper, path: Path) -> None:
    """InputError for a wrapper's config.json that does not say what its language model is."""
    text = found.get("text_config")
    if isinstance(text, dict):
        if isinstance(kind := text.get("model_type"), str):
            check_kind(kind, wrapper.model_type)
    elif not (wrapper.flat and text is None and "hidden_size" in found):
        raise InputError(
            f"{path} has no text_config: nothing says what the language model inside {wrapper.model_type} is; "
            "take config.json from the release again"
        )


def find_family(config) -> Family:
    """The table row of a language model's config, or a clear error that names the nearest ones."""
    kind = config.model_type
    if kind.startswith("planish"):
        raise InputError(f"model is already compressed by planish (model_type {kind!r}); start from the original model")
    check_kind(kind)
    if quantised := getattr(config, "quantization_config", None):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        raise InputError(
            f"the model is already quantised ({how or 'quantization_config'} in its config): compress the original weights, then "
            f"quantise the result (folders are read that declare {', '.join(METHODS)})"
        )
    family = FAMILIES[kind]
    if read_declared(config, "add_cross_attention"):
        raise InputError(f"{kind} with add_cross_attention=true is not supported: only decoder-only models are")
    if getattr(read_declared(config, "attn_config"), "clip_qkv", None):
        raise InputError(
            f"{kind} with attn_config.clip_qkv={config.attn_config.clip_qkv:g} is not supported: "
            "clipped queries, keys and values cannot be reduced linearly"
        )
    if clip := read_declared(config, "clip_qkv"):
        raise InputError(
            f"{kind} with clip_qkv={clip:g} is not supported: clipped queries, keys and values are not linear"
        )
    if read_declared(config, "alibi"):
        raise InputError(f"{kind} with alibi=true is not supported: its attention adds a bias for distance by itself")
    if read_declared(config, "parallel_attn") is False and not read_declared(config, "new_decoder_architecture"):
        raise InputError(f"{kind} with parallel_attn=false is not supported: only blocks with parallel submodules are")
    if read_declared(config, "use_bidirectional_attention") == "all":
        raise InputError(f"{kind} with use_bidirectional_attention=all is not supported: tokens see those behind them")
    if read_declared(config, "do_layer_norm_before") is False:
        raise InputError(f"{kind} with do_layer_norm_before=false (norms after the residual sum) is not supported")
    return family


def read_declared(config: Any, name: str) -> Any:
    """A field of a configuration; None where its class does not know it, whatever config.json says."""
    return getattr(config, name) if hasattr(type(config), name) else None


def is_compressed(config: Any) -> bool:
    """Whether planish wrote it."""
    return config.model_type.startswith("planish")


def read_layout(config: Any) -> tuple[Family, list[Spec]]:
    """The family, and every block's spec (empty where the block is a stock one)."""
    if is_compressed(config):
        try:
            family, specs = FAMILIES[config.planish["family"]], config.planish["blocks"]
        except (KeyError, TypeError) as error:
            raise InputError(f'config.json\'s entry "planish" names no family and blocks: {error!r}') from None
        if not isinstance(specs, list) or not all(isinstance(s, dict) for s in specs):
            raise InputError(f'config.json\'s entry "planish" holds no list of blocks, but {str(specs)[:60]}')
        return family, specs
    family = find_family(config)
    return family, [{} for _ in range(config.num_hidden_layers)]


def open_config(config: Any) -> tuple[Any, Tower | None]:
    """A language model's configuration, and the tower that it is in, as one that is written anew calls its tensors."""
    text, wrapper = split_config(config)
    if wrapper is not None and not is_compressed(text):
        check_kind(text.model_type, wrapper.model_type)
    return text, None if wrapper is None else Tower(wrapper, config, wrapper.prefix, wrapper.head)


def find_stock_config(config: Any, family: Family) -> Any:
    """The configuration of the original model that a folder was made from; of a dense one its own."""
    if not is_compressed(config):
        return config
    ours = {"planish", "auto_map", "architectures", "model_type"} | (
        set() if family.per_block else {"per_layer_config"}
    )
    settings = {k: v for k, v in config.to_dict().items() if k not in ours}
    return find_classes(family.model_type)[0](**settings)


def find_native(specs: list[Spec], shapes: list[Shape], family: Family) -> dict[str, Any] | None:
    """Config overrides under which the stock architecture holds every block, or None."""
    widths, mixtures = set[int](), set[tuple[int, int, int]]()
    narrow = min((s.intermediate for s in shapes if s.intermediate), default=0)
    for spec, shape in zip(specs, shapes, strict=True):
        linears = spec.get("linears", {})
        if set(spec) - {"linears", "experts"}:
            return None
        if any(f["kind"] != "dense" or "bias" in f for f in linears.values()):
            return None
        inner = {
            r: f["in"] if r.endswith("down") else f["out"] for r, f in linears.items() if r.rpartition(".")[2] in MLP
        }
        if len(inner) < len(linears) or any("." in r and not r.startswith("expert.") for r in inner):
            return None
        if shape.intermediate:
            times = shape.intermediate // narrow  # gemma4's last feed-forwards may be twice as wide
            own = {n for r, n in inner.items() if "." not in r} or {shape.intermediate}
            if shape.intermediate % narrow or any(n % times for n in own):
                return None
            widths |= {n // times for n in own}
        if shape.experts:
            form = spec.get("experts", {"number": shape.experts.number, "top": shape.experts.top})
            few = {n for r, n in inner.items() if "." in r}
            if sum("." in r for r in inner) < len(family.experts.roles if family.experts else ()) * form["number"]:
                few.add(shape.experts.intermediate)
            mixtures |= {(form["number"], form["top"], n) for n in few}
    if len(widths) > 1 or len(mixtures) > 1:
        return None
    found: dict[str, Any] = {}
    if mixtures and family.experts is not None:
        row = family.experts
        found |= dict(zip((row.count, row.top, row.width), mixtures.pop(), strict=True))
        if row.bound and found[row.width] != width_of_experts(shapes):
            return None
        for shared in {n for s in shapes for role, n, _ in s.others if role == "shared.up"} if row.shared else ():
            if shared % found[row.width]:  # it would have to become narrower too
                return None
            if found[row.width] != width_of_experts(shapes):
                found[row.shared] = shared // found[row.width]
    if family.intermediate:
        return found | dict(zip([family.intermediate], widths, strict=False)) | dict(family.settled)
    return found if widths <= {narrow} else None


def width_of_experts(shapes: list[Shape]) -> int:
    return next(s.experts.intermediate for s in shapes if s.experts)


def write_config(
    write: Callable[[str, str], None],
    dense: Any,
    family: Family,
    specs: list[Spec],
    shapes: list[Shape],
    tower: Tower | None = None,
    declared: Mapping[str, Any] | None = None,
) -> str:
    """`write(name, text)` config.json, and the modelling files where no stock architecture holds the shapes.

    `dense`: the uncompressed language model's configuration; `tower`: what it is in; `declared`: fields that say how
    weights are stored. Returns "native" or "planish".
    """
    config = dense.to_dict()
    for name in ("_name_or_path", "auto_map", "transformers_weights"):  # neither code nor files of the source's own
        config.pop(name, None)
    if len(specs) < dense.num_hidden_layers:
        config["num_hidden_layers"] = len(specs)
        for name in PER_BLOCK:
            if config.get(name):
                config[name] = [config[name][s.block] for s in shapes]
    native = find_native(specs, shapes, family)
    if native is not None:
        names = getattr(dense, "attribute_map", {})
        config |= native | {names[n]: value for n, value in native.items() if n in names}  # under either name
        config["architectures"] = [family.classes[2]]
        if needs_eager(dense):
            config["attn_implementation"] = "eager"  # what transformers then takes unless it is told
    else:
        config |= {
            "architectures": [class_names(family.model_type)[2]],
            "model_type": model_type(family.model_type),
            "auto_map": {auto: f"modelling.{name}" for auto, name in list_auto(family.model_type).items()},
            "planish": {"format": FORMAT, "family": family.model_type, "blocks": specs},
        }
        if not family.per_block:  # else they are what the stock class reads
            config["per_layer_config"] = per_layer(specs, shapes, family)
        if config.get("output_router_logits"):  # its loss of unbalanced routing takes all experts to be there
            config["output_router_logits"] = False
        for path in sorted(Path(str(planish.modelling.__file__)).parent.glob("[!_]*.py")):
            write(path.name, path.read_text(encoding="utf-8"))
    config = (config if tower is None else tower.wrap(config, native is not None)) | dict(declared or {})
    config["transformers_version"] = transformers.__version__
    write("config.json", json.dumps(config, indent=2, default=str) + "\n")
    return "native" if native is not None else "planish"


def name_head(tensors: dict[str, Tensor], family: Family, kind: str) -> dict[str, Tensor]:
    """The tensors under the names that a folder of this `kind` stores them: the head's, where the stock class has another."""
    head = family.head if kind == "native" else "lm_head"
    return {f"{head}.{n[8:]}" if n.startswith("lm_head.") else n: t for n, t in tensors.items()}


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
