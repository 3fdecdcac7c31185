import re
from html.parser import HTMLParser

import numpy as np
import pytest
from reports import COMPARISON, EVIL, EVILS, FULL, evidence, evil

from rwkv_core import escape, report
from rwkv_core.texts import TEXTS

FILES = ["documents.svg", "loss_curve.svg", "measures.csv", "positions.svg", "report.html", "report.md", "report.zh.md"]


class Tags(HTMLParser):
    """Every element and its attributes, and the text outside style and script, in English."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.tags = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.tags.append(dict(attrs).get("lang") == "zh" or tag in ("style", "script"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.tags.pop()

    def handle_data(self, data):
        if not any(self.tags):
            self.text += data


@pytest.fixture
def page(tmp_path):
    report.write(tmp_path, evidence())
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def evil_page(tmp_path):
    report.write(tmp_path, evil())
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_writes_its_files_and_nothing_else(tmp_path):
    assert report.write(tmp_path, evidence()).en.startswith("On 321 held-out documents")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_same_numbers_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, evidence())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in FILES)


@pytest.mark.parametrize("which", ["page", "evil_page"])
def test_loads_nothing(which, request):
    page = request.getfixturevalue(which)
    elements = Tags(page).elements
    assert not {tag for tag, _ in elements} & {"link", "img", "iframe", "object", "embed", "base", "image", "a", "form"}
    assert [tag for tag, _ in elements].count("script") == [tag for tag, _ in elements].count("style") == 1
    for tag, attributes in elements:
        assert not {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "style"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in page
    assert "url(" not in page
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_what_comes_from_outside_is_text(evil_page):
    assert evil_page.count("<script>") == evil_page.count("</style>") == 1
    text = " ".join(Tags(evil_page).text.split())
    for words in EVILS:
        shown = " ".join(escape.visible(words).split())
        assert text.count(shown) >= 12, words  # prompt, sample, facts, lineage, and a measure of each group, twice
    assert "\u202e" not in evil_page
    assert "\x1b" not in evil_page


def test_an_evil_page_has_the_elements_of_a_good_one(page, evil_page):
    assert {tag for tag, _ in Tags(evil_page).elements} <= {tag for tag, _ in Tags(page).elements}


@pytest.mark.parametrize(
    "words",
    [
        "Better on the held-out documents, worse on other measures",
        "On 321 held-out documents (98,765 tokens)",
        "It has forgotten some of what the base knew: the loss on wiki.txt rises by +0.1400 (+0.0900 to +0.1900).",
        "2.1250", "1.6250", "-0.5000", "-0.6251 to -0.4000", "8.3729", "0.8125", "-0.2500", "95% interval", "文档/手册.jsonl",
        "31.0%", "+27.0 pp", "+18.0 pp to +36.0 pp", "1,838", "no difference shown", "too few items", "higher is better",
        "77", "fd5242145586192c" * 4,
    ],
)  # fmt: skip
def test_holds_the_numbers(page, words):
    assert words in " ".join(Tags(page).text.split())


def test_tables_have_headers(page):
    cells = [attributes.get("scope") for tag, attributes in Tags(page).elements if tag == "th"]
    assert cells
    assert set(cells) <= {"col", "row", "rowgroup"}


def test_what_a_picture_shows_is_said(page):
    elements = Tags(page).elements
    ids = {attributes.get("id") for _, attributes in elements}
    pictures = [attributes for tag, attributes in elements if tag == "svg" and attributes.get("role") == "img"]
    assert {picture["aria-labelledby"] for picture in pictures} == {"loss_curve", "positions", "documents"} <= ids


def test_every_text_is_there_in_both_languages(page):
    for text in (
        TEXTS["is_mixed"],
        TEXTS["measures"],
        TEXTS["do_weigh"],
        TEXTS["lineage"],
        TEXTS["step"],
        TEXTS["footer"],
    ):
        assert f'lang="en">{text.en}' in page
        assert f'lang="zh">{text.zh}' in page


def test_no_samples_and_no_positions(tmp_path):
    report.write(tmp_path, evidence(samples=[], positions=[]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "None were asked for." in page
    assert "There is nothing to draw." in page
    assert "Loss by position" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_commands_and_settings_are_code(tmp_path):
    report.write(tmp_path, evidence(COMPARISON))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<code>rwkvflow promote</code>") == 2
    assert "&lt;code" not in page


def test_an_empty_answer_is_said_to_be_empty(tmp_path):
    report.write(tmp_path, evidence(samples=[{"prompt": "q", "base": "", "tuned": "an answer"}]))
    assert "(nothing)" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("base", "tuned", "only_base", "only_tuned"),
    [
        ("it is a red house.", "it is a blue house.", ["red"], ["blue"]),
        ("今天天气很好。", "今天天气不好。", ["很"], ["不"]),
        ("the same", "the same", [], []),
        ("one two three", "one two three four", [], [" four"]),
        ("it ends here now, then", "it ends here", [" now, then"], []),
    ],
)
def test_what_only_one_of_them_wrote_is_marked(base, tuned, only_base, only_tuned):
    one, other = report.parted(base, tuned)
    assert "".join(text for _, text in one) == base
    assert "".join(text for _, text in other) == tuned
    assert [text for only, text in one if only] == only_base
    assert [text for only, text in other if only] == only_tuned


@pytest.mark.parametrize(("base", "tuned"), [("a b c d", "e f g h"), ("", "x"), ("x", ""), ("a . b . c", "d . e . f")])
def test_where_little_is_shared_nothing_is_marked(base, tuned):
    assert report.parted(base, tuned) is None


def test_long_texts_are_compared_in_time_that_is_bounded():
    assert report.parted("a b " * 5000, "a b " * 5000) is None


def blocks_apart(text):
    """Markdown without its code blocks, and the code blocks."""
    outside, inside, fence = [], [], None
    for line in text.split("\n"):
        if fence is None and (found := re.match("(`{3,})text$", line)):
            fence = found[1]
        elif fence == line:
            fence = None
        else:
            (outside if fence is None else inside).append(line)
    assert fence is None
    return "\n".join(outside), "\n".join(inside)


@pytest.mark.parametrize("name", ["report.md", "report.zh.md"])
def test_in_markdown_what_comes_from_outside_is_text_too(name, tmp_path):
    report.write(tmp_path, evil())
    outside, inside = blocks_apart((tmp_path / name).read_text(encoding="utf-8"))
    assert "<" not in outside
    assert "](" not in outside.replace("\\](", "")
    assert "\u202e" not in outside + inside
    assert inside.count("<script>window.ran = 1</script>") == 4  # of prompt and sample, as they are
    headings = [line for line in outside.split("\n") if line.startswith("#")]
    assert "# x" not in headings
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        assert len({line.replace("\\\\", "").replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_markdown_says_what_the_page_says(tmp_path):
    report.write(tmp_path, evidence())
    english, chinese = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "report.zh.md"))
    assert english.startswith(
        "# Evaluation\n\n**Better on the held-out documents, worse on other measures**\n\nOn 321 held-out documents"
    )
    assert "| Answers: exactly right | 31.0% | 58.0% | +27.0 pp | +18.0 pp to +36.0 pp | 120 | better |" in english
    assert "| 2049–4096 | 35 | 3.3333 | 2.8333 | -0.5000 | -0.8667 to -0.1333 |" in english
    assert "```text\nhello\n```" in english
    assert chinese.startswith("# 评测报告\n\n**留出文档上更好，其他指标变差**\n\n在 321 个留出文档")
    assert english.count("\n") == chinese.count("\n")
    assert re.findall(r"\d+\.\d+", english) == re.findall(r"\d+\.\d+", chinese)


def test_numbers_that_are_none_stop_nothing(tmp_path):
    broken = FULL | {"tuned": COMPARISON["tuned"] | {"loss": float("nan"), "perplexity": float("inf")}}
    report.write(
        tmp_path, evidence(broken, documents=(np.array([np.nan]), np.array([1.0])), train=[(1, float("nan"))], valid=[])
    )
    assert "nan" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_policy_s_place_is_not_given_away(tmp_path):
    assert "@policy@" in EVIL
    report.write(tmp_path, evil())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("default-src") < page.index("@policy@")
    assert page.count("default-src") == 1
