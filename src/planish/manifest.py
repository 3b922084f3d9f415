"""What a run reports, and the record of it in the folder: planish.json and the model card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from planish.calibrate.stream import Stream
from planish.errors import InputError
from planish.folder.origin import find_adapter, find_origin, list_changes
from planish.folder.source import Source
from planish.folder.writer import Writer
from planish.methods.method import Method, list_settings
from planish.mixture import join_mixture, split_mixture
from planish.plan.planned import Planned
from planish.plan.problem import Problem
from planish.request import label, show
from planish.version import __version__


@dataclass
class Result:
    """What `compress` reports; counted from the written weights."""

    method: str
    keep_requested: float
    keep: float
    params_before: int
    params_after: int
    block_params_before: int
    block_params_after: int
    kv_bytes_per_token_before: int
    kv_bytes_per_token_after: int
    format: str
    output: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    bytes_before: int = 0  # of the files that the uncut model is written in, headers included
    bytes_after: int = 0  # of the written files
    flops_per_token_before: int = 0  # two per weight of the blocks and the head, and attention over `context` tokens
    flops_per_token_after: int = 0
    context: int = 0
    latency_ms_before: float | None = (
        None  # per decoded token, as `planish.plan.latency` predicts it; None unless asked
    )
    latency_ms_after: float | None = None
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → asked, achieved
    submodules: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # removed ones by kind: count, of, sparsity, blocks
    rounding: dict[str, Any] = field(
        default_factory=dict
    )  # see `planish.walks.quantise.Report`; empty where nothing was rounded
    untouched: dict[str, int] = field(default_factory=dict)  # part of a wrapper that is copied as it is → bytes
    choices: list[dict[str, Any]] = field(
        default_factory=list
    )  # plans that were compared for a size: `planish.sizes.trials.Choice`
    kv_bits: int = 0  # of a number of the cache, as the bytes count it: those of the blocks' weights
    ladder: dict[str, Any] = field(
        default_factory=dict
    )  # plain rounding beside a size: `planish.sizes.ladder.Ladder`; empty without one
    loss: dict[str, Any] = field(
        default_factory=dict
    )  # against the dense model on spare calibration text: `planish.walks.loss.measure_loss`; empty where there is none

    @property
    def removed(self) -> float:
        """The papers' ratio: share of the blocks' weights that is gone."""
        return 1 - self.keep

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed": self.removed, "keep_whole_model": self.params_after / self.params_before}


def read_result(output: Path) -> Result:
    """What the manifest of a complete folder says."""
    try:
        found = json.loads((output / "planish.json").read_text(encoding="utf-8"))["result"]
        return Result(**{f.name: found[f.name] for f in fields(Result) if f.name in found} | {"output": str(output)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {output / 'planish.json'}: {error!r}; compress again with --overwrite") from None


def write_manifest(
    writer: Writer,
    method: Method,
    problem: Problem,
    planned: Planned,
    stream: Stream,
    result: Result,
    found: dict[str, Any],
    calibration: dict[str, Any],
) -> None:
    """planish.json: everything needed to understand and to repeat the run. `found`: per unit and per linear, by name."""
    problem, plan = replace(problem, units=planned.solvers), planned.ranks
    manifest = {
        "planish": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "source": name_only(stream.source.name),
        **({"source_file": origin} if (origin := find_origin(stream.source)) else {}),
        **({"adapter": adapter.record} if (adapter := find_adapter(stream.source)) else {}),
        **({"wrapper": tower.wrapper.model_type} if (tower := stream.source.tower) else {}),
        "method": result.method,
        "settings": list_settings(method) | dict(planned.settings),
        "round_to": problem.step,
        "calibration": calibration | {"source": name_only(str(calibration.get("source", "")))},
        "dtype": str(stream.dtype).removeprefix("torch."),
        **({"products": str(stream.products)[6:]} if stream.products != stream.dtype else {}),
        "result": result.as_dict() | {"output": writer.output.name},
        "plan": {str(u): r for u, r in sorted(plan.items())},
        "full": {str(u): problem.full(u) for u in sorted(problem.units)},
        "roles": list(dict.fromkeys(r for s in problem.shapes for r in s.linears)),
        "weights": {str(u): [problem.count(u, problem.full(u)), problem.count(u, r)] for u, r in sorted(plan.items())},
        **found,
        "notes": dict(planned.notes) | dict(planned.remarks),
    }
    writer.text("planish.json", json.dumps(manifest, indent=2, default=str) + "\n")
    writer.text("README.md", make_card(manifest))


def at_bits(found: dict[str, Any]) -> str:
    """ " at 16 bits", where a result says in how many its cache is counted."""
    return f" at {found['kv_bits']} bits" if found.get("kv_bits") else ""


def name_only(name: str) -> str:
    """What to call a model or a text in files that are published: a local one by its last name alone."""
    shares = split_mixture(name)
    paths = {s: Path(s).expanduser() for s in shares if s}
    short = {s: p.resolve().name if p.is_absolute() or p.exists() else s for s, p in paths.items()}
    return join_mixture({short.get(s, s): w for s, w in shares.items()})


def make_card(manifest: dict[str, Any]) -> str:
    """The folder's model card."""
    r = manifest["result"]
    name = manifest["source"]
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    base = f"base_model: {name}\n" if is_hub_id else ""
    auto = "AutoModelForImageTextToText" if "wrapper" in manifest else "AutoModelForCausalLM"
    load = f"from transformers import {auto}\n"
    if r["format"] != "native":
        load = "import planish  # or trust_remote_code=True: the folder carries the modelling files\n" + load
    kv = (r["kv_bytes_per_token_before"], r["kv_bytes_per_token_after"])
    asked = " and ".join(f"{label(n)} {show(n, b['asked'])}" for n, b in r["budgets"].items()) or "a sparsity"
    origin = "".join(f"{note}\n" for note in describe_origin(manifest.get("source_file")))
    calibration, settings = (json.dumps(manifest[n], default=str) for n in ("calibration", "settings"))
    latency = ""
    if r["latency_ms_after"] is not None:
        times = (r["latency_ms_before"], r["latency_ms_after"])
        latency = f"| predicted ms per decoded token | {times[0]:.3g} | {times[1]:.3g} |\n"
    untouched = "".join(f"Copied as it was: `{name}`, {size:,} bytes.\n" for name, size in r["untouched"].items())
    return f"""---
{base}library_name: transformers
tags: [planish, compressed, {manifest["method"]}]
---

# Compressed with planish: {manifest["method"]}, keep {r["keep"]:.4f}

| | before | after |
|---|---|---|
| parameters | {r["params_before"]:,} | {r["params_after"]:,} |
| parameters of the blocks' linears | {r["block_params_before"]:,} | {r["block_params_after"]:,} |
| bytes of weights | {r["bytes_before"]:,} | {r["bytes_after"]:,} |
| FLOPs per token, {r["context"]} tokens of context | {r["flops_per_token_before"]:,} | {r["flops_per_token_after"]:,} |
| KV cache{at_bits(r)}, bytes per token | {kv[0]:,} | {kv[1]:,} |
{latency}
Asked: {asked}.

```python
{load}model = {auto}.from_pretrained("this folder")
```

{origin}{untouched}Calibration: {calibration}. Hyper-parameters: {settings}.
The plan, per-unit errors and versions are in `planish.json`.
"""


def note_origin(source: Source) -> list[str]:
    """What there is to say about how the model was stored, and what of it was changed or left out while it was read."""
    return describe_origin(find_origin(source)) + list_changes(source)


def describe_origin(origin: dict[str, Any] | None) -> list[str]:
    """A line about the file or the checkpoint that the dense model was dequantised from."""
    if origin is None:
        return []
    types = ", ".join(f"{n} {kind}" for kind, n in origin["tensor_types"].items())
    stored = f"file `{origin['file']}`" if "file" in origin else f"checkpoint, read as {origin['read_as']}"
    return [f"Made from the {origin['format']} {stored} (tensors: {types}): {origin['note']}."]
