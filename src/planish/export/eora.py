"""EoRA: low-rank adapters that give a quantised model back what rounding its weights took, without training.

For every linear of the blocks with weight W (out, in), rounded weight Ŵ and Gram R = Σ x xᵀ of its inputs,
y = Ŵ x + B A x with B A the matrix of rank r that minimises Σ ‖(W − Ŵ − B A) x‖². The naive program:

    L = cholesky(R + λI); u, s, v = svd((W − Ŵ) L); B, A = u[:, :r] √s[:r], √s[:r] v[:r] L⁻¹

Any square root of R gives the same product B A. Blocks are read one at a time; a block's inputs come from the rounded and
compensated blocks before it. Written in PEFT's format, so `peft.PeftModel.from_pretrained` loads it on the quantised model.

Reference: EoRA (arXiv 2410.21271), §3; the eigenvectors there are one such root. Differs from the paper: the Gram is a plain
sum (their code weighs early samples less), zero eigenvalues are handled by relative damping instead of being replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.linears import list_linears, measure_grams
from planish.calibrate.stream import Stream
from planish.core import Progress
from planish.errors import InputError
from planish.export.plain import open_plain
from planish.folder.origin import name_module
from planish.folder.safetensors import write_shard, write_text
from planish.folder.skeleton import set_parameter
from planish.folder.source import FolderSource
from planish.solvers.linalg import DAMPING, damp, whitened_svd

BITS = (4, 8)
GROUPS = (32, 16, 8)

Quantise = Callable[[Tensor], Tensor]  # weight (out, in) in the stored dtype → its rounded value, same shape


@dataclass
class Compensation:
    """What was written. `errors`: linear → share of its output's energy that rounding loses, before and after."""

    output: str
    bits: int
    rank: int
    linears: int
    weight_bytes: int  # integers and scales of the rounded weights
    adapter_bytes: int
    error_before: float  # means over linears
    error_after: float
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_linears(folder: str | Path) -> FolderSource:
    """A folder whose linears can be rounded."""
    source = open_plain(folder)
    if source.family.conv1d:
        raise InputError(
            f"{source.family.model_type} stores its linears transposed, which weight-only quantisation does not touch"
        )
    return source


