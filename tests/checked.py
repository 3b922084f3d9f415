"""Every call of a module's functions and dataclasses checked by beartype, shapes by jaxtyping, as `jaxtyping.jaxtyped` does it
but once: that one binds the arguments anew, and checks them a second time beside what is returned."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import beartype
import jaxtyping

NAMES = ("Float[", "Int[", "Inexact[", "Shaped[")
CONTEXT = jaxtyping.jaxtyped("context")  # one call, within which a name is one size
CHECKER = beartype.beartype(
    # an int will do where a float is expected
    conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)


def install(*packages: str) -> None:
    """From here on, whatever is imported of these; shapes are jaxtyping's, which planish itself does not need."""
    sys.modules["planish.shapes"] = jaxtyping
    jaxtyping.jaxtyped = check
    jaxtyping.install_import_hook(packages, None)  # writes `@jaxtyping.jaxtyped(typechecker=...)` everywhere


def check(typechecker: object) -> Callable[[Any], Any]:
    """A decorator of functions, and of classes, of which dataclasses check what they are made from."""
    return lambda thing: wrap_class(thing) if inspect.isclass(thing) else wrap(thing)


def wrap_class(kind: type) -> type:
    if dataclasses.is_dataclass(kind):
        kind.__init__ = wrap(kind.__init__)
    return kind


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    shaped = any(name in str(hint) for hint in function.__annotations__.values() for name in NAMES)
    function.__annotations__ = {name: resolve(function, hint) for name, hint in function.__annotations__.items()}
    checked = CHECKER(function)
    if not shaped:
        return checked

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with CONTEXT:
            return checked(*args, **kwargs)

    return call


def resolve(function: Callable[..., Any], hint: Any) -> Any:
    """What an annotation says; anything where its names are for type checkers alone."""

    def one(value): ...

    one.__annotations__ = {"value": hint}
    try:
        return get_type_hints(one, function.__globals__, include_extras=True)["value"]
    except NameError:
        return Any
