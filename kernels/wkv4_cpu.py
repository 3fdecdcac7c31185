"""WKV-4 in C++, csrc/wkv4.cpp: step by step in float32, whatever the inputs' dtypes. The operator is in `kernels.wkv4`."""

import torch
from torch import Tensor

from kernels import build
from kernels.compiled import readable

CHUNK = 32
"""Steps from one kept state to the next."""


def kept(steps: int, state: Tensor) -> Tensor:
    """What `forward` leaves to `backward` of `steps` steps, not initialised: the state before each chunk."""
    batch, _, channels = state.shape
    return state.new_empty(batch, -(-steps // CHUNK), 3, channels)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv4`."""
    inputs, bits = _read(k, v, w, u)
    state = state.contiguous()
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    before = kept(k.shape[1], state) if keep else state.new_empty(0)
    build.function("wkv4", "rwkv_wkv4_forward", "14q")(
        *(x.data_ptr() for x in (*inputs, state, y, final, before)), *k.shape, *bits, build.threads()
    )
    return y.to(k.dtype), final, before


def backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv4`. The states within a chunk are made again, not kept."""
    batch, _, channels = k.shape
    inputs, bits = _read(k, v, w, u)
    dy, dfinal = dy.to(inputs[0].dtype).contiguous(), dfinal.contiguous()
    dk, dv, dstate = (torch.empty_like(x) for x in (*inputs[:2], dfinal))
    of_rows = before.new_empty((2, batch, channels))
    build.function("wkv4", "rwkv_wkv4_backward", "18q")(
        *(x.data_ptr() for x in (*inputs, before, dy, dfinal, dk, dv, *of_rows, dstate)),
        *k.shape, *bits, build.threads(),
    )  # fmt: skip
    dw, du = of_rows.sum(1)
    return dk.to(k.dtype), dv.to(v.dtype), dw.to(w.dtype, copy=True), du.to(u.dtype, copy=True), dstate


def _read(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[list[Tensor], tuple[bool, bool]]:
    """What the compiled code reads, and which of k and v are bfloat16."""
    k, v = readable(k), readable(v)
    bits = k.dtype == torch.bfloat16, v.dtype == torch.bfloat16
    return [k, v, w.float().contiguous(), u.float().contiguous()], bits
