import importlib.util
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import rwkv
import tokenizers
from byte_level_bpe import bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import pre_tokenizers

from rwkv_core import tokenizer
from rwkv_core.errors import InputError, WorldError
from rwkv_core.tokenizer import (
    END,
    VOCAB_SIZE,
    Tokenizer,
    bytes_tokenizer,
    for_vocabulary,
    greedy_encoder,
    named,
    pile,
    read_vocabulary,
    world,
)

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
    tokenizer = world.__wrapped__()
    assert tokenizer.decode([33, 11]) == " \n"  # who only decodes does not wait for it
    for _ in range(2):
        with pytest.raises(WorldError, match="does not encode greedily"):
            tokenizer.encode("a")


def test_a_damaged_vocabulary_file_is_refused(tmp_path):
    (tmp_path / "good").write_text("1 'a' 1\n2 b'\\xff' 1\n3 ' b' 2\n")
    assert read_vocabulary(tmp_path / "good")[:4] == (b"", b"a", b"\xff", b" b")
    (tmp_path / "bad").write_text("1 'a' 2\n")
    with pytest.raises(WorldError, match="the length at the line's end must fit"):
        read_vocabulary(tmp_path / "bad")


def test_greedy_takes_the_longest():
    encode = greedy_encoder([b"", b"a", b"ab", b"abc", b"b", b"c", b"d"])
    assert Tokenizer([b""], encode).encode("abcabdb") == [3, 2, 6, 4]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_bytes_are_tokens(text):
    ids = bytes_tokenizer().encode(text)
    assert ids == list(text.encode())
    assert bytes_tokenizer().decode(ids) == text


def test_byte_0_is_the_end():
    assert len(bytes_tokenizer().table) == 256
    assert bytes_tokenizer().decode([72, END, 105]) == "Hi"
    with pytest.raises(InputError, match=r"U\+0000 at character 2: 0 is the end of a document; remove it"):
        bytes_tokenizer().encode("Hi\0")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return bpe(tmp_path_factory.mktemp("pile") / "tokenizer.json")


@pytest.mark.parametrize("text", [*TEXTS, "to the   other  the"], ids=range(len(TEXTS) + 1))
def test_pile_equals_the_package(text, file):
    official = tokenizers.Tokenizer.from_file(str(file))
    ids = pile(file).encode(text)
    if "<|" not in text:
        assert ids == official.encode(text).ids
    assert pile(file).decode(ids) == official.decode(ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(text=st.text())
def test_pile_keeps_any_text(text, file):
    ids = pile(file).encode(text)
    assert pile(file).decode(ids) == unicodedata.normalize("NFC", text)
    assert pile(file).decode_bytes(ids) == unicodedata.normalize("NFC", text).encode()
    assert END not in ids


def test_text_is_never_the_end_of_a_document(file):
    ids = pile(file).encode("a<|endoftext|>b<|padding|>")
    assert not {0, 1} & set(ids)
    assert pile(file).decode(ids) == "a<|endoftext|>b<|padding|>"
    assert pile(file).decode([0, 1]) == ""


def test_a_file_that_is_no_such_tokenizer_is_refused(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["Ġt", "he", "Ġthe"]
    for i, (names, options, fault) in enumerate(
        [
            (["<|padding|>", "<|endoftext|>", *alphabet, *merged], {}, r"its token 0 must be <\|endoftext\|>"),
            (["<|endoftext|>", *alphabet, *merged, "你"], {}, "'你': is no token of a byte-level BPE"),
            (["<|endoftext|>", *alphabet[1:], *merged], {}, "does not decode to itself"),
            (["<|endoftext|>", *alphabet, *merged], {"prefix": True}, "does not decode to itself"),
        ]
    ):
        with pytest.raises(InputError, match=fault):
            pile(bpe(tmp_path / f"{i}.json", names=names, **options))
    (tmp_path / "text").write_text("no json")
    with pytest.raises(InputError, match=r"must be a file of the tokenizers package; download it again"):
        pile(tmp_path / "text")
    with pytest.raises(InputError, match=r"no tokenizer is there; .*20B_tokenizer.json"):
        pile(tmp_path / "nothing")


def test_the_package_is_asked_for_where_it_is_used(file, monkeypatch):
    code = "import sys, rwkv_core.tokenizer; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorldError, match=r"tokenizers: .* is missing; pip install 'rwkv-flow\[pile\]'"):
        pile.__wrapped__(file)


def test_a_setting_names_the_tokenizer(file):
    assert (named("world"), named("bytes"), named(str(file))) == (world(), bytes_tokenizer(), pile(file))
    with pytest.raises(InputError, match="no tokenizer is there"):
        named("World")


SPECIAL = {"<tool>": 65530, "</tool>": 65531, "<tool>:": 65535, "🪿🪿": 65532, "\n\nBird:": 65533}


@pytest.fixture(scope="module")
def special():
    return world().with_special(SPECIAL)


def test_special_texts_are_one_token_each(special):
    text = "User: x<tool>{}</tool><tool>: <tool>🪿🪿🪿\n\nBird: <too"
    ids = special.encode(text)
    plain = world().encode
    assert ids == [
        *plain("User: x"), 65530, *plain("{}"), 65531, 65535, *plain(" "), 65530, 65532, *plain("🪿"), 65533, *plain(" <too"),
    ]  # fmt: skip
    assert special.decode(ids) == text
    assert special.decode_bytes([65530, 65534]) == b"<tool>"
    assert special.encode("<tool>") == [65530]
    assert special.encode("") == []


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from([*SPECIAL, "<", "tool>", "🪿", "\n", "Bird:", "a"]) | st.text(max_size=5)).map(
        "".join
    )
)
def test_special_texts_are_found_from_the_left_the_longest_first(text, special):
    ids, at = [], 0
    plain = ""
    while at < len(text):
        found = max((s for s in SPECIAL if text.startswith(s, at)), key=len, default=None)
        if found is None:
            plain += text[at]
            at += 1
            continue
        ids += [*world().encode(plain), SPECIAL[found]]
        plain, at = "", at + len(found)
    assert special.encode(text) == [*ids, *world().encode(plain)]
    assert special.decode(special.encode(text)) == text


