"""The page, the chart and the README's table of `benchmarks/real.py`, from its csv alone."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path

from real import PHASES, ROOT, TABLE, TASKS, Rows, read

from planish.evaluate.report.svg import Mark, Quantity, Series, chart, stand_alone

README = ROOT / "README.md"
OPENS, CLOSES = "<!-- table of benchmarks/real.py -->", "<!-- end of table -->"
NAMES = {
    "auto": "auto", "auto:structural": "auto, dense shapes only",
    "auto:linear": "auto, low-rank linears only",
    "auto:linear+shuffled=0": "auto, low-rank linears only, no shuffled windows",
    "flat-llm": "FLAT-LLM", "a3": "A3", "modegpt": "MoDeGPT",
    "svd-llm": "SVD-LLM", "erc-svd": "ERC-SVD", "mpifa": "MPIFA", "subfit": "SubFit", "llm-drop": "LLM-Drop",
    "slicegpt": "SliceGPT", "kfac-svd": "KFAC-SVD", "io-svd": "IO-SVD", "cocurve": "CoCurve",
}  # fmt: skip
VARIANTS = ("auto:linear", "auto:linear+shuffled=0")  # in neither the README's table nor the chart
STRUCTURAL = ("flat-llm", "a3", "modegpt", "slicegpt", "llm-drop", "cocurve")  # published, dense shapes only
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4, held out"}
EXACT_KINDS = ("sums", "copying", "forms")
Key = tuple[str, float]  # method, keep


class Found:
    """What was measured of one model with one size of calibration text; of a phase that was measured more than once, what was
    measured last."""

    def __init__(self, rows: Rows, model: str, calibration: str):
        self.model, self.calibration = model, calibration
        size, _, own = calibration.partition(", ")
        self.text = f"{size} tokens" + (f", {own}" if own else "")  # calibrated on
        self.values: dict[Key, dict[str, str]] = {}
        self.protocols: dict[Key, dict[str, str]] = {}  # phase → how it was measured
        self.dense: dict[tuple[str, str], str] = {}  # protocol, quantity → value
        for r in (r for r in rows if r["model"] == model and r["calibration"] in ("", calibration)):
            phase, task = r["phase"].partition(" ")[::2]
            name = f"{task} {r['quantity']}" if task else f"{phase} {r['quantity']}"
            if r["method"] == "dense":
                self.dense[r["protocol"], name] = r["value"]
                continue
            key = r["method"], float(r["keep"])
            self.values.setdefault(key, {})[name] = r["value"]
            self.protocols.setdefault(key, {})[phase] = r["protocol"]

    @property
    def keeps(self) -> list[float]:
        return sorted({k for _, k in self.values}, reverse=True)

    @property
    def methods(self) -> list[str]:
        return [m for m in NAMES if any(n == m for n, _ in self.values)]

    def number(self, key: Key, name: str) -> float | None:
        value = self.values.get(key, {}).get(name)
        return None if value is None else float(value)

    @property
    def usual(self) -> str:
        """How the text of most points was evaluated: perplexities beside one another are of the same windows."""
        found = [p["text"] for p in self.protocols.values() if "text" in p]
        return max(dict.fromkeys(found), key=found.count, default="")

    def beside(self, key: Key, name: str) -> float | None:
        """A value of the text phase, of points that were evaluated as most are."""
        return self.number(key, name) if self.protocols.get(key, {}).get("text") == self.usual else None

    def before(self, key: Key, phase: str, name: str) -> str | None:
        """The dense model's value by the protocol that a point's phase was measured by."""
        return self.dense.get((self.protocols.get(key, {}).get(phase, ""), name))

    def excess(self, key: Key, text: str) -> float | None:
        """Nats per token more than the dense model on the same windows."""
        own, dense = self.number(key, f"text {text} nll"), self.before(key, "text", f"text {text} nll")
        return None if own is None or dense is None else own - float(dense)

    def scores(self, key: Key) -> tuple[float, float, float, float] | None:
        """(Mean accuracy over the tasks, the dense model's, mean share of answers that changed, most that the standard error of
        the difference can be); None where one is missing."""
        found = []
        for task in TASKS:
            acc, answers = (self.values.get(key, {}).get(f"{task} {n}") for n in ("acc", "answers"))
            dense, before = (self.before(key, "tasks", f"{task} {n}") for n in ("acc", "answers"))
            if acc is None or answers is None or dense is None or before is None:
                return None
            changed = sum(a != b for a, b in zip(answers, before, strict=True)) / len(answers)
            found.append((float(acc), float(dense), changed, changed / len(answers)))
        *means, variance = (sum(x) / len(found) for x in zip(*found, strict=True))
        return means[0], means[1], means[2], math.sqrt(variance / len(found))

    def refusal(self, key: Key) -> str | None:
        return self.values.get(key, {}).get("compress refused")

    def level(self, text: str) -> float:
        """Perplexity of the dense model, evaluated as most points are."""
        return float(self.dense[self.usual, f"text {text} perplexity"])


def write_page(table: Path) -> None:
    found = find_all(read(table))
    table.write_text(make_page(found), encoding="utf-8")
    picture = table.parent.parent / "real.svg" if table == TABLE else table.with_suffix(".svg")
    picture.write_text(draw(choose(found)), encoding="utf-8")
    if table == TABLE:
        README.write_text(fill_readme(README.read_text(encoding="utf-8"), found), encoding="utf-8")


def make_page(found: Sequence[Found]) -> str:
    return "\n".join([*HEAD.split("\n"), *(line for m in found for line in section(m))])


def find_all(rows: Rows) -> list[Found]:
    """By model, in the order in which they were measured; each with its largest calibration text first."""
    pairs = dict.fromkeys((r["model"], r["calibration"]) for r in rows if r["calibration"])
    models = [*dict.fromkeys(m for m, _ in pairs)]
    order = sorted(
        pairs, key=lambda p: (models.index(p[0]), -math.prod(int(x) for x in p[1].partition(", ")[0].split(" × ")))
    )
    return [Found(rows, *pair) for pair in order]


def choose(found: Sequence[Found]) -> Found:
    """What the chart shows: of the first model the size of calibration text with which most was measured."""
    return max(
        (m for m in found if m.model == found[0].model),
        key=lambda m: sum("text c4 nll" in v for v in m.values.values()),
    )


HEAD = """# A real language model

