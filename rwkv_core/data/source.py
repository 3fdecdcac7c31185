"""What people have becomes rows: which files of a source belong to which part, what they are, and how they are cut into shards.

A shard is what one process reads by itself. Shards depend on the files alone, never on how many processes there are; read one
after the other they are the source. What is named wrongly is an error before the first row is read.
"""

import codecs
import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.config import PartConfig
from rwkv_core.data import readers
from rwkv_core.data.binidx import Documents
from rwkv_core.data.readers import Empty, Refused, Row, Unusable
from rwkv_core.errors import InputError, WorldError

__all__ = ["Empty", "File", "Plan", "Refused", "Row", "Shard", "Unusable", "plan", "rows"]


class File(NamedTuple):
    """A file of the source."""

    path: str
    """Inside the source's folder, with /. Of a binidx the .bin."""
    bytes: int
    """Of a binidx, both files."""
    sha256: str
    """Of its bytes; of a binidx, of the .idx and then the .bin."""
    kind: str
    """What it was found to be: as PartConfig.kind, or json (one array); then .gz or .zst, if it is packed."""
    part: int
    """Number of its part, from 0."""
    lines: int | None
    """Line ends in it, where they were counted: of jsonl that is not packed."""


class Shard(NamedTuple):
    """What one process reads by itself."""

    part: int
    """Number of its part, from 0."""
    kind: str
    """As `File.kind`."""
    files: tuple[str, ...]
    """Paths inside the source; several of files that are one row each."""
    begin: int
    """What to read of a file: bytes of jsonl, row groups of parquet, batches of arrow, documents of binidx. Else 0."""
    end: int
    """Where to end: the first that is not read. Else 0."""
    first: int
    """Number of the first line or row in it, from 1."""
    digest: str
    """Of all that its rows depend on."""


class Plan(NamedTuple):
    """A source, ready to be read."""

    files: list[File]
    """In the order of their shards."""
    unread: list[str]
    """Paths that no part's pattern matches, or that are nothing that is read. Hidden files and DVC's own are not named."""
    shards: list[Shard]
    """By part, then by path, then by position."""
    sha256: str
    """Of a single file its own; of a folder, of the paths and digests of the files that are read."""


SHARD_BYTES = 16 << 20
"""Of a source, in a shard."""

_BY_NAME = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "utf-8",
    ".parquet": "parquet", ".arrow": "arrow", ".npy": "numpy",
}  # fmt: skip
_BY_CONTENT = {
    b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"\x93NUMPY": "numpy", b"MMIDIDX": "binidx",
}  # fmt: skip

_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache-*.arrow")
"""What `datasets` writes beside data, and looks like data."""

_PAIRS = {".idx": ".bin", ".bin": ".idx"}
_TOKEN_PAIRS = ("auto", "binidx")  # kinds that read them
_PACKABLE = ("jsonl", "json", "csv", "utf-8", "utf-16le")

WHOLE = {"utf-8", "utf-16le", "numpy", "uint16"}
"""Kinds of which a file is a row."""

_HEAD = 1 << 16  # bytes that say what a file is
_PIECE = 1 << 20  # bytes


