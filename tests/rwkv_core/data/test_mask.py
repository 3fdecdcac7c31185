import itertools
import unicodedata

import numpy as np
import pytest
from byte_level_bpe import bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import part

from rwkv_core.data.dialogue import read, spans
from rwkv_core.data.mask import byte_lengths, learned_tokens
from rwkv_core.data.source import Unusable
from rwkv_core.tokenizer import bytes_tokenizer, pile, world


def slow(tokenizer, tokens, text, learned):
    """Token by token: the character that its first byte belongs to is looked up; and whether its other bytes are as it."""
    owner = [i for i, character in enumerate(text) for _ in character.encode("utf-8", errors="surrogateescape")]
    inside = [any(a <= i < b for a, b in learned) for i in range(len(text))]
    mask, straddling, at = [], 0, 0
    for token in tokens:
        flags = [inside[owner[at + k]] for k in range(len(tokenizer.table[token]))]
        mask.append(flags[0])
        straddling += len(set(flags)) > 1
        at += len(flags)
    assert at == len(owner)
    return mask, straddling


def check(tokenizer, text, learned):
    tokens = tokenizer.encode(text)
    made = learned_tokens(tokenizer, tokens, text, learned)
    assert (made.learned.tolist(), made.straddling) == slow(tokenizer, tokens, text, learned)
    assert made.learned.dtype == np.bool_
    return tokens, made


def test_the_tokens_of_answers_and_their_ends():
    text = "User: 你好\n\nAssistant: 你好！🪿\n\nUser: Why?\n\nAssistant: So."
    tokens, (learned, straddling) = check(world(), text, spans(text, part(mask="qa")))
    said = [world().decode([t for t, _ in run]) for is_learned, run in runs(tokens, learned) if is_learned]
    assert said == [" 你好！🪿\n\n", " So."]
    assert straddling == 0


def runs(tokens, learned):
    return itertools.groupby(zip(tokens, learned.tolist(), strict=True), key=lambda pair: pair[1])


def test_a_token_that_straddles_goes_by_its_first_byte():
    text = "User: a\n\nAssistant:** b\n\nUser: c\n\nAssistant: d"
    tokens, made = check(world(), text, spans(text, part(mask="qa")))
    assert [world().decode([t]) for t, flag in zip(tokens, made.learned, strict=True) if flag] == [" b", "\n\n", " d"]
    assert made.straddling == 1  # ":**"
    text = "a你b"
    tokens, made = check(bytes_tokenizer(), text, ((1, 2),))
    assert made.learned.tolist() == [False, True, True, True, False]


def test_all_and_nothing():
    tokens = world().encode("a text")
    assert learned_tokens(world(), tokens, "a text", None).learned.tolist() == [True] * len(tokens)
    assert learned_tokens(world(), tokens, "a text", ()).learned.tolist() == [False] * len(tokens)
    for learned in (None, ()):
        assert learned_tokens(world(), [], "", learned).learned.shape == (0,)
    assert learned_tokens(world(), np.array(tokens, np.uint16), "a text", None).learned.shape == (len(tokens),)


def test_lone_bytes():
    """As of tokens whose bytes are no UTF-8: a character cut in two, and bytes that are none."""
    bird = [world().table.index(bytes([byte])) for byte in "🪿".encode()]
    tokens = [*world().encode("User: a\n\nAssistant: "), *bird[:2], *world().encode("你\n\nUser: "), bird[3]]
    text = world().decode_bytes(tokens).decode("utf-8", errors="surrogateescape")
    learned = spans(text, part(mask="qa"))
    made = learned_tokens(world(), tokens, text, learned)
    assert (made.learned.tolist(), made.straddling) == slow(world(), tokens, text, learned)
    assert world().decode_bytes(np.array(tokens)[made.learned]) == b" " + "🪿".encode()[:2] + "你\n\n".encode()


PIECES = ["User: ", "\n\nUser: ", "\n\nAssistant:", " ", "\n", "\n\n", "\n\n\n", "  ", "。", "…", "，", "：", ":",
          ":**", ":\"", "a", " the", "你好", "привет", "שלום", "안녕", "🪿", "👨‍👩‍👧", "e\u0301", "é", "\u2028",
          "\x00", "\r\n", "\t", "1234"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=20)


@settings(deadline=None, max_examples=300)
@given(pieces=texts, data=st.data())
def test_equals_the_slow_one_on_any_spans(pieces, data):
    text = "".join(pieces)
    points = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    learned = tuple(zip(points[::2], points[1::2], strict=False))
    check(world(), text, learned)


@settings(deadline=None, max_examples=300)
@given(pieces=texts)
def test_equals_the_slow_one_on_conversations(pieces):
    text = "User: a\n\nAssistant: " + "".join(pieces)
    try:
        made = read({"text": text}, part(mask="qa"))
    except Unusable:
        return
    tokens, mask = check(world(), made.text, made.learned)
    if mask.straddling == 0:
        said = world().decode_bytes([t for t, flag in zip(tokens, mask.learned, strict=True) if flag])
        assert said.decode() == "".join(made.text[a:b] for a, b in made.learned)


def test_special_tokens():
    tokenizer = world().with_special({"<end>": 65530, "\n\nUser:": 65531})
    text = "User: a\n\nAssistant: b<end>\n\nUser: c\n\nAssistant: d"
    tokens, made = check(tokenizer, text, spans(text, part(mask="qa")))
    assert 65531 in tokens
    assert made.straddling == 1
    assert tokenizer.decode([t for t, flag in zip(tokens, made.learned, strict=True) if flag]) == " b<end>\n\nUser: d"


def test_a_tokenizer_that_normalizes(tmp_path):
    tokenizer = pile(bpe(tmp_path / "tokenizer.json"))
    assert tokenizer.normalizes
    assert not world().normalizes
    # one becomes shorter, one longer, one stays as long
    text = "User: e\u0301\u0301 \u0958\n\nAssistant: \u212b \u0958 e\u0301 \uf900\n\nUser: \u0958 e\u0301"
    learned = spans(text, part(mask="qa"))
    tokens = tokenizer.encode(text)
    made = learned_tokens(tokenizer, tokens, text, learned)
    said = tokenizer.decode([t for t, flag in zip(tokens, made.learned, strict=True) if flag])
    assert said == unicodedata.normalize("NFC", text[learned[0][0] : learned[0][1]])
    normal = unicodedata.normalize("NFC", text)
    assert made.learned.tolist() == slow(tokenizer, tokens, normal, spans(normal, part(mask="qa")))[0]
    text = "a>\u0338b"  # "≯" joins a mark and what follows it
    with pytest.raises(Unusable, match="half of a character is learned"):
        learned_tokens(tokenizer, tokenizer.encode(text), text, spans(text, part(mask="se", marks=("<", ">"))))


def test_tokens_of_another_text_are_refused():
    with pytest.raises(Unusable, match="1 tokens of 1 bytes: are not those of a text of 2 bytes, 'ab'"):
        learned_tokens(world(), world().encode("a"), "ab", ((0, 1),))


def test_lengths_are_those_of_the_table():
    assert byte_lengths(world()).tolist() == [len(entry) for entry in world().table]
