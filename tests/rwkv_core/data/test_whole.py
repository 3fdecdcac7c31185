"""Text to score: any source, row by row."""

import json

import pytest

from rwkv_core.data.binidx import Writer
from rwkv_core.data.whole import Source, whole
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import named, world


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(documents):
    assert all(documents[i][-1] == 0 for i in range(len(documents)))
    assert all(documents.learned(i).all() for i in range(len(documents)))
    return [world().decode(documents[i][:-1].tolist()) for i in range(len(documents))]


def test_rows_are_whole_and_unmasked_and_told_by_file(tmp_path):
    folder = tmp_path / "general"
    (folder / "inside").mkdir(parents=True)
    for name, text in (("a", "A book.\n\nIts second paragraph. 字"), ("b", "Another.")):
        (folder / f"{name}.txt").write_text(text)
    rows = [{"text": "User: a\n\nAssistant: b"}, {"text": ""}, {"prompt": "c", "completion": "d"}]
    write(folder / "inside/rows.jsonl", rows)
    (folder / "inside/third.txt").write_text("A third.")
    documents, sources = whole(folder, world(), tmp_path / "out")
    assert texts(documents) == [
        "A book.\n\nIts second paragraph. 字", "Another.", "User: a\n\nAssistant: b", "User: c\n\nAssistant: d", "A third.",
    ]  # fmt: skip
    assert sources == [Source(".", 0, 2), Source("inside/rows.jsonl", 2, 2), Source("inside", 4, 1)]
    write(folder / "inside/rows.jsonl", [{"neither": 1}])
    with pytest.raises(InputError, match=r"inside/rows.jsonl:1.*every row is scored"):
        whole(folder, world(), tmp_path / "out")


def test_a_single_file_is_one_source(tmp_path):
    (tmp_path / "one.txt").write_text("All of it.")
    documents, sources = whole(tmp_path / "one.txt", world(), tmp_path / "out")
    assert (texts(documents), sources) == (["All of it."], [Source("one.txt", 0, 1)])


def test_rows_of_tokens_are_taken_as_they_are(tmp_path):
    (tmp_path / "ids").mkdir()
    writer = Writer(tmp_path / "ids" / "x", "int32", beside=False)
    for row in ([5, 6], [300]):
        writer.add([*row, 0])
    writer.close()
    documents, _ = whole(tmp_path / "ids", world(), tmp_path / "out")
    assert [documents[i].tolist() for i in range(2)] == [[5, 6, 0], [300, 0]]
    with pytest.raises(InputError, match="token 300: the tokenizer has 256"):
        whole(tmp_path / "ids", named("bytes", {}), tmp_path / "out")
