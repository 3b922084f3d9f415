"""Configuration of a DeciLM (nemotron-nas) folder, for stacks that read one object per block. (Travels with the folder.)"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Entry(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """LLaMA's, and `block_configs`: for every block {"attention": {"no_op", "n_heads_in_group"}, "ffn": {"no_op", "ffn_mult"}}."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, dict[str, Any]]] | None = None, **settings: Any):
        self.block_configs = [Entry({k: Entry(v) for k, v in b.items()}) for b in block_configs or []]
        super().__init__(**settings)
