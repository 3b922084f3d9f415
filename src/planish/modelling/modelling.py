"""Model classes for compressed folders: every family's own classes with the blocks' specs installed.

`import planish` registers them, so that `AutoModelForCausalLM.from_pretrained(folder)` works; the same file travels in the
folder, with its neighbours, for `trust_remote_code=True` where planish is not installed.
"""

from __future__ import annotations

import copy
import functools
import re

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import output_capturing

from .attentions import Attention
from .blocks import install_model, list_attentions
from .families import FAMILIES
from .heads import needs_eager
from .modules import SlicedBlock
from .wrappers import WRAPPERS

FORMAT = 1  # of config.json's "planish" entry; part of the model type, so that no version loads another's files


def model_type(family: str) -> str:
    """Of a family's, or a wrapper's, compressed models."""
    return f"planish{FORMAT}_{family}"


def class_names(family: str) -> tuple[str, str, str]:
    """Names of the config, base model and causal LM classes of a family, or a wrapper."""
    row = FAMILIES.get(family) or WRAPPERS[family]
    return tuple(f"Planish{name}" for name in row.classes)  # type: ignore[return-value]


def find_classes(family: str) -> tuple[type, type, type]:
    """The stock config, base model and causal LM of a family. AttributeError where this version of transformers lacks it."""
    config, base, lm = FAMILIES[family].classes
    return (
        getattr(transformers, config),
        getattr(transformers, base),
        getattr(transformers, lm, None) or _make_lm(family),
    )


