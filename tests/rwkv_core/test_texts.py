import re
import string

import jinja2
import pytest
from project import ROOT

from rwkv_core.texts import TEXTS, Text, joined
from rwkv_core.verdict import GROUPS

HAN = re.compile(r"[\u4e00-\u9fff]")
SAME = {"lm_eval"}
"""Names, the same in both."""


def blanks(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_missing_in_a_language(name):
    english, chinese = TEXTS[name]
    assert english.strip()
    assert blanks(english) == blanks(chinese)
    assert not HAN.search(english)
    assert (
        HAN.search(re.sub(r"{\w+}", "", chinese))
        or name in SAME
        or not re.search("[a-z]", re.sub(r"{\w+}", "", english))
    )


def test_the_page_has_no_words_of_its_own():
    """What is between its tags comes from the table, but for the languages' own names, and the product's."""
    source = (ROOT / "rwkv_core/report.html.j2").read_text()
    source = re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.DOTALL)
    data = "".join(value for _, kind, value in jinja2.Environment().lex(source) if kind == "data")
    words = re.sub(r"<[^>]*>", " ", data).replace("RWKV-Flow", "").replace("English", "").replace("中文", "")
    assert not re.findall(r"\w+", words)
    assert not re.findall(r' (?:title|alt|aria-label|placeholder)="', source)


def test_every_text_is_used():
    places = ("report.py", "report.html.j2", "verdict.py", "charts.py", "../tasks/evidence.py")
    code = "".join((ROOT / "rwkv_core" / name).read_text() for name in places)
    by_name = {"about_", *(f"{group}." for group in GROUPS)}  # with what metrics.json has
    unused = [n for n in TEXTS if not n.startswith(tuple(by_name)) and not re.search(rf"""(?:\bt\.|["']){n}\b""", code)]
    assert not unused


def test_blanks_are_filled_in_the_same_language():
    text = Text("{what} of {n}", "{n} 的{what}")(what=Text("loss", "损失"), n=3)
    assert text == ("loss of 3", "3 的损失")
    assert joined([text, Text.same("x")]) == ("loss of 3, x", "3 的损失、x")


def test_what_fills_a_blank_is_text():
    text = Text("a {x}", "甲 {x}")(x='{0} <b lang="en">')
    assert text.en == 'a {0} <b lang="en">'
    assert str(text.__html__()).count("<") == 4
    assert "&lt;b lang=&#34;en&#34;&gt;" in text.__html__()
    assert Text.same("<").__html__() == "&lt;"
