"""Model classes for compressed folders: every family's own classes with the blocks' specs installed.

`import planish` registers them, so that `AutoModelForCausalLM.from_pretrained(folder)` works; the same file travels in the
folder, with its neighbours, for `trust_remote_code=True` where planish is not installed.
"""

from __future__ import annotations

import functools
import re

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import output_capturing

from .attentions import Attention, needs_eager
from .blocks import copy_config, install_model, list_attentions
from .families import FAMILIES
from .modules import SlicedBlock

FORMAT = 1  # of config.json's "planish" entry; part of the model type, so that no version loads another's files


def model_type(family: str) -> str:
    return f"planish{FORMAT}_{family}"


def class_names(family: str) -> tuple[str, str, str]:
    """Names of the config, base model and causal LM classes of a family."""
    return tuple(f"Planish{name}" for name in FAMILIES[family].classes)  # type: ignore[return-value]


def _build(family: str) -> dict[str, type]:
    row = FAMILIES[family]
    config_name, base_name, lm_name = class_names(family)
    stock_config, stock_base, stock_lm = (getattr(transformers, n) for n in row.classes)

    class Config(stock_config):  # type: ignore[misc, valid-type]
        planish: dict | None = None

        def get_text_config(self, decoder=None, encoder=None):
            """What caches are made from (`decoder=True`): one entry per attention that is left, in their dense numbering."""
            if not decoder or not self.planish:
                return super().get_text_config(decoder=decoder, encoder=encoder)
            left = list_attentions(self)
            if len(left) == self.num_hidden_layers:
                return self
            view = copy_config(self)
            view.planish, view.num_hidden_layers = None, len(left)
            if getattr(self, "layer_types", None):
                view.layer_types = [self.layer_types[i] for i in left]
            return view

        def validate_architecture(self):
            """Block shapes are checked against the weights when they are loaded."""

    Config.model_type = model_type(family)

    class Exact:
        def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
            """Unless told, an attention that computes all that the configuration says."""
            if requested_attention is None and needs_eager(self.config):  # type: ignore[attr-defined]
                requested_attention = "eager"
            return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)  # type: ignore[misc]

    class Model(Exact, stock_base):  # type: ignore[misc, valid-type]
        config_class = Config
        _can_record_outputs = _list_recorded(stock_base)

        def __init__(self, config):
            plain = copy_config(config)
            super().__init__(plain)
            install_model(self, config)
            share_config(self, plain, config)

    class LM(Exact, stock_lm):  # type: ignore[misc, valid-type]
        config_class = Config

        def __init__(self, config):
            plain = copy_config(config)
            super().__init__(plain)
            install_model(self, config)
            share_config(self, plain, config)

    made: dict[str, type] = {config_name: Config, base_name: Model, lm_name: LM}
    for name, cls in made.items():
        cls.__name__ = cls.__qualname__ = name
        cls.__module__ = __name__
    if row.renames:
        renames = [WeightRenaming(re.escape(old), new) for old, new in row.renames]
        register_checkpoint_conversion_mapping(Config.model_type, renames, overwrite=True)
    return made


def _list_recorded(stock) -> dict | None:
    """What `output_hidden_states` and `output_attentions` record. transformers goes by the classes of modules, so what takes the
    place of a family's blocks and attentions is named beside these."""
    found = dict(getattr(stock, "_can_record_outputs", None) or {})
    for key, cls, index in (("hidden_states", SlicedBlock, 0), ("attentions", Attention, 1)):
        if key in found:
            found[key] = [found[key], output_capturing.OutputRecorder(cls, index=index)]
    return found or None


@functools.cache
def _recording(stock) -> type:
    """A family's class that records as `_list_recorded` says, for modules that transformers makes itself."""
    made = type(stock.__name__, (stock,), {"_can_record_outputs": _list_recorded(stock), "__module__": __name__})
    output_capturing._CAN_RECORD_REGISTRY[str(made)] = _list_recorded(stock)  # as PreTrainedModel.__init__ does
    globals()[made.__name__] = made  # for pickle
    return made


def share_config(model, plain, config) -> None:
    """One configuration for a model and all its modules, so that a change of the attention reaches every one of them; and
    what replaces blocks and attentions is recorded as these are."""
    for module in [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]:
        if module._can_record_outputs:
            module.__class__ = _recording(type(module))  # type: ignore[arg-type]
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        setattr(config, name, getattr(plain, name, None))
    stacks = [p for p in model.parameters() if p.ndim == 3]
    if any(
        step * p.element_size() % 16 for p in stacks for step in p.stride()[:2]
    ):  # grouped products refuse such widths
        config._experts_implementation_internal = "eager"
    for module in model.modules():
        if getattr(module, "config", None) is plain:
            module.config = config


for _family in FAMILIES:
    try:
        globals().update(_build(_family))
    except AttributeError:  # a family that this version of transformers lacks
        continue


def register() -> None:
    """Make the Auto classes know every family's compressed form."""
    for family in FAMILIES:
        config_name, base_name, lm_name = class_names(family)
        if config_name not in globals():
            continue
        config = globals()[config_name]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()  # `save_pretrained` copies these files into the folder
        for auto, name in ((AutoModel, base_name), (AutoModelForCausalLM, lm_name)):
            auto.register(config, globals()[name], exist_ok=True)
            globals()[name].register_for_auto_class(auto)
