"""What a user may ask of `compress`: every option once, with its type, default, bounds and help text.

The command line's flags, the keywords of `planish.compress`, recipe.yaml and the journal's request.json are views of `Request`.
A recipe is a versioned YAML file, saved beside the weights that it made:

    version: 1
    model: owner/model
    keep: 0.8
    method: flat-llm
    settings: {ridge: 0.01}
    calibration: {source: wikitext2, n_samples: 128, seq_len: 2048, seed: 0, sampling: random}

Relative paths in a recipe start from its own folder, else (as older recipes mean them) from where the command runs. A paper's
recipe adds what was `published` and how. Nothing here imports torch: `planish --help` needs these texts.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from planish.declare import BYTES, COUNTS, Strict, find_default, label, listed, option, read_digits, size
from planish.errors import InputError
from planish.mixture import join_mixture, split_mixture

VERSION = 1  # of recipes
TOGETHER = 2  # budgets that can hold at the same time
SHARES = {
    "keep": "of the blocks' weights", "kv_keep": "of the KV cache", "flops_keep": "of the blocks' FLOPs per token",
}  # fmt: skip
LIMITS = ("keep", "kv_keep", "flops_keep", "max_params", "max_bytes", "max_latency")
NAMED_TEXTS = ("builtin", "wikitext2", "c4")
SOURCE_HELP = "builtin, wikitext2, c4, or a file: .txt, .jsonl (text or messages), .parquet, .npy (token ids)"
MIXTURE_HELP = f"{SOURCE_HELP}; several with weights: c4:0.5,chat.jsonl:0.5"

F = TypeVar("F", bound=Callable[..., Any])
Sampling = Literal["contiguous", "random"]
Bos = Literal["auto", "every", "once", "never"]
Objective = Literal["text", "answers"]
Bits = Annotated[str | None, BeforeValidator(lambda value: None if value is None else str(value))]
BOS_HELP = (
    "where the beginning-of-sequence token stands: every window; once, documents joined (the papers' protocol); never; "
    "auto: every, if the tokenizer puts it in front of a text"
)


def read_step(value: Any) -> int:
    """`round_to`, of which "auto" is 1: ranks are multiples of what the target's kernels like in any case."""
    if value == "auto":
        return 1
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"round-to must be a whole number or auto, got {value!r}")
    return int(value)


def share(name: str, text: str, shown: str | bool = False) -> Any:
    refusal = f"{label(name)} must lie in (0, 1], got {{value:g}} (the share {SHARES[name]} that stays)"
    return option(None, text, refusal=refusal, bounds={"gt": 0, "le": 1}, shown=shown)


def show(name: str, value: float) -> str:
    """A limit as people write it."""
    unit = " ms" if name == "max_latency" else ""
    return f"{value:,.0f}" if name in ("max_params", "max_bytes") else f"{value:g}{unit}"


