"""The squared ReLU in Triton, in float32 whatever the dtype. The operator is in `kernels.channel_mix`."""

# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _forward(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # a NaN stays one
    tl.store(y + at, (value * value).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def _backward(y, dy, dx, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    root = tl.sqrt(tl.load(y + at, mask=at < count).to(tl.float32))
    slope = 2 * tl.load(dy + at, mask=at < count).to(tl.float32) * root
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=at < count)


def forward(x: Tensor, y: Tensor) -> None:
    """Fill y, which may be x; see `kernels.channel_mix`."""
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(x.numel(), _BLOCK),)](x, y, x.numel(), BLOCK=_BLOCK, num_warps=8)


def backward(y: Tensor, dy: Tensor, dx: Tensor) -> None:
    """Fill dx."""
    with torch.cuda.device_of(y):
        _backward[(triton.cdiv(y.numel(), _BLOCK),)](y, dy, dx, y.numel(), BLOCK=_BLOCK, num_warps=8)
