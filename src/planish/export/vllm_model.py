"""vLLM's Transformers backend for compressed models. Imported by vLLM alone, through the plugin.

Five things differ from a model as the backend expects it, and are told to it here: blocks without an attention have no
cache and are left out of its numbering; heads may be narrower than the configuration's, each block's cache has the smallest
head size that vLLM's attention offers for it; index tables are buffers that the backend would leave without storage; a
linear may have another form in one block than in the next, and only plain ones can be fused; logits may be divided.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.model_executor.models import transformers as backend
from vllm.model_executor.models.transformers import base
from vllm.model_executor.models.transformers.fuser import key
from vllm.platforms import current_platform

from planish.modelling.attentions import Attention
from planish.modelling.blocks import list_attentions

stock_attend = ALL_ATTENTION_FUNCTIONS["vllm"]


def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """vLLM's attention with heads (B, heads, T, d) filled up with zeros to its cache's head size; the scores are the same."""
    size, v = module.attn.head_size, value.shape[-1]
    if not isinstance(module, Attention) or query.shape[-1] == v == size:
        return stock_attend(module, query, key, value, mask, **kwargs)
    query, key, value = (F.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    output, _ = stock_attend(module, query, key, value, mask, **kwargs)
    return output.reshape(-1, size)[:, :v].reshape(len(output), -1), None


ALL_ATTENTION_FUNCTIONS.register("vllm", attend)


def choose_head_size(width: int, dense: int) -> int:
    """The smallest head size of vLLM's attention that holds `width`; the dense model's where none is known."""
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
    else:
        sizes = list(range(8, dense + 1, 8))
    return min((s for s in sizes if width <= s <= dense), default=dense)


class Fusers(base.Fusers):
    """The backend's fusions, which it finds once per class of modules, for those whose linears are plain ones."""

    def __getitem__(self, m: nn.Module) -> list[Any]:
        found = self.data.get(kind := key(m), [])
        self.data[kind] = [f for f in found if all(type(m.get_submodule(n)) is nn.Linear for n in list_linears(f))]
        try:
            return super().__getitem__(m)
        finally:
            self.data[kind] = found


def list_linears(fuser: Any) -> list[str]:
    """Names of the linears that a fusion merges or replaces."""
    single = ("q_name", "k_name", "v_name", "o_name", "qkv_name", "down_name")
    return [*getattr(fuser, "linear_names", ()), *filter(None, (getattr(fuser, n, None) for n in single))]


class TransformersForCausalLM(backend.TransformersForCausalLM):  # the name by which vLLM knows its own backend
    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if divisor := getattr(self.text_config, "logits_scaling", None):  # granite's, which the backend does not know
            self.logits_processor.scale /= divisor

    def init_parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().init_parameters(module, dtype)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = torch.zeros_like(buffer, device=self.device_config.device)

    def recursive_replace(self) -> None:
        with replaced(base, "Fusers", Fusers):
            super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        left = list_attentions(self.config)
        specs = [self.config.planish["blocks"][i].get("attention", {}) for i in left]
        if any("k_rank" in s for s in specs):
            raise ValueError("planish: attention on latent keys keeps its own cache, which vLLM has no room for")
        types = getattr(self.text_config, "layer_types", None)
        arch = copy.copy(self.model_config.model_arch_config)
        dense = arch.head_size
        widths = [max(s.get("qk", dense), s.get("v", dense)) for s in specs]
        arch.per_layer_overrides = [{"head_size": choose_head_size(w, dense)} for w in widths]
        with (
            replaced(self.text_config, "num_hidden_layers", len(left)),
            replaced(self.text_config, "layer_types", types and [types[i] for i in left]),
            replaced(self.model_config, "model_arch_config", arch),
        ):
            super()._create_attention_instances(prefix)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of `owner` with another value, for a while; nothing where it is None."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
