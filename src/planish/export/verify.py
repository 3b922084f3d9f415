"""Reload an export where it will run and compare it with the transformers model: logits and greedy tokens."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from planish.errors import InputError
from planish.export.carriers import is_own_code, read_carrier, read_config
from planish.export.llama_cpp import LlamaCpp
from planish.folder.config import is_compressed, load_config, open_config, read_layout
from planish.folder.hub import find_folder
from planish.folder.load import load
from planish.folder.tokenizer import load_tokenizer
from planish.folder.towers import refuse_wrapped
from planish.plan.graphs import TABLED, count_positions, limit_context
from planish.plan.targets import refuse_backend

TARGETS = ("hf", "gguf", "onnx", "vllm")
TOLERANCES = {"hf": 1e-4, "onnx": 1e-4, "gguf": 1e-4, "vllm": 5e-3}  # of the largest logit
GGUF_TOLERANCES = {"0": 1e-4, "1": 5e-3, "32": 2e-2, "7": 5e-2}  # by general.file_type: f32, f16, bf16, q8_0
TABLE = 2e-3  # in fp32, where llama.cpp looks GELU up in a table of half-precision numbers
QUANTISED = 1e-1  # other types: llama.cpp rounds activations to 8 bits as well
ONNX_TOLERANCES = {"tensor(float16)": 5e-3}  # by the type that the graph computes in
MOST, FEW = 0.75, 3  # share of all tokens, and number of those that reach an expert
PROBE = "def main(argv):\n    return 0  # It costs 12.50, isn't it? Über 1000 Ω\n"


@dataclass
class Comparison:
    """What a target computed against transformers, over the same token ids."""

    target: str
    file: str
    tokens: int
    max_logit_difference: float  # largest |difference| of one logit
    mean_logit_difference: float
    max_logit: float  # largest |logit| of the reference: the scale of the differences
    greedy_tokens: int
    greedy_equal: int  # leading greedy tokens that agree
    tokenizer_equal: bool | None  # None: no tokenizer on one side
    tolerance: float
    notes: list[str] = field(default_factory=list)
    # Of `settle`, which counts where llama.cpp rounds what a router reads: a token between two experts then reaches the other one.
    settled_logit_difference: float | None = None
    # Where logits differ by more than the tolerance, and rounding may be why: `planish.export.same_tensors.measure_rounding`.
    tensor_error: float | None = None
    tensor: str = ""

    @property
    def close(self) -> bool:
        """Whether logits differ by no more than the tolerance."""
        settled = self.settled_logit_difference
        found = self.max_logit_difference if settled is None else settled
        return found <= self.tolerance * max(self.max_logit, 1.0)

    @property
    def passed(self) -> bool:
        only_rounded = self.tensor_error is not None and self.tensor_error <= 1
        return (self.close or only_rounded) and self.tokenizer_equal is not False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


class Runner(Protocol):
    """A model in some stack."""

    def logits(self, ids: Tensor) -> Tensor:
        """(tokens, vocabulary) fp32 for ids (tokens,)."""

    def greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        """The next tokens, each the most likely one, with the stack's own cache."""

    def encode(self, text: str) -> list[int] | None:
        """Token ids without special tokens, or None without a tokenizer."""


class Transformers:
    """The reference, and the target "hf"."""

    def __init__(self, model: nn.Module, tokenizer: Any = None):
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids[None], use_cache=False).logits[0].float()

    @torch.no_grad()
    def greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        out = self.model(input_ids=ids[None], use_cache=True)
        tokens = []
        for _ in range(new_tokens):
            tokens.append(int(out.logits[0, -1].argmax()))
            step = torch.tensor([[tokens[-1]]])
            out = self.model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        return tokens

    def encode(self, text: str) -> list[int] | None:
        return None if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False).input_ids


