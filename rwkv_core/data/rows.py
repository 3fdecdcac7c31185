"""Rows: what of the documents stands in a sequence, and from which state that is read. Numbered over all epochs.

A row is known by its number alone, so a run goes on anywhere without a look at what came before.
"""

import bisect
import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.data.magic_prime import magic_prime, window
from rwkv_core.data.order import Array, Order, Part, Plan
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import END

T = TypeVar("T")


class Piece(NamedTuple):
    """Tokens `start` to `stop` - 1 of a document, as targets. What is read for the first is the token before it."""

    document: int
    start: int
    stop: int


class Reading(NamedTuple):
    """What the model reads in one go."""

    pieces: tuple[Piece, ...]
    """End to end."""
    before: int = END
    """Read before the first piece where that begins its document."""
    goes_on: bool = False
    """Read from the state that the row's lane was left in, not from that before a document."""

    def __len__(self) -> int:
        """How many tokens are read."""
        return sum(stop - start for _, start, stop in self.pieces)


class LeftOut(NamedTuple):
    """What of the documents is in no row."""

    documents: int
    """How many are cut off."""
    tokens: int
    """That are not read."""


class Rows(ABC, Generic[T]):
    """Documents as rows. T is what a kind of row knows of an epoch."""

    left_out = LeftOut(0, 0)
    lanes = 0
    """Of rows that go on from each other: row n is in lane n % lanes, and goes on from row n - lanes. 0: they do not."""
    apart = False
    """Whether a row has several readings, each from the state before a document."""

    def __init__(self, documents: Documents, parts: Sequence[Part], often: Sequence[Fraction]) -> None:
        """Rows of `documents`; an epoch goes `often` through each of `parts`."""
        self.documents, self._parts, self._often = documents, parts, often
        self._first, self._read = [0], [0]  # rows and tokens of all epochs before
        self._plans: dict[int, T] = {}

    @abstractmethod
    def _count(self, epoch: int) -> int:
        """Rows in an epoch."""

    @abstractmethod
    def _tokens(self, epoch: int) -> int:
        """Tokens read in an epoch."""

    @abstractmethod
    def _within(self, epoch: int, place: int) -> int:
        """Tokens read in the rows of an epoch before `place`."""

    @abstractmethod
    def _row(self, epoch: int, place: int) -> tuple[Reading, ...]:
        """A row of an epoch."""

    @abstractmethod
    def _planned(self, epoch: int) -> T:
        """What a row of this epoch is found by."""

    def _plan(self, epoch: int) -> T:
        """`_planned`, kept for two epochs: a micro-batch may cross into the next."""
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._planned(epoch)
        return self._plans[epoch]

    def before(self, epoch: int) -> int:
        """Rows in the epochs before this one."""
        while len(self._first) <= epoch:
            self._first.append(self._first[-1] + self._count(len(self._first) - 1))
        return self._first[epoch]

    def row(self, number: int) -> tuple[Reading, ...]:
        """Row `number`: what is read of it. Nothing, where its lane has run out."""
        return self._row(*self._place(number))

    def tokens_before(self, number: int) -> int:
        """Tokens read in the rows 0 to `number` - 1."""
        epoch, place = self._place(number)
        while len(self._read) <= epoch:
            self._read.append(self._read[-1] + self._tokens(len(self._read) - 1))
        return self._read[epoch] + (self._within(epoch, place) if place else 0)

    def _place(self, number: int) -> tuple[int, int]:
        while self._first[-1] <= number:
            self.before(len(self._first))
        epoch = bisect.bisect_right(self._first, number) - 1
        return epoch, number - self._first[epoch]

    def in_epochs(self, epochs: float) -> int:
        """Rows in so many epochs, rounded; at least one."""
        whole = int(epochs)
        first, count = self.before(whole), self.before(whole + 1) - self.before(whole)
        return max(1, round(first + (epochs - whole) * count))

    def in_tokens(self, tokens: int) -> int:
        """Rows that read so many tokens, the last of them perhaps more."""
        most = 1
        while self.tokens_before(most) < tokens:
            most *= 2
        return bisect.bisect_left(range(most), tokens, key=self.tokens_before)

    def epochs(self, number: int) -> float:
        """How many epochs the rows 0 to `number` - 1 are."""
        epoch, place = self._place(number)
        return epoch + place / (self.before(epoch + 1) - self.before(epoch))

    def learned(self) -> float:
        """Share of the tokens that are learned, by the parts' counts: what a row cuts off is among them."""
        read = sum(often * part.tokens for often, part in zip(self._often, self._parts, strict=True))
        return float(sum(often * part.learned for often, part in zip(self._often, self._parts, strict=True)) / read)


