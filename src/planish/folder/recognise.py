"""What was given in place of a model's folder: the usual wrong inputs, named with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planish.errors import InputError

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
CONVERT = "save it once with from_pretrained(…).save_pretrained(…)"

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what families call the number of blocks
DEEPEST = 10_000  # blocks: transformers makes a list of them before anything else is looked at


def refuse_deep(found: dict[str, Any], path: Path) -> None:
    """InputError for a configuration of more blocks than any model has."""
    text = found.get("text_config")
    for part in (found, text if isinstance(text, dict) else {}):
        for name in DEPTHS:
            if isinstance(n := part.get(name), int) and n > DEEPEST:
                raise InputError(f"{path} says {n:,} blocks ({name}), and at most {DEEPEST:,} are read: it is damaged")


def refuse_file(path: Path) -> None:
    """InputError for a file, which is no model's folder."""
    if not path.is_file():
        return
    known = {
        ".onnx": "is an ONNX file: give the folder of safetensors that it was made from",
        ".safetensors": "is one file of a model: give the folder that holds it and its config.json",
        ".json": "is a file: give the folder that it is in",
    } | dict.fromkeys(PICKLES, f"is a pickle, which is never read: {CONVERT}")
    raise InputError(f"{path} {known.get(path.suffix.lower(), 'is a file, not a folder')}")


def refuse_unlike(folder: Path) -> None:
    """InputError for a folder without a config.json."""
    if (folder / "adapter_config.json").is_file():
        what = describe_adapter(folder)
        raise InputError(
            f"{folder} is {what}: merge it into that model (merge_and_unload) and give the result, or give that model and "
            f"--adapter {folder}"
        )
    if (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is a diffusers pipeline, not a causal language model")
    if not folder.is_dir():
        raise InputError(f"no such model: {folder} is not a folder")
    names = [p.name for p in folder.iterdir()]
    inner = sorted(p.parent for p in folder.glob("*/config.json")) or sorted(
        p.parent for p in folder.glob("snapshots/*/config.json")
    )
    if what := describe_files(names):
        raise InputError(f"{folder} has no config.json: it holds {what}")
    hint = f"; {inner[0]} has one" if inner else ": not a Hugging Face model folder"
    raise InputError(f"{folder} has no config.json{hint}")


def describe_files(names: list[str]) -> str:
    """The format of weights that are no safetensors of transformers', and what to do; empty where there are none."""
    ends = {end: sorted(n for n in names if n.lower().endswith(end)) for end in (".gguf", ".onnx", *PICKLES)}
    pickles = [
        n for end in PICKLES for n in ends[end] if n not in ("training_args.bin", "optimizer.pt", "scheduler.pt")
    ]
    variants = sorted(n for n in names if n.startswith("model.") and ".safetensors" in n)
    if variants:
        variant = variants[0].split(".")[1]
        return f"only the variant {variants[0]}: load it once with variant={variant!r} and save it with save_pretrained"
    if consolidated := sorted(n for n in names if n.startswith("consolidated") or n == "params.json"):
        return f"weights in their maker's own format ({consolidated[0]}): give the Hugging Face version"
    if sharded := sorted(n for n in names if n.startswith("model-") and n.endswith(".safetensors")):
        return f"shards ({sharded[0]}) without their model.safetensors.index.json: download it again"
    if pickles:
        return f"only pickles ({pickles[0]}), and only safetensors are read, never pickles: {CONVERT}"
    if ends[".gguf"]:
        return f"only GGUF ({ends['.gguf'][0]}): download that file and give it"
    if ends[".onnx"]:
        return f"only ONNX ({ends['.onnx'][0]}): give the safetensors that it was made from"
    return ""


def refuse_adapter(folder: Path) -> None:
    """InputError for an adapter beside a model's weights, which `from_pretrained` would put onto them where peft is installed."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds a model and, beside it, {describe_adapter(folder)}: merge it first (merge_and_unload) and give the "
            "result, or move adapter_config.json elsewhere"
        )


def describe_adapter(folder: Path) -> str:
    """ "a LORA adapter of owner/model"."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, base = found.get("peft_type"), found.get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError):
        kind = base = None
    return f"a{' ' + str(kind) if kind else 'n'} adapter{' of ' + str(base) if base else ''}"
