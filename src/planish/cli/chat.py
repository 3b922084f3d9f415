"""A chat model from a GGUF file, compressed within minutes on a laptop and measured beside the dense one, offline."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planish import api
from planish.calibrate.text import eval_windows, load_tokens
from planish.core import Progress
from planish.errors import InputError
from planish.evaluate.agreement import Answer
from planish.evaluate.evaluation import Comparison, answer_both, compare, load_to_measure
from planish.evaluate.own_answers import QUESTIONS, TEMPERATURE, Say, Written, encode_question, write_answers
from planish.evaluate.report.page import render
from planish.evaluate.speed import bench
from planish.export.gguf import export_gguf
from planish.export.llama_cpp import LlamaCpp
from planish.folder.config import load_config
from planish.folder.gguf_reader import is_gguf, open_gguf
from planish.folder.hub import CARRIED, find_carried
from planish.folder.owner import check_output, owning
from planish.folder.source import open_source
from planish.folder.tokenizer import load_tokenizer
from planish.manifest import Result

KEEP, METHOD, TARGET = 0.9, "auto", "gguf"
SAMPLES, SEQ_LEN = 16, 256  # calibration windows, half of them of the model's own answers, half of `builtin`
WINDOWS, EVAL_LEN = 8, 512  # evaluation windows
ANSWER, OWN = 48, 160  # tokens of an answer that is shown, and at most of one to calibrate on
PROMPT_LEN, NEW_TOKENS, REPEATS = 128, 16, 3  # of the speed measurement
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "Give me three tips for sleeping better.",
)


@dataclass
class Rate:
    """Tokens per second of one model in one program, medians of runs in turns. `bytes`: the file, or the weights in memory."""

    where: str
    model: str
    type: str
    bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass
class Chat:
    """What `planish demo` measured and wrote of a chat model."""

    model: str
    method: str
    calibration: dict[str, Any]
    evaluation: str
    result: Result
    quality: Comparison
    answers: list[Answer]
    rates: list[Rate]
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)  # name → seconds, CPU seconds
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"result": self.result.as_dict(), "cpu_seconds": self.cpu_seconds}

    @property
    def cpu_seconds(self) -> float:
        return sum(cpu for _, cpu in self.stages.values())

    @property
    def repeated(self) -> tuple[float, float]:
        """Mean share of repeated 4-grams in the answers: dense, compressed."""
        shares = [(a.repeated_dense, a.repeated) for a in self.answers]
        dense, small = (sum(x) / len(shares) for x in zip(*shares, strict=True))
        return dense, small


@owning
def run_chat(
    output: Path,
    model: str,
    *,
    calibration: str | None = None,
    eval_text: str | None = None,
    keep: float | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Chat:
    """Compress a GGUF chat model ("smollm2" or a file), compare it with the dense one, write a page, a folder and GGUF files.

    `calibration`, `eval_text`: SOURCEs. Without the first half is the model's own answers to questions
    (`planish.evaluate.own_answers`), sampled in llama.cpp, half `builtin`. Without the
    second the text is Python's reference manual. `quick`: a quarter of the text, or as much as the model's width needs.
    """
    start, stages, share = time.perf_counter(), dict[str, tuple[float, float]](), 4 if quick else 1
    check_output(output / "model", overwrite=True)
    file, tokenizer = open_chat(model, output)
    limit = load_config(file).max_position_embeddings
    seq_len, eval_len = min(SEQ_LEN, limit // 2), min(EVAL_LEN, limit // 2)
    held = load_tokens(eval_text or read_manual(), tokenizer, split="evaluation")
    eval_windows(held.tokens, eval_len, held.begin)  # a text that cannot be used is found before anything takes minutes
    samples, source = max(SAMPLES // share, count_least(file, seq_len)), calibration
    if source is None:
        with timed(stages, "answers to calibrate on"):
            own = write_own(file, tokenizer, output, (samples // 2, seq_len), progress)
            source = f"{own.output}:0.5,builtin:0.5"
    with timed(stages, "compressing"):
        result: Any = api.compress(
            file, keep=KEEP if keep is None else keep, method=METHOD, target=TARGET, calibration=source,
            n_samples=samples, seq_len=seq_len, output=output / "model", overwrite=True, device="cpu", progress=progress,
        )  # fmt: skip
    small, dense = (load_to_measure(m, "cpu", None) for m in (output / "model", file))
    with timed(stages, "perplexity and agreement"):
        quality = compare(
            small, dense, eval_text or read_manual(), eval_len, tokenizer=tokenizer, max_windows=WINDOWS // share,
            progress=progress,
        )  # fmt: skip
    with timed(stages, "answers to compare"):
        answers = answer_both(
            small, dense, [*PROMPTS[: len(PROMPTS) // share]], tokenizer, new_tokens=min(ANSWER, limit // 4)
        )
    with timed(stages, "speed"):
        rates = measure_rates(file, output, {"dense": dense, "compressed": small}, min(PROMPT_LEN, limit // 2))
    used = {"source": source, "own": calibration is None, "n_samples": samples, "seq_len": seq_len,
            "temperature": TEMPERATURE if calibration is None else None}  # fmt: skip
    text = eval_text or "Python's reference manual"
    found = Chat(file.stem, result.method, used, text, result, quality, answers, rates, stages)
    found.files = [
        str(output / n) for n in ("model", "dense-q8_0.gguf", "compressed-q8_0.gguf", "demo.html", "demo.json")
    ]
    found.seconds = time.perf_counter() - start
    write_page(found, output)
    return found


def open_chat(model: str, output: Path) -> tuple[Path, Any]:
    """The model's file and its tokenizer; the folder for what is written is there afterwards."""
    file = find_file(model)
    tokenizer = load_tokenizer(file)
    if tokenizer is None:
        raise InputError(f"the demo asks a model questions, and {file.name} has no tokenizer")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror or error}") from None
    return file, tokenizer


