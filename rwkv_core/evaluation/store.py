"""What was measured stays: a model that was scored once is not scored again, and a killed evaluation goes on where it was.

An entry is a file, named by the digest of all that its numbers depend on. It has a line for that, and one for each piece of the
work, each behind its own digest; so a line that was cut off, or changed, is noticed, and its piece is done again.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

import kernels
import rwkv_core
from kernels import build
from rwkv_core.files import explain

T = TypeVar("T")

MOST = 1 << 30
"""Bytes of all entries together; the one that was not used for longest goes first."""

_DIGITS = 16
"""Of a line's digest."""

_CODE = (
    "adapters", "checkpoint.py", "data/binidx.py", "evaluation", "formats", "generation", "models", "quantize.py",
    "tokenizer.py",
)  # fmt: skip
"""What of rwkv_core numbers depend on."""

_log = logging.getLogger(__name__)


class Journal:
    """The pieces of a piece of work that are done, in their order; each is anything that JSON has."""

    def __init__(self, file: BinaryIO | None = None, pieces: list[Any] | None = None) -> None:
        """Around an open entry, at its end; None: in memory alone."""
        self._file, self.pieces = file, pieces if pieces is not None else []

    def add(self, piece: Any) -> None:
        """The next piece is done. It survives this process, if not the machine's power."""
        if self._file is not None:
            self._file.write(_line(piece))
            self._file.flush()
        self.pieces.append(piece)


class Store:
    """A folder of entries, for any number of processes; or none, and nothing is kept."""

    def __init__(self, folder: Path | None, most: int = MOST) -> None:
        """At `folder`, which is made when there is something to keep.

        Args:
            folder: of the entries; None: nothing is kept.
            most: bytes of all of them.
        """
        self._folder, self._most = folder, most

    @classmethod
    def of_user(cls) -> "Store":
        """In the user's cache folder."""
        return cls(build.cache() / "scores")

    @contextlib.contextmanager
    def journal(self, about: Mapping[str, Any]) -> Iterator[Journal]:
        """The entry of these facts, to go on with. Another process that wants it waits, and finds it done.

        Args:
            about: all that the numbers depend on, beside code and machine, which are taken in here.

        Raises:
            WorldError: the folder can't be written to, or the disk is full.
        """
        if self._folder is None:
            yield Journal()
            return
        facts = json.loads(json.dumps({**about, **circumstances()}, sort_keys=True))
        path = self._folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}.jsonl"
        try:
            with _locked(path) as file:
                pieces = _whole_lines(file, path)
                if not pieces or pieces[0] != facts:
                    file.seek(0)
                    file.truncate()
                    pieces = [facts]
                    file.write(_line(facts))
                yield Journal(file, pieces[1:])
            _bound(self._folder, self._most)
        except OSError as error:
            raise explain(error, path) from error

    def once(self, about: Mapping[str, Any], make: Callable[[], T]) -> T:
        """What `make` makes, which must be something that JSON gives back as it was; made once for these facts."""
        with self.journal(about) as journal:
            if not journal.pieces:
                journal.add(json.loads(json.dumps(make())))
            found: T = journal.pieces[0]
            return found


def _bound(folder: Path, most: int) -> None:
    """Remove what was not used for longest, until there is no more than there may be. Who has it open can go on."""
    entries = []
    for entry in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            facts = entry.stat()
            entries.append((facts.st_mtime, facts.st_size, entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries)[:-1]:
        if total <= most:
            break
        entry.unlink(missing_ok=True)
        total -= size


def circumstances() -> dict[str, Any]:
    """What numbers depend on beside models, data and settings: code, torch, and what it computes with.

    With another number of threads, or on another processor, sums are made in another order.
    """
    cuda = torch.cuda.is_available()
    return {
        "code": _code(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _code() -> str:
    """Digest of the sources that numbers are made by."""
    roots = [Path(kernels.__path__[0]), *(Path(rwkv_core.__path__[0]) / part for part in _CODE)]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())
    code = hashlib.sha256()
    for file in files:
        if "__pycache__" not in file.parts:
            code.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return code.hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, open to read and write, and this process's alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    os.utime(path)
                    yield file
                    return
        # it was removed while this process waited for it


def _line(piece: Any) -> bytes:
    text = json.dumps(piece, sort_keys=True).encode()
    return b"%s %s\n" % (hashlib.sha256(text).hexdigest()[:_DIGITS].encode(), text)


def _whole_lines(file: BinaryIO, path: Path) -> list[Any]:
    """What the lines say, up to the first that is not whole; the file ends there from now on."""
    file.seek(0)
    found, end = list[Any](), 0
    for line in file:
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n"):  # the process was killed while it wrote
            break
        if hashlib.sha256(text).hexdigest()[:_DIGITS].encode() != digest:
            _log.warning("%s is damaged in line %d: it is made again from there", path, len(found) + 1)
            break
        found.append(json.loads(text))
        end += len(line)
    file.seek(end)
    file.truncate()
    return found