class Limits(Strict):
    """Budgets, at most two; with none it is keep 0.8. `context`: by default as many tokens as a calibration window has."""

    keep: float | None = share(
        "keep",
        "share of the decoder blocks' linear weights that stays, in (0, 1]",
        shown="0.8 where no other budget is given",
    )
    kv_keep: float | None = share(
        "kv_keep",
        "share of the numbers in the KV cache that stays, in however many bits; alone it cuts only what the cache holds",
    )
    flops_keep: float | None = share(
        "flops_keep", "share of the blocks' FLOPs per token that stays, attention included"
    )
    max_params: Annotated[int | None, size("max_params", COUNTS)] = option(
        None, "parameters of the whole model: 1.5B, 800M, 12345678", metavar="N", shown=False, type=str
    )
    max_bytes: Annotated[int | None, size("max_bytes", BYTES)] = option(
        None, "bytes of the whole model's weight files: 2.5GB, 800MiB", metavar="N", shown=False, type=str
    )
    max_latency: float | None = option(
        None, "milliseconds per decoded token on this machine, batch 1", metavar="MS", shown=False, bounds={"gt": 0},
        refusal="max-latency must be positive, got {value:g} (milliseconds per decoded token)",
    )  # fmt: skip
    context: int | None = option(
        None, "tokens of context that FLOPs, latency and --fit's cache count", least=1,
        shown="a calibration window's; for --fit 4096 or the model's positions",
        bounds={"ge": 1}, refusal="context must be 1 or more, got {value}",
    )  # fmt: skip

    @model_validator(mode="after")
    def check_together(self) -> Self:
        if len(self.given) > TOGETHER:
            names = ", ".join(f"--{label(n)}" for n in self.given)
            raise InputError(f"{names} cannot all hold together: give at most {TOGETHER} budgets")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Name → value of the limits, keep 0.8 where there is none."""
        return {n: v for n in LIMITS if (v := getattr(self, n)) is not None} or {"keep": 0.8}

    @property
    def whole(self) -> bool:
        """Whether nothing is to go, by the budgets alone."""
        return all(n in SHARES and v == 1 for n, v in self.given.items())

    @property
    def limits(self) -> dict[str, Any]:
        """All fields of `Limits` by name."""
        return {n: getattr(self, n) for n in Limits.model_fields}

    def tell(self) -> str:
        """ "0.8" for a keep alone, "kv-keep 0.5 and keep 0.8" otherwise."""
        if set(self.given) == {"keep"}:
            return f"{self.given['keep']:g}"
        return " and ".join(f"{label(n)} {show(n, v)}" for n, v in self.given.items())


class Text(Strict):
    """Where calibration windows come from: `n_samples` of `seq_len` tokens."""

    source: str = option("builtin", MIXTURE_HELP, metavar="SOURCE")
    n_samples: int | None = option(
        None, "calibration windows", shown="128", least=1, bounds={"ge": 1},
        refusal="cannot sample windows · got n_samples {value} · expected 1 or more",
    )  # fmt: skip
    seq_len: int | None = option(
        None, "tokens per window", shown="2048, or the model's positions", least=2, bounds={"ge": 2},
        refusal="windows are too short · got seq_len {value} · expected 2 or more",
    )  # fmt: skip
    seed: int = option(0, "of the random windows", bounds={"ge": 0}, refusal="seed must be 0 or more, got {value}")
    sampling: Sampling | None = option(
        None, "of windows", shown="random; contiguous for token ids",
        refusal="unknown sampling · got {value!r} · expected contiguous or random",
    )  # fmt: skip
    bos: Bos = option("auto", BOS_HELP, refusal="unknown bos · got {value!r} · expected auto, every, once or never")
    objective: Objective = option(
        "text", "whose tokens gradients and losses are of: all; answers: those of an assistant (docs/calibration.md)",
        refusal="unknown objective · got {value!r} · expected text or answers",
    )  # fmt: skip


class Published(Strict):
    """A number from a paper and how it was measured: perplexity of `text` in windows of `seq_len` (`value`), or how many
    times the dense model's it is (`factor`)."""

    paper: str
    where: str
    text: str = "wikitext2"
    seq_len: int = Field(default=2048, ge=2)
    dense: float | None = None
    value: float | None = Field(default=None, gt=0)
    factor: float | None = Field(default=None, gt=0)
    differs: str = ""

    @model_validator(mode="after")
    def check_one(self) -> Published:
        if (self.value is None) == (self.factor is None):
            raise ValueError("give either value or factor")
        return self


