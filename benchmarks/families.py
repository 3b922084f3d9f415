"""Every family as a tiny random model, through every step and every stack that is installed; docs/tables/families.md.

    python benchmarks/families.py                          # all that docs/tables/families.csv does not hold yet
    python benchmarks/families.py --families olmo2,phi3    # of these alone
    python benchmarks/families.py --again                  # all again
    python benchmarks/families.py --table                  # only the table, from the .csv

The families are those of the package's own table, the models those of its tests. Each family runs in a process of its own that
is ended after `--limit` seconds; what it has found by then is kept, and the next run goes on from there. Steps: compressed with
dense shapes, with any shapes, and to 0.7 of the cache (`auto`, 8 windows of 16 tokens); then, of the first result, 8 greedy
tokens with the cache against 8 without, logits of a process of its own that loads it against these here, and logits in llama.cpp,
ONNX Runtime and vLLM against transformers (fp32, the largest difference as a share of the largest logit). What is refused is
listed in the words of the refusal. Formats: the tests' naive writers and dequantisers; every number must be the same.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import packed_files  # noqa: E402
import tiny  # noqa: E402
import wrapped  # noqa: E402
from planish import load  # noqa: E402
from planish.errors import InputError  # noqa: E402
from planish.export.verify import verify  # noqa: E402

CSV, TABLE = (ROOT / "docs" / "tables" / f"families.{end}" for end in ("csv", "md"))
FIELDS = ("family", "step", "outcome", "figure", "words", "seconds")
STEPS = ("dense shapes", "any shapes", "KV budget", "generate", "save and load", "GGUF", "ONNX", "vLLM")
FORMATS = {
    "FP8 blocks": "fp8 blocks of 128", "FP8 per tensor": "fp8 per tensor", "MXFP4": "ct mxfp4", "NVFP4": "ct nvfp4",
    "INT4 packed": "ct int4", "GPTQ": "gptq", "AWQ": "awq", "bitsandbytes": "bnb nf4",
}  # fmt: skip
NO_WRITER = "the tests' writer of this format does not hold this family's shapes"
SIZES = {  # what the formats' groups divide
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 16,
    "intermediate_size_mlp": 64, "n_inner": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "word_embed_proj_dim": 64, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_value_heads": 8, "shared_intermediate_size": 64, "mamba_d_ssm": 64,
    "mamba_head_dim": 16, "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 64, "d_model": 64, "n_embd": 64,
    "block_auto_adjust_ff_dim": False,
}  # fmt: skip
WIDE = {"hidden_size": 128, "head_dim": 32, "n_embd": 128, "d_model": 128}  # heads that vLLM's attention on a CPU has
WRAPPERS = (
    "gemma3",
    "mistral3",
    "qwen3_vl",
    "qwen3_5",
    "llama4",
)  # read in low precision with a language model in them
LATENT = {
    "hidden_size": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # the same of latent attention
SETTINGS: dict[str, dict[str, Any]] = {  # where the tests' models are made to be harder than those that are released
    "qwen3_moe": {"mlp_only_layers": []}, "qwen2_moe": {"mlp_only_layers": []}, "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": {"topk_method": "greedy", "n_group": None, "topk_group": None}, "nemotron": {"head_dim": 8},
    "ernie4_5": {"use_bias": False}, "falcon": {"bias": False},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4},
    "nemotron_h": tiny._HYBRIDS["nemotron_h_moe"][1]
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_next": {"mlp_only_layers": [], "linear_value_head_dim": 6}, "qwen3_5_text": {"linear_value_head_dim": 6},
    "qwen3_5_moe_text": {"linear_value_head_dim": 6}, "granitemoehybrid": {"mamba_n_groups": 1},
    "llama4_text": {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3], "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1,
    },
    "gpt_oss": tiny._rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 32},
}  # fmt: skip


class NotRun(Exception):
    """A step that this machine, or this program, cannot take."""


def build(name: str, **more: Any) -> Any:
    kind = tiny.configure(name).model_type
    return tiny.build(name, **(SETTINGS.get(kind, {}) | more))


def build_for_formats(name: str) -> Any:
    """A family's model, or a wrapper's, in sizes that groups divide."""
    if name.startswith("in "):
        text = wrapped._ROWS[name.removeprefix("in ")][1]["text_config"]
        return wrapped.build(name.removeprefix("in "), text_config=text | {n: s for n, s in SIZES.items() if n in text})
    stated = tiny.configure(name).to_dict() | SETTINGS.get(tiny.configure(name).model_type, {})
    return build(name, **{n: size for n, size in SIZES.items() if stated.get(n)})


# ------------------------------------------------------------------ steps


def compress(name: str, output: Path, sizes: dict[str, int] | None = None, **options: Any) -> Any:
    windows = tiny.windows(8, 16)
    return tiny.compress(
        build(name, **sizes or {}), output=output, windows=windows, method="auto", overwrite=True, **options
    )


def cut_dense(name: str, folder: Path) -> str:
    return f"keep {compress(name, folder, keep=0.8, settings={'units': 'structural'}).keep:.2f}"


def cut_any(name: str, folder: Path) -> str:
    return f"keep {compress(name, folder.with_name('any'), keep=0.8).keep:.2f}"


def cut_cache(name: str, folder: Path) -> str:
    result = compress(name, folder.with_name("kv"), kv_keep=0.7)
    return f"{result.kv_bytes_per_token_after / result.kv_bytes_per_token_before:.2f} of it"


@torch.no_grad()
def generate(name: str, folder: Path) -> str:
    model, ids = load(folder), tiny.windows(1, 12)
    cached = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 12:].tolist()
    plain = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)[0, 12:].tolist()
    return f"{sum(a == b for a, b in zip(cached, plain, strict=True))} of 8"


@torch.no_grad()
def give_logits(folder: Path, answers: Any) -> None:
    answers.put(load(folder, dtype=torch.float32)(tiny.windows(1, 12)).logits.numpy())


@torch.no_grad()
def save_and_load(name: str, folder: Path) -> str:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    other = context.Process(target=give_logits, args=(folder, answers))
    other.start()
    there = torch.from_numpy(answers.get(timeout=300))
    other.join()
    here = load(folder, dtype=torch.float32)(tiny.windows(1, 12)).logits
    return f"{float((here - there).abs().max() / here.abs().max()):.0e}"


def run_in(target: str) -> Callable[[str, Path], str]:
    def step(name: str, folder: Path) -> str:
        found = verify(folder, target, prompt_len=20, new_tokens=4)
        share = found.max_logit_difference / max(found.max_logit, 1e-30)
        if not found.passed:
            raise AssertionError(f"logits differ by {share:.0e} of the largest")
        return f"{share:.0e}"

    return step


def run_in_vllm(name: str, folder: Path) -> str:
    if importlib.util.find_spec("vllm") is None:
        raise NotRun("verify --target vllm needs vLLM in this environment · see docs/deploy/vllm.md")
    wide, stated = folder.with_name("wide"), tiny.configure(name).to_dict()
    sizes = {n: size for n, size in (LATENT if "kv_lora_rank" in stated else WIDE).items() if stated.get(n)}
    compress(name, wide, sizes, keep=0.8, settings={"units": "structural"})
    return run_in("vllm")(name, wide)


def read_format(form: str) -> Callable[[str, Path], str]:
    """Every number of every tensor that is stored in the format, as the naive dequantiser has it."""

    def step(name: str, folder: Path) -> str:
        place = folder.with_name(form.replace(" ", "_"))
        try:
            model = build_for_formats(name).to(torch.bfloat16)
            weights = packed_files.write(model, FORMATS[form], place)
        except (AttributeError, IndexError, KeyError):
            raise NotRun(NO_WRITER) from None
        found = load(place).state_dict()
        for stored, expected in weights.items():
            if not torch.equal(found[stored], expected.to(found[stored].dtype)):
                raise AssertionError(f"{stored} is read otherwise than it is stored")
        return f"{len(weights)}" if weights else "none"

    return step


WORK: dict[str, Callable[[str, Path], str]] = {
    "dense shapes": cut_dense, "any shapes": cut_any, "KV budget": cut_cache, "generate": generate,
    "save and load": save_and_load, "GGUF": run_in("gguf"), "ONNX": run_in("onnx"), "vLLM": run_in_vllm,
} | {form: read_format(form) for form in FORMATS}  # fmt: skip


# ------------------------------------------------------------------ one family, one process


def work(kind: str, name: str, steps: Iterable[str]) -> None:
    """What comes of the steps goes to the .csv as it comes."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        for step in steps:
            begin = time.monotonic()
            try:
                if step in STEPS[3:-1] and not folder.exists():
                    cut_dense(name, folder)
                outcome, figure, words = "ran", WORK[step](name, folder), ""
            except InputError as error:
                outcome, figure, words = "refused", "", str(error).replace(scratch, "…")
            except NotRun as error:
                outcome, figure, words = "not run", "", str(error)
            except Exception as error:  # what a table of all families is for
                outcome, figure, words = "failed", "", f"{type(error).__name__}: {error}"
            write_row(kind, step, outcome, figure, " ".join(words.split())[:240], time.monotonic() - begin)


