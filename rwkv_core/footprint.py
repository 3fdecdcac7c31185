"""What a training step allocates, found by running it on tensors that have no memory.

torch's fake tensors have shapes, dtypes and storages, and every operator here says what it would give. So the model itself,
with its adapter, packed matrices and all that it makes again, tells what is allocated and freed, in order; and no formula can
grow old. Only what an operator takes for itself within a call is not seen: of that, what the head takes counts, see
`kernels.head_loss.scratch`.

On a CPU that order is then given to a model of the C library's heap, whose holes are a part of what is resident.
"""

import bisect
import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.head_loss import head_loss, scratch
from rwkv_core.adapters.peft import all_tensors
from rwkv_core.models.skeleton import RWKV


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Within, tensors that are made have no memory; constants that operators keep may be real."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def with_memory() -> Iterator[None]:
    """Within, tensors that are made have memory again, if `without_memory` is around it."""
    with unset_fake_temporarily():
        yield


@dataclass
class Trace:
    """What a micro-batch allocates and frees beside what the model holds."""

    sizes: list[int] = field(default_factory=list)
    """Bytes of each storage, by number."""
    events: list[int] = field(default_factory=list)
    """In order: n where storage n is made, ~n where it is freed."""
    forward: int = 0
    """Events before the backward begins."""
    operations: list[int] = field(default_factory=list)
    """For each operation of the forward, the events before it."""
    kept: set[int] = field(default_factory=set)
    """Storages that the forward leaves to the backward."""
    gradients: set[int] = field(default_factory=set)
    """Storages that the backward leaves."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a trace of all that is done within."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        """Of storages other than those of `known`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.alive: dict[int, int] = {x.untyped_storage()._cdata: -1 for x in known}
        """Numbers of storages, by what identifies them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rwkv.head_loss.default:
            self._within(scratch(args[0], args[1])[1])
        self.trace.operations.append(len(self.trace.events))
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            mask = args[1][0]  # how many it lets through is decided by values: all of them at most
            result = args[0].reshape(mask.numel(), *args[0].shape[mask.ndim :]).clone()
        else:
            result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive and storage.nbytes():
                    self.alive[key] = number = len(self.trace.sizes)
                    self.trace.sizes.append(storage.nbytes())
                    self.trace.events.append(number)
                    weakref.finalize(storage, self._free, key, number)
        return result

    def _within(self, size: int) -> None:
        """Note what an operator takes for itself alone."""
        number = len(self.trace.sizes)
        self.trace.sizes.append(size)
        self.trace.events += [number, ~number]

    def _free(self, key: int, number: int) -> None:
        if self.alive.get(key) == number:
            del self.alive[key]
            self.trace.events.append(~number)


def record(model: RWKV, tokens: Tensor, dtype: torch.dtype | None) -> Trace:
    """The trace of one micro-batch of training.

    Args:
        model: made and adapted `without_memory`; it is left without gradients.
        tokens: (B, T) int64, without memory too.
        dtype: of the products under mixed precision; None: the model's.
    """
    with _Recorder([*all_tensors(model), tokens]) as recorder:
        trace: Trace = recorder.trace
        total = loss(model, tokens, dtype)
        trace.forward, forward = len(trace.events), len(trace.operations)
        trace.kept = {number for number in recorder.alive.values() if number >= 0}
        total.backward()  # type: ignore[no-untyped-call]
        found = [p.grad for p in model.parameters() if p.grad is not None]
        trace.gradients = {recorder.alive[x.untyped_storage()._cdata] for x in found}
        del trace.operations[forward:]
        recorder.trace = Trace()  # what is freed from here on is no part of it
    del total, found
    for parameter in model.parameters():
        parameter.grad = None
    return trace


def loss(model: RWKV, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Of a micro-batch (B, T), each token as its own target; made as `training.module.Training` makes it."""
    device = tokens.device.type
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        features, _after = model.features(tokens)
        rows, values = model.head.trained_rows()
        return head_loss(features.flatten(0, 1), model.head.now(), tokens.flatten(), rows=rows, values=values)


