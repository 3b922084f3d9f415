"""Models read one block at a time: a folder (dense or compressed), a config.json alone, or one in memory."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.apply import is_empty
from planish.core import Shape
from planish.errors import InputError
from planish.folder.checks import check_model, check_tensors
from planish.folder.config import NO_SOFT_CAP, find_family, find_stock_config, load_config, open_config
from planish.folder.model_folder import ModelFolder
from planish.folder.skeleton import (
    build_empty,
    build_skeleton,
    build_stock,
    build_whole,
    find_embedding,
    read_shape,
    set_parameter,
)
from planish.folder.stored_linear import StoredLinear, find_experts, list_apart
from planish.folder.tokenizer import check_links, copy_files
from planish.folder.towers import Tower, Untouched
from planish.modelling.blocks import find_blocks
from planish.modelling.canonical import split_block
from planish.modelling.families import Family
from planish.modelling.heads import needs_eager
from planish.modelling.modules import set_module
from planish.modelling.wrappers import find_language_model
from planish.stats import is_finite

HEAD = "lm_head.weight"
T = TypeVar("T")


class Source:
    """A model, read one block at a time. `stock_config` is the original model's where `config` is a compressed one's.

    Of a model in a wrapper (`tower`) this is the language model alone; all else is `untouched`.
    """

    config: Any
    stock_config: Any
    folder: Path | None = None
    family: Family
    name: str
    tower: Tower | None = None
    untouched = Untouched()

    def skeleton(self, experts: bool = True) -> PreTrainedModel:
        """A causal LM of its own on the meta device; only buffers hold values. Without `experts` it may have none of these: every
        one of thousands takes some memory for its modules, even if they are empty."""
        raise NotImplementedError

    def block(self, i: int, apart: bool = False) -> nn.Module:
        """A canonical copy of block i on the CPU in the stored dtype. `apart`: weights of large experts may stay in their file
        (`planish.folder.stored_linear`)."""
        raise NotImplementedError

    def weight(self, name: str) -> Tensor:
        """A parameter outside the blocks in the stored dtype, by its name in the causal LM; tied names are resolved."""
        raise NotImplementedError

    def outside(self) -> dict[str, Tensor]:
        """The model's tensors that belong to no block, by their names in the causal LM; tied matrices once."""
        raise NotImplementedError

    def copy_files(self, target: Path) -> None:
        """Tokenizer, processor and generation files."""
        raise NotImplementedError

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        """Every tensor that the model consists of, by its name in the causal LM: numbers and dtype, as they are stored.
        Nothing is read but headers; tied matrices count once."""
        raise NotImplementedError

    def _once(self, tensors: dict[str, T]) -> dict[str, T]:
        """Tied matrices once, under the embedding's name."""
        if not self.config.tie_word_embeddings or HEAD not in tensors:
            return tensors
        return {self._embedding_name(): tensors[HEAD]} | {n: t for n, t in tensors.items() if n != HEAD}

    @property
    def n_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def stored(self) -> torch.dtype:
        """What the blocks' weights are stored in."""
        return next(self.block(0).parameters()).dtype

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The original model's architecture; nothing in it has values."""
        with torch.device("meta"):
            return build_skeleton(self.stock_config, self.family)

    def _embedding_name(self) -> str:
        """Name of the input embedding's weight in the causal LM."""
        return find_embedding(self.empty)

    def count_head(self) -> int:
        """Weights of the output embedding."""
        return self.empty.get_output_embeddings().weight.numel()

    def shape(self, i: int) -> Shape:
        """Sizes of block i of the original model."""
        if i not in self._shapes:
            self._shapes[i] = read_shape(self.empty, self.family, i)
        return self._shapes[i]

    @cached_property
    def _shapes(self) -> dict[int, Shape]:
        """Of the blocks that were asked for."""
        return {}

    def empty_block(self, i: int) -> nn.Module:
        return split_block(find_blocks(self.empty, self.family)[i], self.family, self.config)