def test_special_tokens_make_another_vocabulary(special):
    assert world().with_special({}) is world()
    assert len(special.table) == VOCAB_SIZE
    assert special.digest != world().digest
    assert {i: entry for i, entry in enumerate(special.table) if entry != world().table[i]} == {
        i: text.encode() for text, i in SPECIAL.items()
    }
    assert named("world", SPECIAL).digest == special.digest
    assert world().with_special({"<tool>": 65530}).digest != world().with_special({"<tool>": 65531}).digest


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"": 65530}, "special token '': must be a text that is no token yet; choose another"),
        ({"the": 65530}, "special token 'the': must be a text that is no token yet"),
        ({"<a>": 65529}, "special token '<a>': 65529: free are 65530 to 65535, each once"),
        ({"<a>": 65536}, "special token '<a>': 65536: free are"),
        ({"<a>": 65530, "<b>": 65530}, "special token '<b>': 65530: free are"),
    ],
)
def test_special_tokens_that_cannot_be(tokens, message):
    with pytest.raises(InputError, match=message):
        world().with_special(tokens)


def test_only_world_has_special_tokens(special, file):
    for other in (bytes_tokenizer(), pile(file), special):
        with pytest.raises(InputError, match=r"special_tokens {'<a>': 65530}: only the World vocabulary has free ids"):
            other.with_special({"<a>": 65530})
    with pytest.raises(InputError, match="only the World vocabulary"):
        named("bytes", {"<a>": 65530})


def test_the_vocabulary_tells_the_tokenizer(file):
    assert for_vocabulary(65536) is for_vocabulary(0) is world()
    assert for_vocabulary(256) is bytes_tokenizer()
    whole = pile(file)
    assert for_vocabulary(0, file).table == for_vocabulary(len(whole.table), file).table == whole.table
    filled = for_vocabulary(300, file)
    assert (len(filled.table), filled.digest) == (300, whole.digest)
    assert filled.encode("to the") == whole.encode("to the")


def test_a_vocabulary_that_tells_none_needs_a_file(file):
    for size in (50277, 50304, 50432):
        with pytest.raises(
            InputError, match=f"a vocabulary of {size}: .* Pile models.*; give their 20B_tokenizer.json"
        ):
            for_vocabulary(size)
    for size in (100, 50433, 50276):
        with pytest.raises(InputError, match=rf"a vocabulary of {size}: known are 65536 \(World\) and 256 \(bytes\)"):
            for_vocabulary(size)
    with pytest.raises(InputError, match="has 262 tokens: the model has 256; give the tokenizer of this model"):
        for_vocabulary(256, file)
