"""Which of llama.cpp's graphs run which families, and what of a family's configurations they do not run.

A family in `LLAMAS` can be written as several graphs, some of which hold cut shapes; one in `GRAPHS` as its own alone, whose
blocks are all alike: what is cut narrower in some blocks is filled up with zeros.

Reference: llama.cpp's convert_hf_to_gguf.py (metadata) and src/models (what the graphs compute).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planish.modelling.family import Family

LLAMAS = {  # family → its graphs; deci and mimo2 hold some of what these do not
    "llama": ["llama"],
    "mistral": ["llama"],
    "phi3": ["llama"],
    "qwen2": ["qwen2", "llama"],
    "qwen3": ["qwen3"],
}
ACTIVATION = (
    "mlp_hidden_act",
    "hidden_activation",
    "hidden_act",
    "activation_function",
    "activation",
)  # names in configurations


@dataclass(frozen=True)
class Graph:
    """A graph that runs one family.

    `name`: llama.cpp's. `activation`: those it computes. `neighbours`: it rotates channels 2j and 2j + 1, not j and j + d/2.
    `factors`: it takes factors of the rotary frequencies. `windows`: it has sliding windows. `values`: metadata → the
    configuration's name; `fixed`: metadata → value. `needs`: the configuration's name → values that the graph has built in.
    `gates`: 1 where routing is a softmax, 2 where each expert has a gate of its own (0: the graph has it built in).
    `mixer`: what stands in the place of attention in some blocks, or beside it: "conv", "mamba", "delta", or "grouped" where
    delta nets' values stay with their keys. `mixed`: llama.cpp's name of the graph where blocks have experts, if it is another.
    `beside`: path of the feed-forward that is the shared one where a block has experts. `weighed`: linears come with the factors
    that the model multiplies what they read and give by. `refuses`: why the graph cannot hold a model of this configuration.
    """

    name: str
    activation: tuple[str, ...] = ("silu",)
    neighbours: bool = False
    factors: bool = False
    windows: bool = False
    values: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    gates: int = 0
    still: int = 0  # every so-many-th block does not rotate
    open: int = 0  # every so-many-th block has no window, all others have one
    biased: bool = False  # experts have biases
    square: bool = False  # it asks for heads × head size = hidden size
    alone: bool = False  # it asks for as many key/value heads as heads
    widths: bool = False  # feed-forwards may have a width each
    proportional: bool = False  # it takes factors that leave the last pairs of a head unrotated
    mixer: str = ""
    mixed: str = ""
    beside: str = ""
    weighed: bool = False
    refuses: Callable[[Any], str | None] = lambda config: None


def refuse_gemma4(config: Any) -> str | None:
    kinds, shared, own = config.layer_types, config.num_kv_shared_layers, config.vocab_size_per_layer_input
    if shared and kinds[len(kinds) - shared - 2 :][:2] != ["sliding_attention", "full_attention"]:
        return "takes shared keys from the last two blocks that have their own, the first of which has a window"
    if config.enable_moe_block:
        return "is written without experts beside its feed-forward here, config.json says enable_moe_block=true"
    if config.hidden_size_per_layer_input and own != config.vocab_size:
        return f"has as many embeddings for every block as tokens, config.json says {own} for {config.vocab_size}"
    return None


def refuse_llama4(config: Any) -> str | None:
    step = config.interleave_moe_layer_step
    if [*config.moe_layers] != [*range(step - 1, config.num_hidden_layers, step)]:
        return f"has experts in every {step}th block, as interleave_moe_layer_step says; config.json lists {config.moe_layers}"
    if config.use_qk_norm != (config.num_local_experts != 128):
        return "normalises queries and keys, but not those of models with 128 experts"
    return None


def refuse_falcon_h1(config: Any) -> str | None:
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "multiplies what a mixer gives by its gate before the norm, config.json says mamba_norm_before_gate=true"
    return None


def refuse_nemotron_h(config: Any) -> str | None:
    both = {"moe", "mlp"} <= {*config.layers_block_type}
    return "has no dense feed-forward in a model with experts" if both else None


def refuse_delta(config: Any) -> str | None:
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    unlike = f"has keys and values of one size in delta nets, config.json says {keys} and {values}"
    return unlike if keys != values else None


_TANH, _GELU = ("gelu_pytorch_tanh", "gelu_new"), ("gelu", "gelu_pytorch_tanh", "gelu_new")
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_LEADING = {"leading_dense_block_count": "first_k_dense_replace"}
_SCALE = {"expert_weights_scale": "routed_scaling_factor"}
_ROUTED = _SCALE | {"expert_weights_norm": "norm_topk_prob"}
_ALL_SPARSE: dict[str, tuple[Any, ...]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}

GRAPHS: dict[str, Graph] = {
    "arcee": Graph("arcee", ("relu2",), neighbours=True, factors=True),
    "granite": Graph("granite", neighbours=True, factors=True, values=_GRANITE),
    "seed_oss": Graph("seed_oss"),
    "gemma": Graph("gemma", _TANH),
    "gemma2": Graph("gemma2", _TANH, windows=True, values=_CAPS),
    "gemma3_text": Graph("gemma3", _TANH, windows=True, values={"final_logit_softcapping": "final_logit_softcapping"}),
    "hunyuan_v1_dense": Graph("hunyuan-dense"),
    "olmo": Graph("olmo", neighbours=True, fixed={"attention.layer_norm_epsilon": 1e-5}),
    "olmo2": Graph("olmo2"),
    "olmo3": Graph("olmo2", windows=True),
    "exaone4": Graph("exaone4", factors=True, needs={"sliding_window": (None, 0)}),
    "stablelm": Graph(
        "stablelm", values={"use_parallel_residual": "use_parallel_residual"}, needs={"qk_layernorm": (False,)}
    ),
    "nemotron": Graph("nemotron", ("relu2",), square=True),
    "starcoder2": Graph("starcoder2", _TANH),
    "smollm3": Graph("smollm3", neighbours=True, factors=True, still=4),
    "ernie4_5": Graph("ernie4_5", neighbours=True, needs={"use_bias": (False,)}),
    "glm4": Graph("glm4", neighbours=True),
    "cohere": Graph(
        "command-r", neighbours=True, values={"logit_scale": "logit_scale"}, needs={"use_qk_norm": (False, None)}
    ),
    "cohere2": Graph("cohere2", neighbours=True, windows=True, values={"logit_scale": "logit_scale"}),
    "apertus": Graph("apertus", ("xielu",), factors=True),
    "phi": Graph("phi2", _TANH, needs={"qk_layernorm": (False,)}),
    "falcon": Graph("falcon", _GELU, needs={"bias": (False,)}),
    "ministral3": Graph(
        "mistral3", neighbours=True, values={"attention.temperature_scale": "rope_parameters.llama_4_scaling_beta"}
    ),
    "gpt2": Graph("gpt2", _TANH),
    "gpt_neox": Graph("gptneox", _GELU, values={"use_parallel_residual": "use_parallel_residual"}),
    "mpt": Graph("mpt", _GELU, values={"attention.max_alibi_bias": "attn_config.alibi_bias_max"}),
    "mixtral": Graph("llama", neighbours=True, factors=True),
    "qwen3_moe": Graph("qwen3moe", needs=_ALL_SPARSE | {"norm_topk_prob": (True,)}),
    "qwen2_moe": Graph("qwen2moe", needs=_ALL_SPARSE | {"norm_topk_prob": (False,)}),
    "olmoe": Graph("olmoe", alone=True, needs={"norm_topk_prob": (False,)}),
    "granitemoe": Graph("granitemoe", neighbours=True, factors=True, values=_GRANITE),
    "glm4_moe": Graph("glm4moe", values=_LEADING | _ROUTED, gates=2),
    "deepseek_v2": Graph(
        "deepseek2", neighbours=True, values=_LEADING | _SCALE, gates=1, needs={"topk_method": ("greedy", None)}
    ),
    "deepseek_v3": Graph("deepseek2", neighbours=True, values=_LEADING | _ROUTED, gates=2),
    "minimax_m2": Graph("minimax-m2", gates=2),
    "gpt_oss": Graph("gpt-oss", windows=True, open=2, biased=True),
    "llama4_text": Graph(
        "llama4",
        neighbours=True,
        factors=True,
        still=4,
        values={"interleave_moe_layer_step": "interleave_moe_layer_step"},
        needs={
            "attention_chunk_size": (8192,),
            "attn_temperature_tuning": (True,),
            "floor_scale": (8192,),
            "attn_scale": (0.1,),
        },
        refuses=refuse_llama4,
    ),
    "gemma4_text": Graph(
        "gemma4",
        _TANH,
        windows=True,
        widths=True,
        proportional=True,
        values={
            "final_logit_softcapping": "final_logit_softcapping",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "attention.shared_kv_layers": "num_kv_shared_layers",
        },
        refuses=refuse_gemma4,
    ),
    "qwen3_vl_text": Graph("qwen3vl"),
    "lfm2": Graph("lfm2", mixer="conv"),
    "qwen3_next": Graph(
        "qwen3next", mixer="grouped", needs=_ALL_SPARSE | {"norm_topk_prob": (True,)}, refuses=refuse_delta
    ),
    "qwen3_5_text": Graph("qwen35", mixer="delta", refuses=refuse_delta),
    "qwen3_5_moe_text": Graph("qwen35moe", mixer="delta", refuses=refuse_delta),
    "granitemoehybrid": Graph(
        "granitehybrid",
        neighbours=True,
        mixer="mamba",
        values=_GRANITE,
        needs={"mamba_n_groups": (1,)},
        beside="shared_mlp",
    ),
    "falcon_h1": Graph("falcon-h1", mixer="mamba", weighed=True, refuses=refuse_falcon_h1),
    "nemotron_h": Graph(
        "nemotron_h",
        ("relu2",),
        widths=True,
        mixer="mamba",
        mixed="nemotron_h_moe",
        values=_ROUTED,
        refuses=refuse_nemotron_h,
    ),
}
TANH = ("gptneox", "mpt", "falcon")  # graphs that compute GELU in its tanh form, whatever the model does
TABLED = {
    g.name for g in GRAPHS.values() if set(_TANH) & {*g.activation}
}  # GELU looked up in a table of half-precision numbers
OTHERWISE = {"phimoe": "llama.cpp's graph routes by a plain softmax, transformers by sparse mixers"}


def refuse_family(kind: str, config: Any) -> str | None:
    """Why no GGUF file can be written of a family's models, or None."""
    if kind in OTHERWISE:
        return f"GGUF export does not write {kind}: {OTHERWISE[kind]}"
    if kind not in LLAMAS and kind not in GRAPHS:
        return (
            f"llama.cpp has no graph of {kind}, or none that GGUF export writes: docs/families.md lists those it does"
        )
    graph = GRAPHS.get(kind, Graph(kind))
    used = next((getattr(config, n) for n in ACTIVATION if getattr(config, n, None)), graph.activation[0])
    if used not in graph.activation:
        return f"GGUF export of {kind} needs the activation {graph.activation[0]}, got {used!r}"
    for name, allowed in graph.needs.items():
        if (found := getattr(config, name, None)) not in allowed:
            return f"llama.cpp's graph of {kind} has {name}={allowed[0]!r} built in, config.json says {found!r}"
    if reason := graph.refuses(config):
        return f"llama.cpp's graph of {kind} {reason}"
    if (graph.square or graph.alone) and (reason := refuse_heads(graph, config)):
        return f"llama.cpp's graph of {kind} needs {reason}"
    return None


