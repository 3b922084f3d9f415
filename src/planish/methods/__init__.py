"""Published recipes, one file each: file name = method name ("_" for "-"). Adding a file adds a method everywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from planish.calibrate.measure import Measurements
from planish.calibrate.stream import Awaited, NothingMeasuredError, Stream
from planish.core import Shape
from planish.errors import InputError
from planish.folder.source import Source
from planish.methods.method import Method
from planish.plan.budgets import CacheNumbers
from planish.plan.footprint import cuts_cache
from planish.plan.foreseen import Foreseen, Work, expect_frontiers, survey
from planish.plan.planned import Planned
from planish.plan.problem import Problem, make_problem
from planish.plan.targets import check_plan, needs_uniform
from planish.plan.uniform import make_uniform
from planish.request import Limits, label
from planish.rounding.types import Choice


def list_methods() -> dict[str, type[Method]]:
    """Name → class, sorted by name; aliases are not listed."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        try:
            module = importlib.import_module(f"{__name__}.{info.name}")
        except Exception as error:  # whatever a file that somebody adds may raise
            place = getattr(info.module_finder, "path", "")
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(
                f"the method file {Path(place) / info.name}.py cannot be imported: {what}; mend it"
            ) from error
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Method) and value is not Method:
                found[info.name.replace("_", "-")] = value
    return found


def find_method(name: str | Method, settings: dict[str, Any] | None = None) -> Method:
    """A method by name or alias, with hyper-parameters given as values or strings."""
    if isinstance(name, Method):
        return name
    canonical, cls = find_class(name)
    return cls(**{k: parse(cls, canonical, k, v) for k, v in (settings or {}).items()})


def pose(
    method: Method,
    source: Source,
    asked: Limits,
    *,
    step: int = 1,
    target: str | Choice = "any",
    measured: Mapping[str, float] | None = None,
    length: int = 0,
) -> Problem:
    """What these budgets ask of a method on a model; see `make_problem`. `length`: of a calibration window, the context
    that is counted where none was asked for. Raises InputError where the method cannot do it.
    """
    beside = sorted(set(asked.given) - {"keep"})
    if beside and method.sparsity is not None:
        raise InputError(f"sparsity says how much goes; {label(beside[0])} cannot hold beside it: give one of them")
    asked = asked.model_copy(update={"context": asked.context or length})
    solvers = method.solvers()
    problem = make_problem(
        source, method.name, solvers, asked, step=step, target=target, measured=measured, takes=method.takes
    )
    for n, b in enumerate(problem.budgets):
        bites = isinstance(b, CacheNumbers) and (problem.cache_only or b.share < 1)
        if bites and not any(problem.choices(u).prices(n) for u in problem.units):
            where = f" for {problem.target.name}" if problem.target.refuses else ""
            normed = any(s.qk_norm for s in problem.shapes)
            model = " of this model, which normalises queries and keys" if normed else ""
            found = list_cutting_cache(next((s for s in problem.shapes if s.heads), problem.shapes[0]))
            instead = f"use one of {', '.join(found)}" if found else "no other method does"
            raise InputError(f"--kv-keep: {method.name} cuts neither keys nor values{where}{model}; {instead}")
    return problem


def list_cutting_cache(shape: Shape) -> list[str]:
    """Methods with which the KV cache of such blocks shrinks."""

    def shrinks(method: type[Method]) -> bool:
        with suppress(InputError):  # a method that refuses such blocks
            return any(cuts_cache(s, u, shape) for s in method().solvers() for u in s.units(shape))
        return False

    return [name for name, cls in list_methods().items() if shrinks(cls)]


def foresee_plan(method: Method, problem: Problem, measure: Measurements, windows: int) -> Foreseen:
    """`make_plan` as far as shapes go: the plan itself where they tell it, else what is expected; and what finding it takes.

    The stream of `measure` is to raise `NothingMeasuredError` where it is asked for; `windows`: of the calibration text.
    """
    if leaves_all(method, problem):
        return Foreseen(make_plan(method, problem, measure))
    try:
        planned, work = (method.plan_cache if problem.cache_only else method.plan)(problem, measure), list[Work]()
    except NothingMeasuredError:
        planned, found = method.foresee(problem, windows)
        work = [*found]
    check_plan(problem.target, method.name, planned.ranks)
    if needs_uniform(problem.target, planned.ranks):
        frontiers = expect_frontiers(replace(problem, units=planned.solvers))
        planned = make_uniform(problem, measure, replace(planned, frontiers=frontiers))
        planned = replace(planned, frontiers={})
        work = work or [survey(problem)]
    return Foreseen(planned, work)


