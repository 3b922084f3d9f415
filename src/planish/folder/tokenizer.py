"""A folder's tokenizer, and the files beside the weights that a result carries on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.gguf_tokenizer import load_gguf_tokenizer, read_generation_config

COPIED = (  # whatever tokenizers and processors of transformers save, and how to generate
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "sentencepiece.bpe.model", "spiece.model", "tekken.json", "tokenizer.tiktoken", "tiktoken.model", "qwen.tiktoken",
    "normalizer.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None where it has none."""
    if is_gguf(folder):
        return load_gguf_tokenizer(open_gguf(folder).file)
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever damaged files make it raise; code of its own is not run
        what = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load the tokenizer of {folder}: {type(error).__name__}: {what}") from None


def copy_files(folder: Path, target: Path) -> None:
    """Copy tokenizer and generation files, whichever there are; those of a GGUF file are written from its metadata."""
    if is_gguf(folder):
        if tokenizer := load_tokenizer(folder):
            tokenizer.save_pretrained(target)
        read_generation_config(open_gguf(folder).file).save_pretrained(target)
        return
    check_links(folder)
    for path in list_copied(folder):
        (target / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(folder))


def list_copied(folder: Path) -> list[Path]:
    """The files beside the weights that a result carries on."""
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    return [folder / n for n in COPIED if (folder / n).is_file()] + [p for p in templates if p.is_file()]


def check_links(folder: Path) -> None:
    """What is copied into results lies in the model's folder, or in a store of the hub's cache: no link leads elsewhere."""
    for path in (folder / "config.json", *list_copied(folder)):
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot follow {path}: {error}") from None
        store = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if not store and not target.is_relative_to(folder.resolve()):
            raise InputError(f"{path} is a link to {target}, outside the model's folder: copy the file there")
