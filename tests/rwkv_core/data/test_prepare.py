import csv
import functools
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from data_settings import data, part
from sessions import any_in_session

from rwkv_core import processes
from rwkv_core.data.binidx import Documents
from rwkv_core.data.prepare import held_out, prepare
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.tokenizer import named, world


def kept(group, fraction):
    return held_out(hashlib.sha256(group.encode()).digest(), fraction)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(source, out, *parts, pool=None, shard_bytes=1 << 24, **changes):
    work = out.with_name(f"{out.name} work")
    return prepare(data(source, *parts, **changes), out, work, pool, shard_bytes=shard_bytes)


def texts(out, side):
    documents = Documents(out / side)
    return [world().decode(documents[i][:-1].tolist()) for i in range(len(documents))]


def told(out, code):
    with (out / "lints.csv").open(newline="", encoding="utf-8") as file:
        return [(row["where"], row["message"]) for row in csv.DictReader(file) if row["code"] == code]


def test_documents_are_the_rows(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out")
    rows = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    for side in ("train", "valid"):
        wanted = [text for text in rows if kept(text, 0.3) == (side == "valid")]
        documents = Documents(tmp_path / "out" / side)
        assert [documents[i].tolist() for i in range(len(documents))] == [[*world().encode(t), 0] for t in wanted]
        assert all(documents.learned(i).all() and documents.weight(i) == 1 for i in range(len(documents)))
        lengths = [len(documents[i]) for i in range(len(documents))]
        histogram = Counter(next(2**p for p in range(20) if 2**p >= length) for length in lengths)
        counts = {"documents": len(wanted), "tokens": sum(lengths), "learned": sum(lengths)}
        assert manifest[side] == {
            **counts, "bytes": sum(len(t.encode()) for t in wanted), "longest": max(lengths),
            "lengths": dict(sorted(histogram.items())), "parts": [{"name": "all", "first": 0, **counts}],
        }  # fmt: skip
    assert manifest["source"] == {
        "path": str(corpus), "sha256": sha256(corpus), "files": 1, "files_not_read": [], "rows": 60, "refused": 0,
        "dropped_empty": 0,
    }  # fmt: skip
    assert manifest["vocabulary"] == {"sha256": world().digest, "size": 65536}
    assert manifest["holdout"] == {
        "fraction": 0.3, "group": None, "rows_without_group": 60, "leaks": 0, "leaks_dropped": 0,
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written == json.loads(json.dumps(manifest))
    files = {f"{side}.{kind}" for side in ("train", "valid") for kind in ("bin", "idx", "mask", "weights")}
    tables = {"manifest.json", "metrics.json", "refused.jsonl", "lints.csv", "lengths.csv", "files.csv"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files | tables


def test_same_source_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        run(corpus, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_counts_add_up(tmp_path):
    rows = [{"text": f"row {i}" if i % 4 else "", "g": i % 7 if i % 3 else None} for i in range(80)]
    manifest = run(write(tmp_path / "x.jsonl", rows), tmp_path / "out", group="g")
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


def test_duplicates_are_on_one_side_and_told(tmp_path):
    manifest = run(write(tmp_path / "x.jsonl", [{"text": f"row {i % 20}"} for i in range(100)]), tmp_path / "out")
    train, valid = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "valid")
    assert not set(train) & set(valid)
    assert len(train) + len(valid) == 100
    assert manifest["lints"]["duplicate"] == 80
    where = {place: message for place, message in told(tmp_path / "out", "duplicate")}
    assert where["x.jsonl:21"] == "the same as x.jsonl:1"
    assert "x.jsonl:20" not in where


def test_the_share_held_out_is_the_fraction():
    for fraction in (0.01, 0.1, 0.5):
        held = sum(kept(f"group {i}", fraction) for i in range(20_000))
        assert held == pytest.approx(20_000 * fraction, rel=0.15)
    assert all(kept(f"{i}", 0.5) for i in range(500) if kept(f"{i}", 0.2))


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
    with pytest.raises(InputError, match=message):
        run(write(tmp_path / "x.jsonl", rows), tmp_path / "out", fraction=fraction)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_stops_it(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2.*; correct the row, or let data.refused be above 0"):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN = b'{"text": "half\n{"text": 7}\n{"text": "\xff"}\n[1]\n'


def test_refused_rows_are_listed_and_with_the_others_they_are_the_file(tmp_path):
    rows = [f"row {i}" for i in range(40)]
    good = [json.dumps({"text": text}).encode() + b"\n" for text in rows]
    source = tmp_path / "x.jsonl"
    source.write_bytes(b"".join(good[:20]) + BROKEN + b'{"text": ""}\n' + b"".join(good[20:]))
    manifest = run(source, tmp_path / "out", refused=0.1)
    assert (manifest["source"]["rows"], manifest["source"]["refused"]) == (45, 4)
    assert manifest["source"]["dropped_empty"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text("utf-8").splitlines()]
    assert [line["where"].split(":")[1] for line in lines] == ["21", "22", "23", "24", "25"]
    raw = [line["row"].encode("utf-8", "surrogateescape") for line in lines]
    assert raw == [*BROKEN.splitlines(keepends=True), b'{"text": ""}\n']
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "valid")) == sorted(rows)


def test_more_refused_rows_than_may_be_are_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' * 40 + BROKEN)
    with pytest.raises(InputError, match=r"4 of 44 rows can't be used, first x.jsonl:41.*lets at most 3 be left out"):
        run(tmp_path / "x.jsonl", tmp_path / "out", refused=0.07)
    assert not (tmp_path / "out").exists()


def chat(i):
    return {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}


def test_masks_and_weights_are_those_of_the_rows(tmp_path):
    rows = [chat(i) | ({"weight": 0.5} if i % 2 else {}) for i in range(40)]
    manifest = run(write(tmp_path / "x.jsonl", rows), tmp_path / "out", part(mask="qa", weight=3))
    learned = 0
    for side in ("train", "valid"):
        documents = Documents(tmp_path / "out" / side)
        for i in range(len(documents)):
            text = world().decode(documents[i][:-1].tolist())
            number = int(text.removesuffix(".").split()[-1])
            assert text == f"User: What is {number}?\n\nAssistant: It is {number}."
            assert world().decode(documents[i][documents.learned(i)].tolist()) == f" It is {number}."
            assert documents.learned(i)[-1]
            assert documents.weight(i) == (1.5 if number % 2 else 3)
            learned += int(documents.learned(i).sum())
    assert learned == manifest["train"]["learned"] + manifest["valid"]["learned"]


def test_parts_stand_one_behind_the_other(tmp_path):
    source = tmp_path / "source"
    write(source / "a chat.jsonl", [chat(i) for i in range(30)])
    write(source / "b.jsonl", [{"text": f"article {i}"} for i in range(20)])
    write(source / "c chat.jsonl", [chat(i) for i in range(100, 130)])
    (source / "notes.md").write_text("not for training")
    parts = [part(name="chats", files="*chat.jsonl", mask="qa"), part(name="articles", files="*.jsonl")]
    manifest = run(source, tmp_path / "out", *parts)
    for side in ("train", "valid"):
        chats, articles = manifest[side]["parts"]
        assert (chats["name"], chats["first"], articles["name"]) == ("chats", 0, "articles")
        assert articles["first"] == chats["documents"]
        found = texts(tmp_path / "out", side)
        assert len(found) == chats["documents"] + articles["documents"] == manifest[side]["documents"]
        assert [text.startswith("article") for text in found] == [i >= articles["first"] for i in range(len(found))]
        for name in ("documents", "tokens", "learned"):
            assert chats[name] + articles[name] == manifest[side][name]
    assert manifest["source"]["files_not_read"] == ["notes.md"]
    with (tmp_path / "out" / "files.csv").open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [(row["file"], row["part"]) for row in listed] == [
        ("a chat.jsonl", "chats"), ("c chat.jsonl", "chats"), ("b.jsonl", "articles"),
    ]  # fmt: skip
    assert listed[0]["sha256"] == sha256(source / "a chat.jsonl")


def test_tokens_are_taken_as_they_are_and_masked_by_their_text(tmp_path):
    rows = [f"User: What is {i}?\n\nAssistant: It is {i}." for i in range(30)]
    tokens = [world().encode(text) for text in rows]
    made = tmp_path / "made"
    run(write(tmp_path / "x.jsonl", [{"text": text} for text in rows]), made)
    manifest = run(made, tmp_path / "out", part(files="train.*", kind="binidx", mask="qa"), fraction=0.5)
    found = [Documents(tmp_path / "out" / side) for side in ("train", "valid")]
    all_tokens = [documents[i].tolist() for documents in found for i in range(len(documents))]
    before = Documents(made / "train")
    assert sorted(all_tokens) == sorted(before[i].tolist() for i in range(len(before)))
    assert all(ids[:-1] in tokens and ids[-1] == 0 for ids in all_tokens)
    assert manifest["train"]["learned"] < manifest["train"]["tokens"]


def test_special_tokens_are_one_token_each(tmp_path):
    special = {"<tool>": 65530}
    source = write(tmp_path / "x.jsonl", [{"text": f"call <tool> {i}"} for i in range(20)])
    manifest = run(source, tmp_path / "out", special_tokens=special)
    documents = Documents(tmp_path / "out" / "train")
    assert all(np.count_nonzero(documents[i] == 65530) == 1 for i in range(len(documents)))
    assert manifest["vocabulary"]["sha256"] == named("world", special).digest != world().digest


def near_copies(tmp_path):
    """Rows that are alike but for a word, beside ones that are not: the same topic, different groups."""
    sentence = "the eagle flew far over the sea in spring and found no land until the snow had gone from its nest"
    words = sentence.split()
    rows = []
    for i in range(60):
        text = " ".join(words[i % 20 :] + words[: i % 20]) * 3
        rows.append({"text": text + ("" if i < 20 else f" {i}"), "g": i})
    rows += [{"text": " ".join(f"w{i}x{j}" for j in range(40)), "g": 1000 + i} for i in range(40)]
    return write(tmp_path / "x.jsonl", rows), 60


@pytest.mark.parametrize("leaks", ["keep", "drop"])
def test_near_duplicates_of_held_out_documents_are_found(leaks, tmp_path):
    source, alike = near_copies(tmp_path)
    manifest = run(source, tmp_path / "out", group="g", near_duplicates=0.8, leaks=leaks)
    found = manifest["holdout"]["leaks"]
    assert 5 < found <= alike
    assert manifest["lints"]["leak"] == found == len(told(tmp_path / "out", "leak"))
    assert all(
        re.match(r"x\.jsonl:\d+ is held out, and \d+% the same", message)
        for _, message in told(tmp_path / "out", "leak")
    )
    documents = Documents(tmp_path / "out" / "train")
    assert manifest["train"]["documents"] == len(documents)
    assert manifest["train"]["tokens"] == documents.tokens
    assert manifest["train"]["bytes"] == sum(len(text.encode()) for text in texts(tmp_path / "out", "train"))
    assert manifest["train"]["longest"] == max(documents.sizes)
    assert sum(manifest["train"]["lengths"].values()) == len(documents)
    dropped = found if leaks == "drop" else 0
    assert manifest["holdout"]["leaks_dropped"] == dropped
    assert manifest["train"]["documents"] + manifest["valid"]["documents"] + dropped == 100
    if leaks == "drop":  # those whose words no held-out row has are all there
        assert sum(text.startswith("w") for text in texts(tmp_path / "out", "train")) == sum(
            not kept(str(1000 + i), 0.3) for i in range(40)
        )


def mixed(tmp_path):
    source = tmp_path / "source"
    write(source / "a.jsonl", [chat(i) for i in range(200)])
    write(source / "b.jsonl", [{"text": f"article {i} " * (1 + i % 30)} for i in range(150)])
    return source, [part(name="chats", files="a*", mask="qa"), part(name="rest")]


def test_shards_and_processes_change_no_byte(tmp_path):
    source, parts = mixed(tmp_path)
    run(source, tmp_path / "whole", *parts, near_duplicates=0.5)
    asked = []

    def two(shards):
        asked.append(shards)
        return processes.pool(2, functools.partial(named, "world", {}))

    run(source, tmp_path / "one", *parts, near_duplicates=0.5, shard_bytes=2000)
    run(source, tmp_path / "two", *parts, near_duplicates=0.5, shard_bytes=2000, pool=two)
    assert asked[0] > 10
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    whole = contents(tmp_path / "whole")
    assert {n: x for n, x in whole.items() if n != "lints.csv"} == {
        n: x for n, x in contents(tmp_path / "one").items() if n != "lints.csv"
    }
    assert sorted(whole["lints.csv"].splitlines()) == sorted((tmp_path / "one" / "lints.csv").read_bytes().splitlines())


def test_an_interrupted_preparation_goes_on_with_the_shards_it_lacks(tmp_path, monkeypatch):
    """And with those that a power cut has spoiled."""
    source, parts = mixed(tmp_path)
    run(source, tmp_path / "at once", *parts, shard_bytes=2000)
    from rwkv_core.data import prepare as module

    made, shard = [], module._shard

    def stopping(settings, which, folder):
        if len(made) == 7:
            raise KeyboardInterrupt
        shard(settings, which, folder)
        made.append(folder)

    monkeypatch.setattr(module, "_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", *parts, shard_bytes=2000)
    assert not (tmp_path / "out").exists()
    tokens = (made[2] / "train.bin").read_bytes()
    (made[2] / "train.bin").write_bytes(bytes(len(tokens)))
    (made[3] / "facts.json").write_bytes(b"")
    (made[4] / "valid.idx").unlink()
    again = []
    monkeypatch.setattr(module, "_shard", lambda *given: (shard(*given), again.append(given[2]))[0])
    run(source, tmp_path / "out", *parts, shard_bytes=2000)
    assert len(made) == 7
    assert set(made) & set(again) == set(made[2:5])
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    assert not [p for p in (tmp_path / "out work").iterdir() if p.is_dir()]


def test_shards_of_other_settings_are_not_taken(tmp_path, monkeypatch):
    source, parts = mixed(tmp_path)
    from rwkv_core.data import join
    from rwkv_core.data import prepare as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "join", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", *parts, shard_bytes=2000)
    assert module.join is join.join
    run(source, tmp_path / "out", *[p.model_copy(update={"mask": "none"}) for p in parts], shard_bytes=2000)
    run(source, tmp_path / "other", *[p.model_copy(update={"mask": "none"}) for p in parts], shard_bytes=2000)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/tests"]
from data_settings import data, part
from rwkv_core import processes
from rwkv_core.data.prepare import prepare
def told(done, total):
    print(done, flush=True)
    if done >= int(sys.argv[4]) > 0:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    prepare(data(Path(sys.argv[1]), part(mask="none")), Path(sys.argv[2]), Path(sys.argv[2] + " work"),
            lambda shards: processes.pool(2, int), told, shard_bytes=20_000)
"""


@pytest.mark.slow
def test_killed_at_any_instant_it_goes_on_and_leaves_no_process(tmp_path):
    source = write(tmp_path / "x.jsonl", [{"text": f"row {i} " + "of many words " * 40} for i in range(1500)])
    from data_settings import ROOT

    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), str(ROOT)]
    for shards in (1, 9, 0):
        with subprocess.Popen(
            [*command, str(shards)], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as running:
            done = running.stdout.read().split()
            code = running.wait()
        while any_in_session(running.pid):  # the processes it began end with it
            time.sleep(0.05)
        if shards == 9 and done:
            assert int(done[0]) > 1  # those that were done stayed so
        if shards != 1 and code == 0:
            break  # to the end; its processes may have made all before they heard that the first was killed
        assert code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    run(source, tmp_path / "at once", part(mask="none"))
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


PEAK = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/tests"]
from data_settings import data, part
from rwkv_core.data.prepare import prepare
settings = data(Path(sys.argv[1]), part(mask="none"), near_duplicates=0.8)
prepare(settings, Path(sys.argv[2]), Path(sys.argv[2] + " work"), shard_bytes=2_000_000)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """In kB: from two shards on, three times the text, and no more than some MB for keys and the heap's holes."""
    from data_settings import ROOT

    peaks, draw = [], random.Random(0)
    for megabytes in (6, 18):
        source, out = tmp_path / f"{megabytes}.jsonl", tmp_path / f"{megabytes}"
        with source.open("w") as file:
            for _ in range(megabytes * 250):
                file.write(json.dumps({"text": " ".join(map(str, draw.choices(range(1000, 10_000), k=800)))}) + "\n")
        command = [sys.executable, "-c", PEAK, str(source), str(out), str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8_000, peaks
