"""Which tokens each step learns: a function of the seed and the step alone, so a continued run sees what it would have seen.

Documents are shuffled anew each epoch and laid end to end, as in RWKV's pretraining; the stream is cut into rows of ctx_len.
Each token is a target exactly once an epoch: no document is cut off, none is left over. Row letters: R rows, T ctx_len.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.head_loss import IGNORE
from rwkv_core.data.binidx import Documents
from rwkv_core.tokenizer import END


class Batch(NamedTuple):
    """One micro-batch."""

    inputs: Tensor
    """(R, T) int64 tokens."""
    targets: Tensor
    """(R, T) int64: the token after each input, or IGNORE beyond the stream's end."""
    step_tokens: int
    """Targets in the whole optimizer step that this micro-batch is part of: what its loss is divided by."""


class PackedRows:
    """A binidx as rows of ctx_len tokens, numbered over all epochs."""

    def __init__(self, documents: Documents, ctx_len: int, seed: int | None) -> None:
        """Lay out `documents` in rows of `ctx_len`; a seed of None keeps their order."""
        self._documents, self.ctx_len, self._seed = documents, ctx_len, seed
        self.per_epoch = math.ceil(documents.tokens / ctx_len)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # two: a micro-batch may cross into the next epoch

    def _shuffled(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The documents' order in this epoch, and where each ends in the stream, counting from 0."""
        count = len(self._documents)
        order = (
            np.arange(count) if self._seed is None else np.random.default_rng([self._seed, epoch]).permutation(count)
        )
        return order, np.cumsum(self._documents.sizes[order], dtype=np.int64)

    def row(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets, (T,) each, of row `number`."""
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

    def targets_before(self, number: int) -> int:
        """Targets in the rows 0 to `number` - 1."""
        epochs, row = divmod(number, self.per_epoch)
        return epochs * self._documents.tokens + row * self.ctx_len


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """All micro-batches of a run, by number; the run's steps are runs of `accumulate` of them."""

    def __init__(self, rows: PackedRows, micro_batch: int, accumulate: int, epochs: float) -> None:
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
        step = number // self._accumulate
        inputs, targets = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        return Batch(inputs, targets, self.tokens_before(step + 1) - self.tokens_before(step))
