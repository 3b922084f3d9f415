"""The cases of same_bytes.py, and the process that runs them all with one source tree.

    python tools/same_bytes_cases.py TREE RESULTS [--only …] [--method …]      # in a folder with `inputs` and `kept`

Every case gives `Files`: what was written and what was returned, as fields. planish is called by its command line and by
`import planish` alone. What a case gives may depend on nothing but the source, the machine and this file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Fields = dict[str, str]  # field → value; of a tensor or a whole file its SHA-256
Files = dict[str, Fields]  # file, or what a call returned → its fields

PRESENCE = (".py", ".html", ".png")  # carried code, pages, pictures: must be there, may say something else
NUMBERS = (".md",)  # model cards: their numbers are compared, not their words

KEEPS = (0.85, 0.6)
LIGHT = {"nbl": (0.9, 0.83), "palu": (0.9, 0.83), "sleb": (0.85, 0.7)}  # methods that cannot take so much away
VOCABULARY, SEQ_LEN = 97, 24
_GQA = {"num_key_value_heads": 2}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GQA),
    "gpt_neox": ("GPTNeoX", {"use_parallel_residual": True} | _ROTARY),  # fused, parallel, biases
    "phi3": ("Phi3", {**_GQA, "sliding_window": 8, "original_max_position_embeddings": 64}),  # fused
    "opt": ("OPT", {"ffn_dim": 44, "word_embed_proj_dim": 32, "tie_word_embeddings": True, "dropout": 0.0}),
}
EMBEDDED = {  # searches cut short
    "erc-svd": {"k": 8}, "asvd": {"allocation": "uniform"}, "sleb": {"windows": 2}, "blockpruner": {"windows": 2},
    "subfit": {"attention_score": "influence", "ffn_score": "error", "fit": "sequential"},
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "tiny": {"calibration": "inputs/ids.npy", "n_samples": 12, "seq_len": SEQ_LEN},
    "embedded": {"calibration": "inputs/text.txt", "n_samples": 4, "seq_len": 160},
}
OPTIONS = (  # of `planish compress`: name, model, method, options
    ("kv", "llama", "auto", "--kv-keep 0.5"),
    ("kv", "opt", "palu", "--kv-keep 0.5"),
    ("kv and keep", "gpt_neox", "auto", "--kv-keep 0.8 --keep 0.7"),
    ("flops", "phi3", "auto", "--flops-keep 0.7"),
    ("bytes", "llama", "a3", "--max-bytes 100KB"),
    ("params", "gpt_neox", "svd-llm", "--max-params 24000"),
    ("rounded", "llama", "auto", "--keep 0.6 --round-to 4"),
    ("bf16", "phi3", "flat-llm", "--keep 0.7 --dtype bfloat16"),
    ("hf", "llama", "auto", "--keep 0.6 --target hf"),
    ("vllm", "llama", "auto", "--keep 0.6 --target vllm"),
    ("sparsity", "llama", "llm-drop", "--sparsity 0.34"),
    ("searched", "llama", "auto", "--keep 0.6 --set search=2 --set rounds=2"),
    ("structural", "phi3", "auto", "--keep 0.7 --set units=structural"),
    ("linear", "opt", "auto", "--keep 0.7 --set units=linear"),
    ("pivoted", "llama", "svd-llm", "--keep 0.7 --set form=pivoted"),
    ("pivoted", "phi3", "aa-svd", "--keep 0.7 --set form=pivoted --set order=block"),
    ("mixed", "llama", "a3", "--keep 0.7 --set allocation=mixed --set mlp=leverage"),
    ("energy", "llama", "a3", "--keep 0.7 --set qk=energy --set vo=values"),
    ("queries", "llama", "flat-llm", "--keep 0.7 --set qk=pca --set allocation=uniform"),
    ("whitened", "llama", "erc-svd", "--keep 0.7 --set residual_metric=whitened"),
    ("refit", "phi3", "modegpt", "--keep 0.7 --set refit=true --set allocation=uniform"),
    ("outliers", "gpt_neox", "mpifa", "--keep 0.7 --set allocation=outliers --set form=pair"),
    ("frequency", "llama", "palu", "--keep 0.85 --set keys=frequency --set group=2"),
    ("cosine", "llama", "replaceme", "--keep 0.7 --set objective=cosine"),
    ("updated", "llama", "svd-llm", "--keep 0.7 --set update=true"),
)
RESUMED = ("flat-llm", "auto", "svd-llm")
EARLIER = ("llama/auto", "gpt_neox/mpifa", "opt/a3")  # REF's folders, loaded by the working tree


# What is compared: a folder, or what a call returned, as fields.


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """{"a": [1, {"b": 2}]} → ("a.0", "1"), ("a.1.b", "2"); empty containers are values."""
    if isinstance(value, dict | list | tuple) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else repr(value)


def read_file(path: Path) -> Fields:
    """The fields of one file; the last one is the whole file's SHA-256 where its bytes count."""
    data = path.read_bytes()
    if path.suffix in PRESENCE:
        return {"present": "yes"}
    if path.suffix in NUMBERS:
        return {"numbers": " ".join(re.findall(r"\d[\d.,e+-]*", data.decode()))}
    if path.suffix == ".json":
        return dict(flatten(json.loads(data)))
    if path.suffix == ".jsonl":
        return dict(flatten([json.loads(line) for line in data.splitlines()]))
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(data.decode()))
        return {f"{row.get('name', n)}.{k}": str(v) for n, row in enumerate(rows) for k, v in row.items()}
    if path.suffix in (".yaml", ".txt"):
        return {f"line {n}": line for n, line in enumerate(data.decode().splitlines(), 1)}
    fields: Fields = {}
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                fields |= flatten(entry, name)
            else:
                a, b = entry["data_offsets"]
                digest = hashlib.sha256(data[start + a : start + b]).hexdigest()
                fields[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return fields | {"the whole file": hashlib.sha256(data).hexdigest()}


def read_folder(folder: str) -> Files:
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): read_file(p) for p in paths}