class FolderSource(Source):
    """A model folder's blocks, dense or compressed."""

    folder: Path

    def __init__(self, opened: ModelFolder):
        self._opened, self.folder, self.name, self.remote = opened, opened.path, opened.name, opened.remote
        self.config, self.family, self.specs = opened.config, opened.family, opened.specs
        self.stock_config = find_stock_config(self.config, self.family)
        self._last = -1  # block that was read last
        self.replaced: Mapping[str, Tensor] = {}  # what `weight` gives in place of what is stored
        if not self.remote:
            _ = self.reader

    @cached_property
    def reader(self) -> ModelFolder:
        """The folder's tensors, which are those that its configuration asks for."""
        prefix, reader = f"{self.family.blocks}.", self._opened
        self.tower, self.untouched = reader.tower, reader.untouched
        inside = {n.removeprefix(prefix).partition(".")[0] for n in reader.names if n.startswith(prefix)}
        if not self.n_blocks - sum(map(is_empty, self.specs)) <= len(inside) <= self.n_blocks:
            raise InputError(
                f"{self.folder}/config.json says {self.n_blocks} blocks, the checkpoint holds {len(inside)}: "
                "it is incomplete or another model's"
            )
        reader.leave_out_zeros(self.model.state_dict().keys())
        reader.check_adapter(self._tied)
        check_tensors({n: reader.entry(n) for n in reader.names}, self.model, self._tied, str(self.folder))
        pair = [n for n in self._tied if n in reader]
        if len(pair) == 2 and not is_same(*map(reader.tensor, pair)):  # then transformers does not tie them either
            self.config.tie_word_embeddings = self.stock_config.tie_word_embeddings = False
            del self.empty, self.model, self._tied
        return reader

    @property
    def stored(self) -> torch.dtype:
        inside = f"{self.family.blocks}."
        first = next(n for n, _ in self.model.named_parameters() if n.startswith(inside) and n in self.reader)
        return self.reader.entry(first).dtype

    @cached_property
    def model(self) -> PreTrainedModel:
        """The causal LM; only buffers hold values."""
        return build_empty(self.config, self.family)

    def skeleton(self, experts: bool = True) -> PreTrainedModel:
        _ = self.reader
        without: dict[int, Any] = {}  # what `deepcopy` takes for copied already
        for block in find_blocks(self.model, self.family) if not experts else ():
            if (found := find_experts(block, self.family)) is not None:
                without[id(found)] = nn.Identity()
        return copy.deepcopy(self.model, without)

    def block(self, i: int, apart: bool = False, experts: bool = True) -> nn.Module:
        left = list_apart(find_blocks(self.model, self.family)[i], self.family) if apart else {}
        block, reader = self.stored_block(i, experts and not left), self.reader
        for path, linear in left.items():
            name = f"{self.family.blocks}.{i}.{path}"
            bias = None if linear.bias is None else reader.tensor(f"{name}.bias")
            entry, read = reader.entry(f"{name}.weight"), lambda name=name: reader.tensor(f"{name}.weight")  # type: ignore[misc]
            set_module(block, path, StoredLinear(read, entry.shape, entry.dtype, bias))
        return split_block(block, self.family, self.config)

    def stored_block(self, i: int, experts: bool = True) -> nn.Module:
        """A copy of block i under its stored names (fused linears stay fused), in the stored dtype; `experts`: with the weights
        of its experts, which are else left on the meta device."""
        block = copy.deepcopy(find_blocks(self.model, self.family)[i], {id(self.model.config): self.model.config})
        row = None if experts else self.family.experts
        for name in [n for n in block.state_dict() if row is None or not n.startswith(f"{row.path}.")]:
            set_parameter(block, name, self.reader.tensor(f"{self.family.blocks}.{i}.{name}"))
        following = i + (1 if i >= self._last else -1)  # the stream goes up or down
        self._last = i
        self.reader.expect(self.reader.inside(following))
        return block

    def weight(self, name: str) -> Tensor:
        other = self._tied.get(name, name)
        for known in (name, other):
            if known in self.replaced:
                return self.replaced[known]
        return self.reader.tensor(name if name in self.reader else other)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Either name of a tied matrix → the other."""
        if not self.config.tie_word_embeddings:
            return {}
        names = (self._embedding_name(), HEAD)
        return dict(zip(names, reversed(names)))

    def _known(self) -> list[str]:
        """Names of the stored tensors that are the model's."""
        known = self.model.state_dict().keys()
        return [n for n in self.reader.names if n in known]

    def outside(self) -> dict[str, Tensor]:
        inside = f"{self.family.blocks}."
        tied = self._once({n: n for n in self._known() if not n.startswith(inside)})
        return {name: self.reader.tensor(stored) for name, stored in tied.items()}

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        entries = {n: self.reader.entry(n) for n in self._known()}
        return self._once({n: (math.prod(e.shape), e.dtype) for n, e in entries.items()})

    def count(self) -> int:
        """Stored parameters, tied ones once; index tables are none."""
        return sum(n for n, dtype in self.sizes().values() if dtype.is_floating_point)

    @property
    def itemsize(self) -> int:
        """Bytes of one stored weight."""
        prefix = f"{self.family.blocks}."
        return next(d.itemsize for n, (_, d) in self.sizes().items() if n.startswith(prefix) and n.endswith("weight"))

    def copy_files(self, target: Path) -> None:
        copy_files(self.folder, target)


