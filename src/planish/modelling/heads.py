"""What a stock attention, or its configuration, says of its heads. (This file travels with compressed models.)"""

from __future__ import annotations

from torch import nn

from .families import Family


def needs_eager(config) -> bool:
    """Whether attention scores have a soft cap (gemma2): transformers' default, PyTorch's attention, leaves it out silently."""
    declared = hasattr(type(config), "attn_logit_softcapping")  # elsewhere it is a field that nobody reads
    return declared and config.attn_logit_softcapping is not None


def has_norms(stock: nn.Module, family: Family) -> bool:
    """Whether a stock attention normalises queries and keys: in some families models differ."""
    return bool(family.qk_norm) and hasattr(stock, family.norms[0])


def has_rotation(stock: nn.Module, family: Family) -> bool:
    """Whether a stock attention rotates queries and keys: in some families blocks differ."""
    if family.rotates_where:
        name, value = family.rotates_where
        return getattr(stock.config, name) == value
    if not family.rotary or not family.rotates:
        return family.rotary
    everywhere = family.rotates_without and getattr(stock.config, family.rotates_without, None) is None
    return bool(everywhere or getattr(stock, family.rotates))


def head_width(stock: nn.Module) -> int:
    return getattr(stock, "head_dim", None) or stock.head_size


def rotary_width(stock: nn.Module, family: Family) -> int:
    """How many channels of a head are rotated."""
    if not has_rotation(stock, family):
        return 0
    parameters = getattr(stock.config, "rope_parameters", None) or {}
    return int(head_width(stock) * parameters.get("partial_rotary_factor", 1.0))


def count_heads(config, stock: nn.Module | None) -> tuple[int, int]:
    """Query heads and kv heads of a model, or where blocks have other numbers of a block's stock attention."""
    heads, declared = config.num_attention_heads, type(config)
    if "num_key_value_heads" in (getattr(config, "per_layer_attributes", None) or ()):
        assert stock is not None
        return heads, heads // stock.num_key_value_groups  # type: ignore[operator]
    if hasattr(declared, "multi_query") and config.multi_query and not config.new_decoder_architecture:
        return heads, 1
    name = "num_kv_heads" if hasattr(declared, "num_kv_heads") else "num_key_value_heads"
    return heads, (getattr(config, name, None) if hasattr(declared, name) else None) or heads
