"""Token files as one page to look at: sample documents, each token as it will be learned or not, and the counts of all."""

import csv
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core import page
from rwkv_core.data.binidx import Documents, Learned, Tokens
from rwkv_core.tokenizer import END, Tokenizer

CUT = ("pad", "only")
"""Values of train.rows with which a row is one document, and what it has beyond ctx_len is never read."""

_EXACT = 100_000  # documents, up to which all masks are counted
_PIECE = 1_000_000  # documents' sizes that are in memory at a time
_HEAD, _AROUND, _TAIL = (
    1500,
    150,
    200,
)  # of a long document: tokens shown from its front, on each side of a cut, at its end
_EXAMPLES = 3  # of each kind of finding


class Bar(NamedTuple):
    """Documents of a range of lengths."""

    least: int
    most: int
    documents: int


class Counts(NamedTuple):
    """What becomes of the tokens: their number is the sum of the three."""

    learned: int
    ignored: int
    """They are read, and nothing is learned from them."""
    cut: int
    """They are never read."""
    looked_at: int
    """Documents whose masks were counted. If not all, learned and ignored are estimated from them."""

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return self.learned + self.ignored + self.cut


class Part(NamedTuple):
    """Some characters of a token: as they are (kind ""), or one that is not seen: "newline", "tab", "space", "name"."""

    kind: str
    text: str


class Token(NamedTuple):
    """What is shown as one: a token, or several that only together are characters."""

    title: str
    parts: tuple[Part, ...]


class Run(NamedTuple):
    """Tokens in a row of which the same becomes: "learned", "ignored", "cut"; or "skipped", so many that are not shown."""

    state: str
    tokens: tuple[Token, ...]
    skipped: int


class Sample(NamedTuple):
    """A document to show."""

    number: int
    longest: bool
    weight: float
    counts: Counts
    runs: tuple[Run, ...]


class Findings(NamedTuple):
    """Faults of one kind."""

    number: int
    examples: list[Mapping[str, str]]
    """{"where", "message"} of the first."""


def read_findings(table: Path) -> dict[str, Findings]:
    """What is in a lints.csv, by code."""
    found: dict[str, Findings] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            before = found.get(row["code"], Findings(0, []))
            if before.number < _EXAMPLES:
                before.examples.append(row)
            found[row["code"]] = Findings(before.number + 1, before.examples)
    return found


def histogram(sizes: Tokens) -> list[Bar]:
    """Documents by the power of two that their tokens do not exceed, from the shortest that there is to the longest."""
    powers = 1 << np.arange(62)
    counts = np.zeros(len(powers) + 1, np.int64)
    for at in range(0, len(sizes), _PIECE):
        counts += np.bincount(np.searchsorted(powers, sizes[at : at + _PIECE]), minlength=len(counts))
    there = np.flatnonzero(counts)
    if not len(there):
        return []
    return [Bar((1 << k - 1) + 1 if k else 0, 1 << k, int(counts[k])) for k in range(int(there[0]), int(there[-1]) + 1)]


def most_read(rows: str, ctx_len: int, after_state: bool) -> int | None:
    """Tokens of a document that are read, where the others are cut off; None: all are read. See `write`."""
    return ctx_len + after_state if rows in CUT else None


def beyond(documents: Documents, limit: int | None) -> tuple[int, int]:
    """How many documents have more than `limit` tokens, and how many tokens those have after them; None: none."""
    longer = left = 0
    if limit is not None:
        for at in range(0, len(documents), _PIECE):
            over = np.maximum(documents.sizes[at : at + _PIECE].astype(np.int64) - limit, 0)
            longer, left = longer + int(np.count_nonzero(over)), left + int(over.sum())
    return longer, left


def count(documents: Documents, limit: int | None) -> Counts:
    """What becomes of all tokens, where those of a document after its first `limit` are cut off; None: none are."""
    total, number = documents.tokens, len(documents)
    cut = beyond(documents, limit)[1]
    if not documents.has_mask:
        return Counts(total - cut, 0, cut, number)
    looked_at = np.arange(number) if number <= _EXACT else _spread(number, _EXACT)
    learned = read = 0
    for i in looked_at.tolist():
        mask = documents.learned(i)[:limit]
        learned, read = learned + int(mask.sum()), read + len(mask)
    if len(looked_at) < number:
        learned = round((total - cut) * learned / max(read, 1))
    return Counts(learned, total - cut - learned, cut, len(looked_at))


