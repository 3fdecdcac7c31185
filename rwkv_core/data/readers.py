"""Rows of one file, kind by kind. Each holds a row in memory at a time, or a bounded number of rows of a table.

What is wrong with one row makes it a `Refused`; what is wrong with the file as a whole is an `InputError`. Lines, rows,
elements and documents are counted from 1.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError, Problem, WorldError

PACKED = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
"""How a file begins that is compressed."""

_BUFFER = 1 << 20
_DEEPEST = 100  # far from where json gives up, which depends on how deep its caller is
_LONGEST = (
    1 << 28
)  # bytes of an array's element or a table's cell: longer ones are no rows but faults in what delimits them
_AT_A_TIME = 64  # rows of a table
_DUMMY = 100_000
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of Arrow's


class Unusable(ValueError):
    """A row that nothing can be learned from; the message says why: value: rule."""


class Empty(Unusable):
    """A row without text. It is left out, and is no fault."""


class Refused(NamedTuple):
    """A row that was left out."""

    where: str
    reason: str
    raw: bytes
    """The row itself, as in the file."""


class Row(NamedTuple):
    """A row that could be read."""

    where: str
    """chat/a.jsonl:12, book.txt, x.parquet:17: the path inside the source; the line, or the number of the row."""
    fields: Mapping[str, Any]
    """As in the file. A text has "text", the whole of it; tokens are "tokens", (T,) uint16, without the end token."""
    raw: bytes
    """The row itself: lines as in the file; of parquet, arrow and dummy as JSON; of a file that is one row b""."""


Rows = Iterator[Row | Refused]


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Whatever a library says of the damaged file it reads becomes an error of ours.

    Raises:
        InputError: the file is damaged, or of another kind.
        WorldError: it can't be read for a reason outside of it.
    """
    try:
        yield
    except Problem:
        raise
    except Exception as error:  # zlib, numpy and pyarrow raise what they like
        if isinstance(error, OSError) and error.errno is not None:
            raise WorldError(where, f"can't be read ({error.strerror})", "see to it, and run again") from error
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(where, f"is not {what}, or is damaged ({said})", "copy it again, or make it anew") from error


