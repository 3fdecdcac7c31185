import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_core.config import PartConfig
from rwkv_core.data import readers
from rwkv_core.data.binidx import Writer
from rwkv_core.data.source import Refused, Row, plan, rows
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256


def part(files="**", kind="auto", name="all"):
    return PartConfig(
        name=name, files=files, kind=kind, columns={}, blank_lines="keep", think="as_given", mask="none", marks=None, weight=1
    )  # fmt: skip


def read(source, *parts, shard_bytes=16 << 20):
    """What the source has, shard by shard, as another process would read it."""
    found = plan(source, parts or [part()], shard_bytes=shard_bytes)
    return [row for shard in found.shards for row in rows(pickle.loads(pickle.dumps(shard)), source)]


def fields(found):
    assert not [row for row in found if isinstance(row, Refused)]
    return [{name: x.tolist() if name == "tokens" else x for name, x in row.fields.items()} for row in found]


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        path.write_bytes(data)
    return folder


ROWS = [
    {
        "text": f"row {i}, 第{i}行 🪿\n" + "The eagle flew over the sea. " * (i % 7),
        "n": i,
        "messages": [{"role": "user", "content": f'"{i}",\n\r\n?'}, {"role": "assistant", "content": "x" * (i % 40)}],
    }
    for i in range(150)
]
CELLS = [{"text": row["text"], "other": f"{row['n']}", "more": row["messages"][0]["content"]} for row in ROWS]
TOKENS = [[i + 1 + j * 7 for j in range(i % 30 + 1)] for i in range(150)]
JSONL = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()


