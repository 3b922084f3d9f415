"""GGUF metadata as a transformers configuration.

| GGUF architecture | transformers | particular |
|---|---|---|
| llama, arcee | llama, arcee | `rope_freqs.weight`: llama3's scaling, or any other factors (as longrope) |
| qwen2, qwen3 | qwen2, qwen3 | |
| gemma2, gemma3 | gemma2, gemma3_text | windows, soft caps; the score scale is 1/√head, or 1/√(hidden/heads) in the 27B models |
| phi3 | phi3 | `rope_factors_short/long.weight`: longrope |
| gpt2, gptneox, mpt | gpt2, gpt_neox, mpt | |

What would change the result and has no place in the configuration is refused (`REFUSED`); a file that stores no
`output.weight` uses its embedding as the head.

Reference: llama.cpp's convert_hf_to_gguf.py (what is written) and its model files (what absent values mean).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from planish.errors import InputError
from planish.folder.gguf_file import GGUF
from planish.folder.recognise import refuse_deep
from planish.modelling.families import FAMILIES as MODELS

FAMILIES = {  # general.architecture → model_type
    "llama": "llama", "arcee": "arcee", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3",
    "gpt2": "gpt2", "gptneox": "gpt_neox", "mpt": "mpt",
    "qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe", "olmoe": "olmoe",
}  # fmt: skip
WRITTEN = ("deci", "mimo2")  # architectures that are only written
SPARSE = {"qwen3moe": True, "qwen2moe": False, "olmoe": False}  # do gates of the chosen experts add up to 1?
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # blocks of the 27B models, whose score scale follows hidden size / heads
REFUSED = {  # metadata key → values that change nothing
    "expert_count": (0,), "attention.causal": (True,), "attention.scale": (0.0,), "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "attention.temperature_scale": (0.0, 1.0),
    "attention.layer_norm_rms_epsilon_swa": (), "rope.scaling.attn_factor": (0.0, 1.0), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "attention.clamp_kqv": (0.0,),
}  # fmt: skip
ALLOWED = {  # … by architectures that have a place for them
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"}, "gemma3": {"final_logit_softcapping"},
    "phi3": {"rope.scaling.attn_factor"}, "mpt": {"attention.clamp_kqv"},
    "llama": {"expert_count"}, **{name: {"expert_count"} for name in SPARSE},
}  # fmt: skip


class Metadata:
    """Typed access to a file's metadata; keys without the architecture's prefix."""

    def __init__(self, file: GGUF):
        self.file, self.values = file, file.metadata
        self.architecture = str(self.values.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.file.path} has no {self.architecture}.{key} in its metadata")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number; a list of one per block must hold the same number everywhere."""
        value = self.need(key) if default is None else self.get(key, default)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) > 1:
            raise InputError(
                f"{self.file.path}: {self.architecture}.{key} differs from block to block {value[:8]}: "
                "only models with equal blocks are read"
            )
        found = values.pop() if values else None
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise InputError(
                f"{self.file.path}: {self.architecture}.{key} is {found!r}, expected a positive whole number"
            )
        return found


