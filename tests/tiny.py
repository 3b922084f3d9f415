"""Tiny random models of every family, two or three blocks each, with weights that leave nothing degenerate.

`build(name)` gives one of `NAMES` in fp32 (or another dtype), the same every time; `save` writes it as a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

import planish.folder.load
from planish.calibrate.text import cut_windows, sample_starts
from planish.folder.writer import Writer
from planish.modelling.families import FAMILIES

VOCABULARY = 97
POSITIONS = 64
WINDOW = 8  # of sliding attention: shorter than every test's sequences

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_GQA = {"num_key_value_heads": 2}
_FALCON = {"ffn_hidden_size": 44, "num_hidden_layers": 2, "tie_word_embeddings": True}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_mha": ("Llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "llama_gqa": ("Llama", _GQA),
    "llama_head_dim": ("Llama", {**_GQA, "head_dim": 12, "num_hidden_layers": 2}),
    "llama_bias": ("Llama", {**_GQA, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "llama_tied": ("Llama", {**_GQA, "tie_word_embeddings": True, "num_hidden_layers": 2}),
    "llama_rope3": (
        "Llama",
        _GQA | _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_dynamic": ("Llama", {**_GQA, "max_position_embeddings": 16, "num_hidden_layers": 2} | _rope("dynamic", factor=4.0)),
    "llama_yarn": (
        "Llama",
        {**_GQA, "num_hidden_layers": 2} | _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "mistral": ("Mistral", {**_GQA, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {**_GQA, "sliding_window": WINDOW, "original_max_position_embeddings": POSITIONS}),
    "phi3_partial": (
        "Phi3",
        {**_GQA, "sliding_window": None, "original_max_position_embeddings": POSITIONS, "num_hidden_layers": 2}
        | _rope("default", partial_rotary_factor=0.5),
    ),
    "gemma2": (
        "Gemma2",
        {
            **_GQA, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": WINDOW, "tie_word_embeddings": True,
            "attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0, "attn_implementation": "eager",  # sdpa has no cap
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_GQA, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": WINDOW, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "opt": ("OPT", {"ffn_dim": 44, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoX", {"use_parallel_residual": True} | _rope("default", partial_rotary_factor=0.5)),
    "gpt_neox_serial": (
        "GPTNeoX",
        {"use_parallel_residual": False, "num_hidden_layers": 2} | _rope("default", partial_rotary_factor=0.25),
    ),
    "gpt2": ("GPT2LMHead", {"n_inner": 44, "tie_word_embeddings": True}),
    "mpt": ("Mpt", {"max_seq_len": POSITIONS, "num_hidden_layers": 2}),
    "arcee": ("Arcee", {**_GQA, "num_hidden_layers": 2}),  # rotary, and no gate
    "granite": (
        "Granite",
        {
            **_GQA, "num_hidden_layers": 2, "residual_multiplier": 0.6, "attention_multiplier": 0.4,
            "embedding_multiplier": 1.5, "logits_scaling": 1.3,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_GQA, "head_dim": 16, "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2,
            "mlp_only_layers": [1], "norm_topk_prob": True, "experts_implementation": "eager",  # the others take no fp64
        },
    ),
    "seed_oss": ("SeedOss", {**_GQA, "head_dim": 12, "num_hidden_layers": 2}),
    "gemma": ("Gemma", {**_GQA, "head_dim": 12, "tie_word_embeddings": True, "num_hidden_layers": 2}),
    "hunyuan": ("HunYuanDenseV1", {**_GQA, "head_dim": 12, "num_hidden_layers": 2}),
    "olmo2": ("Olmo2", {**_GQA, "num_hidden_layers": 2}),
    "olmo3": (
        "Olmo3",
        {
            **_GQA, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "ministral3": (
        "Ministral3",
        {**_GQA, "head_dim": 12, "sliding_window": None, "num_hidden_layers": 2}
        | _rope("yarn", factor=8.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.5),
    ),
    "exaone4": (
        "Exaone4",
        {**_GQA, "sliding_window": None, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    ),
    "exaone4_windows": (
        "Exaone4",  # only blocks with a window rotate
        {
            **_GQA, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
        },
    ),
    "smollm3": ("SmolLM3", {**_GQA, "no_rope_layers": [1, 0], "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "ernie4_5": ("Ernie4_5", {**_GQA, "head_dim": 12, "use_bias": True, "num_hidden_layers": 2}),  # rotates neighbours
    "glm4": ("Glm4", {**_GQA, "head_dim": 12, "num_hidden_layers": 2} | _rope("default", partial_rotary_factor=0.5)),
    "cohere": ("Cohere", {**_GQA, "num_hidden_layers": 2, "tie_word_embeddings": True, "logit_scale": 0.5}),
    "cohere2": (
        "Cohere2",
        {
            **_GQA, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2,
            "tie_word_embeddings": True, "logit_scale": 0.5,
        },
    ),
    "cohere_norms": ("Cohere", {**_GQA, "num_hidden_layers": 2, "use_qk_norm": True, "attention_bias": True}),
    "phi_norms": ("Phi", {"num_hidden_layers": 2, "qk_layernorm": True}),
    "stablelm_norms": (
        "StableLm", {**_GQA, "use_parallel_residual": True, "qk_layernorm": True, "num_hidden_layers": 2},
    ),
    "phi": ("Phi", {"num_hidden_layers": 2} | _rope("default", partial_rotary_factor=0.5)),
    "stablelm_parallel": ("StableLm", {**_GQA, "use_parallel_residual": True, "num_hidden_layers": 2}),
    "falcon": ("Falcon", {**_FALCON, "bias": True}),  # one kv head, one norm for both submodules
    "falcon_new": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_new_shared": (
        "Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "apertus": ("Apertus", {**_GQA, "num_hidden_layers": 2, "head_dim": 12} | _rope("default")),
    "olmo": ("Olmo", {**_GQA, "num_hidden_layers": 2}),
    "stablelm": ("StableLm", {**_GQA, "use_qkv_bias": True} | _rope("default", partial_rotary_factor=0.25)),
    "nemotron": ("Nemotron", {**_GQA, "head_dim": 12} | _rope("default", partial_rotary_factor=0.5)),
    "starcoder2": ("Starcoder2", {**_GQA, "sliding_window": WINDOW, "num_hidden_layers": 2}),
}  # fmt: skip
MORE = tuple(list(_ROWS)[list(_ROWS).index("seed_oss") :])  # a few laws each; all of them where slow tests run
RARE = (  # of these, what is made of the same as others: all laws are slow
    "exaone4_windows", "smollm3", "ernie4_5", "cohere", "cohere_norms", "phi", "phi_norms", "stablelm_parallel",
    "stablelm_norms", "falcon_new", "falcon_new_shared", "apertus", "qwen3_5",
    "qwen3_5_moe", "nemotron_h_moe", "llama4",
    "granite_hybrid", "granite_dense", "falcon_h1", "gemma4", "gemma4_moe",
)  # fmt: skip


def each(names: Sequence[str]) -> list[Any]:
    """Parameters of a test that runs on every one of these families."""
    return [pytest.param(n, marks=pytest.mark.slow if n in RARE else ()) for n in names]


def pick(quick: Sequence[Any], cases: Sequence[Any]) -> list[Any]:
    """Parameters of a test: all of the cases, slow but for these; a tuple is one case of several parameters."""
    assert all(c in cases for c in quick)
    values = [c if isinstance(c, tuple) else (c,) for c in cases]
    return [pytest.param(*v, marks=() if c in quick else pytest.mark.slow) for c, v in zip(cases, values)]


_EIGHT: dict[str, Any] = {
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "experts_implementation": "eager",  # the others take no fp64
}  # fmt: skip
_EXPERTS, _LOCAL = {**_EIGHT, "num_experts": 8}, {**_EIGHT, **_GQA, "num_local_experts": 8, "intermediate_size": 12}
_GROUPED = {
    **_EIGHT, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "num_nextn_predict_layers": 0,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_EXPERTS, **_GQA, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0],
        },
    ),
    "mixtral": ("Mixtral", {**_LOCAL, "sliding_window": WINDOW}),
    "olmoe": ("Olmoe", {**_EXPERTS, **_GQA, "intermediate_size": 12}),
    "glm4_moe": (
        "Glm4Moe", {**_GROUPED, **_GQA, "head_dim": 16, "use_qk_norm": True} | _rope("default", partial_rotary_factor=0.5),
    ),
    "deepseek_v2": (
        "DeepseekV2", {**_GROUPED, **_LATENT, "topk_method": "group_limited_greedy", "topk_group": 2, "num_key_value_heads": 4},
    ),
    "deepseek_v3": ("DeepseekV3", {**_GROUPED, **_LATENT, "num_key_value_heads": 4}),
    "minimax_m2": ("MiniMaxM2", {**_LOCAL, "head_dim": 12} | _rope("default", partial_rotary_factor=0.5)),
    "granitemoe": (
        "GraniteMoe", {**_LOCAL, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "embedding_multiplier": 1.5},
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_LOCAL, "head_dim": 12, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        } | _rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    ),
    "llama4": (
        "Llama4Text",
        {
            **_LOCAL, "head_dim": 12, "intermediate_size_mlp": 44, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1],
            "moe_layers": [1, 2], "attention_chunk_size": WINDOW, "floor_scale": 4, "attn_scale": 0.5,
        },
    ),
    "phimoe": ("Phimoe", {**_LOCAL, "attention_bias": True, "lm_head_bias": True, "sliding_window": None}),
}  # fmt: skip
_ROWS |= _MIXTURES
SPARSE = ("qwen3_moe", *_MIXTURES)  # families with experts
OTHERWISE = ("gpt_oss", "llama4")  # of these, those whose attention does what no other does
NAMES = tuple(n for n in _ROWS if n not in SPARSE + MORE)

_DELTA: dict[str, Any] = {
    "head_dim": 16, "linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 5, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2",
        {
            **_GQA, "intermediate_size": 66, "block_multiple_of": 4, "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_GQA, **_DELTA, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 2, "mlp_only_layers": [1], "experts_implementation": "eager",
        },
    ),
    "qwen3_5": ("Qwen3_5Text", {**_GQA, **_DELTA}),
    "qwen3_5_moe": (
        "Qwen3_5MoeText",
        {
            **_GQA, **_DELTA, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 2, "experts_implementation": "eager",
        },
    ),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        {
            **_GQA, **_MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "residual_multiplier": 0.6,
            "attention_multiplier": 0.4, "shared_intermediate_size": 44, "intermediate_size": 12, "num_local_experts": 8,
            "num_experts_per_tok": 2, "experts_implementation": "eager",
        },
    ),
    "granite_dense": (
        "GraniteMoeHybrid",
        {
            **_GQA, **_MAMBA, "layer_types": ["linear_attention", "full_attention"], "residual_multiplier": 0.6,
            "attention_multiplier": 0.4, "shared_intermediate_size": 44, "num_local_experts": 0, "num_hidden_layers": 2,
            "position_embedding_type": "rope",
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **_GQA, **_MAMBA, "mamba_d_ssm": 24, "num_hidden_layers": 2, "key_multiplier": 0.7,
            "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9, "mlp_multipliers": [0.8, 1.3],
            "ssm_multipliers": [0.9, 0.8, 1.2, 1.1, 0.7], "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8,
            "embedding_multiplier": 1.5, "lm_head_multiplier": 0.6,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_GQA, "head_dim": 12, "mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "num_hidden_layers": 4,
        },
    ),
    "nemotron_h_moe": (
        "NemotronH",
        {
            **_GQA, "head_dim": 12, "mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 8,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_latent_size": 20,
            "moe_shared_expert_intermediate_size": 28, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5,
            "experts_implementation": "eager",
        },
    ),
}  # fmt: skip
_ROWS |= _HYBRIDS
_ROWS |= {
    "gemma4": (
        "Gemma4Text",  # the last two blocks read keys and values of the first two, and values of full attention are its keys
        {
            **_GQA, "head_dim": 12, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW,
            "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCABULARY, "tie_word_embeddings": True, "final_logit_softcapping": 8.0,
        },
    ),
    "gemma4_moe": (
        "Gemma4Text",  # as the one with experts was released: nothing for each block, no keys that others read
        {
            **_GQA, "head_dim": 12, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW,
            "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "tie_word_embeddings": True,
            "final_logit_softcapping": 8.0, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
            "moe_intermediate_size": 12, "experts_implementation": "eager",
        },
    ),
}  # fmt: skip
STOCK = ("gemma4", "gemma4_moe")  # families whose attention stays the stock one; all laws are slow
HYBRIDS = tuple(_HYBRIDS)  # families with mixers in place of some attentions, or beside them
MIXED = ("qwen3_next", "granite_hybrid", "qwen3_5_moe", "nemotron_h_moe", "gemma4_moe")  # of both, those with experts

# One of each block layout: what a change in how blocks are read or written has to pass first.
CORE = ("llama_gqa", "qwen2", "phi3", "gemma2", "opt", "gpt_neox")


def configure(name: str, **overrides: Any):
    """The configuration of one of `NAMES`."""
    stem, settings = _ROWS[name]
    return getattr(transformers, f"{stem.removesuffix('LMHead')}Config")(**(_COMMON | settings | overrides))


def name_families() -> dict[str, str]:
    """Every family that one of the models is of → the one with its name, or the first."""
    found: dict[str, str] = {}
    for name in _ROWS:
        kind = configure(name).model_type
        found[kind] = name if name == kind else found.get(kind, name)
    return {kind: found[kind] for kind in FAMILIES if kind in found}


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A causal LM in evaluation mode, random but the same every time."""
    stem = _ROWS[name][0].removesuffix("Text")
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}Model" if stem.endswith("LMHead") else f"{stem}ForCausalLM")(
        configure(name, **overrides)
    )
    randomise(model, torch.Generator().manual_seed(1 + list(_ROWS).index(name)))
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Attention that is far from uniform, norms that scale every channel differently, biases that matter."""
    scaled = "gemma" in model.config.model_type  # embeddings are multiplied by √width
    offset = (scaled and "gemma4" not in model.config.model_type) or model.config.model_type in (
        "nemotron",
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    )  # norms scale by 1 + weight
    for name, b in sorted(model.named_buffers()):
        if name.endswith("layer_scalar"):
            b.copy_(1 + 0.2 * torch.randn(b.shape, generator=generator))
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name or ".ln_" in name:
            p.copy_(0.3 * noise + (0 if offset or name.endswith("bias") else 1))
        elif name.endswith(("bias", "sinks")):
            p.copy_(0.3 * noise)
        elif p.ndim == 1:  # of an activation or a recurrence
            p.copy_(p + 0.3 * noise)
        elif "embed" in name or "lm_head" in name:
            p.copy_(noise * (1 / p.shape[1] ** 0.5 if scaled else 0.7))
        else:
            gain = 1.6 if any(r in name for r in ("q_proj", "k_proj", "qkv_proj", "query_key_value")) else 1.0
            p.copy_(gain * noise / p.shape[1] ** 0.5)


@contextmanager
def exact_norms() -> Iterator[None]:
    """gemma4's norms in the dtype of what they read, as laws in fp64 need them: transformers' compute in fp32 whatever that is.

    Under a free change of the basis their roundings alone move logits by 4e-6 of the largest; without them 2e-14 is left.
    """

    def forward(self: Gemma4RMSNorm, x: Tensor) -> Tensor:
        normed = self._norm(x)
        return normed * self.weight if self.with_scale else normed

    real = Gemma4RMSNorm.forward
    Gemma4RMSNorm.forward = forward
    try:
        yield
    finally:
        Gemma4RMSNorm.forward = real


@contextmanager
def stopped() -> Iterator[None]:
    """The run in it is interrupted behind its first block."""
    write = Writer.block

    def stop(self: Writer, i: int, *args: Any, **kwargs: Any) -> None:
        if i == 1:
            raise KeyboardInterrupt
        write(self, i, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "block", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def windows(n: int = 12, seq: int = 24, seed: int = 5) -> Tensor:
    """Random token ids (n, seq), the frequent ones far more frequent than the others; id 0, the padding, is absent."""
    draws = torch.rand(n, seq, generator=torch.Generator().manual_seed(seed))
    return (1 + (VOCABULARY - 1) * draws**2).long().clamp(max=VOCABULARY - 1)


def save(model: nn.Module, folder: Path, sharded: bool = False) -> Path:
    """Write the model as a folder, in one file or in many small ones."""
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return folder


def load(folder: Path, **settings: Any) -> nn.Module:
    """planish's `load`, with the warning that belongs to folders whose attention caps its scores, and to no others."""
    config = json.loads((folder / "config.json").read_text())
    capped = config.get("attn_logit_softcapping") and "attn_implementation" not in settings
    eager = "is loaded with eager attention: transformers' sdpa leaves out the soft cap"
    with pytest.warns(UserWarning, match=eager) if capped else nullcontext():
        return planish.folder.load.load(folder, **settings)


def compress(model, *, output, windows, method="flat-llm", settings=None, **more):
    """`planish.compression.compress` on windows (n, seq) that are there already, with options by their names."""
    from planish.compression import Calibration, Destination, Shared
    from planish.compression import compress as run
    from planish.folder.source import open_source
    from planish.methods import find_method
    from planish.request import Request

    shared = Shared(**{n: more.pop(n) for n in ("stream", "cache", "measured") if n in more})
    place = Destination(Path(output), more.pop("overwrite", False))
    progress, text = more.pop("progress", None), Calibration(windows, more.pop("calibration", None) or {})
    request = Request.ask(model="", settings=settings or {}, **({"device": "cpu"} | more))
    chosen = find_method(method, settings or {})
    return run(request, chosen, open_source(model), text, place, shared=shared, progress=progress)


def sample_windows(tokens, n, seq_len, seed=0, sampling="random", begin=None):
    """Calibration windows (n, seq_len) of `tokens`."""
    return cut_windows(tokens, sample_starts(tokens, n, seq_len, seed, sampling, begin), seq_len, begin)