Written by `python benchmarks/real.py table` from `docs/tables/real.csv`, which `python benchmarks/real.py` measured. Calibrated
on C4 (two thirds of 300 documents); evaluated on the WikiText-2 test set and on the other third of C4.

- *Keep*: the share of the weights in the model's blocks that stays. *D*: nats per token more than the dense model on the same
  windows, log(perplexity / dense perplexity).
- *KL*: of the dense model's next-token distribution to the compressed one's, nats per token, mean of both texts, and its standard
  error. *Same token*: how often both find the same next token likeliest.
- *Tasks*: mean zero-shot accuracy of six tasks, and the standard error of its difference from the dense model's on the same items,
  counted as if every changed answer were right for wrong or wrong for right, which is at most; *changed*: share of single answers
  that are not the dense model's. *Loops*: repeated 4-grams in greedy answers to chat prompts.
- *Decode*: tokens per second as a multiple of the dense model's in the same turns (transformers, float32, one CPU thread).
- *CPU s*: processor seconds of the whole `planish compress` process, start included, on a machine that did other work; in brackets
  where it used statistics that the same method had measured for another keep. *Memory*: its peak.
- A dash was not measured, or in the first two tables not in the same windows; the letter at the end of a row says in which.

![WikiText-2 perplexity against the share of weights that stays](../real.svg)
"""


def section(m: Found) -> list[str]:
    lines = [f"## {m.model}, calibrated on {m.text}", ""]
    for text, name in TEXTS.items():
        lines += [
            f"### {name}: perplexity in {m.usual} (dense {m.level(text):.2f})",
            "",
            *perplexities(m, text),
            "",
        ]
    letters: dict[str, str] = {}
    for keep in m.keeps:
        lines += [f"### Keep {keep:g}", "", *details(m, keep, letters), ""]
    lines += ["### Protocols", ""]
    lines += [f"- {letter}: {how}" for how, letter in letters.items()]
    if told := [k for k in m.values if m.number(k, "compress loss") is not None]:
        lines += ["", "### What `planish compress` says a result loses", "", *losses(m, told)]
    if asked := [k for k, p in m.protocols.items() if "exact" in p]:
        lines += ["", "### Answers that are right or wrong", "", *rights(m, asked)]
    if scored := [k for k in m.values if m.scores(k)]:
        lines += ["", "### Accuracies", "", *accuracies(m, scored)]
    return [*lines, ""]


def perplexities(m: Found, text: str, short: bool = False) -> list[str]:
    """Methods down, keeps across, and how auto stands against the best published one. `short`: as in the README."""
    table = {n: [m.beside((n, k), f"text {text} perplexity") for k in m.keeps] for n in m.methods}
    lines = ["| method | " + " | ".join(f"keep {k:g}" for k in m.keeps) + " |", "|---" * (len(m.keeps) + 1) + "|"]
    for method, found in table.items():
        if not any(found) or (short and method in VARIANTS):
            continue
        mark = "**" if short and method == "auto" else ""
        cells = ["–" if x is None else f"{mark}{shown(x)}{mark}" for x in found]
        lines.append(f"| {mark}{NAMES[method]}{mark} | " + " | ".join(cells) + " |")
    published = [n for n in NAMES if not n.startswith("auto")]
    for name, rivals in [("auto", published), ("auto:structural", STRUCTURAL)][: 1 if short else 2]:
        ratios = [compare(m, name, rivals, k, text) for k in m.keeps]
        if any(ratios):
            kind = "published one here" if name == "auto" else "published one with dense shapes"
            label = f"*D of {NAMES[name]} / least D of a {kind}*"
            lines.append(f"| {label} | " + " | ".join(r or "–" for r in ratios) + " |")
    return lines


def shown(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:,.0f}"


def compare(m: Found, mine: str, rivals: Sequence[str], keep: float, text: str) -> str:
    found = {
        n: d for n in (mine, *rivals) if (d := m.excess((n, keep), text)) and m.beside((n, keep), f"text {text} nll")
    }
    own, others = found.pop(mine, None), {n: d for n, d in found.items() if d > 0}
    if own is None or not others:
        return ""
    best = min(others, key=lambda r: others[r])
    return f"{own / others[best]:.2f} ({NAMES[best]})"


def details(m: Found, keep: float, letters: dict[str, str]) -> list[str]:
    """A row per method with all that was measured, and the letter of how."""
    columns = (
        "method | kept | WikiText-2 | D | C4 | D | KL | same token | tasks | changed | loops | decode | CPU s | memory"
    )
    lines = [f"| {columns} | protocol |", "|---" * 15 + "|"]
    refused = []
    for method in m.methods:
        key = method, keep
        if why := m.refusal(key):
            refused.append(f"{NAMES[method]} at {keep:g}: {why}")
        elif m.number(key, "text wikitext2 perplexity") is not None:
            lines.append(
                f"| {NAMES[method]} | " + " | ".join(list_cells(m, key)) + f" | {list_letters(m, key, letters)} |"
            )
    best = [d for x in m.values if x[1] == keep and (d := m.scores(x))]
    if best:
        lines.append(f"| *dense* |{' |' * 7} {100 * best[0][1]:.1f} % |{' |' * 6}")
    return lines + [line for why in refused for line in ("", f"– {why}")]


def list_cells(m: Found, key: Key) -> list[str]:
    def cell(value: float | None, form: str = "{:.3f}") -> str:
        return "–" if value is None else form.format(value)

    def mean(names: Sequence[str]) -> float | None:
        found = [x for n in names if (x := m.number(key, n)) is not None]
        return sum(found) / len(found) if found else None

    cells = [cell(m.number(key, "compress counted"))]
    for text in TEXTS:
        p = m.number(key, f"text {text} perplexity")
        cells += ["–" if p is None else shown(p), cell(m.excess(key, text))]
    same = mean([f"agreement {t} top1" for t in TEXTS])
    noise = [m.number(key, f"agreement {t} kl_stderr") or 0.0 for t in TEXTS]
    kl = cell(mean([f"agreement {t} kl" for t in TEXTS])) + (f" ± {math.hypot(*noise) / 2:.3f}" if any(noise) else "")
    cells += [kl, cell(same and 100 * same, "{:.1f} %")]
    scores = m.scores(key)
    cells += [f"{100 * scores[0]:.1f} ± {100 * scores[3]:.1f} %", f"{100 * scores[2]:.1f} %"] if scores else ["–", "–"]
    loops = m.number(key, "answers repeated")
    cells.append(cell(None if loops is None else 100 * loops, "{:.1f} %"))
    rates = [m.number(key, f"speed {n}decode_tokens_per_s") for n in ("", "dense ")]
    cells.append(f"× {rates[0] / rates[1]:.2f}" if rates[0] and rates[1] else "–")
    seconds, peak = m.number(key, "compress cpu_seconds"), m.number(key, "compress peak_rss_bytes")
    cells.append(cell(seconds, "({:.0f})" if m.number(key, "compress reused") else "{:.0f}"))
    return [*cells, cell(peak and peak / 1e9, "{:.2f} GB")]


def list_letters(m: Found, key: Key, letters: dict[str, str]) -> str:
    """The letter of the protocol by which all of a row was measured."""
    mine = m.protocols[key]
    how = "; ".join(f"{p}: {mine[p]}" for p in PHASES if p in mine)
    return letters.setdefault(how, string.ascii_letters[len(letters) % 52])


def losses(m: Found, told: Sequence[Key]) -> list[str]:
    """Predicted, measured by compress itself, and measured on texts that it never saw."""
    lines = [
        "Nats per token. *Predicted*: the sum over all cuts, each by itself. *Said*: measured by the command on windows of the",
        "calibration text that were not calibrated on, and its standard error.",
        "",
    ]
    names = [
        "keep",
        "method",
        "predicted",
        "said",
        "said / predicted",
        "C4, held out: D",
        "D / said",
        "WikiText-2: D",
        "D / said",
    ]
    lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for key in sorted(told, key=lambda k: (-k[1], list(NAMES).index(k[0]))):
        sums, said, noise = (m.number(key, f"compress {n}") for n in ("predicted", "loss", "loss_stderr"))
        cells = ["–" if sums is None else f"{sums:.3f}", f"{said:.3f}" + (f" ± {noise:.3f}" if noise else "")]
        cells.append(f"{said / sums:.2f}" if said and sums else "–")
        for d in (m.excess(key, "c4"), m.excess(key, "wikitext2")):
            cells += ["–", "–"] if d is None or not said else [f"{d:.3f}", f"{d / said:.2f}"]
        lines.append(f"| {key[1]:g} | {NAMES[key[0]]} | " + " | ".join(cells) + " |")
    return lines


def rights(m: Found, asked: Sequence[Key]) -> list[str]:
    """Per kind of prompt the share of right answers; of all the share that is right where the dense model's is not, or the other
    way round."""
    protocol = m.protocols[asked[0]]["exact"]
    dense = {k: m.dense[protocol, f"exact {k}"] for k in EXACT_KINDS}
    lines = [f"Greedy, in %; {protocol}; changed: right for wrong or wrong for right, against the dense model.", ""]
    lines += ["| keep | method | " + " | ".join(EXACT_KINDS) + " | all | changed |", "|---" * (len(dense) + 4) + "|"]
    rows = {(1.0, "dense"): dense}
    for key in sorted(asked, key=lambda k: (-k[1], list(NAMES).index(k[0]))):
        rows[key[1], NAMES[key[0]]] = {k: m.values[key][f"exact {k}"] for k in EXACT_KINDS}
    before = "".join(dense.values())
    for (keep, name), found in rows.items():
        own = "".join(found.values())
        cells = [f"{100 * t.count('1') / len(t):.0f}" for t in (*found.values(), own)]
        changed = sum(a != b for a, b in zip(own, before, strict=True)) / len(own)
        lines.append(f"| {keep:g} | {name} | " + " | ".join(cells) + f" | {100 * changed:.0f} |")
    return lines


def accuracies(m: Found, scored: Sequence[Key]) -> list[str]:
    """Per task; in brackets the share of answers that are not the dense model's."""
    lines = ["| keep | method | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 2) + "|"]
    for protocol in dict.fromkeys(m.protocols[k]["tasks"] for k in scored):
        cells = [f"{100 * float(m.dense[protocol, f'{t} acc']):.1f}" for t in TASKS]
        lines.append(f"| 1 | dense, {protocol} | " + " | ".join(cells) + " |")
    for key in sorted(scored, key=lambda k: (-k[1], list(NAMES).index(k[0]))):
        cells = []
        for t in TASKS:
            own, dense = m.values[key][f"{t} answers"], m.before(key, "tasks", f"{t} answers") or ""
            changed = sum(a != b for a, b in zip(own, dense, strict=True)) / len(own)
            cells.append(f"{100 * float(m.values[key][f'{t} acc']):.1f} ({100 * changed:.0f})")
        lines.append(f"| {key[1]:g} | {NAMES[key[0]]} | " + " | ".join(cells) + " |")
    return lines


def draw(m: Found) -> str:
    """WikiText-2 perplexity against keep, a line per method, on a card of its own that follows light and dark."""
    dense = m.level("wikitext2")
    lines = {
        method: [(k, p) for k in m.keeps if (p := m.beside((method, k), "text wikitext2 perplexity")) is not None]
        for method in m.methods
        if method not in VARIANTS
    }
    last = {method: math.log(points[-1][1] / dense) / (1 - points[-1][0]) for method, points in lines.items() if points}
    series = [
        Series(
            NAMES[method], n if n < 6 else None,
            [Mark(1.0, dense, "dense"), *(Mark(k, p, f"{NAMES[method]} at {k:g}: {p:.2f}") for k, p in lines[method])],
            joined=len(m.keeps) > 1,
        )
        for n, method in enumerate(sorted(last, key=lambda x: last[x]))
    ]  # fmt: skip
    keep = Quantity("keep: share of the blocks' weights that stays", log=False, falling=True)
    level = (dense, f"dense {dense:.1f}")
    label = f"perplexity of WikiText-2, calibrated on {m.text}"
    picture = chart(series, keep, Quantity(label, log=True), level=level, top=20 * dense, names=True)
    start = picture.index(">") + 1
    return stand_alone(
        picture[:start] + '<rect width="100%" height="100%" rx="10" fill="var(--card)"/>' + picture[start:]
    )


def fill_readme(text: str, found: Sequence[Found]) -> str:
    """The README with the table of the first model between its two comments made anew."""
    before, opened, rest = text.partition(OPENS)
    _, closed, after = rest.partition(CLOSES)
    if not opened or not closed:
        return text
    m = choose(found)
    said = f"Calibrated on {m.text} of C4; perplexity of WikiText-2 in {m.usual}: dense {m.level('wikitext2'):.2f}. "
    said += "A dash was not measured."
    return "\n".join([before + OPENS, said, "", *perplexities(m, "wikitext2", short=True), CLOSES + after])