def to_csv(delimiter):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(CELLS[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(CELLS)
    return file.getvalue().encode()


def to_parquet(table, **how):
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=20, **how)
    return file.getvalue()


def to_arrow(table, new=pa.ipc.new_stream):
    file = io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return file.getvalue()


def to_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def to_binidx(folder, documents):
    writer = Writer(folder / "made")
    for document in documents:
        writer.add([*document, 0])
    writer.close()
    return (folder / "made.idx").read_bytes(), (folder / "made.bin").read_bytes()


def to_int32(idx, data):
    """As json2binidx writes it."""
    items = int.from_bytes(idx[18:26], "little")
    sizes, starts = idx[34 : 34 + 4 * items], idx[34 + 12 * items :]
    offsets = (np.frombuffer(idx, "<i8", items, 34 + 4 * items) * 2).astype("<i8").tobytes()
    return idx[:17] + b"\x04" + idx[18:34] + sizes + offsets + starts, np.frombuffer(data, "<u2").astype(
        "<i4"
    ).tobytes()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Of each kind: its files, the kind to ask for, what was found, and the rows."""
    table = pa.Table.from_pylist(ROWS)
    idx, data = to_binidx(tmp_path_factory.mktemp("binidx"), TOKENS)
    wide_idx, wide = to_int32(idx, data)
    text = "﻿First\nline 第\n\nlast"
    document = [{"text": text.removeprefix("﻿")}]
    tokens = [{"tokens": document} for document in TOKENS]
    one = [{"tokens": TOKENS[29]}]
    return {
        "jsonl": ({"a.jsonl": JSONL}, "auto", "jsonl", ROWS),
        "jsonl.gz": ({"a.jsonl.gz": gzip.compress(JSONL)}, "auto", "jsonl.gz", ROWS),
        "jsonl.zst": ({"a.jsonl.zst": pa.compress(JSONL, "zstd", asbytes=True)}, "auto", "jsonl.zst", ROWS),
        "jsonl packed, by content": ({"a.jsonl": gzip.compress(JSONL)}, "auto", "jsonl.gz", ROWS),
        "jsonl, by content": ({"rows": JSONL}, "auto", "jsonl", ROWS),
        "json": ({"a.json": json.dumps(ROWS, indent=1).encode()}, "auto", "json", ROWS),
        "json.gz": ({"a.json.gz": gzip.compress(json.dumps(ROWS).encode())}, "jsonl", "json.gz", ROWS),
        "json, lines": ({"a.json": JSONL}, "auto", "jsonl", ROWS),
        "csv": ({"a.csv": to_csv(",")}, "auto", "csv", CELLS),
        "csv, semicolons": ({"a.csv": b"\xef\xbb\xbf" + to_csv(";")}, "csv", "csv", CELLS),
        "tsv": ({"a.tsv": to_csv("\t")}, "auto", "csv", CELLS),
        "csv.gz": ({"a.csv.gz": gzip.compress(to_csv(","))}, "auto", "csv.gz", CELLS),
        "parquet": ({"a.parquet": to_parquet(table)}, "auto", "parquet", ROWS),
        "parquet, zstd": ({"a.parquet": to_parquet(table, compression="zstd")}, "parquet", "parquet", ROWS),
        "parquet, by content": ({"part-0": to_parquet(table)}, "auto", "parquet", ROWS),
        "arrow": ({"data-00000-of-00001.arrow": to_arrow(table)}, "auto", "arrow", ROWS),
        "arrow file": ({"a.arrow": to_arrow(table, pa.ipc.new_file)}, "auto", "arrow", ROWS),
        "txt": ({"a.txt": text.replace("\n", "\r\n").encode()}, "auto", "utf-8", document),
        "utf-8": ({"README.md": text.replace("\n", "\r").encode()}, "utf-8", "utf-8", document),
        "txt.gz": ({"a.txt.gz": gzip.compress(text.encode())}, "auto", "utf-8.gz", document),
        "txt, utf-16le": ({"a.txt": text.encode("utf-16-le")}, "auto", "utf-16le", document),
        "utf-16le": ({"a": text.encode("utf-16-le")}, "utf-16le", "utf-16le", document),
        "numpy": ({"a.npy": to_npy(np.array([*TOKENS[29], 0], np.int64))}, "auto", "numpy", one),
        "numpy, uint16": ({"a": to_npy(np.array([*TOKENS[29], 0, 0], np.uint16))}, "auto", "numpy", one),
        "numpy, big-endian": ({"a.npy": to_npy(np.array(TOKENS[29], ">i4"))}, "numpy", "numpy", one),
        "uint16": ({"a.bin": np.array([*TOKENS[29], 0], "<u2").tobytes()}, "uint16", "uint16", one),
        "binidx": ({"a.idx": idx, "a.bin": data}, "auto", "binidx", tokens),
        "binidx, int32": ({"a_text_document.idx": wide_idx, "a_text_document.bin": wide}, "binidx", "binidx", tokens),
    }  # fmt: skip


KINDS = [
    "jsonl", "jsonl.gz", "jsonl.zst", "jsonl packed, by content", "jsonl, by content", "json", "json.gz",
    "json, lines", "csv", "csv, semicolons", "tsv", "csv.gz", "parquet", "parquet, zstd", "parquet, by content",
    "arrow", "arrow file", "txt", "utf-8", "txt.gz", "txt, utf-16le", "utf-16le", "numpy", "numpy, uint16",
    "numpy, big-endian", "uint16", "binidx", "binidx, int32",
]  # fmt: skip


def test_every_kind_has_an_example(kinds):
    assert list(kinds) == KINDS
    asked = set(PartConfig.model_fields["kind"].annotation.__args__)
    assert {found.partition(".")[0] for _, _, found, _ in kinds.values()} | {"auto", "dummy", "wds_img"} == asked | {
        "json"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read(kind, kinds, tmp_path):
    files, asked, found, wanted = kinds[kind]
    put(tmp_path, files)
    assert fields(read(tmp_path, part(kind=asked))) == wanted
    file = plan(tmp_path, [part(kind=asked)]).files[0]
    assert file[:1] + file[3:5] == (sorted(files)[0], found, 0)
    assert file.bytes == sum(map(len, files.values()))
    assert file.sha256 == hashlib.sha256(b"".join(files[name] for name in sorted(files, reverse=True))).hexdigest()
    assert file.lines == (len(ROWS) if found == "jsonl" else None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("binidx")])
def test_each_kind_is_read_as_a_single_file(kind, kinds, tmp_path):
    files, asked, _, wanted = kinds[kind]
    (name,) = files
    source = put(tmp_path, files) / name
    assert fields(read(source, part("*", asked))) == wanted
    assert plan(source, [part(kind=asked)]).sha256 == sha256(source)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_file_whatever_their_size(kind, kinds, tmp_path):
    files, asked, _, _ = kinds[kind]
    put(tmp_path, files)
    whole = read(tmp_path, part(kind=asked))
    for shard_bytes in (1, 100, 5000):
        parts = read(tmp_path, part(kind=asked), shard_bytes=shard_bytes)
        assert list(map(str, parts)) == list(map(str, whole))
    shards = plan(tmp_path, [part(kind=asked)], shard_bytes=1).shards
    assert len({shard.digest for shard in shards}) == len(shards)
    assert plan(tmp_path, [part(kind=asked)], shard_bytes=1).shards == shards
    assert kind != "jsonl" or len(shards) == len(ROWS)
    cut = kind.startswith(("jsonl", "json, lines", "parquet", "arrow", "binidx")) and not kind.startswith("jsonl p")
    assert (len(shards) > 1) == (cut and not kind.endswith((".gz", ".zst")))


LINES = st.lists(
    st.one_of(
        st.dictionaries(st.text(max_size=3), st.text(max_size=30), max_size=3).map(
            lambda row: json.dumps(row).encode()
        ),
        st.sampled_from(
            [b"", b"  ", b"broken", b'{"text": "\xff"}', b'{"text": "\x00"}', b'["a"]', b'{"a": "\\ud800"}']
        ),
        st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 200))
def test_refused_and_accepted_rows_are_the_input(tmp_path_factory, lines, end, ended, shard_bytes):
    """In order, every line that is not blank, once, whatever the shards; and each is named by its own number."""
    folder = tmp_path_factory.mktemp("crawl")
    data = end.join([b"{}", *lines, b""] if ended else [b"{}", *lines])
    put(folder, {"x.jsonl": data})
    found = read(folder / "x.jsonl", shard_bytes=shard_bytes)
    wanted = [(number, raw) for number, raw in enumerate(data.split(b"\n"), 1) if raw.strip()]
    assert [(int(row.where.split(":")[1]), row.raw.removesuffix(b"\n")) for row in found] == wanted
    for row in found:
        try:
            value = json.loads(row.raw.decode())
            json.dumps(value, ensure_ascii=False).encode()
            good = isinstance(value, dict)
        except ValueError:
            good = False
        assert isinstance(row, Row) == good
        if good:
            assert row.fields == value


def test_refused_and_accepted_rows_of_a_table_are_the_input(tmp_path):
    table = [
        b"text,n\n",
        b'"a\n""b""",1\r\n',
        b"\n",
        b"too,many,2\n",
        b"few\n",
        b'"stray" quote,3\n',
        b"caf\xe9,4\n",
        b"\x00,5\n",
        b",\n",
        "第,6".encode(),
    ]
    put(tmp_path, {"x.csv": b"".join(table)})
    found = read(tmp_path / "x.csv")
    assert [row.raw for row in found] == [table[1], *table[3:]]
    assert [row.where for row in found] == [f"x.csv:{line}" for line in (2, 5, 6, 7, 8, 9, 10, 11)]
    assert [row.fields for row in found if isinstance(row, Row)] == [
        {"text": 'a\n"b"', "n": "1"}, {"text": "\x00", "n": "5"}, {"text": "", "n": ""}, {"text": "第", "n": "6"},
    ]  # fmt: skip
    assert [row.reason for row in found if isinstance(row, Refused)] == [
        "3 columns: the header has 2",
        "1 columns: the header has 2",
        "is not CSV (',' expected after '\"')",
        "byte 0xe9 after 3 bytes: the file must be UTF-8",
    ]


