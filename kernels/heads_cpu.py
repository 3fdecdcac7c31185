"""WKV-6 and WKV-7 in C++, csrc/heads.h: in float32, whatever the inputs' dtypes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import build
from kernels.compiled import bf16_bits, readable

INTERVAL = 64
"""Steps from one kept state to the next."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each interval, key by value."""
    batch, heads, size, _ = state.shape
    return state.new_empty(batch * heads, -(-steps // INTERVAL), size, size)


def forward(name: str, given: Sequence[Tensor], state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name: y in the dtype of its first input, the last state, and what to keep."""
    inputs, state = [readable(x) for x in given], state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = kept(y.shape[1], state) if keep else state.new_empty(0)
    build.function(name, f"rwkv_{name}_forward", f"{len(inputs) + 10}q")(
        *(x.data_ptr() for x in (*inputs, state, y, final, before)), *y.shape, bf16_bits(inputs), build.threads()
    )
    return y.to(given[0].dtype), final, before


def backward(name: str, given: Sequence[Tensor], before: Tensor, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs and the first state. The states within an interval are made again, not kept."""
    inputs = [readable(x) for x in given]
    dy, dfinal = dy.to(inputs[0].dtype).contiguous(), dfinal.contiguous()
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    build.function(name, f"rwkv_{name}_backward", f"{2 * len(inputs) + 10}q")(
        *(x.data_ptr() for x in (*inputs, before, dy, dfinal, *grads)),
        *dy.shape, bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    return *(grad.to(x.dtype) for grad, x in zip(grads, given, strict=False)), grads[-1]
