"""How an option is declared: its help text, bounds and message, and what a flag of the command line needs beside them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from math import inf
from numbers import Integral, Real
from types import UnionType
from typing import Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from planish.errors import InputError

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTES = {"": 1, "B": 1} | {
    p + s: b**n for n, p in enumerate("KMGT", 1) for s, b in (("", 1000), ("B", 1000), ("iB", 1024))
}


def option(
    default: Any, text: str, *, refusal: str = "", bounds: Mapping[str, float] | None = None, **flag: Any
) -> Any:
    """A field with its help text.

    `bounds`: as in pydantic.Field; `refusal` is the message for values beyond them ({value} is what was given). `flag`: what
    the command line needs besides: metavar, shown (the default in words, or False), least, choices, name, type, parser, default.
    """
    return Field(default, description=text, json_schema_extra={"refusal": refusal, "flag": flag}, **(bounds or {}))  # type: ignore[call-overload]


def find_default(field: FieldInfo) -> Any:
    """As in a function's signature."""
    return inspect.Parameter.empty if field.is_required() else field.default


def read_extra(field: FieldInfo, name: str) -> Any:
    """ "refusal" or "flag" of a field that `option` made."""
    return field.json_schema_extra[name] if isinstance(field.json_schema_extra, dict) else {}


def listed(metavar: str, text: str, default: Any = (), **flag: Any) -> Any:
    """Several values, on the command line between commas."""
    return option(default, text, metavar=metavar, type=str, **{"shown": False, **flag})


def read_digits(text: str | int) -> int | str:
    """A flag's number, or the word that it may be."""
    return int(text) if re.fullmatch(r"-?\d+", str(text)) else text


def label(name: str) -> str:
    """kv_keep → kv-keep"""
    return name.replace("_", "-")


def check_number(value: Any, name: str, whole: bool = False) -> None:
    """Texts are no numbers here, and neither are true and false."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise InputError(f"{name} must be a {'whole ' * whole}number, got {value!r}")


def read_size(value: int | float | str, name: str, scale: dict[str, int]) -> int:
    """1500000000, "1.5B" or "800MiB" → a whole number."""
    text = str(value).replace(",", "").replace("_", "").strip()
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([A-Za-z]*)", text)
    units = {u.lower(): n for u, n in scale.items()}
    if match is None or match[2].lower() not in units:
        known = ", ".join(u for u in scale if u)
        raise InputError(f"{name} {value}: expected a number, with one of {known} behind it or none")
    factor = units[match[2].lower()]
    whole = "." not in match[1] and "e" not in match[1].lower()
    number = int(match[1]) * factor if whole else float(match[1]) * factor + 1e-6
    if not 1 <= number < inf:
        raise InputError(f"{name} must be 1 or more and a number, got {value}")
    return int(number)


def size(name: str, scale: dict[str, int]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else read_size(value, label(name), scale))


class Strict(BaseModel):
    """Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def ask(cls, **values: Any) -> Self:
        """From what a user gave in Python or on the command line; None is not given. Raises InputError."""
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            field = cls.model_fields[name]
            kinds = set(get_args(field.annotation)) if isinstance(field.annotation, UnionType) else {field.annotation}
            if kinds & {int, float} and not any(isinstance(m, BeforeValidator) for m in field.metadata):
                check_number(value, label(name), whole=float not in kinds)
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            refusal = read_extra(cls.model_fields[name], "refusal") if name in cls.model_fields else ""
            words = refusal.format(value=first["input"]) or f"{label(name)}: {first['msg']}, got {first['input']!r:.60}"
            raise InputError(words) from None
