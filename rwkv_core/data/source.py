"""Rows of text as people have them: jsonl, one object a line with a "text" field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from rwkv_core.errors import InputError


class Digest(Protocol):
    """The part of a hashlib object that is used here."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""


class Unusable(ValueError):
    """A row that nothing can be learned from; the message says why: value: rule."""


class Refused(NamedTuple):
    """A row that was left out."""

    where: str
    reason: str
    raw: bytes
    """The row itself, as in the file."""


class Row(NamedTuple):
    """One line of a source."""

    line: int
    """Its number, from 1."""
    text: str
    """What to learn."""
    group: str | None
    """The value of the field that was asked for, where the row has it."""


def rows(path: Path, group: str | None, digest: Digest | None = None) -> Iterator[Row]:
    """Read a .jsonl file row by row, holding one row in memory. Lines that are blank are passed over.

    Args:
        path: the file.
        group: name of the field to return beside the text, or None.
        digest: is fed every byte of the file on the way.

    Raises:
        InputError: the file is missing, or a line is not UTF-8, not JSON, not an object, or has no text. The message has
            the file, the line and, where there is one, the column.
    """
    if path.is_dir() or not path.exists():
        raise InputError(
            str(path),
            'data.source must be a .jsonl file, one {"text": ...} a line',
            "correct data.source in params.yaml",
        )
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if digest is not None:
                digest.update(raw)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield _row(path, number, raw, group)


def _row(path: Path, number: int, raw: bytes, group: str | None) -> Row:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8", errors="replace")) + 1
        raise InputError(
            f"{path}:{number}:{column}: byte 0x{raw[error.start]:02x}", "the file must be UTF-8", "convert it to UTF-8"
        ) from None
    try:
        row = json.loads(line.rstrip())  # with its end, a fault there would count as column 1 of the next line
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{number}:{error.colno}: {_near(line, error.pos)}",
            f"is not JSON ({error.msg})",
            "write one JSON object a line",
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}:{number}", f"can't be read ({error})", "write one flat JSON object a line") from None
    except RecursionError:
        raise InputError(f"{path}:{number}", "is nested too deeply", "write one flat JSON object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = f"fields {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise InputError(
            f"{path}:{number}: {found}", 'a row is an object with a string "text"', "add it, or drop the line"
        )
    text: str = row["text"]
    value = row.get(group) if group is not None else None
    name = None if value is None else str(value)
    for field, content in (("text", text), (group, name or "")):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}:{number}: \\u{ord(content[error.start]):04x} at character {error.start + 1} of {field}",
                "half of a surrogate pair is no character",
                "write the whole pair, or the character itself",
            ) from None
    return Row(number, text, name)


def _near(line: str, position: int) -> str:
    return repr(line[max(position - 10, 0) : position + 10].strip())
