"""Folders in architectures that other stacks know and that have room for compressed shapes: MiMo-V2-Flash and DeciLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from planish.errors import InputError
from planish.export import configuration_decilm as decilm
from planish.export.plain import Plain, open_plain, pad_values, pad_width, plain_block, zero_attention
from planish.export.written import DTYPES, Written, check_apart, check_dtype, describe_products, keep_dtype
from planish.folder.source import FolderSource
from planish.folder.towers import refuse_wrapped
from planish.folder.writer import Writer

WIDTHS = 256  # DeciLM's MLPs are multiples of it
FAMILIES = ("llama", "mistral", "qwen2", "phi3")  # RMS norms, rotary embedding, gated silu MLP, no query/key norm

NAMES = {r: f"self_attn.{r}_proj" for r in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
NAMES |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def export_mimo(
    folder: str | Path, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Written:
    """MiMo-V2-Flash with full attention and dense MLPs: value dimensions below the head size, the same in all blocks.

    Loads with transformers' own class (eager attention). Value dimensions and MLP widths that differ
    from block to block are filled up with zeros to the largest; removed submodules likewise.
    """
    source = open_carrier(folder, "mimo")
    plains = [plain_block(source, i) for i in range(source.n_blocks)]
    for i, p in enumerate(plains):
        refuse_linear(p, i, "mimo")
    biases = {r for p in plains for r in ("q", "k", "v", "o", "gate", "up", "down") if f"{r}.bias" in p.tensors}
    if biases - set("qkv"):
        raise InputError(f"mimo has no bias for {sorted(biases - set('qkv'))[0]}")
    v, width = max(p.v for p in plains), max(p.width for p in plains)
    config = source.stock_config
    n = source.n_blocks
    rope = dict(config.rope_parameters) | {"partial_rotary_factor": plains[0].shape.rotary / plains[0].shape.qk}
    settings = base_settings(source) | {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "head_dim": plains[0].shape.qk,
        "v_head_dim": v,
        "intermediate_size": width,
        "attention_bias": bool(biases),
        "attention_value_scale": 1.0,
        "layer_types": ["full_attention"] * n,
        "mlp_layer_types": ["dense"] * n,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "sliding_window": config.max_position_embeddings,
    }

    def prepare(plain: Plain) -> None:
        if plain.attention == "none":
            zero_attention(plain, v, biases)
        pad_values(plain, v)
        pad_width(plain, width)
        for role in biases:
            plain.tensors.setdefault(f"{role}.bias", plain.tensors[role].new_zeros(len(plain.tensors[role])))

    del plains
    return write(source, Path(output), "mimo", settings, prepare, dtype, overwrite)


def export_deci(
    folder: str | Path, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> Written:
    """DeciLM (nemotron-nas): MLP widths per block and removed submodules, for vLLM, SGLang and MLX without planish.

    transformers itself has no class for it; vLLM and SGLang read the configuration through the file that the folder
    carries. Block 0 keeps an attention (of zeros if it was removed): vLLM asks for one. These stacks know an MLP's width as
    a multiple of 256 only, so every MLP is filled up to one.
    """
    source = open_carrier(folder, "deci")
    plains = [plain_block(source, i) for i in range(source.n_blocks)]
    for i, p in enumerate(plains):
        refuse_linear(p, i, "deci")
    first = plains[0].shape
    biases = {r for p in plains for r in p.tensors if r.endswith(".bias")}
    if biases or first.rotary != first.qk:
        raise InputError("deci is written for models without biases whose heads are rotated in full")
    rope = dict(source.stock_config.rope_parameters)
    blocks = []
    for i, p in enumerate(plains):
        attention: dict[str, Any] = {"no_op": p.attention == "none" and i > 0, "replace_with_linear": False}
        attention["n_heads_in_group"] = None if attention["no_op"] else first.groups
        ffn: dict[str, Any] = {"no_op": p.mlp == "none", "replace_with_linear": False, "ffn_mult": None}
        if p.mlp != "none":
            ffn["ffn_mult"] = name_width(p.width, first.hidden)
        blocks.append({"attention": attention, "ffn": ffn})
    settings = base_settings(source) | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "head_dim": first.qk,
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        "block_configs": blocks,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,  # MLX's name
        "rope_parameters": rope,
    }

    def prepare(plain: Plain) -> None:
        if plain.attention == "none" and plain.shape.block == 0:
            zero_attention(plain, plain.shape.v)
        if plain.attention == "full":
            pad_values(plain, plain.shape.v)
        if plain.mlp == "full":
            pad_width(plain, round_width(plain.width))

    del plains
    return write(source, Path(output), "deci", settings, prepare, dtype, overwrite, [Path(decilm.__file__)])


def round_width(width: int) -> int:
    return -(-width // WIDTHS) * WIDTHS


def name_width(width: int, hidden: int) -> float:
    """The `ffn_mult` that is read as `round_width(width)`: 2/3 · ffn_mult · hidden, and from there up to a multiple of 256."""
    return round(1.5 * (round_width(width) - WIDTHS / 2) / hidden, 6)


def find_carrier(folder: str | Path) -> str | None:
    """ "mimo" or "deci" where that architecture holds a compressed folder as it is, without a zero and without planish.

    mimo: fewer value dimensions, equal in all blocks, and equal MLP widths; deci: MLP widths per block, multiples of 256, and
    removed submodules.
    """
    try:
        source = open_carrier(folder, "mimo")
    except InputError:
        return None
    values, widths, removed = set(), set(), False
    for i, spec in enumerate(source.specs):
        shape = source.shape(i)
        attention, mlp, linears = (spec.get(n, {}) for n in ("attention", "mlp", "linears"))
        empty = [
            not (f.get("rank") or f.get("gate") or f.get("shift"))
            for f in (attention, mlp)
            if f.get("kind") == "bypass"
        ]
        cut = attention.get("kind") == "own" and (
            attention["qk"] != shape.qk or attention.get("pairs") or "k_rank" in attention
        )
        if cut or not all(empty) or any(f["kind"] != "dense" for f in linears.values()):
            return None
        removed = removed or bool(empty)
        if attention.get("kind") != "bypass":
            values.add(attention.get("v", shape.v))
        if mlp.get("kind") != "bypass":
            widths.add(linears.get("down", {}).get("in", shape.intermediate))
    full = source.shape(0)
    if not removed and len(values) == len(widths) == 1 and max(values) < full.v:
        return "mimo"
    biased = any(n.endswith(".bias") for n in source.reader.names)
    first = source.specs[0].get("attention", {}).get("kind") == "bypass"  # deci would fill it up
    held = values <= {full.v} and not first and not biased and full.rotary == full.qk
    held = held and all(w == round_width(w) for w in widths)
    return "deci" if held and source.reader.compressed else None


def read_carrier(path: Path) -> str | None:
    """ "mimo" or "deci" for folders exported to an architecture that is not one of planish's families."""
    return {"mimo_v2_flash": "mimo", "nemotron-nas": "deci"}.get(read_config(path).get("model_type", ""))


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is; empty where it cannot be read (`load_config` says why)."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_own_code(path: Path) -> bool:
    """Whether all the code that a DeciLM folder names is planish's configuration file, unchanged."""
    named = read_config(path).get("auto_map") == {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    file = path / "configuration_decilm.py"
    return named and file.is_file() and file.read_bytes() == Path(decilm.__file__).read_bytes()


def open_carrier(folder: str | Path, target: str) -> FolderSource:
    source = open_plain(folder)
    if source.tower:
        refuse_wrapped(source.tower.config, f"a folder for {target}", "export --to dense, or --to gguf")
    kind, config = source.family.model_type, source.stock_config
    if kind not in FAMILIES:
        raise InputError(f"{target} can carry {', '.join(FAMILIES)}; got {kind}")
    if config.hidden_act != "silu":
        raise InputError(f"{target} needs the activation silu, got {config.hidden_act!r}")
    if source.family.window and getattr(config, "sliding_window", None):
        raise InputError(f"{target} is written without sliding windows; this model has one of {config.sliding_window}")
    return source


def refuse_linear(plain: Plain, i: int, target: str) -> None:
    if "linear" in (plain.attention, plain.mlp):
        raise InputError(f"{target} has no place for block {i}'s linear map in place of a submodule")


def base_settings(source: FolderSource) -> dict[str, Any]:
    """What any of these architectures reads from config.json."""
    config = source.stock_config
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout",
    )  # fmt: skip
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    return {n: getattr(config, n) for n in names if hasattr(config, n)} | ({"dtype": dtype} if dtype else {})


