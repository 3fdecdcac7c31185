"""Checkpoint files: any corrupted byte is seen, the one before is taken, and nothing of it is silent."""

import json
import random

import numpy as np
import pytest
import torch

from rwkv_core.errors import InputError
from rwkv_core.training.checkpoints import (
    SUMMARY,
    CheckpointFile,
    exist,
    forget,
    intact,
    latest,
    random_states,
    run_id,
    save,
    set_random_states,
)


@pytest.fixture
def folder(tmp_path):
    """A run's folder, after steps 4 and 8."""
    for step in (4, 8):
        write(tmp_path, step)
    return tmp_path


def write(folder, step, digest=None):
    content = {"global_step": step, "digest": digest or folder.name, "run": "its id", "x": torch.full((70,), step)}
    save(folder, lambda path: CheckpointFile().save_checkpoint(content, path))


def corrupt(path, at=100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_newest_is_taken_and_one_before_is_kept(folder, capsys):
    write(folder, 12)
    assert latest(folder) == (folder / "last.ckpt", 12)
    assert torch.load(folder / "previous.ckpt")["global_step"] == 8
    assert capsys.readouterr().out == f"continuing after step 12 ({folder / 'last.ckpt'})\n"
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_every_corrupted_byte_is_seen(folder):
    path = folder / "last.ckpt"
    whole = path.read_bytes()
    assert intact(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert not intact(path), at
    for size in (0, 1, 71, 72, 73, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not intact(path), size
    path.write_bytes(whole + b"\n")
    assert not intact(path)


def test_a_large_file_is_digested_while_it_is_written(tmp_path):
    """Blocks beyond 1 MiB are digested in a thread; the file is what `torch.load` reads."""
    x = torch.randn(3, 1 << 19)
    save(tmp_path, lambda path: CheckpointFile().save_checkpoint({"x": x}, path))
    assert intact(tmp_path / "last.ckpt")
    assert torch.equal(torch.load(tmp_path / "last.ckpt", mmap=True)["x"], x)
    corrupt(tmp_path / "last.ckpt", at=4_000_000)
    assert not intact(tmp_path / "last.ckpt")


def test_a_corrupted_one_is_set_aside_and_the_one_before_taken(folder, capsys):
    corrupt(folder / "last.ckpt")
    assert latest(folder) == (folder / "previous.ckpt", 4)
    said = capsys.readouterr()
    assert f"{folder / 'last.ckpt'}: its bytes are not those that were written; kept as last.ckpt.refused" in said.err
    assert "continuing after step 4" in said.out
    write(folder, 8)  # does not put the corrupted one in the place of the whole one
    assert [torch.load(folder / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [8, 4]


def test_with_none_whole_the_run_begins_anew_and_says_so(folder, capsys):
    corrupt(folder / "last.ckpt")
    corrupt(folder / "previous.ckpt", at=-1)
    assert exist(folder)
    assert run_id(folder) is None
    assert latest(folder) == (None, 0)
    assert "no checkpoint is whole; this run begins anew" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"last.ckpt.refused", "previous.ckpt.refused"}
    forget(folder)
    assert not list(folder.iterdir())


def test_nothing_there_is_nothing_to_say(tmp_path, capsys):
    assert latest(tmp_path) == (None, 0)
    assert not exist(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_one_of_another_run_is_refused_and_left(folder):
    write(folder, 12, digest="another")
    before = (folder / "last.ckpt").read_bytes()
    with pytest.raises(
        InputError, match="is of the run another, whose settings, base or data are others than those of"
    ):
        latest(folder)
    assert (folder / "last.ckpt").read_bytes() == before


def test_between_the_two_renames_the_one_before_is_there(folder):
    """What a kill leaves after the newest became the previous one, and before the new one has its name."""
    (folder / "last.ckpt").replace(folder / "previous.ckpt")
    assert latest(folder) == (folder / "previous.ckpt", 8)
    assert run_id(folder) == "its id"
    write(folder, 12)
    assert [torch.load(folder / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [12, 8]


def test_a_fault_while_writing_leaves_both(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(path):
        path.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(folder, fail)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_random_generators_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    random.gauss(0, 1)
    np.random.randn()  # leaves the second of a pair behind
    save(tmp_path, lambda path: CheckpointFile().save_checkpoint({"random": random_states()}, path))
    drawn = [draw() for _ in range(3)]
    set_random_states(torch.load(tmp_path / "last.ckpt", weights_only=True)["random"])
    assert [draw() for _ in range(3)] == drawn


def write_folder(folder, step):
    """As DeepSpeed's processes do: each writes its share."""

    def write(path):
        (path / "shards").mkdir()
        (path / "shards" / "0.pt").write_bytes(bytes([step]) * 1000)
        torch.save({"global_step": step, "digest": folder.name, "run": "its id"}, path / SUMMARY)

    save(folder, write, shared=True)


def test_a_checkpoint_of_many_files_is_one(tmp_path, capsys):
    for step in (4, 8, 12):
        write_folder(tmp_path, step)
    assert latest(tmp_path) == (tmp_path / "last.ckpt", 12)
    assert run_id(tmp_path) == "its id"
    corrupt(tmp_path / "last.ckpt" / "shards" / "0.pt")
    assert latest(tmp_path) == (tmp_path / "previous.ckpt", 8)
    assert (tmp_path / "last.ckpt.refused").is_dir()
    assert "its bytes are not those that were written" in capsys.readouterr().err
    write_folder(tmp_path, 16)
    (tmp_path / "last.ckpt" / "shards" / "0.pt").unlink()
    assert not intact(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / "sha256.json").write_text(json.dumps({}))
    assert not intact(tmp_path / "last.ckpt")
    forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_of_several_processes_one_puts_it_into_place(tmp_path):
    asked = []
    save(tmp_path, asked.append, first=False)
    assert asked == [tmp_path / "last.ckpt"]
    assert not list(tmp_path.iterdir())
