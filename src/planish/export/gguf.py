"""GGUF for llama.cpp: the smallest of its architectures that computes exactly what the folder computes.

| architecture | holds | price |
|---|---|---|
| llama, qwen2, qwen3 | equal blocks | smaller value dimensions and unequal MLP widths are filled up with zeros |
| deci | MLP widths per block, removed attention, attention → linear (normed input) | value dimensions are filled up |
| mimo2 | value dimensions below the head size, equal in all blocks | unequal MLP widths are filled up; no biases |

Low-rank linears are multiplied back and removed rotary pairs return as zero channels: no graph of llama.cpp has either.
Blocks of which nothing is left are not written; a constant beside a linear map becomes the bias of an MLP of zeros, in a
block of its own; a linear map for an MLP becomes an MLP whose gate is the constant 1.
What the filling costs is in the report; a model that none of them computes exactly is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from planish.errors import InputError
from planish.export import gguf_llama as llama
from planish.export import gguf_stock as stock
from planish.export.gguf_blocks import StoredRows, name_file_type
from planish.export.gguf_content import XIELU, Content, Stack
from planish.export.plain import open_plain
from planish.export.vocabulary import write_vocabulary
from planish.export.written import Written, check_file, check_finite
from planish.folder.source import FolderSource
from planish.plan.graphs import GRAPHS, LLAMAS, TANH, count_positions, limit_context, refuse_family, refuse_rope
from planish.rounding.ggml import quantise
from planish.rounding.types import GGML, STEPS, StorageType
from planish.version import __version__

DTYPES = ("f32", "f16", "bf16", *GGML)
WHOLE = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "ssm_conv1d.weight",
    "ssm_norm.weight",
    "ssm_a",
    "ssm_d",
    "shortconv.conv.weight",
    ".bias",  # of all experts of a block in one tensor: llama.cpp ends with the program where it is rounded
)  # in f32, as llama.cpp's converter has it


def export_gguf(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: str = "f16",
    architecture: str | None = None,
    vocabulary: bool = True,
) -> Written:
    """Write `output`. `architecture`: force one of llama.cpp's; `vocabulary`: include the folder's tokenizer.

    Matrices that the folder stores in llama.cpp's types (`compress --bits … --target gguf`) keep these to the bit, `dtype` is
    that of the others; where it is a rounded type they are rounded to nearest.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("export to gguf needs the gguf library · pip install 'planish[gguf]'") from None
    if dtype not in DTYPES:
        raise InputError(f"unknown GGUF type {dtype!r}; expected one of {', '.join(DTYPES)}")
    source = open_plain(folder)
    check_file(Path(output), source.folder, ".gguf")
    kind = source.family.model_type
    reason = refuse_family(kind, source.config)
    if not reason and kind in GRAPHS and source.family.rotary:
        reason = refuse_rope(kind, source.config)
    if reason:
        raise InputError(reason)
    content = (llama if source.family.model_type in LLAMAS else stock).lay_out(source, architecture)
    context = limit_context(source.family, source.config)

    target = Path(output)
    partial = target.with_name(target.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, content.graph, use_temp_file=True)
    tensors = Tensors(writer, gguf, dtype, StoredRows(source))
    with complete(writer, partial, target):
        write_metadata(writer, gguf, source, content, context)
        tokenizer, left_out = write_vocabulary(writer, source.folder, source.config, vocabulary, source.folder.name)
        for name, tensor in content.tensors(tensors.known):
            tensors.add(name, tensor)
        writer.add_file_type(gguf.LlamaFileType[tensors.file_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    total, stored = tensors.total, source.count()
    notes = describe_cost(total - stored, content.back, content.graph) + content.notes + left_out
    notes += describe_limits(source, content.graph, context)
    notes += tensors.describe(source.config.hidden_size)
    if source.tower:
        parts, kind = ", ".join(source.untouched.parts), source.tower.wrapper.model_type
        notes.append(f"the language model alone: {parts} of {kind} are left out")
    written = ", ".join(k.name for k in tensors.kinds) or dtype
    return Written("gguf", str(target), content.graph, written, total, stored, target.stat().st_size, tokenizer, notes)


@contextmanager
def complete(writer: Any, partial: Path, target: Path) -> Iterator[None]:
    """At the end the file is at its place; where anything fails, nothing of it is anywhere."""
    try:
        yield
        writer.close()
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):  # what is left to write has no place either
            writer.close()
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {target}: {error.strerror or error}") from None
        raise


@dataclass
class Tensors:
    """Puts tensors into a file in its type. `total` numbers so far, `odd` of them in another type because that cannot hold
    them; `kinds`: numbers in each rounded type; `known`: rows that are rounded already."""

    writer: Any
    gguf: Any
    dtype: str
    known: StoredRows
    total: int = 0
    odd: int = 0
    matrices: int = 0
    kinds: dict[StorageType, int] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor | Stack) -> None:
        if isinstance(tensor, Stack):
            self.add_stack(name, tensor)
            return
        data, raw = self.encode(name, tensor)
        self.writer.add_tensor(name, data, raw_dtype=raw)

    def add_stack(self, name: str, stack: Stack) -> None:
        """Matrix after matrix as one tensor of three axes, none of which waits in memory for the others."""
        first = None
        for matrix in stack.matrices:
            data, raw = self.encode(name, matrix)
            if first is None:
                first, shape, size = raw, (stack.count, *data.shape), data.nbytes * stack.count
                self.writer.add_tensor_info(name, shape, data.dtype, size, raw_dtype=raw)
            if raw != first:
                raise InputError(
                    f"tensor {name}: the folder stores experts of one block in {first.name} and {raw.name}; one file type holds all"
                )
            data.tofile(self.writer.temp_file)
        self.writer.write_padding(self.writer.temp_file, size)

    def encode(self, name: str, tensor: Tensor) -> tuple[np.ndarray, Any]:
        """Numbers as they are written, and the library's type where numpy has none of it."""
        self.total += tensor.numel()
        check_finite(name, tensor)
        raw = self.gguf.GGMLQuantizationType
        if (found := self.known.find(tensor)) is not None:
            kind, blocks = found
            self.kinds[kind] = self.kinds.get(kind, 0) + tensor.numel()
            return blocks, raw[kind.name.upper()]
        data = tensor.float().contiguous().numpy()
        whole = data.ndim < 2 or name.endswith(WHOLE)
        chosen = "f32" if whole else pick_kind(self.dtype, data.shape[-1])
        self.odd += 0 if whole or chosen == self.dtype else tensor.numel()
        self.matrices += not whole and self.known.weights is not None
        if chosen == "f16" and np.abs(data).max(initial=0) > 65504:
            raise InputError(f"tensor {name} exceeds the range of f16; use --dtype bf16 or f32")
        if chosen in ("f32", "f16"):
            return data.astype(np.float16 if chosen == "f16" else np.float32), raw[chosen.upper()]
        if chosen == "bf16":
            return self.gguf.quantize(data, raw.BF16), raw.BF16
        self.kinds[GGML[chosen]] = self.kinds.get(GGML[chosen], 0) + tensor.numel()
        return quantise(tensor, GGML[chosen]).numpy(), raw[chosen.upper()]

    @property
    def file_type(self) -> str:
        """llama.cpp's name of what most of the file is stored in."""
        plain = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
        return name_file_type(self.kinds) if self.kinds else plain[self.dtype if self.dtype in plain else "f16"]

    def describe(self, hidden: int) -> list[str]:
        """What is not stored in the type that was asked for, or that the folder has."""
        notes = []
        if self.odd:
            group, steps = GGML[self.dtype].group, STEPS[GGML[self.dtype].bits]
            cure = "" if hidden % group else f"; compress with --round-to {group}"
            other = "f16" if len(steps) == 1 else "a type with blocks of 32, or f16"
            odd = f"{self.odd:,} of {self.total:,} numbers, in rows that are no multiple of {group}"
            notes.append(f"stored as {other}, not {self.dtype}: {odd}{cure}")
        if self.matrices:
            notes.append(
                f"{self.matrices} matrices that the folder does not store in llama.cpp's types are in {self.dtype}"
            )
        return notes


