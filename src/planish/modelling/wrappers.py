"""Models around a language model, one row each: vision-language models. (This file travels with compressed models.)

What such a model holds besides its language model is called untouched: it is copied as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# What checkpoints put before the names of the language model's tensors, by the age of transformers that wrote them; of two
# that fit the longer one is meant.
PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.")
HEADS = ("language_model.lm_head.", "lm_head.")


@dataclass(frozen=True)
class Wrapper:
    """Its config, base model and the class that generates, in transformers. The base model holds the language model's base
    model as `language_model`, and its config that one's as `text_config`, whose model_type names a `Family`. `whole`: there is
    no base model, and `language_model` is a causal LM, with the head."""

    model_type: str
    classes: tuple[str, str, str]
    causal: bool = False  # AutoModelForCausalLM knows it
    whole: bool = False
    flat: bool = False  # released configurations may have the language model's fields beside their own
    deepstack: str = (
        ""  # vision_config's name of the blocks of the vision tower whose features are added behind the first blocks
    )

    @property
    def prefix(self) -> str:
        """What stands before the names of the language model's modules."""
        return PREFIXES[0] if self.whole else PREFIXES[1]

    @property
    def head(self) -> str:
        return HEADS[0] if self.whole else HEADS[1]

    def count_pinned(self, config: Any) -> int:
        """Blocks of the language model, from the first, that are told by their number: none of them may go whole."""
        return len(getattr(config.vision_config, self.deepstack, ())) if self.deepstack else 0


def _classes(stem: str) -> tuple[str, str, str]:
    return f"{stem}Config", f"{stem}Model", f"{stem}ForConditionalGeneration"


_ROWS = (
    Wrapper("gemma3", _classes("Gemma3"), causal=True),
    Wrapper("gemma4", _classes("Gemma4"), causal=True),
    Wrapper("llama4", ("Llama4Config", *("Llama4ForConditionalGeneration",) * 2), whole=True),
    Wrapper("mistral3", _classes("Mistral3")),
    Wrapper("qwen2_5_vl", _classes("Qwen2_5_VL"), flat=True),
    Wrapper("qwen3_5", _classes("Qwen3_5")),
    Wrapper("qwen3_5_moe", _classes("Qwen3_5Moe")),
    Wrapper("qwen3_vl", _classes("Qwen3VL"), deepstack="deepstack_visual_indexes"),
)

WRAPPERS: dict[str, Wrapper] = {w.model_type: w for w in _ROWS}


def find_prefix(stored: Sequence[str], inside: str) -> str | None:
    """What stands before `inside` ("layers.") in a checkpoint's names."""
    return next((p for p in PREFIXES if any(n.startswith(p + inside) for n in stored)), None)


def find_language_model(model: nn.Module) -> nn.Module:
    """The base model of the language model inside a wrapper, or inside its base model; any other model itself."""
    inside = getattr(getattr(model, "model", model), "language_model", None)
    return model if inside is None else getattr(inside, "model", inside)
