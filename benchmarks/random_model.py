"""Random-weight LLaMA and Qwen3-MoE folders of any size, written one block at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig


def write_model(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **sizes: int) -> int:
    """Write a LLaMA of these config sizes, or with `num_experts` a Qwen3-MoE; returns its bytes on disk. Weights ~ N(0, 1/in),
    norms 1.

    `dtype` float8_e4m3fn: the blocks' linears in FP8 with a scale per 128 × 128 block, everything else in bf16.
    """
    fp8, dtype = dtype == torch.float8_e4m3fn, torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    kind = Qwen3MoeConfig if "num_experts" in sizes else LlamaConfig
    config = kind(**sizes, max_position_embeddings=4096, tie_word_embeddings=False)
    config.architectures, config.dtype = [kind.__name__.replace("Config", "ForCausalLM")], dtype
    if fp8:
        config.quantization_config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    d, m, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    linears = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
    }  # fmt: skip
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    owners = ["mlp"]
    if experts := sizes.get("num_experts", 0):
        linears["mlp.gate"], m = (experts, d), config.moe_intermediate_size
        owners = [f"mlp.experts.{j}" for j in range(experts)]
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    for owner in owners:
        linears |= {f"{owner}.gate_proj": (m, d), f"{owner}.up_proj": (m, d), f"{owner}.down_proj": (d, m)}
    weight_map: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{n + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(d, dtype=dtype)
    outside = {
        "model.embed_tokens.weight": matrix(config.vocab_size, d),
        "lm_head.weight": matrix(config.vocab_size, d),
    }
    shard(0, outside | {"model.norm.weight": ones.clone()})
    del outside
    for i in range(n):
        block = {f"{name}.weight": matrix(*size) for name, size in linears.items()}
        if fp8:
            block = {n: t for name, weight in block.items() for n, t in quantise(name, weight).items()}
        block |= {f"{name}.weight": torch.ones(size, dtype=dtype) for name, size in norms.items()}
        shard(i + 1, {f"model.layers.{i}.{name}": t for name, t in block.items()})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight's E4M3 codes, and the scale of every block of 128 × 128 (the last ones may be smaller)."""
    rows, columns = (-(-n // 128) for n in weight.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = padded.view(rows, 128, columns, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {name: codes.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scale}