def compensate(
    folder: str | Path | FolderSource,
    windows: Tensor,
    output: str | Path,
    *,
    bits: int = 4,
    rank: int = 32,
    quantiser: str = "round",
    quantise: Quantise | None = None,
    damping: float = DAMPING,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compensation:
    """Write the adapter of `rank` for a folder whose blocks' linears are rounded to `bits`; the folder is only read.

    `windows` (n, seq): calibration ids. `quantiser`: "round" (`round_weight`) or "torchao" (its own numbers); `quantise`:
    any other rounding of one weight, in place of both. The adapter is stored in the dtype of the weights.
    """
    rounding, target = find_rounding(bits, quantiser), Path(output)
    if quantise is not None:
        rounding = quantise
    if rank < 1:
        raise InputError(f"rank must be 1 or more, got {rank}")
    check_target(target, overwrite)
    source = folder if isinstance(folder, FolderSource) else open_linears(folder)
    stream, adapter = Stream(source, windows, device=device, dtype=dtype), Adapter(rank, damping)
    hidden = stream.start()
    size = 0
    for i in range(len(stream)):
        block = source.stored_block(i)
        linears = list_linears(block)
        current = stream.place(block)
        grams = measure_grams(stream, i, current, list(linears), hidden)
        for name, linear in linears.items():
            weight = linear.weight.data
            size += count_bytes(weight, bits)
            rounded, path = rounding(weight), name_module(source, f"{source.family.blocks}.{i}.{name}")
            whole = adapter.add(path, weight, rounded, grams[name], dtype)
            set_parameter(current, f"{name}.weight", whole.to(stream.device))
        hidden = stream.run(i, current, hidden)
        if progress:
            progress("blocks", i + 1, len(stream))
    if not adapter.ranks:
        raise InputError(f"no block of {source.name} has a linear to compensate")
    write(target, adapter.tensors, make_config(source.name, adapter.ranks, rank))
    before, after = (sum(e) / len(adapter.errors) for e in zip(*adapter.errors.values(), strict=True))
    stored = sum(t.nbytes for t in adapter.tensors.values())
    return Compensation(str(target), bits, rank, len(adapter.ranks), size, stored, before, after, adapter.errors)


def check_target(target: Path, overwrite: bool) -> None:
    """An adapter goes into a new or empty folder, or one that may be overwritten."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not (overwrite and target.is_dir()):
        raise InputError(f"output {target} exists and is not empty; choose another or pass --overwrite")


@dataclass
class Adapter:
    """What is found linear by linear: the tensors of PEFT's file; full name of the linear → rank, errors as in `Compensation`."""

    rank: int
    damping: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, weight: Tensor, rounded: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
        """Compensate a linear; its rounded weight with the compensation as stored, Ŵ + B A (out, in) in `dtype`."""
        b, a, *errors = solve(weight, rounded, gram, min(self.rank, *weight.shape), self.damping)
        b, a = (t.to(weight.dtype).contiguous() for t in (b, a))
        self.tensors |= {f"base_model.model.{name}.lora_{key}.weight": t for key, t in (("A", a), ("B", b))}
        self.ranks[name], self.errors[name] = len(a), (errors[0], errors[1])
        return rounded.to(dtype) + b.to(dtype) @ a.to(dtype)


def solve(
    weight: Tensor, rounded: Tensor, gram: Tensor, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor, float, float]:
    """B (out, rank), A (rank, in) in fp64, and the shares of the output's energy that are lost without and with them.

    Columns of B and rows of A have equal norms.
    """
    weight, damped = weight.double().cpu(), damp(gram, damping)
    lost = weight - rounded.double().cpu()
    b, a = whitened_svd(lost, damped).at(rank)
    tall, wide = b.norm(dim=0), a.norm(dim=1)
    scale = torch.where((tall > 0) & (wide > 0), (wide / tall.clamp(min=1e-300)).sqrt(), 1.0)
    b, a = b * scale, a / scale[:, None]

    def energy(m: Tensor) -> float:
        return float(((m @ damped) * m).sum())

    whole = energy(weight)
    before, after = (energy(m) / whole if whole > 0 else 0.0 for m in (lost, lost - b @ a))
    return b, a, before, after


# ------------------------------------------------------------------ rounding


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """Symmetric rounding to the nearest of 2^bits levels: 8 bits with a scale per row, 4 bits per group of inputs.

    scale = max |w| / (2^(bits − 1) − ½), the group size `find_group`'s; equal to torchao's numbers for fp32 weights.
    """
    levels = 2 ** (bits - 1)
    w = weight.float().unflatten(1, (-1, find_group(weight.shape[1], bits)))
    scale = (w.abs().amax(-1, keepdim=True) / (levels - 0.5)).clamp(min=torch.finfo(torch.float32).eps)
    return ((w * (1 / scale)).round().clamp(-levels, levels - 1) * scale).flatten(1).to(weight.dtype)


def find_group(width: int, bits: int) -> int:
    """Inputs that share a scale: all of them with 8 bits; with 4 the largest of 32, 16, 8 that divides the width."""
    return width if bits == 8 else next((g for g in GROUPS if width % g == 0), width)


def quantise_linear(linear: nn.Linear, bits: int) -> None:
    """Give a linear torchao's integer weights of these bits and groups, in place."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError:
        raise InputError("integer weights need torchao · pip install 'planish[quant]'") from None
    group = find_group(linear.in_features, bits)
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(group))  # type: ignore[attr-defined]
    quantize_(linear, config)


def quantise_model(model: nn.Module, bits: int) -> int:
    """Give the linears of a model's blocks torchao's integer weights, in place; bytes of integers and scales."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    size = sum(count_bytes(m.weight, bits) for m in linears)
    for linear in linears:
        quantise_linear(linear, bits)
    return size


def round_like_torchao(weight: Tensor, bits: int) -> Tensor:
    """The values that torchao's integers stand for."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantise_linear(linear, bits)
    return linear.weight.dequantize().to(weight.dtype)  # type: ignore[operator]


def count_bytes(weight: Tensor, bits: int) -> int:
    """Integers and one scale of the weight's type per group."""
    out, width = weight.shape
    return out * (width * bits // 8 + width // find_group(width, bits) * weight.element_size())


QUANTISE: dict[str, Callable[[Tensor, int], Tensor]] = {"round": round_weight, "torchao": round_like_torchao}


def find_rounding(bits: int, quantiser: str) -> Quantise:
    """The quantiser of this name with this many bits."""
    if bits not in BITS:
        raise InputError(f"eora rounds weights to {' or '.join(map(str, BITS))} bits, got {bits}")
    if quantiser not in QUANTISE:
        raise InputError(f"unknown quantiser {quantiser!r}; expected one of {', '.join(QUANTISE)}")
    return lambda weight: QUANTISE[quantiser](weight, bits)


# ------------------------------------------------------------------ writing


def make_config(base: str, ranks: dict[str, int], rank: int) -> dict[str, Any]:
    """PEFT's adapter_config.json: LoRA with scale 1 on exactly these modules; smaller linears have smaller ranks."""
    own = {n: r for n, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write(target: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The adapter's two files, each whole or not at all; other files of the folder stay."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_shard(target / "adapter_model.safetensors", tensors)
        write_text(target / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error}") from None
