"""Near copies: which documents share most of their runs of 5 tokens with a held-out one.

The similarity of two documents is Jaccard's: of the runs that are in either, the share that is in both. A signature estimates
it. The runs' hashes fall into HASHES equal ranges, and of each range the smallest is kept: two documents agree in a range with
the probability of their similarity. An empty range takes the number of one that is not, the first in an order of its own.

A signature takes 26 us for 600 tokens, holding it against an index of 250000 documents 1 to 2; where a band
agrees, as it does for what is near and for few others, 40 to 80 more.

Source: Li, Owen and Zhang, One Permutation Hashing, 2012; Shrivastava, Optimal Densification for Fast and Accurate Minwise
Hashing, 2017; the bands are of Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_core.data.binidx import Documents, Learned, Tokens

RUN = 5
BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS
"""A similarity of 0.8 makes some band agree with probability 1 - (1 - 0.8^6)^20 = 0.998, 0.4 with 0.08, 0.2 with 0.001."""

TRIED = 16
"""Likely documents that one is compared with exactly, at most."""

_INDEXED = 1 << 15  # documents of a training in one index: 13 MB
_BUCKET = 64  # documents of one band that are looked at
_ERROR = 0.04  # standard error of an estimate, the most that it is for long documents

Signature = npt.NDArray[np.uint16]
"""(HASHES,)"""

_RANDOM = np.random.Generator(np.random.PCG64(5))  # constants: the same at every start
_FACTORS = [np.uint64(x | 1) for x in _RANDOM.integers(0, 2**64, RUN, np.uint64)]
_PAD = 2**32  # is no token
_NOTHING = np.uint64(2**32)  # no hash is as large
_DONORS = _RANDOM.permuted(np.tile(np.arange(HASHES), (HASHES, 1)), axis=1)
"""Of each range, the order in which it asks the others."""


def signature(tokens: Tokens) -> Signature:
    """What a document is known by: 16 bits for each of HASHES ranges. A document below RUN tokens is one run."""
    made: Signature = signatures([tokens])[0]
    return made


def signatures(documents: Sequence[Tokens]) -> npt.NDArray[np.uint16]:
    """The signatures of several documents, (D, HASHES): many small ones cost less together."""
    count = len(documents)
    kept = np.full(count * HASHES, _NOTHING, np.uint64)
    if not count:
        return kept.astype(np.uint16).reshape(0, HASHES)
    runs = [_runs(tokens) for tokens in documents]
    hashes = np.concatenate(runs) >> np.uint64(32)
    places = (hashes * np.uint64(HASHES) >> np.uint64(32)).view(np.int64)
    places += np.repeat(np.arange(count) * HASHES, [len(some) for some in runs])
    np.minimum.at(kept, places, hashes)
    wanting = np.flatnonzero(kept == _NOTHING)
    rows, columns = np.divmod(wanting, HASHES)
    values = kept.copy()
    for turn in range(HASHES):  # each asks one other range after the other, till one has something
        if not len(wanting):
            break
        asked = values[rows * HASHES + _DONORS[columns, turn]]
        kept[wanting] = asked
        still = asked == _NOTHING
        wanting, rows, columns = wanting[still], rows[still], columns[still]
    return kept.astype(np.uint16).reshape(count, HASHES)  # their low bits: the high ones are small


def similarity(a: Tokens, b: Tokens) -> float:
    """Jaccard's, of two documents' tokens, in [0, 1]; exact, but for runs of equal 64-bit hashes."""
    one, other = np.unique(_runs(a)), np.unique(_runs(b))
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _runs(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """A hash for each run, (max(T - RUN, 0) + 1,): a sum with random factors, mixed as in MurmurHash3's end."""
    padded = tokens.astype(np.uint64)
    if len(padded) < RUN:
        padded = np.append(padded, np.full(RUN - len(padded), _PAD, np.uint64))
    count = len(padded) - RUN + 1
    mixed = padded[:count] * _FACTORS[0]
    for i in range(1, RUN):
        mixed += padded[i : i + count] * _FACTORS[i]
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    return mixed