class Request(Limits):
    """Everything that `compress` can be told. `settings`: the method's hyper-parameters."""

    version: Literal[1] = 1
    model: str = option(..., "Hugging Face folder, GGUF file or hub id", metavar="MODEL")
    adapter: str | None = option(
        None, "a LoRA adapter's folder, merged into MODEL as it is read", metavar="DIR", shown=False
    )
    method: str | None = option(None, "see `planish methods`", shown="auto")
    settings: Mapping[str, str | float | int | bool | list[str] | None] = option(
        {}, "a hyper-parameter of the method (repeatable)", name="--set", metavar="NAME=VALUE", type=list[str], shown=False
    )  # fmt: skip
    calibration: Text = Text()
    device: str = option("auto", "auto: CUDA where there is one, else the CPU", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = option(
        None, "to compute in", shown="float32 on a CPU, else as stored", choices=("float32", "bfloat16", "float16")
    )
    round_to: Annotated[int, BeforeValidator(read_step)] = option(
        1, "make ranks multiples of this (8, 16, 32, 64 suit hardware), beside the target's own steps; auto: of these alone",
        shown="auto", bounds={"ge": 1}, refusal="round-to must be 1 or more, got {value}", metavar="N", type=str,
        parser=read_digits,
    )  # fmt: skip
    target: str = option(
        "any", "where the result has to run: ranks are chosen to suit it", choices=("any", "hf", "vllm", "gguf", "onnx")
    )
    bits: Bits = option(
        None,
        "round every linear of the blocks, for the target: 8, 4, 3, 2, a mean like 3.4, a type's name, or auto (docs/bits.md)",
        metavar="BITS", shown="16: nothing is rounded; auto where --fit, or --max-bytes for gguf, hf or vllm, gives a size",
    )  # fmt: skip
    fit: Annotated[int | None, size("fit", BYTES)] = option(
        None, "bytes that weights, a KV cache of --context tokens and running may take together; --bits auto",
        metavar="SIZE", shown=False, type=str,
    )  # fmt: skip
    ladder: bool = option(
        True, "beside a size, measure plain rounding to each type of the target (docs/bits.md)",
        name="--ladder/--no-ladder",
    )  # fmt: skip
    head_bits: Bits = option(
        None,
        "of the embedding and the head in files for llama.cpp; of a head of its own in packed folders",
        metavar="BITS",
        shown="8 for --target gguf, else 16",
    )
    published: Published | None = None

    @classmethod
    def ask(cls, **values: Any) -> Self:
        """The text's options stand beside the others: calibration (its source), n_samples, seq_len, seed, sampling."""
        source, dtype = values.pop("calibration", None), values.pop("dtype", None)
        text = {n: values.pop(n) for n in TEXT if n in values}
        if source is not None:
            text["source"] = str(source) if isinstance(source, str | Path) else "ids"
        if dtype is not None:
            values["dtype"] = str(dtype).removeprefix("torch.")
        return super().ask(calibration=Text.ask(**text), **values)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `planish.compress` that repeat a recipe."""
        text = self.calibration.model_dump()
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        names = ("model", "adapter", *Limits.model_fields, "method", *COMPUTED)
        values = {n: getattr(self, n) for n in names} | {"settings": settings, "calibration": text.pop("source")}
        return values | text

    def recipe(self) -> dict[str, Any]:
        """What a recipe says, as plain data; that there is a ladder goes without saying."""
        found = self.model_dump(mode="json", exclude_none=True, exclude={"ladder"} if self.ladder else None)
        return {n: found[n] for n in RECIPE if n in found}

    def text(self) -> str:
        """YAML that `read_recipe` reads back."""
        import yaml

        return yaml.safe_dump(self.recipe(), sort_keys=False, allow_unicode=True)

    def moved(self, change: Callable[[str], str]) -> Request:
        """The same with other names of the model's and the text's files."""
        shares = split_mixture(self.calibration.source)
        text = join_mixture({s if s in NAMED_TEXTS else change(s): w for s, w in shares.items()})
        calibration = self.calibration.model_copy(update={"source": text})
        named = {n: change(v) for n in ("model", "adapter") if (v := getattr(self, n)) is not None}
        return self.model_copy(update={**named, "calibration": calibration})


class Grid(Strict):
    """What a sweep varies and measures, besides the options of a request that hold for all its points."""

    methods: tuple[str, ...] = listed("NAME,…", "methods, with settings as in auto:anchor=0", default=...)
    keeps: tuple[float, ...] = listed(
        "SHARE,…", "shares of the blocks' weights that stay", name="--keep", shown="0.9,0.8,0.7 where no other is given"
    )  # fmt: skip
    kv_keeps: tuple[float, ...] = listed("SHARE,…", "shares of the KV cache that stay", name="--kv-keep")
    flops_keeps: tuple[float, ...] = listed("SHARE,…", "shares of the blocks' FLOPs that stay", name="--flops-keep")
    sizes: tuple[Annotated[int, size("max_bytes", BYTES)], ...] = listed(
        "SIZE,…", "bytes of the files: curves of rounding alone, of cuts in 16 bits, and of both", name="--max-bytes"
    )  # fmt: skip
    eval_text: Any = option(None, SOURCE_HELP, metavar="SOURCE", shown="32,768 tokens from all over builtin", type=str)
    eval_tokens: int | None = option(None, "measure on so many tokens", shown="all", least=2)
    keep_models: Literal["best", "all", "none"] = option(
        "best", "whose weights stay on disk; best: of the best method at every keep", choices=("best", "all", "none")
    )
    bench: bool = option(False, "measure tokens per second too", name="--bench")


TEXT = tuple(Text.model_fields)[1:]  # options of the text besides its source
UNPRICED = tuple(n for n in TEXT if n != "objective")  # of text that is only run
COMPUTED = ("device", "dtype", "round_to", "target", "bits", "head_bits", "fit", "ladder")
RECIPE = (
    "version",
    "model",
    "adapter",
    *Limits.model_fields,
    "method",
    "settings",
    "calibration",
    *COMPUTED,
    "published",
)
OPTIONS: dict[str, FieldInfo] = {  # by the name of their keyword or flag, in the order in which they are shown
    **Limits.model_fields,
    "method": Request.model_fields["method"],
    "calibration": Text.model_fields["source"],
    **{n: Text.model_fields[n] for n in TEXT},
    **{n: Request.model_fields[n] for n in (*COMPUTED, "settings", "adapter")},
}
FIELDS = OPTIONS | Grid.model_fields


def takes(*names: str) -> Callable[[F], F]:
    """Give a function these options (without names: all) as keywords, in the place of its `**options`."""

    def wrap(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        chosen = {n: FIELDS[n] for n in names or OPTIONS}
        more = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=find_default(f), annotation=f.annotation)
            for n, f in chosen.items()
        ]
        whole = signature.replace(parameters=[*own, *more])

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            whole.bind(*args, **given)  # unknown names are errors, as of every function
            return function(*args, **given)

        lines = "\n".join(f"    {n}: {f.description}" for n, f in chosen.items())
        call.__doc__ = f"{function.__doc__ or ''}\n{lines}\n    "
        call.__signature__ = whole  # type: ignore[attr-defined]
        return cast(F, call)

    return wrap


def read_recipe(path: Path) -> Request:
    """A recipe file, or one line that says what is wrong with it."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"recipe {path} is not a mapping of names to values")
    if value.get("version", VERSION) != VERSION:
        raise InputError(f"recipe {path} has version {value['version']!r}; this planish reads version {VERSION}")
    if isinstance(value.get("calibration"), dict):  # recipes of the papers, and those of before there was a choice
        value["calibration"].setdefault("bos", "once")
    try:
        return Request.model_validate(value).moved(lambda name: find_beside(path.parent, name))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        raise InputError(f"recipe {path}: {where}: {first['msg']}, got {repr(first['input'])[:60]}") from None


def find_beside(folder: Path, name: str) -> str:
    """The path that a name in a recipe of this folder stands for; names of no file are left as they are."""
    return str(folder / name) if name and (folder / name).exists() else name


def name_beside(folder: Path, name: str) -> str:
    """What a recipe in this folder calls a file that the running command calls `name`."""
    path = Path(name)
    if not name or path.is_absolute() or not path.exists():
        return name
    found = os.path.relpath(path, folder)  # as written; through links the way back may be another
    return found if os.path.realpath(folder / found) == os.path.realpath(path) else str(path.resolve())
