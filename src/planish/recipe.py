"""Recipes: everything that `compress` can be told, as a versioned YAML file; saved beside the weights it made.

    version: 1
    model: owner/model
    keep: 0.8
    method: flat-llm
    settings: {ridge: 0.01}
    calibration: {source: wikitext2, n_samples: 128, seq_len: 2048, seed: 0, sampling: random}

Paths in a recipe are relative to where the command runs. A paper's recipe adds what was `published` and how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planish.errors import InputError
from planish.plan.budgets import LIMITS

VERSION = 1


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Text(Strict):
    """Where calibration windows come from."""

    source: str = "builtin"
    n_samples: int | None = Field(default=None, ge=1)
    seq_len: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    sampling: Literal["contiguous", "random"] | None = None


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


class Recipe(Strict):
    version: Literal[1] = 1
    model: str
    keep: float | None = Field(default=None, gt=0, le=1)  # 0.8 where no budget is given
    kv_keep: float | None = Field(default=None, gt=0, le=1)
    flops_keep: float | None = Field(default=None, gt=0, le=1)
    max_params: int | str | None = None
    max_bytes: int | str | None = None
    max_latency: float | None = Field(default=None, gt=0)
    context: int | None = Field(default=None, ge=1)
    method: str | None = None
    settings: dict[str, str | float | int | bool | list[str] | None] = {}
    calibration: Text = Text()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: str | None = None
    round_to: int = Field(default=1, ge=1)
    target: str = "any"
    published: Published | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `planish.compress`."""
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        names = ("model", *LIMITS, "context", "method", "device", "dtype", "round_to", "target")
        values = {n: getattr(self, n) for n in names}
        text = self.calibration
        chosen = {n: getattr(text, n) for n in ("n_samples", "seq_len", "seed", "sampling")}
        return values | chosen | {"settings": settings, "calibration": text.source}

    def text(self) -> str:
        """YAML that `read_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> Recipe:
    """A recipe file, or one line that says what is wrong with it."""
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
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        got = repr(first["input"])[:60]
        raise InputError(f"recipe {path}: {where}: {first['msg']}, got {got}") from None


def find_papers() -> dict[str, Path]:
    """Name → file of the papers' recipes."""
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes"):
        if (folder / "papers").is_dir():
            return {p.stem: p for p in sorted((folder / "papers").glob("*.yaml"))}
    return {}