def seen(held_out: Documents, trained: Documents, least: float | None) -> Learned:
    """Which held-out documents are among those of a training, or nearly. In memory are digests of the held-out ones, and an
    index of a part of the others.

    Args:
        held_out: (D,) documents.
        trained: those of the training.
        least: similarity from which one counts as nearly the same; None: only equal ones count, to the token.

    Returns:
        (D,)
    """
    wanted = [_digest(held_out[i]) for i in range(len(held_out))]
    among = set(wanted)
    met = {digest for i in range(len(trained)) if (digest := _digest(trained[i])) in among}
    found = np.array([digest in met for digest in wanted], bool)
    if least is None:
        return found
    known = signatures([held_out[i][:-1] for i in range(len(held_out))])
    for first in range(0, len(trained), _INDEXED):
        some = range(first, min(first + _INDEXED, len(trained)))
        index = Index(signatures([trained[i][:-1] for i in some]))

        def tokens(document: int, first: int = first) -> Tokens:
            return trained[first + document][:-1]

        for i in np.flatnonzero(~found & index.agrees(known)):
            found[i] = index.nearest(held_out[int(i)][:-1], known[i], tokens, least) is not None
    return found


def _digest(tokens: Tokens) -> bytes:
    return hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=16).digest()


class Index:
    """The signatures of the held-out documents, for others to be held against: 0.4 kB a document."""

    def __init__(self, signatures: npt.NDArray[np.uint16]) -> None:
        """Index (D, HASHES) signatures."""
        whole = np.zeros(len(signatures), np.uint64)
        for band in range(BANDS):
            whole = _mixed(whole, _keys(_band(signatures, band)))
        _, firsts = np.unique(
            whole, return_index=True
        )  # of equal ones the first: thousands of them would be one bucket
        self._documents = np.sort(firsts)
        self._signatures = signatures[self._documents]
        self._bands = []
        for band in range(BANDS):
            keys = _keys(_band(self._signatures, band))
            order = np.argsort(keys, kind="stable").astype(np.int32)
            self._bands.append((keys[order], order))

    def agrees(self, signatures: npt.NDArray[np.uint16]) -> Learned:
        """Of (N, HASHES) signatures, (N,): whether some band is that of a document. Without, there are no candidates."""
        found = np.zeros(len(signatures), bool)
        for band, (keys, _) in enumerate(self._bands):
            if len(keys):
                wanted = _keys(_band(signatures, band))
                ascending = np.sort(wanted)  # three times as fast to look up, which stays in the cache then
                there = keys[np.minimum(keys.searchsorted(ascending), len(keys) - 1)] == ascending
                if there.any():
                    found |= np.isin(wanted, ascending[there])
        return found

    def candidates(self, signature: Signature) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The documents of which a band agrees, and their estimated similarities, the highest first, ties by number.

        An estimate has a standard error of 0.04 or so. Of documents with the same signature, it is the first.
        """
        found = []
        for (keys, order), key in zip(self._bands, _keys(signature.reshape(BANDS, ROWS)), strict=True):
            first = int(keys.searchsorted(key))
            if first < len(keys) and keys[first] == key:
                found.append(order[first : min(int(keys.searchsorted(key, side="right")), first + _BUCKET)])
        if not found:
            return np.zeros(0, np.int64), np.zeros(0)
        places = np.unique(np.concatenate(found))
        estimates = (self._signatures[places] == signature).mean(axis=1)
        best = np.argsort(-estimates, kind="stable")
        return self._documents[places[best]], estimates[best]

    def nearest(
        self, tokens: Tokens, signature: Signature, held_out: Callable[[int], Tokens], least: float
    ) -> tuple[int, float] | None:
        """A document whose exact similarity is `least` or more, and how much it is; the likeliest are tried first.

        Args:
            tokens: a document.
            signature: its own.
            held_out: the tokens of the document of a number.
            least: the similarity that is looked for. Of what the estimate does not rule out, TRIED are compared: where
                thousands of documents have a frame in common, each would go through all others.
        """
        documents, estimates = self.candidates(signature)
        for document in documents[estimates >= least - 4 * _ERROR][:TRIED].tolist():
            exact = similarity(tokens, held_out(document))
            if exact >= least:
                return document, exact
        return None


def _band(signatures: npt.NDArray[np.uint16], band: int) -> npt.NDArray[np.uint16]:
    return signatures[:, band * ROWS : (band + 1) * ROWS]


def _keys(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint32]:
    """(N,) hashes of (N, ROWS) numbers."""
    mixed = np.zeros(len(rows), np.uint64)
    for row in range(ROWS):
        mixed = _mixed(mixed, rows[:, row])
    return (mixed >> np.uint64(16)).astype(np.uint32)


def _mixed(mixed: npt.NDArray[np.uint64], more: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.uint64]:
    product: npt.NDArray[np.uint64] = (mixed ^ more) * np.uint64(0x9E3779B97F4A7C15)
    return product ^ product >> np.uint64(32)
