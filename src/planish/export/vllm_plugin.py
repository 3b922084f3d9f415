"""What makes `vllm serve DIR` work without remote code: vLLM calls `register` in each of its processes.

vLLM finds it through the entry point group `vllm.general_plugins`; without vLLM nothing ever imports this file. Compressed
models run in vLLM's Transformers backend, which takes transformers' classes as they are and replaces their linears,
attention and cache by its own (`planish.export.vllm_model` tells it what a compressed model has otherwise).
"""

from __future__ import annotations

BACKEND = "planish.export.vllm_model:TransformersForCausalLM"


def register() -> None:
    """Tell transformers the configurations and vLLM the architectures. May be called any number of times."""
    from planish.modelling.families import FAMILIES
    from planish.modelling.modelling import class_names
    from planish.modelling.modelling import register as register_classes

    register_classes()
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for family in FAMILIES:
        architecture = class_names(family)[2]
        if architecture not in known:
            ModelRegistry.register_model(architecture, BACKEND)
