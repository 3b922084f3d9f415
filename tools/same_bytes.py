"""Whether the working tree still gives, byte for byte, what git revision REF gives on this machine.

    python tools/same_bytes.py main                        # everything: about three minutes, half of it kept for next time
    python tools/same_bytes.py main --only tiny            # the random models alone: about a minute
    python tools/same_bytes.py main --method a3 --method auto
    python tools/same_bytes.py main --ignore 'compress:notes.*'   # a declared change: FILE:FIELD as printed

Small random models of several families and the embedded one are compressed by every method at two keeps with both sources,
by one thread; then come other budgets, targets, a recipe, a plan, a sweep, an adapter, runs that are killed and resumed,
and folders that REF wrote (finished or interrupted) taken up by the working tree. Compared are all files written, tensor
by tensor and field by field, and every number reported. `MAY_DIFFER` lists what is not compared, and why.

One line per case: `same`, or `DIFFERENT` with the first file and field. Exit code 1 if anything differs, 2 if one of the
sources could not be run. What REF gave is kept in --cache (by commit, versions, processor and the text of this script), so
that the next comparison with it runs the working tree alone. planish is called by its command line and `import planish`
alone: files inside src/ may move.
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
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Fields = dict[str, str]  # field → value; of a tensor or a whole file its SHA-256
Files = dict[str, Fields]  # file, or what a call returned → its fields

MAY_DIFFER = (  # FILE:FIELD, wildcards allowed
    "*:*seconds*", "*:*tokens_per_s*",  # measured by a clock
    "*:*peak_rss_bytes", "*:peak_ram_bytes", "*:how.*",  # measured by the system, and estimates from such
    "*:*warnings.*", "*:limits.*",  # sentences for people
)  # fmt: skip
PRESENCE = (".py", ".html", ".png")  # carried code, pages, pictures: must be there, may say something else
NUMBERS = (".md",)  # model cards: their numbers are compared, not their words

KEEPS = (0.85, 0.6)
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
TEXT = {
    "tiny": {"calibration": "inputs/ids.npy", "n_samples": 12, "seq_len": SEQ_LEN},
    "embedded": {"calibration": "inputs/text.txt", "n_samples": 4, "seq_len": 160},
}
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
    return dict(flatten(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


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


def command(root: Path, *args: str) -> Fields:
    """Run the `planish` command in this process; its exit code and the fields of the JSON that it prints."""
    module, _, function = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"][
        "planish"
    ].partition(":")
    main = getattr(__import__(module, fromlist=[function]), function)
    before, sys.argv, out = sys.argv, ["planish", *args], io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    printed = out.getvalue()
    return {"exit code": str(code)} | (read_value(json.loads(printed)) if code == 0 else {})


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
    if kind == "tiny" and keep == KEEPS[-1]:
        found["forecast"] = read_value(planish.forecast(f"inputs/{model}", **asked))
    result = planish.compress(f"inputs/{model}", **asked, output="out", overwrite=True)
    found |= read_folder("out") | {"compress": read_value(result)}
    text, seq_len = TEXT[kind]["calibration"], TEXT[kind]["seq_len"]
    return found | {"evaluate": read_value(planish.evaluate("out", text, seq_len, max_windows=4))}


def run_command(root: Path, *args: str) -> Files:
    """A command that writes the folder out, or nothing."""
    printed = command(root, *args, "--json")
    return read_folder("out") | {args[0]: printed}


def run_sweep(root: Path) -> Files:
    budgets = ["--keep", "0.9,0.7", "--eval-text", "inputs/ids.npy", "--eval-tokens", "240", "-o", "out"]
    return run_command(
        root, "sweep", "inputs/llama", "--methods", "auto:anchor=0,a3,svd-llm", *budgets, *text_options("tiny")
    )


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
    return run_command(root, "resume", "out")


def run_earlier_resume(root: Path, method: str) -> Files:
    """Resume a run that REF's planish began."""
    kept = Path("kept", f"{method}.partial")
    if not kept.exists():
        interrupt(method, "begun")
        shutil.move("begun.partial", kept)
    shutil.copytree(kept, "out.partial")
    return run_command(root, "resume", "out")


def run_earlier_load(root: Path, model: str, method: str) -> Files:
    """Load, measure and verify a folder that REF's planish wrote."""
    import planish

    kept = Path("kept", f"{model}-{method}")
    if not kept.exists():
        planish.compress(f"inputs/{model}", keep=0.7, method=method, **TEXT["tiny"], output="done")
        shutil.move("done", kept)
    measured = planish.evaluate(kept, "inputs/ids.npy", SEQ_LEN, max_windows=4)
    verified = command(root, "verify", str(kept), "--target", "hf", "--prompt-len", "20", "--new-tokens", "4", "--json")
    return {"evaluate": read_value(measured), "verify": verified}


def run_methods(root: Path) -> Files:
    """Names, aliases and settings of all methods, without the prose."""
    found: Files = {}
    printed = command(root, "methods", "--json")
    kept = re.compile(r"methods\.\d+\.(name|aliases.*|settings.*)")
    return found | {"methods": {k: v for k, v in printed.items() if kept.fullmatch(k)}}


