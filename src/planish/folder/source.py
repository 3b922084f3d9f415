"""Dense models, read one block at a time: from a folder of safetensors, a GGUF file, the hub, or in memory."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.initialization as initialization
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from planish.core import Shape
from planish.errors import InputError
from planish.folder.files import check_inside, copy_files, open_shard
from planish.folder.gguf_reader import GGUFShard, find_gguf, is_gguf, open_gguf
from planish.folder.gguf_tokenizer import load_gguf_tokenizer
from planish.folder.safetensors import Shard
from planish.modelling.attentions import count_heads, head_width, needs_eager, rotary_width
from planish.modelling.blocks import find_blocks, get_linear, split_block
from planish.modelling.families import FAMILIES, Family
from planish.modelling.modelling import register

register()  # the Auto classes know compressed models from here on


NO_SOFT_CAP = "{} with eager attention: transformers' sdpa leaves out the soft cap of attention scores"


def find_family(config) -> Family:
    """The table row of a config, or a clear error that names the nearest ones."""
    kind = config.model_type
    if kind.startswith("planish"):
        raise InputError(f"model is already compressed by planish (model_type {kind!r}); start from the original model")
    if kind not in FAMILIES:
        near = get_close_matches(kind, FAMILIES, n=3, cutoff=0.4)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise InputError(f"model family {kind!r} is not supported{nearest} (supported: {', '.join(sorted(FAMILIES))})")
    if quantised := getattr(config, "quantization_config", None):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        raise InputError(
            f"the model is already quantised ({how or 'quantization_config'} in its config): "
            "compress the original weights, then quantise the result"
        )
    family = FAMILIES[kind]
    if getattr(config, "add_cross_attention", False):
        raise InputError(f"{kind} with add_cross_attention=true is not supported: only decoder-only models are")
    if getattr(getattr(config, "attn_config", None), "clip_qkv", None):
        raise InputError(
            f"{kind} with attn_config.clip_qkv={config.attn_config.clip_qkv:g} is not supported: "
            "clipped queries, keys and values cannot be reduced linearly"
        )
    if getattr(config, "do_layer_norm_before", True) is False:
        raise InputError(f"{kind} with do_layer_norm_before=false (norms after the residual sum) is not supported")
    return family


class Source:
    """A dense model, read one block at a time."""

    config: Any
    family: Family
    name: str

    def skeleton(self) -> PreTrainedModel:
        """A causal LM of its own on the meta device; only buffers hold values."""
        raise NotImplementedError

    def block(self, i: int) -> nn.Module:
        """A canonical copy of block i on the CPU in the stored dtype."""
        raise NotImplementedError

    def weight(self, name: str) -> Tensor:
        """A parameter outside the blocks in the stored dtype, by its name in the causal LM; tied names are resolved."""
        raise NotImplementedError

    def outside(self) -> dict[str, Tensor]:
        """Stored tensors that belong to no block, by their names in the causal LM."""
        raise NotImplementedError

    def copy_files(self, target: Path) -> None:
        """Tokenizer and generation files."""
        raise NotImplementedError

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        """Every tensor that the model consists of, by its name in the causal LM: numbers and dtype, as they are stored.
        Nothing is read but headers; tied matrices count once."""
        raise NotImplementedError

    def untie(self, sizes: dict[str, tuple[int, torch.dtype]]) -> dict[str, tuple[int, torch.dtype]]:
        head = "lm_head.weight"
        if self.config.tie_word_embeddings and head in sizes:
            sizes = {self.embedding_name(): sizes[head]} | {n: s for n, s in sizes.items() if n != head}
        return sizes

    @property
    def n_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def stored(self) -> torch.dtype:
        """What the blocks' weights are stored in."""
        return next(self.block(0).parameters()).dtype

    def embedding_name(self) -> str:
        """Name of the input embedding's weight in the causal LM."""
        self.empty_block(0)
        embedding = self._empty.get_input_embeddings()
        return next(n for n, m in self._empty.named_modules() if m is embedding) + ".weight"

    def count_head(self) -> int:
        """Weights of the output embedding."""
        self.empty_block(0)
        return self._empty.get_output_embeddings().weight.numel()

    def shape(self, i: int) -> Shape:
        """Sizes of block i, read off an empty block."""
        block = self.empty_block(i)
        heads, kv_heads = count_heads(self.config)
        attention = block.get_submodule(self.family.attention)
        rotary, qk = rotary_width(attention, self.family), head_width(attention)
        linear = {r: get_linear(block, self.family, r) for r in ("v", "down")}
        parallel = self.family.parallel and bool(getattr(self.config, "use_parallel_residual", True))
        return Shape(
            i,
            self.config.hidden_size,
            heads,
            kv_heads,
            qk,
            linear["v"].out_features // kv_heads,
            linear["down"].in_features,
            rotary,
            self.family.gated,
            self.family.qk_norm,
            parallel,
            self.n_blocks,
        )

    def empty_block(self, i: int) -> nn.Module:
        if not hasattr(self, "_empty"):
            with torch.device("meta"):
                self._empty = build_skeleton(self.config, self.family)
        block = find_blocks(self._empty, self.family)[i]
        return split_block(block, self.family, self.config)


