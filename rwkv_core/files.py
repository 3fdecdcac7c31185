"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_core.errors import WorldError

_ABANDONED = 600.0  # seconds without a write, after which nobody is writing a temporary file any more

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def sha256(path: Path) -> str:
    """Digest of a file's bytes, or of a folder's files and their names, in hexadecimal."""
    if path.is_dir():
        entries = "".join(f"{sha256(f)} {f.relative_to(path).as_posix()}\n" for f in _files(path))
        return hashlib.sha256(entries.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def marks(path: Path) -> list[int]:
    """Size, time and inode: as long as they stay, so does what is in the file, or in the folder's files."""
    facts = [f.stat() for f in (_files(path) if path.is_dir() else [path])]
    return [mark for fact in facts for mark in (fact.st_size, fact.st_mtime_ns, fact.st_ino)]


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON for a person to read, in place: inside `whole_file` or `whole_folder`."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` if the block succeeds and vanishes if it fails.

    Raises:
        WorldError: the folder can't be written to, or the disk is full. What was at `path` is untouched.
    """
    with _explained(path):
        temporary = _temporary(path)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def link(source: Path, path: Path) -> None:
    """Make `path` a second name of the bytes of a file that is only ever replaced, never written in place; else a copy.

    Raises:
        WorldError: as of `whole_file`.
    """
    with whole_file(path) as temporary:
        with contextlib.suppress(OSError):  # another disk, or one that can't
            temporary.hardlink_to(source.resolve())
            return
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def whole_folder(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path`, which replaces `path` if the block succeeds and vanishes if it fails.

    A reader sees the old folder or the new one: where the file system can exchange two names in one step (Linux's
    renameat2), no instant has neither.

    Args:
        path: the folder.
        synced: wait until the disk has it. Where not, a power cut may leave the name with files that lack bytes: who reads them
            must find that out.

    Raises:
        WorldError: the parent can't be written to, or the disk is full. What was at `path` is untouched.
    """
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            if synced:
                for file in sorted(temporary.rglob("*")):
                    _sync(file)
                _sync(temporary)
            if path.exists():
                _exchange(temporary, path)  # the old folder now has the temporary name, and goes below
            else:
                temporary.rename(path)
            if synced:
                _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A new name beside `path`. What a killed process left under such names, which may be gigabytes, goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it first
            if time.time() - max(x.stat().st_mtime for x in (left, *left.rglob("*"))) > _ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _exchange(a: Path, b: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None or renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        spare = b.with_name(a.name + ".old")  # not every file system exchanges: two renames, one instant without `b`
        b.rename(spare)
        a.rename(b)
        spare.rename(a)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error
    except RuntimeError as error:
        # torch.save meets an OSError, then fails to end its archive, and raises that
        if isinstance(error, WorldError) or not isinstance(error.__context__, OSError):
            raise
        raise explain(error.__context__, path) from error


def explain(error: OSError, path: Path) -> Exception:
    """The three-part error for an `OSError` met while writing `path`, or the error itself if it is of another kind."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            free = f"{path}: the disk has {_free(path)} MB free"
            return WorldError(free, "the output needs more than that", "free some space and run again")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            where = error.filename or path.parent
            return WorldError(f"{where}", "the folder must be writable", "change its permissions, or the path")
        case errno.ENOENT:
            return WorldError(
                f"{error.filename or path}",
                "the file must be there",
                "correct the path, or let `dvc repro` make what is missing",
            )
        case errno.ENOTDIR | errno.EEXIST:
            return WorldError(f"{error.filename or path}", "a file stands where a folder must be", "move it away")
    return error


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 1_000_000