def note_objective(method: Method, problem: Problem, measure: Measurements, windows: int) -> list[str]:
    """What there is to say where a method is to price answers alone, and looks at no gradient and no loss."""

    def make() -> Stream:
        raise NothingMeasuredError

    given = measure.given
    unread = Measurements(Awaited(given.source, given.device, given.dtype, given.limits, make, given.products))
    sites = {s for t in problem.taps(problem.units) for s in t.sites}
    if any(s.startswith("grad:") for s in sites):
        return []
    work = foresee_plan(method, problem, unread, windows).work
    if any(w.gradients or w.heads for w in work):
        return []
    return [
        f"objective answers changes nothing: {method.name} prices no tokens, with these settings all count alike for it"
    ]


def make_plan(method: Method, problem: Problem, measure: Measurements) -> Planned:
    """The method's plan within the problem's budgets, with equal ranks in all blocks where the target needs that. Where nothing
    is to go nothing is measured, and not even a direction goes that no input has."""
    if leaves_all(method, problem):
        return method.decide(problem, {}, notes={"predicted_loss": 0.0})
    planned = (method.plan_cache if problem.cache_only else method.plan)(problem, measure)
    check_plan(problem.target, method.name, planned.ranks)
    return make_uniform(problem, measure, planned) if needs_uniform(problem.target, planned.ranks) else planned


def leaves_all(method: Method, problem: Problem) -> bool:
    """Whether nothing is to go of what a method could cut: the uncut model meets all budgets."""
    return all(b.share >= 1 for b in problem.budgets) and bool(problem.units) and method.sparsity is None


def find_class(name: str) -> tuple[str, type[Method]]:
    """The name and the class behind a name or alias."""
    known = list_methods()
    aliases = {a: n for n, cls in known.items() for a in getattr(cls, "aliases", ())}
    canonical = name.lower().replace("_", "-")
    canonical = aliases.get(canonical, canonical)
    if canonical not in known:
        near = get_close_matches(canonical, [*known, *aliases], n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown method {name!r}{hint} (planish methods lists all)")
    return canonical, known[canonical]


def parse(cls: type[Method], method: str, name: str, value: Any) -> Any:
    """One hyper-parameter, converted to its field's type."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{method} has no setting {name!r}{hint} (it has: {', '.join(names) or 'none'})")
    try:
        found = convert(hints[name], value)
        if isinstance(found, int | float) and not 0 <= found < inf:
            raise ValueError("expected a finite number, 0 or more")
        if name in cls.shares and isinstance(found, int | float) and found > 1:
            raise ValueError("expected a share, 0 to 1")
        default = next(f.default for f in fields(cls) if f.name == name)
        if hints[name] is int and found == 0 != default:  # counts; where none makes sense, it is the default
            raise ValueError("expected a whole number, 1 or more")
        return found
    except ValueError as error:
        raise InputError(f"setting {name}={value!r} of {method}: {error}") from None


def convert(hint: Any, value: Any) -> Any:
    """Convert to a type hint: bool, int, float, str, Literal, tuple of str, or a union with None."""
    if not isinstance(value, str):
        try:
            return TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].lower()) from None
    options = get_args(hint)
    if type(None) in options:
        if value.lower() == "none":
            return None
        return convert(next(o for o in options if o is not type(None)), value)
    if hint is bool:
        if value.lower() in ("true", "yes", "1", "on"):
            return True
        if value.lower() in ("false", "no", "0", "off"):
            return False
        raise ValueError("expected true or false")
    if hint in (int, float):
        try:
            return hint(value)
        except ValueError:
            raise ValueError(f"expected {hint.__name__}") from None
    if get_origin(hint) is tuple:
        return tuple(value.split(",")) if value else ()
    if options and hint is not str:
        if value not in options:
            raise ValueError(f"expected one of {', '.join(map(str, options))}")
        return value
    return value
