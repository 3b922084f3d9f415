"""The rules that keep the source readable, checked on its syntax trees. `python tools/measure_house.py` prints the figures."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import measure_house as house
import pytest

import planish

SOURCE = Path(__file__).resolve().parent.parent / "src" / "planish"
MODULES = house.read(SOURCE)
BENCHMARKS = [house.Module(p.name, p) for p in sorted((SOURCE.parent.parent / "benchmarks").glob("*.py"))]
GRAPH = house.imports(MODULES)
FUNCTIONS = {f"{m.name}.{n}": f for m in MODULES.values() for n, f in m.functions().items()}
CLASSES = {f"{m.name}.{n}": c for m in MODULES.values() for n, c in m.classes().items()}

# Rooms from the ground up. Imports point to a lower floor or stay on one; those for type checkers count.
FLOORS = [
    {"errors", "version", "shapes", "declare", "request", "mixture", "durations"},
    {"modelling"},
    {"slices", "stats", "core", "lanes", "apply"},
    {"solvers", "rounding"},
    {"folder"},
    {"calibrate"},
    {"plan"},
    {"walks"},
    {"methods"},
    {"checking", "manifest", "compression", "dry_run"},
    {"export", "evaluate"},
    {"sizes"},
    {"api", "sweep"},
    {"cli", "__init__", "__main__"},
]
TOOLS_OF_SOLVERS = {
    "linalg",
    "noise",
    "selection",
    "pivots",
    "grams",
    "moments",
    "offload",
    "window",
    "forms",
}  # all other solvers know only these
MAY_USE_TRANSFORMERS = {"modelling", "folder", "export"}
FORBIDDEN_FILES = {"utils", "util", "helpers", "helper", "common", "misc"}

# What does not keep to a rule yet. An entry that is no longer needed, or has become larger, fails: lists only get shorter.
UPWARDS: set[tuple[str, str]] = set()
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
MANY_PARAMETERS = {
    "planish.cli.evaluate.evaluate": 9,  # one per flag
    "planish.cli.export.export": 9,
    "planish.evaluate.evaluation.evaluate": 11,  # one per keyword that users write: `planish.evaluate`, and the next two
    "planish.evaluate.speed.bench": 9,
    "planish.export.eora.compensate": 12,
}
MANY_METHODS: dict[str, int] = {}
SOLVERS_ASKED: dict[str, int] = {}
NOTES_READ = {}


PRIVATE = {
    "stacks.py: planish.apply",
    "stacks.py: planish.folder",
    "stacks.py: planish.modelling.blocks",
}  # folders cut by hand


def check(sizes: Mapping[str, int], limit: int, exceptions: Mapping[str, int], what: str) -> None:
    """Every size is within the limit, or within what is noted for its name; every note is needed."""
    over = {n: s for n, s in sizes.items() if s > max(limit, exceptions.get(n, 0))}
    assert not over, f"more than {limit} {what}: {over}"
    idle = {n for n in exceptions if sizes.get(n, 0) <= limit}
    assert not idle, f"within {limit} {what} by now, take them off the list: {sorted(idle)}"


def test_rooms_stand_on_lower_ones():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    unknown = {m.room for m in MODULES.values()} - set(floor)
    assert not unknown, f"give {unknown} a floor in FLOORS"
    pairs = {(MODULES[a].room, MODULES[b].room) for a, others in GRAPH.items() for b in others}
    up = {(a, b) for a, b in pairs if floor[b] > floor[a]}
    assert up - UPWARDS == set(), f"{up - UPWARDS} import from a floor above"
    assert UPWARDS - up == set(), f"{UPWARDS - up} do not any more, take them off the list"


def test_no_import_cycles():
    circles = house.cycles(GRAPH)
    assert not circles, f"import one another: {circles}"


def test_solvers_know_no_other_solver():
    solvers = {n: o for n, o in GRAPH.items() if MODULES[n].room == "solvers"}
    others = {(n, o) for n, found in solvers.items() for o in found & solvers.keys()}
    assert not {(n, o) for n, o in others if o.rpartition(".")[2] not in TOOLS_OF_SOLVERS}


def test_mathematics_says_its_shapes():
    """Every tensor that a function of the solvers and of the statistics takes or gives: Float[Tensor, "out in"]."""
    bare = set()
    for name, function in FUNCTIONS.items():
        args = function.args
        hints = [a.annotation for a in args.posonlyargs + args.args + args.kwonlyargs] + [function.returns]
        if name.startswith(("planish.solvers.", "planish.stats.")) and not name.startswith("planish.solvers.offload."):
            found = {ast.unparse(h) for h in hints if h is not None}
            bare |= {(name, h) for h in found if re.match(r"(tuple\[)?(list\[|Sequence\[)?Tensor\b", h)}
    assert not bare


def test_transformers_stay_at_the_edges():
    users = {m.room for m in MODULES.values() if any(s.split(".")[0] == "transformers" for s in m.sources())}
    assert users <= MAY_USE_TRANSFORMERS


def test_names_say_what_things_are():
    assert not {n for n in MODULES if set(n.split(".")) & FORBIDDEN_FILES}
    names = {n: n.rpartition(".")[2] for n in CLASSES}
    assert not {n for n, name in names.items() if name.startswith("Base") or name.endswith(("Manager", "Factory"))}


def test_files_are_short():
    check({n: m.lines for n, m in MODULES.items()}, 400, LONG_FILES, "lines")


def test_functions_are_short():
    check({n: house.length(f) for n, f in FUNCTIONS.items()}, 60, LONG_FUNCTIONS, "lines")


def test_functions_take_few_parameters():
    check({n: house.parameters(f) for n, f in FUNCTIONS.items()}, 8, MANY_PARAMETERS, "parameters")


def test_classes_are_small():
    check({n: house.public_methods(c) for n, c in CLASSES.items()}, 12, MANY_METHODS, "public methods")


def test_benchmarks_call_what_is_public():
    """`planish.*` and the modules that docs/reference/python.md names beside it."""
    public = re.findall(r"^- `(planish[\w.]*)`", (SOURCE.parent.parent / "docs/reference/python.md").read_text(), re.M)
    assert "planish.solvers" in public
    used = {(b.name, s) for b in BENCHMARKS for s in b.sources() if s.startswith("planish")}
    whole = {f"planish.{n}" for n in planish.__all__} | {"planish"}
    closed = {(b, s) for b, s in used if s not in whole and not any(f"{s}.".startswith(f"{p}.") for p in public)}
    known = {(b, s) for b, s in closed if any(f"{b}: {s}".startswith(p) for p in PRIVATE)}
    assert not closed - known
    assert {p for p in PRIVATE if any(f"{b}: {s}".startswith(p) for b, s in known)} == PRIVATE, (
        "take what is mended off the list"
    )


@pytest.mark.parametrize("program", BENCHMARKS, ids=lambda b: b.name)
def test_what_a_benchmark_imports_is_there(program):
    """Programs that nothing else runs would not be missed."""
    for node in ast.walk(program.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "planish":
            module = importlib.import_module(node.module)
            for name in node.names:
                there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                assert there, f"{node.module} has no {name.name}"


def asks_a_solver(node: ast.AST) -> bool:
    """getattr(solver, …), hasattr(job.solver, …): what a solver is able to do is in its class."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")):
        return False
    return ast.unparse(node.args[0]).rpartition(".")[2].endswith(("solver", "solvers"))


