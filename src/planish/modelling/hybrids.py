"""Families with mixers in place of some attentions, or beside them: one row each, no logic. (This file travels with compressed
models.)"""

from __future__ import annotations

from typing import Any

from .family import GATED_MLP, GRANITE_EXPERTS, GRANITE_NAMES, SELF_ATTENTION, ExpertsRow, Family, Fused


def _delta(
    model_type: str,
    classes: tuple[str, str, str],
    names: dict[str, str],
    experts: ExpertsRow | None = None,
    **more: Any,
) -> Family:
    """Gated delta nets, and in every few blocks an attention whose output is gated. `names`: of the nets' linears."""
    mixer = {f"mixer.{role}": f"linear_attn.{name}" for role, name in (names | {"out": "out_proj"}).items()}
    shared = {f"shared.{r}": f"mlp.shared_expert.{r}_proj" for r in ("gate", "up", "down")} if experts else {}
    heads = ("linear_num_key_heads", "linear_key_head_dim"), ("linear_num_value_heads", "linear_value_head_dim")
    return Family(
        model_type,
        classes,
        {r: p for r, p in (SELF_ATTENTION | GATED_MLP).items() if r != "q"},
        fused=(Fused("self_attn.q_proj", ("q", "attention.gate"), "heads"),),
        qk_norm="head",
        norm_offset=1.0,
        fixed=("attention",),
        others={"attention.gate": "self_attn.q_proj.gate"} | mixer | shared,
        state=(
            (2, *heads[0], "linear_conv_kernel_dim"),
            (*heads[1], "linear_conv_kernel_dim"),
            (*heads[1], "linear_key_head_dim"),
        ),
        experts=experts,
        **more,
    )


_APART = {
    "in": "in_proj_qkv",
    "z": "in_proj_z",
    "b": "in_proj_b",
    "a": "in_proj_a",
}  # where queries are beside their gates


def _mamba(prefix: str) -> dict[str, str]:
    return {f"mixer.{role}": f"{prefix}.{role}_proj" for role in ("in", "out")}


_MAMBA_STATE = (
    ("mamba_n_heads", "mamba_d_head", "mamba_d_conv"),
    (2, "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
)

HYBRIDS = (
    Family(
        "lfm2",
        ("Lfm2Config", "Lfm2Model", "Lfm2ForCausalLM"),
        SELF_ATTENTION
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
    _delta(
        "qwen3_next",
        ("Qwen3NextConfig", "Qwen3NextModel", "Qwen3NextForCausalLM"),
        {"in": "in_proj_qkvz", "gates": "in_proj_ba"},
        ExpertsRow(normalised="norm_topk_prob"),
    ),
    _delta("qwen3_5_text", ("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3_5ForCausalLM"), _APART, mrope=True),
    _delta(
        "qwen3_5_moe_text",
        ("Qwen3_5MoeTextConfig", "Qwen3_5MoeTextModel", "Qwen3_5MoeForCausalLM"),
        _APART,
        ExpertsRow(),
        mrope=True,
        intermediate="",
    ),
    Family(
        "granitemoehybrid",
        ("GraniteMoeHybridConfig", "GraniteMoeHybridModel", "GraniteMoeHybridForCausalLM"),
        SELF_ATTENTION | {"down": "shared_mlp.output_linear"},
        fused=(Fused("shared_mlp.input_linear", ("gate", "up")),),
        mlp="shared_mlp",
        factor="residual_multiplier",
        rotates_where=("position_embedding_type", "rope"),
        intermediate="shared_intermediate_size",
        others=_mamba("mamba"),
        state=_MAMBA_STATE,
        experts=GRANITE_EXPERTS,
        renames=GRANITE_NAMES,
    ),
    Family(
        "falcon_h1",
        ("FalconH1Config", "FalconH1Model", "FalconH1ForCausalLM"),
        SELF_ATTENTION | {r: f"feed_forward.{r}_proj" for r in ("gate", "up", "down")},
        mlp="feed_forward",
        mlp_norm="pre_ff_layernorm",
        tuples=True,
        others=_mamba("mamba"),
        state=_MAMBA_STATE,
    ),
    Family(
        "nemotron_h",
        ("NemotronHConfig", "NemotronHModel", "NemotronHForCausalLM"),
        {r: f"mixer.{r}_proj" for r in ("q", "k", "v", "o", "up", "down")},
        attention="mixer",
        mlp="mixer",
        attention_norm="norm",
        mlp_norm="norm",
        rotary=False,
        others=_mamba("mixer") | {f"shared.{r}": f"mixer.shared_experts.{r}_proj" for r in ("up", "down")},
        experts=ExpertsRow(
            path="mixer.experts",
            names=("", "up_proj", "down_proj"),
            hidden="moe_latent_size",
            count="n_routed_experts",
            router=("mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
            normalised="norm_topk_prob",
            otherwise="apart",
        ),
        state=(
            ("mamba_num_heads", "mamba_head_dim", "conv_kernel"),
            (2, "n_groups", "ssm_state_size", "conv_kernel"),
            ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
        ),
        renames=(("backbone.", "model."),),
    ),
)