LINE = {
    "not JSON": (b'{"text": "a"\n', ":13", r""": is not JSON \(Expecting ',' delimiter\)"""),
    "not JSON, CRLF": (b'{"text": "a"  \r\n', ":1[35]", " is not JSON"),
    "not JSON, last line": (b'{"text": a}', ":10", r"""'\{"text": a\}': is not JSON \(Expecting value\)"""),
    "not JSON after other scripts": ('{"你好": 1, }\n'.encode(), ":1[01]", " is not JSON"),
    "two rows on a line": (b'{"text": "a"} {"text": "b"}\n', ":15", r" is not JSON \(Extra data\)"),
    "text": (b"hello\n", ":1", "'hello': is not JSON"),
    "array": (b'["text"]\n', "", "a list: a row is an object"),
    "string": (b'"text"\n', "", "a str: a row is an object"),
    "null": (b"null\n", "", "a NoneType: a row is an object"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', ":14", "byte 0xe9: the file must be UTF-8"),
    "not UTF-8 after other scripts": (
        '{"text": "你好🪿'.encode() + b'\xff"}\n', ":14", "byte 0xff: the file must be UTF-8"
    ),
    "cut character": ('{"text": "你'.encode()[:-1], ":11", "byte 0xe4: the file must be UTF-8"),
    "half a pair": (b'{"text": "ab\\ud83e"}\n', "", r"\\ud83e at character 3 of text: half of a surrogate pair"),
    "half a pair inside": (b'{"m": [{"of": ["\\udc00"]}]}\n', "", r"\\udc00 at character 1 of a list: half of a"),
    "half a pair in a name": (b'{"\\udc00": 1}\n', "", r"\\udc00 at character 1 of a name: half of a"),
    "nested": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "", "it is nested more than 100 deep"),
    "nested, but json can": (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}\n", "", "it is nested more than 100 deep"),
    "endless number": (b'{"text": "a", "x": ' + b"1" * 5000 + b"}\n", "", "can't be read: .*digits"),
    "NUL": (b"\x00\x00\n", ":1", " is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINE)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_bad_line_is_named_by_file_line_and_column_and_the_others_are_read(case, packed, tmp_path):
    line, where, reason = LINE[case]
    data = b'{"text": "good"}\n\n' + line
    put(tmp_path, {f"x.jsonl{packed}": gzip.compress(data) if packed else data})
    good, bad = read(tmp_path)
    assert good == Row(f"x.jsonl{packed}:1", {"text": "good"}, b'{"text": "good"}\n')
    assert isinstance(bad, Refused)
    assert re.fullmatch(rf"x\.jsonl{packed}:3{where}", bad.where)
    assert re.search(reason, bad.reason)
    assert "\n" not in bad.reason
    assert len(bad.reason) < 300
    assert bad.raw == line


def test_what_is_deep_but_not_too_deep_is_read(tmp_path):
    put(tmp_path, {"x.jsonl": b'{"x": ' + b"[" * 99 + b"]" * 99 + b', "y": "\\ud83e\\udebf"}\n'})
    (row,) = read(tmp_path)
    assert row.fields["y"] == "🪿"


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
    put(tmp_path, {"x.jsonl": data})
    assert [(row.where, row.fields) for row in read(tmp_path)] == [
        ("x.jsonl:1", {"text": "a"}), ("x.jsonl:2", {"text": "b"}),
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_no_rows(name, data, tmp_path):
    put(tmp_path, {name: data})
    assert read(tmp_path) == []
    assert len(plan(tmp_path, [part()]).shards) == (name == "x.csv" or data != b"")


def test_an_empty_text_is_a_row_and_empty_token_files_are_documents(tmp_path):
    put(
        tmp_path,
        {"a.txt": b"", "b.bin": b"", "c.npy": to_npy(np.zeros(0, np.uint16)), "d.npy": to_npy(np.zeros(9, int))},
    )
    found = fields(read(tmp_path, part("*.bin", "uint16", "u"), part()))
    assert found == [{"tokens": []}, {"text": ""}, {"tokens": []}, {"tokens": []}]


def test_end_tokens_are_taken_off_however_many(tmp_path):
    tokens = np.array([5, 0, 7], np.uint16)
    for zeros in (0, 1, 2**20 - 3, 2**20, 3 * 2**20):
        put(tmp_path, {"a.npy": to_npy(np.concatenate([tokens, np.zeros(zeros, np.uint16)]))})
        assert fields(read(tmp_path)) == [{"tokens": [5, 0, 7]}]


def test_an_array_longer_than_what_is_read_at_once(tmp_path):
    """Its elements are cut anywhere by that, numbers too."""
    numbers = [10**10 + i for i in range(200_000)]
    put(tmp_path, {"a.json": json.dumps([*numbers, {"text": "你" * 1_000_000}], ensure_ascii=False).encode()})
    *refused, last = read(tmp_path)
    assert [int(row.raw) for row in refused] == numbers
    assert {row.reason for row in refused} == {"a int: a row is an object"}
    assert (last.where, last.fields) == ("a.json:200001", {"text": "你" * 1_000_000})


def test_dummy_is_the_same_whatever_the_file(tmp_path):
    put(tmp_path, {"a": b"anything \xff"})
    found = read(tmp_path, part(kind="dummy"))
    assert len(found) == 100_000
    assert [row.fields["text"] for row in found[:3]] == [".0+0=0.", ".1+1=2.", ".2+4=6."]
    assert found[12_345][:2] == ("a:12346", {"text": f".2345+{12345**2 % 10000}={2345 + 12345**2 % 10000}."})


def test_several_texts_share_a_shard(tmp_path):
    put(tmp_path, {f"{i:03}.txt": b"x" * 100 for i in range(95)} | {"050b.jsonl": b'{"text": "y"}'})
    found = plan(tmp_path, [part()], shard_bytes=1000)
    assert [len(shard.files) for shard in found.shards] == [10, 10, 10, 10, 10, 1, 1, 10, 10, 10, 10, 4]
    assert [row.where for shard in found.shards for row in rows(shard, tmp_path)] == sorted(
        [f"{i:03}.txt" for i in range(95)] + ["050b.jsonl:1"]
    )
    parted = plan(tmp_path, [part("00*.txt", name="a"), part(name="b")]).shards
    assert [(shard.part, len(shard.files)) for shard in parted] == [(0, 10), (1, 41), (1, 1), (1, 44)]


def test_a_shard_is_known_by_all_it_depends_on(tmp_path):
    put(tmp_path, {"a.jsonl": JSONL, "b.txt": b"b"})

    def digests():
        return [shard.digest for shard in plan(tmp_path, [part()], shard_bytes=10_000).shards]

    before = digests()
    assert len(before) == 5
    put(tmp_path, {"a.jsonl": JSONL.replace(b"149", b"148"), "c.parquet": to_parquet(pa.table({"x": [1]}))})
    assert not set(digests()[:4]) & set(before)  # a line may have moved from one to the other
    assert digests()[4] == before[4]
    put(tmp_path, {"b.txt": b"c"})
    assert digests()[4] != before[4]


FILES = {
    "a.jsonl": b'{"text": "a"}', "chat/b.jsonl": b'{"text": "b"}', "chat/deep/c.jsonl": b'{"text": "c"}', "d.txt": b"d",
}  # fmt: skip


class TestWhichFiles:
    @pytest.mark.parametrize(
        ("pattern", "wanted"),
        [
            ("*", "a d"), ("**", "a b c d"), ("**/*", "a b c d"), ("*.jsonl", "a"), ("**/*.jsonl", "a b c"), ("chat/*", "b"),
            ("chat/**", "b c"), ("chat/**/*.jsonl", "b c"), ("**/deep/*", "c"), ("?.txt", "d"), ("[ab].*", "a"), ("*/*", "b"),
        ],
    )  # fmt: skip
    def test_patterns(self, pattern, wanted, tmp_path):
        put(tmp_path, FILES)
        found = plan(tmp_path, [part(pattern)])
        assert sorted(f.path.split("/")[-1][0] for f in found.files) == wanted.split()
        assert {f.path for f in found.files} | set(found.unread) == set(FILES)

    def test_the_first_part_that_fits_has_it(self, tmp_path):
        put(tmp_path, FILES)
        found = plan(tmp_path, [part("chat/deep/*", name="deep"), part("**/*.jsonl", name="rows"), part(name="rest")])
        assert [(f.part, f.path) for f in found.files] == [
            (0, "chat/deep/c.jsonl"), (1, "a.jsonl"), (1, "chat/b.jsonl"), (2, "d.txt"),
        ]  # fmt: skip
        assert [(shard.part, shard.files) for shard in found.shards] == [(f.part, (f.path,)) for f in found.files]

    def test_a_part_may_be_left_nothing_but_must_match_something(self, tmp_path):
        put(tmp_path, FILES)
        assert [f.part for f in plan(tmp_path, [part(), part("*.txt", name="b")]).files] == [0] * 4
        with pytest.raises(InputError, match=r"data.parts: b: \*.text: no file in .* has such a name; correct"):
            plan(tmp_path, [part(), part("*.text", name="b")])

    def test_a_single_file_needs_one_part_of_many(self, tmp_path):
        put(tmp_path, FILES)
        assert plan(tmp_path / "d.txt", [part("*.jsonl"), part("*.txt", name="b")]).files[0].part == 1

    def test_what_is_no_data_is_named(self, tmp_path):
        about = {
            "LICENSE": b"All rights", "README.md": b"# Read", "x.xlsx": b"PK\x03\x04", "y.bin": b"", "z.tar": b"\x00" * 512,
            "dataset_infos.json": b"{}", "dataset_dict.json": b'{"splits": ["train"]}', "train/dataset_info.json": b"{}",
            "train/state.json": b"{}", "train/cache-5f.arrow": b"", "config.json": b'{\n "a": 1}',
            "empty": b"", "p.gz": gzip.compress(b"?"),
        }  # fmt: skip
        passed_over = {".gitignore": b"/a", ".git/a.jsonl": b"{}", "a.jsonl.dvc": b"outs:", "chat/.x.jsonl": b"{}"}
        put(tmp_path, FILES | about | passed_over)
        (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
        (tmp_path / "nothing.jsonl").symlink_to("nowhere")
        (tmp_path / "elsewhere").symlink_to(tmp_path / "chat")
        os.mkfifo(tmp_path / "pipe.jsonl")
        found = plan(tmp_path, [part()])
        assert [f.path for f in found.files] == sorted([*FILES, "link.jsonl"])
        assert found.unread == sorted([*about, "elsewhere", "nothing.jsonl", "pipe.jsonl"])

    def test_a_data_set_saved_by_datasets(self, tmp_path):
        def saved(records):
            table = pa.Table.from_pylist(records).replace_schema_metadata({"huggingface": '{"info": {"features": {}}}'})
            state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
            return {
                "data-00000-of-00001.arrow": to_arrow(table),
                "dataset_info.json": json.dumps({"citation": ""}, indent=2).encode(),
                "state.json": json.dumps(state, indent=2).encode(),
            }

        put(tmp_path, {"dataset_dict.json": b'{"splits": ["train", "test"]}'})
        put(tmp_path / "train", saved(ROWS))
        put(tmp_path / "test", saved(ROWS[:2]))
        found = read(tmp_path)
        assert fields(found) == ROWS[:2] + ROWS
        assert found[1].where == "test/data-00000-of-00001.arrow:2"
        assert json.loads(found[1].raw) == ROWS[1]
        assert fields(read(tmp_path, part("train/*"))) == ROWS

    @pytest.mark.parametrize("pattern", ["*.bin", "*.idx", "x.*", "**"])
    def test_either_file_of_a_binidx_stands_for_both(self, pattern, kinds, tmp_path):
        files = kinds["binidx"][0]
        put(tmp_path, {"x.idx": files["a.idx"], "x.bin": files["a.bin"], "rest/y": b"?"})
        found = plan(tmp_path, [part(pattern)])
        assert [f.path for f in found.files] == ["x.bin"]
        assert found.unread == ["rest/y"]

    def test_an_index_whose_tokens_another_part_has_is_not_read(self, kinds, tmp_path):
        put(tmp_path, kinds["binidx"][0])
        found = plan(tmp_path, [part("*.bin", "uint16", "raw"), part()])
        assert [(f.path, f.kind) for f in found.files] == [("a.bin", "uint16")]
        assert found.unread == ["a.idx"]

    def test_a_folder_is_known_by_what_is_read(self, tmp_path):
        put(tmp_path, FILES)
        before = plan(tmp_path, [part()]).sha256
        put(tmp_path, {"README.md": b"new"})
        assert plan(tmp_path, [part()]).sha256 == before
        put(tmp_path, {"d.txt": b"D"})
        assert plan(tmp_path, [part()]).sha256 != before


PARQUET = to_parquet(pa.table({"text": ["a", "b"]}))
WRONG = {
    "no such source": ({}, "no.jsonl", "auto", r"no.jsonl: there is no such file or folder; correct data.source"),
    "an empty folder": (
        {"empty/.x": b""}, "empty", "auto", r"empty: nothing in it: no file is one that data.parts read: \*\*",
    ),
    "nothing is matched": (
        {"a.md": b"", "b.md": b""}, "", "auto", r": a.md, b.md: no file is one .*: \*\* \(auto\); correct",
    ),
    "pictures": (
        {"a.tar": b""}, "", "wds_img", "data.parts: all is of kind wds_img: archives of pictures.*; leave the part out",
    ),
    "not parquet": (
        {"a.parquet": b"PAR1 it is not"}, "", "auto", "a.parquet: is not parquet, or is damaged .*; copy it again",
    ),
    "not Arrow": ({"a.arrow": b"nothing"}, "", "auto", "a.arrow: is not Arrow IPC, or is damaged"),
    "empty Arrow": ({"a.arrow": b""}, "", "auto", "a.arrow: is not Arrow IPC, or is damaged"),
    "cut Arrow": (
        {"a.arrow": to_arrow(pa.table({"a": [1]}))[:-8]}, "", "auto", "a.arrow: .*does not end as a stream must",
    ),
    "parquet for csv": ({"a.csv": PARQUET}, "", "csv", "a.csv: parquet: its part reads csv; correct kind or files"),
    "parquet in gz": ({"a.parquet.gz": gzip.compress(PARQUET)}, "", "auto", "parquet inside .gz: .*; unpack it"),
    "one name twice": (
        {"a.parquet": to_parquet(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]))}, "", "auto",
        "a.parquet: 'a': 2 columns have this name; rename them",
    ),
    "one name twice in csv": (
        {"a.csv": b"a,a\n1,2\n"}, "", "auto", "a.csv:1: 'a': 2 columns have this name",
    ),
    "an open quote": (
        {"a.csv": b'a,b\n1,2\n3,"4\n5,6\n'}, "", "auto", "a.csv:3: a quote that begins in this row is never closed",
    ),
    "a header that is not UTF-8": (
        {"a.csv": b"\xe9,b\n1,2\n"}, "", "auto", "a.csv:1: byte 0xe9 .*; the first row must name",
    ),
    "UTF-16 jsonl": (
        {"a.jsonl": '{"a": 1}'.encode("utf-16")}, "", "auto", "a.jsonl: UTF-16: jsonl must be UTF-8; .*iconv",
    ),
    "cut gz": ({"a.jsonl.gz": gzip.compress(JSONL)[:-20]}, "", "auto", "a.jsonl.gz:[0-9]+: is not a whole file"),
    "gz of another program": ({"a.jsonl.gz": b"\x1f\x8b no"}, "", "auto", "a.jsonl.gz: is not gz that can be unpacked"),
    "cut zst": (
        {"a.jsonl.zst": pa.compress(JSONL, "zstd", asbytes=True)[:-9]}, "", "auto", "a.jsonl.zst:?[0-9]*: is not .*Trunc",
    ),
    "array without an end": (
        {"a.json": b'[{"a": 1}\n,{"a"'}, "", "auto", r"a.json:2:2: '\{\"a\"': element 2 is not JSON .Expecting",
    ),
    "array without commas": (
        {"a.json": b'[{"a": 1} {"a": 2}]'}, "", "auto", r"a.json:1:11: .*: after element 1 a , or \] must stand",
    ),
    "more than an array": (
        {"a.json": b'[{"a": 1}]\n\n x'}, "", "auto", r"a.json:3:2: 'x': nothing may follow the array",
    ),
    "array that is not UTF-8": (
        {"a.json": b'[{"a": "\xe9"}]'}, "", "auto", "a.json: is not UTF-8, or is damaged .*0xe9",
    ),
    "no numpy": ({"a.npy": b"\x93NUMPY"}, "", "auto", "a.npy: is not a .npy file, or is damaged"),
    "cut numpy": ({"a.npy": to_npy(np.arange(99))[:-1]}, "", "auto", "a.npy: is not a .npy file, or is damaged"),
    "long numpy": ({"a.npy": to_npy(np.arange(99)) + b"1"}, "", "auto", "a.npy: shape .*, 1 bytes more than it says"),
    "numpy of floats": (
        {"a.npy": to_npy(np.ones(3))}, "", "auto", "a.npy: shape .3,., dtype float64.*must be one row of integers",
    ),
    "numpy, a matrix": (
        {"a.npy": to_npy(np.ones((2, 2), int))}, "", "auto", "a.npy: shape .2, 2.*must be one row of integers",
    ),
    "numpy, objects": ({"a.npy": to_npy(np.array([{}], object))}, "", "auto", "a.npy: is not a .npy file"),
    "odd uint16": ({"a.bin": b"abc"}, "", "uint16", "a.bin: 3 bytes: tokens of two bytes make an even number"),
    "an index by another name": ({"a": b"MMIDIDX"}, "", "auto", "a: the index of a binidx: it is named .idx"),
    "no bin": (
        {"a.idx": b"MMIDIDX"}, "", "auto", "a.idx: a binidx is a .bin and an .idx, and there is no a.bin; copy both",
    ),
    "no idx": (
        {"a.bin": b"x"}, "", "binidx", "a.bin: a binidx is a .bin and an .idx, and there is no a.idx; copy both",
    ),
    "not an index": ({"a.bin": b"x", "a.idx": b"y"}, "", "auto", "a.idx: is not a binidx index"),
    "one of two": (
        {"a.bin": b"x", "a.idx": b"y"}, "a.bin", "auto", "a.bin: a binidx is two files, .*; give their folder as data.source",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_read_is_an_error(case, tmp_path):
    files, source, kind, message = WRONG[case]
    put(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / source, part(kind=kind))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_never_closed_is_not_read_to_the_end(monkeypatch, tmp_path):
    """A fault in what delimits rows must not make a row of all the rest."""
    monkeypatch.setattr(readers, "_LONGEST", 10_000)
    monkeypatch.setattr(readers, "_BUFFER", 5_000)
    rows = {"a.csv": b'a,b\n1,"2\n' + b"3,4\n" * 100_000 + b'"', "b.json": b'[{"a": [' + b"[1, 2], " * 50_000 + b"0]}]"}
    put(tmp_path, rows)
    with pytest.raises(InputError, match=r"a.csv:2: a quote that begins in this row is not closed within 10000 char"):
        read(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"b.json:1:2: .*: element 1 is not JSON .or is longer than 10000 characters"):
        read(tmp_path / "b.json")
    monkeypatch.undo()
    assert [len(row.fields) for row in read(tmp_path)] == [2, 1]


REFUSED = {
    "latin text": ({"a.txt": b"a\nb caf\xe9"}, "auto", "a.txt:2:6", "byte 0xe9: the file must be UTF-8: iconv"),
    "odd utf-16le": (
        {"a.txt": b"\xff\xfea\x00b"},
        "auto",
        "a.txt:1:3",
        "byte 0x62: the file must be little-endian UTF-16",
    ),
    "utf-16be": (
        {"a.txt": "﻿a".encode("utf-16-be")},
        "utf-16le",
        "a.txt",
        "bytes fe ff 00 61: that is another encoding",
    ),
    "utf-32": ({"a.txt": "﻿a".encode("utf-32-le")}, "auto", "a.txt", "bytes ff fe 00 00: that is another encoding"),
    "large token": (
        {"a.npy": to_npy(np.array([1, 2, 65536]))},
        "auto",
        "a.npy",
        "token 65536 at 3: tokens are 0 to 65535",
    ),
    "negative token": ({"a.npy": to_npy(np.array([-1, 2]))}, "auto", "a.npy", "token -1 at 1: tokens are 0 to 65535"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_one_row_may_be_refused(case, tmp_path):
    files, kind, where, reason = REFUSED[case]
    put(tmp_path, files | {"z.txt": b"\xff\xfea\x00" if kind == "utf-16le" else b"good"})
    bad, good = read(tmp_path, part(kind=kind))
    assert isinstance(bad, Refused)
    assert bad.where == where
    assert bad.reason.startswith(reason)
    assert good.fields in ({"text": "good"}, {"text": "a"})


def test_a_value_that_cannot_be_had_is_refused_alone(tmp_path):
    """A string of an Arrow file that is not UTF-8: the others of its batch are read."""
    data = to_arrow(pa.table({"text": [f"row {i:02}" for i in range(40)]})).replace(b"row 17", b"row \xff7")
    put(tmp_path, {"a.arrow": data})
    found = read(tmp_path)
    assert [row.where for row in found] == [f"a.arrow:{i + 1}" for i in range(40)]
    assert [row.where for row in found if isinstance(row, Refused)] == ["a.arrow:18"]


def test_the_checksums_of_parquet_are_looked_at(tmp_path):
    table = pa.table({"text": ["a", "what was written", "z"]})  # the first and the last are in its statistics too
    data = to_parquet(table, compression="none", use_dictionary=False, write_page_checksum=True)
    put(tmp_path, {"a.parquet": data.replace(b"what was written", b"what waz written", 1)})
    with pytest.raises(InputError, match=r"a.parquet:1: is not parquet, or is damaged .*(CRC|checksum)"):
        read(tmp_path)


def test_arrow_values_of_every_type_have_a_raw_form(tmp_path):
    table = pa.table(
        {
            "b": [b"\xff"],
            "t": pa.array([1], pa.timestamp("us")),
            "d": pa.array([{"a": [None, 1.5]}]),
            "c": pa.array(["x"]).dictionary_encode(),
        }
    )
    put(tmp_path, {"a.parquet": to_parquet(table), "b.arrow": to_arrow(table)})
    for row in read(tmp_path):
        assert row.fields["b"] == b"\xff"
        assert json.loads(row.raw)["d"] == {"a": [None, 1.5]}
        assert row.fields["c"] == "x"


def test_rows_before_the_damage_are_given(tmp_path):
    lines = [json.dumps({"text": hashlib.sha256(b"%d" % i).hexdigest() * 50}).encode() + b"\n" for i in range(3000)]
    put(tmp_path, {"a.jsonl.gz": gzip.compress(b"".join(lines))[:-100_000]})
    (shard,) = plan(tmp_path, [part()]).shards
    given = []
    with pytest.raises(InputError, match=r"a.jsonl.gz:(\d+): is not a whole file") as caught:
        given.extend(row.raw for row in rows(shard, tmp_path))
    assert len(given) in (0, int(str(caught.value).split(":")[1]) - 1)  # extend keeps nothing of what fails


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    put(tmp_path, {"a.jsonl": JSONL})
    (shard,) = plan(tmp_path, [part()]).shards
    put(tmp_path, {"a.jsonl": JSONL[:1000]})
    with pytest.raises(InputError, match=rf"has become shorter than {len(JSONL)} bytes; run again"):
        list(rows(shard, tmp_path))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(WorldError, match=r"a.jsonl: can't be read \(No such file"):
        list(rows(shard, tmp_path))


def test_a_file_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b"{}")
    with pytest.raises(InputError, match=r"udce9.jsonl': a file's name must be UTF-8; rename it"):
        plan(tmp_path, [part()])


PEAK = """
import sys
from pathlib import Path
from rwkv_core.config import PartConfig
from rwkv_core.data.source import plan, rows
source = Path(sys.argv[1])
one = PartConfig(
    name="a", files="*", kind="auto", columns={}, blank_lines="keep", think="as_given", mask="none", marks=None, weight=1
)
for shard in plan(source, [one]).shards:
    for row in rows(shard, source):
        pass
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv"])
def test_memory_does_not_grow_with_the_file(name, tmp_path):
    """In kB: four times the rows, and no more than the heap's holes."""
    peaks = []
    for thousands in (4, 16):
        rows = [{"text": f"{i} " + "The eagle flew over the sea. " * 60} for i in range(thousands * 1000)]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        made = {
            "a.jsonl": lambda data=data: data,
            "a.jsonl.gz": lambda data=data: gzip.compress(data, 1),
            "a.jsonl.zst": lambda data=data: pa.compress(data, "zstd", asbytes=True),
            "a.json": lambda rows=rows: json.dumps(rows).encode(),
            "a.csv": lambda rows=rows: ("text\n" + "".join(row["text"] + "\n" for row in rows)).encode(),
        }
        source = put(tmp_path, {name: made[name]()}) / name
        done = subprocess.run([sys.executable, "-c", PEAK, str(source)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 6_000, peaks


def damaged(rng, data, others):
    """A file after something has happened to it."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + rng.choice([1, 4, 100])]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 3:
                data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, b"\x7f" * 8])
            case 4:
                data = bytearray(rng.choice(others))
            case _:
                for _ in range(rng.choice([1, 1, 8])):
                    if data:
                        data[rng.randrange(min(len(data), rng.choice([64, 10**9])))] ^= 1 << rng.randrange(8)
    return bytes(data)


def corrupted(kinds, folder, seeds):
    """Read files of every kind, each damaged by its seed; how many ended in which way."""
    ends = {"read": 0, "refused": 0, "InputError": 0}
    messages = []
    everything = [data for files, *_ in kinds.values() for data in files.values()]
    for seed in seeds:
        rng = random.Random(seed)
        files, asked, _, _ = kinds[KINDS[seed % len(KINDS)]]
        hurt = rng.choice(sorted(files))
        put(folder, files | {hurt: damaged(rng, files[hurt], everything)})
        found = []
        try:
            shards = plan(folder, [part(kind=asked)], shard_bytes=rng.choice([100, 2000, 16 << 20])).shards
            for shard in shards:
                found.extend(rows(shard, folder))
            ends["refused" if any(isinstance(row, Refused) for row in found) else "read"] += 1
        except InputError as error:
            ends["InputError"] += 1
            messages.append(str(error))
        for row in found:
            assert row.where.startswith(tuple(files)), seed
            row.where.encode()
            if isinstance(row, Refused):
                row.reason.encode()
            elif "tokens" in row.fields and isinstance(row.fields["tokens"], np.ndarray):
                assert row.fields["tokens"].dtype == np.uint16, seed
                assert not len(row.fields["tokens"]) or row.fields["tokens"][-1], seed
            else:
                json.dumps(row.fields, ensure_ascii=False, default=str).encode()
        found = None  # maps of the file
        for name in files:
            (folder / name).unlink()
    assert not [message for message in messages if "\n" in message or len(message) > 1000]
    return ends


def test_damage_is_refused_or_an_error(kinds, tmp_path):
    ends = corrupted(kinds, tmp_path, range(500))
    assert min(ends.values()) > 20, ends


@pytest.mark.slow
def test_damage_is_refused_or_an_error_10_000_times(kinds, tmp_path):
    ends = corrupted(kinds, tmp_path, range(10_000))
    assert min(ends.values()) > 400, ends
