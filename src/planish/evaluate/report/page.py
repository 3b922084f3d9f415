"""report.html: one page of its own, from results.csv and the manifests beside it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from planish.errors import InputError
from planish.evaluate.report.points import NAN, Point, read_points
from planish.evaluate.report.svg import COLOURS, Mark, Series, chart, heat_map, shape
from planish.folder.safetensors import write_text

HOLDS = {  # unit that spans several linears → those whose weights it holds
    "qk": ("q", "k"), "vo": ("v", "o"), "mlp": ("gate", "up", "down"),
    "attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down"),
}  # fmt: skip
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Results:
    """A sweep's folder, or a compressed one as a sweep of one point."""

    folder: Path
    points: list[Point]
    request: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    drifts: dict[str, list[float]] = field(default_factory=dict)

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
    return Results(folder, [dense, point], request, {name: manifest})


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def make_page(r: Results) -> str:
    model = str(r.request.get("model", "")).rstrip("/")
    title = f"planish · {model.rsplit('/', 1)[-1] or r.folder.name}"
    colours = number_series(r)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(describe_setup(r))}</p>',
        make_tiles(r),
        make_charts(r, colours),
        make_heat_maps(r),
        make_drifts(r, colours),
        make_table(r, colours),
        make_commands(r),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>\n" + "\n".join(p for p in parts if p) + "\n</main></body></html>\n"
    )


def number_series(r: Results) -> dict[str, int]:
    """Label → colour: the best on average first, places counted within every budget."""
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
        text.append(f"measured on {e.get('tokens'):,} tokens of {e.get('source')} in windows of {e.get('seq_len')}")
    return " · ".join(text)


def make_tiles(r: Results) -> str:
    """The best method within every budget."""
    tiles = []
    for budget in r.budgets:
        best = r.at(budget)[0]
        manifest = r.manifests.get(best.name, {}).get("result", {})
        lines = [f"{count(best.params)} parameters", f"{number(best.kv_bytes_per_token)} KV bytes per token"]
        if best.perplexity == best.perplexity:
            main = f"{best.perplexity:.2f}"
            lines.insert(
                0,
                f"perplexity, {100 * (best.perplexity / r.dense.perplexity - 1):+z.1f} % on dense"
                if r.dense
                else "perplexity",
            )
        else:
            main = f"{best.keep:.3f}"
            lines.insert(0, f"of the blocks' weights, asked {best.keep_requested:g}")
            before = manifest.get("kv_bytes_per_token_before")
            lines[-1] += f" (dense {number(before)})" if before else ""
        small = "".join(f"<span>{escape(line)}</span>" for line in lines)
        head = f"{budget} · {best.label}"
        tiles.append(f'<div class="tile"><b>{escape(head)}</b><strong>{main}</strong>{small}</div>')
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def make_charts(r: Results, colours: dict[str, int]) -> str:
    """Perplexity against everything that a smaller model saves; predictions against measurements."""
    measured = [p for p in r.done if p.perplexity == p.perplexity]
    if not measured or not r.dense:
        return ""
    dense = r.dense
    most = sorted(p.perplexity for p in measured)[int(0.8 * (len(measured) - 1))]
    limit = max(dense.perplexity * 1.02, min(most, 5 * dense.perplexity) * 1.01)

    def series(x: Any, y: Any, more: bool = False) -> list[Series]:
        front = find_front([dense, *measured], x, more)
        found = {label: Series(label, n) for label, n in colours.items()}
        for p in measured:
            if isfinite(x(p)):
                found[p.label].marks.append(Mark(x(p), y(p), hover(p), p.name in front))
        return list(found.values())

    def plot(x: Any, name: str, show: Any, more: bool = False) -> str:
        return chart(
            series(x, lambda p: p.perplexity, more), (name, show), ("perplexity", lambda v: f"{v:g}"),
            level=(dense.perplexity, f"dense {dense.perplexity:.2f}"), log_x=False, top=limit,
        )  # fmt: skip

    size = "parameters of the whole model"
    excess = series(lambda p: p.params, lambda p: p.excess if p.excess > 0 else NAN)
    cards = [
        ("Perplexity and size", plot(lambda p: p.params, size, count)),
        (
            "Loss over dense and size",
            chart(excess, (size, count), ("log(perplexity / dense), nats", short), log_x=False, log_y=True),
        ),
        ("Perplexity and KV cache", plot(lambda p: p.kv_bytes_per_token, "KV cache, bytes per token", number)),
    ]
    if any(isfinite(p.decode_tokens_per_s) for p in measured):
        name = "decoded tokens per second, × dense in turns with it"
        cards.append(("Perplexity and speed", plot(lambda p: p.speedup, name, lambda v: f"{v:g}", more=True)))
    known = [p for p in measured if p.predicted > 0 and p.excess > 0]
    if known:
        pairs = [
            Series(label, n, [Mark(p.predicted, p.excess, hover(p)) for p in known if p.label == label], joined=False)
            for label, n in colours.items()
        ]
        names = (("predicted loss, nats per token", short), ("measured, log(perplexity / dense)", short))
        cards.append(("Predicted and measured", chart(pairs, *names, diagonal=True)))
    body = "".join(f"<figure><figcaption>{escape(name)}</figcaption>{plot}</figure>" for name, plot in cards)
    off = sum(p.perplexity > limit for p in measured)
    note = "Filled: nothing else is both smaller (or faster) and better. Hover for values."
    note += f" ↑: perplexity above the picture ({count_points(off)})." if off else ""
    below = sum(p.excess <= 0 for p in measured)
    note += f" No worse than dense, so not on logarithmic axes: {count_points(below)}." if below else ""
    body = f'{make_legend(colours)}<div class="grid2">{body}</div><p class="note">{note}</p>'
    return f"<section><h2>What it costs</h2>{body}</section>"