@contextlib.contextmanager
def opened(path: Path, packing: str) -> "Iterator[io.BufferedReader[Any] | gzip.GzipFile]":
    """The bytes of a file, unpacked where it is packed: "gz", "zst", or "" for not at all."""
    if packing == "zst":
        import pyarrow as pa

        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            yield io.BufferedReader(stream, _BUFFER // 16)  # what is before the damage in it is lost
    elif packing:
        with gzip.GzipFile(path) as unpacked:
            yield unpacked
    else:
        with io.BufferedReader(path.open("rb", buffering=0), _BUFFER) as file:
            yield file


def jsonl(path: Path, name: str, packing: str, begin: int, end: int, first: int) -> Rows:
    """One object a line; blank lines are passed over.

    Args:
        path: the file.
        name: what it is called in `where`.
        packing: see `opened`.
        begin: byte of the first line.
        end: byte after the last one; a packed file is read to its own end.
        first: number of the first line.
    """
    number = first - 1
    with contextlib.ExitStack() as stack:
        with reading(name, "readable"):
            file = stack.enter_context(opened(path, packing))
            if begin:
                file.seek(begin)
        position = begin
        while packing or position < end:
            number += 1
            try:
                raw = file.readline()
            except Exception as error:
                with reading(f"{name}:{number}", "a whole file" if packing else "readable"):
                    raise error
            if not raw:
                if packing:
                    return
                raise InputError(f"{name}:{number}", f"the file has become shorter than {end} bytes", "run again")
            position += len(raw)
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield _object(f"{name}:{number}", raw)


def _object(where: str, raw: bytes) -> Row | Refused:
    """The row of a line."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8", errors="replace")) + 1
        return Refused(f"{where}:{column}", f"byte 0x{raw[error.start]:02x}: the file must be UTF-8", raw)
    try:
        fields = json.loads(line.rstrip())  # with its end, a fault there would count as column 1 of the next line
    except json.JSONDecodeError as error:
        near = repr(line[max(error.pos - 10, 0) : error.pos + 10].strip())
        return Refused(f"{where}:{error.colno}", f"{near}: is not JSON ({error.msg})", raw)
    except ValueError as error:  # a number of thousands of digits
        return Refused(where, f"can't be read: {error}", raw)
    except RecursionError:
        return Refused(where, _TOO_DEEP, raw)
    fault = _fault(fields)
    return Row(where, fields, raw) if fault is None else Refused(where, fault, raw)


_TOO_DEEP = f"it is nested more than {_DEEPEST} deep: a row is a flat JSON object"


def _fault(fields: Any) -> str | None:
    """Why a JSON value is no row, if it isn't."""
    return (
        _inner_fault(fields, _DEEPEST) if isinstance(fields, dict) else f"a {type(fields).__name__}: a row is an object"
    )


def _inner_fault(value: Any, depth: int) -> str | None:
    """Why something inside an object or a list can't be: half of a character, or lists inside lists without end."""
    if not depth:
        return _TOO_DEEP
    for name, x in value.items() if isinstance(value, dict) else zip(itertools.repeat("a list"), value, strict=False):
        fault = None
        if not name.isascii():
            fault = _half(name, "a name")
        if isinstance(x, str):
            if not x.isascii():
                fault = fault or _half(x, name)
        elif isinstance(x, dict | list):
            fault = fault or _inner_fault(x, depth - 1)
        if fault is not None:
            return fault
    return None


def _half(text: str, of: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x} at character {error.start + 1} of {of}"
        return f"{half}: half of a surrogate pair is no character"
    return None


_BLANK = re.compile(r"[ \t\n\r]*")


def array(path: Path, name: str, packing: str) -> Rows:
    """One array of objects, however it is laid out; `where` has the number of the element."""
    decode = json.JSONDecoder().raw_decode
    utf_8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, ended = "", 0, False
    line, column = 1, 0  # of what text begins with

    def where() -> str:
        start = text.rfind("\n", 0, at) + 1
        return f"{name}:{line + text.count(chr(10), 0, at)}:{at - start + 1 + (0 if start else column)}"

    with contextlib.ExitStack() as stack:
        with reading(name, "readable"):
            file = stack.enter_context(opened(path, packing))

        def more() -> None:
            """Forget what was read, and take in as much again as is left."""
            nonlocal text, at, line, column, ended
            with reading(name, "UTF-8"):
                data = file.read(max(_BUFFER, len(text) - at))
                start = text.rfind("\n", 0, at) + 1
                line, column = line + text.count("\n", 0, at), at - start + (0 if start else column)
                text, at, ended = text[at:] + utf_8.decode(data, final=not data), 0, not data

        def next_sign() -> str:
            nonlocal at
            while (at := _BLANK.match(text, at).end()) == len(text) and not ended:  # type: ignore[union-attr]
                more()
            return text[at : at + 1]

        def wrong(what: str) -> InputError:
            said = f"{where()}: {text[at : at + 20]!r}" if text[at:] else f"{where()}: the end of the file"
            return InputError(said, what, "write one array of objects, or one object a line")

        if next_sign() != "[":
            raise wrong("an array begins with [")
        at += 1
        number = 0
        if next_sign() != "]":
            while True:
                next_sign()
                number += 1
                while True:
                    try:
                        value, end = decode(text, at)
                    except (ValueError, RecursionError) as error:
                        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                        if len(text) - at > _LONGEST:
                            said = f"or is longer than {_LONGEST} characters"
                        elif not ended:
                            more()
                            continue
                        raise wrong(f"element {number} is not JSON ({said})") from None
                    if end < len(text) or ended:  # else a number might go on
                        break
                    more()
                raw, of = text[at:end].encode(), f"{name}:{number}"
                fault = _fault(value)
                at = end
                yield Row(of, value, raw) if fault is None else Refused(of, fault, raw)
                sign = next_sign()
                if sign == "]":
                    break
                if sign != ",":
                    raise wrong(f"after element {number} a , or ] must stand")
                at += 1
        at += 1
        if next_sign():
            raise wrong("nothing may follow the array")


def table(path: Path, name: str, packing: str) -> Rows:
    """Comma-separated values (or tabs, semicolons, whatever the header has most of) under a header; a cell may have lines.

    A row of another number of columns, or with a stray quote, is refused.
    """
    csv.field_size_limit(_LONGEST)  # of the whole process; the library's 128 kB are less than a document
    with contextlib.ExitStack() as stack:
        with reading(name, "readable"):
            file = stack.enter_context(opened(path, packing))
            # a byte that is no UTF-8 becomes half of a surrogate pair, which nothing else can be: it concerns its row alone
            lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            header = lines.readline()
        since: list[str] = []  # what was read of the present row

        def noted() -> Iterator[str]:
            nonlocal header
            while line := header or lines.readline():
                header = ""
                since.append(line)
                yield line

        reader = csv.reader(noted(), delimiter=_delimiter(header, name), strict=True)
        columns: list[str] | None = None
        while True:
            line = reader.line_num + 1
            where = f"{name}:{line}"
            since.clear()
            try:
                cells = next(reader, None)
                fault = None
            except csv.Error as error:
                ended = "unexpected end" in str(error)
                if ended or sum(map(len, since)) > _LONGEST:
                    closed = "is never closed" if ended else f"is not closed within {_LONGEST} characters"
                    raise InputError(
                        where, f"a quote that begins in this row {closed}", 'close it, or write " in a cell as ""'
                    ) from None
                cells, fault = [], f"is not CSV ({error})"
            except Exception as error:
                with reading(where, "a whole file"):
                    raise error
            if cells is None:
                return
            raw = "".join(since).encode("utf-8", "surrogateescape")
            if fault is None:
                if not cells:
                    continue  # a blank line
                fault = _not_utf_8(raw)
            if columns is None:
                if fault is not None:
                    raise InputError(where, fault, "the first row must name the columns")
                columns = cells
                _columns_differ(columns, where)
                continue
            if fault is None and len(cells) != len(columns):
                fault = f"{len(cells)} columns: the header has {len(columns)}"
            yield (
                Row(where, dict(zip(columns, cells, strict=True)), raw) if fault is None else Refused(where, fault, raw)
            )


def _delimiter(header: str, name: str) -> str:
    bare = re.sub(r'"[^"]*"?', "", header)
    return max(",\t;|", key=bare.count) if not name.endswith((".tsv", ".tsv.gz", ".tsv.zst")) else "\t"


def _not_utf_8(raw: bytes) -> str | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte 0x{raw[error.start]:02x} after {error.start} bytes: the file must be UTF-8"
    return None


def parquet_sizes(path: Path, name: str) -> tuple[list[int], list[int]]:
    """Bytes and rows of each row group."""
    with reading(name, "parquet"), _parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        _columns_differ(file.schema_arrow.names, name)
        sizes, counts = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
        if min([0, *sizes, *counts]) < 0:
            raise ValueError("a size below 0")
        return sizes, counts


def parquet(path: Path, name: str, begin: int, end: int, first: int) -> Rows:
    """Row groups begin to end; `first` is the number of the first row in them."""
    with contextlib.ExitStack() as stack:
        with reading(name, "parquet"):
            file = stack.enter_context(_parquet(path))
            batches = file.iter_batches(_AT_A_TIME, row_groups=range(begin, end), use_threads=False)
        while True:
            with reading(f"{name}:{first}", "parquet"):
                batch = next(batches, None)
            if batch is None:
                return
            yield from _rows_of(batch, name, first)
            first += batch.num_rows


def _parquet(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, memory_map=True, page_checksum_verification=True)


def arrow_sizes(path: Path, name: str) -> tuple[list[int], list[int]]:
    """Bytes and rows of each record batch."""
    with reading(name, "Arrow IPC"):
        found = [(batch.get_total_buffer_size(), batch.num_rows) for batch in _batches(path, 0, None)]
    return [size for size, _ in found], [rows for _, rows in found]


def arrow(path: Path, name: str, begin: int, end: int, first: int) -> Rows:
    """Record batches begin to end; `first` is the number of the first row in them."""
    batches = _batches(path, begin, end)
    while True:
        with reading(f"{name}:{first}", "Arrow IPC"):
            batch = next(batches, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, _AT_A_TIME):
            yield from _rows_of(batch.slice(start, _AT_A_TIME), name, first + start)
        first += batch.num_rows


def _batches(path: Path, begin: int, end: int | None) -> Iterator[Any]:
    """Record batches of an Arrow file, or of a stream, as `datasets` writes them; their values stay on the disk till used."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            _columns_differ(file.schema.names, path.name)
            for i in range(begin, file.num_record_batches if end is None else end):
                yield file.get_batch(i)
            return
        mapped.seek(max(mapped.size() - len(_END_OF_STREAM), 0))
        if mapped.read() != _END_OF_STREAM:  # or one that was cut between two batches would look whole
            raise ValueError("it does not end as a stream must")
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        _columns_differ(stream.schema.names, path.name)
        for i, batch in enumerate(stream):
            if end is not None and i >= end:
                return
            if i >= begin:
                yield batch


def _columns_differ(names: list[str], where: str) -> None:
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise InputError(f"{where}: {name[:40]!r}", f"{times} columns have this name", "rename them")


def _rows_of(batch: Any, name: str, first: int) -> Rows:
    """Rows of a record batch. One whose values can't be had is refused; the others of its batch are not."""
    try:
        batch.validate(full=True)  # values are read in place, and a wrong length would read what is no part of the file
        values = batch.to_pylist()
    except Exception as error:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _rows_of(batch.slice(i, 1), name, first + i)
        else:
            yield Refused(f"{name}:{first}", f"its values can't be read: {' '.join(str(error).split())[:200]}", b"")
        return
    for number, fields in enumerate(values, first):
        yield Row(f"{name}:{number}", fields, json.dumps(fields, ensure_ascii=False, default=str).encode())


def text(path: Path, name: str, packing: str, encoding: str) -> Rows:
    """A file that is one document; its line ends become LF."""
    with reading(name, "a whole file" if packing else "readable"), opened(path, packing) as file:
        raw = file.read()
    if encoding == "utf-16-le" and raw.startswith((codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE)):
        yield Refused(name, f"bytes {raw[:4].hex(' ')}: that is another encoding than little-endian UTF-16", b"")
        return
    try:
        content = raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode(encoding)
        where = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        rule = "the file must be UTF-8: iconv -f GB18030 -t UTF-8 converts Chinese, -f LATIN1 western text"
        if encoding == "utf-16-le":
            rule = "the file must be little-endian UTF-16"
        yield Refused(where, f"byte 0x{raw[error.start]:02x}: {rule}", b"")
        return
    content = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    yield Row(name, {"text": content}, b"")


def numpy(path: Path, name: str) -> Rows:
    """A .npy of integers, which is one document."""
    with reading(name, "a .npy file"):
        tokens: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        missing = path.stat().st_size - tokens.offset - tokens.nbytes  # type: ignore[attr-defined]
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or missing:
        found = f"{name}: shape {tokens.shape}, dtype {tokens.dtype}, {missing} bytes more than it says"
        raise InputError(found, "must be one row of integers, whole", "save the tokens as numpy.save('x.npy', tokens)")
    yield _document(name, tokens)


def uint16(path: Path, name: str) -> Rows:
    """Little-endian uint16 end to end, which are one document."""
    with reading(name, "readable"):
        size = path.stat().st_size
        if size % 2:
            raise InputError(f"{name}: {size} bytes", "tokens of two bytes make an even number", "copy it again")
        tokens = np.memmap(path, "<u2", "r") if size else np.zeros(0, "<u2")
    yield _document(name, tokens)


def documents(path: Path, name: str, begin: int, end: int) -> Rows:
    """Documents begin to end of a binidx, path being its .bin."""
    with reading(name, "a binidx"):
        found = Documents(path.with_suffix(""))
    for i in range(begin, end):
        yield _document(f"{name}:{i + 1}", found[i])


def _document(where: str, tokens: npt.NDArray[Any]) -> Row | Refused:
    """Of its tokens, without the end tokens at its end."""
    if len(tokens) and (tokens.min() < 0 or tokens.max() > 0xFFFF):
        at = int(((tokens < 0) | (tokens > 0xFFFF)).argmax())
        return Refused(where, f"token {tokens[at]} at {at + 1}: tokens are 0 to 65535", b"")
    end = len(tokens)
    while end and not tokens[max(end - _BUFFER, 0) : end].any():
        end = max(end - _BUFFER, 0)
    start = max(end - _BUFFER, 0)
    last = np.flatnonzero(tokens[start:end])
    return Row(
        where, {"tokens": tokens[: start + int(last[-1]) + 1 if len(last) else 0].astype("<u2", copy=False)}, b""
    )


def dummy(name: str) -> Rows:
    """100000 sums, whatever is in the file; 10000 different ones, each ten times.

    Source: BlinkDL/RWKV-LM, RWKV-v4neo/src/dataset.py.
    """
    for i in range(_DUMMY):
        a, b = i % 10000, i * i % 10000
        fields = {"text": f".{a}+{b}={a + b}."}
        yield Row(f"{name}:{i + 1}", fields, json.dumps(fields).encode())
