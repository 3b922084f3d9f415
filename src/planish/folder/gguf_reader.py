"""A GGUF model under the names, shapes and layouts of its transformers checkpoint, read tensor by tensor.

What conversion to GGUF changes is changed back: llama's query and key rows (rotated channels are neighbours there, halves
here), gemma's norms (stored as 1 + weight), gpt2's transposed linears, gpt-neox's fused rows (q, k, v one after the other
there, per head here).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from planish.errors import InputError
from planish.folder.gguf_config import SPARSE, read_config
from planish.folder.gguf_file import GGUF, SPLIT, list_parts
from planish.folder.safetensors import Entry
from planish.modelling.families import FAMILIES

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_MOE = _LLAMA | {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # experts, in the order of `ExpertsRow.names`
_PHI = _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GPT2_OUTER = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}  # fmt: skip
_NEOX_OUTER = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_NEOX = {
    "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_MPT_OUTER = {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"}
_MPT = {
    "attn_norm": "norm_1", "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj", "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj",
}  # fmt: skip
NAMES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {  # architecture → blocks, names outside, names in a block
    "llama": ("model.layers", _OUTER, _MOE), **dict.fromkeys(SPARSE, ("model.layers", _OUTER, _MOE)),
    "arcee": ("model.layers", _OUTER, _LLAMA),
    "qwen2": ("model.layers", _OUTER, _LLAMA),
    "qwen3": ("model.layers", _OUTER, _LLAMA), "gemma2": ("model.layers", _OUTER, _GEMMA),
    "gemma3": ("model.layers", _OUTER, _GEMMA), "phi3": ("model.layers", _OUTER, _PHI),
    "gpt2": ("transformer.h", _GPT2_OUTER, _GPT2), "gptneox": ("gpt_neox.layers", _NEOX_OUTER, _NEOX),
    "mpt": ("transformer.blocks", _MPT_OUTER, _MPT),
}  # fmt: skip
ELSEWHERE = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # in the configuration
IGNORED = ("attn_rot_embd", "attn.bias")  # buffers that early converters stored


class Origin(NamedTuple):
    """Where a tensor comes from: its name in the file and what turns it back."""

    name: str
    turn: str = ""
    part: int | None = None  # of a stack


class GGUFWeights:
    """The tensors of a GGUF model (see `planish.folder.stored.Weights`), and its configuration."""

    def __init__(self, path: Path):
        self.file = GGUF(path)
        self.path = self.file.path
        self.config = read_config(self.file)
        self.architecture = str(self.file.metadata["general.architecture"])
        self.sparse = FAMILIES[self.config.model_type].experts
        self.origins = self.match_names()
        self.entries = {name: self.describe(name) for name in self.origins}

    @property
    def paths(self) -> list[Path]:
        return self.file.paths

    @property
    def names(self) -> Collection[str]:
        return self.origins.keys()

    def match_names(self) -> dict[str, Origin]:
        """Name in the transformers checkpoint → where it is."""
        blocks, outside, inside = NAMES[self.architecture]
        found: dict[str, Origin] = {}
        for name in self.file.tensors:
            stem, _, leaf = name.rpartition(".")
            if name in ELSEWHERE or stem.endswith(IGNORED[0]) or name.endswith(IGNORED[1]):
                continue
            prefix, _, role = stem.partition(".")[2].partition(".") if stem.startswith("blk.") else ("", "", stem)
            if role in STACKS and leaf == "weight" and self.sparse is not None:
                found |= self.split_stack(name, f"{blocks}.{prefix}", role)
                continue
            known = (inside if prefix else outside).get(role)
            if known is None or leaf not in ("weight", "bias"):
                raise InputError(f"tensor {name} in {self.path} is none that a {self.architecture} has")
            stored = f"{blocks}.{prefix}.{known}.{leaf}" if prefix else f"{known}.{leaf}"
            found[stored] = Origin(name, pick_turn(self.architecture, role, leaf))
        return found | self.fill_biases(found)

    def split_stack(self, name: str, place: str, role: str) -> dict[str, Origin]:
        """Every expert's linear of a stack."""
        row, shape = self.sparse, self.file.tensors[name].shape
        assert row is not None
        if len(shape) != 3:
            raise InputError(f"tensor {name} in {self.path} has shape {shape}, expected (experts, rows, columns)")
        linear = row.names[STACKS.index(role)]
        return {f"{place}.{row.path}.{n}.{linear}.weight": Origin(name, "", n) for n in range(shape[0])}

    def fill_biases(self, found: dict[str, Origin]) -> dict[str, Origin]:
        """Llamas have biases on all linears of a submodule or on none; GGUF files may hold some."""
        if self.architecture not in ("llama", "arcee", "qwen3"):
            return {}
        roles = [f"self_attn.{r}_proj" for r in "qkvo"] if getattr(self.config, "attention_bias", False) else []
        if getattr(self.config, "mlp_bias", False):
            roles += [f"mlp.{r}_proj" for r in ("gate", "up", "down")]
        added = {}
        for i in range(self.config.num_hidden_layers):
            for role in roles:
                stem = f"model.layers.{i}.{role}"
                if f"{stem}.bias" not in found and f"{stem}.weight" in found:
                    added[f"{stem}.bias"] = Origin(found[f"{stem}.weight"].name, "zeros")
        return added

    def describe(self, name: str) -> Entry:
        origin = self.origins[name]
        info = self.file.tensors[origin.name]
        shape = {"transpose": info.shape[::-1], "zeros": info.shape[:1]}.get(origin.turn, info.shape)
        if origin.part is not None:
            size = info.size // shape[0]
            return Entry(self.file.dtype, shape[1:], info.start + origin.part * size, size)
        return Entry(self.file.dtype, shape, info.start, info.size)

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"tensor {name} is missing in {self.path}: the file is incomplete")
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        entry, origin = self.entry(name), self.origins[name]
        if origin.turn == "zeros":
            return torch.zeros(entry.shape, dtype=entry.dtype)
        if origin.turn == "minus one":  # before it is rounded
            return (self.file.read(origin.name, torch.float32) - 1).to(entry.dtype)
        return turn_back(self.file.read(origin.name, part=origin.part), origin.turn, self.config)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        return self.read(name).flatten(0, -2)[first : first + count].clone()

    def expect(self, names: Iterable[str]) -> None:
        """Dequantising takes longer than reading: nothing is read ahead."""

    def origin(self) -> dict[str, Any]:
        """What planish.json says about where the dense model came from."""
        return {
            "format": "gguf", "file": self.path.name, "architecture": self.architecture,
            "tensor_types": self.file.count_types(),
            "note": "the rounding of these types is part of the dense model that everything here is compared with",
        }  # fmt: skip