def list_cases(methods: list[str]) -> dict[str, Callable[[Path], Files]]:
    """Name → what to run. A name's parts are what --only and --method choose by."""
    cases: dict[str, Callable[[Path], Files]] = {
        "methods": run_methods,
        "embedded/files": lambda root: read_folder(str(find_embedded(root))),
    }
    for model in FAMILIES:
        for method in methods:
            for keep in KEEPS:
                cases[f"tiny/{model}/{method}/{keep}"] = partial(run_compress, model=model, method=method, keep=keep)
    out = ("-o", "out", *text_options("tiny"))
    for name, model, method, options in (
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
        ("gguf", "phi3", "auto", "--keep 0.6 --target gguf"),
        ("sparsity", "llama", "llm-drop", "--sparsity 0.34"),
        ("pivoted", "llama", "svd-llm", "--keep 0.7 --set form=pivoted"),
        ("searched", "llama", "auto", "--keep 0.6 --set search=2 --set rounds=2"),
    ):
        args = ("compress", f"inputs/{model}", "--method", method, *options.split(), *out)
        cases[f"tiny/{name}/{model}/{method}"] = lambda root, args=args: run_command(root, *args)
    plan = ("plan", "inputs/phi3", "--method", "auto", "--keep", "0.7", *text_options("tiny"))
    cases["tiny/plan/phi3/auto"] = lambda root: run_command(root, *plan)
    cases["tiny/recipe/flat-llm"] = lambda root: run_command(root, "compress", "inputs/recipe.yaml", "-o", "out")
    cases["tiny/sweep"] = run_sweep
    cases["tiny/eora/a3"] = run_eora
    for method in RESUMED:
        cases[f"tiny/resume/{method}"] = partial(run_resume, method=method)
        cases[f"tiny/resume of REF's/{method}"] = partial(run_earlier_resume, method=method)
    for name in EARLIER:
        model, _, method = name.partition("/")
        cases[f"tiny/load REF's/{name}"] = partial(run_earlier_load, model=model, method=method)
    for method in methods:
        for keep in KEEPS:
            cases[f"embedded/{method}/{keep}"] = partial(run_compress, model="embedded", method=method, keep=keep)
    return cases


def choose(names: Iterator[str] | list[str], only: list[str], methods: list[str]) -> list[str]:
    """Names with one of `only` in them and one of `methods` as a part; the list of methods always."""
    return [
        n for n in names
        if n == "methods" or ((not only or any(o in n for o in only)) and (not methods or set(methods) & set(n.split("/"))))
    ]  # fmt: skip


# The worker: one process per source tree, all cases in it.


def work(root: Path, results: Path, options: argparse.Namespace) -> None:
    """Run the chosen cases that `results` has not, by the source tree at `root`, in the current folder."""
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    import planish

    if not Path(planish.__file__).is_relative_to(root):
        sys.exit(f"planish was imported from {planish.__file__}, not from {root}")
    if not Path("inputs").resolve().exists():
        building = Path(tempfile.mkdtemp(dir=Path("inputs").resolve().parent))
        make_inputs(building, root)
        with contextlib.suppress(OSError):  # another comparison was quicker
            building.rename(Path("inputs").resolve())
    if (results / name_file("methods")).exists():
        listed = json.loads((results / name_file("methods")).read_text())
    else:
        listed = run_methods(root)
    methods = [v for k, v in listed["methods"].items() if k.endswith(".name") and k.count(".") == 2]
    cases = list_cases(options.methods_of_ref or methods)
    for name in choose(list(cases), options.only, options.method):
        path, start = results / name_file(name), time.process_time()
        if not path.exists():
            for left in ("out", "out.partial", "small", "begun", "done"):
                shutil.rmtree(left, ignore_errors=True)
            try:
                found = cases[name](root)
            except Exception as error:  # refusals are results: their kind is compared, their words are for people
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                found = {"error": {"type": type(error).__name__}}
            whole = path.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(found))
            whole.rename(path)
        print(f"{name}\t{time.process_time() - start:.1f}", file=say, flush=True)


def name_file(case: str) -> str:
    return re.sub(r"[^\w.-]+", "_", case) + ".json"


# The comparison.