def read_value(value: Any) -> Fields:
    """Of what a function of planish returned: a dataclass, or a dict."""
    return dict(flatten(value if isinstance(value, dict) else dataclasses.asdict(value)))


# The inputs, the same for both sources.


def make_inputs(folder: Path, root: Path) -> None:
    """Random models, the embedded one of the source tree at `root`, token ids, text and a recipe."""
    import numpy as np
    import torch
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    for n, (name, (stem, settings)) in enumerate(FAMILIES.items()):
        generator = torch.Generator().manual_seed(n)
        config = getattr(transformers, f"{stem}Config")(**(common | settings))
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
        with torch.no_grad():
            for key, p in sorted(model.named_parameters()):
                noise = torch.randn(p.shape, generator=generator)
                if "norm" in key or key.endswith("bias"):
                    p.copy_(0.3 * noise + (0 if key.endswith("bias") else 1))
                else:
                    p.copy_(noise * (0.7 if "embed" in key or "lm_head" in key else 1.3 / p.shape[1] ** 0.5))
        model.eval().save_pretrained(folder / name)
    shutil.copytree(find_embedded(root), folder / "embedded")
    draws = torch.rand(40 * SEQ_LEN, generator=torch.Generator().manual_seed(5))
    np.save(folder / "ids.npy", (1 + (VOCABULARY - 1) * draws**2).long().clamp(max=VOCABULARY - 1).numpy())
    (folder / "text.txt").write_bytes((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes())
    (folder / "recipe.yaml").write_text(
        "version: 1\nmodel: inputs/llama\nkeep: 0.7\nmethod: flat-llm\nsettings: {ridge: 0.02}\nround_to: 2\n"
        "calibration: {source: inputs/ids.npy, n_samples: 10, seq_len: 20, seed: 3, sampling: random}\n"
    )


def find_embedded(root: Path) -> Path:
    """The folder of the embedded model, wherever it lies in the tree's src."""
    return next(p.parent for p in sorted((root / "src").rglob("demo/config.json")))


# The cases: each gives Files. They run in a folder with `inputs` and, for what REF wrote, `kept`.


def command(root: Path, *args: str) -> dict[str, Any]:
    """Run the `planish` command in this process; the JSON that it prints, and its exit code."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["planish"].partition(":")
    main = getattr(__import__(module, fromlist=[function]), function)
    before, sys.argv, out = sys.argv, ["planish", *args, "--json"], io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    if code:
        raise Refused(f"exit code {code}")
    return json.loads(out.getvalue())


class Refused(Exception):
    """A command ended with another exit code than 0."""


def text_options(kind: str) -> list[str]:
    t = TEXT[kind]
    return ["--calibration", t["calibration"], "--n-samples", str(t["n_samples"]), "--seq-len", str(t["seq_len"])]


def run_compress(root: Path, model: str, method: str, keep: float) -> Files:
    """Forecast (of a tiny model), compress, and measure the result, by the Python functions."""
    import planish

    kind = "embedded" if model == "embedded" else "tiny"
    asked: Any = {"keep": keep, "method": method, "settings": EMBEDDED.get(method) if kind == "embedded" else None}
    asked |= TEXT[kind]
    found: Files = {}
    if kind == "tiny" and keep < KEEPS[0]:
        found["forecast"] = read_value(planish.forecast(f"inputs/{model}", **asked))
    result = planish.compress(f"inputs/{model}", **asked, output="out", overwrite=True)
    found |= read_folder("out") | {"compress": read_value(result)}
    text, seq_len = TEXT[kind]["calibration"], TEXT[kind]["seq_len"]
    return found | {"evaluate": read_value(planish.evaluate("out", text, seq_len, max_windows=4))}


def run_command(root: Path, args: list[str]) -> Files:
    """A command that writes the folder out, or nothing."""
    printed = command(root, *args)
    return read_folder("out") | {args[0]: read_value(printed)}


def run_sweep(root: Path) -> Files:
    budgets = ["--keep", "0.9,0.7", "--eval-text", "inputs/ids.npy", "--eval-tokens", "240", "-o", "out"]
    methods = ["--methods", "auto:anchor=0,a3,svd-llm"]
    return run_command(root, ["sweep", "inputs/llama", *methods, *budgets, *text_options("tiny")])


def run_eora(root: Path) -> Files:
    import planish

    planish.compress("inputs/llama", keep=0.7, method="a3", **TEXT["tiny"], output="small")
    return {"eora": read_value(planish.eora("small", "out", rank=4, **TEXT["tiny"]))} | read_folder("out")


def interrupt(method: str, output: str) -> None:
    """Compress in a process of its own that is killed as soon as two shards are written."""
    import planish

    def watch(*_: object) -> None:
        if len(list(Path(f"{output}.partial").glob("*.safetensors"))) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            planish.compress("inputs/llama", keep=0.7, method=method, **TEXT["tiny"], output=output, progress=watch)
        os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        raise RuntimeError(f"the run was to be killed; it ended with exit code {code}")


def run_resume(root: Path, method: str) -> Files:
    interrupt(method, "out")
    return run_command(root, ["resume", "out"])


def run_earlier_resume(root: Path, method: str) -> Files:
    """Resume a run that REF's planish began."""
    kept = Path("kept", f"{method}.partial")
    if not kept.exists():
        interrupt(method, "begun")
        shutil.move("begun.partial", kept)
    shutil.copytree(kept, "out.partial")
    return run_command(root, ["resume", "out"])


def run_earlier_load(root: Path, model: str, method: str) -> Files:
    """Load, measure and verify a folder that REF's planish wrote."""
    import planish

    kept = Path("kept", f"{model}-{method}")
    if not kept.exists():
        planish.compress(f"inputs/{model}", keep=0.7, method=method, **TEXT["tiny"], output="done")
        shutil.move("done", kept)
    measured = planish.evaluate(kept, "inputs/ids.npy", SEQ_LEN, max_windows=4)
    verified = command(root, "verify", str(kept), "--target", "hf", "--prompt-len", "20", "--new-tokens", "4")
    return {"evaluate": read_value(measured), "verify": read_value(verified)}


def run_methods(root: Path) -> Files:
    """Names, aliases and settings of all methods, without the prose."""
    listed = command(root, "methods")["methods"]
    return {"methods": {m["name"]: json.dumps([m["aliases"], m["settings"]], sort_keys=True) for m in listed}}


def list_cases(methods: list[str]) -> dict[str, Callable[[Path], Files]]:
    """Name → what to run. A name's parts are what --only and --method choose by."""
    cases: dict[str, Callable[[Path], Files]] = {
        "methods": run_methods,
        "embedded/files": lambda root: read_folder(str(find_embedded(root))),
    }
    for model in FAMILIES:
        for method in methods:
            for keep in LIGHT.get(method, KEEPS):
                cases[f"tiny/{model}/{method}/{keep}"] = partial(run_compress, model=model, method=method, keep=keep)
    for name, model, method, options in OPTIONS:
        args = ["inputs/" + model, "--method", method, *options.split(), "-o", "out", *text_options("tiny")]
        cases[f"tiny/{name}/{model}/{method}"] = partial(run_command, args=["compress", *args])
    plan = ["plan", "inputs/phi3", "--method", "auto", "--keep", "0.7", *text_options("tiny")]
    cases["tiny/plan/phi3/auto"] = partial(run_command, args=plan)
    cases["tiny/recipe/flat-llm"] = partial(run_command, args=["compress", "inputs/recipe.yaml", "-o", "out"])
    cases["tiny/sweep"] = run_sweep
    cases["tiny/eora/a3"] = run_eora
    for method in RESUMED:
        cases[f"tiny/resume/{method}"] = partial(run_resume, method=method)
        cases[f"tiny/resume of REF's/{method}"] = partial(run_earlier_resume, method=method)
    for name in EARLIER:
        model, _, method = name.partition("/")
        cases[f"tiny/load REF's/{name}"] = partial(run_earlier_load, model=model, method=method)
    for method in methods:
        for keep in LIGHT.get(method, KEEPS):
            cases[f"embedded/{method}/{keep}"] = partial(run_compress, model="embedded", method=method, keep=keep)
    return cases


def choose(names: Iterable[str], only: list[str], methods: list[str]) -> list[str]:
    """Names with one of `only` in them and one of `methods` as a part; the list of methods always."""
    return [
        n for n in names
        if n == "methods" or ((not only or any(o in n for o in only)) and (not methods or set(methods) & set(n.split("/"))))
    ]  # fmt: skip


def name_file(case: str) -> str:
    return re.sub(r"[^\w.-]+", "_", case) + ".json"


def work(root: Path, results: Path, of_ref: str, only: list[str], method: list[str]) -> None:
    """Run the chosen cases that `results` has not by the source tree at `root`; says on stdout what it has done."""
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    import torch

    torch.set_num_threads(1)
    import planish

    if not Path(planish.__file__).is_relative_to(root):
        sys.exit(f"planish was imported from {planish.__file__}, not from {root}")
    inputs = Path("inputs").resolve()
    if not inputs.exists():
        building = Path(tempfile.mkdtemp(dir=inputs.parent))
        make_inputs(building, root)
        with contextlib.suppress(OSError):  # another comparison was quicker
            building.rename(inputs)
    cases = list_cases(of_ref.split(",") if of_ref else list(run_methods(root)["methods"]))
    for name in choose(cases, only, method):
        path, start = results / name_file(name), time.process_time()
        if not path.exists():
            for left in ("out", "out.partial", "small", "begun", "done"):
                shutil.rmtree(left, ignore_errors=True)
            try:
                found = cases[name](root)
            except Exception as error:  # refusals are results: their kind is compared, their words are for people
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                found = {"error": {"type": str(error) if isinstance(error, Refused) else type(error).__name__}}
            whole = path.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(found))
            whole.rename(path)
        print(f"{name}\t{time.process_time() - start:.1f}", file=say, flush=True)


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], help="cases with this in their names (repeatable)")
    parser.add_argument("--method", action="append", default=[], help="cases of this method (repeatable)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="TREE")
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--of-ref", default="", help="methods whose cases are run  [default: all of the tree's]")
    add_filters(parser)
    options = parser.parse_args()
    work(options.root.resolve(), options.results, options.of_ref, options.only, options.method)
