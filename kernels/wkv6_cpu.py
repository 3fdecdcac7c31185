"""WKV-6 in C++, csrc/wkv6.cpp. The operator is in `kernels.wkv6`."""

from torch import Tensor

from kernels import heads_cpu
from kernels.heads_cpu import kept as kept


def forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.wkv6`."""
    return heads_cpu.forward("wkv6", (r, k, v, w_raw, u), state, keep)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, before: Tensor, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, ...]:
    """See `kernels.wkv6`."""
    return heads_cpu.backward("wkv6", (r, k, v, w_raw, u), before, dy, dfinal)
