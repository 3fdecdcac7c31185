from pathlib import Path

import pytest
import rwkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_core import tokenizer
from rwkv_core.errors import WorldError
from rwkv_core.tokenizer import END, VOCAB_SIZE, Tokenizer, greedy_encoder, read_vocabulary, world

TEXTS = [
    "", " ", "\n", "a", "User: What is it?\n\nAssistant: It is a bird.\n\n", "The quick brown fox jumps over the lazy dog.",
    "你好，世界！這是一個測試。", "Привет, мир. こんにちは世界。 안녕하세요", "def f(x):\n\treturn x ** 2  # 平方\r\n" * 3,
    "🦅🪿👨‍👩‍👧‍👦 e\u0301 ﬁ", "".join(map(chr, range(160))), "\u2028\u2029\u200b\ufeff\ufffd\U0010ffff", " " * 300 + "x",
    "<|endoftext|></s>", "1234567890" * 20, "ÀÁÂÃÄÅÆÇÈÉ", "\x00\x00\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def official():
    return TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")))


@pytest.fixture(scope="module")
def greedy():
    return greedy_encoder(world().table)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_equals_the_official_tokenizer(text, official, greedy):
    ids = world().encode(text)
    assert ids == official.encode(text) == greedy(text)
    assert world().decode(ids) == text


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=60))
def test_equals_the_official_tokenizer_on_any_text(text, official, greedy):
    ids = world().encode(text)
    assert ids == official.encode(text) == greedy(text)
    assert world().decode(ids) == text
    assert END not in ids


def test_table_is_the_official_one(official):
    table = world().table
    assert len(table) == VOCAB_SIZE
    assert {i: entry for i, entry in enumerate(table) if entry} == official.idx2token
    assert table[END] == b""
    assert set(table[65530:]) == {b""}
    assert world().digest == tokenizer.digest([official.idx2token.get(i, b"") for i in range(VOCAB_SIZE)])


def test_digest_depends_on_every_entry():
    one = tokenizer.digest([b"", b"a", b"bc"])
    assert one == tokenizer.digest([b"", b"a", b"bc", b""])
    assert len({one, tokenizer.digest([b"", b"ab", b"c"]), tokenizer.digest([b"", b"a", b"", b"bc"])}) == 3


def test_decodes_what_is_not_text():
    bird = "🪿".encode()
    halves = [world().table.index(bytes([byte])) for byte in bird]
    assert world().decode(halves) == "🪿"
    assert world().decode(halves[:2]) == "\ufffd"
    assert world().decode_bytes(halves[:2]) == bird[:2]
    assert world().decode([END, 65530, 65535]) == ""


def test_a_long_text_is_fast_and_whole():
    text = "The eagle flew over the 海. " * 20_000
    assert world().decode(world().encode(text)) == text


def test_another_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer, "_DIGEST", "0" * 64)
    with pytest.raises(WorldError, match="is not the published World vocabulary; install pyrwkv-tokenizer"):
        world.__wrapped__()


def test_an_encoder_that_is_not_greedy_is_refused(monkeypatch):
    import pyrwkv_tokenizer

    class Bytewise:
        def encode(self, text):
            return [world().table.index(bytes([byte])) for byte in text.encode()]

    monkeypatch.setattr(pyrwkv_tokenizer, "RWKVTokenizer", Bytewise)
    with pytest.raises(WorldError, match="does not encode greedily"):
        world.__wrapped__()


def test_a_damaged_vocabulary_file_is_refused(tmp_path):
    (tmp_path / "good").write_text("1 'a' 1\n2 b'\\xff' 1\n3 ' b' 2\n")
    assert read_vocabulary(tmp_path / "good")[:4] == (b"", b"a", b"\xff", b" b")
    (tmp_path / "bad").write_text("1 'a' 2\n")
    with pytest.raises(WorldError, match="the length at the line's end must fit"):
        read_vocabulary(tmp_path / "bad")


def test_greedy_takes_the_longest():
    encode = greedy_encoder([b"", b"a", b"ab", b"abc", b"b", b"c", b"d"])
    assert Tokenizer([b""], encode).encode("abcabdb") == [3, 2, 6, 4]
