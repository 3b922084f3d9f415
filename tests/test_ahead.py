"""While a block is computed the system reads the next one's weights: asked for piece by piece, and there when they are needed."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from planish.folder import safetensors
from planish.folder.safetensors import Shard, write_shard
from planish.folder.source import open_source

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system is not asked to read ahead")


def test_every_block_asks_for_the_next_one(tmp_path, monkeypatch):
    """Up and down: all bytes of the following block's tensors, none twice, no other, in pieces that are read whole."""
    folder = tiny.save(tiny.build("llama_gqa", num_hidden_layers=4), tmp_path / "model")
    source, shard = open_source(folder), Shard(folder / "model.safetensors")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(safetensors, "AHEAD", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append((start, size)))
    for i, following in ((0, 1), (1, 2), (2, 3), (3, None), (2, 1), (1, 0)):
        asked.clear()
        source.block(i)
        names = [n for n in shard.entries if n.startswith(f"model.layers.{following}.")]
        wanted = [b for n in names for b in range(shard.entry(n).start, shard.entry(n).start + shard.entry(n).size)]
        assert sorted(b for start, size in asked for b in range(start, start + size)) == sorted(wanted)
        assert all(size <= 100 for _, size in asked)


def share_held(path: Path) -> float:
    """Share of a file's pages that are in the system's cache; looking brings none there."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages) == 0
        del first
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it holds of a file")
def test_what_is_asked_for_is_read_whole(tmp_path):
    """A tensor larger than any device's read-ahead comes into the system's cache, though nobody reads it."""
    path = tmp_path / "x.safetensors"
    write_shard(path, {"x": torch.zeros(32 << 20, dtype=torch.uint8)})
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not on the disk yet cannot leave the cache
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard = Shard(path)
    if share_held(path) > 0.1:
        pytest.skip("this file system keeps its files in memory")
    shard.expect(["x"])
    end = time.monotonic() + 30
    while share_held(path) < 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert share_held(path) == 1