def write(
    source: FolderSource,
    output: Path,
    target: str,
    settings: dict[str, Any],
    prepare: Any,
    dtype: str | None,
    overwrite: bool,
    code: Sequence[Path] = (),
) -> Written:
    """Write every block under LLaMA's tensor names, after `prepare`, in `dtype` or (None) products in fp32, the rest as is.

    `code`: files that the configuration refers to.
    """
    check_dtype(dtype)
    check_apart(output, source.folder)
    writer = Writer(output, source.n_blocks, overwrite)
    back, wide = 0, False
    try:
        for i in range(source.n_blocks):
            plain = plain_block(source, i)
            back += plain.extra
            prepare(plain)
            tensors = {}
            for name, tensor in plain.tensors.items():
                role, _, leaf = name.partition(".")
                unused = (name == "attention_norm" and plain.attention == "none") or (
                    name == "mlp_norm" and plain.width == 0
                )
                if not unused:
                    tensors[f"model.layers.{i}.{NAMES[role]}.{leaf or 'weight'}"] = tensor
            writer.shard(i + 1, keep_dtype(tensors, dtype))
            wide |= any(t.dtype == torch.float32 for n, t in tensors.items() if n.endswith("proj.weight"))
        writer.shard(0, keep_dtype(source.outside(), dtype))
        if dtype or wide:
            settings["dtype"] = str(DTYPES[dtype or "f32"]).removeprefix("torch.")
        writer.text("config.json", json.dumps(settings, indent=2) + "\n")
        for file in code:
            writer.text(file.name, file.read_text(encoding="utf-8"))
        source.copy_files(writer.partial)
        size, total = writer.bytes, writer.parameters
        weights, stored = size - writer.index_bytes, source.count()
        writer.close()
    except BaseException:
        writer.abort()
        raise
    notes = [f"low-rank forms and removed rotary pairs multiplied back to dense: {back:+,} weights"] if back else []
    if total - stored != back:
        notes.append(f"zeros to fit {target}, less norms of removed submodules: {total - stored - back:+,} weights")
    notes += describe_products(total, weights, source.itemsize) if dtype is None else []
    return Written(
        target, str(output), settings["architectures"][0], dtype or "as stored", total, stored, size, "copied", notes
    )