def refuse_heads(graph: Graph, config: Any) -> str | None:
    """What the graph asks of heads that a configuration, one for all blocks, does not give; or None."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    if graph.square and heads * head != config.hidden_size:
        return f"heads × head size = hidden size, got {heads} × {head} for {config.hidden_size}"
    if graph.alone and kv_heads != heads:
        return f"as many key/value heads as heads, got {kv_heads} for {heads}"
    return None


def split_rope(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary parameters of full attention and, where it has its own, of attention in a window."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found), found.get("sliding_attention") or {}


def refuse_rope(kind: str, config: Any) -> str | None:
    """Why a family's graph cannot hold the rotary embedding that a configuration asks for, or None."""
    full, window = split_rope(config)
    graph, scaling = GRAPHS[kind], full.get("rope_type", "default")
    known = {"default", "linear", "yarn"} | ({"llama3"} if graph.factors else set())
    known |= {"proportional"} if graph.proportional else set()
    own = full.get("mscale") != full.get("mscale_all_dim") or full.get("attention_factor")
    if scaling == "yarn" and full.get("truncate") is False:
        return (
            f"llama.cpp rounds the ends of YaRN's ramp, and config.json of this {kind} has rope_parameters.truncate=false; with "
            "true transformers rounds them too, and the file computes what the folder does"
        )
    if scaling not in known or (scaling == "yarn" and own):
        return f"rotary embedding of type {scaling!r} as config.json has it is not written to GGUF for {kind}"
    if window and window.get("rope_type", "default") != "default":
        return f"scaled rotary embeddings in windows are not written to GGUF for {kind}"
    return None


def describe_rope(config: Any) -> dict[str, Any]:
    """Metadata of rotary embeddings."""
    full, window = split_rope(config)
    found: dict[str, Any] = {"rope.freq_base": float(full.get("rope_theta", 10000.0))}
    if window:
        found["rope.freq_base_swa"] = float(window["rope_theta"])
    if full.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
    if full.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if full.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = float(full[name])
        if full.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * full["mscale_all_dim"]
    return found


def limit_context(family: Family, config: Any) -> int:
    """The context that llama.cpp may use: no longer than a sliding window that the graph does not have."""
    length, window = count_positions(config), getattr(config, "sliding_window", None)
    own = family.model_type in GRAPHS and GRAPHS[family.model_type].windows
    return min(length, window) if family.window and window and not own else length


def count_positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or config.max_seq_len)
