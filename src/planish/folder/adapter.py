"""A LoRA adapter's folder (PEFT's layout), merged into the weights of a model as they are read.

    W + s · B A    with A (r, in), B (out, r), s = alpha / r, or alpha / √r (rsLoRA)

Where the stock class stores a linear transposed (in, out), so is B A (PEFT's fan_in_fan_out, which it sets by the class of the
module, too); of an embedding (vocabulary, width) it is (B A)ᵀ. Modules that were trained whole (modules_to_save) take the
place of the model's. Sums are formed in fp32 and rounded once, to the model's type.

Reference: LoRA, arXiv:2106.09685, equation 3; rsLoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError
from planish.folder.recognise import describe_adapter
from planish.folder.safetensors import Shard

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHUNK = 1 << 22  # numbers that are summed at a time
PART = re.compile(
    r"^base_model\.model\.(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$"
)
WHOLE = re.compile(
    r"^base_model\.model\.(?P<module>.+?)(\.modules_to_save(\.default)?|\.base_layer)?\.(?P<leaf>weight|bias)$"
)
UNTOUCHED = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # ways to begin that leave the model's weights as they are
KNOWN = {  # settings of PEFT's LoraConfig that are read, or change nothing once an adapter is trained
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora", "velora_config",
}  # fmt: skip


class Delta(NamedTuple):
    """What is added to a weight: stored names of A and B, and s."""

    a: str
    b: str
    scale: float
    embedding: bool


class Adapter:
    """`deltas`: name of a weight → what is added; `replaced`: name → stored name of what takes its place.

    Names are PEFT's without their prefix, those of the model's own class.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if not (self.folder / WEIGHTS).is_file():
            pickle = (self.folder / "adapter_model.bin").is_file()
            what = f"{WEIGHTS} but a pickle, which is never read" if pickle else WEIGHTS
            raise InputError(f"the adapter {self.folder} has no {what}: save it again with save_pretrained")
        self.shard = Shard(self.folder / WEIGHTS)
        pairs: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        embeddings = set()
        for name in self.shard.entries:
            if part := PART.match(name):
                pairs.setdefault(f"{part['module']}.weight", {})[part["side"]] = name
                if part["embedding"]:
                    embeddings.add(f"{part['module']}.weight")
            elif (whole := WHOLE.match(name)) and "lora_" not in name:
                self.replaced[f"{whole['module']}.{whole['leaf']}"] = name
            else:
                raise InputError(f"tensor {name} of the adapter {self.folder} is none that a LoRA adapter has")
        if not pairs and not self.replaced:
            raise InputError(f"the adapter {self.folder} holds no tensors")
        self.deltas = {n: self._pair(n, found, n in embeddings) for n, found in pairs.items()}

    def _pair(self, name: str, found: Mapping[str, str], embedding: bool) -> Delta:
        """A weight's factors and scale; InputError where one is missing or has another rank than the configuration says."""
        for side in "AB":
            if side not in found:
                raise InputError(f"lora_{side} of {name} is missing in the adapter {self.folder}: it is incomplete")
        a, b, module = self.shard.shape(found["A"]), self.shard.shape(found["B"]), name.removesuffix(".weight")
        rank = self._setting("r", "rank_pattern", module, 8)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise InputError(
                f"lora_A and lora_B of {name} in the adapter {self.folder} have shapes {a} and {b}, expected rank {rank:g} from "
                f"{CONFIG}"
            )
        alpha = self._setting("lora_alpha", "alpha_pattern", module, 8)
        return Delta(found["A"], found["B"], alpha / (rank**0.5 if self.config.get("use_rslora") else rank), embedding)

    def _setting(self, name: str, pattern: str, module: str, default: float) -> float:
        """A number that some modules have of their own, as PEFT looks it up: the first pattern that ends the module's name."""
        value = self.config.get(name, default)
        try:
            for key, own in (self.config.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", module):
                    value = own
                    break
            if isinstance(value, bool) or not value > 0:
                raise ValueError(f"{value!r} for {module}")
            return value
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.folder / CONFIG}: {name} or {pattern} is not read: {error}") from None

    def fit(self, shapes: Mapping[str, tuple[int, ...]], transposed: Mapping[str, bool], tied: Collection[str]) -> None:
        """InputError unless every tensor of the adapter fits one of the model's. `transposed`: which the model stores (in, out);
        `tied`: names of matrices that are one."""
        base = self.config.get("base_model_name_or_path")
        of = f" (it was trained on {base})" if base else ""
        for name in [*self.deltas, *self.replaced]:
            if name not in shapes:
                raise InputError(
                    f"the adapter {self.folder} changes {name}, which the model has not: it is another model's{of}"
                )
            if name in tied:
                raise InputError(
                    f"the adapter {self.folder} changes {name}, and the model's embedding and head are tied: merge it with peft "
                    "(merge_and_unload), save the result, and give that"
                )
            found = self._shape(name, transposed[name])
            if found != tuple(shapes[name]):
                raise InputError(
                    f"the adapter {self.folder} has shape {found} for {name}, the model {tuple(shapes[name])}: it is another "
                    f"model's{of}"
                )

    def _shape(self, name: str, transposed: bool) -> tuple[int, ...]:
        if name in self.replaced:
            return self.shard.shape(self.replaced[name])
        delta = self.deltas[name]
        shape = (self.shard.shape(delta.b)[0], self.shard.shape(delta.a)[1])
        return shape[::-1] if transposed or delta.embedding else shape

    def merge(self, name: str, weight: Tensor, transposed: bool) -> Tensor:
        """The weight with what the adapter does to it, in its own type; itself where that is nothing."""
        if name in self.replaced:
            weight = self.shard.read(self.replaced[name]).to(weight.dtype)
        if name not in self.deltas:
            return weight
        delta = self.deltas[name]
        left, right = self.shard.read(delta.b).float(), self.shard.read(delta.a).float()
        if transposed or delta.embedding:
            left, right = right.T, left.T
        out, step = torch.empty_like(weight), max(1, CHUNK // weight.shape[1])
        for at in range(0, len(weight), step):
            rows = slice(at, at + step)
            out[rows] = weight[rows].float() + delta.scale * (left[rows] @ right)
        return out

    @property
    def paths(self) -> list[Path]:
        return [self.folder / CONFIG, self.folder / WEIGHTS]

    @cached_property
    def record(self) -> dict[str, Any]:
        """What planish.json says about it."""
        kept = ("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        found = {n: self.config[n] for n in kept if self.config.get(n)}
        return {"name": self.folder.resolve().name, **found, "merged": len(self.deltas), "replaced": len(self.replaced)}


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter that is merged as this file says; InputError names what another one is."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} has no {CONFIG}: not a folder of a LoRA adapter (PEFT's layout)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{folder} is {describe_adapter(folder)}: only LoRA is merged here; merge it first (merge_and_unload)"
        )
    names = {
        "use_dora": "DoRA",
        "use_qalora": "QA-LoRA",
        "target_parameters": "LoRA on stacked parameters (target_parameters)",
    }
    for name, value in sorted(config.items()):
        if value and name not in KNOWN:
            raise InputError(
                f"{path} asks for {names.get(name, name)}, which is not merged: merge it first (merge_and_unload)"
            )
    if (bias := config.get("bias") or "none") != "none":
        raise InputError(
            f"{path} trains biases (bias={bias!r}), which are not merged: merge it first (merge_and_unload)"
        )
    if (start := config.get("init_lora_weights")) not in UNTOUCHED:
        raise InputError(
            f"{path} begins with {start!r}, which changes the model's own weights: convert it to plain LoRA when it is saved "
            "(path_initial_model_for_weight_conversion of peft)"
        )
    return config
