"""What was measured stays, and nothing else is taken for it."""

import multiprocessing
import os
import time

import pytest

from rwkv_core.errors import WorldError
from rwkv_core.evaluation import store as module
from rwkv_core.evaluation.store import Journal, Store

ABOUT = {"model": "0" * 64, "ctx_len": 512}


def entry(folder):
    (found,) = folder.glob("*.jsonl")
    return found


def fill(folder, pieces=("one", [2.5, float("1e-300")], {"three": 3})):
    with Store(folder).journal(ABOUT) as journal:
        for piece in pieces[len(journal.pieces) :]:
            journal.add(piece)
    return entry(folder)


def again(folder):
    with Store(folder).journal(ABOUT) as journal:
        return journal.pieces


def test_pieces_are_there_the_next_time(tmp_path):
    assert again(tmp_path / "s") == []
    fill(tmp_path / "s")
    assert again(tmp_path / "s") == ["one", [2.5, 1e-300], {"three": 3}]
    with Store(tmp_path / "s").journal({**ABOUT, "ctx_len": 256}) as journal:
        assert journal.pieces == []


def test_without_a_folder_nothing_is_kept(tmp_path):
    store, made = Store(None), []
    for _ in range(2):
        store.once(ABOUT, lambda: made.append(1))
    assert made == [1, 1]
    assert Journal().pieces == []


def test_once_is_once_and_gives_the_same_both_times(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": (1, 2.5), "b": None}

    first, second = (Store(tmp_path / "s").once(ABOUT, make) for _ in range(2))
    assert first == second == {"a": [1, 2.5], "b": None}
    assert made == [1]


def test_a_piece_that_was_cut_off_is_done_again(tmp_path):
    """At every byte of the last line; and what is added then is whole."""
    path = fill(tmp_path / "s")
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert again(tmp_path / "s") == ["one", [2.5, 1e-300]]
        fill(tmp_path / "s")
        assert path.read_bytes() == whole


def test_a_piece_that_was_changed_is_noticed(tmp_path, caplog):
    path = fill(tmp_path / "s")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"2.5", b"2.4"), *lines[3:]]))
    assert again(tmp_path / "s") == ["one"]
    assert "is damaged in line 3: it is made again from there" in caplog.text


def test_an_entry_of_something_else_is_not_taken(tmp_path):
    path = fill(tmp_path / "s")
    with Store(tmp_path / "s").journal({**ABOUT, "model": "1" * 64}) as journal:
        journal.add("another model's")
    other = next(x for x in (tmp_path / "s").glob("*.jsonl") if x != path)
    other.replace(path)
    assert again(tmp_path / "s") == []


def test_other_code_and_other_threads_are_other_entries(tmp_path, monkeypatch):
    fill(tmp_path / "s")
    for name, value in (("_code", lambda: "other"), ("torch.get_num_threads", lambda: 77)):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module.__name__}.{name}", value)
            assert again(tmp_path / "s") == []
    assert len(again(tmp_path / "s")) == 3


def test_what_was_not_used_for_longest_goes(tmp_path):
    folder, now = tmp_path / "s", time.time()
    names = {}
    for i in range(4):
        with Store(folder).journal({"number": i}) as journal:
            journal.add("x" * 1000)
        names[i] = next(x for x in folder.glob("*.jsonl") if x not in names.values())
        os.utime(names[i], (now - 100 + i, now - 100 + i))
    with Store(folder).journal({"number": 0}):
        pass  # it was used just now
    with Store(folder, most=3000).journal({"number": 3}):
        pass
    assert {i for i, path in names.items() if path.exists()} == {0, 3}


def test_a_folder_that_can_t_be_written_to_is_explained(tmp_path):
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(WorldError, match="a file stands where a folder must be"):
        again(tmp_path / "s")


def measure(folder, both):
    def make():
        with (folder / "made").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return 7

    both.wait()
    if Store(folder / "s").once(ABOUT, make) != 7:
        os._exit(1)


def test_two_processes_at_once_measure_once(tmp_path):
    processes = multiprocessing.get_context("fork")
    both = processes.Barrier(2)
    started = [processes.Process(target=measure, args=(tmp_path, both)) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"
    assert again(tmp_path / "s") == [7]
