"""Products of float32 matrices on a CPU, by that of torch's two libraries that is fast there.

Torch multiplies float32 by MKL, which has no AVX-512 for processors of others than Intel; oneDNN has, and torch has it too, for
what its compiler makes. On an AMD EPYC of the fifth generation oneDNN's products took 0.45 to 0.5 of the time of MKL's. All
else is torch's own: other processors and devices, other dtypes, autocast, programs that are traced.
Shapes: M rows, K summed over, N columns; ... any number of rows.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operator import PLAIN

SMALL = 1 << 20
"""Multiplications of a product from which on it is worth the longer call: both take some 15 us for as many."""

_AT_ONCE = 1 << 20
"""Values of a result that has to go elsewhere: 4 MB."""


def product(x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """The product alpha x y, without a gradient of its own: (M, K), (K, N) -> (M, N), in one dtype, in any strides."""
    if faster(x, y, x.shape[0] * y.numel()):
        z = _fast(x, y.mT, None)
        return z if alpha == 1 else z.mul_(alpha)
    # of a product with beta 0 the first is not read, and the scale is no pass of its own
    return x @ y if alpha == 1 else torch.addmm(x.new_empty(()), x, y, beta=0, alpha=alpha)


def put(out: Tensor, x: Tensor, y: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> None:
    """Let `out`, (M, N), be beta out + alpha x y; as `product` otherwise. What it was is not read where beta is 0."""
    if not faster(x, y, x.shape[0] * y.numel()):
        torch.addmm(out, x, y, beta=beta, alpha=alpha, out=out)
        return
    tall = len(x) > y.shape[1]
    step = max(_AT_ONCE // min(out.shape), 64)
    for first in range(0, max(out.shape), step):  # what is added or copied is still in the cache
        at = slice(first, first + step)
        part, given = (out[at], (x[at], y.mT)) if tall else (out[:, at], (x, y[:, at].mT))
        more = _fast(*given, None)
        if beta:
            (part if beta == 1 else part.mul_(beta)).add_(more, alpha=alpha)
        else:
            part.copy_(more if alpha == 1 else more.mul_(alpha))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x weight' + bias, with gradients: (..., K), (N, K), (N,) -> (..., N), all in one dtype."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not faster(x, weight, rows * weight.numel()) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _fast(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def faster(x: Tensor, y: Tensor, size: int) -> bool:
    """Whether the product of these is one for oneDNN.

    Args:
        x: one of them.
        y: the other.
        size: multiplications, M K N.
    """
    return (
        size >= SMALL
        and _on_this_processor()
        and all(z.dtype is torch.float32 and z.is_cpu and z.__class__ in PLAIN for z in (x, y))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


@functools.cache
def _on_this_processor() -> bool:
    """Whether MKL leaves AVX-512 unused on this processor, and oneDNN is there."""
    try:
        vendor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):  # another system or another architecture
        return False
    return (
        "GenuineIntel" not in vendor
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _fast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # for a part of its columns oneDNN has but a reference, hundreds of times slower
    return multiply(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _fast(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        return (
            product(flat, weight).view(*dy.shape[:-1], weight.shape[1]) if wants_x else None,
            product(flat.mT, x.reshape(-1, x.shape[-1])) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )
