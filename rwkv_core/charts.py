"""Pictures of an evaluation as SVG: their colours are classes that the page's style sets, their words are in both languages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from rwkv_core.texts import TEXTS, Text

Array = npt.NDArray[np.float64]
Curve = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 30, 44
_MOST = 400
"""Points that a curve is drawn with: more can't be told apart at this width."""


class _Axes:
    """A frame with scales.

    Args:
        x: least and greatest value.
        y: the same.
        names: what is on the axes, x and y.
        labels: of the x axis: place and word. Round numbers if None.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        names: tuple[Text, Text],
        labels: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        self._x, self._y = _wide(x), _wide(y, 0.04)
        self._parts: list[Markup] = []
        self._keys = _LEFT
        for at in _ticks(*self._y):
            place = self.y(at)
            self.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', _LEFT, WIDTH - _RIGHT, place, place)
            self.add('<text x="{}" y="{}" text-anchor="end">{}</text>', _LEFT - 6, place + 4, f"{at:g}")
        for at, word in labels if labels is not None else [(at, f"{at:g}") for at in _ticks(*self._x)]:
            self.add('<text x="{}" y="{}" text-anchor="middle">{}</text>', self.x(at), HEIGHT - _BOTTOM + 18, word)
        self.add('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        self.add(
            '<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>', middle, HEIGHT - 6, _words(names[0])
        )
        place = (_TOP + HEIGHT - _BOTTOM) / 2
        turn = f"rotate(-90 13 {place:g})"
        self.add(
            '<text class="name" x="13" y="{}" text-anchor="middle" transform="{}">{}</text>',
            place,
            turn,
            _words(names[1]),
        )

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def add(self, markup: str, *values: Any) -> None:
        """An element, numbers short and all else escaped."""
        self._parts.append(Markup(markup).format(*(f"{v:.5g}" if isinstance(v, int | float) else v for v in values)))

    def line(self, kind: str, points: Iterable[tuple[float, float]]) -> None:
        self.add('<polyline class="{}" points="{}"/>', kind, self._path(points))

    def area(self, kind: str, points: Iterable[tuple[float, float]]) -> None:
        self.add('<polygon class="{}" points="{}"/>', kind, self._path(points))

    def dots(self, kind: str, points: Iterable[tuple[float, float]], radius: float) -> None:
        for x, y in points:
            self.add('<circle class="{}" cx="{}" cy="{}" r="{}"/>', kind, self.x(x), self.y(y), radius)

    def key(self, kind: str, words: Text) -> None:
        """A line of the legend, above the frame."""
        at = self._keys
        self.add('<line class="{}" x1="{}" x2="{}" y1="14" y2="14"/>', kind, at, at + 20)
        self.add('<text x="{}" y="18">{}</text>', at + 26, _words(words))
        self._keys += 60 + 7 * max(len(words.en), 2 * len(words.zh))

    def svg(self, label: str) -> Markup:
        """All of it; `label` is the id of the element that says what it shows."""
        return _svg(label, HEIGHT, Markup("\n").join(self._parts))

    def _path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.5g},{self.y(y):.5g}" for x, y in points)


def loss_curve(train: Curve, valid: Curve) -> Markup:
    """Loss by optimizer step: each step faintly, their running mean, and the held-out loss where it was measured."""
    train, valid = ([(x, y) for x, y in curve if math.isfinite(y)] for curve in (train, valid))
    if not train and not valid:
        return _nothing("loss_curve")
    mean = list(zip([x for x, _ in train], smooth(np.array([y for _, y in train])).tolist(), strict=True))
    # A first step that jumps must not flatten the rest: the frame is the running mean's and the held-out loss's.
    heights = [y for _, y in (*mean, *valid)]
    most, least = max(heights), min(heights)
    room = (most - least) * 0.15
    axes = _Axes(_ends(x for x, _ in (*train, *valid)), (least - room, most + room), (TEXTS["step"], TEXTS["nats"]))
    axes.line("tuned faint", ((x, min(max(y, least - room), most + room)) for x, y in _thin(train)))
    axes.line("tuned", _thin(mean))
    if valid:
        axes.line("held", valid)
        axes.dots("held", valid, 3.2)
    if train:
        axes.key("tuned", TEXTS["training"])
    if valid:
        axes.key("held", TEXTS["held_out_line"])
    return axes.svg("loss_curve")


def by_position(rows: Sequence[Mapping[str, float]]) -> Markup:
    """Loss by the number of tokens before, of positions.csv: base and tuned model, and the interval of the change."""
    rows = [row for row in rows if math.isfinite(row["base_loss"]) and math.isfinite(row["tuned_loss"])]
    if not rows:
        return _nothing("positions")
    places = range(len(rows))
    lows, highs = ([row["base_loss"] + row[end] for row in rows] for end in ("low", "high"))
    base, tuned = ([row[name] for row in rows] for name in ("base_loss", "tuned_loss"))
    every = -(-len(rows) // 7)  # words that there is room for
    labels = [(i, f"≤{rows[i]['to']:g}") for i in places if i % every == 0]
    axes = _Axes(
        (-0.4, len(rows) - 0.6), _ends([*lows, *highs, *base, *tuned]), (TEXTS["position"], TEXTS["nats"]), labels
    )
    axes.area("band", [*enumerate(highs), *reversed(list(enumerate(lows)))])
    for kind, values in (("base", base), ("tuned", tuned)):
        axes.line(kind, enumerate(values))
        axes.dots(kind, enumerate(values), 3)
        axes.key(kind, TEXTS[kind])
    return axes.svg("positions")


def by_document(base: Array, tuned: Array) -> Markup:
    """Each held-out document: its loss with the base against its loss with the tuned model. (D,) nats a token each."""
    finite = np.isfinite(base) & np.isfinite(tuned)
    base, tuned = base[finite], tuned[finite]
    if not len(base):
        return _nothing("documents")
    chosen = np.unique(np.linspace(0, len(base) - 1, min(len(base), 3 * _MOST)).round().astype(int))
    ends = _ends([*base[chosen].tolist(), *tuned[chosen].tolist()])
    axes = _Axes(ends, ends, (TEXTS["with_base"], TEXTS["with_tuned"]))
    axes.line("base dashed", [(ends[0], ends[0]), (ends[1], ends[1])])
    axes.dots("point", zip(base[chosen].tolist(), tuned[chosen].tolist(), strict=True), 2.6)
    axes.key("base dashed", TEXTS["no_change"])
    return axes.svg("documents")


def bars(base: float, tuned: float, low: float, high: float, most: float) -> Markup:
    """Base and tuned model as two bars from 0, and the interval of the change around the tuned one's end.

    Args:
        base: the base's value.
        tuned: the tuned model's.
        low: lower end of the change's interval.
        high: its upper end.
        most: the value that has the full length.
    """

    def place(value: float) -> str:
        return f"{min(max(value / most if most > 0 else 0, 0), 1) * 100:.4g}%"

    return Markup(
        '<svg class="bars" width="100%" height="22" aria-hidden="true">'
        '<rect class="base" width="{0}" height="9" y="1"/><rect class="tuned" width="{1}" height="9" y="12"/>'
        '<g class="whisker"><line x1="{2}" x2="{3}" y1="16.5" y2="16.5"/><line x1="{2}" x2="{2}" y1="13" y2="20"/>'
        '<line x1="{3}" x2="{3}" y1="13" y2="20"/></g></svg>'
    ).format(place(base), place(tuned), place(base + low), place(base + high))


def alone(chart: Markup, language: int = 0) -> str:
    """A picture as a file of its own, on white, in one language (0 English, 1 Chinese)."""
    style = files("rwkv_core").joinpath("charts.css").read_text(encoding="utf-8")
    hidden = ("zh", "en")[language]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" '
    inside = f'<style>{style}[lang="{hidden}"]{{display:none}}</style><rect class="paper" width="100%" height="100%"/>'
    start, rest = str(chart).split(">", 1)
    return head + start.removeprefix("<svg ").replace(' role="img"', "") + ">" + inside + rest + "\n"


def smooth(values: Array) -> Array:
    """Exponential running mean over about a twentieth of the values, unbiased at the start."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    out = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


def _svg(label: str, height: int, content: Markup) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}">{}</svg>').format(
        WIDTH, height, label, content
    )


def _nothing(label: str) -> Markup:
    return _svg(label, 60, Markup('<text x="0" y="34">{}</text>').format(_words(TEXTS["no_curve"])))


def _words(text: Text) -> Markup:
    return text.marked("tspan") if text.en != text.zh else escape(text.en)


def _thin(curve: Curve) -> Curve:
    """So many points that the eye needs, the last among them."""
    every = -(-len(curve) // _MOST) or 1
    return [*curve[:-1:every], *curve[-1:]]


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _wide(ends: tuple[float, float], room: float = 0.0) -> tuple[float, float]:
    """A range that is one, with some room on both sides."""
    low, high = ends
    if low == high:
        more = abs(low) * 0.1 or 1.0
        return low - more, high + more
    return low - room * (high - low), high + room * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
