"""Recurrences and short convolutions as llama.cpp's graphs hold them (see `planish.plan.graphs.Graph.mixer`).

Reference: llama.cpp's conversion of Qwen3-Next and Qwen3.5 (gated delta nets), of Mamba-2's mixers, and of LFM2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NORMS = ("mamba.norm.weight", "mixer.norm.weight", "linear_attn.norm.weight")  # of what a recurrence gives


def describe_mixers(config: Any, mixer: str, attends: Sequence[bool]) -> dict[str, Any]:
    """Metadata; `attends`: of every block, whether it has attention."""
    if mixer == "conv":
        return {"shortconv.l_cache": config.conv_L_cache}
    if mixer == "mamba":
        heads, width, state, groups, kernel = read_mamba(config)
        found = {"inner_size": heads * width, "time_step_rank": heads}
    else:
        heads, state = config.linear_num_value_heads, config.linear_key_head_dim
        groups, kernel = config.linear_num_key_heads, config.linear_conv_kernel_dim
        found = {"inner_size": heads * config.linear_value_head_dim, "time_step_rank": heads}
    found |= {"state_size": state, "group_count": groups, "conv_kernel": kernel}
    own: dict[str, Any] = {f"ssm.{name}": int(n) for name, n in found.items()}
    if mixer != "mamba":  # the interval is what older versions read
        interval = attends.index(True) + 1 if True in attends else len(attends) + 1
        own |= {"attention.recurrent_layers": [not a for a in attends], "full_attention_interval": interval}
    return own


def read_mamba(config: Any) -> tuple[int, int, int, int, int]:
    """(Heads, their width, state, groups, convolution's kernel) of Mamba-2's mixers, by either of two sets of names."""
    if hasattr(config, "mamba_n_heads"):
        names = ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv")
    else:
        names = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
    heads, width, state, groups, kernel = (getattr(config, n) for n in names)
    return heads, width, state, groups, kernel


def convert_mixer(config: Any, mixer: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a block as the graph wants it, by a name that the gguf library knows; what is no mixer's as it is."""
    leaf = name.rpartition(".")[2]
    tensor = tensor.squeeze(1) if tensor.ndim == 3 and "conv" in name else tensor
    if mixer == "delta" and name.startswith("linear_attn."):
        tensor = tile_values(config, name, tensor)
    if leaf == "A_log":
        tensor = -tensor.float().exp()
    if mixer == "mamba" and leaf in ("A_log", "D"):
        tensor = tensor[:, None]
    if mixer == "mamba" and name in NORMS:
        tensor = tensor.unflatten(0, (read_mamba(config)[3], -1))
    if leaf == "dt_bias":
        name = name.removesuffix(leaf) + "dt_proj.bias"
    if name.endswith("in_proj_qkvz.weight"):
        stem = name.removesuffix("qkvz.weight")
        for part, rows in zip(("qkv", "z"), split_grouped(config, tensor), strict=True):
            yield f"{stem}{part}.weight", rows
    else:
        yield name, tensor


def split_grouped(config: Any, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3-Next's rows, which are queries, keys, values and gates of one key head after the other, sorted: (those of queries,
    keys and values, those of gates)."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    q, k, v, z = (t.flatten(0, 1) for t in tensor.unflatten(0, (heads, -1)).split([keys, keys, values, values], 1))
    return torch.cat([q, k, v]), z


def tile_values(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Value heads by turns of the key heads, not key head by key head: h = 0, r, 2 r, …, 1, r + 1, … for r values of a key."""
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    each = config.linear_num_value_heads // keys

    def tile(x: Tensor, dim: int, width: int) -> Tensor:
        return x.unflatten(dim, (keys, each, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)

    part = name.split(".")[1]
    if part in ("in_proj_qkv", "conv1d"):
        before = 2 * keys * config.linear_key_head_dim
        return torch.cat([tensor[:before], tile(tensor[before:], 0, width)])
    if part == "out_proj":
        return tile(tensor, 1, width)
    return tile(tensor, 0, width if part == "in_proj_z" else 1) if part != "norm" else tensor


def weigh_falcon(config: Any, name: str, tensor: Tensor) -> Tensor:
    """A linear of Falcon-H1 with the factors that the model multiplies its inputs and outputs by."""
    gate, down = config.mlp_multipliers
    inward, mixed = config.attention_in_multiplier, config.ssm_in_multiplier
    factors = {
        "gate_proj": gate, "down_proj": down, "q_proj": inward, "v_proj": inward, "k_proj": inward * config.key_multiplier,
        "o_proj": config.attention_out_multiplier, "out_proj": config.ssm_out_multiplier, "in_proj": mixed,
        "lm_head": config.lm_head_multiplier, "embed_tokens": config.embedding_multiplier,
    }  # fmt: skip
    owner = name.split(".")[-2]
    if owner not in factors:
        return tensor
    tensor = tensor.float() * factors[owner]
    if owner == "in_proj":
        heads, _, state, groups, _ = read_mamba(config)
        sizes = [config.mamba_d_ssm] * 2 + [groups * state] * 2 + [heads]
        each = torch.tensor(config.ssm_multipliers).repeat_interleave(torch.tensor(sizes))
        tensor *= each.view(-1, *[1] * (tensor.ndim - 1))
    return tensor
