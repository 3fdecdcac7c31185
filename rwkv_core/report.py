"""The evaluation as one page that needs no server and no network; the same in markdown, and its pictures as files."""

import csv
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rwkv_core import charts, escape, page, verdict
from rwkv_core.charts import Array, Curve
from rwkv_core.files import whole_file
from rwkv_core.texts import LANGUAGES, TEXTS, Text
from rwkv_core.verdict import Measure, Verdict

Facts = Sequence[tuple[Text, Sequence[tuple[Text, object]]]]
"""Tables: each its title, and rows of a name and a value; a value that differs by language is a `Text`."""

_SHARED = 0.2
"""Of the longer text: if less is in both, marking the rest would say nothing."""
_WORDS = 2
"""That stand together in both texts: fewer are no agreement."""
_LONGEST = 6000
"""Characters up to which two texts are compared."""


class Evidence(NamedTuple):
    """What a report is made of."""

    comparison: Mapping[str, Any]
    """metrics.json."""
    train: Curve
    """Loss by step."""
    valid: Curve
    """Held-out loss by step."""
    positions: Sequence[Mapping[str, float]]
    """positions.csv; empty where it was not measured."""
    documents: tuple[Array, Array]
    """Loss of each held-out document with the base and with the tuned model. (D,) nats a token each."""
    samples: Sequence[Mapping[str, str]]
    """{"prompt", "base", "tuned"} each."""
    facts: Facts
    """Data, model, training."""
    lineage: Sequence[tuple[Text, object]]
    """Hashes of what it came from."""
    cost: Mapping[str, Any] | None = None
    """Of the training: {"steps", "tokens", "seconds", "bytes"}."""


class Row(NamedTuple):
    """A measure, ready to be shown."""

    measure: Measure
    bars: Markup


def write(folder: Path, evidence: Evidence) -> Text:
    """Write report.html, report.md, report.zh.md, measures.csv, and the pictures as .svg files, into a folder that is there.

    Returns:
        The result in a sentence.
    """
    found = verdict.judge(evidence.comparison, list(evidence.valid), evidence.cost)
    rows = verdict.measures(evidence.comparison)
    drawn = pictures(evidence)
    page.write(
        folder / "report.html",
        "rwkv_core",
        "report.html.j2",
        t=TEXTS,
        c=evidence.comparison,
        confidence=f"{evidence.comparison['confidence']:.0%}",
        verdict=found,
        groups=[(group, list(of)) for group, of in groupby(_rows(rows), lambda row: row.measure.group)],
        pictures=drawn,
        samples=[_sample(one) for one in evidence.samples],
        facts=evidence.facts,
        lineage=evidence.lineage,
        chart_style=Markup(files("rwkv_core").joinpath("charts.css").read_text(encoding="utf-8")),
        code=_code,
        text=lambda value: value if isinstance(value, Text) else escape.name(value),
    )
    for name, chart, _ in drawn:
        with whole_file(folder / f"{name}.svg") as temporary:
            temporary.write_text(charts.alone(chart), encoding="utf-8")
    with whole_file(folder / "measures.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["group", "measure", "items", "base", "tuned", "change", "low", "high", "better"])
        for m in rows:
            numbers = (format(x, ".9g") for x in (m.base, m.tuned, m.value, m.low, m.high))
            table.writerow([TEXTS[m.group].en, m.name.en, m.items, *numbers, m.better])
    for language, name in zip(LANGUAGES, ("report.md", "report.zh.md"), strict=True):
        with whole_file(folder / name) as temporary:
            words = "\n\n".join(_markdown(evidence, found, rows, LANGUAGES.index(language)))
            temporary.write_text(words + "\n", encoding="utf-8")
    return found.sentence


def pictures(evidence: Evidence) -> list[tuple[str, Markup, Text]]:
    """Each picture: its name, itself, and what it shows."""
    base, tuned = evidence.documents
    below = int(np.count_nonzero(tuned < base))
    curve = ("loss_curve", charts.loss_curve(evidence.train, evidence.valid), TEXTS["loss_curve_words"])
    return [
        *([curve] if evidence.train or evidence.valid else []),  # none where nobody was there when it was trained
        ("positions", charts.by_position(evidence.positions), TEXTS["positions_words"]),
        ("documents", charts.by_document(base, tuned), TEXTS["documents_words"](below=below, count=len(base))),
    ]


def parted(base: str, tuned: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]] | None:
    """Both texts in pieces, each with whether it is in this one only; None if they share too little to tell."""
    one, other = (
        re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|[^\w\s]", x)
        for x in (base, tuned)
    )
    if max(len(base), len(tuned)) > _LONGEST:
        return None
    blocks = [
        block
        for block in difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
        if sum(not word.isspace() for word in one[block.a : block.a + block.size]) >= _WORDS or one == other
    ]
    shared = sum(len(word) for block in blocks for word in one[block.a : block.a + block.size])
    if not shared or shared < _SHARED * max(len(base), len(tuned)):
        return None
    return (
        list(_pieces(one, [(block.a, block.size) for block in blocks])),
        list(_pieces(other, [(block.b, block.size) for block in blocks])),
    )


