"""The rules that keep the source readable, checked on its syntax trees."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src"

# Imports point from later lines to earlier ones or stay on one line.
LAYERS = [
    {"errors", "clock", "linalg", "grams", "version", "processes", "activations", "midway", "offload", "shards"},
    {"stats", "kept", "moments", "families", "core", "edits", "modules", "attentions", "blocks", "modelling"},
    {
        "solvers",
        "allocate",
        "budgets",
        "latency",
        "targets",
        "text",
        "sources",
        "writer",
        "checkpoint",
        "stream",
        "cache",
    },
    {"methods", "submodules"},
    {"job", "solve", "manifest", "compress", "effects", "forecast", "predict", "rehearsal", "recipe"},
    {"evaluate", "export", "report"},
    {"api", "demo", "sweep", "cli", "__init__", "__main__"},
]
MAY_USE_TRANSFORMERS = {
    "families",
    "modules",
    "attentions",
    "blocks",
    "modelling",
    "sources",
    "checkpoint",
    "export",
    "evaluate",
}
FORBIDDEN_FILES = {"utils", "util", "helpers", "helper", "common", "misc"}


def name_of(path: Path) -> str:
    """planish/solvers/__init__.py -> planish.solvers"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    name_of(p): ast.parse(p.read_text(encoding="utf-8"), p.name)
    for p in sorted((ROOT / "planish").rglob("*.py"))
    if "data" not in p.relative_to(ROOT).parts
}

PACKAGES = {  # what a relative import starts from
    name: name if (ROOT / Path(*name.split(".")) / "__init__.py").exists() else name.rpartition(".")[0]
    for name in TREES
}


def part_of(module: str) -> str:
    """planish.solvers.nystrom -> solvers"""
    return (module.split(".") + ["__init__"])[1]


def imports(module: str) -> set[str]:
    """Every module that ``module`` imports, at its top or inside functions; imports for type checkers do not run."""
    found = set()
    checks = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unseen = {id(inner) for check in checks for inner in ast.walk(check)}
    for node in ast.walk(TREES[module]):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(PACKAGES[module].split(".")[: 1 - node.level or None]) if node.level else None
            source = ".".join(filter(None, [parent, node.module]))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else source for name in names}
    return found


GRAPH = {module: {i for i in imports(module) if i in TREES} - {module} for module in TREES}


@pytest.mark.parametrize("module", TREES)
def test_imports_point_one_way(module):
    rank = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    assert part_of(module) in rank, f"give {part_of(module)} a layer in LAYERS"
    for other in GRAPH[module]:
        assert rank[part_of(other)] <= rank[part_of(module)], f"{module} imports {other}, which is a layer above"


def test_no_import_cycles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as e:
        pytest.fail(" imports ".join(reversed(e.args[1])))


@pytest.mark.parametrize("module", [m for m in TREES if m.startswith("planish.solvers.")])
def test_solvers_know_no_other_solver(module):
    others = {i for i in GRAPH[module] if i.startswith("planish.solvers.")}
    assert not others, f"{module} imports {others}"


@pytest.mark.parametrize("module", TREES)
def test_transformers_stay_at_the_edges(module):
    if part_of(module) not in MAY_USE_TRANSFORMERS:
        assert not {i for i in imports(module) if i.split(".")[0] == "transformers"}


@pytest.mark.parametrize("module", TREES)
def test_names_say_what_things_are(module):
    assert not set(module.split(".")) & FORBIDDEN_FILES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ClassDef):
            assert not node.name.startswith("Base"), f"{module}:{node.lineno}: class {node.name}"
            assert not node.name.endswith(("Manager", "Factory")), f"{module}:{node.lineno}: class {node.name}"
