"""Which tokens each step learns: a function of the seed and the step alone, so a continued run sees what it would have seen.

Shapes: R readings side by side, T the longest of them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.head_loss import IGNORE
from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.rows import Reading, Rows
from rwkv_core.tokenizer import END

LONGER = 1.25
"""How many times as long as the shortest of a group the longest may be. Each group costs its own start, and what fills it up
costs tokens: benchmarks/data.py measures both."""


class Group(NamedTuple):
    """What the model reads side by side, filled up behind to the longest."""

    inputs: Tensor
    """(R, T) int64 tokens."""
    targets: Tensor
    """(R, T) int64: the token after each input, or IGNORE where nothing is learned."""
    weights: Tensor | None
    """(R, T) float32: what each target counts; None for 1."""
    lanes: Tensor | None
    """(R,) int64: where the states are kept that later rows go on from. None: nothing goes on."""
    goes_on: Tensor | None
    """(R,) bool: whether a reading goes on from its lane's state; else it begins before a document."""


class Batch(NamedTuple):
    """One micro-batch: rows of equal standing, whose loss is one sum."""

    groups: tuple[Group, ...]
    """None, where all of its lanes have run out."""
    step_weight: float
    """Sum of the weights of all targets in the optimizer step that this is part of: what its loss is divided by."""
    learned: int
    """Targets in this micro-batch."""
    tokens: int
    """Read in this micro-batch, learned or not; what fills rows up is not counted."""


def tokens_of(
    documents: Documents, reading: Reading
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None]:
    """Inputs, targets and weights, (T,) each; the target is IGNORE where it is not learned, and weights are None for 1."""
    size = len(reading)
    inputs, targets = np.empty(size, np.int64), np.empty(size, np.int64)
    weights, at, before = None, 0, reading.before
    for number, start, stop in reading.pieces:
        document, here = documents[number], slice(at, at + stop - start)
        targets[here] = document[start:stop]
        inputs[at] = document[start - 1] if start else before
        inputs[at + 1 : here.stop] = document[start : stop - 1]
        before = int(document[stop - 1])
        weight, learned = documents.weight(number), documents.learned(number)[start:stop]
        if weight != 1:
            weights = np.ones(size, np.float32) if weights is None else weights
            weights[here] = weight
        if not weight or not learned.all():
            targets[here][~learned | (not weight)] = IGNORE
        at = here.stop
    return inputs, targets, weights


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """All micro-batches of a run, by number; the run's steps are runs of `accumulate` of them."""

    def __init__(
        self,
        rows: Rows[Any],
        micro_batch: int,
        accumulate: int,
        total: int,
        *,
        rank: int = 0,
        world: int = 1,
        full: bool = False,
        left_out: frozenset[int] = frozenset(),
    ) -> None:
        """Cut the first `total` of `rows` into micro-batches of `micro_batch`; the last may be smaller.

        Where `world` processes share the rows, this one has every `world`-th of them, from number `rank` on: a step has the
        same rows however micro_batch * accumulate * world is made up. If `full`, the last step has as many micro-batches as
        the others: the added ones are empty. Rows of the numbers `left_out` are not read, and count nothing in the weight of
        their step; all others stay where they are.
        """
        self._rows, self._micro_batch, self._accumulate, self._total = rows, micro_batch, accumulate, total
        self._rank, self._world, self._full, self._left_out = rank, world, full, left_out
        self._weights: dict[int, float] = {}

    def __len__(self) -> int:
        count = math.ceil(self._total / (self._micro_batch * self._world))
        return math.ceil(count / self._accumulate) * self._accumulate if self._full else count

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return math.ceil(len(self) / self._accumulate)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"micro-batch {number} of {len(self)}")
        self._rows.documents.check_there()
        readings = [(n, reading) for n in self.rows_of(number) for reading in self._rows.row(n)]
        documents, lanes = self._rows.documents, self._rows.lanes
        pairs = [(n, reading, tokens_of(documents, reading)) for n, reading in readings]
        return Batch(
            tuple(_group(group, lanes) for group in self._grouped(pairs)),
            self._step_weight(number // self._accumulate),
            sum(int((targets != IGNORE).sum()) for _, _, (_, targets, _) in pairs),
            sum(len(reading) for _, reading in readings),
        )

    def rows_of(self, number: int) -> list[int]:
        """Numbers of the rows of a micro-batch."""
        chosen = ((number * self._micro_batch + i) * self._world + self._rank for i in range(self._micro_batch))
        return [n for n in chosen if n < self._total and n not in self._left_out]

    def _grouped(self, readings: "list[_Read]") -> "Iterator[list[_Read]]":
        """All at once; of rows that have several, those of like length, lest much is filled up."""
        if not self._rows.apart:
            yield from [readings] if readings else []
            return
        group: list[_Read] = []
        for one in sorted(readings, key=lambda one: len(one[1])):
            if group and len(one[1]) > LONGER * len(group[0][1]):
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _step_weight(self, step: int) -> float:
        """Sum of the weights of a step's targets, kept for two steps."""
        if step not in self._weights:
            while len(self._weights) > 1:
                del self._weights[next(iter(self._weights))]
            size = self._micro_batch * self._accumulate * self._world
            numbers = range(step * size, min((step + 1) * size, self._total))
            self._weights[step] = sum(
                self._rows.documents.weight(document)
                * int(np.count_nonzero(self._rows.documents.learned(document)[start:stop]))
                for number in numbers
                if number not in self._left_out
                for reading in self._rows.row(number)
                for document, start, stop in reading.pieces
            )
        return self._weights[step]


_Read = tuple[int, Reading, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32] | None]]
"""The number of a row, what is read of it, and its tokens."""


def _group(readings: Sequence[_Read], lanes: int) -> Group:
    size = len(readings), max(len(reading) for _, reading, _ in readings)
    inputs, targets = torch.full(size, END), torch.full(size, IGNORE)
    weights = torch.ones(size) if any(weights is not None for _, _, (_, _, weights) in readings) else None
    for row, (_, _, tokens) in enumerate(readings):
        for side, values in zip((inputs, targets, weights), tokens, strict=True):
            if side is not None and values is not None:
                side[row, : len(values)] = torch.from_numpy(values)
    if not lanes:
        return Group(inputs, targets, weights, None, None)
    kept = torch.tensor([number % lanes for number, _, _ in readings])
    return Group(inputs, targets, weights, kept, torch.tensor([reading.goes_on for _, reading, _ in readings]))


class Extent(NamedTuple):
    """How long a run is, in every unit."""

    rows: int
    epochs: float
    """Passes over the rows."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Read, learned or not."""


def extent(rows: Rows[Any], config: TrainConfig, world: int = 1) -> Extent:
    """How long a run over these rows is, by whichever of epochs, steps and tokens the settings have."""
    size = config.micro_batch * config.accumulate * world
    if config.steps is not None:
        total = config.steps * size
    elif config.tokens is not None:
        total = rows.in_tokens(config.tokens)
    else:
        total = rows.in_epochs(config.epochs or 0)
    return Extent(total, rows.epochs(total), math.ceil(total / size), rows.tokens_before(total))
