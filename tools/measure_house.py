"""Measure how the source is built: lines, import cycles, functions, parameters, classes, and what rests on what.

`python tools/measure_house.py [FOLDER] [--longest N]` prints the table for a source tree (default: src/planish). The limits
that planish holds itself to are in tests/test_structure.py, which measures by the functions of this file.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of a package. `name` is dotted, the package's own name included."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @cached_property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def room(self) -> str:
        """planish.solvers.neurons → solvers; planish.api → api; planish itself → __init__"""
        return (self.name.split(".") + ["__init__"])[1]

    def sources(self) -> set[str]:
        """Every dotted name that is imported, at the top, inside functions or for type checkers; a name out of a module
        counts as `module.name`."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parent = ".".join(self.package.split(".")[: 1 - node.level or None]) if node.level else ""
                source = ".".join(filter(None, [parent, node.module]))
                found |= {f"{source}.{alias.name}" for alias in node.names}
        return found

    def functions(self) -> dict[str, Function]:
        """Qualified name → definition, nested ones included: `Stream.run`, `Stream.measure.run`."""
        return {name: node for name, node in definitions(self.tree) if not isinstance(node, ast.ClassDef)}

    def classes(self) -> dict[str, ast.ClassDef]:
        return {name: node for name, node in definitions(self.tree) if isinstance(node, ast.ClassDef)}


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Classes and functions below a node, with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield name, node
            yield from definitions(node, f"{name}.")
        else:
            yield from definitions(node, prefix)


def read(root: Path) -> dict[str, Module]:
    """The modules of the package in folder `root`, by dotted name; what lies in folders named data is no source."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if "data" not in parts:
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = Module(name, path)
    return found


def imports(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Which modules of the package each one imports, imports for type checkers included."""
    graph = {}
    for name, module in modules.items():
        sources = module.sources()
        graph[name] = {s if s in modules else s.rpartition(".")[0] for s in sources} & modules.keys() - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import one another, largest first: strongly connected components of two or more."""
    reach = {start: reachable(graph, start) for start in graph}
    groups = {frozenset(o for o in reach[n] if n in reach[o]) for n in graph if n in reach[n]}
    return sorted((set(g) for g in groups), key=lambda g: (-len(g), sorted(g)))


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        if (node := left.pop()) not in seen:
            seen.add(node)
            left += graph[node]
    return seen


def floors(graph: dict[str, set[str]]) -> int:
    """Modules on the longest chain of imports (of a graph without cycles; modules of one cycle count as one)."""
    group = {m: min(c) for c in cycles(graph) for m in c}
    height: dict[str, int] = {}

    def climb(node: str) -> int:
        if node not in height:
            members = [m for m in graph if group.get(m, m) == node]
            below = {group.get(o, o) for m in members for o in graph[m]} - {node}
            height[node] = 1 + max(map(climb, below), default=0)
        return height[node]

    return max((climb(group.get(n, n)) for n in graph), default=0)


def length(function: Function) -> int:
    """Lines from `def` to the end."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters(function: Function) -> int:
    """Named parameters, without self and cls."""
    args = function.args
    names = [a.arg for a in args.posonlyargs + args.args + args.kwonlyargs]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def public_methods(node: ast.ClassDef) -> int:
    """Methods and properties that a class defines under a name without underscore."""
    return len({f.name for f in node.body if isinstance(f, Function) and not f.name.startswith("_")})


def table(modules: dict[str, Module], longest: int) -> list[tuple[str, str]]:
    """(What, figure) rows."""
    graph = imports(modules)
    functions = {f"{m.name}.{n}": f for m in modules.values() for n, f in m.functions().items()}
    classes = {f"{m.name}.{n}": c for m in modules.values() for n, c in m.classes().items()}
    lengths = sorted(length(f) for f in functions.values())
    rooms: dict[str, int] = {}
    for m in modules.values():
        rooms[m.room] = rooms.get(m.room, 0) + m.lines
    circles = cycles(graph)
    tops = [
        ("longest files", {m.name: m.lines for m in modules.values()}),
        ("longest functions", {n: length(f) for n, f in functions.items()}),
        ("most parameters", {n: parameters(f) for n, f in functions.items()}),
        ("most public methods", {n: public_methods(c) for n, c in classes.items()}),
    ]
    rows = [
        ("files, lines", f"{len(modules)}, {sum(rooms.values())}"),
        ("lines by room", ", ".join(f"{r} {n}" for r, n in sorted(rooms.items(), key=lambda x: -x[1]))),
        ("imports, floors", f"{sum(map(len, graph.values()))}, {floors(graph)}"),
        ("largest import cycle", f"{len(circles[0])}: {', '.join(sorted(circles[0]))}" if circles else "none"),
        (
            "function lines: median / p95 / longest",
            f"{statistics.median(lengths):g} / {lengths[int(0.95 * (len(lengths) - 1))]} / {lengths[-1]}",
        ),
    ]
    for what, sizes in tops:
        best = sorted(sizes.items(), key=lambda x: (-x[1], x[0]))[:longest]
        rows.append((what, ", ".join(f"{name.partition('.')[2] or name} {size}" for name, size in best)))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent / "src" / "planish"
    )
    parser.add_argument("--longest", type=int, default=5, help="how many of the largest are named")
    args = parser.parse_args()
    for what, figure in table(read(args.folder), args.longest):
        print(f"{what:40} {figure}")
