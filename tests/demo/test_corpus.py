import json

import pytest

from demo.corpus import entries, write


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    counts = write(folder / "pretrain.jsonl", folder / "corpus.jsonl", 0.35)
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("pretrain", "corpus")}
    return folder, counts, rows


def test_there_is_real_english_enough(corpus):
    _, counts, rows = corpus
    assert counts["pretrain_characters"] > 800_000
    assert counts["corpus_characters"] > 200_000
    assert [len(r) for r in rows.values()] == [counts["pretrain_rows"], counts["corpus_rows"]]


def test_rows_are_world_s_user_and_assistant_turns(corpus):
    for row in corpus[2]["corpus"]:
        assert row["text"].startswith("User: ")
        assert row["text"].count("\n\n") == 1  # a blank line ends a turn, so there is none inside one
        assert "\n\nAssistant: " in row["text"]
        assert row["topic"]


def test_no_text_is_in_both_files(corpus):
    rows = corpus[2]
    read = {row["text"].split("\n", 1)[1] for row in rows["pretrain"] if "\n" in row["text"]}
    asked = {row["text"].split("\n\nAssistant: ")[1] for row in rows["corpus"]}
    assert not read & asked


def test_it_is_the_same_every_time(corpus, tmp_path):
    folder = corpus[0]
    write(tmp_path / "pretrain.jsonl", tmp_path / "corpus.jsonl", 0.35)
    for name in ("pretrain.jsonl", "corpus.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_name_says_where_it_stands():
    names = {entry.name: entry for entry in entries()}
    assert names["json"].kind == "module"
    assert names["json.encoder.JSONEncoder.default"].kind == "function"
    assert names["json.encoder.JSONEncoder.default"].topic == "json"
    assert names["assert"].topic == "topic assert"