def describe_machine() -> dict[str, str]:
    """Whatever the bytes may depend on besides the source."""
    found = {
        "python": sys.version,
        "machine": platform.machine(),
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    for name in ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found |= {
            k.strip(): v.strip()
            for k, _, v in (x.partition(":") for x in lines)
            if k.strip() in ("model name", "flags")
        }
    settings = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE")
    return found | {n: os.environ[n] for n in settings if n in os.environ}


def run_tree(root: Path, results: Path, shared: Path, args: list[str]) -> Iterator[tuple[str, float]]:
    """Run a worker for the tree at `root`; yields its cases as they are done, with their CPU seconds."""
    one = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
    )
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch, tempfile.TemporaryFile("w+") as log:
        for name in ("inputs", "kept"):
            (shared / "kept").mkdir(exist_ok=True)
            Path(scratch, name).symlink_to(shared / name)
        more = {"PYTHONPATH": str(root / "src"), "PLANISH_CACHE": str(Path(scratch, "cache")), "PYTHONHASHSEED": "0"}
        worker = [sys.executable, str(Path(__file__).resolve()), "--work", str(root), "--results", str(results), *args]
        env = os.environ | one | more | {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
        with subprocess.Popen(worker, cwd=scratch, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout
            try:
                for line in process.stdout:
                    name, _, seconds = line.rstrip("\n").partition("\t")
                    yield name, float(seconds)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            log.seek(0)
            print(f"the worker for {root} failed:\n{log.read()[-4000:]}", file=sys.stderr)
            sys.exit(2)


def find_difference(old: Files, new: Files, ignored: list[str]) -> str:
    """The first file and field that differ, or nothing."""
    for file in [*old, *(f for f in new if f not in old)]:
        if file not in new or file not in old:
            return f"{file}: only in {'REF' if file in old else 'the working tree'}" + explain(old, new)
        a, b = old[file], new[file]
        for field in [*a, *(f for f in b if f not in a)]:
            if a.get(field) != b.get(field) and not any(fnmatchcase(f"{file}:{field}", p) for p in ignored):
                return f"{file}:{field}: {shorten(a.get(field))} → {shorten(b.get(field))}"
    return ""


def explain(old: Files, new: Files) -> str:
    return "".join(
        f" ({side}: {f['error']['type']})" for side, f in (("REF", old), ("working tree", new)) if "error" in f
    )


def shorten(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 60 else f"{value[:30]}…{value[-8:]}"


def compare(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{options.ref}^{{commit}}"], cwd=root, text=True, capture_output=True
    ).stdout.strip()
    if not commit:
        print(f"no such revision: {options.ref}", file=sys.stderr)
        return 2
    machine = json.dumps(describe_machine(), sort_keys=True)
    shared = options.cache.expanduser().resolve() / f"{commit[:12]}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    earlier = shared / "results"
    earlier.mkdir(parents=True, exist_ok=True)
    (shared / "machine.json").write_text(machine)
    filters = [x for o in options.only for x in ("--only", o)] + [x for m in options.method for x in ("--method", m)]
    spent = [0.0, 0.0]
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        if not is_complete(earlier, options):
            print(f"running {options.ref} ({commit[:12]})", flush=True)
            tree = Path(scratch, "tree")
            tree.mkdir()
            packed = subprocess.run(["git", "archive", commit], cwd=root, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
            for n, (_, seconds) in enumerate(run_tree(tree, earlier, shared, filters), 1):
                spent[0] += seconds
                if n % 25 == 0:
                    print(f"  {n} cases, {spent[0]:.0f} s", flush=True)
        results = Path(scratch, "results")
        results.mkdir()
        of_ref = [x for m in read_methods(earlier) for x in ("--of-ref", m)]
        different = refused = total = 0
        for name, seconds in run_tree(root, results, shared, [*filters, *of_ref]):
            spent[1] += seconds
            old, new = (json.loads((f / name_file(name)).read_text()) for f in (earlier, results))
            found = find_difference(old, new, [*MAY_DIFFER, *options.ignore])
            same = f"same (both refuse: {new['error']['type']})" if "error" in new else "same"
            print(
                f"{'DIFFERENT' if found else same}  {name}  {seconds:.1f} s{'  ' + found if found else ''}", flush=True
            )
            total, different, refused = total + 1, different + bool(found), refused + ("error" in new)
    print(
        f"{total} cases, {different} different, {refused} refused; CPU seconds: REF {spent[0]:.0f}, working tree {spent[1]:.0f}"
    )
    return 1 if different else 0


def read_methods(results: Path) -> list[str]:
    """The names of REF's methods, where they are known."""
    path = results / name_file("methods")
    listed = json.loads(path.read_text())["methods"] if path.exists() else {}
    return [v for k, v in listed.items() if k.endswith(".name") and k.count(".") == 2]


def is_complete(results: Path, options: argparse.Namespace) -> bool:
    methods = read_methods(results)
    names = choose(list(list_cases(methods)), options.only, options.method)
    return bool(methods) and all((results / name_file(n)).exists() for n in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", nargs="?", help="a git revision")
    parser.add_argument("--only", action="append", default=[], help="cases with this in their names (repeatable)")
    parser.add_argument("--method", action="append", default=[], help="cases of this method (repeatable)")
    parser.add_argument("--ignore", action="append", default=[], help="FILE:FIELD that may differ, wildcards allowed")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    parser.add_argument("--cache", type=Path, default=home / "planish-same-bytes", help="where REF's results are kept")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--of-ref", dest="methods_of_ref", action="append", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work.resolve(), options.results, options)
        return 0
    if not options.ref:
        parser.error("REF is missing")
    return compare(options)


if __name__ == "__main__":
    sys.exit(main())