def describe_cost(grown: int, back: int, graph: str) -> list[str]:
    """What the export costs."""
    notes = []
    if back:
        notes.append(f"low-rank forms and removed rotary pairs multiplied back to dense: {back:+,} weights")
    if grown != back:
        notes.append(f"zeros to fit {graph}, less norms of removed submodules: {grown - back:+,} weights")
    return notes


def describe_limits(source: FolderSource, graph: str, context: int) -> list[str]:
    """What the file does not hold, or llama.cpp does otherwise."""
    notes, longest = [], count_positions(source.config)
    if context < longest:
        notes.append(f"context limited to the sliding window, {context} of {longest} positions")
    if source.tower is not None:
        notes.append("the language model alone: what is around it is not in the file")
    if graph in TANH:
        notes.append(f"llama.cpp computes GELU in its tanh form in {graph}, whichever the model has")
    return notes


def pick_kind(dtype: str, width: int) -> str:
    """Rows that do not fill blocks get the type of a step more, or f16."""
    if dtype not in GGML:
        return dtype
    names = (dtype, *STEPS[GGML[dtype].bits])
    return next((n for n in names if GGML[n].holds(width)), "f16")


def write_metadata(writer: Any, gguf: Any, source: FolderSource, content: Content, context: int) -> None:
    writer.add_description(f"written by planish {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(source.config.hidden_size)
    writer.add_vocab_size(source.config.vocab_size)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in content.values.items():
        add[type(value)](name if name.startswith(XIELU) else f"{content.graph}.{name}", value)
