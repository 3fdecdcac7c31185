"""Matrices times a few rows: what a model does for each token it generates.

On a CPU, up to ROWS rows run in csrc/linear.cpp at the speed of memory, if nobody will ask for gradients. All else is torch
(see `products`), where a processor without bfloat16 computes in float32.
Shapes: ... any number of rows.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import build, products
from kernels.choice import direct

Activation = Literal["none", "tanh", "sigmoid"]

Remake = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

ROWS = 8
"""Up to this many rows each weight is read once for all of them."""

_ACTIVATIONS = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
_CODES = {"none": 0, "tanh": 1, "sigmoid": 2}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product x weight', summed in float32 where it is compiled.

    Args:
        x: (..., in) float32 or bfloat16.
        weight: (out, in), as nn.Linear has it; on a CPU it may be bfloat16 beside a float32 x, and the other way round.

    Returns:
        (..., out) in the dtype of x.
    """
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    if not rows or not direct("linear", x, weight):
        return products.linear(x, weight.to(x.dtype))
    if rows > ROWS:
        return _widened(x, weight) if slow_in(x) else products.linear(x, weight.to(x.dtype))
    out = weight.shape[0]
    if weight.shape[1] != size:
        raise ValueError(f"weight is {tuple(weight.shape)}; for x {tuple(x.shape)} it must be (out, {size})")
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    build.function("linear", "rwkv_linear", "9q")(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, size, out,
        x.dtype is torch.bfloat16, weight.dtype is torch.bfloat16, build.threads(),
    )  # fmt: skip
    return y


def slow_in(x: Tensor) -> bool:
    """Whether x is bfloat16 on a processor without bfloat16 products: torch's are then several times slower than float32's."""
    return x.dtype is torch.bfloat16 and x.is_cpu and not _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    """A torch that can't tell gets float32, which is never slow."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(told.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """The product by float32 products, some rows of the weight at a time, lest all of it stands in memory twice as wide."""
    y, wide = x.new_empty((*x.shape[:-1], len(weight))), x.float()
    step = max(1, _WIDENED // x.shape[-1])
    for i in range(0, len(weight), step):
        y[..., i : i + step] = products.linear(wide, weight[i : i + step].float())
    return y


_WIDENED = 1 << 23
"""Weights at a time: 32 MB."""


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same by torch, with gradients, for any number of rows."""
    return F.linear(x, weight.to(x.dtype))


def low_rank(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: Activation = "none", *,
    remake: Remake = lambda make, hidden: make(hidden),
) -> Tensor:  # fmt: skip
    """A low-rank pair of RWKV: bias + activation(x down) up.

    Args:
        x: (..., in) float32 or bfloat16.
        down: (in, rank), transposed against nn.Linear, as checkpoints have it.
        up: (rank, out), in the dtype of `down`.
        bias: out values of any shape, in the dtype of `down`, or None.
        activation: of the hidden values.
        remake: calls the function that it is given, which makes the result from the hidden values: who has these need not
            keep that.

    Returns:
        (..., out) in the dtype of x.
    """
    size, rank = x.shape[-1], down.shape[1]
    rows = x.numel() // size if size else 0
    given = (x, down, up) if bias is None else (x, down, up, bias)
    if not rows or not direct("linear", *given) or any(w.dtype != down.dtype for w in given[2:]):
        return low_rank_reference(x, down, up, bias, activation, remake)
    if rows > ROWS:
        if not slow_in(x):
            return low_rank_reference(x, down, up, bias, activation, remake)
        dtype = x.dtype
        return low_rank_reference(
            x.float(), down, up, bias, activation,
            lambda make, hidden: remake(lambda hidden: make(hidden).to(dtype), hidden),
        )  # fmt: skip
    out = up.shape[1]
    if down.shape[0] != size or up.shape[0] != rank or (bias is not None and bias.numel() != out):
        shapes = f"x {tuple(x.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}"
        raise ValueError(
            f"{shapes} and bias do not fit together; they must be (..., in), (in, rank), (rank, out), (out,)"
        )
    x, down, up = x.contiguous(), down.contiguous(), up.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    build.function("linear", "rwkv_low_rank", "13q")(
        x.data_ptr(), down.data_ptr(), up.data_ptr(), 0 if bias is None else bias.contiguous().data_ptr(), y.data_ptr(),
        rows, size, rank, out, _CODES[activation],
        x.dtype is torch.bfloat16, down.dtype is torch.bfloat16, build.threads(),
    )  # fmt: skip
    return y


def low_rank_reference(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: Activation = "none",
    remake: Remake = lambda make, hidden: make(hidden),
) -> Tensor:  # fmt: skip
    """The same by torch, with gradients, for any number of rows.

    The bias goes into the second product: no pass of its own, and no rounding; and autocast, which would leave a sum with a
    float32 bias in float32, twice as wide as what it stands beside, gives what it gives for every product.
    """
    dtype = x.dtype

    def raised(hidden: Tensor) -> Tensor:
        return products.linear(hidden, up.mT.to(dtype), None if bias is None else bias.to(dtype).view(-1))

    return remake(raised, _ACTIVATIONS[activation](products.linear(x, down.mT.to(dtype))))