def write_row(kind: str, step: str, outcome: str, figure: str, words: str, seconds: float) -> None:
    new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        if new:
            rows.writerow(FIELDS)
        rows.writerow([kind, step, outcome, figure, words, f"{seconds:.1f}"])


def read_rows() -> dict[tuple[str, str], dict[str, str]]:
    """(Family, step) → the last row."""
    if not CSV.exists():
        return {}
    with CSV.open(newline="", encoding="utf-8") as file:
        return {(r["family"], r["step"]): r for r in csv.DictReader(file)}


def run(families: dict[str, str], steps: Iterable[str], limit: float, again: bool) -> None:
    context = multiprocessing.get_context("fork")
    for kind, name in families.items():
        done = read_rows()
        left = [s for s in steps if again or (kind, s) not in done]
        if not left:
            continue
        process = context.Process(target=work, args=(kind, name, left))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode:
            reached = [s for s in left if (kind, s) in read_rows()]
            rest = [s for s in left if s not in reached] or left[-1:]
            why = (
                f"not finished within {limit:.0f} s"
                if process.exitcode == -9
                else f"ended by signal {-process.exitcode}"
            )
            write_row(kind, rest[0], "failed", "", why, limit)
        print(kind, {s: read_rows().get((kind, s), {}).get("outcome") for s in left}, flush=True)


