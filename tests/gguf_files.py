"""GGUF files of tiny transformers models, written with the gguf library the naive way: row by row, as converters define it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "llama", "arcee": "arcee", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
    "gpt2": "gpt2", "gpt_neox": "gptneox", "mpt": "mpt",
}  # fmt: skip
INSIDE = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "norm_1": "attn_norm", "norm_2": "ffn_norm",
    "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "transformer.norm_f": "output_norm",
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
}  # fmt: skip


def neighbours(w: Tensor, heads: int) -> Tensor:
    """Channels j and j + d/2 of every head become 2j and 2j + 1."""
    out, d = torch.empty_like(w), len(w) // heads
    for h in range(heads):
        for j in range(d // 2):
            out[h * d + 2 * j] = w[h * d + j]
            out[h * d + 2 * j + 1] = w[h * d + j + d // 2]
    return out


def one_role_after_the_other(w: Tensor, heads: int) -> Tensor:
    """Per head q, k, v → all q, all k, all v."""
    d = len(w) // heads // 3
    return torch.cat([w[(3 * h + role) * d : (3 * h + role + 1) * d] for role in range(3) for h in range(heads)])


def convert(model: Any) -> dict[str, Tensor]:
    """GGUF names and numbers."""
    kind, config, found = model.config.model_type, model.config, {}
    for name, p in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        parts = name.split(".")
        numbered = next((i for i, x in enumerate(parts) if x.isdigit()), None)
        if numbered is None:
            new = f"{OUTSIDE[stem]}.{leaf}"
        else:
            role = ".".join(parts[numbered + 1 : -1])
            known = INSIDE | (GEMMA if "gemma" in kind else {})
            new = f"blk.{parts[numbered]}.{known[role]}.{leaf}"
            if kind in ("llama", "arcee") and role in ("self_attn.q_proj", "self_attn.k_proj"):
                p = neighbours(p, config.num_attention_heads if "q_proj" in role else config.num_key_value_heads)
            if kind == "gpt2" and leaf == "weight" and not role.startswith("ln"):
                p = p.T
            if role == "attention.query_key_value":
                p = one_role_after_the_other(p, config.num_attention_heads)
        if "gemma" in kind and "norm" in new:
            p = p.float() + 1
        found[new] = p.detach().float().contiguous()
    return found


def describe(writer: gguf.GGUFWriter, model: Any) -> None:
    """The metadata that converters write."""
    c, a = model.config, writer.arch
    width = {"gpt2": "n_inner", "mpt": None}.get(a, "intermediate_size")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(getattr(c, width) if width else 4 * c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    for name in ("bos", "eos", "pad"):
        if (found := getattr(c, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(found)
    if a in ("gpt2", "gptneox", "mpt"):
        writer.add_layer_norm_eps(getattr(c, "layer_norm_epsilon", None) or c.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_head_count_kv(c.num_key_value_heads)
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        writer.add_key_length(head)
        writer.add_value_length(head)
    if a == "mpt":
        writer.add_max_alibi_bias(float(c.attn_config.alibi_bias_max))
    elif a == "gptneox":
        rope = c.rope_parameters
        writer.add_rope_dimension_count(int(c.hidden_size // c.num_attention_heads * rope["partial_rotary_factor"]))
        writer.add_parallel_residual(c.use_parallel_residual)
    elif a != "gpt2":
        describe_rope(writer, c)
    if a == "phi3" and c.sliding_window:
        writer.add_sliding_window(c.sliding_window)
    if a.startswith("gemma"):
        writer.add_sliding_window(c.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in c.layer_types])
    if a == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)


def describe_rope(writer: gguf.GGUFWriter, c: Any) -> None:
    rope = c.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(model: Any) -> dict[str, Tensor]:
    """llama3's divisors of the rotary frequencies, from the model's own table."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    used = model.model.rotary_emb.inv_freq.double()
    plain = rope["rope_theta"] ** (-torch.arange(len(used)).double() / len(used))
    return {"rope_freqs.weight": (plain / used).float()}


def write(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    parts: int = 1,
    vocabulary: Any = None,
    without: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write `model` with matrices of `kind`; returns the file (the first of `parts`). `vocabulary(writer)` adds a tokenizer.
    `without`: tensors to leave out. `extra`: metadata, `tensors`: tensors that are added or replace what is written otherwise."""
    architecture = ARCHITECTURES[model.config.model_type]
    tensors = rope_factors(model) | convert(model) | (tensors or {})
    per_file = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, architecture, endianess=endian, split_max_tensors=per_file)
    describe(writer, model)
    (vocabulary or (lambda w: w.add_tokenizer_model("none")))(writer)
    for key, value in (extra or {}).items():
        fields = writer.kv_data[0]
        fields.pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, guess_type(value))
    for name, t in tensors.items():
        if name in without:
            continue
        data, matrix = t.numpy(), t.ndim > 1
        if not matrix or kind == "F32":
            writer.add_tensor(name, data)
        elif kind == "F16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            wanted = gguf.GGMLQuantizationType[kind]
            fits = data.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
            wanted = wanted if fits else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def guess_type(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return gguf.GGUFValueType[kinds[type(value)]]