class Gpu:
    """What torch's allocator calls allocated on a GPU: blocks in units of 512 bytes, and no holes."""

    def __init__(self) -> None:
        self.resident = 0

    def allocate(self, size: int) -> int:
        """Take some; what `free` wants."""
        block = -(-size // 512) * 512
        self.resident += block
        return block

    def free(self, block: int) -> None:
        """Give it back."""
        self.resident -= block

    def objects(self) -> list[int]:
        """What an operation leaves beside tensors: nothing here."""
        return []


class Heap:
    """glibc's heap as `memory.reused` sets it: it grows at the top, and nothing of it goes back; large blocks stand alone.

    A free block is taken by best fit, split, and joined with free neighbours. torch asks for aligned places, which are cut from
    a longer block. What is cut off goes to small objects, and as long as these live the block between, once free, is a little
    too short for the next of its size: so on a CPU activations take up to twice their size.
    Source: malloc.c of glibc 2.36.
    """

    ALIGNED, LEAST, HEADER = 64, 32, 8
    """Bytes: places that torch asks for; the shortest block; what a block has beside what was asked for."""
    CACHED, CACHE = 1040, 7
    """Freed blocks up to this long are not joined but kept for the next of their length, so many of each."""
    LARGE = 32 << 20
    """Blocks from here on stand alone, if no free one has room for them."""
    OBJECTS = (80, 32)
    """Bytes of what an operation of the forward leaves until its backward: small enough for what is cut off. How many there
    are is chosen so that measured heaps agree (docs/plan.md)."""

    def __init__(self) -> None:
        self._top = self._alone = self._names = 0
        self._free: dict[int, int] = {}
        """Free blocks: length by place."""
        self._ends: dict[int, int] = {}
        """Their places, by their ends."""
        self._sorted: list[tuple[int, int]] = []
        """Their lengths and places, ascending."""
        self._cached: dict[int, list[int]] = {}
        """Places of freed blocks that are not joined, by length."""
        self._taken: dict[int, int] = {}
        """Lengths of taken blocks by place; of those that stand alone, by a negative number."""

    @property
    def resident(self) -> int:
        """Bytes that the system counts: all below the top, and what stands alone."""
        return self._top + self._alone

    def allocate(self, size: int) -> int:
        """Take some; what `free` wants."""
        wanted = self._length(size)
        asked = wanted + self.ALIGNED + self.LEAST
        if asked >= self.LARGE and (not self._sorted or self._sorted[-1][0] < asked):
            self._names -= 1
            self._taken[self._names] = asked
            self._alone += asked
            return self._names
        place, length = self._take(asked)
        begin = -(-(place + 16) // self.ALIGNED) * self.ALIGNED - 16  # a block's memory is 16 bytes behind its place
        if 0 < begin - place < self.LEAST:
            begin += self.ALIGNED
        end = place + length
        if begin > place:
            self._give(place, begin - place)
        if end - begin - wanted > self.LEAST:
            self._give(begin + wanted, end - begin - wanted)
            end = begin + wanted
        self._taken[begin] = end - begin
        return begin

    def objects(self) -> list[int]:
        """What an operation leaves beside tensors."""
        found = []
        for size in self.OBJECTS:
            place, length = self._take(self._length(size))
            self._taken[place] = length
            found.append(place)
        return found

    def free(self, block: int) -> None:
        """Give it back."""
        length = self._taken.pop(block)
        if block < 0:
            self._alone -= length
        else:
            self._give(block, length)

    def _length(self, size: int) -> int:
        return max(self.LEAST, -(-(size + self.HEADER) // 16) * 16)

    def _take(self, length: int) -> tuple[int, int]:
        """A block of at least that length, and its length."""
        if self._cached.get(length):
            return self._cached[length].pop(), length
        at = bisect.bisect_left(self._sorted, (length, 0))
        if at < len(self._sorted):
            found, place = self._sorted[at]
            self._remove(place)
            if found - length < self.LEAST:
                return place, found
            self._add(place + length, found - length)
            return place, length
        place = self._ends.get(self._top, self._top)  # what is free below the top is a part of what is above it
        if place != self._top:
            self._remove(place)
        self._top = place + length
        return place, length

    def _give(self, place: int, length: int) -> None:
        kept = self._cached.setdefault(length, []) if length <= self.CACHED else None
        if kept is not None and len(kept) < self.CACHE:
            kept.append(place)
        else:
            self._add(place, length)

    def _add(self, place: int, length: int) -> None:
        if place in self._ends:
            before = self._ends[place]
            length += self._free[before]
            self._remove(before)
            place = before
        if place + length in self._free:
            behind, more = place + length, self._free[place + length]
            self._remove(behind)
            length += more
        self._free[place] = length
        self._ends[place + length] = place
        bisect.insort(self._sorted, (length, place))

    def _remove(self, place: int) -> None:
        length = self._free.pop(place)
        del self._ends[place + length]
        del self._sorted[bisect.bisect_left(self._sorted, (length, place))]


@dataclass(frozen=True)
class Peak:
    """The moment at which most is resident beside what the model holds, in bytes."""

    gradients: int
    kept: int
    """Kept by the forward for the backward."""
    working: int
    """Of the operations under way."""
    allocator: int
    """Resident beyond all these: holes, and what has been kept since it was freed."""
    after: int
    """Resident when the steps are done."""

    @property
    def total(self) -> int:
        """Resident."""
        return self.gradients + self.kept + self.working + self.allocator


STEPS = 3
"""After so many, a heap hardly grows."""


def peak(trace: Trace, space: Gpu | Heap, accumulate: int = 1) -> Peak:
    """The peak of a run whose steps allocate as in `trace`.

    Args:
        trace: of a micro-batch.
        space: where; what is in it already counts to `allocator`.
        accumulate: micro-batches a step. From the second on, gradients are added to those that are there; those of a step stay
            until the next one's backward begins.
    """
    replay = _Replay(trace, space)
    for _ in range(STEPS):
        replay.micro_batch(first=True)
        if accumulate > 1:
            replay.micro_batch(first=False)
    return Peak(*replay.most[1:], after=space.resident)


class _Replay:
    """Takes and frees memory as a trace says."""

    def __init__(self, trace: Trace, space: Gpu | Heap) -> None:
        self._trace, self._space = trace, space
        self._sums = [0, 0, 0]  # gradients, kept, working
        self._blocks: dict[int, int] = {}
        self._gradients: list[tuple[int, int]] = []
        """Blocks of the step's gradients, and their sizes."""
        self.most = (0, 0, 0, 0, 0)
        """Resident at the peak: in all, and of each kind, the allocator's share last."""

    def micro_batch(self, *, first: bool) -> None:
        """Forward and backward; of a step, the first or another one."""
        trace, space, sums = self._trace, self._space, self._sums
        objects: list[int] = []
        per_event = _counted(trace.operations, len(trace.events))
        left = len(trace.events) - trace.forward
        for place, event in enumerate(trace.events):
            if place < trace.forward:
                for _ in range(per_event[place]):
                    objects += space.objects()
                made = len(objects)
            elif place == trace.forward and first:
                for block, size in self._gradients:
                    space.free(block)
                    sums[0] -= size
                self._gradients = []
            if place >= trace.forward:  # the last operation's go first
                while len(objects) * left > made * (len(trace.events) - place):
                    space.free(objects.pop())
            number = event if event >= 0 else ~event
            gradient, size = number in trace.gradients, trace.sizes[number]
            kind = 0 if gradient else 1 if number in trace.kept else 2
            if event < 0:
                space.free(self._blocks.pop(number))
                sums[kind] -= size
                continue
            block = space.allocate(size)
            sums[kind] += size
            if space.resident > self.most[0]:
                self.most = (space.resident, *sums, space.resident - sum(sums))  # type: ignore[assignment]
            if not gradient:
                self._blocks[number] = block
            elif first:
                self._gradients.append((block, size))
            else:  # it is added to what is there
                space.free(block)
                sums[0] -= size
        for number, block in self._blocks.items():
            space.free(block)
            sums[1 if number in trace.kept else 2] -= trace.sizes[number]
        self._blocks = {}
        for block in objects:
            space.free(block)


def _counted(places: Sequence[int], length: int) -> list[int]:
    counts = [0] * (length + 1)
    for place in places:
        counts[place] += 1
    return counts
