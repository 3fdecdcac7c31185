import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import part

from rwkv_core.data.dialogue import begins_with_a_turn, read, turns
from rwkv_core.data.lint import Code, lint
from rwkv_core.tokenizer import bytes_tokenizer, world


def found(text, tokenizer=None):
    return [(finding.code, finding.at) for finding in lint(text, tokenizer or world())]


# A row, and where in its text | shows the fault; {...} is read by its fields, text as it is.
FAULTS = {
    Code.FULL_WIDTH_COLON: "User: Hi\n\n|Assistant：Yes",
    Code.COLON_BLANK: "User: Hi\n\nAssistant|:Yes",
    Code.DOUBLED_ROLE: "User: Hi\n\n|Assistant: Assistant: Yes",
    Code.MISSING_ANSWER: "User: Hi\n\nAssistant: Yes\n\n|User: And?",
    Code.EMPTY_ANSWER: "User: Hi\n\n|Assistant: \n\nUser: And?\n\nAssistant: Yes",
    Code.UNCLOSED_THOUGHT: "User: Hi\n\nAssistant: |<think>So",
    Code.BLANK_LINE: "User: Hi\n\nAssistant: One.|\n\nTwo.",
    Code.UNREACHABLE_STOP: "User: 你好\n\nAssistant: 你好|。\n\nUser: 再见\n\nAssistant: 再见",
    Code.CARRIAGE_RETURN: "User: Hi|\r\n\r\nAssistant: Yes\r\n\r\nUser: And?\r\n\r\nAssistant: Yes",
    Code.CONTROL: "User: Hi\n\nAssistant: |\x1b[1mYes",
    Code.MOJIBAKE: "User: Hi\n\nAssistant: A caf|Ã©",
    Code.END_TEXT: "User: Hi\n\nAssistant: Yes|<|endoftext|>",
}


def test_every_fault_is_found_where_it_is_and_no_other(tmp_path):
    assert set(FAULTS) == set(Code)
    texts = {code: text.replace("|", "", 1) for code, text in FAULTS.items()}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    for (code, marked), line in zip(FAULTS.items(), (tmp_path / "x.jsonl").open(), strict=True):
        text = read(json.loads(line), part(blank_lines="keep")).text
        assert text == texts[code]
        findings = lint(text, world())
        assert [(finding.code, finding.at) for finding in findings] == [(code, marked.index("|"))]
        assert repr(text[findings[0].at])[1:-1] in findings[0].message
        assert "\n" not in findings[0].message


@pytest.mark.parametrize("first", sorted(set(FAULTS) - {Code.CARRIAGE_RETURN, Code.FULL_WIDTH_COLON}))
def test_faults_hide_no_others(first):
    """But for full-width colons, behind which it can't be told where turns are."""
    second = Code.BLANK_LINE if first is not Code.BLANK_LINE else Code.DOUBLED_ROLE
    text = "\n\n".join(FAULTS[code].replace("|", "", 1) for code in (first, second))
    codes = [code for code, _ in found(text)]
    assert {first, second} <= set(codes) | ({Code.MISSING_ANSWER} if first is Code.MISSING_ANSWER else set())
    assert len(set(codes)) == len(codes)


def test_of_each_kind_the_first_is_told():
    text = "User:Hi\n\nAssistant:Yes\x00\x01\n\nUser:\n\nAssistant:\n\nUser: a\n\nAssistant:"
    assert found(text) == [(Code.COLON_BLANK, 4), (Code.CONTROL, 22), (Code.EMPTY_ANSWER, 33)]