@functools.cache
def _make_lm(family: str) -> type:
    """A causal LM of a family that transformers has only inside wrappers: base model and head, called as LLaMA's is."""
    config_name, base_name, name = FAMILIES[family].classes
    stock_config, base = getattr(transformers, config_name), getattr(transformers, base_name)

    class LM(base.__base__, GenerationMixin):  # type: ignore[misc, name-defined]
        config_class = stock_config
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config):
            super().__init__(config)
            self.model = base(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.vocab_size = config.vocab_size
            self.post_init()

        forward = LlamaForCausalLM.forward

    LM.__name__ = LM.__qualname__ = name
    LM.__module__ = __name__
    globals()[name] = LM
    return LM


def copy_config(config, family: str):
    """The config without per-layer overrides that are ours: what a family's stock constructor may read."""
    plain = copy.copy(config)
    if not FAMILIES[family].per_block:
        plain.__dict__.pop("_heterogeneity_spec", None)
    return plain


class Stock:
    """Of a stock class. In what others define transformers renames kinds of layers, and leaves buffers as they are that a model
    fills for its blocks."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


def _build(family: str) -> dict[str, type]:
    row = FAMILIES[family]
    config_name, base_name, lm_name = class_names(family)
    stock_config, stock_base, stock_lm = find_classes(family)

    class Config(Stock, stock_config):  # type: ignore[misc, valid-type]
        planish: dict | None = None

        def get_text_config(self, decoder=None, encoder=None):
            """What caches are made from (`decoder=True`): one entry per attention that is left, in their dense numbering."""
            if not decoder or not self.planish:
                return super().get_text_config(decoder=decoder, encoder=encoder)
            left = list_attentions(self)
            if len(left) == self.num_hidden_layers:
                return self
            view = copy_config(self, family)
            view.planish, view.num_hidden_layers = None, len(left)
            if getattr(self, "layer_types", None):
                view.layer_types = [self.layer_types[i] for i in left]
            return view

        def validate_architecture(self):
            """Block shapes are checked against the weights when they are loaded."""

    Config.model_type = model_type(family)

    class Exact(Stock):
        def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
            """Unless told, an attention that computes all that the configuration says."""
            if requested_attention is None and needs_eager(self.config):  # type: ignore[attr-defined]
                requested_attention = "eager"
            return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)  # type: ignore[misc]

    class Model(Exact, stock_base):  # type: ignore[misc, valid-type]
        config_class = Config
        _can_record_outputs = _list_recorded(stock_base)

        def __init__(self, config):
            plain = copy_config(config, family)
            super().__init__(plain)
            install_model(self, config)
            share_config(self, plain, config)

    class LM(Exact, stock_lm):  # type: ignore[misc, valid-type]
        config_class = Config

        def __init__(self, config):
            plain = copy_config(config, family)
            super().__init__(plain)
            install_model(self, config)
            share_config(self, plain, config)

    if row.renames:
        renames = [WeightRenaming(re.escape(old), new) for old, new in row.renames]
        register_checkpoint_conversion_mapping(Config.model_type, renames, overwrite=True)
    return _name({config_name: Config, base_name: Model, lm_name: LM})


def _name(made: dict[str, type]) -> dict[str, type]:
    for name, cls in made.items():
        cls.__name__ = cls.__qualname__ = name
        cls.__module__ = __name__
    return made


def _build_wrapper(kind: str) -> dict[str, type]:
    """Stock classes of a wrapper, with the family's compressed base model for a language model."""
    row = WRAPPERS[kind]
    config_name, base_name, lm_name = class_names(kind)
    stock_config, stock_base, stock_lm = (getattr(transformers, n) for n in row.classes)

    class Config(stock_config):  # type: ignore[misc, valid-type]
        def __post_init__(self, **kwargs):
            text = self.text_config  # type: ignore[has-type]
            if isinstance(text, dict):
                self.text_config = globals()[class_names(text["planish"]["family"])[0]](**text)
            super().__post_init__(**kwargs)

        def get_text_config(self, decoder=None, encoder=None):
            return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    def build(model, stock, config) -> None:
        """Build the stock model, and the compressed language model in the place of its own."""
        family, plain = config.text_config.planish["family"], copy.copy(config)
        plain.text_config = copy_config(config.text_config, family)
        plain.text_config.__class__ = find_classes(family)[0]
        stock.__init__(model, plain)
        inner = model.model if stock is stock_lm and not row.whole else model
        inner.language_model = globals()[class_names(family)[2 if row.whole else 1]](config.text_config)
        replace_config(model, plain, config)

    class Model(stock_base):  # type: ignore[misc, valid-type]
        config_class = Config

        def __init__(self, config):
            build(self, stock_base, config)

    class LM(stock_lm):  # type: ignore[misc, valid-type]
        config_class = Config

        def __init__(self, config):
            build(self, stock_lm, config)

    Config.model_type = model_type(kind)
    for name, stock in (
        (base_name, stock_base),
        (lm_name, stock_lm),
    ):  # checkpoints' names, as the stock classes read them
        found = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(kind)
        if found:
            register_checkpoint_conversion_mapping(name, found, overwrite=True)
    return _name({config_name: Config, base_name: Model, lm_name: LM})


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
    """One configuration for a model and all its modules; and what replaces blocks and attentions is recorded as these are."""
    for module in [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]:
        if module._can_record_outputs:
            module.__class__ = _recording(type(module))  # type: ignore[arg-type]
    replace_config(model, plain, config)
    stacks = [p for p in model.parameters() if p.ndim == 3]
    if any(n * p.element_size() % 16 for p in stacks for n in p.shape[1:]):  # grouped products refuse such rows
        config._experts_implementation_internal = "eager"


def replace_config(model, plain, config) -> None:
    """Give a model and all its modules `config` for `plain`, so that a change of the attention reaches every one of them."""
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        setattr(config, name, getattr(plain, name, None))
    for module in model.modules():
        if getattr(module, "config", None) is plain:
            module.config = config


for _kind in (*FAMILIES, *WRAPPERS):
    try:
        globals().update((_build if _kind in FAMILIES else _build_wrapper)(_kind))
    except AttributeError:  # one that this version of transformers lacks
        continue


def list_auto(kind: str) -> dict[str, str]:
    """Auto class → name of the class that it loads a family's, or a wrapper's, compressed model as."""
    config, base, lm = class_names(kind)
    found = {"AutoConfig": config, "AutoModel": base}
    if kind in WRAPPERS:
        found["AutoModelForImageTextToText"] = lm
    return found | ({"AutoModelForCausalLM": lm} if kind in FAMILIES or WRAPPERS[kind].causal else {})


def register() -> None:
    """Make the Auto classes know every compressed form."""
    autos = {a.__name__: a for a in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)}
    for kind in (*FAMILIES, *WRAPPERS):
        if (names := list_auto(kind)).pop("AutoConfig") not in globals():
            continue
        config = globals()[class_names(kind)[0]]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()  # `save_pretrained` copies these files into the folder
        for auto, name in names.items():
            autos[auto].register(config, globals()[name], exist_ok=True)
            globals()[name].register_for_auto_class(auto)
