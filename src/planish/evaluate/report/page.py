"""report.html: one page of its own, from results.csv and the manifests beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from planish.errors import InputError
from planish.evaluate.report.points import NAN, Point, read_points
from planish.evaluate.report.sizes import find_curves, find_sizes, find_tiles, read_ladder
from planish.evaluate.report.svg import Mark, Quantity, Series, chart, heat_map, shape
from planish.folder.safetensors import write_text
from planish.request import TEXT, label

HOLDS = {  # unit that spans several linears → those whose weights it holds
    "qk": ("q", "k"), "vo": ("v", "o"), "mlp": ("gate", "up", "down"),
    "attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down"),
}  # fmt: skip
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Results:
    """A sweep's folder, or a compressed one as a sweep of one point."""

    folder: Path
    points: list[Point]
    request: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    drifts: dict[str, list[float]] = field(default_factory=dict)
    ladder: dict[str, Any] = field(default_factory=dict)  # of a folder of one size: `planish.sizes.ladder.Ladder`
    choices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def at_bits(self) -> str:
        """In how many bits the cache is counted, where a manifest says it."""
        return next((f" at {b} bits" for m in self.manifests.values() if (b := m.get("result", {}).get("kv_bits"))), "")

    @property
    def dense(self) -> Point | None:
        return next((p for p in self.points if p.name == "dense"), None)

    @property
    def done(self) -> list[Point]:
        return [p for p in self.points if p.name != "dense" and not p.error]

    @property
    def budgets(self) -> list[str]:
        """What was asked, each once, as in "keep 0.8"; the widest first of every kind."""
        found = {p.asked_text: p.asked for p in self.done}
        return sorted(found, key=lambda text: (list(found[text]), [-v for v in found[text].values()]))

    def at(self, budget: str) -> list[Point]:
        """Points within one budget, the best first."""
        return sorted(
            (p for p in self.done if p.asked_text == budget),
            key=lambda p: (p.perplexity != p.perplexity, p.perplexity),
        )


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a sweep's folder or of one compressed folder; its path."""
    folder = Path(folder)
    path = Path(output) if output else folder / "report.html"
    try:
        page = make_page(read_results(folder))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise InputError(f"cannot report on {folder}: its files are not what planish wrote there ({error!r})") from None
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def read_results(folder: Path) -> Results:
    points = read_points(folder)
    if points:
        found = Results(folder, points, read_json(folder / "sweep.json"))
        for p in points:
            found.manifests[p.name] = read_json(folder / "points" / p.name / "planish.json")
            found.drifts[p.name] = [
                NAN if v is None else v for v in read_json(folder / "points" / p.name / "drift.json").get("blocks", [])
            ]
        return found
    manifest = read_json(folder / "planish.json")
    if not manifest:
        raise InputError(
            f"nothing to report in {folder}: it has neither results.csv (planish sweep) nor planish.json (planish compress)"
        )
    try:
        r, name = manifest["result"], folder.resolve().name
        point = Point(
            name, manifest["method"], "{}", r["keep_requested"], r["keep"], r["params_after"], r["block_params_after"],
            r["kv_bytes_per_token_after"], predicted=manifest["notes"].get("predicted_loss", NAN),
            seconds=r["seconds"]["total"], peak_rss_bytes=r["peak_rss_bytes"], format=r["format"], kept="yes",
            budgets=json.dumps({n: b["asked"] for n, b in r.get("budgets", {}).items()}), bytes=r.get("bytes_after", 0),
            flops_per_token=r.get("flops_per_token_after", 0),
        )  # fmt: skip
        dense = Point("dense", "dense", keep=1.0, params=r["params_before"], block_params=r["block_params_before"],
                      kv_bytes_per_token=r["kv_bytes_per_token_before"], bytes=r.get("bytes_before", 0),
                      flops_per_token=r.get("flops_per_token_before", 0))  # fmt: skip
        request = {"model": manifest["source"], "calibration": manifest["calibration"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {folder / 'planish.json'}: {error!r}") from None
    sizes = {"ladder": read_json(folder / "ladder.json"), "choices": read_json(folder / "choices.json", list)}
    return Results(folder, [dense, point], request, {name: manifest}, **sizes)


def read_json(path: Path, kind: type = dict) -> Any:
    """Empty where there is none of this kind, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


def make_page(r: Results) -> str:
    model = str(r.request.get("model", "")).rstrip("/")
    colours = number_series(r)
    charts, note = find_charts(r, colours)
    columns, rows = find_rows(r)
    return render(
        "report.html", title=f"planish · {model.rsplit('/', 1)[-1] or r.folder.name}", lead=describe_setup(r), colours=colours,
        tiles=find_tiles(r.done) or [find_tile(r, b) for b in r.budgets], charts=charts, charts_note=note, maps=find_maps(r),
        drifts=find_drifts(r, colours), beside=read_ladder(r.ladder, r.choices), columns=columns, rows=rows,
        failed=[p for p in r.points if p.error],
        commands=[f"# {p.label}, {p.asked_text}\n{make_command(r, p)}" for p in r.done],
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A page of its own: style and pictures lie in it. Strings are escaped, `Markup` is not."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, keep_trailing_newline=True
    )
    return pages.get_template(template).render(values, shape=lambda *a: Markup(shape(*a)))


def number_series(r: Results) -> dict[str, int]:
    """Label → colour: the best on average first, places counted within every budget; curves over sizes as they come."""
    if any(p.curve for p in r.done):
        return {label: n for n, label in enumerate(dict.fromkeys(p.label for p in r.done))}
    places: dict[str, list[float]] = {}
    for budget in r.budgets:
        for n, p in enumerate(r.at(budget)):
            places.setdefault(p.label, []).append(n)
    order = sorted(places, key=lambda m: sum(places[m]) / len(places[m]))
    return {label: n for n, label in enumerate(order)}


def describe_setup(r: Results) -> str:
    text, c, e = [], r.request.get("calibration") or {}, r.request.get("evaluation") or {}
    if r.dense and r.dense.params:
        text.append(f"{count(r.dense.params)} parameters")
    if c:
        text.append(f"calibrated on {c.get('n_samples')} × {c.get('seq_len')} tokens of {c.get('source')}")
    if e:
        where = "from all over" if e.get("thinned") else "of"
        text.append(
            f"measured on {e.get('tokens'):,} tokens {where} {e.get('source')} in windows of {e.get('seq_len')}"
        )
    return " · ".join(text)


def find_tile(r: Results, budget: str) -> tuple[str, str, list[str]]:
    """The best method within a budget: heading, figure, lines."""
    best = r.at(budget)[0]
    lines = [f"{count(best.params)} parameters", f"{number(best.kv_bytes_per_token)} KV bytes per token{r.at_bits}"]
    head = f"{budget} · {best.label}"
    if best.perplexity == best.perplexity:
        change = f", {100 * (best.perplexity / r.dense.perplexity - 1):+z.1f} % on dense" if r.dense else ""
        return head, f"{best.perplexity:,.2f}", [f"perplexity{change}", *lines]
    before = r.manifests.get(best.name, {}).get("result", {}).get("kv_bytes_per_token_before")
    lines[-1] += f" (dense {number(before)})" if before else ""
    return head, f"{best.keep:.3f}", [f"of the blocks' weights, asked {best.keep_requested:g}", *lines]


def find_charts(r: Results, colours: dict[str, int]) -> tuple[list[tuple[str, Markup]], str]:
    """Perplexity against everything that a smaller model saves, predictions against measurements; a note on all."""
    measured = [p for p in r.done if p.perplexity == p.perplexity]
    if not measured or not r.dense:
        return [], ""
    dense = r.dense
    if find_sizes(measured):
        return find_curves(measured, dense, colours)
    most = sorted(p.perplexity for p in measured)[int(0.8 * (len(measured) - 1))]
    limit = max(dense.perplexity * 1.02, min(most, 5 * dense.perplexity) * 1.01)

    def series(x: Any, y: Any, more: bool = False) -> list[Series]:
        front = find_front([dense, *measured], x, more)
        marks = {m: [p for p in measured if p.label == m and isfinite(x(p))] for m in colours}
        return [
            Series(m, n, [Mark(x(p), y(p), hover(p), p.name in front) for p in marks[m]]) for m, n in colours.items()
        ]

    def plot(x: Any, name: str, show: Any, more: bool = False) -> str:
        level = (dense.perplexity, f"dense {dense.perplexity:.2f}")
        found = series(x, lambda p: p.perplexity, more)
        return chart(found, Quantity(name, show, log=False), Quantity("perplexity"), level=level, top=limit)

    size = Quantity("parameters of the whole model", count, log=False)
    excess = series(lambda p: p.params, lambda p: p.excess if p.excess > 0 else NAN)
    cards = [
        ("Perplexity and size", plot(lambda p: p.params, size.label, count)),
        ("Loss over dense and size", chart(excess, size, Quantity("log(perplexity / dense), nats", short, log=True))),
        (
            "Perplexity and KV cache",
            plot(lambda p: p.kv_bytes_per_token, f"KV cache{r.at_bits}, bytes per token", number),
        ),
    ]
    if any(isfinite(p.decode_tokens_per_s) for p in measured):
        name = "decoded tokens per second, × dense in turns with it"
        cards.append(("Perplexity and speed", plot(lambda p: p.speedup, name, "{:g}".format, more=True)))
    if known := [p for p in measured if p.predicted > 0 and p.excess > 0]:
        pairs = [
            Series(m, n, [Mark(p.predicted, p.excess, hover(p)) for p in known if p.label == m], joined=False)
            for m, n in colours.items()
        ]
        names = Quantity("predicted loss, nats per token", short), Quantity("measured, log(perplexity / dense)", short)
        cards.append(("Predicted and measured", chart(pairs, *names, diagonal=True)))
    note = "Filled: nothing else is both smaller (or faster) and better. "
    note += "Point at a mark for its values, or reach it by Tab and the arrow keys."
    if off := sum(p.perplexity > limit for p in measured):
        note += f" ↑: perplexity above the picture ({count_points(off)})."
    if below := sum(p.excess <= 0 for p in measured):
        note += f" No worse than dense, so not on logarithmic axes: {count_points(below)}."
    return [(name, Markup(plot)) for name, plot in cards], note


def find_front(points: list[Point], value: Any, more: bool) -> set[str]:
    """Names of points that no other beats in both perplexity and `value`."""

    def beats(a: Point, b: Point) -> bool:
        x, y = (-value(a), -value(b)) if more else (value(a), value(b))
        return x <= y and a.perplexity <= b.perplexity and (x < y or a.perplexity < b.perplexity)

    return {p.name for p in points if not any(beats(q, p) for q in points)}


def find_maps(r: Results) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """By budget, for every method: block × linear, the share of its weights that stays."""
    groups = []
    for budget in r.budgets:
        cut = [p for p in r.at(budget) if p.curve != "bits"]
        shares = [(p.label, *find_shares(r.manifests.get(p.name, {}))) for p in cut]
        if found := [(label, Markup(heat_map(rows, cells))) for label, rows, cells in shares if rows]:
            groups.append((budget, found))
    return groups


def find_shares(manifest: dict[str, Any]) -> tuple[list[str], list[list[tuple[float, str] | None]]]:
    """Roles, and for each its share and a text per block, from a plan. Units that are not planned stay whole."""
    plan, full, weights = (manifest.get(k) or {} for k in ("plan", "full", "weights"))
    units = [u.partition(".") for u in full]
    if not units:
        return [], []
    blocks = 1 + max(int(b) for b, _, _ in units)
    roles = manifest.get("roles") or list(ROLES)
    cells: list[list[tuple[float, str] | None]] = [
        [(1.0, f"block {i}, {r}\nuntouched") for i in range(blocks)] for r in roles
    ]
    for unit, rank in plan.items():
        block, _, name = unit.partition(".")
        before, after = weights.get(unit) or (full.get(unit) or 1, rank)
        share = after / before if before else 1.0
        text = f"block {block}, {name}\nrank {rank} of {full.get(unit)}, {share:.1%} of the weights"
        for role in HOLDS.get(name, (name,)):
            if role in roles and rank != full.get(unit):
                cells[roles.index(role)][int(block)] = (share, text)
    return roles, cells


def find_drifts(r: Results, colours: dict[str, int]) -> list[tuple[str, Markup, list[Point]]]:
    """By budget: the relative squared difference of every block's output, and points whose predictions were compared."""
    groups = []
    for budget in r.budgets:
        series = []
        for p in r.at(budget):
            marks = [
                Mark(i, v, f"{p.label}, block {i}\nrelative squared difference {v:.3g}")
                for i, v in enumerate(r.drifts.get(p.name, []))
                if v > 0
            ]
            series += [Series(p.label, colours[p.label], marks)] if marks else []
        if series:
            block = Quantity("block", lambda v: f"{v:.0f}" if v == int(v) else "", log=False)
            plot = Markup(chart(series, block, Quantity("relative squared difference", short)))
            groups.append((budget, plot, [p for p in r.at(budget) if isfinite(p.kl)]))
    return groups


def find_rows(r: Results) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Headings, and for every point the row's classes, the label and the cells; the best first within every budget."""
    columns: dict[str, Callable[[Point], str]] = {
        "keep": lambda p: f"{p.keep:.4f}",
        "bits": lambda p: p.bits,
        "parameters": lambda p: f"{p.params:,}",
        "bytes": lambda p: f"{p.bytes:,}" if p.curve else "",
        f"KV bytes{r.at_bits}": lambda p: f"{p.kv_bytes_per_token:,}",
        "perplexity": lambda p: digits(p.perplexity, 3),
        "log(ppl / dense)": lambda p: digits(p.excess, 4),
        "predicted": lambda p: short(p.predicted) if isfinite(p.predicted) else "",
        "KL": lambda p: digits(p.kl, 4),
        "tokens/s": lambda p: digits(p.decode_tokens_per_s, 0),
        "× dense": lambda p: digits(p.speedup, 2),
        "seconds": lambda p: digits(p.seconds, 1),
        "weights": lambda p: "" if p.name == "dense" else p.kept or "no",
    }
    groups = ([[r.dense]] if r.dense else []) + [r.at(b) for b in r.budgets]
    rows = []
    for group in groups:
        for n, p in enumerate(group):
            kind = "" if n else "new best" if len(group) > 1 else "new"
            rows.append((kind, p.label, [cell(p) for cell in columns.values()]))
    shown = [n for n in range(len(columns)) if any(cells[n] for _, _, cells in rows)]
    names = [*columns]
    return ["method", *(names[n] for n in shown)], [(k, label, [cells[n] for n in shown]) for k, label, cells in rows]


def make_command(r: Results, p: Point) -> str:
    """What makes a point anew, and measures it."""
    c = r.request.get("calibration") or {}
    e = r.request.get("evaluation") or {}
    manifest = r.manifests.get(p.name, {})
    settings = json.loads(p.settings or "{}") if r.request.get("evaluation") else manifest.get("settings", {})
    words: list[Any] = ["planish", "compress", r.request.get("model", "MODEL"), "--method", p.method]
    for n, v in p.asked.items():
        words += [f"--{label(n)}", f"{v:g}" if abs(v) < 1e6 else f"{v:.0f}"]
    words += ["--bits", p.asked_bits] if p.asked_bits else []
    for k, v in settings.items():
        words += ["--set", f"{k}={v}"]
    step = r.request.get("round_to", manifest.get("round_to", 1))
    flags = {"calibration": c.get("source")} | {n: c.get(n) for n in TEXT}
    flags |= {n: r.request.get(n) or None for n in ("device", "dtype")} | {"round_to": None if step == 1 else step}
    flags |= {"target": r.request.get("target")}
    for name, value in flags.items():
        words += [] if value is None else [f"--{label(name)}", value]
    lines = [shlex.join(map(str, [*words, "-o", p.name]))]
    if e:
        n = e.get("tokens", 0) // max(e.get("seq_len", 1), 1)
        text = [] if e.get("thinned") else ["--text", e.get("source"), "--max-windows", n]
        words = ["eval", p.name, *text, "--seq-len", e.get("seq_len")]
        lines.append(shlex.join(map(str, ["planish", *words])))
    return "\n".join(lines)


def hover(p: Point) -> str:
    lines = [f"{p.label}, keep {p.keep:.3f}", f"perplexity {p.perplexity:,.3f}", f"{count(p.params)} parameters"]
    lines.append(f"{p.kv_bytes_per_token:,} KV bytes per token")
    lines += [f"loss over dense {p.excess:.4f}, predicted {p.predicted:.4f}"] if isfinite(p.predicted) else []
    lines += [f"{p.speedup:.2f} × dense tokens per second"] if isfinite(p.speedup) else []
    return "\n".join(lines)


def count(n: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def count_points(n: int) -> str:
    return f"{n} point{'s' * (n != 1)}"


def number(v: float) -> str:
    return f"{v:,.0f}"


def short(v: float) -> str:
    return f"{v:.3g}" if v == 0 or abs(v) >= 1e-3 else f"{v:.0e}".replace("e-0", "e-")


def digits(v: float, n: int) -> str:
    return "" if v != v else f"{v:,.{n}f}"
