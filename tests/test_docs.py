"""What the documentation shows runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import planish
import tiny
from planish import methods
from planish.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


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
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
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
