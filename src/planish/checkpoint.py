"""Reading models block by block, writing compressed folders block by block, loading them again."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from planish import families as families_file
from planish import modelling as modelling_file
from planish import modules as modules_file
from planish import processes
from planish.core import Edit, Shape
from planish.errors import InputError
from planish.families import FAMILIES, Family
from planish.modelling import FORMAT, class_names, model_type, register
from planish.modules import (
    Bypass,
    Spec,
    count_heads,
    find_blocks,
    get_linear,
    head_width,
    install,
    join_block,
    rotary_width,
    split_block,
)
from planish.shards import Shard, hash_file, make_header, sync_folder, write_shard, write_text

register()  # the Auto classes know compressed models from here on

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def find_family(config) -> Family:
    """The table row of a config, or a clear error that names the nearest ones."""
    kind = config.model_type
    if kind.startswith("planish"):
        raise InputError(f"model is already compressed by planish (model_type {kind!r}); start from the original model")
    if kind not in FAMILIES:
        near = get_close_matches(kind, FAMILIES, n=3, cutoff=0.4) or sorted(FAMILIES)
        raise InputError(
            f"model family {kind!r} is not supported; nearest: {', '.join(near)} (supported: {', '.join(sorted(FAMILIES))})"
        )
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
    """Safetensors, sharded or not, read with plain reads (see `planish.shards`)."""

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.name = folder, name or str(folder)
        if not folder.is_dir():
            raise InputError(f"no such model: {folder} is not a folder")
        self.config = load_config(folder)
        self.family = find_family(self.config)
        self.files = index_tensors(folder)
        self._shards: dict[Path, Shard] = {}
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

    def shard(self, stored: str) -> Shard:
        path = self.files[stored]
        if path not in self._shards:
            self._shards[path] = Shard(path)
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
        for name in COPIED:
            if (self.folder / name).is_file():
                check_inside(self.folder, self.folder / name)
                shutil.copyfile(self.folder / name, target / name)


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
        self.family = find_family(self.config)
        self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        for name, p in model.named_parameters():
            if not is_finite(p):
                raise InputError(f"tensor {name} of the model in memory holds NaN or infinity")

    def block(self, i: int) -> nn.Module:
        block = copy.deepcopy(find_blocks(self.model, self.family)[i]).cpu().eval().requires_grad_(False)
        return split_block(block, self.family, self.config)

    def outside(self) -> dict[str, Tensor]:
        inside = f"{self.family.blocks}."
        return {n: t.detach().cpu() for n, t in self.model.state_dict().items() if not n.startswith(inside)}

    def sizes(self) -> dict[str, tuple[int, torch.dtype]]:
        return self.untie({n: (t.numel(), t.dtype) for n, t in self.model.state_dict().items()})

    def skeleton(self) -> PreTrainedModel:
        with no_parameters():
            model = build_skeleton(self.config, self.family).eval()
        model.config._attn_implementation = self.model.config._attn_implementation
        return model

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
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path} is not a valid {kind} configuration: {error}") from None


def index_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → shard. Shard names must be plain file names inside the folder."""
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


def check_inside(folder: Path, file: Path) -> None:
    """A model's files lie in its folder, or in the hub cache's own store beside it."""
    try:
        target, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot follow {file}: {error}") from None
    if not target.is_relative_to(home) and not target.is_relative_to(home.parent.parent / "blobs"):
        raise InputError(f"{file} is a link to {target}, outside the model's folder: copy the file there")


def open_source(model: str | Path | PreTrainedModel | Source, tokenizer: Any = None) -> Source:
    """A folder, a hub id, or a causal LM in memory."""
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
    """The folder itself, or the snapshot of a hub id (safetensors only)."""
    path = Path(model)
    if path.exists():
        return path
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
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever damaged files make it raise; code of its own is not run
        what = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load the tokenizer of {folder}: {type(error).__name__}: {what}") from None


