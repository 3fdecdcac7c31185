"""What is cheap to make is not kept for the backward, but made again.

A layer's products of matrices are dear, and their results are kept. Norms, lerps, gates and the second halves of low-rank pairs
take a pass over memory each, and are half of what autograd would keep of a layer of RWKV-7.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Made = TypeVar("Made", Tensor, tuple[Tensor, ...])


class Remake:
    """A context: what within it keeps a result of `remake(make, *inputs)` for the backward keeps how that is made instead.

    `make` must be a function of the inputs and of parameters, give contiguous tensors, and draw nothing at random. What it made
    is made again once for all who need it, to the same bits. Without gradients, and while torch.compile traces, which finds by
    itself what to keep, this does nothing. It takes the place of hooks on saved tensors that are around it.
    """

    def __init__(self, active: bool = True) -> None:
        """Not active, it only calls: where all of the memory is another's concern, as within a checkpoint."""
        self._active = active
        self._hooks: saved_tensors_hooks | None = None
        self._results: dict[int, _Result] = {}
        self._packed: list[_Kept] = []
        """Kept in full since the last call began."""

    def __enter__(self) -> Self:
        if self._active and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._hooks = saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None
            self._results.clear()
            self._packed.clear()

    def __call__(self, make: Callable[..., Made], *inputs: Tensor | None) -> Made:
        """What `make(*inputs)` gives."""
        if self._hooks is None:
            return make(*inputs)
        self._packed.clear()
        made = make(*inputs)
        recipe = _Recipe(make, inputs, self._find)
        taken = {_storage(x) for x in inputs if x is not None}
        for which, y in enumerate((made,) if isinstance(made, Tensor) else made):
            # what shares memory with an input or with another result is not this one's alone
            if y.is_contiguous() and 0 < y.nbytes == y.untyped_storage().nbytes() and _storage(y) not in taken:
                # while such a reference lives, no other memory has this identity
                memory = StorageWeakRef(y.untyped_storage())  # type: ignore[no-untyped-call]
                self._results[_storage(y)] = _Result(memory, y.dtype, y._version, recipe, which)
            taken.add(_storage(y))
        for kept in self._packed:  # an operator may keep its own results
            kept.forget(self._find(kept.tensor))
        return made

    def _pack(self, x: Tensor) -> "_Kept":
        kept = _Kept(x)
        kept.forget(self._find(x))
        if kept.place is None:
            self._packed.append(kept)
        return kept

    def _find(self, x: Tensor | None) -> "_Place | None":
        """Where x, which may be a view, is among what can be made again."""
        if x is None or x.layout is not torch.strided:
            return None  # a sparse tensor, as an adapter may keep, is no one piece of memory
        result = self._results.get(_storage(x))
        if result is None or (x.dtype, x._version) != result[1:3]:
            return None  # what has been written to since is no longer what was made
        return _Place(result.recipe, result.which, x.shape, x.stride(), int(x.storage_offset()))


def _storage(x: Tensor) -> int:
    """What identifies the memory of a tensor and of its views."""
    identity: int = x.untyped_storage()._cdata
    return identity


def _unpack(kept: "_Kept") -> Tensor:
    x = kept.value()
    if x is None:  # the graph keeps no Nones
        raise RuntimeError("what the forward kept is gone; run the forward again")
    return x


class _Result(NamedTuple):
    memory: StorageWeakRef
    dtype: torch.dtype
    version: int
    recipe: "_Recipe"
    which: int


class _Place(NamedTuple):
    """A view of what a recipe makes."""

    recipe: "_Recipe"
    which: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept:
    """What the graph holds: a tensor, or its place."""

    def __init__(self, tensor: Tensor | None, place: _Place | None = None) -> None:
        self.tensor, self.place = None if place else tensor, place

    def forget(self, place: _Place | None) -> None:
        """Hold the place instead, and be counted among those who will ask."""
        if place is not None:
            self.tensor, self.place = None, place
            place.recipe.promise()

    def value(self) -> Tensor | None:
        if self.place is None:
            return self.tensor
        recipe, which, shape, stride, offset = self.place
        y = recipe.result(which)
        return y.as_strided(shape, stride, y.storage_offset() + offset)


class _Recipe:
    """How some tensors were made. They are made again when the first is asked for, and freed when the last was."""

    def __init__(
        self,
        make: Callable[..., Tensor | tuple[Tensor, ...]],
        inputs: Sequence[Tensor | None],
        find: Callable[[Tensor], _Place | None],
    ) -> None:
        self._make = make
        self._inputs = [None if x is None else _Kept(x.detach(), find(x)) for x in inputs]
        device = next(x.device.type for x in inputs if x is not None)
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._asking, self._left = 0, 0
        self._made: tuple[Tensor, ...] = ()

    def promise(self) -> None:
        """One more will ask for a result."""
        if not self._asking:
            for kept in self._inputs:
                if kept is not None and kept.place is not None:
                    kept.place.recipe.promise()
        self._asking += 1
        self._left += 1

    def result(self, which: int) -> Tensor:
        if not self._made:
            device, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(device, dtype, enabled):
                made = self._make(*[kept and kept.value() for kept in self._inputs])
            self._made = tuple(y.contiguous() for y in ((made,) if isinstance(made, Tensor) else made))
        y = self._made[which]
        self._left -= 1
        if self._left <= 0:  # and if the graph is kept for another backward, all will ask again
            self._made, self._left = (), self._asking
        return y
