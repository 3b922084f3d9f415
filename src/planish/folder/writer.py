"""A compressed folder, written shard by shard; what an interrupted run has finished is found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from planish import lanes
from planish.errors import InputError
from planish.folder.config import name_head
from planish.folder.model_folder import split_experts
from planish.folder.owner import WRITER, check_free, check_output
from planish.folder.released import Released
from planish.folder.safetensors import Later, Shard, hash_file, make_header, sync_folder, write_shard, write_text
from planish.folder.source import Source
from planish.folder.stored_linear import find_experts, list_tensors, set_read
from planish.folder.tokenizer import TEMPLATES
from planish.folder.towers import Tower
from planish.modelling.blocks import install
from planish.modelling.canonical import join_block, keep_experts, split_block
from planish.modelling.families import Family

# what savers of models, the hub and planish put into a model's folder
SAVED = {".safetensors", ".json", ".py", ".model", ".jinja", ".yaml", ".part", ".tiktoken"}
SAVED_NAMES = {
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "merges.txt",
    "vocab.txt",
    ".gitattributes",
    "NOTICE",
    "USE_POLICY.md",
}


class Writer:
    """A compressed folder, written shard by shard into `<output>.partial` and renamed when it is complete.

    `resume/` inside it holds what was asked (`keep_request`) and a journal: one line per finished block, added after its
    shard is durable. `finished`: the journal's entries by block, where an interrupted run is taken up. Of several
    processes only the first writes. `tower`: what the model is in, which says how its tensors are called there. `released`: where
    what stays is written as it is stored.
    """

    def __init__(
        self, output: Path, n_blocks: int, overwrite: bool = False, resume: bool = False, tower: Tower | None = None
    ):
        check_free(output, overwrite)
        self.output, self.n_shards, self.tower = output, n_blocks + 1, tower
        self.released: Released | None = None
        self.kept: dict[int, Sequence[int]] = {}  # per block, of the experts as they are stored
        self.active = lanes.rank() == 0
        self.weight_map: dict[str, str] = {}
        self.bytes = 0  # of tensors
        self.index_bytes = 0  # of these, index tables
        self.headers = 0  # bytes of the files' headers
        self.parameters = 0  # of the model, however it is stored
        self.partial = output.with_name(output.name + ".partial")
        self.state = self.partial / "resume"
        self.stem = "model"  # of shards' names until the folder is complete
        self.finished: dict[int, dict[str, Any]] = {}
        if resume:
            self.finished = lanes.share(self.read_journal() if self.active else {})
        else:
            if self.active:
                self.create(output, overwrite)
            lanes.share(None)  # nobody writes into the folder before it is there

    def create(self, output: Path, overwrite: bool) -> None:
        check_output(output, overwrite)
        if self.partial.exists():
            shutil.rmtree(self.partial)
        try:
            self.state.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot create {self.partial}: {error}") from None

    def read_journal(self) -> dict[int, dict[str, Any]]:
        """Entries by block, up to the first whose line is torn or whose shard is not what was written."""
        found: dict[int, dict[str, Any]] = {}
        path = self.state / "journal.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = unseal(json.loads(line))
                if entry["shard"] and hash_file(self.partial / entry["shard"]) != entry["sha256"]:
                    break
            except (ValueError, KeyError, TypeError, OSError):
                break
            found[entry["block"]] = entry
        if path.exists():
            write_text(path, "".join(json.dumps(seal(e)) + "\n" for e in found.values()))
        for stray in set(self.partial.glob("*.safetensors*")) - {
            self.partial / str(e["shard"]) for e in found.values()
        }:
            stray.unlink()
        return found

    @property
    def warned(self) -> set[str]:
        """Warnings of blocks that were finished before."""
        return {w for entry in self.finished.values() for w in entry["warnings"]}

    def keep_request(self, request: dict[str, Any], windows: Mapping[str, Tensor]) -> None:
        """Remember what was asked, so that an interrupted run can be taken up."""
        if self.active:
            digest = write_shard(self.state / "windows.safetensors", windows)
            request = json.loads(json.dumps(request | {"windows": digest}, default=str))
            write_text(self.state / "request.json", json.dumps(seal(request), indent=2) + "\n")

    def shard(
        self,
        number: int,
        tensors: Mapping[str, Tensor | Later],
        write: bool = True,
        named: bool = False,
        parameters: int | None = None,
    ) -> tuple[str, str]:
        """Write shard `number` (0 = what is outside the blocks, i + 1 = block i); its name and SHA-256. `named`: the tensors have
        the names that they are stored under; `parameters`: so many are packed in them."""
        if self.tower is not None and not named:
            tensors = {self.tower.store_name(n): t for n, t in tensors.items()}
        name, digest = f"{self.stem}-{number + 1:05d}-of-{self.n_shards:05d}.safetensors", ""
        try:
            if write and self.active:
                digest = write_shard(self.partial / name, tensors)
        except OSError as error:
            raise InputError(f"cannot write {self.partial / name}: {error}") from None
        if tensors:
            self.headers += 8 + len(make_header(tensors)[0])
        for key, t in tensors.items():
            self.weight_map[key] = name
            self.bytes += t.numel() * t.element_size()
            plain = parameters is None
            self.index_bytes += t.numel() * t.element_size() if plain and not t.is_floating_point() else 0
            self.parameters += t.numel() if plain and t.is_floating_point() and self.stem == "model" else 0
        self.parameters += parameters or 0
        return name, digest

    def block(
        self,
        i: int,
        block: nn.Module | None,
        family: Family,
        at: int | None = None,
        entry: dict[str, Any] | None = None,
    ) -> None:
        """Write block `i` of the source as block `at` of the output (None: it is left out); with an `entry`, note it in
        the journal."""
        name, digest, at = None, "", i if at is None else at
        if block is not None and self.released is not None:
            experts = find_experts(block, family)
            self.kept[at] = experts.origins if experts else ()
            tensors, count = self.released.block(i, at, self.kept[at]), sum(p.numel() for p in block.parameters())
            name, digest = self.shard(at + 1, tensors, i not in self.finished, named=True, parameters=count)
            entry = None if entry is None else entry | {"kept": list(self.kept[at])}
        elif block is not None:
            join_block(block, family)
            found = list_tensors(block, family)
            tensors = {family.store_name(f"{family.blocks}.{at}.{k}"): v for k, v in found.items()}
            if tensors:
                name, digest = self.shard(at + 1, tensors, write=i not in self.finished)
            stored = block.state_dict().keys()
            self.parameters -= sum(
                b.numel() for n, b in block.named_buffers() if n in stored and b.is_floating_point()
            )  # correction biases of routers
        if entry is not None and i not in self.finished and self.active:
            entry = json.loads(json.dumps({"block": i, "at": at, "shard": name, "sha256": digest, **entry}))
            line = json.dumps(seal(entry))
            try:
                with (self.state / "journal.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"cannot write the journal in {self.state}: {error}") from None

    def restore(self, i: int, block: nn.Module, source: Source) -> nn.Module:
        """Turn block i of the source, in place, into the finished one; canonical."""
        entry = self.finished[i]
        if self.released is not None:
            if form := entry["spec"].get("experts"):
                keep_experts(block, source.family, entry["kept"], form["top"])
            return block
        install(block, entry["spec"], source.family, source.config)
        join_block(block, source.family)
        if entry["shard"]:
            shard, prefix = Shard(self.partial / entry["shard"]), f"{source.family.blocks}.{entry['at']}."
            inside = {n: n if self.tower is None else self.tower.read_name(n) or n for n in shard.entries}
            names = {source.family.read_name(name): n for n, name in inside.items()}
            split = find_experts(block, source.family) is not None
            rows = split_experts(names, source.family, shard.entry) if split else {}
            for name, stored in names.items():
                read = (
                    partial(shard.read, stored)
                    if name not in rows
                    else partial(rows[name].read, partial(shard.read_rows, stored))
                )
                set_read(block, name.removeprefix(prefix), read)
        return split_block(block, source.family, source.config)

    def text(self, name: str, text: str) -> None:
        if not self.active:
            return
        try:
            write_text(self.partial / name, text)
        except OSError as error:
            raise InputError(f"cannot write {self.partial / name}: {error}") from None

    def close(self) -> None:
        if not self.active:
            return
        names = sorted(set(self.weight_map.values()))
        if self.stem != "model":
            for old in self.partial.glob("model-*.safetensors"):
                old.unlink()
        final = {
            n: f"model-{n.split('-')[1]}-of-{len(names):05d}.safetensors" for n in names
        }  # whole blocks may be gone
        for name, other in final.items():
            os.replace(self.partial / name, self.partial / other)
        self.weight_map = {k: final[n] for k, n in self.weight_map.items()}
        self.index()
        for leftover in self.partial.glob("*.part"):
            leftover.unlink()
        if self.output.exists():
            shutil.rmtree(self.state / "old", ignore_errors=True)
            os.replace(self.output, self.state / "old")
        try:
            os.replace(self.partial, self.output)
        except OSError:
            if (self.state / "old").exists():
                os.replace(self.state / "old", self.output)
            raise
        sync_folder(self.output.parent)
        tidy(self.output)

    def index(self) -> None:
        """Write which tensor is in which shard."""
        index = {
            "metadata": {"total_size": self.bytes, "total_parameters": self.parameters, **WRITER},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        self.text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def again(self) -> Path:
        """The folder as it has been written, to read; what is written from here on takes its place once it is complete."""
        self.index()
        self.stem, self.weight_map = "rounded", {}
        self.bytes = self.index_bytes = self.headers = 0
        return self.partial

    def abort(self, wrong_input: bool = False) -> None:
        """After an error: leave nothing behind, unless blocks are finished and the run can be taken up again.

        `wrong_input`: taking it up again would meet the same wrong input, or the same full disk.
        """
        if self.active and (wrong_input or not (self.state / "journal.jsonl").exists()):
            shutil.rmtree(self.partial, ignore_errors=True)


def write_outside(source: Source, writer: Writer, kind: str) -> int:
    """Write what is in no block of a folder of this `kind`; its parameters."""
    if writer.released is not None:
        inside = f"{source.family.blocks}."
        count = sum(n for name, (n, _) in source.sizes().items() if not name.startswith(inside))
        writer.shard(0, writer.released.rest(), named=True, parameters=count)
        return count
    outside = source.outside()
    writer.shard(0, name_head(outside, source.family, kind))
    copy_untouched(source, writer)
    return sum(t.numel() for t in outside.values()) + source.untouched.count


def copy_untouched(source: Source, writer: Writer) -> None:
    """Write the source's untouched tensors, behind all others, a few at a time."""
    rest, first = source.untouched, max(int(n.split("-")[1]) for n in writer.weight_map.values())
    for n, names in enumerate(rest.chunks()):
        writer.shard(first + n, {name: rest.read(name) for name in names}, named=True)