def pick_turn(architecture: str, role: str, leaf: str) -> str:
    """What undoes the conversion of one tensor."""
    if architecture in ("llama", "arcee") and role in ("attn_q", "attn_k"):
        return "halves q" if role == "attn_q" else "halves k"
    if architecture.startswith("gemma") and role.endswith("norm"):
        return "minus one"
    if architecture == "gpt2" and leaf == "weight" and role in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        return "transpose"
    if architecture == "gptneox" and role == "attn_qkv":
        return "per head"
    return ""


def turn_back(t: Tensor, turn: str, config: Any) -> Tensor:
    """A stored tensor in transformers' layout."""
    if turn.startswith("halves"):  # rows 2j, 2j + 1 of each head → j, j + d/2
        heads = config.num_attention_heads if turn.endswith("q") else config.num_key_value_heads
        return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    if turn == "per head":  # (q k v, heads, d) → (heads, q k v, d)
        return t.unflatten(0, (3, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    return t.T.contiguous() if turn == "transpose" else t


@lru_cache(maxsize=4)
def _open(path: Path, stamps: tuple[tuple[int, int], ...]) -> GGUFWeights:
    return GGUFWeights(path)


def open_gguf(path: Path) -> GGUFWeights:
    """The model that a file is, or is a part of; headers are read once as long as the files stay as they are."""
    parts = list_parts(path)
    try:
        status = [p.stat() for p in parts]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return _open(parts[0], tuple((s.st_size, s.st_mtime_ns) for s in status))


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and not path.is_dir()


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the one model of a folder without other weights; None where it is neither."""
    if not path.is_dir():
        return path if is_gguf(path) else None
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(p for p in path.glob("*.gguf") if not p.name.startswith("mmproj"))
    models = [p for p in files if not (part := SPLIT.match(p.name)) or int(part["n"]) == 1] or files[:1]
    if len(models) > 1:
        names = ", ".join(p.name for p in models[:4])
        raise InputError(
            f"{path} holds {len(models)} GGUF models ({names}{', …' * (len(models) > 4)}); name one of the files"
        )
    return models[0] if models else None