def build_random(seed: int = 0) -> PreTrainedModel:
    """A two-block LLaMA of random weights, small enough for a self-test; the caller's random state is left alone."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def silence() -> None:
    """Turn off transformers' progress bars and advice in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------- writing


def merge_forms(shape: Shape, edits: list[Edit]) -> Spec:
    """The block's spec from all its edits; edits of the attention's q–k and v parts become one module."""
    spec: Spec = {}
    for edit in edits:
        if edit.target in ("attention", "mlp"):
            form = spec.setdefault(edit.target, {})
            if edit.form["kind"] == "own" and not form:
                form |= {"kind": "own", "qk": shape.qk, "v": shape.v}
            form |= edit.form
        else:
            spec.setdefault("linears", {})[edit.target] = dict(edit.form)
    return spec


def apply_edits(block: nn.Module, edits: list[Edit], family: Family, config, shape: Shape) -> Spec:
    """Replace modules of a canonical block in place, in its own dtype; returns its spec (empty when nothing changed)."""
    spec = merge_forms(shape, edits)
    if not spec:
        return spec
    install(block, spec, family, config)
    split_block(block, family, config)
    for edit in edits:
        if not edit.tensors:
            continue
        if edit.target == "attention":
            module = block.get_submodule(family.attention)
        elif edit.target == "mlp":
            module = block.get_submodule(family.mlp or family.path("up"))
        else:
            module = get_linear(block, family, edit.target)
        for name, tensor in edit.tensors.items():
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            old = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if old is None or old.shape != tensor.shape:
                raise ValueError(f"edit of {edit.target}: {name} has shape {tuple(tensor.shape)}, form {edit.form}")
            value = narrow(tensor, old.dtype, f"block {shape.block}, {edit.target}").contiguous()
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
    return spec


def narrow(tensor: Tensor, kind: torch.dtype, where: str) -> Tensor:
    """The tensor in the dtype that weights are stored in (whole numbers as they are), or an error where it does not fit."""
    if not tensor.is_floating_point():
        return tensor
    value = tensor.to(kind)
    if not is_finite(value):
        if not is_finite(tensor):
            raise ValueError(f"edit of {where} is not finite")
        raise InputError(
            f"the new weights of {where} do not fit into {str(kind)[6:]}: they reach {float(tensor.abs().max()):.3g}; "
            "store the model in bfloat16 or float32 first"
        )
    return value


def count_block(block: nn.Module) -> int:
    """Weights of a block's linears, as they are: matrices of every form, gates and shifts of bypasses; no norms, no biases."""
    matrices = sum(p.numel() for p in block.parameters() if p.ndim >= 2)
    vectors = [v for m in block.modules() if isinstance(m, Bypass) for v in (m.gate, m.shift)]
    return matrices + sum(v.numel() for v in vectors if v is not None)


