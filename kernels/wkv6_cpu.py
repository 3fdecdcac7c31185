"""WKV-6 in C++, csrc/wkv6.cpp: in float32, whatever the inputs' dtypes. The operator is in `kernels.wkv6`."""

import torch
from torch import Tensor

from kernels import build
from kernels.wkv7_cpu import bf16_bits, readable

INTERVAL = 64
"""Steps from one kept state to the next."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each interval, key by value."""
    batch, heads, size, _ = state.shape
    return state.new_empty(batch * heads, -(-steps // INTERVAL), size, size)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv6`."""
    batch, steps, heads, size = r.shape
    inputs = [readable(x) for x in (r, k, v, w_raw, u)]
    state = state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = kept(steps, state) if keep else state.new_empty(0)
    build.function("wkv6", "rwkv_wkv6_forward", "15q")(
        *(x.data_ptr() for x in inputs), state.data_ptr(), y.data_ptr(), final.data_ptr(), before.data_ptr(),
        batch, steps, heads, size, bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    return y.to(r.dtype), final, before


def backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv6`. The states within an interval are made again, not kept."""
    batch, steps, heads, size = r.shape
    inputs = [readable(x) for x in (r, k, v, w_raw, u)]
    dy, dfinal = dy.to(inputs[0].dtype).contiguous(), dfinal.contiguous()
    grads = [torch.empty_like(x) for x in (*inputs, dfinal)]
    build.function("wkv6", "rwkv_wkv6_backward", "20q")(
        *(x.data_ptr() for x in (*inputs, before, dy, dfinal, *grads)),
        batch, steps, heads, size, bf16_bits(inputs), build.threads(),
    )  # fmt: skip
    of_inputs = (grad.to(x.dtype) for grad, x in zip(grads, (r, k, v, w_raw, u), strict=False))
    return *of_inputs, grads[5]