class OnnxRuntime:
    """An ONNX file with past keys and values as inputs and outputs."""

    def __init__(self, file: Path):
        try:
            import onnxruntime
        except ImportError:
            raise InputError("verify --target onnx needs onnxruntime · pip install 'planish[onnx]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's own classes derive from different bases
            raise InputError(f"onnxruntime cannot load {file}: {error}") from None
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_")]
        self.types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        logits = self.session.get_outputs()[0]
        for t in (logits, *self.past):
            if t.type not in self.types:
                raise InputError(
                    f"{file}: {t.name} is a {t.type}, which numpy does not have; verify runs graphs in f32 and f16"
                )
        self.tolerance = ONNX_TOLERANCES.get(logits.type, TOLERANCES["onnx"])

    def run(self, ids: np.ndarray, past: dict[str, np.ndarray] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if past is None:
            past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtype=self.types[i.type]) for i in self.past}
        length = ids.shape[1] + (next(iter(past.values())).shape[2] if past else 0)
        feed = {"input_ids": ids, "attention_mask": np.ones((1, length), dtype=np.int64), **past}
        logits, *present = self.session.run(None, feed)
        return logits, {i.name: p for i, p in zip(self.past, present, strict=True)}

    def logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.run(ids[None].numpy(), None)[0][0].astype(np.float32))

    def greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        logits, past = self.run(ids[None].numpy(), None)
        tokens = []
        for _ in range(new_tokens):
            tokens.append(int(logits[0, -1].argmax()))
            logits, past = self.run(np.array([[tokens[-1]]], dtype=np.int64), past)
        return tokens

    def encode(self, text: str) -> list[int] | None:
        return None