class Writer:
    """A compressed folder, written shard by shard into `<output>.partial` and renamed when it is complete.

    `resume/` inside it holds what was asked (`keep_request`) and a journal: one line per finished block, added after its
    shard is durable. `finished`: the journal's entries by block, where an interrupted run is taken up. Of several
    processes only the first writes.
    """

    def __init__(self, output: Path, n_blocks: int, overwrite: bool = False, resume: bool = False):
        self.output, self.n_shards = output, n_blocks + 1
        self.active = processes.rank() == 0
        self.weight_map: dict[str, str] = {}
        self.bytes = 0  # of tensors
        self.index_bytes = 0  # of these, index tables
        self.headers = 0  # bytes of the files' headers
        self.parameters = 0
        self.partial = output.with_name(output.name + ".partial")
        self.state = self.partial / "resume"
        self.finished: dict[int, dict[str, Any]] = {}
        if resume:
            self.finished = processes.share(self.read_journal() if self.active else {})
        else:
            if self.active:
                self.create(output, overwrite)
            processes.share(None)  # nobody writes into the folder before it is there

    def create(self, output: Path, overwrite: bool) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
            raise InputError(f"output {output} exists and is not empty; choose another or pass --overwrite")
        if output.exists() and not output.is_dir():
            raise InputError(f"output {output} is a file")
        if (self.state / "journal.jsonl").exists() and not overwrite:
            raise InputError(f"{self.partial} holds an unfinished run: planish resume {output}, or pass --overwrite")
        for path in (output, self.partial):
            if path.is_symlink():
                raise InputError(f"{path} is a link; give the folder itself")
        if self.partial.exists():
            if not self.partial.is_dir() or (any(self.partial.iterdir()) and not self.state.is_dir()):
                raise InputError(
                    f"{self.partial} exists and is not of planish's making; move it or choose another output"
                )
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

    def keep_request(self, request: dict[str, Any], windows: Tensor) -> None:
        """Remember what was asked, so that an interrupted run can be taken up."""
        if self.active:
            digest = write_shard(self.state / "windows.safetensors", {"windows": windows})
            request = json.loads(json.dumps(request | {"windows": digest}, default=str))
            write_text(self.state / "request.json", json.dumps(seal(request), indent=2) + "\n")

    def shard(self, number: int, tensors: dict[str, Tensor], write: bool = True) -> tuple[str, str]:
        """Write shard `number` (0 = what is outside the blocks, i + 1 = block i); its name and SHA-256."""
        name, digest = f"model-{number + 1:05d}-of-{self.n_shards:05d}.safetensors", ""
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
            self.index_bytes += 0 if t.is_floating_point() else t.numel() * t.element_size()
            self.parameters += t.numel() if t.is_floating_point() else 0
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
        if block is not None:
            join_block(block, family)
            tensors = {f"{family.blocks}.{at}.{k}": v for k, v in block.state_dict().items()}
            name, digest = self.shard(at + 1, tensors, write=i not in self.finished)
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
        install(block, entry["spec"], source.family, source.config)
        join_block(block, source.family)
        if entry["shard"]:
            shard, prefix = Shard(self.partial / entry["shard"]), f"{source.family.blocks}.{entry['at']}."
            for name in shard.entries:
                set_parameter(block, name.removeprefix(prefix), shard.read(name))
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
        if len(names) != self.n_shards:  # whole blocks are gone
            renamed = {n: f"{n[:15]}{len(names):05d}.safetensors" for n in names}
            for name, short in renamed.items():
                os.replace(self.partial / name, self.partial / short)
            self.weight_map = {k: renamed[n] for k, n in self.weight_map.items()}
        index = {
            "metadata": {"total_size": self.bytes, "total_parameters": self.parameters},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        self.text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
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

    def abort(self, wrong_input: bool = False) -> None:
        """After an error: leave nothing behind, unless blocks are finished and the run can be taken up again.

        `wrong_input`: taking it up again would meet the same wrong input, or the same full disk.
        """
        if self.active and (wrong_input or not (self.state / "journal.jsonl").exists()):
            shutil.rmtree(self.partial, ignore_errors=True)


def tidy(output: Path) -> bool:
    """Remove what a complete folder no longer needs; whether there was anything (a run was stopped just before this)."""
    left = output / "resume"
    if left.is_symlink() or not left.is_dir():
        return False
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


def is_empty(spec: Spec) -> bool:
    """Whether a block's submodules both contribute nothing: it is left out of the written model."""
    forms = [spec.get("attention", {}), spec.get("mlp", {})]
    return all(f.get("kind") == "bypass" and not (f["rank"] or f["gate"] or f["shift"]) for f in forms)


def find_native(specs: list[Spec], shape: Shape, family: Family) -> dict[str, int] | None:
    """Config overrides under which the stock architecture holds every block, or None."""
    widths = {shape.intermediate if not spec else None for spec in specs}
    for spec in specs:
        if not spec:
            continue
        linears = spec.get("linears", {})
        if set(spec) - {"linears"} or set(linears) - {"gate", "up", "down"}:
            return None
        if any(f["kind"] != "dense" or "bias" in f for f in linears.values()):
            return None
        widths |= {f["in"] if r == "down" else f["out"] for r, f in linears.items()}
    widths.discard(None)
    if not family.intermediate:
        return {} if widths == {shape.intermediate} else None
    return {family.intermediate: widths.pop()} if len(widths) == 1 else None  # type: ignore[dict-item]


def write_config(writer: Writer, source: Source, specs: list[Spec], shapes: list[Shape]) -> str:
    """config.json (and the modelling files where no stock architecture holds the shapes); returns "native" or "planish"."""
    config = source.config.to_dict()
    for name in ("_name_or_path", "auto_map"):  # code of the source's own is not carried
        config.pop(name, None)
    family = source.family
    if len(specs) < source.n_blocks:
        config["num_hidden_layers"] = len(specs)
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][s.block] for s in shapes]
    native = find_native(specs, shapes[0], family)
    if native is not None:
        config |= native
        config["architectures"] = [family.classes[2]]
    else:
        config_name, base_name, lm_name = class_names(family.model_type)
        config |= {
            "architectures": [lm_name],
            "model_type": model_type(family.model_type),
            "auto_map": {
                "AutoConfig": f"modelling.{config_name}",
                "AutoModel": f"modelling.{base_name}",
                "AutoModelForCausalLM": f"modelling.{lm_name}",
            },
            "planish": {"format": FORMAT, "family": family.model_type, "blocks": specs},
            "per_layer_config": per_layer(specs, shapes, family),
        }
        for module in (families_file, modules_file, modelling_file):
            path = Path(str(module.__file__))
            writer.text(path.name, path.read_text(encoding="utf-8"))
    config["transformers_version"] = transformers.__version__
    writer.text("config.json", json.dumps(config, indent=2, default=str) + "\n")
    return "native" if native is not None else "planish"


