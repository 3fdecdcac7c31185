"""Contexts longer than memory, and contexts that grow.

Rows longer than a segment are read in two passes. Forwards, segment by segment and without a graph, for the states at the
borders. Then backwards, from the last segment to the first: each is read again from the state at its border, with a graph. What
is differentiated is the segment's loss, plus the inner product of the state that it leaves with the gradient that the segment
after it has found for this state. The gradient of the state that it began from goes on to the segment before; those of the
parameters are summed. That is the chain rule: the gradient is that of the row in one graph. In memory are the graph of one
segment, one gradient of the parameters, and the states at the borders.

Cut at every k-th border (`bptt: k`), no gradient goes on there, and the two passes are made from cut to cut; with k = 1 the
first is left out. The loss of a segment then reaches 1 to k segments back: as many as lie between it and the cut.

Where processes have a share each of the parameters, there are whole gradients nowhere: each segment is then a forward and a
backward pass of the strategy's own, whose hooks gather parameters, and add each share of the gradients where it belongs.

Source: Gruslys et al. 2016, "Memory-Efficient Backpropagation Through Time", arXiv:1606.03401.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from rwkv_core.config import ContextConfig
from rwkv_core.data.sampling import Group
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import BlockState, State
from rwkv_core.training.parallel import Ranks, evened

T = TypeVar("T")

LossOf = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of what the head reads (R, C), the targets (R,) and their weights (R,): a sum."""


class Passes(Protocol):
    """How a strategy runs what it has shared out. All processes make the same passes, in the same order."""

    def forward(self, work: Callable[[], T]) -> T:
        """Do what reads the parameters."""

    def backward(self, loss: Tensor) -> None:
        """Add the parameters' gradients, at a scale of the strategy's."""


def ctx_len_at(config: ContextConfig, ctx_len: int, step: int) -> int:
    """Tokens that rows are read in, in optimizer step `step`, counting from 0: a function of it alone, so it survives a resume.

    Source: TrainChatGalRWKV, `--initial_ctx_len` and `--ctx_warmup_steps`.
    """
    if config.initial_ctx_len is None:
        return ctx_len
    done = min(step, config.ctx_warmup_steps)
    return config.initial_ctx_len + done * (ctx_len - config.initial_ctx_len) // config.ctx_warmup_steps


