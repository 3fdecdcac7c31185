import hashlib

import pytest

from rwkv_core.data.source import Row, rows
from rwkv_core.errors import InputError


def read(tmp_path, data, group=None):
    (tmp_path / "x.jsonl").write_bytes(data)
    return list(rows(tmp_path / "x.jsonl", group))


def test_reads_rows(tmp_path):
    data = '{"text": "a\\nb", "n": 1}\n{"n": [{}], "text": "你好 \\ud83e\\udebf"}\n{"text": ""}'.encode()
    assert read(tmp_path, data) == [Row(1, "a\nb", None), Row(2, "你好 🪿", None), Row(3, "", None)]


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}',
        b'  {"text": "a"} \t\n{"text": "b"}  \n',
    ],
    ids=["LF", "CRLF", "BOM", "blanks around"],
)
def test_line_ends_and_marks(data, tmp_path):
    assert [(row.line, row.text) for row in read(tmp_path, data)] == [(1, "a"), (2, "b")]


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    data = b'\n  \n{"text": "a"}\r\n\r\n\t\n{"text": "b"}\n\n'
    assert [(row.line, row.text) for row in read(tmp_path, data)] == [(3, "a"), (6, "b")]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_no_rows(data, tmp_path):
    assert read(tmp_path, data) == []


def test_group(tmp_path):
    data = b'{"text": "a", "g": "x"}\n{"text": "b"}\n{"text": "c", "g": null}\n{"text": "d", "g": 7}\n'
    assert [row.group for row in read(tmp_path, data, "g")] == ["x", None, None, "7"]
    assert [row.group for row in read(tmp_path, data)] == [None] * 4


def test_digest_is_that_of_the_file(tmp_path):
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}'
    (tmp_path / "x.jsonl").write_bytes(data)
    sha = hashlib.sha256()
    list(rows(tmp_path / "x.jsonl", None, sha))
    assert sha.digest() == hashlib.sha256(data).digest()


BAD = {
    "not JSON": (
        b'{"text": "a"\n',
        r":3:13: .*: is not JSON \(Expecting ',' delimiter\); write one JSON object a line",
    ),
    "not JSON, CRLF": (b'{"text": "a"  \r\n', r":3:1[35]: .* is not JSON"),
    "not JSON, last line": (b'{"text": a}', r":3:10: .*'\{\"text\": a\}'.* is not JSON \(Expecting value\)"),
    "not JSON after other scripts": ('{"你好": 1, }\n'.encode(), r":3:1[01]: .* is not JSON"),
    "two rows on a line": (b'{"text": "a"} {"text": "b"}\n', r":3:15: .* is not JSON \(Extra data\)"),
    "text": (b"hello\n", r":3:1: 'hello': is not JSON"),
    "array": (b'["text"]\n', r':3: a list: a row is an object with a string "text"; add it, or drop the line'),
    "string": (b'"text"\n', ":3: a str: a row is an object"),
    "null": (b"null\n", ":3: a NoneType: a row is an object"),
    "no text": (b'{"content": "a", "id": 1}\n', ":3: fields 'content', 'id': a row is an object"),
    "no fields": (b"{}\n", ":3: fields none: a row is an object"),
    "number for text": (b'{"text": 5}\n', ":3: fields 'text': a row is an object"),
    "null for text": (b'{"text": null}\n', ":3: fields 'text': a row is an object"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', ":3:14: byte 0xe9: the file must be UTF-8; convert it"),
    "not UTF-8 after other scripts": (
        '{"text": "你好🪿'.encode() + b'\xff"}\n',
        ":3:14: byte 0xff: the file must be UTF-8",
    ),
    "cut character": ('{"text": "你'.encode()[:-1], ":3:11: byte 0xe4: the file must be UTF-8"),
    "half a pair": (b'{"text": "ab\\ud83e"}\n', r":3: \\ud83e at character 3 of text: half of a surrogate pair"),
    "half a pair in the group": (
        b'{"text": "ab", "g": "\\udc00"}\n',
        r":3: \\udc00 at character 1 of g: half of a sur",
    ),
    "nested": (
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        ":3: is nested too deeply; write one flat",
    ),
    "endless number": (b'{"text": "a", "x": ' + b"1" * 5000 + b"}\n", ":3: can't be read .*digits"),
    "NUL": (b"\x00\x00\n", r":3:1: .* is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_line_and_column(case, tmp_path):
    line, message = BAD[case]
    with pytest.raises(InputError, match=rf"^{tmp_path}/x\.jsonl{message}") as caught:
        read(tmp_path, b'{"text": "good"}\n\n' + line, "g")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["no.jsonl", "."])
def test_no_file_is_named(path, tmp_path):
    with pytest.raises(InputError, match=r"must be a .jsonl file, one .* a line; correct data.source in params.yaml"):
        list(rows(tmp_path / path, None))


def test_one_row_is_in_memory_at_a_time(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\nbroken')
    reader = rows(tmp_path / "x.jsonl", None)
    assert next(reader).text == "a"
    with pytest.raises(InputError):
        next(reader)
