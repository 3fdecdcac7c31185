"""How autograd runs a recurrence: wkv4, wkv6 and wkv7 are alike in it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.operator import Operator


def differentiate(forward: Operator, backward: Operator) -> None:
    """Register the backward of a recurrence.

    Args:
        forward: of (inputs, state, form, keep), the first input in the shape and dtype of y; gives y, the last state and
            what it keeps for the backward.
        backward: of (inputs, what was kept, dy, dfinal, form); gives the gradients of the inputs and the state.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, state, ctx.form, _keep = inputs
        ctx.set_materialize_grads(False)  # what is kept has none: zeros of its size would take as long as some steps
        ctx.state = state.shape, state.dtype
        ctx.save_for_backward(*tensors, output[2])

    def gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _dkept: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        first = saved[0]
        if dy is None:
            dy = first.new_zeros(first.shape)
        if dfinal is None:
            shape, dtype = ctx.state
            dfinal = first.new_zeros(shape, dtype=dtype)
        with torch.autocast(first.device.type, enabled=False):
            grads: tuple[Tensor, ...] = backward(*saved, dy, dfinal, ctx.form)
        return *grads, None, None

    forward.register_autograd(gradients, setup_context=save)


def in_parts(
    run: Callable[..., tuple[Tensor, Tensor]], parts: int, sequences: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """A recurrence in slices of time, each from the state of the one before: what a call needs for itself is that of a slice.

    Args:
        run: (sequences, state) -> (y, state).
        parts: how many slices at most, of one length but for the last.
        sequences: (B, T, ...) each.
        state: before the first step.

    Returns:
        What `run` gives of all at once.
    """
    steps = sequences[0].shape[1]
    size = -(-steps // parts)
    if size >= steps:
        return run(*sequences, state)
    ys = []
    for some in zip(*(torch.split(x, size, 1) for x in sequences), strict=True):
        y, state = run(*some, state)
        ys.append(y)
    return torch.cat(ys, 1), state