def list_foreign(folder: Path) -> list[Path]:
    """What is in a folder and was put there by no saver of models."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        own_folder = path.is_dir() and not path.is_symlink() and path.name in ("resume", ".cache", TEMPLATES)
        own_file = not path.is_dir() and (path.suffix in SAVED or path.name in SAVED_NAMES)
        if not (own_folder or own_file):
            found.append(path)
    return found


def tidy(output: Path) -> bool:
    """Remove what a complete folder no longer needs; whether there was anything (a run was stopped just before this).

    What the folder it replaced held besides a model is put back first.
    """
    left = output / "resume"
    if left.is_symlink() or not left.is_dir():
        return False
    for path in list_foreign(left / "old"):
        if not os.path.lexists(output / path.name):
            os.replace(path, output / path.name)
    shutil.rmtree(left)
    sync_folder(output)
    return True


def seal(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with a digest of itself."""
    text = json.dumps(entry, sort_keys=True).encode()
    return entry | {"digest": hashlib.sha256(text).hexdigest()}


def unseal(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry without its digest, which must be right (ValueError)."""
    rest = {k: v for k, v in entry.items() if k != "digest"} if isinstance(entry, dict) else {}
    if not rest or seal(rest) != entry:
        raise ValueError("it is not what was written")
    return rest
