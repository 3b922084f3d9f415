"""planish doctor"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import format_bytes, make_table, session
from planish.errors import PlanishError

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "pydantic", "typer", "rich")
EXTRAS = {  # extra → what it is for, modules that show it is there
    "data": ("wikitext2, c4, .parquet", ("datasets", "pyarrow")),
    "eval": ("zero-shot tasks by name", ("lm_eval",)),
    "gguf": ("GGUF in and out", ("gguf", "xllamacpp")),
    "onnx": ("export --to onnx", ("onnx", "onnxscript", "onnxruntime")),
    "report": ("pictures of the benchmarks", ("matplotlib",)),
    "tune": ("LoRA on compressed models", ("peft",)),
    "quant": ("integer weights", ("torchao",)),
    "pack": ("compress --bits for transformers and vLLM", ("compressed_tensors",)),
}


def doctor(as_json: o.JsonOption = False) -> None:
    """Show versions, devices, memory and optional parts; compress a random model to see that everything works."""
    with session(as_json) as run:
        run.api  # noqa: B018  (imports everything and silences transformers)
        found = {
            "versions": find_versions(),
            "machine": find_machine(),
            "devices": find_devices(),
            "extras": {
                name: {
                    "for": use,
                    "present": all(map(util.find_spec, modules)),
                    "install": f"pip install 'planish[{name}]'",
                }
                for name, (use, modules) in EXTRAS.items()
            },
        }
        found["self_test"] = test = compress_random()
        table = make_table("", "", title="planish doctor")
        table.columns[1].justify = "left"
        for name, value in {**found["versions"], **found["machine"]}.items():
            label = name.removesuffix("_bytes").replace("_", " ") if name in found["machine"] else name
            table.add_row(label, format_bytes(value) if name.endswith("bytes") else str(value))
        for name, text in found["devices"].items():
            table.add_row(name, text)
        for name, extra in found["extras"].items():
            table.add_row(
                f"extra \\[{name}]", f"{'present' if extra['present'] else escape(extra['install'])} ({extra['for']})"
            )
        state = "passed" if test["passed"] else f"FAILED: {test['error']}"
        table.add_row("self-test", f"{state} ({test['seconds']:.1f} s)")
        run.give(found, table)
    if not test["passed"]:
        raise PlanishError(f"the self-test failed: {test['error']}")


def find_versions() -> dict[str, str]:
    from planish.version import __version__

    versions = {"planish": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def find_machine() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": find_memory("SC_PHYS_PAGES"),
        "memory_free_bytes": find_memory("SC_AVPHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "temporary_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def find_memory(name: str) -> int:
    """Bytes of a sysconf count of pages; on Linux the free ones include what caches would give back. 0 = unknown."""
    if name == "SC_AVPHYS_PAGES":
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def find_devices() -> dict[str, str]:
    import torch

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"HIP {torch.version.hip}"
        if torch.version.hip
        else "CPU only"
    )
    devices = {"torch build": build, "cpu": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = f"{p.name}, {format_bytes(p.total_memory)}"
    else:
        devices["cuda"] = "none"
    devices["mps"] = "present" if torch.backends.mps.is_available() else "none"
    return devices


def compress_random() -> dict[str, Any]:
    """Compress a random two-block model, load it, and compare its logits at keep 1 with the original's."""
    start = time.perf_counter()
    error = ""
    try:
        check_random()
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    return {"passed": not error, "error": error, "seconds": time.perf_counter() - start}


def check_random() -> None:
    import torch

    from planish import api
    from planish.folder.load import build_random

    model = build_random(seed=0)
    ids = torch.randint(model.config.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="planish-", ignore_cleanup_errors=True) as folder, torch.no_grad():
        for keep, same in ((1.0, True), (0.7, False)):
            result = api.compress(
                model, output=Path(folder) / str(keep), keep=keep, method="flat-llm", calibration=ids, n_samples=8,
                seq_len=16, device="cpu",
            )  # fmt: skip
            small = api.load(result.output)
            logits = small(ids[None, :32]).logits
            if not logits.isfinite().all() or result.keep > keep:
                raise RuntimeError(f"keep {keep}: logits {logits.mean()}, kept {result.keep}")
            if same and not torch.allclose(logits, model(ids[None, :32]).logits, atol=1e-4):
                raise RuntimeError("a model compressed at keep 1 gives other logits")
