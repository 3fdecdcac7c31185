"""Which tokens each step learns: a function of the seed and the step alone, so a continued run sees what it would have seen.

Documents are shuffled anew each epoch. They are laid end to end, as in RWKV's pretraining, and the stream is cut into rows; or
each is a row, from its beginning. Row letters: R rows, T the longest, at most ctx_len.
"""

import functools
import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.head_loss import IGNORE
from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import END


class Batch(NamedTuple):
    """One micro-batch."""

    inputs: Tensor
    """(R, T) int64 tokens."""
    targets: Tensor
    """(R, T) int64: the token after each input, or IGNORE beyond the end of a row's text."""
    step_tokens: int
    """Targets in the whole optimizer step that this micro-batch is part of: what its loss is divided by."""


class LeftOut(NamedTuple):
    """What of the documents is in no row."""

    documents: int
    """How many are cut off."""
    tokens: int
    """Of their ends."""


class Rows(ABC):
    """A binidx as rows of at most ctx_len tokens, numbered over all epochs. Documents are in an order of each epoch's own."""

    per_epoch: int
    left_out = LeftOut(0, 0)

    def __init__(self, documents: Documents, targets: npt.NDArray[np.integer], seed: int | None) -> None:
        """Rows of `documents`, of each of which so many tokens are learned; a seed of None keeps their order."""
        self._documents, self._targets, self._seed = documents, targets, seed
        self._total = int(targets.sum())
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # two: a micro-batch may cross into the next epoch

    def _shuffled(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The documents' order in this epoch, and the targets of all up to each."""
        count = len(self._documents)
        order = (
            np.arange(count) if self._seed is None else np.random.default_rng([self._seed, epoch]).permutation(count)
        )
        return order, np.cumsum(self._targets[order], dtype=np.int64)

    @abstractmethod
    def row(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of row `number`, equally many; where there is nothing to learn, the target is IGNORE."""

    def targets_before(self, number: int) -> int:
        """Targets in the rows 0 to `number` - 1."""
        epochs, row = divmod(number, self.per_epoch)
        return epochs * self._total + self._within(epochs, row)

    @abstractmethod
    def _within(self, epoch: int, row: int) -> int:
        """Targets in the rows of an epoch before `row`."""


class PackedRows(Rows):
    """Documents laid end to end, as in RWKV's pretraining, and cut into rows of ctx_len tokens.

    Each token is a target exactly once an epoch: no document is cut off, none is left over.
    """

    def __init__(self, documents: Documents, ctx_len: int, seed: int | None) -> None:
        """Lay out `documents` in rows of `ctx_len`; a seed of None keeps their order."""
        super().__init__(documents, documents.sizes, seed)
        self.ctx_len = ctx_len
        self.per_epoch = math.ceil(documents.tokens / ctx_len)

    def row(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Rows.row`. (T,) each."""
        epoch, row = divmod(number, self.per_epoch)
        start = row * self.ctx_len
        stop = min(start + self.ctx_len, self._documents.tokens)
        inputs = np.full(self.ctx_len, END, np.int64)  # before the stream's first token stands END
        targets = np.full(self.ctx_len, IGNORE, np.int64)
        first = max(start - 1, 0)  # the token before the row is its first input
        stream = self._stream(epoch, first, stop)
        inputs[first + 1 - start : stop - start] = stream[:-1]
        targets[: stop - start] = stream[start - first :]
        return inputs, targets

    def _stream(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `stop` - 1 of the epoch's documents, end to end."""
        order, ends = self._order(epoch)
        tokens = np.empty(stop - start, np.int64)
        at, place = start, int(np.searchsorted(ends, start, side="right"))
        while at < stop:
            document = self._documents[int(order[place])]
            offset = len(document) - (int(ends[place]) - at)
            piece = document[offset : offset + stop - at]
            tokens[at - start : at - start + len(piece)] = piece
            at, place = at + len(piece), place + 1
        return tokens

    def _within(self, epoch: int, row: int) -> int:
        return row * self.ctx_len


class DocumentRows(Rows):
    """One document a row, from its beginning. What is beyond ctx_len tokens is left out, in every epoch."""

    def __init__(self, documents: Documents, ctx_len: int, seed: int | None, *, after_state: bool) -> None:
        """Rows of `documents`.

        Args:
            documents: each becomes a row.
            ctx_len: the most tokens that a row has.
            seed: of their order; None keeps it.
            after_state: a tuned state stands in the place of token 0: a document's first token is read after it, and nothing
                predicts it. Else token 0 is read first, and every token is predicted.

        Raises:
            InputError: a document has no token to predict.
        """
        whole = documents.sizes.astype(np.int64) - after_state
        if (whole < 1).any():
            raise InputError(
                f"document {int(np.argmin(whole))} has {int(whole.min()) + after_state} tokens",
                "a row needs one to read and one to predict",
                "prepare the data anew",
            )
        targets = np.minimum(whole, ctx_len)
        super().__init__(documents, targets, seed)
        self.per_epoch = len(documents)
        self.left_out = LeftOut(int((targets < whole).sum()), int((whole - targets).sum()))
        self._lead = np.array([] if after_state else [END], np.int64)

    def row(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Rows.row`. As many as the document has targets."""
        epoch, place = divmod(number, self.per_epoch)
        i = int(self._order(epoch)[0][place])
        count = int(self._targets[i])
        tokens = np.concatenate((self._lead, self._documents[i][: count + 1].astype(np.int64)))
        return tokens[:count], tokens[1 : count + 1]

    def _within(self, epoch: int, row: int) -> int:
        return int(self._order(epoch)[1][row - 1]) if row else 0


def rows(documents: Documents, config: TrainConfig, seed: int | None, *, after_state: bool = False) -> Rows:
    """The rows that the settings ask for.

    Args:
        documents: what to learn.
        config: has the rows' kind and length.
        seed: of the documents' order; None keeps it.
        after_state: see `DocumentRows`.

    Raises:
        InputError: packed rows after a state, which stands at a document's beginning.
    """
    config.check_rows(after_state)
    if config.rows == "documents":
        return DocumentRows(documents, config.ctx_len, seed, after_state=after_state)
    return PackedRows(documents, config.ctx_len, seed)


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """All micro-batches of a run, by number; the run's steps are runs of `accumulate` of them."""

    def __init__(self, rows: Rows, micro_batch: int, accumulate: int, epochs: float) -> None:
        """Cut `epochs` passes over `rows` into micro-batches of `micro_batch` rows; the last may be smaller."""
        self._rows, self._micro_batch, self._accumulate = rows, micro_batch, accumulate
        self._total = max(1, round(epochs * rows.per_epoch))

    def __len__(self) -> int:
        return math.ceil(self._total / self._micro_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return math.ceil(len(self) / self._accumulate)

    def tokens_before(self, step: int) -> int:
        """Targets learned when `step` optimizer steps are done."""
        return self._rows.targets_before(min(step * self._accumulate * self._micro_batch, self._total))

    def __getitem__(self, number: int) -> Batch:
        first = number * self._micro_batch
        pairs = [self._rows.row(i) for i in range(first, min(first + self._micro_batch, self._total))]
        size = len(pairs), max(len(inputs) for inputs, _ in pairs)
        inputs, targets = torch.full(size, END), torch.full(size, IGNORE)
        for row, pair in enumerate(pairs):  # the longest decides the width, and the others are filled up behind
            for side, tokens in zip((inputs, targets), pair, strict=True):
                side[row, : len(tokens)] = torch.from_numpy(tokens)
        step = number // self._accumulate
        return Batch(inputs, targets, self.tokens_before(step + 1) - self.tokens_before(step))
