"""What an epoch has, and in which order: a function of the seed and the epoch alone.

What is ordered are units: documents, windows of them, or rows of several. A part of the data is an endless stream of its
units, pass after pass, each in an order of its own; an epoch takes the next so many of each part's stream.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rwkv_core.errors import InputError

Array = npt.NDArray[np.int64]
Kind = Literal["shuffled", "similar_lengths", "short_first", "long_first", "as_given"]


class Part(NamedTuple):
    """Documents that follow each other and have a name, as the manifest has them."""

    name: str
    first: int
    """Number of its first document."""
    documents: int
    tokens: int
    learned: int
    """Of its tokens."""


def passes(mix: Mapping[str, str], names: Sequence[str], tokens: Sequence[int]) -> list[Fraction]:
    """How often an epoch goes through each part.

    Args:
        mix: of some parts by name, "3x" for so many passes, or "10%" for so many that this is its share of the epoch's tokens.
        names: of the parts.
        tokens: that a pass over each reads.

    Raises:
        InputError: `mix` names a part that is not there, or an empty one, or leaves none without a share.
    """
    for name in mix:
        if name not in names:
            raise InputError(f"train.mix has {name}", f"the data has the parts {', '.join(names)}", "name one of these")
    shares = {name: Fraction(given[:-1]) / 100 for name, given in mix.items() if given.endswith("%")}
    if len(shares) == len(names):
        raise InputError(
            f"train.mix has a share for each of {', '.join(names)}",
            "a share is of what the other parts leave",
            "give one of them passes, as 1x",
        )
    found = {name: Fraction(mix.get(name, "1x")[:-1]) for name in names if name not in shares}
    size = dict(zip(names, tokens, strict=True))
    rest = 1 - sum(shares.values(), Fraction())
    total = sum((count * size[name] for name, count in found.items()), Fraction()) / rest
    for name, share in shares.items():
        if not size[name]:
            raise InputError(f"train.mix.{name} = {mix[name]}", "this part has no tokens", "leave it out")
        found[name] = share * total / size[name]
    return [found[name] for name in names]


class Plan(NamedTuple):
    """How the units of a set are ordered."""

    parts: Sequence[Part]
    mix: Mapping[str, str]
    """See `passes`."""
    kind: Kind
    """as_given; or shuffled; or by length, units of one length shuffled; or similar_lengths: the units of an optimizer step
    are of like length, and the steps are shuffled."""
    seed: int
    """Of what is drawn."""
    step: int
    """Units in an optimizer step."""

    @property
    def documents(self) -> Array:
        """(P + 1,): the first document of each part, and how many there are."""
        return np.array([0, *(part.first + part.documents for part in self.parts)])

    def draw(self, number: int, purpose: int) -> np.random.Generator:
        """The generator of a pass or of an epoch; `purpose` tells apart what is drawn for."""
        return np.random.default_rng([self.seed, number, purpose] if purpose else [self.seed, number])


class Order:
    """The units of each epoch."""

    def __init__(self, plan: Plan, borders: Array, lengths: Array) -> None:
        """Order units.

        Args:
            plan: how.
            borders: (P + 1,): the first unit of each part, and U.
            lengths: (U,) tokens that each unit has.

        Raises:
            InputError: see `passes`.
        """
        self.lengths, self._plan = lengths, plan
        tokens = np.diff(np.concatenate(([0], np.cumsum(lengths)))[borders])
        self.often = passes(plan.mix, [part.name for part in plan.parts], tokens.tolist())
        """An epoch's passes through each part."""
        self._parts = list(zip(borders[:-1].tolist(), np.diff(borders).tolist(), self.often, strict=True))
        self.constant = all(often.denominator == 1 for often in self.often)
        """Whether all epochs have the same units."""

    def before(self, epoch: int) -> int:
        """Units in the epochs before this one."""
        return sum(math.floor(often * count * epoch) for _, count, often in self._parts)

    def units(self, epoch: int) -> Array:
        """Those of an epoch, in their order."""
        streams = [self._stream(part, epoch) for part in range(len(self._parts))]
        units = streams[0] if len(streams) == 1 else np.concatenate(streams)
        if self._plan.kind == "as_given":
            return units
        if len(streams) > 1:
            units = units[self._plan.draw(epoch, len(streams) + 1).permutation(len(units))]
        if self._plan.kind == "shuffled":
            return units
        units = units[np.argsort(self.lengths[units], kind="stable")]
        if self._plan.kind == "similar_lengths":
            return self._in_steps(units, epoch)
        return units if self._plan.kind == "short_first" else units[::-1]

    def _stream(self, part: int, epoch: int) -> Array:
        """What the epoch takes of a part's endless stream."""
        first, count, often = self._parts[part]
        at, stop = (math.floor(often * count * e) for e in (epoch, epoch + 1))
        taken = []
        while at < stop:
            number, place = divmod(at, count)
            if self._plan.kind == "as_given":
                one = np.arange(count)
            else:
                one = self._plan.draw(number, part + 1 if len(self._parts) > 1 else 0).permutation(count)
            taken.append(first + one[place : place + stop - at])
            at += len(taken[-1])
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _in_steps(self, units: Array, epoch: int) -> Array:
        """Sorted units, cut where optimizer steps begin; the whole steps are shuffled.

        An epoch may begin and end within a step: the shortest and the longest are there.
        """
        head = min(-self.before(epoch) % self._plan.step, len(units))
        whole = (len(units) - head) // self._plan.step
        body = units[head : head + whole * self._plan.step].reshape(whole, self._plan.step)
        body = body[self._plan.draw(epoch, len(self._parts) + 2).permutation(whole)]
        return np.concatenate((units[:head], body.ravel(), units[head + whole * self._plan.step :]))
