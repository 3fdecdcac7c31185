import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from reports import positions

from rwkv_core import charts
from rwkv_core.texts import TEXTS


def points(chart, kind):
    found = re.search(rf'<(?:polyline|polygon) class="{kind}" points="([^"]*)"', str(chart))
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]


def inside(chart):
    """All of its numbers are within the frame."""
    root = ET.fromstring(str(chart))
    for element in root.iter():
        for name, most in (("x", charts.WIDTH), ("cx", charts.WIDTH), ("y", charts.HEIGHT), ("cy", charts.HEIGHT)):
            assert 0 <= float(element.get(name, 0)) <= most
    for pair in re.findall(r"(-?[\d.e+-]+),(-?[\d.e+-]+)", " ".join(re.findall('points="([^"]*)"', str(chart)))):
        assert 0 <= float(pair[0]) <= charts.WIDTH
        assert 0 <= float(pair[1]) <= charts.HEIGHT
    return True


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ([(1, 2.0)], [(0, 3.0)]), ([(1, 2.0), (2, 1.0)], []), ([], [(0, 3.0)]),
        ([(i, 4 / i) for i in range(1, 5000)], [(1, 4.0)]),
        ([(1, 1e9), (2, 1.0), (3, 0.9)], []), ([(1, float("nan")), (2, 1.0)], [(2, float("inf"))]), ([(1, 2.0), (2, 2.0)], []),
    ],
)  # fmt: skip
def test_any_run_has_a_curve_within_its_frame(train, valid):
    assert inside(charts.loss_curve(train, valid))


def test_a_curve_is_where_its_numbers_are():
    chart = charts.loss_curve([], [(0, 3.0), (10, 1.0), (20, 2.0)])
    (x0, y0), (x1, y1), (x2, y2) = points(chart, "held")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.1)
    assert y0 < y2 < y1  # a greater loss is higher up


def test_a_long_run_is_thinned_to_its_end():
    chart = charts.loss_curve([(i, 1 + 1 / i) for i in range(1, 100_001)], [])
    drawn = points(chart, "tuned faint")
    assert len(drawn) <= charts._MOST + 1
    assert drawn[-1][0] == pytest.approx(charts.WIDTH - charts._RIGHT, abs=0.1)


def test_the_interval_lies_around_the_tuned_model():
    rows = positions()
    chart = charts.by_position(rows)
    assert inside(chart)
    band, tuned, base = (points(chart, kind) for kind in ("band", "tuned", "base"))
    assert len(tuned) == len(base) == len(rows)
    for i, (x, y) in enumerate(tuned):
        high, low = band[i], band[-1 - i]
        assert high[0] == low[0] == x == base[i][0]
        assert high[1] < y < low[1]
        assert base[i][1] < y


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_positions_have_words_that_there_is_room_for(count):
    chart = charts.by_position(positions(count) if count < 10 else [positions(1)[0] for _ in range(count)])
    assert inside(chart)
    assert str(chart).count("≤") <= 7


def test_many_documents_are_as_few_points_as_can_be_seen():
    chart = charts.by_document(*np.random.default_rng(0).normal(3, 0.1, (2, 5000)))
    assert inside(chart)
    assert 500 < str(chart).count("<circle") <= 3 * charts._MOST


def test_equal_documents_have_a_picture():
    assert inside(charts.by_document(np.full(3, 2.0), np.full(3, 2.0)))


@pytest.mark.parametrize(
    "chart", [charts.loss_curve([], []), charts.by_position([]), charts.by_document(np.zeros(0), np.zeros(0))]
)
def test_nothing_to_draw_is_said(chart):
    assert TEXTS["no_curve"].en in chart


@pytest.mark.parametrize(
    ("values", "widths"),
    [
        ((0.5, 0.25, -0.35, -0.15, 1), ["50%", "25%", "15%", "35%"]),
        ((2, 3, 0.5, 2, 3), ["66.67%", "100%", "83.33%", "100%"]),  # no farther than the cell
        ((0, 0, 0, 0, 0), ["0%"] * 4),
        ((0.1, 0.0, -0.2, -0.05, 1), ["10%", "0%", "0%", "5%"]),
    ],
)
def test_bars_have_the_lengths_of_their_values(values, widths):
    bars = str(charts.bars(*values))
    assert re.findall(r'<rect[^>]* width="([^"]*)"', bars) == widths[:2]
    first = ET.fromstring(bars).find("g").find("line")
    assert [first.get("x1"), first.get("x2")] == widths[2:]


@pytest.mark.parametrize(("language", "there", "away"), [(0, "en", "zh"), (1, "zh", "en")])
def test_a_picture_alone_is_a_file_in_one_language(language, there, away):
    text = charts.alone(charts.loss_curve([(1, 2.0), (2, 1.0)], []), language)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert f'[lang="{away}"]' in style
    assert f'[lang="{there}"]' not in style


def test_running_mean_of_a_constant_is_the_constant():
    assert charts.smooth(np.full(100, 3.0)) == pytest.approx(3.0)
    smooth = charts.smooth(np.arange(100.0))
    assert smooth[0] == 0
    assert (np.diff(smooth) > 0).all()
    assert (smooth <= np.arange(100.0)).all()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.11), (-3, 400), (1e-6, 2e-6), (0, 65536)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts._ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)
