"""What a decoded token takes on this machine, from a micro-benchmark of the modules that a plan can choose between.

One token, batch 1, behind `context` cached ones. Three things are measured, once per model shape, device, dtype and number
of threads, and kept in planish's cache folder:

- every linear's shape as dense, with fewer rows or columns, pivoted and as a pair of several ranks, between which times
  are interpolated. Copies over one pool of weights take turns, so that a weight is as cold as it is in the model;
- attention (scores, cache, rotary) at several head dimensions: the model with its linears taken out, all blocks;
- the dense model. What it takes beyond its linears and attention is `rest`: norms, embedding, head, the calls.

A plan's time is `rest` + Σ of its linears and attentions.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from planish.calibrate.cache import find_root
from planish.core import Progress, Shape
from planish.folder.safetensors import write_text
from planish.folder.source import Source
from planish.modelling.blocks import Spec, find_blocks, get_linear, install
from planish.modelling.canonical import split_block
from planish.modelling.modules import Pair, Pivoted, set_module
from planish.plan.footprint import Footprint, Piece, footprint

GRID = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)  # of a full rank or width
HEADS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # of a head's dimensions
POOL = 96 << 20  # bytes that copies of a module take turns in: more than processors' caches hold
SAMPLES = 9
TOKENS = 8  # decoded per sample

Measured = tuple[str, int, int, int]  # form, rows and columns of the stock linear, rank or width
TIMED = {"pair": Pair, "pivoted": Pivoted}


class UnmeasuredError(Exception):
    """Something takes time that is not in the table."""


@dataclass(frozen=True)
class Table:
    """Measured seconds by what was measured, and how to read them."""

    seconds: Mapping[str, float]
    shapes: Sequence[Shape]
    curves: dict[tuple[str, int, int], tuple[list[int], list[float]]] = field(default_factory=dict, compare=False)

    def time(self, found: Footprint) -> float:
        """Seconds per token of a block, or of a part of it."""
        if "slice" in found.spec or "k_rank" in (found.attention or {}):
            raise UnmeasuredError
        return sum(map(self.run, found.pieces)) + self.attend(found)

    def run(self, piece: Piece) -> float:
        """Seconds of a linear in a form, interpolated over its size."""
        form, out, n, size = measured(piece)
        if (form, out, n) not in self.curves:
            sizes = list_sizes(form, out, n)
            self.curves[form, out, n] = sizes, [self.seconds[name(form, out, n, s)] for s in sizes]
        return interpolate(*self.curves[form, out, n], size)

    def attend(self, found: Footprint) -> float:
        """Seconds of attention beside its linears: of its queries and keys, of its values; together they are the whole."""
        return sum(self.attend_half(found.shape, which, size) for which, size in found.halves)

    def attend_half(self, shape: Shape, which: str, size: int) -> float:
        """Of queries and keys ("qk") or values ("v") with `size` dimensions per head."""
        sizes = [s for w, s in list_halves(shape) if w == which]
        times = [self.seconds[f"attention {which} {s}"] for s in sizes]
        return interpolate(sizes, times, size) - times[-1] / 2

    @property
    def rest(self) -> float:
        """Seconds of everything that no plan changes."""
        dense = [footprint({}, s) for s in self.shapes]
        linears = sum(self.run(piece) for f in dense for piece in f.pieces)
        return (
            self.seconds["model"] - linears - sum(self.attend_half(f.shape, *half) for f in dense for half in f.halves)
        )

    def predict(self, specs: Sequence[Spec], shapes: Sequence[Shape]) -> float:
        """Seconds per token of a model whose blocks have these specs."""
        return self.rest + sum(self.time(footprint(spec, shape)) for spec, shape in zip(specs, shapes, strict=True))


def note_slower(before: float | None, after: float | None) -> list[str]:
    """What to say of predicted milliseconds per token, where fewer weights take longer."""
    if before is None or after is None or after <= before:
        return []
    return [
        f"predicted slower than the uncompressed model: {after:.3g} ms per decoded token, {before:.3g} ms; ask for less with "
        "--max-latency, or for dense shapes (a method that cuts heads and neurons; auto: --set units=structural)"
    ]


def measured(piece: Piece) -> Measured:
    """What the time of a linear is read from."""
    form, out, n = piece
    if form["kind"] == "dense":
        rows, columns = form.get("out", out), form.get("in", n)
        return ("rows", out, n, rows) if columns == n else ("columns", out, n, columns)
    if form["kind"] not in TIMED:
        raise UnmeasuredError
    return form["kind"], out, n, form["rank"]


def name(form: str, out: int, n: int, size: int) -> str:
    """rows and columns are dense linears."""
    if form == "rows":
        return f"dense {size}x{n}"
    return f"dense {out}x{size}" if form == "columns" else f"{form} {out}x{n} {size}"


def list_sizes(form: str, out: int, n: int) -> list[int]:
    full = {"rows": out, "columns": n}.get(form, min(out, n) - 1)
    return sorted({max(1, round(g * full)) for g in GRID})


def list_heads(full: int) -> list[int]:
    return sorted({max(2, round(g * full / 2) * 2) if g < 1 else full for g in HEADS})


def list_halves(shape: Shape) -> list[tuple[str, int]]:
    """Head dimensions, rising, that attention is measured at; queries and keys that are normalised are never cut."""
    qk = [shape.qk] if shape.qk_norm else list_heads(shape.qk)
    return [("qk", size) for size in qk] + [("v", size) for size in list_heads(shape.v)]


def interpolate(sizes: list[int], times: list[float], size: int) -> float:
    """Piecewise linear; below the first size the first slope goes on, down to half the first time."""
    if len(sizes) == 1:
        return times[0]
    i = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
    slope = (times[i] - times[i - 1]) / (sizes[i] - sizes[i - 1])
    return max(times[i - 1] + slope * (size - sizes[i - 1]), times[0] / 2 if size < sizes[0] else 0.0)


# ---------------------------------------------------------------- measuring


def read_table(
    source: Source,
    context: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Seconds by what was measured: from the cache folder, or measured now and kept there."""
    place = torch.device(device)
    parts = {
        "shapes": [[s.hidden, s.heads, s.kv_heads, s.qk, s.v, s.intermediate] for s in map(source.shape, range(source.n_blocks))],
        "family": source.family.model_type, "vocabulary": source.config.vocab_size, "context": context, "device": str(place),
        "name": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(), "dtype": str(dtype), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "measure": [GRID, HEADS, POOL, SAMPLES, TOKENS],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    path = find_root() / "latency" / f"{key}.json"
    with suppress(OSError, ValueError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if set(found) == set(list_names(source)) and all(isinstance(t, float) and t > -1 for t in found.values()):
            return found
    found = measure(source, context, place, dtype, progress)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def list_pieces(source: Source) -> list[Measured]:
    """Every linear that a plan for this model can hold, at the sizes between which times are interpolated."""
    shapes = {replace(source.shape(i), block=0) for i in range(source.n_blocks)}
    wanted = {(f, *s.linear(r)) for s in shapes for r in s.roles for f in (
        "columns" if r in ("o", "down") else "rows", "rows", *TIMED)}  # fmt: skip
    wanted |= {(f, s.hidden, s.hidden) for s in shapes for f in ("pair", "rows")}  # bypasses
    return [(form, out, n, size) for form, out, n in sorted(wanted) for size in list_sizes(form, out, n)]


def list_names(source: Source) -> list[str]:
    shape = source.shape(0)
    heads = [f"attention {which} {size}" for which, size in list_halves(shape)]
    return sorted({name(*p) for p in list_pieces(source)} | {"model", *heads})


@torch.no_grad()
def measure(
    source: Source, context: int, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, float]:
    """Everything that `list_names` names."""
    shape, sizes = source.shape(0), source.sizes()
    largest = max(count for count, _ in sizes.values())
    pool = Pool(max(largest, min(sum(c for c, _ in sizes.values()), POOL // dtype.itemsize)), device, dtype)
    total, found = len(list_names(source)), dict[str, float]()

    def note(key: str, seconds: float) -> None:
        found[key] = seconds
        if progress:
            progress("latency table", len(found), total)

    for form, out, n, size in list_pieces(source):
        if (key := name(form, out, n, size)) not in found:
            note(key, time_linear(form, out, n, size, pool))
    full: Spec = {"kind": "own", "qk": shape.qk, "v": shape.v}
    models = {"model": source.skeleton().eval(), "none": strip(source, None, pool), "full": strip(source, full, pool)}
    for which, size in list_halves(shape):
        if size < full[which]:
            pairs = {"pairs": min(size, shape.rotary) // 2} if which == "qk" and shape.rotary else {}
            models[f"attention {which} {size}"] = strip(source, full | {which: size} | pairs, pool)
    times = time_models(models, pool, context)
    note("model", times["model"])
    most = {"qk": 0.0, "v": 0.0}
    for which, size in list_halves(shape):  # smaller heads do not take longer, whatever the clock says
        taken = times.get(f"attention {which} {size}", times["full"]) - times["none"]
        most[which] = max(most[which], min(taken, times["full"] - times["none"]) / source.n_blocks)
        note(f"attention {which} {size}", most[which])
    return found


class Pool:
    """Random weights that modules take their own from, one after the other, again from the start when they are used up."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)
        self.data = torch.empty(count, device=device, dtype=dtype).normal_(0, 0.02, generator=generator)
        self.at = 0

    def take(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        if self.at + count > len(self.data):
            self.at = 0
        found = self.data[self.at : self.at + count].view(shape)
        self.at += count
        return found

    def fill(self, module: nn.Module) -> nn.Module:
        """Give every parameter of a module a view of the pool."""
        for part in module.modules():
            for key, p in list(part._parameters.items()):
                if p is not None:
                    part._parameters[key] = nn.Parameter(self.take(*p.shape), requires_grad=False)
        return module


def time_linear(form: str, out: int, n: int, size: int, pool: Pool) -> float:
    """Least seconds of one token through a linear whose weights are not in the processor's cache."""
    copies = [pool.fill(build(form, out, n, size))]
    count = sum(p.numel() for p in copies[0].parameters())
    copies += [pool.fill(build(form, out, n, size)) for _ in range(min(256, len(pool.data) // count) - 1)]
    for copy in copies:
        if isinstance(copy, Pivoted):
            copy.order = torch.randperm(out, dtype=torch.int32).to(pool.data.device)
    x = torch.randn(1, 1, size if form == "columns" else n, device=pool.data.device).to(pool.data.dtype)

    def run() -> None:
        for copy in copies:
            copy(x)

    return sample(run, pool.data.device) / len(copies)


def build(form: str, out: int, n: int, size: int) -> nn.Module:
    """A linear in a form, still without weights."""
    with torch.device("meta"):
        if form in ("rows", "columns"):
            return nn.Linear(*((n, size) if form == "rows" else (size, out)), bias=False)
        return TIMED[form](n, out, size, False)


def sample(run: Callable[[], Any], device: torch.device, least: float = 1e-3) -> float:
    """Least seconds of `run` (what else the machine does only adds); short ones are repeated within a sample."""
    run()
    start = tell_time(device)
    run()
    times = max(1, int(least / max(tell_time(device) - start, 1e-9)))
    found = []
    for _ in range(SAMPLES):
        start = tell_time(device)
        for _ in range(times):
            run()
        found.append((tell_time(device) - start) / times)
    return min(found)


class Silent(nn.Module):
    """In place of a linear: the same zeros whatever comes in."""

    def __init__(self, out: int, pool: Pool):
        super().__init__()
        self.out = torch.zeros(1, 1, out, device=pool.data.device, dtype=pool.data.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out


def strip(source: Source, form: Spec | None, pool: Pool) -> nn.Module:
    """The model without its linears, with attentions of this form (None: with none)."""
    model, family = source.skeleton().eval(), source.family
    attention = form or {"kind": "bypass", "rank": 0, "gate": False, "shift": False, "raw": False}
    for i, block in enumerate(find_blocks(model, family)):
        split_block(install(block, {"attention": attention}, family, model.config), family, model.config)
        shape = source.shape(i)
        for role in shape.roles if form else [r for r in shape.roles if r not in "qkvo"]:
            linear, out = get_linear(block, family, role), shape.linear(role)[0]
            if form and role in "qkv":
                full, size = (shape.v, form["v"]) if role == "v" else (shape.qk, form["qk"])
                out = out // full * size
            path = next(p for p, m in block.named_modules() if m is linear)
            set_module(block, path, Silent(out, pool))
    model.set_output_embeddings(Silent(model.get_output_embeddings().weight.shape[0], pool))
    return model


def time_models(models: Mapping[str, nn.Module], pool: Pool, context: int) -> dict[str, float]:
    """Least seconds per decoded token of each, batch 1, behind `context` tokens whose keys and values are random; they
    take turns."""
    device = pool.data.device
    for model in models.values():
        pool.fill(model)
        for module in model.modules():
            for key, b in module._buffers.items():
                if b is not None:
                    module._buffers[key] = (
                        torch.zeros(b.shape, dtype=b.dtype, device=device) if b.is_meta else b.to(device)
                    )
    found = dict.fromkeys(models, float("inf"))
    for _ in range(SAMPLES):
        for name, model in models.items():
            found[name] = min(found[name], time_decode(model, pool, context))
    return found


def time_decode(model: nn.Module, pool: Pool, context: int) -> float:
    """Seconds of the quickest of `TOKENS` tokens, one after the other."""
    device = pool.data.device
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    cache = model(input_ids=token, use_cache=True).past_key_values
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if getattr(layer, "keys", None) is not None and layer.keys.numel() and context > 1:
            sizes = ((*t.shape[:2], context - 1, t.shape[3]) for t in (layer.keys, layer.values))
            cache.update(*(torch.zeros(s, device=device, dtype=pool.data.dtype).add_(0.01) for s in sizes), i)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    best = float("inf")
    for _ in range(TOKENS):
        start = tell_time(device)
        model(input_ids=token, past_key_values=cache, use_cache=True)
        best = min(best, tell_time(device) - start)
    return best


def tell_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