class UnitRows(Rows[tuple[Array, Array]]):
    """Rows that are the units of an order. An epoch is known by its units, and the tokens of all up to each."""

    def __init__(self, documents: Documents, plan: Plan, borders: Array, lengths: Array) -> None:
        """Rows of `documents`; for the others see `Order`."""
        self._order = Order(plan, borders, lengths)
        super().__init__(documents, plan.parts, self._order.often)

    def _count(self, epoch: int) -> int:
        return self._order.before(epoch + 1) - self._order.before(epoch)

    def _tokens(self, epoch: int) -> int:
        ends = self._plan(0 if self._order.constant else epoch)[1]
        return int(ends[-1]) if len(ends) else 0

    def _within(self, epoch: int, place: int) -> int:
        return int(self._plan(epoch)[1][place - 1])

    def _planned(self, epoch: int) -> tuple[Array, Array]:
        units = self._order.units(epoch)
        return units, np.cumsum(self._order.lengths[units])

    def _row(self, epoch: int, place: int) -> tuple[Reading, ...]:
        return self._unit(int(self._plan(epoch)[0][place]))

    @abstractmethod
    def _unit(self, unit: int) -> tuple[Reading, ...]:
        """What is read of it."""


class Windows:
    """Documents cut into pieces of at most ctx_len targets, numbered in the documents' order."""

    def __init__(self, documents: Documents, ctx_len: int, *, after_state: bool, first_only: bool = False) -> None:
        """Cut `documents`.

        Args:
            documents: what to cut.
            ctx_len: targets of a piece at most.
            after_state: a tuned state stands in the place of token 0: a document's first token is read after it, and nothing
                predicts it. Else token 0 is read first, and every token is predicted.
            first_only: leave out all but the first piece of each.

        Raises:
            InputError: a document has no token to predict.
        """
        self._lead, self._ctx_len, self._sizes = int(after_state), ctx_len, documents.sizes
        self.targets = documents.sizes.astype(np.int64) - self._lead
        if (self.targets < 1).any():
            raise InputError(
                f"document {int(np.argmin(self.targets))} has {int(self.targets.min()) + self._lead} tokens",
                "a row needs one to read and one to predict",
                "prepare the data anew",
            )
        self.counts = np.ones_like(self.targets) if first_only else -(-self.targets // ctx_len)
        """(D,) pieces of each document."""
        self.ends = np.cumsum(self.counts)
        self.lengths = np.full(int(self.ends[-1]), ctx_len, np.int64)
        """(W,) targets of each piece."""
        self.lengths[self.ends - 1] = np.minimum(self.targets - (self.counts - 1) * ctx_len, ctx_len)

    def borders(self, plan: Plan) -> Array:
        """(P + 1,): the first piece of each part, and how many there are."""
        return np.concatenate(([0], self.ends))[plan.documents]

    def piece(self, number: int) -> Piece:
        """The piece of that number."""
        document = int(np.searchsorted(self.ends, number, side="right"))
        return self.of(document, number - int(self.ends[document] - self.counts[document]))

    def of(self, document: int, number: int) -> Piece:
        """A document's piece."""
        start = self._lead + number * self._ctx_len
        return Piece(document, start, min(start + self._ctx_len, int(self._sizes[document])))


class WindowRows(UnitRows):
    """A piece of a document in each row: its first alone, or all of them, each from the state before a document."""

    def __init__(self, documents: Documents, plan: Plan, ctx_len: int, *, after_state: bool, first_only: bool) -> None:
        """See `Windows`."""
        self._windows = Windows(documents, ctx_len, after_state=after_state, first_only=first_only)
        super().__init__(documents, plan, self._windows.borders(plan), self._windows.lengths)
        lost = np.maximum(self._windows.targets - ctx_len, 0) if first_only else np.zeros(1)
        self.left_out = LeftOut(int((lost > 0).sum()), int(lost.sum()))

    def _unit(self, unit: int) -> tuple[Reading, ...]:
        return (Reading((self._windows.piece(unit),)),)


class PackedRows(UnitRows):
    """Whole documents in each row; of one longer than ctx_len, its pieces are as documents.

    The rows of each part are put together once, the longest pieces first, each into the fullest row that has room for it; or,
    if the order is as_given, one after the other. Each epoch has the same rows in an order of its own.
    """

    def __init__(self, documents: Documents, plan: Plan, ctx_len: int, *, after_state: bool, carry: bool) -> None:
        """Pack `documents`.

        Args:
            documents: what to pack.
            plan: the order, and the mix.
            ctx_len: targets of a row at most.
            after_state: see `Windows`.
            carry: the state goes on into the next document of a row; else each is read from that before a document.

        Raises:
            InputError: a document has no token to predict; or it is cut, and its later pieces would be read from a tuned state.
        """
        windows = self._windows = Windows(documents, ctx_len, after_state=after_state)
        if after_state and len(windows.lengths) > len(documents):
            longest = int(np.argmax(windows.targets))
            raise InputError(
                f"document {longest} has {int(documents.sizes[longest])} tokens, and train.ctx_len is {ctx_len}",
                "adapter.state stands at a document's beginning, and pack would cut this one",
                "raise ctx_len, or set train.rows: pad; or chunk with carry_state: true",
            )
        self.apart = not carry
        packed, sizes = [], []  # pieces in the order of their rows, and how many each row has
        borders, of_rows = windows.borders(plan), [0]
        for part, (first, stop) in enumerate(itertools.pairwise(borders.tolist())):
            pieces = np.arange(first, stop)
            if plan.kind == "as_given":
                rows = next_fit(windows.lengths[pieces], ctx_len)
            else:
                pieces = plan.draw(part, _PACKING).permutation(pieces)
                rows = best_fit(windows.lengths[pieces], ctx_len)
            packed.append(pieces[np.argsort(rows, kind="stable")])
            sizes.append(np.bincount(rows))
            of_rows.append(of_rows[-1] + len(sizes[-1]))
        self._pieces, self._ends = np.concatenate(packed), np.cumsum(np.concatenate(sizes))
        ends = np.cumsum(windows.lengths[self._pieces])[self._ends - 1]
        super().__init__(documents, plan, np.array(of_rows), np.diff(ends, prepend=0))

    def _unit(self, unit: int) -> tuple[Reading, ...]:
        first = int(self._ends[unit - 1]) if unit else 0
        pieces = tuple(self._windows.piece(int(i)) for i in self._pieces[first : self._ends[unit]])
        return tuple(Reading((piece,)) for piece in pieces) if self.apart else (Reading(pieces),)


_PACKING = 1 << 20
"""What is drawn for: beyond the parts' numbers."""


def next_fit(lengths: Array, room: int) -> Array:
    """(N,) the row of each piece, in their order: a row ends where the next piece has no room."""
    ends, rows, first, row = np.cumsum(lengths), np.zeros(len(lengths), np.int64), 0, 0
    while first < len(lengths):
        stop = int(np.searchsorted(ends, (ends[first - 1] if first else 0) + room, side="right"))
        rows[first:stop] = row
        first, row = stop, row + 1
    return rows


def best_fit(lengths: Array, room: int) -> Array:
    """(N,) the row of each piece: the longest first, each into the fullest row that has room for it.

    Source: best-fit decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
    """
    rows, count = np.zeros(len(lengths), np.int64), 0
    left: list[int] = []  # that rows have, each once, ascending
    having: dict[int, list[int]] = {}  # the rows that have it
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        place = bisect.bisect_left(left, size)
        if place == len(left):
            row, count, rest = count, count + 1, room - size
        else:
            row, rest = having[left[place]].pop(), left[place] - size
            if not having[left[place]]:
                del having[left.pop(place)]
        rows[piece] = row
        if rest:
            if rest not in having:
                bisect.insort(left, rest)
            having.setdefault(rest, []).append(row)
    return rows


class StreamRows(Rows[tuple[Array, Array]]):
    """Documents laid end to end, as in RWKV's pretraining, and cut into rows of ctx_len tokens.

    Each token is a target exactly once: no document is cut off, none is left over. An epoch is known by its documents, and the
    tokens of all up to each.
    """

    def __init__(self, documents: Documents, plan: Plan, ctx_len: int) -> None:
        """Lay out `documents` in rows of `ctx_len`."""
        self._order = Order(plan, plan.documents, documents.sizes.astype(np.int64))
        super().__init__(documents, plan.parts, self._order.often)
        self._ctx_len = ctx_len

    def _planned(self, epoch: int) -> tuple[Array, Array]:
        order = self._order.units(epoch)
        return order, np.cumsum(self._order.lengths[order])

    def _tokens(self, epoch: int) -> int:
        ends = self._plan(0 if self._order.constant else epoch)[1]
        return int(ends[-1]) if len(ends) else 0

    def _count(self, epoch: int) -> int:
        return -(-self._tokens(epoch) // self._ctx_len)

    def _within(self, epoch: int, place: int) -> int:
        return place * self._ctx_len

    def _row(self, epoch: int, place: int) -> tuple[Reading, ...]:
        order, ends = self._plan(epoch)
        start = place * self._ctx_len
        return (stretch(self.documents, order, ends, start, min(start + self._ctx_len, int(ends[-1]))),)


def stretch(documents: Documents, order: Array, ends: Array, start: int, stop: int) -> Reading:
    """Tokens `start` to `stop` - 1 of documents laid end to end, as targets; `ends` are the tokens of all up to each."""
    pieces, at, place = [], start, int(np.searchsorted(ends, start, side="right"))
    first = place
    while at < stop:
        document, end = int(order[place]), int(ends[place])
        if at < end:
            size = int(documents.sizes[document])
            pieces.append(Piece(document, size - (end - at), size - max(end - stop, 0)))
        at, place = end, place + 1
    before = END
    if pieces[0].start == 0 and start:  # the token before is that of a document with tokens
        last = int(np.searchsorted(ends[:first], start, side="left"))
        before = int(documents[int(order[last])][-1])
    return Reading(tuple(pieces), before)


class MagicPrimeRows(Rows[None]):
    """RWKV-LM's order of pretraining: windows of the documents laid end to end in their own order, `prime` of them an epoch.

    Of window w the tokens from w ctx_len on are read, and those from w ctx_len + 1 on are learned. Every epoch has one order.
    """

    def __init__(self, documents: Documents, plan: Plan, ctx_len: int) -> None:
        """Windows of `ctx_len`.

        Raises:
            InputError: there are fewer than 3 windows.
        """
        prime = magic_prime(documents.tokens, ctx_len)
        if prime is None:
            raise InputError(
                f"train.ctx_len = {ctx_len} and {documents.tokens} tokens",
                "magic_prime orders 3 windows or more",
                "lower ctx_len, or set train.rows: stream",
            )
        super().__init__(documents, plan.parts, [Fraction(1)] * len(plan.parts))
        self._prime, self._ctx_len = prime, ctx_len
        self._order, self._ends = np.arange(len(documents)), np.cumsum(documents.sizes, dtype=np.int64)
        self.left_out = LeftOut(0, documents.tokens - prime * ctx_len)

    def _planned(self, epoch: int) -> None:
        return None

    def _count(self, epoch: int) -> int:
        return self._prime

    def _tokens(self, epoch: int) -> int:
        return self._prime * self._ctx_len

    def _within(self, epoch: int, place: int) -> int:
        return place * self._ctx_len

    def _row(self, epoch: int, place: int) -> tuple[Reading, ...]:
        first = window(place, self._prime) * self._ctx_len + 1
        return (stretch(self.documents, self._order, self._ends, first, first + self._ctx_len),)


class Lanes(NamedTuple):
    """The documents of an epoch, lane by lane."""

    documents: Array
    """(D,) in the lanes' order."""
    ends: Array
    """(D,) windows of all up to each."""
    first: Array
    """(L + 1,) the first window of each lane, and how many there are."""
    read: Array
    """(R + 1,) tokens read in the rows before each."""


class LaneRows(Rows[Lanes]):
    """A document's pieces in rows of consecutive steps, each read from the state that the one before has left.

    The rows of an optimizer step are its lanes. The documents are given to the lanes, the longest first, each to the lane that
    has the fewest rows; a lane has its documents in shuffled order. An epoch ends with the longest lane: the rows of the others
    are empty then.
    """

    def __init__(self, documents: Documents, plan: Plan, ctx_len: int, *, after_state: bool) -> None:
        """See `Windows`."""
        self._windows = Windows(documents, ctx_len, after_state=after_state)
        self._order = Order(plan, plan.documents, self._windows.targets)
        super().__init__(documents, plan.parts, self._order.often)
        self.lanes, self._as_given, self._ctx_len = plan.step, plan.kind == "as_given", ctx_len

    def _planned(self, epoch: int) -> Lanes:
        documents = self._order.units(epoch)
        counts = self._windows.counts[documents]
        lanes, loads = np.zeros(len(documents), np.int64), [(0, lane) for lane in range(self.lanes)]
        turns = np.arange(len(counts)) if self._as_given else np.argsort(-counts, kind="stable")
        for turn in turns.tolist():
            load, its = loads[0]
            heapq.heapreplace(loads, (load + int(counts[turn]), its))
            lanes[turn] = its
        by = np.argsort(lanes, kind="stable")
        documents, counts, lanes = documents[by], counts[by], lanes[by]
        ends = np.cumsum(counts)
        of_lanes = np.bincount(lanes, counts, self.lanes).astype(np.int64)
        first = np.concatenate(([0], np.cumsum(of_lanes)))
        sizes = np.zeros(int(of_lanes.max()) * self.lanes, np.int64)
        lane = np.repeat(np.arange(self.lanes), of_lanes)
        lengths = np.full(int(first[-1]), self._ctx_len)
        lengths[ends - 1] = self._windows.targets[documents] - (counts - 1) * self._ctx_len
        sizes[(np.arange(len(lane)) - first[lane]) * self.lanes + lane] = lengths
        return Lanes(documents, ends, first, np.concatenate(([0], np.cumsum(sizes))))

    def _count(self, epoch: int) -> int:
        return len(self._plan(0 if self._order.constant else epoch).read) - 1

    def _tokens(self, epoch: int) -> int:
        return int(self._plan(0 if self._order.constant else epoch).read[-1])

    def _within(self, epoch: int, place: int) -> int:
        return int(self._plan(epoch).read[place])

    def _row(self, epoch: int, place: int) -> tuple[Reading, ...]:
        plan = self._plan(epoch)
        step, lane = divmod(place, self.lanes)
        at = int(plan.first[lane]) + step
        if at >= plan.first[lane + 1]:
            return ()
        i = int(np.searchsorted(plan.ends, at, side="right"))
        document = int(plan.documents[i])
        number = at - int(plan.ends[i] - self._windows.counts[document])
        return (Reading((self._windows.of(document, number),), goes_on=number > 0),)


def rows(
    documents: Documents,
    config: TrainConfig,
    seed: int | None,
    *,
    after_state: bool = False,
    parts: Sequence[Part] = (),
    world: int = 1,
) -> Rows[Any]:
    """The rows that the settings ask for.

    Args:
        documents: what to learn.
        config: has the rows' kind and length, their order and their mix.
        seed: of all that is drawn. None is for held-out documents: they keep their order, and each is there once; where
            training has magic_prime, which leaves some out, they are a stream.
        after_state: see `Windows`.
        parts: of the documents. Without any they are one, all.
        world: processes that share each step's rows.

    Raises:
        InputError: the settings do not fit each other, or the documents; see `TrainConfig.check_rows` too.
    """
    config.check_rows(after_state)
    if not documents.tokens:
        raise InputError("no tokens", "there must be some to learn", "prepare the data anew")
    held_out = seed is None
    if held_out:
        parts = [
            Part("all", 0, len(documents), documents.tokens, documents.tokens)
        ]  # nobody asks what of them is learned
    plan = Plan(
        _checked(parts, documents) if parts else [whole(documents)],
        {} if held_out else config.mix,
        "as_given" if seed is None else config.order,
        seed or 0,
        config.micro_batch * config.accumulate * world,
    )
    kind = "stream" if held_out and config.rows == "magic_prime" else config.rows
    match kind:
        case "stream":
            return StreamRows(documents, plan, config.ctx_len)
        case "magic_prime":
            return MagicPrimeRows(documents, plan, config.ctx_len)
        case "pack":
            return PackedRows(documents, plan, config.ctx_len, after_state=after_state, carry=config.carry_state)
        case "chunk" if config.carry_state:
            return LaneRows(documents, plan, config.ctx_len, after_state=after_state)
        case _:
            return WindowRows(
                documents, plan, config.ctx_len, after_state=after_state, first_only=config.rows != "chunk"
            )


def whole(documents: Documents) -> Part:
    """All of them as one part."""
    learned = sum(int(np.count_nonzero(documents.learned(i))) for i in range(len(documents)))
    return Part("all", 0, len(documents), documents.tokens, learned)


def _checked(parts: Sequence[Part], documents: Documents) -> Sequence[Part]:
    """Raises InputError if they are not what the documents consist of."""
    at = 0
    for part in parts:
        if part.first != at:
            break
        at += part.documents
    if at != len(documents) or part.first + part.documents != at:
        raise InputError(
            f"the manifest's parts end at document {at}", f"there are {len(documents)}", "prepare the data anew"
        )
    return parts