MESSAGES = [{"role": "user", "content": "a\r\n\r\nb"}, {"role": "assistant", "content": " c "}]
CLEAN = {
    "English": {"text": "User: What’s “naïve” — a word? It’s 5 °C, £3, ½ © façade…"
        "\n\nAssistant: It’s: an adjective!\nYes.\n\nUser: Ok\n\nAssistant: Bye"},
    "Chinese": {"text": "User: 你好，世界：怎么样？\n\nAssistant: 很好！《红楼梦》\n\nUser: 为什么\n\nAssistant: 因为天气好。"},
    "Chinese article": {"text": "《红楼梦》\n\n　　Q：你好。\n\nA：很好，\n\n用户：她说：“好。”\n\nUser 是用户。"},
    "code": {"text": "User: Code?\n\nAssistant: ```python\ndef f(x: int) -> str:\n\treturn f\"{x}\"  # User: x\n```"
        "\n\nUser: Thanks\n\nAssistant: Input: none"},
    "plain code": {"text": "class A:\n\n    def f(self):\n        pass\n\n\n\nUser = A()\n\nx: int = 1\n"},
    "article": {"text": "A title\n\nIt rains.\n\nInput:none\n\nA: x"},
    "other scripts": {"text": "Здравствуй, мир… «Ёлка»\n\nÇa, c’est déjà «là»… À bientôt"
        "\n\nGRÖSSE – MENÜ… “CAFÉ” «AMANHû Â »\n\n×–×\n\nΑθήνα; שלום"},
    "thoughts": {"text": "User: Q\n\nAssistant: <think>a\nb</think>\nA"},
    "messages": {"messages": MESSAGES},
    "instruction": {"instruction": "Add.", "input": "1", "output": "2"},
    "ends with blanks": {"text": "User: Q\n\nAssistant: A\n\n"},
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_good_text_has_no_findings(name):
    assert lint(read(CLEAN[name], part()).text, world()) == []


def test_the_demo_has_no_findings(corpus):
    for line in corpus.read_text(encoding="utf-8").splitlines():
        assert lint(json.loads(line)["text"], world()) == []


WORDS = [
    "café",
    "naïve",
    "à la carte",
    "It’s “so” – and…",
    "25 °C",
    "Größe",
    "привет, мир",
    "你好，世界",
    "γειά σου",
    "مرحبا",
    "🪿 bird",
    "5 €",
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_text_read_in_another_encoding(words, encoding):
    """UTF-8 read as Windows-1252, whose five free bytes are control characters in practice, or as Latin-1."""
    data = words.encode()
    misread = "".join(bytes([b]).decode(encoding, errors="replace").replace("\ufffd", chr(b)) for b in data)
    assert misread != words
    assert lint(words, world()) == []
    assert [code for code, _ in found(f"A text. {misread}, it goes on")] == [Code.MOJIBAKE]


@pytest.mark.parametrize(
    "last",
    [
        "x",
        "。",
        "，",
        "…",
        "……",
        "。。",
        "。。。",
        "）。",
        " 。",
        ")，",
        "x ",
        "x  ",
        "x\t",
        "x\n",
        "x\n ",
        "!",
        "”",
        "好。 ",
    ],
)
@pytest.mark.parametrize("before", ["", "好", "the", "…", "(", " "])
def test_an_unreachable_stop_is_one_that_is_no_token(last, before):
    head, tail = f"User: a\n\nAssistant: b{before}{last}", "\n\nUser: c\n\nAssistant: d"
    check_stops(head + tail)


@functools.cache
def with_special(*special):
    return world().with_special({text: 65530 + i for i, text in enumerate(special)})


def check_stops(text, tokenizer=None):
    """By the tokens: is the one that begins where a turn ends the blank line?"""
    tokenizer = tokenizer or world()
    stops, at = {}, 0
    for token in tokenizer.encode(text):
        stops[at] = token
        at += len(tokenizer.table[token])
    unreachable = [
        turn.end - 1
        for turn in turns(text)
        if turn.answers
        and turn.stop < len(text)
        and not text[turn.begin : turn.end].isspace()
        and turn.begin < turn.end
        and "\r" not in text[turn.end - 1 : turn.stop]
        and stops.get(len(text[: turn.end].encode())) != 261
    ]
    assert [at for code, at in found(text, tokenizer) if code is Code.UNREACHABLE_STOP] == unreachable[:1]


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                "\n\nUser: ",
                "\n\nAssistant: ",
                "。",
                "…",
                "，",
                "）",
                "(",
                " ",
                "\n",
                "\t",
                "好",
                "a",
                " “",
                "\r",
                "<a\n>",
            ]
        ),
        max_size=20,
    )
)
@pytest.mark.parametrize("special", [(), ("<a\n>",)], ids=["World", "special"])
def test_unreachable_stops_of_any_text(pieces, special):
    text = "User: a" + "".join(pieces)
    assert begins_with_a_turn(text, turns(text))
    check_stops(text, with_special(*special))


def test_the_stop_is_a_matter_of_worlds_tokens():
    assert found(FAULTS[Code.UNREACHABLE_STOP].replace("|", ""), bytes_tokenizer()) == []
