"""The pages in a real browser: no request leaves them, nothing runs but the switch of languages, and they fit any screen.

Pictures are kept in the folder that RWKVFLOW_PICTURES names, else in the test's own.
"""

import http.server
import os
import threading
from pathlib import Path

import chromium
import numpy as np
import pytest
from reports import COMPARISON, EVIL, EVILS, evidence, evil

from rwkv_core import escape, report
from rwkv_core.data import preview
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.texts import TEXTS
from rwkv_core.tokenizer import named

pytestmark = chromium.needed

CONTRAST = """() => {
  // https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio, of every text and what is painted behind it
  const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const parse = words => { const n = words.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found[3] > 0) return found;
    }
    return [255, 255, 255, 1];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || ["STYLE", "SCRIPT"].includes(element.tagName) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([text.slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return poor;
}"""

OVERLAPS = """() => [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
    p.width && q.width && p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1
  ).map(([b]) => [a, b]));
})"""


@pytest.fixture(scope="module")
def browser():
    with chromium.launched() as opened:
        yield opened


@pytest.fixture
def open_page(browser):
    """Open a file; what it said on the console, and asked for, is in `said` and `asked`."""
    contexts = []

    def go(path: Path, width: int = 1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folders of reports: one with all there is, one with little, an evil one."""
    made = {
        "full": evidence(),
        "little": evidence(COMPARISON | {"documents": 7, "better": 0}, samples=[], positions=[], cost=None),
        "evil": evil(),
    }
    root = tmp_path_factory.mktemp("reports")
    for name, of in made.items():
        (root / name).mkdir()
        report.write(root / name, of)
    return root


def pictured(page, name: str) -> None:
    folder = os.environ.get("RWKVFLOW_PICTURES")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_the_report_reads_well(reports, open_page, locale, scheme, width):
    page = open_page(reports / "full/report.html", width, locale=locale, color_scheme=scheme)
    language = locale[:2]
    assert page.said == []
    assert page.asked == [(reports / "full/report.html").as_uri()]
    assert page.evaluate("document.documentElement.lang") == language
    headline = TEXTS["is_mixed"]._asdict()
    assert page.locator("#headline").inner_text() == f"◆ {headline.pop(language)}"
    assert next(iter(headline.values())) not in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(OVERLAPS) == []
    pictured(page, f"report-{language}-{scheme}-{width}")


@pytest.mark.parametrize("name", ["little", "evil"])
@pytest.mark.parametrize("width", [1280, 390])
def test_others_fit_too(reports, open_page, name, width):
    page = open_page(reports / name / "report.html", width, locale="en-GB")
    assert page.said == []
    assert len(page.asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictured(page, f"report-{name}-{width}")


def test_the_language_is_switched_by_keyboard_and_not_remembered(reports, open_page):
    page = open_page(reports / "full/report.html", locale="en-GB")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "in-en"
    page.keyboard.press("ArrowRight")
    assert page.locator("h1").inner_text() == TEXTS["title_of"].zh
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.locator("svg.chart").first.get_by_text(TEXTS["step"].zh).is_visible()
    page.reload()
    assert page.locator("h1").inner_text() == TEXTS["title_of"].en
    page.get_by_text("中文").click()
    assert page.locator("h1").inner_text() == TEXTS["title_of"].zh
    page.get_by_text("English").click()
    assert page.locator("h1").inner_text() == TEXTS["title_of"].en
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert page.said == []


def test_without_script_it_is_in_english_and_can_be_switched(reports, open_page):
    page = open_page(reports / "full/report.html", locale="zh-CN", java_script_enabled=False)
    assert page.locator("h1").inner_text() == TEXTS["title_of"].en
    page.get_by_text("中文").click()
    assert page.locator("h1").inner_text() == TEXTS["title_of"].zh


def test_it_prints_on_white_without_its_switch(reports, open_page):
    page = open_page(reports / "full/report.html", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("fieldset").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) == []
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_words_of_others_are_read_and_do_nothing(reports, open_page):
    page = open_page(reports / "evil/report.html", locale="en-GB")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert page.said == []
    assert len(page.asked) == 1
    prompt = page.locator(".sample > pre").inner_text()
    for words in EVILS:
        assert escape.visible(words) in prompt


def test_a_text_that_begins_with_a_line_end_keeps_it(open_page, tmp_path):
    report.write(tmp_path, evidence(samples=[{"prompt": "\n\nq", "base": "\na b c", "tuned": ""}]))
    texts = open_page(tmp_path / "report.html").locator("pre").all_text_contents()
    assert texts[:2] == ["\n\nq", "\na b c"]


@pytest.fixture
def server():
    """A server on this machine, and what it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            made.asked.append(self.path)
            self.send_error(404)

        def log_message(self, *words):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("guarded", [True, False])
def test_what_got_in_would_not_run_nor_ask(reports, open_page, server, tmp_path, guarded):
    """The policy holds where escaping would have failed; without it, all of this would have happened."""
    text = (reports / "full/report.html").read_text(encoding="utf-8")
    at = f"http://127.0.0.1:{server.server_port}"
    hole = (
        f"<script>window.ran = 1; fetch('{at}/e')</script><img src='{at}/a' onerror='window.ran = 2'>"
        f"<style>h1{{color:red}}</style><link rel=stylesheet href='{at}/b'>"
        f"<iframe src='{at}/c'></iframe><svg onload='window.ran = 3'></svg>"
        f"<p style='background:url({at}/d)'>x</p>"
    )
    text = text.replace("<main>", f"<main>{hole}", 1)
    path = tmp_path / "hole.html"
    path.write_text(text if guarded else text.replace("Content-Security-Policy", "x"), encoding="utf-8")
    page = open_page(path)
    page.wait_for_timeout(500)
    assert (page.evaluate("window.ran") is None) == guarded
    assert {*server.asked} == (set() if guarded else {"/a", "/b", "/c", "/d", "/e"})
    assert (page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(255, 0, 0)") != guarded


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_preview_does_nothing_either(open_page, tmp_path, scheme, width):
    tokenizer = named("world", {})
    writer = Writer(tmp_path / "train")
    for words in (*EVILS, EVIL):
        writer.add([*tokenizer.encode(words), 0])
    writer.close()
    finding = {"where": EVIL, "message": EVIL}
    preview.write(
        tmp_path / "preview.html", Documents(tmp_path / "train"), tokenizer, side=EVIL, ctx_len=64, rows="pad", samples=20,
        manifest={EVIL: {EVIL: EVIL}, "source": EVIL}, findings={EVIL: preview.Findings(1, [finding])},
    )  # fmt: skip
    page = open_page(tmp_path / "preview.html", width, color_scheme=scheme)
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert page.said == []
    assert len(page.asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "<script>window.ran = 1</script>" in page.locator(".facts").inner_text()
    assert "\u202e" not in page.content()
    widths = page.locator(".stack > rect").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert sum(widths) == pytest.approx(page.locator(".stack").bounding_box()["width"], abs=1)
    assert np.count_nonzero(np.array(widths) > 1) >= 2
    pictured(page, f"preview-{scheme}-{width}")