def build_skeleton(config, family: Family) -> PreTrainedModel:
    try:
        return getattr(transformers, family.classes[2])(config)
    except Exception as error:  # sizes that do not fit together, or into memory
        raise InputError(f"config.json is no valid {family.model_type}: {type(error).__name__}: {error}") from None


@contextmanager
def no_parameters() -> Iterator[None]:
    """Within the context modules are built with parameters on the meta device and buffers in memory."""
    register = nn.Module.register_parameter

    def register_meta(self, name, param):
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        with initialization.no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class FolderSource(Source):
    """Safetensors, sharded or not, or a GGUF file (`folder` is then its path), read with plain reads."""

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.name = folder, name or str(folder)
        if not folder.is_dir() and not is_gguf(folder):
            raise InputError(f"no such model: {folder} is not a folder")
        self.config = load_config(folder)
        self.family = find_family(self.config)
        self.files = index_tensors(folder)
        self._shards: dict[Path, Shard | GGUFShard] = {}
        self._last = -1  # block that was read last
        self.rename = self._match_names()
        inside = {
            n.removeprefix(f"{self.family.blocks}.").partition(".")[0] for n in self.names(f"{self.family.blocks}.")
        }
        if self.n_blocks != len(inside):
            raise InputError(
                f"{folder}/config.json says {self.n_blocks} blocks, the checkpoint holds {len(inside)}: "
                "it is incomplete or another model's"
            )
        self.untie_if_different()

    def _match_names(self) -> dict[str, str]:
        """Name in the causal LM → stored name; checkpoints of base models drop the prefix, some call the head otherwise."""
        prefix, head = self.family.blocks.partition(".")[0] + ".", f"{self.family.head}."
        stored = {n: f"lm_head.{n.removeprefix(head)}" if n.startswith(head) else n for n in self.files}
        if any(n.startswith(self.family.blocks + ".") for n in stored):
            return {name: n for n, name in stored.items()}
        return {(name if name.startswith("lm_head.") else prefix + name): n for n, name in stored.items()}

    def tensor(self, name: str) -> Tensor:
        stored = self.rename[name]
        path = self.files[stored]
        tensor = self.shard(stored).read(stored)
        if not tensor.is_floating_point() and stored.endswith((".weight", ".bias")):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"tensor {stored} in {path.name} of {self.folder} holds {kind}, not floating-point weights: quantised models "
                "are not read, start from the original one"
            )
        if not is_finite(tensor):
            raise InputError(f"tensor {stored} in {path.name} of {self.folder} holds NaN or infinity")
        return tensor

    def shard(self, stored: str) -> Shard | GGUFShard:
        path = self.files[stored]
        if path not in self._shards:
            self._shards[path] = open_shard(path)
        return self._shards[path]

    def names(self, prefix: str) -> list[str]:
        return [n for n in self.rename if n.startswith(prefix)]

    def block(self, i: int) -> nn.Module:
        prefix = f"{self.family.blocks}.{i}."
        tensors = {n.removeprefix(prefix): self.tensor(n) for n in self.names(prefix)}
        with no_parameters():
            block = type(find_blocks(self._structure(), self.family)[i])(self._structure().config, i)
        fill(block, tensors, f"block {i} of {self.folder}")
        self.read_ahead(i)
        return split_block(block.eval(), self.family, self.config)

    def read_ahead(self, i: int) -> None:
        """The system reads the block that comes next, up or down, while this one is worked on."""
        following = i + (1 if i >= self._last else -1)
        self._last = i
        ahead: dict[Path, list[str]] = {}
        for name in self.names(f"{self.family.blocks}.{following}."):
            ahead.setdefault(self.files[self.rename[name]], []).append(self.rename[name])
        for stored in ahead.values():
            self.shard(stored[0]).expect(stored)

    def _structure(self) -> PreTrainedModel:
        if not hasattr(self, "_built"):
            with no_parameters():
                self._built = build_skeleton(self.config, self.family).eval()
        return self._built

    def untie_if_different(self) -> None:
        """A checkpoint whose configuration ties matrices that it stores with different numbers is not tied, as transformers
        sees it."""
        if not self.config.tie_word_embeddings or "lm_head.weight" not in self.rename:
            return
        with no_parameters():
            model = build_skeleton(self.config, self.family)
        embedding = model.get_input_embeddings()
        name = next(n for n, m in model.named_modules() if m is embedding) + ".weight"
        if name in self.rename and not torch.equal(self.tensor(name), self.tensor("lm_head.weight")):
            self.config.tie_word_embeddings = False

    def outside(self) -> dict[str, Tensor]:
        inside = f"{self.family.blocks}."
        tensors = {n: self.tensor(n) for n in self.rename if not n.startswith(inside)}
        known = set(self._structure().state_dict())
        return {n: t for n, t in tensors.items() if n in known}

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        known = set(self._structure().state_dict())
        entries = {n: self.shard(stored).entry(stored) for n, stored in self.rename.items() if n in known}
        return self.untie({n: (math.prod(e.shape), e.dtype) for n, e in entries.items()})

    def skeleton(self) -> PreTrainedModel:
        self.check_headers()
        return copy.deepcopy(self._structure())

    def check_headers(self) -> None:
        """Every tensor that the configuration asks for is stored, in its shape; nothing is read but headers."""
        for name, parameter in self._structure().named_parameters(remove_duplicate=False):
            stored = self.rename.get(name) or self.rename.get(self.tied.get(name, ""))
            if stored is None:
                raise InputError(f"tensor {name} is missing in {self.folder}: the checkpoint is incomplete")
            shape = self.shard(stored).shape(stored)
            if shape != tuple(parameter.shape):
                raise InputError(
                    f"tensor {name} in {self.folder} has shape {shape}, expected {tuple(parameter.shape)} from config.json"
                )

    @cached_property
    def tied(self) -> dict[str, str]:
        """Either name of a tied matrix → the other."""
        if not self.config.tie_word_embeddings:
            return {}
        names = (self.embedding_name(), "lm_head.weight")
        return {names[0]: names[1], names[1]: names[0]}

    def weight(self, name: str) -> Tensor:
        return self.tensor(name if name in self.rename else self.tied.get(name, name))

    def copy_files(self, target: Path) -> None:
        copy_files(self.folder, target)


