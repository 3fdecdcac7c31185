"""WKV-7 in C++, csrc/wkv7.cpp: in float32, whatever the inputs' dtypes. The operator is in `kernels.wkv7`."""

import torch
from torch import Tensor

from kernels import build
from kernels.choice import CPU_DTYPES

INTERVAL = 64
"""Steps from one kept state to the next."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each interval, key by value."""
    batch, heads, size, _ = state.shape
    return state.new_empty(batch * heads, -(-steps // INTERVAL), size, size)


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv7`."""
    batch, steps, heads, size = r.shape
    inputs = [readable(x) for x in (r, w_raw, k, v, a, b)]
    state = state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = kept(steps, state) if keep else state.new_empty(0)
    build.function("wkv7", "rwkv_wkv7_forward", "16q")(
        *(x.data_ptr() for x in inputs), state.data_ptr(), y.data_ptr(), final.data_ptr(), before.data_ptr(),
        batch, steps, heads, size, bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    return y.to(r.dtype), final, before


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv7`. The states within an interval are made again, not kept."""
    batch, steps, heads, size = r.shape
    inputs = [readable(x) for x in (r, w_raw, k, v, a, b)]
    dy, dfinal = dy.to(inputs[0].dtype).contiguous(), dfinal.contiguous()
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    build.function("wkv7", "rwkv_wkv7_backward", "22q")(
        *(x.data_ptr() for x in (*inputs, before, dy, dfinal, *grads)),
        batch, steps, heads, size, bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    of_inputs = (grad.to(x.dtype) for grad, x in zip(grads, (r, w_raw, k, v, a, b), strict=False))
    return *of_inputs, grads[6]


def readable(x: Tensor) -> Tensor:
    """The tensor as compiled code reads it: contiguous, and float32 unless bfloat16."""
    return (x if x.dtype in CPU_DTYPES else x.float()).contiguous()


def bf16_bits(xs: list[Tensor]) -> int:
    """Which of them are bfloat16, a bit for each, from the lowest."""
    return sum((x.dtype == torch.bfloat16) << i for i, x in enumerate(xs))