def _sample(sample: Mapping[str, str]) -> dict[str, Any]:
    both = [sample["base"], sample["tuned"]]
    base, tuned = parted(*both) or [[(False, text)] if text else [] for text in both]
    return {"prompt": sample["prompt"], "base": base, "tuned": tuned}


def _code(text: Text) -> Markup:
    """One of our own texts, with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(text.__html__())))  # Markup would escape the tags


def _pieces(words: list[str], shared: list[tuple[int, int]]) -> Iterator[tuple[bool, str]]:
    at = 0
    for start, size in (*shared, (len(words), 0)):
        if start > at:
            yield True, "".join(words[at:start])
        if size:
            yield False, "".join(words[start : start + size])
        at = start + size


def _rows(measures: Sequence[Measure]) -> Iterator[Row]:
    """Bars of shares have the whole for their length; others the greatest value of their group, or their own."""
    for m in measures:
        alike = [
            each for each in measures if each.group == m.group and not each.share and m.group in ("sources", "general")
        ]
        most = 1.0 if m.share else max(max(each.base, each.tuned, each.base + each.high) for each in (alike or [m]))
        yield Row(m, charts.bars(m.base, m.tuned, m.low, m.high, most))


def _markdown(evidence: Evidence, found: Verdict, rows: Sequence[Measure], language: int) -> Iterator[str]:
    """The report's parts, in one language."""

    def say(text: object) -> str:
        return text[language] if isinstance(text, Text) else escape.name(text)

    def words(text: object) -> str:
        return escape.markdown(say(text))

    t = {name: text[language] for name, text in TEXTS.items()}
    yield f"# {t['title']}"
    yield f"**{words(found.headline)}**"
    yield words(found.sentence)
    if found.points:
        yield "\n".join(f"- {words(text)}" for _, text in found.points)
    if found.unmeasured:
        yield f"{t['unmeasured']}: {', '.join(map(words, found.unmeasured))}."
    yield f"## {t['next']}"
    yield "\n".join(f"- {say(text)}" for text in found.advice)
    yield f"## {t['measures']}"
    interval = TEXTS["interval"](confidence=f"{evidence.comparison['confidence']:.0%}")
    header = [*(t[name] for name in ("measure", "base", "tuned", "change")), say(interval), t["count"], t["verdict"]]
    yield escape.table(header, [[say(cell) for cell in _cells(m)] for m in rows])
    yield t["interval_words"]
    if evidence.positions:
        yield f"## {t['positions']}"
        header = [*(t[name] for name in ("position", "tokens", "base", "tuned", "change")), say(interval)]
        yield escape.table(header, [[say(cell) for cell in _position(row)] for row in evidence.positions])
    yield f"## {t['samples']}"
    for sample in evidence.samples:
        yield escape.fenced(sample["prompt"])
        for name in ("base", "tuned"):
            yield f"{t[name]}:\n\n{escape.fenced(sample[name])}"
    if not evidence.samples:
        yield t["no_samples"]
    yield f"## {t['made_of']}"
    for title, table in (*evidence.facts, (TEXTS["lineage"], evidence.lineage)):
        yield escape.table([say(title), ""], [[say(name), say(value)] for name, value in table])


def _cells(m: Measure) -> Iterator[object]:
    heading = Text(*(f"{group}: {name}" for group, name in zip(TEXTS[m.group], m.name, strict=True)))
    yield from (heading, m.shown(m.base), m.shown(m.tuned), m.shown(m.value, change=True))
    yield TEXTS["range"](low=m.shown(m.low, change=True), high=m.shown(m.high, change=True))
    yield from (f"{m.items:,}", TEXTS[m.verdict])


def _position(row: Mapping[str, float]) -> Iterator[object]:
    yield f"{row['from']:g}–{row['to']:g}"
    yield f"{row['tokens']:,.0f}"
    yield from (f"{row['base_loss']:.4f}", f"{row['tuned_loss']:.4f}", f"{row['change']:+.4f}")
    yield TEXTS["range"](low=f"{row['low']:+.4f}", high=f"{row['high']:+.4f}")
