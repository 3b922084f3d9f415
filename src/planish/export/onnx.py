"""ONNX with dynamic batch, length and cache: one graph for prompts and for single tokens.

Inputs: `input_ids` (batch, sequence) int64, `attention_mask` (batch, past + sequence) int64, and for every attention that
is left `past_key_i`, `past_value_i` (batch, kv heads, past, dimensions). Outputs: `logits` (batch, sequence, vocabulary) and
`present_key_i`, `present_value_i`, to be given back as the past. Start with a past of length 0.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from planish.errors import InputError
from planish.export.written import Written, check_file, check_finite
from planish.folder.config import load_config, read_layout
from planish.folder.hub import find_folder
from planish.folder.load import load
from planish.folder.towers import refuse_wrapped

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
INLINE = 1 << 30  # bytes of weights beyond which they go to a file of their own, FILE.data

Past = list[tuple[Tensor, Tensor]]


class Step(nn.Module):
    """One forward pass with the cache as plain tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        cache = DynamicCache()
        for i, (key, value) in enumerate(past):
            cache.update(key, value, i)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def export_onnx(folder: str | Path, output: str | Path, *, dtype: str = "f32") -> Written:
    """Write `output` from a dense or compressed folder of any supported family."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("export to onnx needs onnx and onnxscript · pip install 'planish[onnx]'") from None
    if dtype not in DTYPES:
        raise InputError(f"unknown ONNX type {dtype!r}; expected one of {', '.join(DTYPES)}")
    path = find_folder(folder)
    config = load_config(path)
    refuse_wrapped(config, "an ONNX graph as planish writes it")
    check_file(Path(output), path, ".onnx")
    model = load(path, dtype=DTYPES[dtype])
    batch_experts(model)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.data)
    step = Step(model)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    if any(not hasattr(layer, "keys") or hasattr(layer, "conv_states") for layer in layers):
        raise InputError(
            "an ONNX graph as planish writes it holds keys and values alone, not what a mixer keeps of a sequence"
        )
    past = [(layer.keys[:, :, :3], layer.values[:, :, :3]) for layer in layers if layer.keys is not None]
    mask = torch.ones(2, 8, dtype=torch.long)
    auto = torch.export.Dim.AUTO
    dynamic = ({0: auto, 1: auto}, {0: auto, 1: auto}, [({0: auto, 2: auto}, {0: auto, 2: auto}) for _ in past])
    names = [f"{n}_{i}" for i in range(len(past)) for n in ("key", "value")]
    target = Path(output)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with quiet():
        exported = torch.export.export(step, (ids, mask, past), dynamic_shapes=dynamic, strict=False)
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=["input_ids", "attention_mask", *(f"past_{n}" for n in names)],
                output_names=["logits", *(f"present_{n}" for n in names)],
            )
        except torch.onnx.OnnxExporterError as error:
            kind = read_layout(config)[0].model_type
            raise InputError(f"torch has no ONNX operation for a part of {kind}: {name_cause(error)}") from None
        assert program is not None
        files = save_whole(lambda place: program.save(place, external_data=size > INLINE), target)
    total = sum(p.numel() for p in model.parameters())
    return Written(
        "onnx", str(target), config.model_type, dtype, total, total, sum(f.stat().st_size for f in files), "none"
    )


def batch_experts(model: nn.Module) -> None:
    """Have a mixture compute every token's experts in one product, without loops over those that are reached."""
    for module in model.modules():
        if hasattr(module, "is_transposed"):  # transformers' experts
            module.config._experts_implementation_internal = "batched_mm"  # type: ignore[union-attr]


def name_cause(error: BaseException) -> str:
    """The first line of what an error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def save_whole(save: Callable[[Path], Any], target: Path) -> list[Path]:
    """The files that `save(path)` writes beside each other, put in place together once all are complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            save(Path(folder) / target.name)
            written = sorted(Path(folder).iterdir(), key=lambda p: len(p.name), reverse=True)  # the graph last
            return [p.replace(target.with_name(p.name)) for p in written]
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress lines and warnings about optional operators."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