# ------------------------------------------------------------------ the table


def write_table(families: Iterable[str]) -> None:
    rows, notes = read_rows(), dict[str, int]()

    def cell(kind: str, step: str) -> str:
        row = rows.get((kind, step))
        if row is None:
            return "not run"
        if row["outcome"] == "ran":
            return row["figure"] or "yes"
        return f"{row['outcome']} [{notes.setdefault(row['words'], len(notes) + 1)}]"

    def table(steps: Iterable[str], kinds: Iterable[str]) -> list[str]:
        lines = [f"| family | {' | '.join(steps)} |", "|---" * (len(list(steps)) + 1) + "|"]
        return lines + [f"| {k} | " + " | ".join(cell(k, s) for s in steps) + " |" for k in kinds]

    families = [*families]
    first, second = table(STEPS, families), table([*FORMATS], [*families, *(f"in {n}" for n in WRAPPERS)])
    figures = (
        "Figures: kept share of the blocks' weights, and of the cache; greedy tokens that are the same with the cache and "
        "without; the largest difference of a logit as a share of the largest (another process against this one, then each "
        "stack against transformers)."
    )
    command = "Written by `python benchmarks/families.py` from tiny random models of every family."
    text = ["# Families, step by step", "", command, figures, "", *first, "", "## Read in low precision", ""]
    text += [
        "Tensors that are stored in the format and are read as the numbers that it stands for, all of them to the bit; `none`: the "
        "tests' writers store linears, and this family's are in tensors of another kind. *In gemma3*: inside that wrapper.",
        "", *second, "", "## In the tool's own words", "",
    ]  # fmt: skip
    text += [f"{n}. {words}" for words, n in notes.items()]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="names with commas; all by default")
    parser.add_argument("--steps", help="names with commas; all by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one family")
    parser.add_argument("--again", action="store_true", help="run what the .csv holds already")
    parser.add_argument("--table", action="store_true", help="only write the table")
    asked = parser.parse_args()
    models = tiny.name_families()
    asked_for = asked.families.split(",") if asked.families else [*models, *(f"in {n}" for n in WRAPPERS)]
    steps = asked.steps.split(",") if asked.steps else [*WORK]
    if not asked.table:
        run({k: n for k, n in models.items() if k in asked_for}, steps, asked.limit, asked.again)
        inside = {n: n for n in (f"in {w}" for w in WRAPPERS) if n in asked_for}
        run(inside, [s for s in steps if s in FORMATS], asked.limit, asked.again)
    write_table(models)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with suppress(ImportError):  # once, not in every process
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import torch.onnx._internal.exporter._core
    main()