class ConfigSource(Source):
    """A config.json without weights: enough to plan with."""

    def __init__(self, folder: Path):
        self.config, self.name = load_config(folder), str(folder)
        self.family = find_family(self.config)

    @property
    def stored(self) -> torch.dtype:
        kind = getattr(self.config, "dtype", None)
        return kind if isinstance(kind, torch.dtype) else torch.float32

    def block(self, i: int) -> nn.Module:
        raise InputError(f"{self.name} holds no weights, which this needs: give the whole model")

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        return self.untie({n: (p.numel(), self.stored) for n, p in self.skeleton().state_dict().items()})

    def skeleton(self) -> PreTrainedModel:
        with torch.device("meta"):
            return build_skeleton(self.config, self.family)


class MemorySource(Source):
    """A causal LM in memory; never changed."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None):
        self.model, self.tokenizer = model, tokenizer
        self.config = copy.deepcopy(model.config)
        if needs_eager(self.config) and self.config._attn_implementation == "sdpa":
            self.config._attn_implementation = "eager"
            warnings.warn(NO_SOFT_CAP.format("the model is calibrated"), stacklevel=4)
        self.family = find_family(self.config)
        self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        for name, p in model.named_parameters():
            if not is_finite(p):
                raise InputError(f"tensor {name} of the model in memory holds NaN or infinity")

    def block(self, i: int) -> nn.Module:
        memo = {id(self.model.config): self.config}
        block = copy.deepcopy(find_blocks(self.model, self.family)[i], memo).cpu().eval().requires_grad_(False)
        return split_block(block, self.family, self.config)

    def outside(self) -> dict[str, Tensor]:
        inside = f"{self.family.blocks}."
        return {n: t.detach().cpu() for n, t in self.model.state_dict().items() if not n.startswith(inside)}

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        return self.untie({n: (t.numel(), t.dtype) for n, t in self.model.state_dict().items()})

    def skeleton(self) -> PreTrainedModel:
        with no_parameters():
            return build_skeleton(self.config, self.family).eval()

    def weight(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def copy_files(self, target: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(target)


def is_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a copy (extremes propagate NaN)."""
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = torch.aminmax(t)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def fill(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors into a module built without parameters; names and shapes must match exactly."""
    parameters = dict(module.named_parameters())
    missing = sorted(set(parameters) - set(tensors))
    if missing:
        raise InputError(f"tensor {missing[0]} is missing in {where}: the checkpoint is incomplete or another model's")
    for name, tensor in tensors.items():
        if name not in parameters:
            if name.endswith(("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias")):
                continue  # buffers that old versions stored
            raise InputError(f"unexpected tensor {name} in {where}: the checkpoint does not match its config.json")
        if tensor.shape != parameters[name].shape:
            raise InputError(
                f"tensor {name} in {where} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
            )
        set_parameter(module, name, tensor)


def load_config(folder: Path) -> Any:
    """A folder's configuration; models built from it have an attention that computes all that it says."""
    if is_gguf(folder):
        config = copy.deepcopy(open_gguf(folder).config)
        find_family(config)
        return prepare_config(config)
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: not a Hugging Face model folder")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(kind, str):
        raise InputError(f"{path} names no model_type")
    if not kind.startswith("planish"):
        find_family(type("config", (), {"model_type": kind})())
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path} is not a valid {kind} configuration: {error}") from None
    return prepare_config(config)