def find_front(points: list[Point], value: Any, more: bool) -> set[str]:
    """Names of points that no other beats in both perplexity and `value`."""

    def beats(a: Point, b: Point) -> bool:
        x, y = (-value(a), -value(b)) if more else (value(a), value(b))
        return x <= y and a.perplexity <= b.perplexity and (x < y or a.perplexity < b.perplexity)

    return {p.name for p in points if not any(beats(q, p) for q in points)}


def make_legend(colours: dict[str, int]) -> str:
    chips = []
    for label, n in colours.items():
        mark = f'<svg viewBox="0 0 16 12" width="16" height="12">{shape(8, 6, n)} class="mark"/></svg>'
        chips.append(f'<span style="--c:var(--c{n % COLOURS})">{mark}{escape(label)}</span>')
    return f'<p class="legend">{"".join(chips)}</p>'


def make_heat_maps(r: Results) -> str:
    """Block × linear: the share of its weights that stays."""
    groups = []
    for budget in r.budgets:
        figures = []
        for p in r.at(budget):
            rows, cells = find_shares(r.manifests.get(p.name, {}))
            if rows:
                figures.append(f"<figure><figcaption>{escape(p.label)}</figcaption>{heat_map(rows, cells)}</figure>")
        if figures:
            groups.append((budget, f'<div class="grid2">{"".join(figures)}</div>'))
    if not groups:
        return ""
    note = "Per cent of the weights that stay, per block (across) and linear (down); the darker, the more is gone."
    return f'<section><h2>Where the budget went</h2><p class="note">{note}</p>{fold(groups)}</section>'


def find_shares(manifest: dict[str, Any]) -> tuple[list[str], list[list[tuple[float, str] | None]]]:
    """Roles, and for each its share and a text per block, from a plan. Units that are not planned stay whole."""
    plan, full, weights = (manifest.get(k) or {} for k in ("plan", "full", "weights"))
    units = [u.partition(".") for u in full]
    if not units:
        return [], []
    blocks = 1 + max(int(b) for b, _, _ in units)
    roles = manifest.get("roles") or list(ROLES)
    cells: list[list[tuple[float, str] | None]] = [
        [(1.0, f"block {i}, {r}: untouched") for i in range(blocks)] for r in roles
    ]
    for unit, rank in plan.items():
        block, _, name = unit.partition(".")
        before, after = weights.get(unit) or (full.get(unit) or 1, rank)
        share = after / before if before else 1.0
        text = f"block {block}, {name}: rank {rank} of {full.get(unit)}, {share:.1%} of the weights"
        for role in HOLDS.get(name, (name,)):
            if role in roles and rank != full.get(unit):
                cells[roles.index(role)][int(block)] = (share, text)
    return roles, cells


def make_drifts(r: Results, colours: dict[str, int]) -> str:
    """Relative squared difference of every block's output."""
    groups = []
    for budget in r.budgets:
        series = [
            Series(
                p.label,
                colours[p.label],
                [Mark(i, v, f"{p.label}, block {i}: {v:.3g}") for i, v in enumerate(r.drifts[p.name]) if v > 0],
            )
            for p in r.at(budget)
            if r.drifts.get(p.name)
        ]
        if any(s.marks for s in series):
            plot = chart(
                series,
                ("block", lambda v: f"{v:.0f}" if v == int(v) else ""),
                ("relative squared difference", short),
                log_x=False,
            )
            rows = "".join(
                f'<tr><td><i style="--c:var(--c{colours[p.label] % COLOURS})"></i>{escape(p.label)}<td>{p.kl:.4f}<td>{p.excess:.4f}'
                for p in r.at(budget)
                if isfinite(p.kl)
            )
            table = f"<table><tr><th>method<th>KL to dense, nats<th>log(ppl / dense)</tr>{rows}</table>"
            figures = (("Outputs of the blocks", plot), ("Predictions", table))
            body = "".join(f"<figure><figcaption>{name}</figcaption>{inner}</figure>" for name, inner in figures)
            groups.append((budget, f'<div class="grid2">{body}</div>'))
    if not groups:
        return ""
    note = (
        "|x − x_dense|² / |x_dense|² of every block's output and KL(dense ‖ compressed) of the next token, "
        "on a few windows of the evaluation text."
    )
    return f'<section><h2>Drift</h2><p class="note">{escape(note)}</p>{fold(groups)}</section>'


