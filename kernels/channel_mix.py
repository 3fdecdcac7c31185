"""The squared ReLU between the matrices of channel mixing.

    y = max(x, 0)^2        dx = 2 sqrt(y) dy

The backward reads y, which the matrix that follows keeps anyway, so that x is nowhere kept.
Source: So et al. 2021, "Primer: Searching for Efficient Transformers for Language Modeling", arXiv:2109.08668.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import build
from kernels.choice import Form, Op, choose, direct
from kernels.operator import operator

FORMS: tuple[Form, ...] = ("cpu", "triton", "torch")
"""The forms, fastest first."""


def relu_squared(x: Tensor, *, op: Op = "auto") -> Tensor:
    """max(x, 0)^2.

    Args:
        x: of any shape. Where no gradients are recorded, it is overwritten and comes back, which is memory's
            speed in any form.
        op: the implementation, see `kernels.choice`; "torch" and "reference" are torch.

    Raises:
        ValueError: `op` can't work on x.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    if torch.is_grad_enabled():
        return apply(choose("channel_mix", op, FORMS, x), x)
    if op in ("auto", "cpu") and x.is_contiguous() and direct("channel_mix", x):
        _forward_cpu(x, x)
        return x
    choose("channel_mix", op, FORMS, x)  # an error where it is due
    return x.relu_().square_()


def relu_squared_reference(x: Tensor) -> Tensor:
    """The same by torch."""
    return torch.relu(x) ** 2


def apply(form: Form, x: Tensor) -> Tensor:
    """The operator by the form of that name, which must be able to work on x: `relu_squared` has chosen."""
    if form in ("torch", "reference"):
        return relu_squared_reference(x)
    y: Tensor = _forward(x, form)
    return y


@operator("rwkv::relu_squared")
def _forward(x: Tensor, form: str) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape)
    if form == "triton":
        from kernels import channel_mix_triton

        channel_mix_triton.forward(x, y)
    else:
        _forward_cpu(x, y)
    return y


@_forward.register_fake
def _(x: Tensor, form: str) -> Tensor:
    return x.new_empty(x.shape)


@operator("rwkv::relu_squared_backward")
def _backward(y: Tensor, dy: Tensor, form: str) -> Tensor:
    y, dy = y.contiguous(), dy.to(y.dtype).contiguous()
    dx = y.new_empty(y.shape)
    if form == "triton":
        from kernels import channel_mix_triton

        channel_mix_triton.backward(y, dy, dx)
    else:
        build.function("channel_mix", "rwkv_relu_squared_backward", "6q")(
            y.data_ptr(), dy.data_ptr(), dx.data_ptr(), y.numel(), y.dtype is torch.bfloat16, build.threads()
        )
    return dx


@_backward.register_fake
def _(y: Tensor, dy: Tensor, form: str) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.form = inputs[1]
    ctx.save_for_backward(output)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    dx: Tensor = _backward(*ctx.saved_tensors, dy, ctx.form)
    return dx, None


_forward.register_autograd(_grad, setup_context=_save)


def _forward_cpu(x: Tensor, y: Tensor) -> None:
    build.function("channel_mix", "rwkv_relu_squared", "5q")(
        x.data_ptr(), y.data_ptr(), x.numel(), x.dtype is torch.bfloat16, build.threads()
    )
