"""The pages of demo, chat demo, sweep and report in a real browser: nothing leaves them, they fit, they can be read and used."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest

import browser
from planish.cli import chat, showcase
from planish.evaluate.agreement import Agreement, Answer
from planish.evaluate.evaluation import Comparison, Evaluation
from planish.evaluate.report.page import write_report
from planish.evaluate.report.points import Point, write_points
from planish.manifest import Result

NAMES = ("demo", "chat", "sweep", "folder")
WIDTHS = (400, 700, 1600)
UNITS = {"qk": (32, 6), "vo": (32, 3), "mlp": (1536, 4)}  # full rank; its weights in units of 10,000
LABELS = [("auto", {}), ("auto", {"anchor": 0, "units": "linear", "refit_share": 0.0625}), ("flat-llm", {}), ("shortgpt", {}),
          ("svd-llm", {}), ("mpifa", {}), ("a3", {}), ("erc-svd", {}), ("modegpt", {}), ("subfit", {})]  # fmt: skip


def make_demo(folder: Path) -> Path:
    """As many methods as there are, ties and far ones among them, and one that was skipped."""
    rows = [
        showcase.Row(f"method-{m}", keep, keep - 0.004, int(6_500_000 * keep), 21.4 + (1 - keep) ** 3 * 1.9**m, 3.2, 6144)
        for keep in (0.8, 0.6, 0.4) for m in range(14)
    ]  # fmt: skip
    rows.append(showcase.Row("late-one", 0.4, skipped="no time left (limit 165 s)"))
    dense = showcase.Row("dense", 1.0, 1.0, 6_500_000, 21.35, kv_bytes_per_token=12288)
    said = {
        "dense": " return f.read().splitlines()\n",
        "method-0, keep 0.60": " for line in f:\n            yield line" * 2,
    }
    text = {"evaluation_tokens": 4096, "calibration_tokens": 2048}
    folder.mkdir()
    showcase.write_files(showcase.Demo("embedded demo model", dense, rows, showcase.PROMPT, said, text), folder)
    return folder / "demo.html"


def make_chat(folder: Path) -> Path:
    result = Result("auto", 0.9, 0.8997, 134_515_008, 123_898_176, 106_168_320, 95_551_488, 46080, 41472, "planish", "out",
                    flops_per_token_before=270_532_608, flops_per_token_after=249_299_456)  # fmt: skip
    sides = [Evaluation(p, log(p), 4088, 8, 512, "float32", "text", True, "once", False) for p in (19.84, 15.05)]
    quality = Comparison(*sides, Agreement(4088, 0.299, 0.008, 2.1, 4.3, 0.748, 0.007))
    answers = [
        Answer(p, "Paris is the capital. " * 9, "x" * 90 + " is the\n\n1. capital", 0.0, 0.12) for p in chat.PROMPTS
    ]
    rates = [
        chat.Rate(*at, 133_488_640, 214.7, 54.2)
        for at in (("transformers", "dense", "float32"), ("llama.cpp", "dense, as given", "q4_1"), ("llama.cpp", "small", "q8_0"))
    ]  # fmt: skip
    used = {"source": "x", "own": True, "n_samples": 16, "seq_len": 256, "temperature": 0.8}
    stages = {"answers to calibrate on": (61.2, 33.1), "compressing": (250.0, 162.4)}
    folder.mkdir()
    chat.write_page(
        chat.Chat(
            "SmolLM2-135M-Instruct.Q4_1",
            "auto",
            used,
            "Python's reference manual",
            result,
            quality,
            answers,
            rates,
            stages,
        ),
        folder,
    )
    return folder / "demo.html"


def make_plan(keep: float, blocks: int) -> dict:
    """What planish.json says of a plan; the later blocks lose more."""
    full = {f"{b}.{u}": rank for b in range(blocks) for u, (rank, _) in UNITS.items()}
    left = {u: round(rank * (1 - (1 - keep) * 2 * int(u.split(".")[0]) / blocks)) for u, rank in full.items()}
    sizes = {u: UNITS[u.split(".")[1]][1] * 10_000 for u in full}
    return {"plan": left, "full": full, "weights": {u: [n, n * left[u] // full[u]] for u, n in sizes.items()}}


def make_sweep(folder: Path) -> Path:
    """Ten methods, of which one fails; twelve blocks, and as many as 30 in one model."""
    points = [Point("dense", "dense", keep=1.0, params=134_515_008, block_params=106_168_320, kv_bytes_per_token=46080,
                    perplexity=1215.05, bytes=538_060_032, flops_per_token=270_532_608)]  # fmt: skip
    for keep in (0.9, 0.5):
        for n, (method, settings) in enumerate(LABELS):
            at = 1215.05 * (1 + (1 - keep) ** 2 * (n + 0.5))
            points.append(
                Point(f"{n}-{keep}", method, json.dumps(settings), keep, keep - 0.0003, int(134_515_008 * keep), 0,
                      int(46080 * keep), at, log(at), log(at / 1215.05), 0.9 * log(at / 1215.05), 0.1, 200, 50 / keep, 50, 12.5)
            )  # fmt: skip
            home = folder / "points" / points[-1].name
            home.mkdir(parents=True)
            (home / "planish.json").write_text(json.dumps(make_plan(keep, 30 if method == "shortgpt" else 12)))
            (home / "drift.json").write_text(json.dumps({"blocks": [1e-5 * (n + 1) * 2**b for b in range(12)]}))
    points.append(
        Point("bad", "broken", error="keep 0.01 is below the smallest that this method can reach here, 0.2345 " * 2)
    )
    write_points(folder, points)
    text = {"source": "/home/somebody/texts/a-long-name-of-a-file-of-text.jsonl", "n_samples": 128, "seq_len": 2048}
    request = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "calibration": text,
        "evaluation": text | {"tokens": 262144},
    }
    (folder / "sweep.json").write_text(json.dumps(request))
    return write_report(folder)


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    result = {"keep_requested": 0.8, "keep": 0.7998, "params_before": 134_515_008, "params_after": 113_281_344,
              "block_params_before": 106_168_320, "block_params_after": 84_934_656, "kv_bytes_per_token_before": 46080,
              "kv_bytes_per_token_after": 36864, "seconds": {"total": 12.0},
              "peak_rss_bytes": 1 << 30, "format": "planish"}  # fmt: skip
    manifest = {"method": "auto", "source": "m", "calibration": {}, "result": result, "notes": {}, **make_plan(0.8, 12)}
    (folder / "planish.json").write_text(json.dumps(manifest))
    return write_report(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    makers = dict(zip(NAMES, (make_demo, make_chat, make_sweep, make_folder), strict=True))
    return {name: make(root / name) for name, make in makers.items()}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def show(tab, pages):
    """``show("demo", width=400)``: the tab, with a page in it; every part of the page is open."""

    def open_page(name: str, width: int = 1300, scheme: str = "light") -> browser.Browser:
        tab.resize(width)
        tab.prefer(scheme)
        tab.open(pages[name])
        tab.driver.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        return tab

    yield open_page
    assert not tab.complaints()


def test_pages_are_made(pages):
    """Also where no browser is: what the others look at can be built, in one file each."""
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_page_asks_for_nothing(name, show, pages):
    tab = show(name)
    assert tab.requests() == [pages[name].as_uri()]
    image = "const i = new Image(); i.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; document.body.append(i)"
    tab.driver.execute_script(image)  # nor could it: its policy forbids even this
    tab.driver.execute_async_script("setTimeout(arguments[0], 0)")
    assert tab.driver.execute_script("return document.images[0].naturalWidth") == 0
    assert all("Content Security Policy" in c for c in tab.complaints())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_sticks_out_or_is_too_small(name, show):
    for width in WIDTHS:
        tab = show(name, width)
        assert not tab.ask("overflows()"), width
        assert not tab.ask("collisions()"), width
        assert not tab.ask("tiny(8.9)"), width


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_stand_out(name, scheme, show):
    tab = show(name, scheme=scheme)
    assert tab.driver.execute_script("return matchMedia(`(prefers-color-scheme: ${arguments[0]})`).matches", scheme)
    assert not tab.ask("pale(4.5)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"), [("demo", 400), ("demo", 1300), ("sweep", 400), ("sweep", 1300), ("folder", 400)]
)
def test_pointing_at_a_mark_shows_its_values(name, width, show):
    tab = show(name, width)
    for picture, n in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        at = tab.ask(f"mark({picture}, {n})")
        tab.point(at["x"] + 3, at["y"])
        tip = tab.ask("tip()")
        assert tip["inside"] and len(tip["text"].split("\n")) > 1
        tab.press("ESCAPE")
        assert not tab.ask("tip()")["text"]
        tab.point(1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "sweep", "folder"])
def test_the_keyboard_reaches_every_mark(name, show):
    """Tab comes to a picture once; the arrows go through it."""
    tab = show(name)
    while tab.ask("where()") < 0:
        tab.press("TAB")
    marks = tab.ask("mark(0, 0)")["of"]

    def go(*keys: str) -> int:
        tab.press(*keys)
        return tab.ask("focused()")

    seen = set[int]()
    at = go("HOME", *["ARROW_UP"] * marks)
    while at not in seen:
        while at not in seen:
            seen.add(at)
            at = go("ARROW_RIGHT")
        tip = tab.ask("tip()")
        assert tip["inside"] and tip["text"].replace("\n", ", ") == tab.ask("label()")
        at = go("HOME", "ARROW_DOWN")
    assert seen == set(range(marks))
    tab.press("ESCAPE")
    assert not tab.ask("tip()")["text"]
    tab.press("TAB")
    assert tab.ask("where()") == (1 if tab.ask("pictures()") > 1 else -1)
