"""Named groups of tensors in the files of a folder, one folder per fingerprint, all of them within one limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from pathlib import Path

from torch import Tensor

from planish.errors import InputError
from planish.folder.safetensors import Shard, hash_file, write_shard

DISK = 8 << 30  # bytes of all fingerprints together; at most a quarter of what is free

Record = dict[str, Tensor]


class RecordFiles:
    """Records in the .safetensors files of one folder; without a folder, or once it cannot be used, there are none.

    A file carries its SHA-256 in its name and is never trusted without it. Other folders beside this one make room for new
    records, the longest unused first; those that are in use (`join`) never do.
    """

    def __init__(self, folder: Path | None, disk: int = DISK):
        self.folder, self.disk = folder, disk
        self.found: dict[str, tuple[Path, list[str]]] = {}  # record → its file and the names of its tensors
        self.checked: set[Path] = set()
        self.used = {folder}  # one set for all that have joined
        if folder is not None:
            self._open(folder)

    def join(self, other: RecordFiles) -> None:
        """Neither of the two, nor any that joined before, makes room for the other."""
        self.used |= other.used
        other.used = self.used

    def check(self, record: str) -> bool:
        """Whether a record is there and its file is what was written; if not, the file goes."""
        if record not in self.found:
            return False
        path = self.found[record][0]
        if path in self.checked and path.exists():  # another command may have made room
            return True
        with contextlib.suppress(OSError):
            if hash_file(path) == path.stem:
                self.checked.add(path)
                return True
        self.found = {r: f for r, f in self.found.items() if f[0] != path}
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def read(self, record: str) -> Record:
        """A record that `check` said is there."""
        path, names = self.found[record]
        shard = Shard(path)
        return {n: shard.read(f"{record}#{n}") for n in names}

    def write(self, records: dict[str, Record]) -> None:
        """Put records into one new file, if there is room for it."""
        if not records or self.folder is None:
            return
        tensors = {f"{name}#{part}": t for name, record in records.items() for part, t in record.items()}
        try:
            if not self._make_room(self.folder, sum(t.nbytes for t in tensors.values())):
                return
            draft = self.folder / f"{os.getpid()}.draft"
            path = self.folder / f"{write_shard(draft, tensors)}.safetensors"
            draft.replace(path)
        except OSError as error:
            self._give_up(error)
            return
        self.checked.add(path)
        for name, record in records.items():
            self.found[name] = (path, list(record))

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            self.disk = min(self.disk, shutil.disk_usage(folder).free // 4)
            for path in sorted(folder.glob("*.safetensors")):
                self._index(path)
        except OSError as error:
            self._give_up(error)

    def _index(self, path: Path) -> None:
        try:
            names = list(Shard(path).entries)
        except InputError:
            path.unlink(missing_ok=True)
            return
        for name in names:
            record, _, part = name.rpartition("#")
            self.found.setdefault(record, (path, []))[1].append(part)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(f"the cache in {self.folder} is not used: {error.strerror or error}", stacklevel=4)
        self.used.discard(self.folder)
        self.folder, self.found = None, {}

    def _make_room(self, folder: Path, size: int) -> bool:
        """Let the longest unused of the other folders go until `size` more bytes fit; False where they never will."""
        folders = sorted((f for f in folder.parent.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
        others = [f for f in folders if f not in self.used]
        sizes = {f: sum(p.stat().st_size for p in f.glob("*")) for f in folders}
        if sum(sizes[f] for f in folders if f in self.used) + size > self.disk:
            return False
        while sum(sizes.values()) + size > self.disk:
            shutil.rmtree(others[0], ignore_errors=True)
            del sizes[others.pop(0)]
        return True
