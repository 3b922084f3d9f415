"""Whether the working tree still gives, byte for byte, what git revision REF gives on this machine.

    python tools/same_bytes.py main                              # two minutes of one core, twice that the first time
    python tools/same_bytes.py main --only tiny                  # the random models alone: under a minute
    python tools/same_bytes.py main --method a3 --method auto
    python tools/same_bytes.py main --ignore 'compress:notes.*'  # a declared change: FILE:FIELD as printed

Small random models of several families and the embedded one are compressed by every method at two keeps with both sources,
by one thread; then come other budgets, targets, a recipe, a plan, a sweep, an adapter, runs that are killed and resumed,
and folders that REF wrote (finished or interrupted) taken up by the working tree. Compared are all files written, tensor
by tensor and field by field, and every number reported. `MAY_DIFFER` lists what is not compared, and why.

One line per case: `same`, or `DIFFERENT` with the first file and field. Exit code 1 if anything differs, 2 if one of the
sources could not be run. What REF gave is kept in --cache (by commit, versions, processor and cases), so that the next
comparison with it runs the working tree alone. planish is called by its command line and `import planish` alone: files
inside src/ may move. The cases are in same_bytes_cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import same_bytes_cases
from same_bytes_cases import Files, add_filters, choose, list_cases, name_file

MAY_DIFFER = (  # FILE:FIELD, wildcards allowed; besides PRESENCE and NUMBERS of same_bytes_cases.py
    "*:*seconds*", "*:*tokens_per_s*",  # measured by a clock
    "*:*peak_rss_bytes", "*:peak_ram_bytes", "*:how.*",  # measured by the system, and estimates from such
    "*:*warnings.*", "*:limits.*",  # sentences for people
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, str]:
    """Whatever the bytes may depend on besides planish."""
    found = {"python": sys.version, "machine": platform.machine()}
    found["cases"] = hashlib.sha256(Path(same_bytes_cases.__file__).read_bytes()).hexdigest()
    for name in ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "flags"):
                found[key.strip()] = value.strip()
    settings = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE")
    return found | {n: os.environ[n] for n in settings if n in os.environ}


def run_tree(root: Path, results: Path, shared: Path, filters: list[str]) -> Iterator[tuple[str, float]]:
    """Run all chosen cases by the tree at `root`, in one process; yields their names and CPU seconds as they are done.

    `shared`: the folder of the inputs and of what REF keeps for the working tree.
    """
    (shared / "kept").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch, tempfile.TemporaryFile("w+") as log:
        for name in ("inputs", "kept"):
            Path(scratch, name).symlink_to(shared / name)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        env = os.environ | threads | offline | {
            "PYTHONPATH": str(root / "src"), "PLANISH_CACHE": str(Path(scratch, "cache")), "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg",
        }  # fmt: skip
        worker = [sys.executable, same_bytes_cases.__file__, str(root), str(results), *filters]
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
            print(f"running {root} failed:\n{log.read()[-4000:]}", file=sys.stderr)
            sys.exit(2)


def run_ref(commit: str, shared: Path, filters: list[str]) -> float:
    """Run what `shared`/results has not yet by a copy of the commit's files; CPU seconds."""
    print(f"running REF, {commit[:12]}", flush=True)
    spent = 0.0
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as tree:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
        for n, (_, seconds) in enumerate(run_tree(Path(tree).resolve(), shared / "results", shared, filters), 1):
            spent += seconds
            if n % 25 == 0:
                print(f"  {n} cases, {spent:.0f} s", flush=True)
    return spent


def find_difference(old: Files, new: Files, ignored: list[str]) -> str:
    """The first file and field that differ, or nothing."""
    for side, other, missing in (("REF", old, new), ("the working tree", new, old)):
        if "error" in other and "error" not in missing:
            return f"error: only in {side}: {other['error']['type']}"
    for file in [*old, *(f for f in new if f not in old)]:
        if file not in new or file not in old:
            return f"{file}: only in {'REF' if file in old else 'the working tree'}"
        a, b = old[file], new[file]
        for field in [*a, *(f for f in b if f not in a)]:
            if a.get(field) != b.get(field) and not any(fnmatchcase(f"{file}:{field}", p) for p in ignored):
                return f"{file}:{field}: {shorten(a.get(field))} → {shorten(b.get(field))}"
    return ""


def shorten(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 60 else f"{value[:40]}…{value[-8:]}"


def read_files(results: Path, case: str) -> Files:
    path = results / name_file(case)
    return json.loads(path.read_text()) if path.exists() else {}


def compare(ref: str, cache: Path, only: list[str], method: list[str], ignored: list[str]) -> int:
    """Run both, print a line per case; the exit code."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{ref}^{{commit}}"], cwd=ROOT, text=True, capture_output=True
    )
    if found.returncode:
        print(f"no such revision: {ref}", file=sys.stderr)
        return 2
    commit, machine = found.stdout.strip(), json.dumps(describe_machine(), sort_keys=True)
    shared = cache.expanduser().resolve() / f"{commit[:12]}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    earlier = shared / "results"
    earlier.mkdir(parents=True, exist_ok=True)
    (shared / "machine.json").write_text(machine)
    filters = [x for o in only for x in ("--only", o)] + [x for m in method for x in ("--method", m)]
    methods = read_files(earlier, "methods").get("methods")
    before = after = 0.0
    if not methods or not all((earlier / name_file(n)).exists() for n in choose(list_cases([*methods]), only, method)):
        before = run_ref(commit, shared, filters)
        methods = read_files(earlier, "methods")["methods"]
    different = refused = total = 0
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as results:
        filters += ["--of-ref", ",".join(methods)]
        for name, seconds in run_tree(ROOT, Path(results), shared, filters):
            new = read_files(Path(results), name)
            difference = find_difference(read_files(earlier, name), new, ignored)
            same = f"same (both refuse: {new['error']['type']})" if "error" in new else "same"
            print(
                f"{f'DIFFERENT  {name}  {difference}' if difference else f'{same}  {name}'}  {seconds:.1f} s",
                flush=True,
            )
            total, different, refused = total + 1, different + bool(difference), refused + ("error" in new)
            after += seconds
    spent = f"CPU seconds: REF {before:.0f}, working tree {after:.0f}"
    print(f"{total} cases, {different} different, {refused} refused; {spent}")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", metavar="REF", help="a git revision")
    add_filters(parser)
    parser.add_argument("--ignore", action="append", default=[], help="FILE:FIELD that may differ, wildcards allowed")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    parser.add_argument("--cache", type=Path, default=home / "planish-same-bytes", help="where REF's results are kept")
    o = parser.parse_args()
    return compare(o.ref, o.cache, o.only, o.method, [*MAY_DIFFER, *o.ignore])


if __name__ == "__main__":
    sys.exit(main())