def prepare_config(config: Any) -> Any:
    if needs_eager(config):
        config._attn_implementation = "eager"
    return config


def index_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → shard. Shard names must be plain file names inside the folder."""
    if is_gguf(folder):
        return open_gguf(folder).files
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            items = {str(k): str(v) for k, v in mapping.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"cannot read {index}: {error!r}") from None
        for shard in sorted(set(items.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
                raise InputError(f"{index} names the shard {shard!r}: not a plain .safetensors file name")
            check_inside(folder, folder / shard)
            if not (folder / shard).is_file():
                raise InputError(f"shard {shard} is missing in {folder}: download it again")
        return {name: folder / shard for name, shard in items.items()}
    if not single.is_file():
        others = [p.name for p in folder.glob("*.bin")]
        hint = f" (found {others[0]}: only safetensors are read, never pickles; convert it first)" if others else ""
        raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
    check_inside(folder, single)
    return dict.fromkeys(Shard(single).entries, single)


def open_source(model: str | Path | PreTrainedModel | Source, tokenizer: Any = None) -> Source:
    """A folder, a GGUF file, a hub id, or a causal LM in memory."""
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        return MemorySource(model, tokenizer)
    return FolderSource(find_folder(model), str(model))


def open_shapes(model: str | Path | PreTrainedModel | Source, tokenizer: Any = None) -> Source:
    """Like `open_source`; a config.json, or a folder with one and no weights, will do."""
    if isinstance(model, str | Path):
        path = Path(model)
        if path.name == "config.json" and path.is_file():
            return ConfigSource(path.parent)
        if (path / "config.json").is_file() and not any(path.glob("*.safetensors*")) and not any(path.glob("*.bin")):
            return ConfigSource(path)
    return open_source(model, tokenizer)


def find_folder(model: str | Path) -> Path:
    """The folder itself, the GGUF file that it is or holds, or the snapshot of a hub id (safetensors only)."""
    path = Path(model)
    if path.exists():
        return find_gguf(path) or path
    text = str(model)
    neither = InputError(f"no such model: {text} is neither a folder nor a hub id (owner/name)")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise neither
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    unwanted = ["*/*", "consolidated*"]  # other formats of the same weights
    try:
        return Path(snapshot_download(text, allow_patterns=wanted, ignore_patterns=unwanted))
    except errors.HFValidationError:
        raise neither from None
    except errors.GatedRepoError:
        raise InputError(f"{text} is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"no such model: {text} is not on the hub, or it is private (`hf auth login`)") from None
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        raise InputError(f"no such model: {text} is neither a folder nor in the hub's cache, and {why}") from None
    except Exception as error:
        raise InputError(f"cannot download {text} from the hub: {type(error).__name__}: {error}") from None


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