def reads_a_note(node: ast.AST) -> bool:
    """x.notes["…"] read, x.notes.get("…"): notes are for people, code branches on fields."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "notes"
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and ast.unparse(called).endswith(".notes.get")


def count(condition) -> dict[str, int]:
    """Module → how many of its nodes satisfy the condition."""
    return {n: sum(map(condition, ast.walk(m.tree))) for n, m in MODULES.items()}


def test_nobody_asks_what_a_solver_has():
    check(count(asks_a_solver), 0, SOLVERS_ASKED, "getattr or hasattr on a solver")


def test_no_code_reads_notes():
    check(count(reads_a_note), 0, NOTES_READ, "reads of notes")


def test_the_measures():
    """A package of three files, measured by hand."""
    text = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from p.b import B
class A:
    def one(self, x, *, y=1):
        def inner(z, *rest):
            return z
        return inner(x)
    @property
    def two(self): return getattr(self.solver, "x")
    @classmethod
    def _three(cls, a): return cls.notes["a"]
"""
    package = {n: house.Module(n, Path(f"{n}.py")) for n in ("p.a", "p.b", "p.c")}
    for module, source in zip(package.values(), (text, "from .a import A", "import p.b\nimport p.a"), strict=True):
        module.__dict__["text"] = source
    graph = house.imports(package)
    assert graph == {"p.a": {"p.b"}, "p.b": {"p.a"}, "p.c": {"p.a", "p.b"}}
    assert house.cycles(graph) == [{"p.a", "p.b"}] and house.floors(graph) == 2
    functions = package["p.a"].functions()
    assert {n: house.length(f) for n, f in functions.items()} == {
        "A.one": 4,
        "A.one.inner": 2,
        "A.two": 1,
        "A._three": 1,
    }
    assert [house.parameters(f) for f in functions.values()] == [2, 1, 0, 1]
    assert house.public_methods(package["p.a"].classes()["A"]) == 2
    nodes = list(ast.walk(package["p.a"].tree))
    assert sum(map(asks_a_solver, nodes)) == 1 and sum(map(reads_a_note, nodes)) == 1
