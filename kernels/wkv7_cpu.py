"""WKV-7 in C++, csrc/wkv7.cpp. The operator is in `kernels.wkv7`."""

from torch import Tensor

from kernels import heads_cpu
from kernels.heads_cpu import kept as kept


def forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv7`."""
    return heads_cpu.forward("wkv7", (r, w_raw, k, v, a, b), state, keep)


def backward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv7`."""
    return heads_cpu.backward("wkv7", (r, w_raw, k, v, a, b), before, dy, dfinal)
