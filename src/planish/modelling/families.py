"""Where things are in each Hugging Face family: one row each, no logic. (This file travels with compressed models.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import ATTENTION, GATED_MLP, GRANITE_EXPERTS, GRANITE_NAMES, MLP, SELF_ATTENTION, ExpertsRow, Family, Fused
from .hybrids import HYBRIDS

__all__ = ["ATTENTION", "FAMILIES", "MLP", "ExpertsRow", "Family", "Fused"]

_PLAIN = {r: GATED_MLP[r] for r in ("up", "down")}
_NEIGHBOURS = tuple(Fused(f"self_attn.{r}_proj", (r,), "neighbours") for r in "qk")
_VALUES = {r: SELF_ATTENTION[r] for r in "vo"}  # beside `_NEIGHBOURS`
_LAYERNORMS = ("q_layernorm", "k_layernorm")
_SPARSE = ((".block_sparse_moe.", ".mlp."),)
_QWEN = ExpertsRow(normalised="norm_topk_prob")
_CORRECTED = ExpertsRow(
    count="n_routed_experts",
    router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    normalised="norm_topk_prob",
    otherwise="apart",
    shared="n_shared_experts",
)


def _shared(path: str) -> dict[str, str]:
    """A feed-forward that every token reaches beside its experts."""
    return {f"shared.{r}": f"mlp.{path}.{r}_proj" for r in MLP}


def _latent(model_type: str, classes: tuple[str, str, str], experts: ExpertsRow) -> Family:
    """DeepSeek's: attention on latents, which no solver cuts; the first blocks' feed-forwards are dense."""
    names = {"q": "q_proj", "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj"}
    attention = {f"latent.{r}": f"self_attn.{n}" for r, n in (names | {"o": "o_proj"}).items()}
    return Family(
        model_type,
        classes,
        dict(GATED_MLP),
        others=attention | _shared("shared_experts"),
        cached=("latent.kv_a",),
        experts=experts,
    )


def _classes(stem: str, config: str = "Config") -> tuple[str, str, str]:
    return f"{stem}{config}", f"{stem}Model", f"{stem}ForCausalLM"


def _sandwich(model_type: str, classes: tuple[str, str, str], qk_norm: str = "") -> Family:
    """A gemma that normalises what each submodule adds as well as what it reads."""
    return Family(
        model_type,
        classes,
        SELF_ATTENTION | GATED_MLP,
        qk_norm=qk_norm,
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        window=True,
        softcap=True,
        norm_offset=1.0,
    )


def _one_norm(model_type: str, classes: tuple[str, str, str], linears: dict[str, str], **more: Any) -> Family:
    """A family whose attention and feed-forward read the same normalised residual."""
    return Family(model_type, classes, linears, mlp_norm=None, shared_norm="input_layernorm", parallel=True, **more)


def _post_norm(model_type: str, classes: tuple[str, str, str], qk_norm: str = "width", **more: Any) -> Family:
    """A family that normalises what each submodule adds, not what it reads."""
    return Family(
        model_type,
        classes,
        SELF_ATTENTION | GATED_MLP,
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=qk_norm,
        **more,
    )


_ROWS = (
    Family("llama", _classes("Llama"), SELF_ATTENTION | GATED_MLP),
    Family("arcee", _classes("Arcee"), SELF_ATTENTION | _PLAIN),
    Family("granite", _classes("Granite"), SELF_ATTENTION | GATED_MLP, factor="residual_multiplier"),
    Family("mistral", _classes("Mistral"), SELF_ATTENTION | GATED_MLP, window=True),
    Family("qwen2", _classes("Qwen2"), SELF_ATTENTION | GATED_MLP, window=True),
    Family("qwen2_5_vl_text", _classes("Qwen2_5_VLText"), SELF_ATTENTION | GATED_MLP, window=True, mrope=True),
    Family("qwen3_vl_text", _classes("Qwen3VLText"), SELF_ATTENTION | GATED_MLP, qk_norm="head", mrope=True),
    Family("seed_oss", _classes("SeedOss"), SELF_ATTENTION | GATED_MLP),
    Family("gemma", _classes("Gemma"), SELF_ATTENTION | GATED_MLP, norm_offset=1.0),
    Family(
        "hunyuan_v1_dense",
        _classes("HunYuanDenseV1"),
        SELF_ATTENTION | GATED_MLP,
        qk_norm="rotated",
        norms=("query_layernorm", "key_layernorm"),
    ),
    _post_norm("olmo2", _classes("Olmo2")),
    _post_norm("olmo3", _classes("Olmo3"), window=True),
    Family(
        "ministral3", _classes("Ministral3"), SELF_ATTENTION | GATED_MLP, window=True, position_scale="rope_parameters"
    ),
    _post_norm(
        "exaone4", _classes("Exaone4"), "head", window=True, rotates="is_sliding", rotates_without="sliding_window"
    ),
    Family("smollm3", _classes("SmolLM3"), SELF_ATTENTION | GATED_MLP, window=True, rotates="use_rope"),
    Family("ernie4_5", _classes("Ernie4_5"), _VALUES | GATED_MLP, _NEIGHBOURS),
    Family(
        "glm4",
        _classes("Glm4"),
        _VALUES | {"down": "mlp.down_proj"},
        (*_NEIGHBOURS, Fused("mlp.gate_up_proj", ("gate", "up"))),
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
    Family(
        "falcon",
        _classes("Falcon"),
        {"o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        (Fused("self_attention.query_key_value", ("q", "k", "v"), "heads"),),
        blocks="transformer.h",
        attention="self_attention",
        attention_norm="ln_attn",
        mlp_norm="ln_mlp",
        shared_norm="input_layernorm",
        parallel=True,
        tuples=True,
        in_place=True,
        intermediate="ffn_hidden_size",
    ),
    Family(
        "apertus",
        _classes("Apertus"),
        SELF_ATTENTION | _PLAIN,
        attention_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        qk_norm="head",
    ),
    Family("olmo", _classes("Olmo"), SELF_ATTENTION | GATED_MLP),
    Family(
        "stablelm",
        _classes("StableLm"),
        SELF_ATTENTION | GATED_MLP,
        parallel=True,
        shared_norm="input_layernorm",
        qk_norm="listed",
        norms=_LAYERNORMS,
    ),
    _one_norm("cohere", _classes("Cohere"), _VALUES | GATED_MLP, fused=_NEIGHBOURS, tables="twins", qk_norm="each"),
    _one_norm(
        "cohere2",
        _classes("Cohere2"),
        _VALUES | GATED_MLP,
        fused=_NEIGHBOURS,
        tables="twins",
        window=True,
        rotates="sliding_window",
    ),
    _one_norm(
        "phi",
        _classes("Phi"),
        {r: f"self_attn.{r}_proj" for r in "qkv"} | {"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
        qk_norm="head",
        norms=_LAYERNORMS,
    ),
    Family("nemotron", _classes("Nemotron"), SELF_ATTENTION | _PLAIN, norm_offset=1.0),
    Family(
        "starcoder2", _classes("Starcoder2"), SELF_ATTENTION | {"up": "mlp.c_fc", "down": "mlp.c_proj"}, window=True
    ),
    Family("qwen3", _classes("Qwen3"), SELF_ATTENTION | GATED_MLP, qk_norm="head", window=True),
    Family("qwen3_moe", _classes("Qwen3Moe"), SELF_ATTENTION | GATED_MLP, qk_norm="head", window=True, experts=_QWEN),
    Family(
        "qwen2_moe",
        _classes("Qwen2Moe"),
        SELF_ATTENTION | GATED_MLP,
        others=_shared("shared_expert"),
        experts=_QWEN,
    ),
    Family(
        "mixtral",
        _classes("Mixtral"),
        SELF_ATTENTION,
        window=True,
        intermediate="",
        experts=ExpertsRow(names=("w1", "w3", "w2"), count="num_local_experts", width="intermediate_size"),
        renames=_SPARSE,
    ),
    Family(
        "gpt_oss",
        _classes("GptOss"),
        SELF_ATTENTION,
        window=True,
        tables="one",
        sinks="sinks",
        fixed=("expert",),
        intermediate="",
        experts=ExpertsRow(
            count="num_local_experts",
            width="intermediate_size",
            router=("mlp.router.weight", "mlp.router.bias"),
            transposed=True,
            alternating=True,
            stacked=True,
        ),
    ),
    Family(
        "llama4_text",
        ("Llama4TextConfig", "Llama4TextModel", "Llama4ForCausalLM"),
        _VALUES | {r: f"feed_forward.{r}_proj" for r in MLP},
        _NEIGHBOURS,
        mlp="feed_forward",
        qk_norm="rotated",
        norms=("qk_norm", "qk_norm"),
        rotates="use_rope",
        tables="complex",
        position_scale="unrotated",
        intermediate="intermediate_size_mlp",
        others={f"shared.{r}": f"feed_forward.shared_expert.{r}_proj" for r in MLP},
        experts=ExpertsRow(
            path="feed_forward.experts",
            count="num_local_experts",
            width="intermediate_size",
            router=("feed_forward.router.weight",),
            normalised=None,
            otherwise="apart",
            transposed=True,
            stacked=True,
            inside=True,
            bound=True,
        ),
    ),
    Family(
        "olmoe",
        _classes("Olmoe"),
        SELF_ATTENTION,
        qk_norm="width",
        intermediate="",
        experts=ExpertsRow(width="intermediate_size", normalised="norm_topk_prob"),
    ),
    Family(
        "glm4_moe",
        _classes("Glm4Moe"),
        SELF_ATTENTION | GATED_MLP,
        qk_norm="head",
        others=_shared("shared_experts"),
        experts=_CORRECTED,
    ),
    _latent(
        "deepseek_v2",
        _classes("DeepseekV2"),
        ExpertsRow(
            count="n_routed_experts",
            normalised=None,  # transformers passes over norm_topk_prob
            scale="routed_scaling_factor",
            shared="n_shared_experts",
        ),
    ),
    _latent("deepseek_v3", _classes("DeepseekV3"), _CORRECTED),
    Family(
        "minimax_m2",
        _classes("MiniMaxM2"),
        SELF_ATTENTION,
        qk_norm="width",
        intermediate="",
        experts=ExpertsRow(
            names=("w1", "w3", "w2"),
            count="num_local_experts",
            width="intermediate_size",
            router=("mlp.gate.weight", "mlp.e_score_correction_bias"),
        ),
        renames=_SPARSE,
    ),
    Family(
        "granitemoe",
        _classes("GraniteMoe"),
        SELF_ATTENTION,
        mlp="block_sparse_moe",
        factor="residual_multiplier",
        intermediate="",
        experts=GRANITE_EXPERTS,
        renames=GRANITE_NAMES,
    ),
    Family(
        "phimoe",
        _classes("Phimoe"),
        SELF_ATTENTION,
        intermediate="",
        experts=ExpertsRow(
            names=("w1", "w3", "w2"),
            count="num_local_experts",
            width="intermediate_size",
            router=("mlp.router.weight",),
            normalised=None,
            otherwise="apart",
            fewest=2,  # it looks for a second one, whatever `num_experts_per_tok` says
        ),
        renames=((".block_sparse_moe.gate.", ".mlp.router."), *_SPARSE),
    ),
    Family(
        "phi3",
        _classes("Phi3"),
        {"o": "self_attn.o_proj", "down": "mlp.down_proj"},
        fused=(Fused("self_attn.qkv_proj", ("q", "k", "v")), Fused("mlp.gate_up_proj", ("gate", "up"))),
        window=True,
    ),
    _sandwich("gemma2", _classes("Gemma2")),
    _sandwich("gemma3_text", ("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"), qk_norm="head"),
    replace(
        _sandwich("gemma4_text", ("Gemma4TextConfig", "Gemma4TextModel", "Gemma4ForCausalLM"), qk_norm="head"),
        softcap=False,
        norm_offset=0.0,
        fixed=("attention", "keys"),
        per_block=("head_dim", "num_key_value_heads"),
        per_token=("hidden_size_per_layer_input", "per_layer_input"),
        experts=ExpertsRow(
            path="experts",
            top="top_k_experts",
            router=("router.proj.weight", "router.per_expert_scale"),
            chooser="router",
            scale="per_expert_scale",
            stacked=True,
        ),
    ),
    Family(
        "opt",
        _classes("OPT"),
        {r: f"self_attn.{r}_proj" for r in "qkv"} | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
        blocks="model.decoder.layers",
        mlp=None,
        activation="activation_fn",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        rotary=False,
        intermediate="ffn_dim",
    ),
    Family(
        "gpt_neox",
        _classes("GPTNeoX"),
        {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        fused=(Fused("attention.query_key_value", ("q", "k", "v"), "heads"),),
        blocks="gpt_neox.layers",
        attention="attention",
        parallel=True,
        head="embed_out",
    ),
    Family(
        "gpt2",
        ("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
        {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        fused=(Fused("attn.c_attn", ("q", "k", "v")),),
        blocks="transformer.h",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        rotary=False,
        conv1d=True,
        intermediate="n_inner",
    ),
    Family(
        "mpt",
        _classes("Mpt"),
        {"o": "attn.out_proj", "up": "ffn.up_proj", "down": "ffn.down_proj"},
        fused=(Fused("attn.Wqkv", ("q", "k", "v")),),
        blocks="transformer.blocks",
        attention="attn",
        mlp=None,  # its MLP adds the residual itself
        activation="ffn.act",
        attention_norm="norm_1",
        mlp_norm="norm_2",
        rotary=False,
        tuples=True,
        intermediate="",
    ),
)

FAMILIES: dict[str, Family] = {f.model_type: f for f in _ROWS + HYBRIDS}
