import pytest
from reports import EVILS

from rwkv_core import escape


def test_characters_that_turn_or_are_not_seen_are_told():
    assert escape.visible("a\u202eb\u2066c\x00\x1b\x85\ud800d\n\t") == (
        "a[U+202E]b[U+2066]c[U+0000][U+001B][U+0085][U+D800]d\n\t"
    )
    assert escape.visible("中文 שלום 👩‍💻") == "中文 שלום 👩‍💻"


def test_a_name_is_one_line_and_turns_nothing_around_it():
    assert escape.name("a\n\n b") == "a b"
    assert escape.name("שלום") == "\u2068שלום\u2069"
    assert escape.name("\u2069שלום") == "\u2068[U+2069]שלום\u2069"


@pytest.mark.parametrize("evil", EVILS)
def test_nothing_leaves_its_cell(evil):
    head, rule, row = escape.table(["a", evil], [[evil, "b"]]).splitlines()
    assert rule == "| --- | --- |"
    for line in (head, row):
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") == 3
        assert "<" not in line
        assert "`" not in line.replace("\\`", "")
        assert "](" not in line.replace("\\](", "")


@pytest.mark.parametrize("text", ["", "a", "``` x", "`````\n````", "~~~", *EVILS])
def test_nothing_leaves_its_block(text):
    first, *inside, last = escape.fenced(text).split("\n")
    assert first == last + "text"
    assert "\n".join(inside) == escape.visible(text)
    assert all(last not in line for line in inside)


@pytest.mark.parametrize(
    ("text", "made"), [("# x", "\\# x"), ("- x", "\\- x"), ("-0.5", "-0.5"), ("a (b) c!", "a (b) c!")]
)
def test_what_needs_no_escape_has_none(text, made):
    assert escape.markdown(text) == made