def find_file(model: str) -> Path:
    """The GGUF file of "smollm2", or the one that is named."""
    if model == CARRIED:
        return find_carried()
    if not is_gguf(Path(model)) or not Path(model).is_file():
        raise InputError(f"{model} is no GGUF file that could be compressed")
    return Path(model)


def count_least(file: Path, seq_len: int) -> int:
    """Windows that have at least as many tokens as the widest linear has channels, and are even in number."""
    shape = open_source(file).shape(0)
    widest = max(max(shape.linear(role)) for role in shape.linears)
    return 2 * -(-widest // (2 * seq_len))


@contextmanager
def timed(stages: dict[str, tuple[float, float]], name: str) -> Iterator[None]:
    """Note how many seconds something takes, and how many on all cores of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    stages[name] = (time.perf_counter() - wall, time.process_time() - cpu)


def read_manual() -> Any:
    """Python's language reference as text, which comes with Python for its `help()`; `builtin` where it is left out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return "builtin"
    return [topics[name] for name in sorted(topics)][:24]


def write_own(file: Path, tokenizer: Any, output: Path, size: tuple[int, int], progress: Progress | None) -> Written:
    """A bit more of the model's own answers than `size` (windows, tokens each)."""
    path, wanted = output / "calibration.jsonl", (size[0] + 1) * size[1]
    return write_answers(make_sampler(file, tokenizer), tokenizer, path, cycle(QUESTIONS), wanted, progress)


def make_sampler(file: Path, tokenizer: Any) -> Say:
    """What llama.cpp says in one thread: the same text on any machine of a kind."""
    longest = max(len(encode_question(tokenizer, q)) for q in QUESTIONS)
    runner, random = LlamaCpp(file, longest + OWN), np.random.default_rng(0)
    stop = set(tokenizer.all_special_ids)
    return lambda questions: [sample(runner, ids, OWN, random, stop) for ids in questions]


def sample(runner: LlamaCpp, ids: list[int], most: int, random: np.random.Generator, stop: set[int]) -> list[int]:
    """What llama.cpp says after `ids`, at most so many tokens: argmax of logits / TEMPERATURE + Gumbel noise."""
    runner.reset()
    row, own = runner.decode(ids, 0, last=True)[0], list[int]()
    while len(own) < most:
        token = int((row.astype(np.float64) / TEMPERATURE + random.gumbel(size=len(row))).argmax())
        if token in stop:
            break
        own.append(token)
        row = runner.decode([token], len(ids) + len(own) - 1, last=True)[0]
    return own


def measure_rates(file: Path, output: Path, models: Mapping[str, Any], prompt_len: int) -> list[Rate]:
    """transformers in fp32, then llama.cpp: the file that was given, and both models exported as Q8_0."""
    new = min(NEW_TOKENS, prompt_len)
    found = [
        Rate(
            "transformers",
            s.model,
            s.dtype,
            s.weight_bytes,
            s.prefill_tokens_per_s.median,
            s.decode_tokens_per_s.median,
        )
        for s in bench(models, batch_sizes=(1,), prompt_len=prompt_len, new_tokens=new, repeats=REPEATS)
    ]
    files = {("dense, as given", find_type(file)): file}
    for name, folder in (("dense", file), ("compressed", output / "model")):
        files[name, "q8_0"] = output / f"{name}-q8_0.gguf"
        export_gguf(folder, files[name, "q8_0"], dtype="q8_0")
    runners = {key: LlamaCpp(path, prompt_len + new, threads=torch.get_num_threads()) for key, path in files.items()}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in files}
    for _ in range(REPEATS + 1):  # the first ones warm up
        for key, runner in runners.items():
            times[key].append(time_runner(runner, prompt_len, new))
    for (name, kind), path in files.items():
        prefill, decode = (statistics.median(t) for t in zip(*times[name, kind][1:], strict=True))
        found.append(Rate("llama.cpp", name, kind, path.stat().st_size, prompt_len / prefill, new / decode))
    return found


def find_type(file: Path) -> str:
    """The type that most of a file's tensors have."""
    types = open_gguf(file).origin()["tensor_types"]
    return max(types, key=types.__getitem__).lower()


def time_runner(runner: LlamaCpp, prompt_len: int, new_tokens: int) -> tuple[float, float]:
    """Seconds that reading a prompt takes, and writing tokens one by one after it; the same random ids for every model."""
    ids = np.random.default_rng(0).integers(3, runner.size, prompt_len + new_tokens).tolist()
    runner.reset()
    start = time.perf_counter()
    runner.decode(ids[:prompt_len], 0, last=True)
    first = time.perf_counter()
    for at in range(prompt_len, len(ids)):
        runner.decode(ids[at : at + 1], at, last=True)
    return first - start, time.perf_counter() - first


def write_page(found: Chat, output: Path) -> None:
    """demo.html and demo.json."""
    data = json.dumps(found.as_dict(), indent=2, default=str) + "\n"
    c, q = found.calibration, found.quality
    text = "its own answers and Python source" if c["own"] else c["source"]
    lead = (
        f"{found.result.params_before / 1e6:.1f} M parameters · {found.method}, keep {found.result.keep:.2f}, target gguf · "
        f"calibrated on {c['n_samples']} × {c['seq_len']} tokens of {text} · measured on {q.model.tokens:,} tokens of "
        f"{found.evaluation}"
    )
    page = render("chat.html", title=f"planish demo · {found.model}", lead=lead, c=found, q=q, r=found.result)
    for name, content in (("demo.html", page), ("demo.json", data)):
        (output / name).write_text(content, encoding="utf-8")
