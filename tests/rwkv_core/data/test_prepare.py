import json
import subprocess
import sys
from collections import Counter

import pytest

from rwkv_core.data.binidx import Documents
from rwkv_core.data.prepare import held_out, prepare
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.tokenizer import world


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(source, out, fraction=0.3, group=None):
    out.mkdir()
    return prepare(source, fraction, group, world(), out)


def texts(out, side):
    documents = Documents(out / side)
    return [world().decode(documents[i][:-1].tolist()) for i in range(len(documents))]


def test_documents_are_the_rows(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out")
    rows = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    for side in ("train", "valid"):
        wanted = [text for text in rows if held_out(text, 0.3) == (side == "valid")]
        documents = Documents(tmp_path / "out" / side)
        assert [documents[i].tolist() for i in range(len(documents))] == [[*world().encode(t), 0] for t in wanted]
        lengths = [len(documents[i]) for i in range(len(documents))]
        histogram = Counter(next(2**p for p in range(20) if 2**p >= length) for length in lengths)
        assert manifest[side] == {
            "documents": len(wanted), "tokens": sum(lengths), "bytes": sum(len(t.encode()) for t in wanted),
            "longest": max(lengths), "lengths": dict(sorted(histogram.items())),
        }  # fmt: skip
    assert manifest["source"] == {"path": str(corpus), "sha256": sha256(corpus), "rows": 60, "dropped_empty": 0}
    assert manifest["vocabulary"] == {"sha256": world().digest, "size": 65536}
    assert manifest["holdout"] == {"fraction": 0.3, "group": None, "rows_without_group": 60}
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written == json.loads(json.dumps(manifest))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json", "train.bin", "train.idx", "valid.bin", "valid.idx",
    ]  # fmt: skip


def test_same_source_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        run(corpus, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_counts_add_up(tmp_path):
    rows = [{"text": f"row {i}" if i % 4 else "", "g": i % 7 if i % 3 else None} for i in range(80)]
    write(tmp_path / "x.jsonl", rows)
    manifest = run(tmp_path / "x.jsonl", tmp_path / "out", group="g")
    assert (manifest["source"]["rows"], manifest["source"]["dropped_empty"]) == (80, 20)
    assert manifest["train"]["documents"] + manifest["valid"]["documents"] == 60
    assert manifest["holdout"]["rows_without_group"] == sum(1 for i in range(80) if i % 4 and not i % 3)
    for side in ("train", "valid"):
        assert sum(manifest[side]["lengths"].values()) == manifest[side]["documents"]


def test_a_group_is_on_one_side(corpus, tmp_path):
    run(corpus, tmp_path / "out", group="topic")
    topic = {row["text"]: row["topic"] for row in map(json.loads, corpus.read_text(encoding="utf-8").splitlines())}
    train, valid = ({topic[text] for text in texts(tmp_path / "out", side)} for side in ("train", "valid"))
    assert not train & valid
    assert len(train | valid) == 15


@pytest.mark.parametrize("group", [None, "topic"])
def test_more_rows_move_no_row(group, corpus, tmp_path):
    run(corpus, tmp_path / "before", group=group)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    new = [json.dumps({"text": f"new {i}", "topic": f"new {i}"}) + "\n" for i in range(30)]
    corpus.write_text("".join(new[:15] + lines[::-1] + new[15:]), encoding="utf-8")
    run(corpus, tmp_path / "after", group=group)
    for side in ("train", "valid"):
        assert set(texts(tmp_path / "before", side)) <= set(texts(tmp_path / "after", side))


def test_duplicates_are_on_one_side(tmp_path):
    write(tmp_path / "x.jsonl", [{"text": f"row {i % 20}"} for i in range(100)])
    run(tmp_path / "x.jsonl", tmp_path / "out")
    train, valid = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "valid")
    assert not set(train) & set(valid)
    assert len(train) + len(valid) == 100


def test_the_share_held_out_is_the_fraction():
    for fraction in (0.01, 0.1, 0.5):
        held = sum(held_out(f"group {i}", fraction) for i in range(20_000))
        assert held == pytest.approx(20_000 * fraction, rel=0.15)
    assert all(held_out(f"{i}", 0.5) for i in range(500) if held_out(f"{i}", 0.2))


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        ([], 0.5, "0 rows: none has any text; give it rows with text"),
        ([{"text": ""}] * 3, 0.5, "3 rows: none has any text"),
        ([{"text": "one"}], 0.5, "1 rows, none of them on the (train|valid) side: data.holdout.fraction = 0.5 must"),
        ([{"text": f"{i}"} for i in range(9)], 1e-9, "9 rows, none of them on the valid side"),
        ([{"text": f"{i}"} for i in range(9)], 1 - 1e-9, "9 rows, none of them on the train side"),
    ],
)
def test_a_side_without_documents_is_refused(rows, fraction, message, tmp_path):
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "x.jsonl", tmp_path / "out", fraction)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_bad_row_stops_it(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: "):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


PEAK = """
import sys
from pathlib import Path
from rwkv_core.data.prepare import prepare
from rwkv_core.tokenizer import world
prepare(Path(sys.argv[1]), 0.1, None, world(), Path(sys.argv[2]))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """In kB: three times the text, and no more than a few MB for the documents' lengths and the heap's holes."""
    peaks = []
    for megabytes in (12, 36):
        source, out = tmp_path / f"{megabytes}.jsonl", tmp_path / f"{megabytes}"
        with source.open("w") as file:
            for i in range(megabytes * 250):
                file.write(json.dumps({"text": f"{i} " + "The eagle flew over the sea and came back. " * 93}) + "\n")
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(source), str(out)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 4_000, peaks
