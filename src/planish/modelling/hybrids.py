"""Families with mixers in place of some attentions, or beside them: one row each, no logic. (This file travels with compressed
models.)"""

from __future__ import annotations

from .family import Family

_ATTENTION = {r: f"self_attn.{r}_proj" for r in "qkvo"}

HYBRIDS = (
    Family(
        "lfm2",
        ("Lfm2Config", "Lfm2Model", "Lfm2ForCausalLM"),
        _ATTENTION
        | {"o": "self_attn.out_proj", "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
        mlp="feed_forward",
        attention_norm="operator_norm",
        mlp_norm="ffn_norm",
        qk_norm="head",
        norms=("q_layernorm", "k_layernorm"),
        others={"mixer.in": "conv.in_proj", "mixer.out": "conv.out_proj"},
        state=(("hidden_size", "conv_L_cache"),),
        settled={"block_auto_adjust_ff_dim": False},
    ),
)
