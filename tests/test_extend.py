"""The pages of docs/extend are followed: what they add is put into a copy of the source, and used there.

(The page on families is followed in `tests/test_layout.py`.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "extend"
FILES = {"method": 1, "solver": 1, "form": 3, "budget": 2, "target": 2}  # that a page changes or adds
BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```', re.M | re.S)

USE = r"""
import json, sys, tempfile, warnings
from pathlib import Path
import torch, planish, tiny

warnings.simplefilter("ignore")
out, ids, found = Path(tempfile.mkdtemp(dir=sys.argv[1])), tiny.windows(8, 24).flatten(), {}


def compress(name, model, **asked):
    result = planish.compress(model, output=out / name, calibration=ids, n_samples=8, seq_len=24, **asked)
    return result, planish.load(out / name)


llama = tiny.build("llama_gqa")
result, model = compress("method", llama, method="my-method", keep=0.8, settings={"strength": "0.3"})
found["method"] = result.method == "my-method" and 0.7 < result.keep <= 0.8

result, model = compress("solver", llama, method="use-nearest", keep=0.9)
linear = dict(model.named_modules())["model.layers.0.self_attn.o_proj"]
w = llama.model.layers[0].self_attn.o_proj.weight.double()
u, s, v = torch.linalg.svd(w)
best = (u[:, : linear.rank] * s[: linear.rank]) @ v[: linear.rank]
found["solver"] = type(linear).__name__ == "Pair" and torch.allclose(linear.dense().double(), best, atol=1e-5)

result, model = compress("form", llama, method="use-rows", keep=0.9)
linear = dict(model.named_modules())["model.layers.0.self_attn.o_proj"]
kept = w.square().sum(1).topk(linear.rank).indices
same = torch.zeros_like(w)
same[kept] = w[kept]
rows = linear(torch.eye(w.shape[1])).T.double()
saved = sum(p.numel() for n, p in model.named_parameters() if n.endswith("o_proj.P.weight"))
dense = sum(p.numel() for n, p in llama.named_parameters() if n.endswith("proj.weight"))
full = 3 * w.numel()
found["form"] = torch.allclose(rows, same, atol=1e-6) and abs(result.keep - (dense - full + saved) / dense) < 1e-9

result, model = compress("budget", llama, method="a3", scores_keep=0.5)
work = sum(4 * (a.self_attn.q_proj.out_features // 4 + a.self_attn.v_proj.out_features // 2) for a in model.model.layers)
found["budget"] = 0 < work <= 0.5 * 3 * 4 * (8 + 8)

result, model = compress("target", llama, method="flat-llm", keep=0.8, target="toy")
found["target"] = all(layer.mlp.up_proj.out_features in (16, 32, 44) for layer in model.model.layers)
result, model = compress("values", llama, method="palu", kv_keep=0.75, target="toy")
attentions = [layer.self_attn for layer in model.model.layers]
found["target"] &= all(type(a).__name__ == "Attention" and a.k_proj.out_features == 16 for a in attentions)
print(json.dumps({name: bool(good) for name, good in found.items()}))
"""

RECIPE = """
from dataclasses import dataclass
from planish.methods.method import Method
from planish.solvers.{module} import {solver}

@dataclass(frozen=True)
class Use(Method):
    def solvers(self):
        return [{solver}()]
"""

ROWS = """
from dataclasses import dataclass
from planish.core import Edit, Frontier, Solver, Unit, compute_loss_tails

@dataclass(frozen=True)
class Rows(Solver):
    name = "rows"

    def units(self, shape):
        return [Unit(shape.block, "o")]

    def ranks(self, unit, shape):
        return range(1, shape.hidden + 1)

    def spec(self, unit, shape, rank):
        return {"linears": {"o": {"kind": "rows", "rank": rank}}} if rank < shape.hidden else {}

    def taps(self, unit, shape):
        return []

    def decompose(self, unit, weights, stats, shape):
        size, order = weights["o"].double().square().sum(1).sort(descending=True)
        return Frontier(unit, compute_loss_tails(size), {"order": order, "weight": weights["o"]})

    def truncate(self, frontier, rank, shape):
        if rank >= shape.hidden:
            return []
        order, weight = frontier.factors["order"], frontier.factors["weight"]
        return [Edit("o", {"kind": "rows", "rank": rank}, {"P.weight": weight[order[:rank]], "order": order.argsort().int()})]
"""


def follow(page: str, source: Path) -> set[str]:
    """Put a page's code into the copy; the files that it touches."""
    touched = set()
    for language, name, code in BLOCK.findall((PAGES / f"{page}.md").read_text(encoding="utf-8")):
        file = source / Path(name).relative_to("src")
        touched.add(name)
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        if language == "python":
            file.write_text(f"{old}\n\n{code}" if old else code, encoding="utf-8")
            continue
        lines = code.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert old.count(before) == 1, f"{page}.md: {name} has no such lines, or has them twice:\n{before}"
        file.write_text(old.replace(before, after), encoding="utf-8")
    return touched


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, bool]:
    """Page → whether what it adds works, in one process for all pages."""
    place = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for page in FILES:
        follow(page, place / "src")
    folder = place / "src" / "planish"
    (folder / "solvers" / "rows.py").write_text(ROWS)
    for module, solver in (("nearest", "Nearest"), ("rows", "Rows")):
        (folder / "methods" / f"use_{module}.py").write_text(RECIPE.format(module=module, solver=solver))
    path = os.pathsep.join(map(str, (place / "src", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(place)],
        env=os.environ | {"PYTHONPATH": path, "PLANISH_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("page", FILES)
def test_what_a_page_adds_works(page, outcome):
    assert outcome[page]


@pytest.mark.parametrize("page", FILES)
def test_a_page_is_short_and_touches_few_files(page, tmp_path):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert len({name for _, name, _ in BLOCK.findall(text)}) <= FILES[page]
