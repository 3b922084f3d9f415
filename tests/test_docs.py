"""What the documentation shows is so: links lead somewhere, code compiles, commands exist, the examples run."""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import typer

import planish
import tiny
from planish import methods
from planish.cli import app
from planish.errors import InputError
from test_structure import FLOORS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The program that makes pages from the code."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("docs_pages")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def pages(maker) -> dict[str, str]:
    """Path below the root → Markdown, of what is checked in and of what is made."""
    files = [ROOT / "README.md", *DOCS.rglob("*.md")]
    found = {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in files}
    return found | {f"docs/{path}": text for path, text in maker.make_pages().items()}


def find_anchors(text: str, slug) -> set[str]:
    """Anchors of a page: its headings, and its numbered lines where it is a source page."""
    prose = BLOCK.sub("", text)
    anchors = {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)) for h in re.findall(r"^#+ +(.*)$", prose, re.M)}
    return anchors | {f"__codelineno-0-{i + 1}" for i in range(text.count("\n"))}


def test_links_lead_to_a_page_and_a_heading(pages, maker):
    broken = []
    for path, text in pages.items():
        for target in LINK.findall(re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))):
            if re.match(r"https?://|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            name = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
            known = name in pages or (ROOT / name).is_file()
            if not known or (anchor and anchor not in find_anchors(pages[name], maker.slug)):
                broken.append(f"{path}: {target}")
    assert not broken


def test_no_page_is_left_out_of_the_site(pages):
    """Every page is in the navigation, but notes that are part of another page."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    made = ("docs/methods/", "docs/source/", "docs/log/2")
    for path in pages:
        if path.startswith("docs/") and not path.endswith(".notes.md") and not path.startswith(made):
            assert path.removeprefix("docs/") in nav, path


def test_python_blocks_compile(pages):
    for path, text in pages.items():
        for number, (language, code) in enumerate(BLOCK.findall(text)):
            if language == "python" and not path.startswith("docs/source/"):
                compile(code, f"{path}, block {number}", "exec")


def test_names_of_the_source_exist(pages, maker):
    """`planish.…` in a page is a module, or something in one; the log keeps the names of its days."""
    wrong = []
    for path, text in pages.items():
        if path.startswith(("docs/log/2", "docs/source/")):
            continue
        for name in maker.NAME.findall(text):
            place = ROOT / "src" / name.replace(".", "/")
            known = place.is_dir() or place.with_suffix(".py").exists() or maker.locate(name)
            if not known and name.removeprefix("planish.") not in [*planish.__all__, "json"]:  # planish.json: a file
                wrong.append(f"{path}: {name}")
    assert not wrong


def find_commands(text: str) -> list[str]:
    """Lines of a page that call planish, without comments."""
    shown = [line for language, code in BLOCK.findall(text) if language in ("", "bash") for line in joined(code)]
    shown += joined("\n".join(re.findall(r"^    (.*)$", BLOCK.sub("", text), re.M)))
    shown += re.findall(r"`(planish [a-z]+ [^`\n]*)`", BLOCK.sub("", text))
    if text.startswith("# Choose"):  # its cells are what to add to `planish compress MODEL -o OUT`
        shown += [f"planish compress MODEL -o OUT {flags}" for flags in re.findall(r"`(--[a-z].*?)`", text)]
    return [line.partition(" #")[0].strip() for line in shown if re.match(r"\s*planish [a-z]", line)]


def joined(code: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", code).splitlines()


def test_tests_that_pages_name_exist(pages):
    """`tests/test_x.py::test_y` in a page is a test of that file."""
    named = {m for text in pages.values() for m in re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", text)}
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_commands_parse(pages):
    """Every line that calls planish is one that the program accepts: commands, options and their values."""
    commands, wrong, seen = typer.main.get_command(app).commands, [], 0
    for path, text in pages.items():
        if path.startswith("docs/source/") or path == "docs/reference/commands.md":
            continue
        for line in find_commands(text):
            words = [re.sub(r"^\[|\]$", "", w) for w in shlex.split(line)[1:]]
            try:
                commands[words[0]].make_context(words[0], words[1:])
            except Exception as error:
                if type(error).__name__ != "MissingParameter":  # prose may name a command by its options alone
                    wrong.append(f"{path}: {line}: {type(error).__name__} {error}")
            seen += 1
    assert not wrong
    assert seen > 40


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Add a method's file for one test."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])

    def write(name: str, text: str) -> Path:
        monkeypatch.delitem(sys.modules, f"planish.methods.{name}", raising=False)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        return folder / f"{name}.py"

    yield write
    for path in folder.glob("*.py"):
        sys.modules.pop(f"planish.methods.{path.stem}", None)


def test_the_example_of_a_method_runs(add, tmp_path):
    page = (ROOT / "docs" / "extend" / "method.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python[^\n]*\n(.*?)```", page, re.DOTALL)
    add("my_method", example)
    assert "my-method" in methods.list_methods()
    ids = tiny.windows(16, 24).flatten()

    for strength in ("0", "0.9"):
        result = planish.compress(
            tiny.build("llama_gqa"), output=tmp_path / strength, keep=0.8, method="my-method", calibration=ids,
            n_samples=16, seq_len=24, settings={"strength": strength},
        )  # fmt: skip
        assert result.method == "my-method" and 0.7 < result.keep <= 0.8
    with pytest.raises(InputError, match=r"my-method.*a share, 0 to 1"):
        methods.find_method("my-method", {"strength": "1.5"})


@pytest.mark.parametrize("text", ["import nothing_of_this_name\n", "def (:\n", "raise RuntimeError('two\\nlines')\n"])
def test_a_method_file_that_cannot_be_imported_is_named(add, run, text):
    path = add("broken", text)
    done = run("methods")
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and len(lines) == 1, done.output
    assert str(path) in lines[0] and "cannot be imported" in lines[0]


@pytest.mark.parametrize("name", methods.list_methods())
def test_every_method_states_problem_equation_and_settings(name, maker):
    """Its page has them from the docstring, and what the docstring names exists in the source."""
    cls = methods.list_methods()[name]
    doc, names = inspect.getdoc(cls), [f.name for f in fields(cls)]
    sections, settings = maker.split_doc(doc, names)
    assert sections["Problem"] and sections["Equation"] and set(settings) == set(names)
    for found in maker.NAME.findall(doc):
        assert maker.locate(found), f"{name}: no {found}"


def test_the_drawing_of_the_rooms_is_of_this_house():
    """From top to bottom, as `test_structure` holds imports to it."""
    drawing = (DOCS / "drawings" / "rooms.svg").read_text(encoding="utf-8")
    boxes = [text.split(" · ") for text in re.findall(r'font-weight="600"[^>]*>([^<]*)<', drawing)]
    floors = [next(i for i, floor in enumerate(FLOORS) if floor & set(box)) for box in boxes]
    assert floors == sorted(floors, reverse=True)
    assert all(set(box) <= FLOORS[floor] for box, floor in zip(boxes, floors, strict=True))
    folders = {p.name for p in (ROOT / "src" / "planish").iterdir() if (p / "__init__.py").exists()}
    assert folders <= {name for box in boxes for name in box}