def read_config(file: GGUF) -> Any:
    """The configuration of the model in a GGUF file; InputError for what planish does not read."""
    meta = Metadata(file)
    check_known(meta)
    build = {"gpt2": set_gpt2, "gptneox": set_neox, "mpt": set_mpt}.get(meta.architecture, set_llama)
    values = build(meta) | {
        "vocab_size": shape_of(file, "token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": file.dtype,
    }
    for name in ("bos", "eos", "pad"):
        key = "tokenizer.ggml.padding_token_id" if name == "pad" else f"tokenizer.ggml.{name}_token_id"
        found = file.metadata.get(key)
        values[f"{name}_token_id"] = found if isinstance(found, int) and found < values["vocab_size"] else None
    kind = find_kind(file)
    try:
        return CONFIG_MAPPING[kind](**values)
    except Exception as error:  # whatever values of a damaged header make the configuration raise
        raise InputError(
            f"{file.path}: its metadata is no valid {kind}: {' '.join(str(error).split())[:300]}"
        ) from None


def find_kind(file: GGUF) -> str:
    """The model_type of transformers; a llama with experts is a mixtral."""
    architecture = str(file.metadata["general.architecture"])
    return "mixtral" if architecture == "llama" and file.metadata.get("llama.expert_count") else FAMILIES[architecture]


def check_known(meta: Metadata) -> None:
    file, architecture = meta.file, meta.architecture
    if not architecture:
        raise InputError(f"{file.path} has no general.architecture in its metadata: not a language model")
    if architecture not in FAMILIES:
        own = " (if planish wrote it, start from the folder that was exported)" if architecture in WRITTEN else ""
        raise InputError(
            f"{file.path} is a GGUF file of the architecture {architecture!r}{own}; read are {', '.join(sorted(FAMILIES))}"
        )
    refuse_deep({"num_hidden_layers": meta.get("block_count")}, file.path)
    for key, harmless in REFUSED.items():
        value = meta.get(key)
        if value is not None and value not in harmless and key not in ALLOWED.get(architecture, ()):
            raise InputError(f"{file.path}: {architecture}.{key} is {value!r}, which planish does not read")


def shape_of(file: GGUF, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise InputError(f"tensor {name} is missing in {file.path}: the file is incomplete")
    return file.tensors[name].shape


def set_sizes(meta: Metadata) -> dict[str, Any]:
    heads = meta.number("attention.head_count")
    hidden = meta.number("embedding_length")
    head = meta.number("attention.key_length", hidden // heads)
    if meta.number("attention.value_length", head) != head:
        raise InputError(f"{meta.file.path}: keys and values of different sizes are not read")
    return {
        "hidden_size": hidden, "num_hidden_layers": meta.number("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", heads), "head_dim": head,
        "intermediate_size": meta.number("feed_forward_length"), "max_position_embeddings": meta.number("context_length"),
    }  # fmt: skip


def set_llama(meta: Metadata) -> dict[str, Any]:
    """llama, arcee, qwen2, qwen3, gemma2, gemma3 and phi3: RMS norms, gated MLP, rotary positions."""
    values = set_sizes(meta) | {"rms_norm_eps": clean(meta.need("attention.layer_norm_rms_epsilon"))}
    head, hidden, heads = values["head_dim"], values["hidden_size"], values["num_attention_heads"]
    if meta.architecture in ("qwen2", "phi3", "qwen2moe", "olmoe"):
        if head * heads != hidden:
            raise InputError(
                f"{meta.file.path}: {heads} heads of {head} in a {meta.architecture} of hidden size {hidden}"
            )
        del values["head_dim"]
    if meta.architecture in ("llama", "arcee", "qwen3"):
        values["attention_bias"] = any(f"blk.0.attn_{n}.bias" in meta.file.tensors for n in ("q", "k", "v", "output"))
    if meta.architecture in ("llama", "arcee"):
        values["mlp_bias"] = any(f"blk.0.ffn_{n}.bias" in meta.file.tensors for n in ("gate", "up", "down"))
    values["rope_parameters"] = read_rope(meta, head, values["max_position_embeddings"])
    if meta.architecture == "phi3":
        values["original_max_position_embeddings"] = meta.get(
            "rope.scaling.original_context_length", values["max_position_embeddings"]
        )
        values["sliding_window"] = meta.get("attention.sliding_window") or None
    if meta.architecture.startswith("gemma"):
        values |= set_gemma(meta, values)
    return values | (set_experts(meta) if meta.get("expert_count") else {})


def set_experts(meta: Metadata) -> dict[str, Any]:
    """Numbers of experts, and their width; of olmoe and mixtral it is the only one."""
    kind, width = find_kind(meta.file), shape_of(meta.file, "blk.0.ffn_down_exps.weight")[-1]
    row = MODELS[kind].experts
    assert row is not None
    found: dict[str, Any] = {
        row.count: meta.number("expert_count"), row.top: meta.number("expert_used_count"), row.width: width,
    }  # fmt: skip
    if meta.architecture in SPARSE:
        found["norm_topk_prob"] = SPARSE[meta.architecture]
    if "blk.0.ffn_up_shexp.weight" in meta.file.tensors:
        found["shared_expert_intermediate_size"] = shape_of(meta.file, "blk.0.ffn_up_shexp.weight")[0]
    return found


def set_gemma(meta: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    blocks, hidden, heads = (values[n] for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    largest = LARGEST_GEMMA[meta.architecture] == blocks
    period = 2 if meta.architecture == "gemma2" else 6
    pattern = meta.get("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [bool((i + 1) % int(pattern)) for i in range(blocks)]
    found = {
        "sliding_window": meta.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern[:blocks]],
        "query_pre_attn_scalar": hidden // heads if largest else values["head_dim"],
        "final_logit_softcapping": clean(meta.get("final_logit_softcapping")) or None,
        "attn_logit_softcapping": clean(meta.get("attn_logit_softcapping")) or None,
    }
    if meta.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": clean(meta.get("rope.freq_base_swa", 10000.0))}
        found["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    return found


def set_gpt2(meta: Metadata) -> dict[str, Any]:
    return {
        "n_embd": meta.number("embedding_length"), "n_layer": meta.number("block_count"),
        "n_head": meta.number("attention.head_count"), "n_inner": meta.number("feed_forward_length"),
        "n_positions": meta.number("context_length"),
        "layer_norm_epsilon": clean(meta.need("attention.layer_norm_epsilon")),
    }  # fmt: skip


def set_neox(meta: Metadata) -> dict[str, Any]:
    values = set_sizes(meta)
    head = values.pop("head_dim")
    del values["num_key_value_heads"]
    return values | {
        "layer_norm_eps": clean(meta.need("attention.layer_norm_epsilon")),
        "use_parallel_residual": bool(meta.get("use_parallel_residual", True)),
        "rope_parameters": read_rope(meta, head, values["max_position_embeddings"]),
    }


def set_mpt(meta: Metadata) -> dict[str, Any]:
    hidden, width = meta.number("embedding_length"), meta.number("feed_forward_length")
    if width % hidden:
        raise InputError(f"{meta.file.path}: an mpt MLP of width {width}, no multiple of {hidden}, is not read")
    attention = {"alibi": True, "alibi_bias_max": int(meta.get("attention.max_alibi_bias", 8.0))}
    return {
        "d_model": hidden, "n_heads": meta.number("attention.head_count"), "n_layers": meta.number("block_count"),
        "expansion_ratio": width // hidden, "max_seq_len": meta.number("context_length"),
        "layer_norm_epsilon": clean(meta.need("attention.layer_norm_epsilon")),
        "attn_config": attention | {"clip_qkv": clean(meta.get("attention.clamp_kqv")) or None},
    }  # fmt: skip


def read_rope(meta: Metadata, head: int, context: int) -> dict[str, Any]:
    """rope_parameters of transformers: base, rotated share and scaling."""
    rotated = meta.number("rope.dimension_count", head)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": clean(meta.get("rope.freq_base", 10000.0))}
    kind = meta.get("rope.scaling.type", "none")
    factor = meta.get("rope.scaling.factor") or meta.get("rope.scale_linear") or 0.0
    original = meta.get("rope.scaling.original_context_length")
    if kind in ("linear", "none") and factor not in (0.0, 1.0):  # llama.cpp takes a factor without a type for linear
        found |= {"rope_type": "linear", "factor": clean(factor)}
    elif kind == "yarn":
        found |= {"rope_type": "yarn", "factor": clean(factor), "original_max_position_embeddings": original or context}
        for name in ("beta_fast", "beta_slow"):
            if (value := meta.get(f"rope.scaling.yarn_{name}")) is not None:
                found[name] = clean(value)
    elif kind not in ("linear", "none", "longrope"):
        raise InputError(f"{meta.file.path}: rotary scaling of type {kind!r} is not read")
    tensors = meta.file.tensors
    if "rope_factors_short.weight" in tensors:
        found |= set_longrope(*(read_factors(meta.file, f"rope_factors_{n}.weight") for n in ("short", "long")))
        found |= {"original_max_position_embeddings": original or context, "factor": context / (original or context)}
        if scale := meta.get("rope.scaling.attn_factor"):
            found["attention_factor"] = clean(scale)
    if "rope_freqs.weight" in tensors:
        if meta.architecture != "llama":
            raise InputError(f"{meta.file.path}: rope_freqs.weight in a {meta.architecture} is not read")
        factors = read_factors(meta.file, "rope_freqs.weight")
        found |= fit_llama3(factors, found["rope_theta"], head, original) or set_longrope(factors, factors) | {
            "original_max_position_embeddings": context, "factor": 1.0, "attention_factor": 1.0,
        }  # fmt: skip
    if rotated != head and meta.architecture not in ("phi3", "gptneox"):
        raise InputError(
            f"{meta.file.path}: a {meta.architecture} that rotates {rotated} of {head} channels is not read"
        )
    return found | ({"partial_rotary_factor": rotated / head} if rotated != head else {})


def read_factors(file: GGUF, name: str) -> Tensor:
    shape_of(file, name)
    return file.read(name, torch.float32).double().flatten()


def set_longrope(short: Tensor, long: Tensor) -> dict[str, Any]:
    return {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}


def fit_llama3(factors: Tensor, base: float, head: int, original: int | None) -> dict[str, Any] | None:
    """Parameters of llama3's scaling that give these divisors of the rotary frequencies (head / 2,), or None.

    1/divisor = (1 − s)/factor + s with s = clamp(a/λ − b, 0, 1), λ the wave length, a = original/(high − low),
    b = low/(high − low): a line through the divisors between 1 and `factor`. a and b leave one of the three numbers free:
    `original` if it is known, else low = 1, as in every model that was released.

    Reference: transformers' `_compute_llama3_parameters`.
    """
    factor = float(factors[-1])
    if len(factors) != head // 2 or not 1 < factor < 1e6 or float(factors[0]) != 1:
        return None
    inverse = base ** (-torch.arange(0, head, 2).double() / head) / (2 * math.pi)  # 1 / wave length
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if int(between.sum()) < 2:
        return None
    x, y = inverse[between], share[between]
    a = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    b = float(a * x.mean() - y.mean())
    again = (a * inverse - b).clamp(0, 1)
    if not torch.allclose(again, share, atol=1e-4):
        return None
    length = original or round(a / b)
    low, high = length * b / a, length * (1 + b) / a
    return {
        "rope_type": "llama3", "factor": float(f"{factor:.5g}"), "low_freq_factor": round(low, 4),
        "high_freq_factor": round(high, 4), "original_max_position_embeddings": length,
    }  # fmt: skip


def clean(value: Any) -> Any:
    """A number that was stored in fp32 as the shortest decimal that gives it: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