class Vllm:
    """The folder itself in vLLM, without remote code: the plugin that planish installs knows its architectures."""

    def __init__(self, folder: Path, context: int):
        if importlib.util.find_spec("vllm") is None:
            raise InputError("verify --target vllm needs vLLM in this environment · see docs/deploy/vllm.md")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no processes of its own, which write to stdout
        from vllm import LLM, SamplingParams

        own_code = read_carrier(folder) == "deci"
        if own_code and not is_own_code(folder):
            raise InputError(f"{folder} names code that planish did not write; it is not run")
        self.sampling = SamplingParams
        self.engine = LLM(
            model=str(folder),
            trust_remote_code=own_code,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=context,
            enforce_eager=True,
            max_logprobs=-1,
            kv_cache_memory_bytes=2**30 * -(-context // 256),  # its default is nine tenths of the memory
            seed=0,
        )

    def logits(self, ids: Tensor) -> Tensor:
        """Log-probabilities, which equal the logits up to one constant per position; NaN where vLLM reports none."""
        settings = self.sampling(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
        out = self.engine.generate([{"prompt_token_ids": ids.tolist()}], settings, use_tqdm=False)[0]
        size = self.engine.llm_engine.model_config.get_vocab_size()
        rows = torch.full((len(ids), size), float("nan"))
        for n, row in enumerate([*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]):
            for token, value in row.items():
                rows[n, token] = value.logprob
        return rows

    def greedy(self, ids: Tensor, new_tokens: int) -> list[int]:
        settings = self.sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        out = self.engine.generate([{"prompt_token_ids": ids.tolist()}], settings, use_tqdm=False)[0]
        return list(out.outputs[0].token_ids)

    def encode(self, text: str) -> list[int] | None:
        return None


def verify(
    folder: str | Path,
    target: str,
    *,
    file: str | Path | None = None,
    dense_reference: str | Path | None = None,
    prompt_len: int = 48,
    new_tokens: int = 16,
    tolerance: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare a folder in `target` with the same folder in transformers (fp32), on random ids.

    `file`: an existing .gguf or .onnx; without it the folder is exported (fp32) to a temporary one. `dense_reference`:
    compare with this uncompressed model instead; the differences are then what compression changed. `tolerance`: by default
    what the type that the target computes in allows. Where logits of a GGUF file in 8 bits or fewer differ by more, its tensors
    are compared with those of the folder in fp32, and these in llama.cpp with transformers: a file that differs by its types'
    rounding alone passes.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected one of {', '.join(TARGETS)}")
    if file is not None and target not in ("gguf", "onnx"):
        raise InputError(f"verify --target {target} runs the folder itself; --file is for gguf and onnx")
    path = find_folder(folder)
    vocabulary, longest = read_sizes(path, target, dense_reference)
    context = min(longest, prompt_len + new_tokens)
    new_tokens = min(new_tokens, context // 2)
    ids = torch.randint(vocabulary, (context - new_tokens,), generator=torch.Generator().manual_seed(seed))
    other = path if dense_reference is None else find_folder(dense_reference)
    # transformers first: vLLM replaces parts of it in this process
    reference = Transformers(load(other, dtype=torch.float32), load_tokenizer(other))
    with watch_experts(reference.model, other if target == "gguf" else None) as reached:
        want = run(reference, ids, new_tokens)
    del reference
    with tempfile.TemporaryDirectory() as scratch:
        runner, name = open_target(path, target, file, context, Path(scratch))
        got = run(runner, ids, new_tokens)
        usual, routed = getattr(runner, "tolerance", TOLERANCES[target]), getattr(runner, "routed", False)
        del runner
    differences = measure_differences(target, got.logits, want.logits)
    equal = next((n for n, (a, b) in enumerate(zip(got.greedy, want.greedy)) if a != b), new_tokens)
    same = None if got.probe is None or want.probe is None else list(got.probe) == list(want.probe)
    used = usual if tolerance is None else tolerance
    settled = settle((got.logits - want.logits).abs().amax(-1), reached.values()) if routed else None
    found = Comparison(
        target, name, len(ids), *differences, new_tokens, equal, same, used, settled_logit_difference=settled
    )
    rounded = target == "gguf" and file is not None and usual >= GGUF_TOLERANCES["7"]
    if rounded and tolerance is None and dense_reference is None and not found.close:
        found.tensor_error, found.tensor = compare_tensors(path, Path(name), ids, got.logits, want.logits)
    return found


def compare_tensors(path: Path, file: Path, ids: Tensor, given: Tensor, want: Tensor) -> tuple[float, str]:
    """(Error of the worst tensor of a GGUF file, its name) beside the folder's in fp32; infinite where llama.cpp computes other
    logits of those, or the file's own (`given`) differ from those wanted by more than these differ from their mean."""
    from planish.export.same_tensors import measure_rounding

    error, spread = (float((x - x.mean(-1, keepdim=True)).square().mean()) for x in (given - want, want))
    if error > spread:
        return float("inf"), "logits"
    with tempfile.TemporaryDirectory() as scratch:
        runner, exact = open_target(path, "gguf", None, len(ids), Path(scratch))
        usual, got = getattr(runner, "tolerance", TOLERANCES["gguf"]), runner.logits(ids)
        del runner
        largest, _, scale = measure_differences("gguf", got, want)
        if largest > usual * max(scale, 1.0):
            return float("inf"), "logits in fp32"
        return measure_rounding(file, Path(exact))


@contextmanager
def watch_experts(model: nn.Module, folder: Path | None) -> Iterator[dict[str, Tensor]]:
    """For every module of experts of a folder's model which of them (tokens, top) each token reaches in the first run within the
    context; nothing where the stock module is not told."""
    row = read_layout(open_config(load_config(folder))[0])[0].experts if folder else None
    found, hooks = dict[str, Tensor](), []

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, args: Any) -> None:
            if len(args) > 1:
                found.setdefault(name, args[1])

        return see

    for name, module in model.named_modules():
        if row is not None and name.endswith(f".{row.path}"):
            hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def settle(differences: Tensor, reached: Iterable[Tensor]) -> float:
    """Of tokens' differences (tokens,) the largest that no token between two experts explains: `MOST` of all tokens are within it,
    and of every expert that `FEW` or more reach the nearest one."""
    found = [differences.sort().values[ceil(MOST * len(differences)) - 1]]
    for chosen in reached:
        for expert in chosen.unique():
            own = differences[(chosen == expert).any(-1)]
            found += [own.min()] * (len(own) >= FEW)
    return float(max(found))


@dataclass(frozen=True)
class Answers:
    """What a model makes of ids: logits (tokens, vocabulary), the greedy tokens after them; and the ids of `PROBE`."""

    logits: Tensor
    greedy: list[int]
    probe: list[int] | None


def run(runner: Runner, ids: Tensor, new_tokens: int) -> Answers:
    logits, greedy, probe = runner.logits(ids), runner.greedy(ids, new_tokens), None
    with suppress(InputError):
        probe = runner.encode(PROBE)
    return Answers(logits, greedy, probe)


def measure_differences(target: str, got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """(Largest and mean |difference| of one logit, largest |logit| wanted); of vLLM's log-probabilities those it reports."""
    if got.shape != want.shape:
        raise InputError(f"{target} gives logits of shape {tuple(got.shape)}, transformers {tuple(want.shape)}")
    if target == "vllm":
        want = want.log_softmax(-1)
    difference = (got - want).abs()
    difference = difference[~difference.isnan()] if target == "vllm" else difference
    if not torch.isfinite(difference).all():
        raise InputError(f"{target} computes logits that are not finite")
    return float(difference.max()), float(difference.mean()), float(want.abs().max())


def read_sizes(path: Path, target: str, dense_reference: str | Path | None) -> tuple[int, int]:
    """(Vocabulary, positions) of a folder as the target runs it; refuses one with nothing to compare with."""
    carrier = read_carrier(path)
    if carrier == "deci" and (target != "vllm" or dense_reference is None):
        raise InputError(
            "transformers has no class for a DeciLM folder: --target vllm with --dense-reference, the folder it was exported from"
        )
    if carrier is not None:
        config = SimpleNamespace(**read_config(path))
        return config.vocab_size, config.max_position_embeddings
    config, _ = open_config(load_config(path))
    family, _ = read_layout(config)
    if target == "vllm" and is_compressed(config) and (reason := refuse_backend(family)):
        raise InputError(f"{path}: {reason}")
    return config.vocab_size, limit_context(family, config) if target == "gguf" else count_positions(config)


def open_target(path: Path, target: str, file: str | Path | None, context: int, scratch: Path) -> tuple[Runner, str]:
    """The model in its target, exported first where no file is given."""
    if target == "hf":
        if read_carrier(path) == "mimo":
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        else:
            model = load(path, dtype=torch.float32)
        return Transformers(model, load_tokenizer(path)), str(path)
    if target == "vllm":
        if read_carrier(path) is None:
            refuse_wrapped(load_config(path), "what planish runs in vLLM", "stock shapes are served without it")
        return Vllm(path, context), str(path)
    if file is None:
        from planish.export.gguf import export_gguf
        from planish.export.onnx import export_onnx

        file = scratch / f"model.{target}"
        (export_gguf if target == "gguf" else export_onnx)(path, file, dtype="f32")
    elif not Path(file).is_file():
        raise InputError(f"no such file: {file}")
    if target == "onnx":
        return OnnxRuntime(Path(file)), str(file)
    runner = LlamaCpp(Path(file), context)
    kind, graph = runner.metadata("general.file_type") or "0", runner.metadata("general.architecture")
    runner.tolerance = GGUF_TOLERANCES.get(kind, QUANTISED)
    runner.routed = kind not in GGUF_TOLERANCES and runner.metadata(f"{graph}.expert_count") is not None
    if graph in TABLED:
        runner.tolerance = max(runner.tolerance, TABLE)
    return runner, str(file)
