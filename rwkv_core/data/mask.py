"""From characters to tokens: which tokens of a document are learned.

Spans of characters become spans of bytes, and a token is learned if its first byte lies in one. Tokens are never searched for:
World has 36 tokens that begin with a colon and go on, so "Assistant:**" has no token for its colon.
"""

import functools
import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.data.dialogue import Spans
from rwkv_core.data.source import Unusable
from rwkv_core.tokenizer import Tokenizer


class Mask(NamedTuple):
    """Which tokens are learned."""

    learned: npt.NDArray[np.bool_]
    """(T,), of a document's tokens without its end."""
    straddling: int
    """Tokens in which a span begins or ends: no mask of tokens is exactly the one of characters there."""


def learned_tokens(
    tokenizer: Tokenizer, tokens: Sequence[int] | npt.NDArray[np.integer[Any]], text: str, learned: Spans | None
) -> Mask:
    """The tokens that begin in the learned characters.

    Args:
        tokenizer: the one that made the tokens.
        tokens: (T,) of the text, without its end.
        text: bytes of it that are no UTF-8 are the lone surrogates that decoding with surrogateescape gives.
        learned: spans of its characters; None: all.

    Raises:
        Unusable: the tokens are not those of the text, or the tokenizer makes one character of two of which one is learned.
    """
    if learned is None:
        return Mask(np.ones(len(tokens), np.bool_), 0)
    stops = byte_lengths(tokenizer).take(np.asarray(tokens, None if len(tokens) else np.int64)).cumsum()
    points, total = _in_bytes(text, [point for span in learned for point in span], tokenizer.normalizes)
    length = int(stops[-1]) if len(stops) else 0
    if length != total:
        raise Unusable(
            f"{len(tokens)} tokens of {length} bytes: are not those of a text of {total} bytes, {text[:20]!r}..."
        )
    mask = np.zeros(len(tokens), np.bool_)
    if not points:
        return Mask(mask, 0)
    before = stops.searchsorted(points).tolist()  # the token that ends at a point, or in which it lies
    first = [
        token + 1 if point else 0 for token, point in zip(before, points, strict=True)
    ]  # begins there, or after it
    for begin, end in zip(first[::2], first[1::2], strict=True):
        mask[begin:end] = True
    inside = {token for token, point in zip(before, points, strict=True) if point and stops[token] != point}
    return Mask(mask, len(inside))


@functools.lru_cache(maxsize=4)
def byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """(V,) bytes of each token."""
    return np.fromiter(map(len, tokenizer.table), np.int64, len(tokenizer.table))


def _in_bytes(text: str, points: Sequence[int], normalizes: bool) -> tuple[list[int], int]:
    """Where in a text's bytes its characters `points` begin, ascending; and how many bytes there are."""
    if text.isascii():
        return list(points), len(text)
    pieces = [text[a:b] for a, b in itertools.pairwise((0, *points, len(text)))]
    if normalizes and not unicodedata.is_normalized("NFC", text):
        pieces = [unicodedata.normalize("NFC", piece) for piece in pieces]
        if "".join(pieces) != unicodedata.normalize("NFC", text):
            raise Unusable(
                f"{text[:20]!r}...: half of a character is learned: a combining one stands at the edge of a span"
            )
    found = list(itertools.accumulate(len(piece.encode("utf-8", errors="surrogateescape")) for piece in pieces))
    return found[:-1], found[-1]