def draw_from(seed: int, device: torch.device) -> None:
    """What is drawn from here on, on the CPU and on `device`, follows from the seed.

    `torch.manual_seed` seeds every kind of device, and for each kind that is not in use formats the stack: 0.5 ms on a CPU.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def check(config: ContextConfig, steps: int) -> None:
    """Refuse a warm-up of the context that the run does not get through.

    Raises:
        InputError: it is as long as the run, or longer.
    """
    if config.ctx_warmup_steps >= steps:
        raise InputError(
            f"train.context.ctx_warmup_steps = {config.ctx_warmup_steps}",
            f"this run has {steps} optimizer steps, and none would read rows of ctx_len",
            "lower it, or train longer",
        )


def windows(group: Group, size: int) -> Iterator[Group]:
    """A group whose readings go nowhere, cut into windows of `size` tokens, which are readings of their own; all are there.

    The token before a window's first target is read first, as in a row of a stream.
    """
    length = group.inputs.shape[1]
    whole = length // size * size

    def part(x: Tensor, first: int, stop: int) -> Tensor:
        return x[:, first:stop].reshape(-1, min(size, stop - first))

    for first, stop in ((0, whole), (whole, length)):
        if stop > first:
            weights = None if group.weights is None else part(group.weights, first, stop)
            yield Group(part(group.inputs, first, stop), part(group.targets, first, stop), weights, None, None)


def segments(group: Group, size: int) -> list[Group]:
    """A group cut into stretches of `size` tokens, the last perhaps shorter; each goes on from the state of the one before."""
    inputs, targets = torch.split(group.inputs, size, 1), torch.split(group.targets, size, 1)
    weights = [None] * len(inputs) if group.weights is None else torch.split(group.weights, size, 1)
    return [Group(*parts, None, None) for parts in zip(inputs, targets, weights, strict=True)]


def of_one_reading(state: State) -> State:
    """For a segment that only keeps a process in step with others: a new state would read a parameter, which all must do."""
    return [BlockState(*(x[:1].detach() for x in block)) for block in state]


class Sweep:
    """A micro-batch's loss and gradients, found segment by segment."""

    def __init__(
        self, model: RWKV, loss_of: LossOf, size: int, bptt: Literal["exact"] | int, *, scale: float = 1.0
    ) -> None:
        """Begin with none.

        Args:
            model: what is trained of it requires gradients.
            loss_of: the head's loss.
            size: tokens of a segment.
            bptt: at every how many-th border gradients end.
            scale: what the loss will be multiplied by: gradients are found at this scale, where small ones are not lost.
        """
        self._model, self._loss_of, self._size, self._scale = model, loss_of, size, scale
        self._bptt = None if bptt == "exact" else bptt
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[Tensor | None] = [None] * len(self._trained)
        self._losses: list[Tensor] = []
        # both passes draw the same for dropout: each segment from a seed of its own, that of the micro-batch and its number
        self._seed, self._read = int(torch.randint(2**62, ())), 0

    def read(self, group: Group, before: State) -> State:
        """Add the loss of a group, and its gradients.

        Args:
            group: the readings, side by side.
            before: the state that they begin from. Gradients reach it where it has a graph.

        Returns:
            The state that they leave, detached.
        """
        cut = self._cut(group)
        numbers = range(self._read, self._read + len(cut))
        self._read += len(cut)
        state, back = before, None
        step = self._bptt or len(cut)
        for first in range(0, len(cut), step):
            numbered = list(zip(numbers, cut, strict=True))[first : first + step]
            state, found = self._stretch(numbered, state, wants_first=not first)
            back = back if first else found
        self._differentiate(_flat(before), back or [], [])
        return state

    def total(self) -> Tensor:
        """The sum of all losses, a scalar without a graph."""
        return torch.stack(self._losses).double().sum().to(self._losses[0].dtype)

    def loss(self) -> Tensor:
        """The sum of all losses, a scalar; its backward gives every trained parameter its gradient, once."""
        gradients, self._gradients = self._gradients, []
        loss: Tensor = _Found.apply(self.total(), gradients, self._scale, *self._trained)  # type: ignore[no-untyped-call]
        return loss

    def _cut(self, group: Group) -> Sequence[Group]:
        return segments(group, self._size)

    def _stretch(
        self, numbered: Sequence[tuple[int, Group]], state: State, *, wants_first: bool
    ) -> tuple[State, list[Tensor | None]]:
        """Segments from cut to cut: the state after the last, and the gradients of that before the first."""
        borders = [_detached(state)]
        places: list[State] = []
        with torch.no_grad():
            for count, (number, segment) in enumerate(numbered[:-1]):
                after = self._after(number, segment, borders[-1])
                places = places or _places(after, len(numbered) - 1)
                borders.append(_copied(after, places[count]))
        last: State | None = None
        back: list[Tensor | None] = []
        for number, segment in reversed(numbered):
            begin = borders.pop()
            for x, given in zip(_flat(begin), _flat(state), strict=True):
                x.requires_grad_(bool(borders) or (wants_first and given.requires_grad))
            loss, after, back = self._differentiated(number, segment, begin, back)
            self._losses.append(loss)
            last = last or _detached(after)
        return last or [], back

    def _after(self, number: int, segment: Group, state: State) -> State:
        """The state that a segment leaves."""
        return self._run(number, segment, state)[1]

    def _differentiated(
        self, number: int, segment: Group, begin: State, back: Sequence[Tensor | None]
    ) -> tuple[Tensor, State, list[Tensor | None]]:
        """Add a segment's gradients, with `back` those of the state it leaves: its loss, that state, those of `begin`."""
        with torch.enable_grad():
            loss, after = self._loss(number, segment, begin)
        seed = torch.full_like(loss, self._scale)
        found = self._differentiate([loss, *_flat(after)], [seed, *(back or [None] * (3 * len(after)))], _flat(begin))
        return loss.detach(), after, found

    def _loss(self, number: int, segment: Group, state: State) -> tuple[Tensor, State]:
        features, after = self._run(number, segment, state)
        weights = None if segment.weights is None else segment.weights.flatten()
        return self._loss_of(features.flatten(0, 1), segment.targets.flatten(), weights), after

    def _run(self, number: int, segment: Group, state: State) -> tuple[Tensor, State]:
        draw_from((self._seed + number) % 2**63, segment.inputs.device)
        # casts that autocast made of parameters without a graph would be taken for those with one
        torch.clear_autocast_cache()
        return self._model.features(segment.inputs, state)

    def _differentiate(
        self, results: Sequence[Tensor], back: Sequence[Tensor | None], starts: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Add the parameters' gradients of `results`, whose own are `back`; those of `starts`."""
        pairs = [(y, g) for y, g in zip(results, back, strict=False) if g is not None and y.requires_grad]
        if not pairs:
            return [None] * len(starts)
        inputs = [*self._trained, *(x for x in starts if x.requires_grad)]
        device = results[0].device.type
        with torch.autocast(device, enabled=False), _unheard(self._trained):  # without autocast as in any backward
            found = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        for i, gradient in enumerate(found[: len(self._trained)]):
            if gradient is not None:
                old = self._gradients[i]
                self._gradients[i] = gradient if old is None else old + gradient
        rest = iter(found[len(self._trained) :])
        return [next(rest) if x.requires_grad else None for x in starts]


class SharedSweep(Sweep):
    """The same where processes share each parameter: the gradients are added up in the shares. No state is tuned there."""

    def __init__(
        self,
        model: RWKV,
        loss_of: LossOf,
        size: int,
        bptt: Literal["exact"] | int,
        *,
        scale: float,
        passes: Passes,
        here: Ranks,
    ) -> None:
        """As above; `scale` is what the loss is multiplied by for `passes.backward`."""
        super().__init__(model, loss_of, size, bptt, scale=scale)
        self._passes, self._here = passes, here

    def _cut(self, group: Group) -> Sequence[Group]:
        """As many as the rank with the most has: those added leave the state and its gradient as they are."""
        cut = super()._cut(group)
        self._end = self._read + len(cut)
        return evened(cut, self._here, group.inputs.device)

    def _after(self, number: int, segment: Group, state: State) -> State:
        after = self._passes.forward(lambda: self._run(number, segment, self._before(number, state))[1])
        return after if number < self._end else state

    def _differentiated(
        self, number: int, segment: Group, begin: State, back: Sequence[Tensor | None]
    ) -> tuple[Tensor, State, list[Tensor | None]]:
        added, before = number >= self._end, self._before(number, begin)
        for x, y in zip(_flat(before), _flat(begin), strict=True):
            x.requires_grad_(y.requires_grad)

        def work() -> tuple[Tensor, Tensor, State]:
            loss, after = self._loss(number, segment, before)
            whole = self._scale * loss
            # the same graph everywhere, whatever is known of `back`: DeepSpeed's ranks meet in the order it is gone through
            for i, x in enumerate(_flat(after)):
                g = None if added or not back else back[i]
                whole = whole + (_full(x) * (0.0 if g is None else g)).sum()
            return whole, loss.detach(), [BlockState(*(x.detach() for x in block)) for block in after]

        with torch.enable_grad():
            whole, loss, after = self._passes.forward(work)
        whole.retain_grad()
        self._passes.backward(whole)
        if added:
            return loss, begin, list(back)
        if whole.grad is None:
            raise RuntimeError("the strategy has differentiated another loss than it was given")
        factor = float(whole.grad)  # by which the strategy has scaled it; a state's gradient may be of half precision
        return loss, after, [None if x.grad is None else _full(x.grad) / factor for x in _flat(before)]

    def _before(self, number: int, state: State) -> State:
        return state if number < self._end else of_one_reading(state)


class _Found(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], scale: float, *trained: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        factor = float(grads[0]) / ctx.scale
        if factor != 1:
            for i, gradient in enumerate(ctx.gradients):  # one by one: twice all of them may not fit
                ctx.gradients[i] = None if gradient is None else gradient * factor
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, None, *gradients


@contextlib.contextmanager
def _unheard(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, hooks of tensors do not hear of their gradients: those here are parts of the one that they will hear of."""
    hooks = [x._backward_hooks for x in tensors]
    for x in tensors:
        x._backward_hooks = None
    try:
        yield
    finally:
        for x, held in zip(tensors, hooks, strict=True):
            x._backward_hooks = held


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(state: State) -> list[Tensor]:
    return [x for block in state for x in block]


def _places(state: State, count: int) -> list[State]:
    """Room for `count` states such as this one.

    All of it at once: each state made by itself would lie between what the segment around it has freed, and the next segment
    would not fit there. The heap would grow by several activations a segment.
    """
    rooms = [[x.new_empty(count, *x.shape) for x in block] for block in state]
    return [[BlockState(*(room[i] for room in block)) for block in rooms] for i in range(count)]


def _copied(state: State, place: State) -> State:
    """The state, in a place for it."""
    for block, room in zip(state, place, strict=True):
        for x, to in zip(block, room, strict=True):
            to.copy_(x)
    return place


def _detached(state: State) -> State:
    """Without a graph, and without what it may be a view of: by plain torch the last token's is one of all tokens."""
    return [BlockState(*(_alone(x.detach()) for x in block)) for block in state]


def _alone(x: Tensor) -> Tensor:
    return (
        x
        if x.untyped_storage().nbytes() == x.nbytes and x.is_contiguous()
        else x.clone(memory_format=torch.contiguous_format)
    )