def per_layer(specs: list[Spec], shapes: list[Shape], family: Family) -> dict[str, dict[str, Any]]:
    """The transformers-standard per-layer overrides that describe these blocks."""
    out: dict[str, dict[str, Any]] = {}
    digits = len(str(len(specs) - 1))
    for i, (spec, shape) in enumerate(zip(specs, shapes, strict=True)):
        layer: dict[str, Any] = {}
        down = spec.get("linears", {}).get("down", {})
        if family.intermediate:
            layer[family.intermediate] = down.get("in", shape.intermediate)
        skip = [
            n for n, key in (("attention", "attention"), ("mlp", "mlp")) if spec.get(key, {}).get("kind") == "bypass"
        ]
        if skip:
            layer["skip"] = skip
        out[str(i).zfill(digits)] = layer
    return out


def kv_bytes(specs: list[Spec], shapes: list[Shape], itemsize: int) -> int:
    """Bytes the KV cache grows by per token and sequence."""
    total = 0
    for spec, shape in zip(specs, shapes, strict=True):
        form = spec.get("attention", {})
        if form.get("kind") == "bypass":
            continue
        keys = form["k_rank"] * form["k_groups"] if "k_rank" in form else shape.kv_heads * form.get("qk", shape.qk)
        total += (keys + shape.kv_heads * form.get("v", shape.v)) * itemsize
    return total


def load_exact(folder: str | Path, **kwargs) -> PreTrainedModel:
    """`load` with an attention that computes all that the configuration says.

    transformers' default drops the soft cap of attention scores (gemma2); its eager attention has it.
    """
    if getattr(load_config(find_folder(folder)), "attn_logit_softcapping", None) is not None:
        kwargs.setdefault("attn_implementation", "eager")
    return load(folder, **kwargs)


def load(folder: str | Path, **kwargs) -> PreTrainedModel:
    """A causal LM from a dense or compressed folder; runs no code but planish's own and transformers'."""
    path = find_folder(folder)
    config = load_config(path)
    files = index_tensors(path)  # says what is missing, and that pickles are not read
    if not getattr(config, "quantization_config", None):
        for file in sorted(set(files.values())):
            Shard(file)
    try:
        kwargs |= {"trust_remote_code": False, "use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    except Exception as error:  # whatever a damaged folder makes the model's own code raise
        raise InputError(f"cannot load {folder}: {type(error).__name__}: {error}") from None
