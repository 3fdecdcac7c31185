import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rwkv_core import files
from rwkv_core.errors import WorldError
from rwkv_core.files import link, sha256, whole_file, whole_folder


def names(folder):
    return [path.name for path in folder.iterdir()]


def fail(manager, path, error):
    """The block has written something when it fails."""
    with manager(path) as temporary:
        (temporary / "new" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "x"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["x"]


def test_a_file_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail(whole_file, path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "x"
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("1")
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "1"
    assert names(path.parent) == ["x"]


def test_a_folder_replaces_the_one_before(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    (path / "old").write_text("0")
    with whole_folder(path) as temporary:
        (temporary / "new").write_text("1")
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["x"]


def test_a_folder_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    (path / "old").write_text("0")
    with pytest.raises(KeyboardInterrupt):
        fail(whole_folder, path, KeyboardInterrupt())
    assert names(path) == ["old"]
    assert names(tmp_path) == ["x"]


def test_no_instant_is_without_the_folder(tmp_path):
    path, stop, missed = tmp_path / "x", threading.Event(), []
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("0")

    def watch():
        while not stop.is_set():
            try:
                path.stat()
            except FileNotFoundError:
                missed.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(100):
        with whole_folder(path) as temporary:
            (temporary / "a").write_text(str(i))
    stop.set()
    watcher.join()
    assert not missed
    assert (path / "a").read_text() == "99"


def test_a_file_system_that_cannot_exchange_gets_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    test_a_folder_replaces_the_one_before(tmp_path)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from rwkv_core.files import whole_file, whole_folder
with {manager}(Path(sys.argv[1])) as temporary:
    file = temporary / "a" if temporary.is_dir() else temporary
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("manager", ["whole_file", "whole_folder"])
def test_a_kill_leaves_the_old_content(manager, tmp_path):
    path = tmp_path / "x"
    if manager == "whole_folder":
        path.mkdir()
    content = path / "a" if manager == "whole_folder" else path
    content.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED.format(manager=manager), str(path)])
    assert done.returncode == -signal.SIGKILL
    assert content.read_text() == "old"
    with getattr(files, manager)(path) as temporary:
        (temporary / "a" if manager == "whole_folder" else temporary).write_text("new")
    assert content.read_text() == "new"


@pytest.mark.parametrize("manager", [whole_file, whole_folder])
def test_a_folder_below_a_file_is_named(manager, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorldError, match="a file stands where a folder must be; move it away") as caught:
        fail(manager, tmp_path / "file" / "deeper" / "x", AssertionError("the block must not run"))
    assert str(tmp_path / "file") in caught.value.value


UNWRITABLE = """
import os, sys
from pathlib import Path
from rwkv_core.errors import WorldError
from rwkv_core.files import whole_file, whole_folder
if os.getuid() == 0:
    os.setuid(65534)
for manager in (whole_file, whole_folder):
    try:
        with manager(Path(sys.argv[1]) / "x") as temporary:
            temporary.write_text("1")
    except WorldError as error:
        print(error)
"""


def test_a_folder_without_permission_is_named(tmp_path):
    """As another user, since nothing is forbidden to root."""
    folder = Path("/tmp") / f"rwkv-flow-{os.getpid()}"
    folder.mkdir(mode=0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", UNWRITABLE, str(folder)], capture_output=True, text=True, check=True
        )
    finally:
        folder.rmdir()
    assert done.stdout.count(f"{folder}") == 2
    assert done.stdout.count(": the folder must be writable; change its permissions, or the path") == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_with_what_is_left(number, tmp_path):
    path = tmp_path / "not yet" / "x"
    with pytest.raises(WorldError, match=r"x: the disk has \d+ MB free: the output needs more") as caught:
        fail(whole_file, path, OSError(number, os.strerror(number)))
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_of_the_block_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EIO, "input/output error"), RuntimeError("a defect"), WorldError("a", "b", "c")):
        with pytest.raises(type(error)) as caught:
            fail(whole_file, tmp_path / "x", error)
        assert caught.value is error


def test_a_file_that_the_block_lacks_is_named(tmp_path):
    with pytest.raises(WorldError, match="no such file: the file must be there"), whole_file(tmp_path / "x"):
        (tmp_path / "no such file").read_text()


def test_the_cause_is_found_behind_an_error_of_torch(tmp_path):
    error = RuntimeError("unexpected position")
    error.__context__ = OSError(errno.ENOSPC, "no space left")
    with pytest.raises(WorldError, match="the output needs more"):
        fail(whole_file, tmp_path / "x", error)


def test_an_inner_file_has_the_last_word(tmp_path):
    with pytest.raises(WorldError, match="inner: the disk has"), whole_folder(tmp_path / "outer") as folder:
        fail(whole_file, folder / "inner", OSError(errno.ENOSPC, "no space left"))


def test_what_a_killed_process_left_long_ago_goes(tmp_path):
    for name in (".x.dead.tmp", ".x.live.tmp", ".y.dead.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".x.folder.tmp").mkdir()
    for name in (".x.dead.tmp", ".y.dead.tmp", ".x.folder.tmp"):
        os.utime(tmp_path / name, (0, 0))
    with whole_file(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    assert sorted(names(tmp_path)) == [".x.live.tmp", ".y.dead.tmp", "x"]


def test_a_file_in_a_folder_s_place_stays(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(WorldError, match="a file stands where a folder must be"), whole_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("works", [True, False])
def test_a_link_has_the_bytes_and_takes_the_place_of_what_was_there(works, tmp_path, monkeypatch):
    """Where the disk can't link, it is a copy."""
    source, path = tmp_path / "source", tmp_path / "deep" / "place"
    path.parent.mkdir()
    path.write_text("before")
    source.write_text("bytes")
    if not works:
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
    link(source, path)
    assert path.read_text() == "bytes"
    assert path.samefile(source) == works
    assert [entry.name for entry in path.parent.iterdir()] == ["place"]
