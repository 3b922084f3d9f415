"""Checkpoints that the formats' own libraries write, read back: the numbers are the libraries' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import planish
import tiny
from packed_files import configure, write
from planish.folder.source import open_source

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def list_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def compare(folder: Path, expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Weights by name, and a compressed folder that transformers loads."""
    source = open_source(folder)
    for name, weight in expected.items():
        found = source.weight(name)
        assert found.shape == weight.shape and torch.allclose(found.float(), weight.float(), rtol=tolerance, atol=0), (
            name
        )
    options = {
        "keep": 0.8,
        "method": "svd",
        "n_samples": 8,
        "seq_len": 16,
        "calibration": tiny.windows(8, 16).flatten(),
    }
    planish.compress(folder, output=folder.with_name("out"), **options)
    AutoModelForCausalLM.from_pretrained(folder.with_name("out"))
    assert "quantization_config" not in json.loads((folder.with_name("out") / "config.json").read_text())


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_fp8_of_transformers(scales, tmp_path):
    """Its operation quantises the linears of a qwen3; its own dequantisation gives the same weights."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(16, 16), scale_fmt=scales, modules_to_not_convert=["lm_head"])
    quantiser = type("Quantiser", (), {"quantization_config": config})()
    model = tiny.build("qwen3", torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path / "m")
    tensors, expected = load_file(tmp_path / "m" / "model.safetensors"), {}
    for name in list_linears(model):
        key = f"{name}.weight"
        made = Fp8Quantize(quantiser).convert({key: tensors[key]})
        tensors |= made
        expected[key] = Fp8Dequantize(quantiser)._dequantize_one(made[key], made[f"{key}_scale_inv"], torch.bfloat16)
        assert (expected[key] - model.get_parameter(key)).abs().max() < 0.1 * model.get_parameter(key).abs().max()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "m", quantization_config=config.to_dict())
    compare(tmp_path / "m", expected)


@pytest.mark.slow
def test_fp8_loaded_by_transformers(tmp_path):
    """Where it dequantises while loading; needs accelerate."""
    pytest.importorskip("accelerate")
    write(tiny.build("llama_gqa", torch.bfloat16, **SIZES), "fp8 blocks of 128", tmp_path / "m")
    configure(
        tmp_path / "m", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "dequantize": True}
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    compare(tmp_path / "m", {f"{n}.weight": m.weight for n, m in list_linears(model).items()})


FP8 = {"num_bits": 8, "type": "float"}
SCHEMES = {  # format, arguments of weights, whether activations are quantised too
    "float per row": ("float-quantized", FP8 | {"strategy": "channel"}, True),
    "float per tensor": ("float-quantized", FP8 | {"strategy": "tensor"}, True),
    "float blocks": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [16, 16]}, True),
    "mxfp8": ("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32}, False),
    "int8 per row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, True),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, False),
    "int4, zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, False),
    "int3": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, False),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, False),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, False),
}  # fmt: skip


QUICK = ("float blocks", "int4, zeros", "nvfp4", "mxfp8")


def spans(weight: Tensor, args) -> tuple[Tensor, Tensor]:
    """Least and greatest number of every block that has a scale."""
    out, width = weight.shape
    rows, columns = {"tensor": (out, width), "channel": (1, width), "block": (16, 16)}.get(
        args.strategy, (1, args.group_size)
    )
    blocks = weight.float().view(out // rows, rows, width // columns, columns)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (low.view(1), high.view(1)) if args.strategy == "tensor" else (low, high)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SCHEMES])
def test_compressed_tensors(name, tmp_path):
    """Scales from extremes, everything else by the library: quantising, packing, config.json, and dequantising."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    form, weights, both = SCHEMES[name]
    model = tiny.build("llama_gqa", torch.bfloat16, **SIZES)
    own = {k: weights[k] for k in ("num_bits", "type") if k in weights} | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "format": form, "input_activations": own if both else None}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config, show_progress=False)
    for module in list_linears(model).values():
        args, total = module.quantization_scheme.weights, None
        low, high = spans(module.weight.detach(), args)
        if form.startswith("nvfp4"):
            total = generate_gparam(low.min().view(1), high.max().view(1))
            module.weight_global_scale.data = total
        scale, zero = calculate_qparams(low, high, args, total)
        module.weight_scale.data = scale.to(torch.float32 if form.startswith("nvfp4") else torch.bfloat16)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "m")
    compressor.update_config(str(tmp_path / "m"))
    compressor.decompress_model(model)
    # the library multiplies scales and codes in bf16, and global scales before they meet the codes
    compare(
        tmp_path / "m",
        {f"{n}.weight": m.weight for n, m in list_linears(model).items()},
        2**-7 if form.startswith("nvfp4") else 0,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_bitsandbytes(kind, nested, tmp_path):
    """Its CPU kernels quantise and dequantise; names as its modules save them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    model = tiny.build(
        "llama_gqa", **SIZES | {"hidden_size": 64}
    )  # its CPU kernel is wrong where blocks are wider than rows
    model.save_pretrained(tmp_path / "m")
    tensors, expected = load_file(tmp_path / "m" / "model.safetensors"), {}
    for name in list_linears(model):
        key = f"{name}.weight"
        weight = tensors.pop(key)
        if kind == "int8":
            codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
            tensors |= {key: codes, f"{name}.SCB": scale, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
            expected[key] = functional.int8_vectorwise_dequant(codes, scale)
            continue
        codes, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=nested)
        tensors |= {key: codes} | {f"{key}.{n}": t.contiguous() for n, t in state.as_dict(packed=True).items()}
        expected[key] = functional.dequantize_4bit(codes, state)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "m", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": kind == "int8",
                                                   "load_in_4bit": kind != "int8", "bnb_4bit_quant_type": kind})  # fmt: skip
    compare(tmp_path / "m", expected, 1e-6)
