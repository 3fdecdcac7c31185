"""States of texts that were read, so that a text that begins with one of them need not be read from the beginning."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from rwkv_core.models.state import BlockState, State


class Known(NamedTuple):
    """A text that was read."""

    length: int
    """Its tokens."""
    state: State
    """Of one row, after it."""
    logits: Tensor | None
    """(1, V) after it, where they are known."""

    @property
    def nbytes(self) -> int:
        """What it takes."""
        tensors = [x for block in self.state for x in block]
        return sum(x.nbytes for x in (tensors if self.logits is None else [*tensors, self.logits]))


class Cache:
    """The states of texts, by their tokens; those that were not asked for the longest make room for others.

    Tokens and not characters: a text that goes on may have other tokens where the known one ended, and the model would have
    read something that it was not given.
    """

    def __init__(self, nbytes: int) -> None:
        """An empty one, which never holds more than so many bytes."""
        self._most, self._held = nbytes, 0
        self._known = OrderedDict[bytes, Known]()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """What is held."""
        return self._held

    def put(self, tokens: Sequence[int], state: State, logits: Tensor | None = None) -> None:
        """Keep what is known after these tokens; a single one that is larger than the cache is not kept."""
        key, known = _key(tokens), Known(len(tokens), [BlockState(*map(_alone, block)) for block in state], logits)
        self._drop(key)
        if known.nbytes + len(key) > self._most:
            return
        self._known[key] = known
        self._held += known.nbytes + len(key)
        while self._held > self._most:
            self._drop(next(iter(self._known)))

    def longest(self, tokens: Sequence[int]) -> Known | None:
        """What is known of the longest beginning of these tokens: of all of them only if the logits after it are too."""
        whole, found = _key(tokens), b""
        for key, known in self._known.items():
            if len(key) > len(found) and whole.startswith(key) and (len(key) < len(whole) or known.logits is not None):
                found = key
        if not found:
            return None
        self._known.move_to_end(found)
        return self._known[found]

    def _drop(self, key: bytes) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._held -= known.nbytes + len(key)


def _alone(x: Tensor) -> Tensor:
    """Without what else its memory holds: a token shift is the last token of all that were read with it."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _key(tokens: Sequence[int]) -> bytes:
    """As many bytes for each token, so that a beginning of the tokens is one of the bytes."""
    return np.asarray(tokens, "<u4").tobytes()