def plan(source: Path, parts: Sequence[PartConfig], *, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Find the files, see what they are, and cut them into shards. Every byte is read once, for its digest.

    Args:
        source: a file or a folder. In a folder, files and folders whose name begins with a dot are passed over, and *.dvc.
        parts: the first whose pattern matches a file has it.
        shard_bytes: size at which a shard is full: the first line end, row group, ... from there on ends it.

    Raises:
        InputError: there is nothing to read; a part matches no file; a file is not what its part or its name says, or is
            damaged.
        WorldError: a file can't be read for another reason.
    """
    for part in parts:
        if part.kind == "wds_img":
            raise InputError(
                f"data.parts: {part.name} is of kind wds_img",
                "archives of pictures, which once trained RWKV's auto-encoder of images, have no text to learn from",
                "leave the part out",
            )
    folder = source if source.is_dir() else source.parent
    names, unread = _names(source)
    found: list[tuple[File, list[tuple[int, int, int]]]] = []
    for number, name in sorted(_assigned(names, parts, source)):
        kind = _kind(folder / name, name, parts[number].kind) if number >= 0 else None
        if kind is None:
            unread.append(name)
        elif kind == "binidx" and source.is_file():
            raise InputError(
                str(source),
                "a binidx is two files, and a source that is one of them does not change with the other",
                "give their folder as data.source, and this name as the files of a part",
            )
        else:
            found.append(_looked_into(folder / name, name, kind, number, shard_bytes))
    if not found:
        patterns = ", ".join(f"{part.files} ({part.kind})" for part in parts)
        there = ", ".join(sorted(unread)[:5]) + (", ..." if len(unread) > 5 else "")
        raise InputError(
            f"{source}: {there or 'nothing in it'}",
            f"no file is one that data.parts read: {patterns}",
            "correct data.source, or files (**/* for those in folders inside too) and kind of a part, in params.yaml",
        )
    files = [file for file, _ in found]
    sha = files[0].sha256
    if source.is_dir():
        sha = hashlib.sha256("".join(f"{file.sha256} {file.path}\n" for file in files).encode()).hexdigest()
    return Plan(files, sorted(unread), _shards(found, shard_bytes), sha)


def most_shards(source: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """No plan of a source has more, by the sizes of its files alone."""
    files = [source / name for name in _names(source)[0]] if source.is_dir() else [source]
    return sum(1 + file.stat().st_size // shard_bytes for file in files if file.exists())


def rows(shard: Shard, source: Path) -> Iterator[Row | Refused]:
    """Read a shard row by row.

    Args:
        shard: one of the plan's.
        source: as `plan` was told.

    Raises:
        InputError: a file is damaged; rows before the damage may have been given.
        WorldError: a file can't be read for another reason.
    """
    folder = source if source.is_dir() else source.parent
    kind, _, packing = shard.kind.partition(".")
    for name in shard.files:
        path = folder / name
        match kind:
            case "jsonl":
                yield from readers.jsonl(path, name, packing, shard.begin, shard.end, shard.first)
            case "json":
                yield from readers.array(path, name, packing)
            case "csv":
                yield from readers.table(path, name, packing)
            case "parquet":
                yield from readers.parquet(path, name, shard.begin, shard.end, shard.first)
            case "arrow":
                yield from readers.arrow(path, name, shard.begin, shard.end, shard.first)
            case "utf-8" | "utf-16le":
                yield from readers.text(path, name, packing, kind.replace("16le", "16-le"))
            case "binidx":
                yield from readers.documents(path, name, shard.begin, shard.end)
            case "numpy":
                yield from readers.numpy(path, name)
            case "uint16":
                yield from readers.uint16(path, name)
            case "dummy":
                yield from readers.dummy(name)


def _names(source: Path) -> tuple[set[str], list[str]]:
    """Paths inside the source of what can be read, and of what is no file: pipes, folders elsewhere, links to nothing.

    Raises:
        InputError: there is no such source, or a name is no text.
        WorldError: a folder can't be read.
    """
    if source.is_file():
        return {source.name}, []
    if not source.is_dir():
        raise InputError(str(source), "there is no such file or folder", "correct data.source in params.yaml")
    found: set[str] = set()
    others = []

    def unreadable(error: OSError) -> None:
        raise WorldError(
            str(error.filename), f"can't be read ({error.strerror})", "see to it, and run again"
        ) from error

    for folder, inner, files in os.walk(source, onerror=unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in [*inner, *files]:
            path = Path(folder, name)
            if name.startswith(".") or name.endswith(".dvc") or (name in inner and not path.is_symlink()):
                continue
            try:
                inside = path.relative_to(source).as_posix()
                inside.encode()
            except UnicodeEncodeError:
                raise InputError(f"{path.as_posix()!a}", "a file's name must be UTF-8", "rename it") from None
            if path.is_file():
                found.add(inside)
            else:
                others.append(inside)
    return found, others


def _assigned(names: set[str], parts: Sequence[PartConfig], source: Path) -> Iterator[tuple[int, str]]:
    """Each path and the number of its part, -1 for none. The two files of a binidx are one, by the name of the .bin.

    Raises:
        InputError: a part's pattern matches no path in a folder.
    """
    matched: set[int] = set()

    def fits(name: str, other: str) -> int:
        found = [
            number
            for number, part in enumerate(parts)
            if _fits(name, part.files) or (other in names and part.kind in _TOKEN_PAIRS and _fits(other, part.files))
        ]
        matched.update(found)
        return found[0] if found else -1

    for name in names:
        other = name[:-4] + _PAIRS[name[-4:]] if name[-4:] in _PAIRS else ""
        number = fits(name, other)
        if not (name.endswith(".idx") and other in names and number >= 0 and parts[number].kind in _TOKEN_PAIRS):
            yield number, name
        elif fits(other, name) != number:
            yield -1, name  # another part has the .bin
    for number, part in enumerate(parts):
        if matched and number not in matched and source.is_dir():
            raise InputError(
                f"data.parts: {part.name}: {part.files}",
                f"no file in {source} has such a name",
                "correct it in params.yaml, or leave the part out",
            )


def _fits(name: str, pattern: str) -> bool:
    return _matches(name.split("/"), pattern.split("/"))


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or (bool(path) and _matches(path[1:], pattern))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _kind(path: Path, name: str, asked: str) -> str | None:
    """What a file is, as `File.kind`; None: nothing that its part reads.

    Raises:
        InputError: it is surely something else than was asked for; or half a binidx, or UTF-16 where that is not read.
        WorldError: it can't be read.
    """
    if asked in ("dummy", "uint16"):
        return asked
    ending = path.suffix
    if asked in _TOKEN_PAIRS and ending in _PAIRS:
        other = path.with_suffix(_PAIRS[ending])
        if other.is_file():
            return "binidx"
        if asked == "binidx" or ending == ".idx":
            raise InputError(name, f"a binidx is a .bin and an .idx, and there is no {other.name}", "copy both")
    if asked == "binidx" or (asked == "auto" and any(fnmatch.fnmatchcase(path.name, about) for about in _ABOUT)):
        return None
    with readers.reading(name, "readable"), path.open("rb") as file:
        head = file.read(_HEAD)
    packing = next((packing for magic, packing in readers.PACKED.items() if head.startswith(magic)), "")
    if packing:
        with readers.reading(name, f"{packing} that can be unpacked"), readers.opened(path, packing) as unpacked:
            head = unpacked.read1(_HEAD)
            with contextlib.suppress(EOFError, OSError, zlib.error):  # damage further on is met by who reads on
                while len(head) < _HEAD and (piece := unpacked.read1(_HEAD - len(head))):
                    head += piece
        ending = path.with_suffix("").suffix
    content = next((kind for magic, kind in _BY_CONTENT.items() if head.startswith(magic)), None)
    if content == "binidx":
        raise InputError(f"{name}: the index of a binidx", "it is named .idx, and its .bin is beside it", "name it so")
    if content is not None and (packing or asked not in ("auto", content)):
        raise InputError(
            f"{name}: {content}" + (f" inside .{packing}" if packing else ""),
            f"its part reads {'no such thing' if asked == 'auto' else asked}",
            "unpack it" if packing else "correct kind or files in params.yaml",
        )
    kind = content or (_BY_NAME.get(ending.lower(), "json") if asked == "auto" else asked)
    lines = ending.lower() in (".jsonl", ".ndjson")
    if kind == "json" or (kind == "jsonl" and not lines):
        kind = _json(head) or ("jsonl" if asked == "jsonl" else "")
    if kind == "utf-8" and asked == "auto" and head.startswith(codecs.BOM_UTF16_LE):
        kind = "utf-16le"
    if kind in ("jsonl", "json", "csv") and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: UTF-16", f"{kind} must be UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
    return (f"{kind}.{packing}" if packing and kind in _PACKABLE else kind) or None


def _json(head: bytes) -> str | None:
    """How a file that begins so has JSON objects, if it does: json, one array; or jsonl, one a line."""
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        return "json"
    line, end, _ = head.partition(b"\n")
    try:
        return "jsonl" if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):
        return "jsonl" if line.startswith(b'{"') and not end and len(head) > _HEAD // 2 else None


def _looked_into(
    path: Path, name: str, kind: str, part: int, shard_bytes: int
) -> tuple[File, list[tuple[int, int, int]]]:
    """A file, and what its shards begin and end at and the number of the first row of each. Its digest is made on the way.

    Raises:
        InputError: it is damaged.
        WorldError: it can't be read.
    """
    together = [path.with_suffix(".idx"), path.with_suffix(".bin")] if kind == "binidx" else [path]
    sha, size, lines = hashlib.sha256(), 0, 1
    starts = [(0, 1)]
    with readers.reading(name, "readable"):
        for each in together:
            with each.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    sha.update(piece)
                    if kind == "jsonl":
                        counted = 0
                        while (goal := starts[-1][0] + shard_bytes - size) <= len(piece):
                            end = piece.find(b"\n", max(goal - 1, counted)) + 1
                            if not end:
                                break
                            lines += piece.count(b"\n", counted, end)
                            starts.append((size + end, lines))
                            counted = end
                        lines += piece.count(b"\n", counted)
                    size += len(piece)
    ranges = [(0, 0, 1)]
    if kind == "jsonl":
        ends = [begin for begin, _ in starts[1:]] + [size]
        ranges = [(begin, end, first) for (begin, first), end in zip(starts, ends, strict=True) if begin < end]
    elif kind in ("parquet", "arrow"):
        sizes, counts = readers.parquet_sizes(path, name) if kind == "parquet" else readers.arrow_sizes(path, name)
        firsts = list(itertools.accumulate(counts, initial=1))
        ranges = [(begin, end, firsts[begin]) for begin, end in _runs(sizes, shard_bytes)]
    elif kind == "binidx":
        with readers.reading(name, "a binidx"):
            documents = Documents(path.with_suffix(""))
        full = max(shard_bytes, size // 64)  # each shard reads the whole index, which must not become most of the work
        ranges = [(begin, end, begin + 1) for begin, end in _runs(documents.sizes, full // 2)]
    return File(name, size, sha.hexdigest(), kind, part, lines - 1 if kind == "jsonl" else None), ranges


def _runs(sizes: Sequence[int] | npt.NDArray[np.integer], full: int) -> Iterator[tuple[int, int]]:
    """Runs of units, begin and end: each ends with the unit that makes it full."""
    ends = np.cumsum(sizes, dtype=np.int64)
    begin = 0
    while begin < len(ends):
        goal = (int(ends[begin - 1]) if begin else 0) + full
        end = min(int(np.searchsorted(ends, goal)) + 1, len(ends))
        yield begin, end
        begin = end


def _shards(found: list[tuple[File, list[tuple[int, int, int]]]], shard_bytes: int) -> list[Shard]:
    """Those of every file in turn; small files that are a row each share one."""
    shards: list[Shard] = []
    together: list[File] = []
    size = 0

    def add(files: list[File], begin: int, end: int, first: int) -> None:
        about = [files[0].kind, [(file.path, file.sha256) for file in files], begin, end, first]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        shards.append(
            Shard(files[0].part, files[0].kind, tuple(file.path for file in files), begin, end, first, digest)
        )

    for (file, ranges), after in itertools.zip_longest(found, [file for file, _ in found[1:]]):
        if file.kind.partition(".")[0] not in WHOLE:
            for each in ranges:
                add([file], *each)
            continue
        together.append(file)
        size += file.bytes
        same = after is not None and (after.part, after.kind) == (file.part, file.kind)
        if not same or size >= shard_bytes:
            add(together, 0, 0, 1)
            together, size = [], 0
    return shards
