"""The RWKV World tokenizer: at each byte, the longest vocabulary entry that the remaining bytes begin with.

65529 entries have the ids 1 to 65529; 0 marks the end of a document and has no bytes. The vocabulary comes with the
`pyrwkv-tokenizer` package, whose encoder is used: it is thirty times as fast as one in Python. Its decoder is not: it aborts on
half a character. The table here decodes, counts bytes, and checks the encoder when the tokenizer is loaded.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_core.errors import WorldError

END = 0
"""Token after each document, and before the first."""

VOCAB_SIZE = 65536
"""Rows of a World model's embedding; ids above 65529 are free."""

_VOCABULARY = "rwkv_vocab_v20230424.txt"
_DIGEST = "e8e7025bfbfa9c6e071fa66e7539d655133c2cfabe9b1a9c72a98e2114b35dc5"

# Where a greedy tokenizer can go wrong: seams of blanks and newlines, roles, long runs, several scripts, raw bytes.
_PROBES = (
    "User: What is it?\n\nAssistant:** A list\n\n- one\n- two\n\n\n",
    "def f(x):\n        return x ** 2  # 平方\r\n\t\t\tpass" + " " * 200,
    "。\n\nUser: 你好，世界！ Привет, мир. こんにちは 🦅🪿 e\u0301 \x00\x01\x7f \u200b<|endoftext|>",
)


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, table: Sequence[bytes], encode: Callable[[str], list[int]]) -> None:
        self.table = table
        """Bytes of each id, empty for 0 and for the free ids."""
        self.encode = encode
        """Text -> ids. A whole document at a time: cut text has other tokens at the cuts."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids, one after the other; they may end inside a character."""
        return b"".join(self.table[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with U+FFFD where their bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the table, whatever the line ends of the file it came from."""
        return digest(self.table)


def digest(table: Sequence[bytes]) -> str:
    """SHA-256 over id, length and bytes of every entry."""
    sha = hashlib.sha256()
    for i, entry in enumerate(table):
        if entry:
            sha.update(b"%d %d " % (i, len(entry)) + entry)
    return sha.hexdigest()


@functools.cache
def world() -> Tokenizer:
    """The World tokenizer.

    Raises:
        WorldError: the package is missing, its vocabulary is not the published one, or its encoder disagrees with it.
    """
    spec = importlib.util.find_spec("pyrwkv_tokenizer")
    if spec is None or spec.origin is None:
        raise WorldError(
            "pyrwkv_tokenizer", "the World vocabulary comes with it", "pip install pyrwkv-tokenizer==0.9.1"
        )
    from pyrwkv_tokenizer import RWKVTokenizer

    file = Path(spec.origin).with_name(_VOCABULARY)
    tokenizer = Tokenizer(read_vocabulary(file), RWKVTokenizer().encode)
    if tokenizer.digest != _DIGEST:
        raise WorldError(str(file), "is not the published World vocabulary", "install pyrwkv-tokenizer==0.9.1 anew")
    reference = greedy_encoder(tokenizer.table)
    if any(tokenizer.encode(probe) != reference(probe) for probe in _PROBES):
        raise WorldError("pyrwkv_tokenizer", "does not encode greedily", "install pyrwkv-tokenizer==0.9.1 anew")
    return tokenizer


def read_vocabulary(file: Path) -> tuple[bytes, ...]:
    """The table in a vocabulary file: lines of id, Python literal of a str or bytes, and its length in bytes."""
    table = [b""] * VOCAB_SIZE
    for line in file.read_text(encoding="utf-8").splitlines():
        first, last = line.index(" "), line.rindex(" ")
        literal = ast.literal_eval(line[first:last].strip())
        entry: bytes = literal.encode() if isinstance(literal, str) else literal
        if len(entry) != int(line[last:]):
            raise WorldError(f"{file}: {line!r}", "the length at the line's end must fit", "get the published file")
        table[int(line[:first])] = entry
    return tuple(table)


def greedy_encoder(table: Sequence[bytes]) -> Callable[[str], list[int]]:
    """The definition, in Python: slow, and what the fast encoder is measured against."""
    ids = {entry: i for i, entry in enumerate(table) if entry}
    longest = max(map(len, ids))

    def encode(text: str) -> list[int]:
        data, out, at = text.encode(), [], 0
        while at < len(data):
            end = next(e for e in range(min(at + longest, len(data)), at, -1) if data[at:e] in ids)
            out.append(ids[data[at:end]])
            at = end
        return out

    return encode
