"""Tiny random models around a language model: vision towers of two or three blocks, and text towers like `tiny`'s.

`build(name)` gives one of `NAMES`, `HYBRIDS` or `STOCK` in fp32, the same every time; `picture(name)` what its forward takes
for a text with an image in it; `rename` writes its checkpoint with the names of the modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny

IMAGE, START, END = 90, 92, 93  # token ids
_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": tiny.POSITIONS, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 20}
_SIGLIP = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
_QWEN = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 2}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": END}


def _mrope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more}}


_MISTRAL = {
    "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 8}, "image_token_index": IMAGE,
    "tie_word_embeddings": False,
}  # fmt: skip
_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": {
                **_TEXT, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": tiny.WINDOW,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": {**_SIGLIP, "vision_use_head": False}, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
            "boi_token_index": START, "eoi_token_index": END,
        },
    ),
    "mistral3": ("Mistral3", {"text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8, "sliding_window": None}} | _MISTRAL),
    "mistral3_ministral3": (
        "Mistral3",
        {
            "text_config": {
                **_TEXT, "model_type": "ministral3", "head_dim": 12, "sliding_window": None,
                **tiny._rope("yarn", factor=8.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.5),
            },
        } | _MISTRAL,
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**_TEXT, **_mrope()},
            "vision_config": {**_QWEN, "window_size": 8, "fullatt_block_indexes": [1]}, **_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**_TEXT, "head_dim": 8, **_mrope(mrope_interleaved=True)},
            "vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, **_TOKENS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {**_TEXT, **tiny._DELTA},
            "vision_config": {**_QWEN, "num_position_embeddings": 16}, **_TOKENS,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": {
                **_TEXT, **tiny._DELTA, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 8,
                "num_experts_per_tok": 2,
            },
            "vision_config": {**_QWEN, "num_position_embeddings": 16}, **_TOKENS,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": tiny._COMMON | tiny._ROWS["llama4"][1],
            "vision_config": {
                **_VISION, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
                "patch_size": 4, "projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24,
            }, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "text_config": tiny._COMMON | tiny._ROWS["gemma4"][1],
            "vision_config": {
                **_VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 16,
            }, "image_token_id": IMAGE, "video_token_id": 91, "audio_token_id": 94, "boi_token_id": START, "eoi_token_id": END,
        },
    ),
}  # fmt: skip
HYBRIDS = ("qwen3_5", "qwen3_5_moe", "llama4")  # with mixers in place of some attentions, or with experts: a few laws
STOCK = ("gemma4",)  # whose attention stays the stock one: tests/test_gemma4.py
NAMES = tuple(n for n in _ROWS if n not in HYBRIDS + STOCK)


def build(name: str, **overrides: Any) -> nn.Module:
    """In evaluation mode, random but the same every time."""
    stem, settings = _ROWS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**json.loads(json.dumps(settings)) | overrides)
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config)
    tiny.randomise(model, torch.Generator().manual_seed(1 + list(_ROWS).index(name)))
    return model.eval()


def picture(name: str, seed: int = 3) -> dict[str, Tensor]:
    """Token ids (2, 14), four of each row the image's, and two images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (2, 14), generator=generator)
    ids[:, 3:9] = torch.tensor([START, *[IMAGE] * 4, END])
    kinds = (ids == IMAGE).long()
    if name.startswith("qwen"):
        pixels = torch.randn(32, 3 * 2 * 2 * 2, generator=generator)
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": kinds,
        }
    if name == "gemma4":  # patches and where they are
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1).expand(2, -1, -1)
        patches = torch.rand(2, 16, 3 * 2 * 2, generator=generator)
        return {"input_ids": ids, "pixel_values": patches, "image_position_ids": places, "mm_token_type_ids": kinds}
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if name == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": kinds}
    if name == "llama4":
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]] * 2)}


@torch.no_grad()
def see(model: nn.Module, name: str) -> Tensor:
    """Logits of a text with an image in it."""
    return model(**picture(name), use_cache=False).logits


def rename(model: nn.Module, folder: Path) -> Path:
    """Write the model, its tensors called as its modules are: what transformers 4.52 and later wrote, and what it reads."""
    tiny.save(model, folder)
    dropped = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in dropped}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All stored tensors, by their stored names."""
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}