class ConfigSource(Source):
    """A config.json without weights: enough to plan with. `whole`: the model that it is of, where its weights can be had."""

    def __init__(self, folder: Path, name: str | None = None, whole: FolderSource | None = None):
        self.config, self.tower = open_config(load_config(folder))
        self.name, self.whole = name or str(folder), whole
        self.stock_config, self.folder = self.config, folder
        self.family = find_family(self.config)
        if self.tower is not None:
            with torch.device("meta"):
                tensors = build_whole(self.tower).state_dict()
            around = {n: t for n, t in tensors.items() if self.tower.read_name(n) is None}
            self.untouched = Untouched({n: (t.numel(), self.stored) for n, t in around.items()})

    @property
    def stored(self) -> torch.dtype:
        kind = getattr(self.config, "dtype", None)
        return kind if isinstance(kind, torch.dtype) else torch.float32

    def block(self, i: int, apart: bool = False) -> nn.Module:
        raise InputError(f"{self.name} holds no weights, which this needs: give the whole model")

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        return self._once({n: (p.numel(), self.stored) for n, p in self.skeleton().state_dict().items()})

    def skeleton(self, experts: bool = True) -> PreTrainedModel:
        with torch.device("meta"):
            return build_skeleton(self.config, self.family)


class MemorySource(Source):
    """A causal LM in memory; never changed."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None):
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.config, self.tower = open_config(copy.deepcopy(model.config))
        self.stock_config, self._language = self.config, find_language_model(model) if self.tower else model
        if needs_eager(self.config) and self.config._attn_implementation == "sdpa":
            self.config._attn_implementation = "eager"
            warnings.warn(NO_SOFT_CAP.format("the model is calibrated"), stacklevel=4)
        self.family = find_family(self.config)
        self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        tensors = {n: t.detach() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        names = {n: n if self.tower is None else self.tower.read_name(n) for n in tensors}
        self._tensors = {name: tensors[n] for n, name in names.items() if name is not None}
        around = {n: t for n, t in tensors.items() if names[n] is None}
        self.untouched = Untouched(
            {n: (t.numel(), t.dtype) for n, t in around.items()}, lambda name: around[name].cpu()
        )
        with torch.device("meta"):
            check_tensors(self._tensors, build_stock(self.config, self.family), {}, "the model in memory")
        for name, tensor in self._tensors.items():
            if not is_finite(tensor):
                raise InputError(f"tensor {name} of the model in memory holds NaN or infinity")
        tied = self.config.tie_word_embeddings
        if tied and not is_same(*(self._tensors[n] for n in (self._embedding_name(), HEAD))):
            self.config.tie_word_embeddings = False
            del self.empty

    def block(self, i: int, apart: bool = False) -> nn.Module:
        memo = {id(self._language.config): self.config}
        block = copy.deepcopy(find_blocks(self._language, self.family)[i], memo).cpu().eval().requires_grad_(False)
        return split_block(block, self.family, self.config)

    def outside(self) -> dict[str, Tensor]:
        inside = f"{self.family.blocks}."
        return self._once({n: t.cpu() for n, t in self._tensors.items() if not n.startswith(inside)})

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        return self._once({n: (t.numel(), t.dtype) for n, t in self._tensors.items()})

    def skeleton(self, experts: bool = True) -> PreTrainedModel:
        return build_empty(self.config, self.family)

    def weight(self, name: str) -> Tensor:
        weight = self._tensors[name]
        return (
            weight.clone() if weight.is_inference() else weight
        )  # loaded in inference mode, which nothing differentiates

    def copy_files(self, target: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        if getattr(self.model, "generation_config", None) is not None:
            # as it is: `save_pretrained` refuses settings that several released models have
            self.model.generation_config.to_json_file(target / "generation_config.json", keys_to_pop=["compile_config"])


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same numbers in the same type."""
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def open_source(
    model: str | Path | PreTrainedModel | Source, tokenizer: Any = None, adapter: str | Path | None = None
) -> Source:
    """A dense model: a folder, a hub id, or a causal LM in memory; `adapter`: a LoRA adapter's folder, merged as it is read."""
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        if adapter is not None:
            raise InputError(
                f"the adapter {adapter} is merged into a folder's model as it is read: give the model's folder"
            )
        return MemorySource(model, tokenizer)
    opened = ModelFolder(model, adapter)
    find_family(opened.config)  # refuses compressed ones
    check_links(opened.path)
    return FolderSource(opened)


def open_folder(model: str | Path) -> FolderSource:
    """A dense or compressed folder or hub id."""
    return FolderSource(ModelFolder(model))


def open_shapes(
    model: str | Path | PreTrainedModel | Source, tokenizer: Any = None, adapter: str | Path | None = None
) -> Source:
    """Like `open_source`; a config.json, or a folder with one and no weights, will do."""
    if isinstance(model, str | Path):
        path = Path(model)
        if path.name == "config.json" and path.is_file():
            return ConfigSource(path.parent)
        weights = ("*.safetensors*", "*.bin", "*.gguf")
        if (path / "config.json").is_file() and not any(f for pattern in weights for f in path.glob(pattern)):
            return ConfigSource(path)
    source = open_source(model, tokenizer, adapter)
    if isinstance(source, FolderSource) and source.remote:
        return ConfigSource(source.folder, source.name, source)
    return source
