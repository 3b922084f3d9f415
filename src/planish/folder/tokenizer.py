"""A folder's tokenizer, and the files beside the weights that a result carries on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.gguf_tokenizer import load_gguf_tokenizer, read_generation_config
from planish.folder.weights import check_inside

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


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
    for name in COPIED:
        if (folder / name).is_file():
            check_inside(folder, folder / name)
            shutil.copyfile(folder / name, target / name)
