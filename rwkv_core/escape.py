"""Text of others, so that it is shown and does nothing: on one page with ours, and as markdown."""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

_MARKS = re.compile(r"([\\`*_\[\]|~$]|^#|^[+-](?= ))")
_TURNS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """With control characters told by their number: those that turn the order of what stands around them, and those that
    are not seen. Line ends and tabs stay.
    """
    return _UNSEEN.sub(_number, _TURNS.sub(_number, text))


def name(text: object) -> str:
    """What a file, a source or a task is called, on one line; what is written from right to left turns nothing around it."""
    words = visible(" ".join(str(text).split()))
    turned = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in words)
    return f"\u2068{words}\u2069" if turned else words


def markdown(text: object) -> str:
    """Words as markdown that shows just them: what a file is called, or a stage says in its last line, is no markup."""
    return _MARKS.sub(r"\\\1", html.escape(visible(str(text)), quote=False))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown, of words."""
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str) -> str:
    """Text as it is, in a block of markdown that nothing in it ends."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}text\n{visible(text)}\n{fence}"


def _cell(text: object) -> str:
    return markdown(" ".join(str(text).split()))


def _number(found: re.Match[str]) -> str:
    return f"[U+{ord(found[0]):04X}]"
