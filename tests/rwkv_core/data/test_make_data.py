"""Against the layouts spelled out, and the tokens of the official package."""

import itertools
import json
import struct
from pathlib import Path

import pytest
import rwkv
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_core.data.make_data import Made, json2binidx, make_data
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import Tokenizer, bytes_tokenizer, world

TEXTS = ["User: hi\n\nAssistant: hello", "ひらがな 🪿", " " * 300, "three\r\n", "x", "three\r\n"]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "novel.v1.jsonl"
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\n  \n".join(lines).encode())  # blank lines are passed over
    return file


@pytest.fixture(scope="module")
def official():
    return TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")))


def index(sizes, code, width):
    """An index of documents of one item each, in bytes."""
    begins = [0, *itertools.accumulate(size * width for size in sizes)][:-1]
    return (
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sizes), len(sizes) + 1)
        + b"".join(struct.pack("<i", size) for size in sizes)
        + b"".join(struct.pack("<q", begin) for begin in begins)
        + b"".join(struct.pack("<q", i) for i in range(len(sizes) + 1))
    )


def test_json2binidx_byte_for_byte(source, official, tmp_path):
    made = json2binidx(source, tmp_path / "out.v1", world())
    documents = [[*official.encode(text), 0] for text in TEXTS]
    assert made == Made(len(TEXTS), sum(map(len, documents)))
    tokens = [token for document in documents for token in document]
    assert (tmp_path / "out.v1_text_document.bin").read_bytes() == struct.pack(f"<{len(tokens)}i", *tokens)
    assert (tmp_path / "out.v1_text_document.idx").read_bytes() == index([len(x) for x in documents], 4, 4)
    assert sorted(x.name for x in tmp_path.iterdir() if x != source) == [
        "out.v1_text_document.bin", "out.v1_text_document.idx",
    ]  # fmt: skip


def copies_in(prefix):
    """The documents of each copy, by the zeros that end them."""
    data = prefix.with_suffix(".bin").read_bytes()
    tokens = struct.unpack(f"<{len(data) // 2}H", data)
    ends = [i + 1 for i, token in enumerate(tokens) if token == 0]
    documents = [tokens[a:b] for a, b in itertools.pairwise([0, *ends])]
    assert ends[-1] == len(tokens)
    assert prefix.with_suffix(".idx").read_bytes() == index([len(x) for x in documents], 8, 2)
    return [documents[i : i + len(TEXTS)] for i in range(0, len(documents), len(TEXTS))]


def test_make_data_byte_for_byte(source, official, tmp_path):
    made = make_data(source, 20, tmp_path / "out", world(), 0)
    wanted = [(*official.encode(text), 0) for text in TEXTS]
    copies = copies_in(tmp_path / "out")
    assert made == Made(20 * len(TEXTS), 20 * sum(map(len, wanted)))
    assert len(copies) == 20
    assert all(sorted(copy) == sorted(wanted) for copy in copies)
    assert len({tuple(copy) for copy in copies}) > 15  # of 360 orders


def test_an_order_is_of_the_seed_and_the_copy_alone(source, tmp_path):
    for name, copies, seed in (("a", 3, 1), ("b", 3, 1), ("c", 2, 1), ("d", 3, 2)):
        make_data(source, copies, tmp_path / name, bytes_tokenizer(), seed)
    a, b, c, d = (copies_in(tmp_path / name) for name in "abcd")
    assert a == b
    assert a[:2] == c
    assert a != d


def test_what_stands_at_the_name_is_replaced_or_stays(source, tmp_path):
    out = tmp_path / "out"
    make_data(source, 2, out, bytes_tokenizer(), 0)
    before = out.with_suffix(".bin").read_bytes()
    out.with_suffix(".mask").touch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(InputError):
        make_data(bad, 1, out, bytes_tokenizer(), 0)
    assert out.with_suffix(".bin").read_bytes() == before
    make_data(source, 1, out, bytes_tokenizer(), 0)
    assert len(copies_in(out)) == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bad.jsonl", "novel.v1.jsonl", "out.bin", "out.idx"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "x.jsonl:2:11: byte 0xff: the file must be UTF-8"),
        (b'{"text": }', "x.jsonl:2:10: .*: is not JSON"),
        (b'{"text": "a"} {', "x.jsonl:2:15: .*: is not JSON"),
        (b'{"words": "a"}', 'x.jsonl:2: a row is an object with a string "text"'),
        (b'{"text": ["a"]}', "x.jsonl:2: a row is an object"),
        (b'"text"', "x.jsonl:2: a str: a row is an object"),
        (b"null", "x.jsonl:2: a NoneType: a row is an object"),
        (b'{"text": "\\ud800"}', r"x.jsonl:2: .*half of a"),
        (b"[" * 100_000, "x.jsonl:2: it is nested more than"),
        (b'{"n": ' + b"1" * 5000 + b"}", "x.jsonl:2: can't be read"),
        (b'{"text": "a\\u0000"}', "x.jsonl:2: U[+]0000 at character 1: 0 is the end of a document"),
    ],
)
@pytest.mark.parametrize("make", ["make_data", "json2binidx"])
def test_a_bad_line_is_named(make, line, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    how = {
        "make_data": lambda *files: make_data(files[0], 1, files[1], bytes_tokenizer(), 0),
        "json2binidx": lambda *files: json2binidx(*files, bytes_tokenizer()),
    }
    with pytest.raises(InputError, match=message):
        how[make](tmp_path / "x.jsonl", tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["x.jsonl"]


def test_texts_without_characters(tmp_path):
    """make_data.py makes a document of them, json2binidx fails."""
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    assert make_data(tmp_path / "x.jsonl", 1, tmp_path / "out", world(), 0) == Made(2, len(world().encode("good")) + 2)
    with pytest.raises(InputError, match=r"x\.jsonl:2: json2binidx makes no document"):
        json2binidx(tmp_path / "x.jsonl", tmp_path / "out", world())


def test_no_rows_are_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="has no rows"):
        make_data(tmp_path / "x.jsonl", 1, tmp_path / "out", world(), 0)
    with pytest.raises(InputError, match=r"none\.jsonl: must be a \.jsonl file"):
        make_data(tmp_path / "none.jsonl", 1, tmp_path / "out", world(), 0)


def test_tokens_that_are_not_the_text_are_refused(source, tmp_path):
    lossy = Tokenizer(world().table, lambda text: world().encode(text.replace("\r", "")))
    with pytest.raises(InputError, match=r"novel\.v1\.jsonl:10: 'three\\r\\n': its tokens are not its text"):
        make_data(source, 1, tmp_path / "out", lossy, 0)
