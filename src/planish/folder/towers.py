"""A language model inside a wrapper (`planish.modelling.wrappers`): its configuration, and which tensors are its."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from planish.errors import InputError
from planish.modelling.modelling import FORMAT, class_names, list_auto, model_type
from planish.modelling.wrappers import HEADS, WRAPPERS, Wrapper, find_prefix

CHUNK = 256 << 20  # bytes of untouched tensors that are copied at a time, into one file


@dataclass(frozen=True)
class Tower:
    """A wrapper around a language model. `config`: the whole model's; `prefix`, `head`: what a checkpoint's names have in the
    place of `model.` and `lm_head.` of a causal LM."""

    wrapper: Wrapper
    config: Any
    prefix: str
    head: str

    @property
    def pinned(self) -> int:
        """Blocks, from the first, of which none may go whole."""
        return self.wrapper.count_pinned(self.config)

    def read_name(self, stored: str) -> str | None:
        """A tensor's name in the causal LM, from its name in the checkpoint; None where it is none of the language model's."""
        for old, new in ((self.head, "lm_head."), (self.prefix, "model.")):
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return None

    def store_name(self, name: str) -> str:
        """A tensor's name in the checkpoint, from its name in the causal LM."""
        if name.startswith("lm_head."):
            return self.head + name.removeprefix("lm_head.")
        return self.prefix + name.removeprefix("model.")

    def wrap(self, text: dict[str, Any], native: bool) -> dict[str, Any]:
        """The whole model's config.json around the language model's: what both say is the language model's to say."""
        whole, kind = self.config.to_diff_dict(), self.wrapper.model_type  # as transformers writes it
        shared = {n: text[n] for n in ("dtype", "tie_word_embeddings", "attn_implementation") if n in text}
        for name in ("_name_or_path", "auto_map", "transformers_weights"):
            whole.pop(name, None)
        inner = {n: v for n, v in text.items() if n not in ("architectures", "auto_map", "transformers_version")}
        if native:
            names: dict[str, Any] = {"architectures": [self.wrapper.classes[2]], "model_type": kind}
        else:
            auto = {a: f"modelling.{name}" for a, name in list_auto(kind).items()}
            names = {"architectures": [class_names(kind)[2]], "model_type": model_type(kind), "auto_map": auto}
        return whole | shared | names | {"text_config": inner}


def refuse_wrapped(config: Any, what: str, instead: str = "") -> None:
    """InputError where a whole model's configuration says that its language model is inside another; `instead`: what to do."""
    if wrapper := find_wrapper(config):
        raise InputError(
            f"{what} holds a language model alone, and this is {wrapper.model_type}, with more around it"
            + (f": {instead}" if instead else "")
        )


def find_wrapper(config: Any) -> Wrapper | None:
    """The wrapper that a configuration, dense or compressed, is of."""
    return WRAPPERS.get(config.model_type.removeprefix(f"planish{FORMAT}_"))


def split_config(config: Any) -> tuple[Any, Wrapper | None]:
    """The configuration of the language model alone, which says all that its whole says of it, and its wrapper, if any."""
    wrapper = find_wrapper(config)
    if wrapper is None:
        return config, None
    text = config.text_config
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return text, wrapper


def open_tower(wrapper: Wrapper, config: Any, blocks: str, stored: Collection[str], where: str) -> Tower:
    """The tower of a checkpoint with these names; `blocks`: path of the causal LM's blocks ("model.layers")."""
    inside = f"{blocks.partition('.')[2]}."
    prefix = find_prefix(list(stored), inside)
    if prefix is None:
        raise InputError(
            f"{where} holds no language model: of its {len(stored)} tensors none is called …{inside}…; give the whole "
            f"{wrapper.model_type} checkpoint, not its vision tower alone"
        )
    return Tower(
        wrapper, config, prefix, next((h for h in HEADS if any(n.startswith(h) for n in stored)), wrapper.head)
    )


@dataclass(frozen=True)
class Untouched:
    """What a wrapper holds besides its language model, by the names in the checkpoint. `sizes`: numbers and dtype of every
    tensor, as it is stored; `read` gives one."""

    sizes: Mapping[str, tuple[int, torch.dtype]] = field(default_factory=dict)
    read: Callable[[str], Tensor] = dict[str, Tensor]().__getitem__

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(n for n, dtype in self.sizes.values() if dtype.is_floating_point)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Part of the wrapper ("vision_tower") → bytes of its tensors."""
        found: dict[str, int] = {}
        for name, (count, dtype) in self.sizes.items():
            part = name.removeprefix("model.").partition(".")[0]
            found[part] = found.get(part, 0) + count * dtype.itemsize
        return found

    def chunks(self) -> list[list[str]]:
        """Names as they share files."""
        chunks: list[list[str]] = []
        room = 0
        for name, (count, dtype) in self.sizes.items():
            if not chunks or count * dtype.itemsize > room:
                chunks.append([])
                room = CHUNK
            chunks[-1].append(name)
            room -= count * dtype.itemsize
        return chunks