def fold(groups: list[tuple[str, str]]) -> str:
    """One part per budget; only the middle one is open."""
    opened = len(groups) // 2
    return "".join(
        f"<details{' open' if n == opened else ''}><summary>{escape(budget)}</summary>{body}</details>"
        for n, (budget, body) in enumerate(groups)
    )


def make_table(r: Results, colours: dict[str, int]) -> str:
    speed = any(isfinite(p.decode_tokens_per_s) for p in r.points)
    predicted = any(isfinite(p.predicted) for p in r.done)
    heads = ["method", "keep", "parameters", "KV bytes", "perplexity", "log(ppl / dense)"]
    heads += ["predicted"] if predicted else []
    heads += ["KL", *(["tokens/s", "× dense"] if speed else []), "seconds", "weights"]
    rows = []
    groups = ([[r.dense]] if r.dense else []) + [r.at(b) for b in r.budgets]
    for group in groups:
        for n, p in enumerate(group):
            chip = f'<i style="--c:var(--c{colours[p.label] % COLOURS})"></i>' if p.label in colours else "<i></i>"
            cells = [
                f"{p.keep:.4f}",
                f"{p.params:,}",
                f"{p.kv_bytes_per_token:,}",
                digits(p.perplexity, 3),
                digits(p.excess, 4),
            ]
            cells += [short(p.predicted) if isfinite(p.predicted) else ""] if predicted else []
            cells += [digits(p.kl, 4)]
            if speed:
                cells += [
                    digits(p.decode_tokens_per_s, 0),
                    digits(p.speedup, 2),
                ]
            cells += [digits(p.seconds, 1), "" if p.name == "dense" else p.kept or "no"]
            kind = " ".join((["new"] if n == 0 else []) + (["best"] if n == 0 and len(group) > 1 else []))
            rows.append(
                f'<tr class="{kind}"><td>{chip}{escape(p.label)}' + "".join(f"<td>{escape(c)}" for c in cells) + "</tr>"
            )
    for p in r.points:
        if p.error:
            start = f'<tr class="failed new"><td><i></i>{escape(p.label)}<td>{p.asked_text}'
            rows.append(f'{start}<td colspan="{len(heads) - 2}">{escape(p.error)}</tr>')
    head = "".join(f"<th>{escape(h)}" for h in heads)
    note = "Seconds count compressing alone, with the statistics that earlier points had left."
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f'<section><h2>All points</h2>{table}<p class="note">{note}</p></section>'


def make_commands(r: Results) -> str:
    lines = [f"# {p.label}, {p.asked_text}\n{make_command(r, p)}" for p in r.done]
    if not lines:
        return ""
    body = f"<summary>commands, one point at a time</summary><pre>{escape(chr(10).join(lines))}</pre>"
    return f"<section><h2>The same again</h2><details>{body}</details></section>"


def make_command(r: Results, p: Point) -> str:
    """What makes a point anew, and measures it."""
    c = r.request.get("calibration") or {}
    e = r.request.get("evaluation") or {}
    manifest = r.manifests.get(p.name, {})
    settings = json.loads(p.settings or "{}") if r.request.get("evaluation") else manifest.get("settings", {})
    words: list[Any] = [
        "planish",
        "compress",
        r.request.get("model", "MODEL"),
        "--method",
        p.method,
    ]
    for n, v in p.asked.items():
        words += [f"--{n.replace('_', '-')}", f"{v:g}" if abs(v) < 1e6 else f"{v:.0f}"]
    for k, v in settings.items():
        words += ["--set", f"{k}={v}"]
    for key, option in (
        ("source", "--calibration"),
        ("n_samples", "--n-samples"),
        ("seq_len", "--seq-len"),
        ("seed", "--seed"),
        ("sampling", "--sampling"),
    ):
        if c.get(key) is not None:
            words += [option, c[key]]
    for key, option in (("device", "--device"), ("dtype", "--dtype")):
        if r.request.get(key):
            words += [option, r.request[key]]
    if r.request.get("round_to", manifest.get("round_to", 1)) != 1:
        words += ["--round-to", r.request.get("round_to", manifest.get("round_to"))]
    lines = [shlex.join(map(str, [*words, "-o", p.name]))]
    if e:
        n = e.get("tokens", 0) // max(e.get("seq_len", 1), 1)
        lines.append(
            shlex.join(
                map(
                    str,
                    [
                        "planish",
                        "eval",
                        p.name,
                        "--text",
                        e.get("source"),
                        "--seq-len",
                        e.get("seq_len"),
                        "--max-windows",
                        n,
                    ],
                )
            )
        )
    return "\n".join(lines)


def hover(p: Point) -> str:
    text = f"{p.label}, keep {p.keep:.3f}: perplexity {p.perplexity:.3f}, {count(p.params)} parameters"
    text += f", {p.kv_bytes_per_token:,} KV bytes per token"
    text += f", predicted {p.predicted:.4f}, measured {p.excess:.4f}" if isfinite(p.predicted) else ""
    return text + (f", {p.speedup:.2f} × dense tokens/s" if isfinite(p.speedup) else "")


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
