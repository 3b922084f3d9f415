"""Files of a model: its shards, and what is copied with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from planish.errors import InputError
from planish.folder.gguf_reader import GGUFShard, is_gguf, open_gguf
from planish.folder.gguf_tokenizer import generation_config, load_gguf_tokenizer
from planish.folder.safetensors import Shard

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def open_shard(path: Path) -> Shard | GGUFShard:
    return open_gguf(path) if is_gguf(path) else Shard(path)


def check_inside(folder: Path, file: Path) -> None:
    """A model's files lie in its folder, or in the hub cache's own store beside it."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot follow {file}: {error}") from None
    if not target.is_relative_to(home) and not target.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(f"{file} is a link to {target}, outside the model's folder: copy the file there")


def copy_files(folder: Path, target: Path) -> None:
    """Tokenizer and generation files of a model; those of a GGUF file are written from its metadata."""
    if is_gguf(folder):
        if tokenizer := load_gguf_tokenizer(open_gguf(folder).file):
            tokenizer.save_pretrained(target)
        generation_config(open_gguf(folder).file).save_pretrained(target)
        return
    for name in COPIED:
        if (folder / name).is_file():
            check_inside(folder, folder / name)
            shutil.copyfile(folder / name, target / name)
