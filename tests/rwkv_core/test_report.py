import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rwkv_core import report

CHANGE = {
    "loss": {"value": -0.5, "low": -0.6251, "high": -0.4},
    "perplexity": {"value": -3.5, "low": -4.0, "high": -3.0},
    "bits_per_byte": {"value": -0.25, "low": -0.3, "high": -0.2},
}
COMPARISON = {
    "base": {"loss": 2.125, "perplexity": 8.3729, "bits_per_byte": 1.0625},
    "tuned": {"loss": 1.625, "perplexity": 5.0784, "bits_per_byte": 0.8125},
    "change": CHANGE, "better": 1, "documents": 321, "documents_not_scored": 0, "tokens": 98765, "confidence": 0.95,
}  # fmt: skip
EVIL = '<script>alert("no")</script><img src=http://example.com/x onerror=alert(1)>&amp;'


def pictures():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 50)
    return {
        "The course <of> the loss.": report.training_curve([(i, 4 / i) for i in range(1, 60)], [(1, 4.0), (50, 0.1)]),
        "Documents.": report.document_change(base, base - 0.1),
    }


def write(path, **changes):
    values = {
        "comparison": COMPARISON, "pictures": pictures(),
        "samples": [{"prompt": EVIL, "base": "你好 " + EVIL, "tuned": EVIL}],
        "facts": {"Data " + EVIL: {"source": EVIL, "rows": 77}},
    }  # fmt: skip
    report.write(path, **(values | changes))
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every element and its attributes, and the text outside style."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    return write(tmp_path / "report.html")


def test_loads_nothing(page):
    elements = Tags(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for tag, attributes in elements:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#"), (tag, name, value)
    for style in re.findall(r"<style[^>]*>(.*?)</style>", page, re.DOTALL):
        assert "@import" not in style
        assert "url(" not in style


def test_what_comes_from_outside_is_text(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert Tags(page).text.count('alert("no")') == 5
    assert "The course &lt;of&gt; the loss." in page
    assert "你好" in page


def test_holds_the_numbers(page):
    text = " ".join(Tags(page).text.split())
    for number in (
        "2.1250",
        "1.6250",
        "-0.5000",
        "-0.6251 to -0.4000",
        "8.4",
        "0.8125",
        "-0.2500",
        "321",
        "98765",
        "77",
    ):
        assert number in text, number
    assert "95 % interval" in text
    assert report.verdict(COMPARISON) in text


@pytest.mark.parametrize(("better", "words"), [(1, "better than"), (-1, "worse than"), (0, "not distinguishable from")])
def test_verdict(better, words):
    sentence = report.verdict(COMPARISON | {"better": better})
    assert sentence == (
        f"On 321 held-out documents the tuned model is {words} its base: the loss goes from 2.1250 to 1.6250 nats a token, "
        "a change of -0.5000 (95% interval -0.6251 to -0.4000)."
    )


def test_no_samples(tmp_path):
    assert "None were asked for." in write(tmp_path / "report.html", samples=[])


def test_same_numbers_same_bytes(page, tmp_path):
    assert write(tmp_path / "again.html") == page
    for name in ("one.png", "two.png"):
        report.save_picture(pictures()["Documents."], tmp_path / name)
    data = (tmp_path / "one.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == (tmp_path / "two.png").read_bytes()
    assert b"atplotlib" not in data


@pytest.mark.parametrize(
    ("train", "valid"), [([], []), ([(1, 2.0)], [(0, 3.0)]), ([(1, 2.0), (2, 1.0)], []), ([], [(0, 3.0)])]
)
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_short_runs_have_a_curve(train, valid, tmp_path):
    report.save_picture(report.training_curve(train, valid), tmp_path / "x.png")


def test_running_mean_of_a_constant_is_the_constant():
    assert report._smooth(np.full(100, 3.0)) == pytest.approx(3.0)
    smooth = report._smooth(np.arange(100.0))
    assert smooth[0] == 0
    assert (np.diff(smooth) > 0).all()
    assert (smooth <= np.arange(100.0)).all()