def write(
    path: Path,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    side: str,
    ctx_len: int,
    rows: str,
    after_state: bool = False,
    samples: int,
    manifest: Mapping[str, Any] | None = None,
    findings: Mapping[str, Findings] | None = None,
) -> None:
    """Write the page.

    Args:
        path: the .html file.
        documents: of one side.
        tokenizer: whose tokens they are.
        side: its name.
        ctx_len: of training.
        rows: how documents become rows, train.rows.
        after_state: a tuned state is trained: a document's first token is read beside the ctx_len that are learned.
        samples: documents to show, spread evenly; and the longest.
        manifest: what is known of the data: tables by their title. What is neither text nor number in them is passed over.
        findings: by code; None: nobody has looked.
    """
    limit = most_read(rows, ctx_len, after_state)
    lengths = histogram(documents.sizes)
    page.write(
        path,
        "rwkv_core.data",
        "preview.html.j2",
        side=side,
        documents=len(documents),
        counts=count(documents, limit),
        longest=int(documents.sizes.max()) if len(documents) else 0,
        beyond=beyond(documents, limit or ctx_len)[0],
        ctx_len=ctx_len,
        rows=rows,
        cuts=limit is not None,
        lengths=lengths,
        place=_place(lengths, ctx_len),
        samples=_samples(documents, tokenizer, samples, limit),
        findings=None if findings is None else sorted(findings.items(), key=lambda item: (-item[1].number, item[0])),
        facts=_facts(manifest or {}),
    )


def _spread(number: int, samples: int) -> Tokens:
    """So many of `number` numbers, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, min(samples, number)).round().astype(np.int64))


def _place(lengths: Sequence[Bar], ctx_len: int) -> float | None:
    """Where ctx_len is in the histogram, in bars from its top; None if not inside."""
    for at, bar in enumerate(lengths):
        if bar.least <= ctx_len <= bar.most:
            return at + (ctx_len - bar.least + 1) / (bar.most - bar.least + 1)
    return None


def _samples(documents: Documents, tokenizer: Tokenizer, samples: int, limit: int | None) -> list[Sample]:
    if not len(documents):
        return []
    longest = int(np.argmax(documents.sizes))
    numbers = sorted({*_spread(len(documents), samples).tolist(), longest})
    return [_sample(documents, tokenizer, i, limit, longest=i == longest) for i in numbers]


def _sample(documents: Documents, tokenizer: Tokenizer, i: int, limit: int | None, *, longest: bool) -> Sample:
    tokens, learned = documents[i], documents.learned(i)
    size = len(tokens)
    end = size if limit is None else min(limit, size)
    count = int(learned[:end].sum())
    return Sample(
        i,
        longest,
        documents.weight(i),
        Counts(count, end - count, size - end, 1),
        tuple(_runs(tokens, learned, end, tokenizer)),
    )


def _runs(tokens: Tokens, learned: Learned, end: int, tokenizer: Tokenizer) -> list[Run]:
    """A document's tokens up to `end` and after it, as runs."""
    size = len(tokens)
    shown = np.zeros(size, bool)
    shown[:_HEAD] = shown[max(size - _TAIL, 0) :] = True
    if end < size:
        shown[max(end - _AROUND, 0) : end + _AROUND] = True
    states = np.where(np.arange(size) >= end, "cut", np.where(learned, "learned", "ignored"))
    states = np.where(shown, states, "skipped")
    borders = [0, *(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), size]
    runs = []
    for first, stop in itertools.pairwise(borders):
        if first < stop:
            skipped = states[first] == "skipped"
            ids = [] if skipped else tokens[first:stop].tolist()
            runs.append(Run(str(states[first]), tuple(_shown(ids, tokenizer)), stop - first if skipped else 0))
    return runs


def _shown(ids: Sequence[int], tokenizer: Tokenizer) -> list[Token]:
    """Tokens as they are shown. Bytes that make no characters, even with those of the next tokens, are shown as such."""
    raw = [tokenizer.table[i] if 0 <= i < len(tokenizer.table) else b"" for i in ids]
    shown, at = [], 0
    while at < len(ids):
        taken, parts = 1, [Part("name", "end" if ids[at] == END else raw[at].hex(" ") or f"token {ids[at]}")]
        for stop in range(at + 1, min(at + 4, len(ids)) + 1):  # a character has four bytes at most
            if not raw[stop - 1]:
                break
            try:
                parts, taken = _parts(b"".join(raw[at:stop]).decode()), stop - at
            except UnicodeDecodeError:
                continue
            break
        shown.append(Token(" + ".join(str(i) for i in ids[at : at + taken]), tuple(parts)))
        at += taken
    return shown


def _parts(text: str) -> list[Part]:
    """A token's characters, with what would not be seen told apart. Blanks are if they are not between words."""
    parts: list[Part] = []
    for character in text:
        if character == "\n":
            part = Part("newline", "\n")
        elif character == "\t":
            part = Part("tab", "\t")
        elif character == " " and ("  " in text or not text.strip(" ")):
            part = Part("space", " ")
        elif character != " " and unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs"):
            part = Part("name", f"U+{ord(character):04X}")
        else:
            part = Part("", character)
        if parts and parts[-1].kind == part.kind == "":
            parts[-1] = Part("", parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def _facts(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Its texts and numbers, by the title of their table."""

    def plain(values: Mapping[str, Any]) -> dict[str, str]:
        return {
            str(name).replace("_", " "): f"{value:,}"
            if isinstance(value, int) and not isinstance(value, bool)
            else str(value)
            for name, value in values.items()
            if isinstance(value, str | int | float)
        }

    tables = {"": plain(manifest)} | {
        title: plain(values) for title, values in manifest.items() if isinstance(values, Mapping)
    }
    return {title: table for title, table in tables.items() if table}
