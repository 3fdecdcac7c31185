"""What RWKV-7 computes around its recurrence, channel by channel and head by head.

Before:  kappa = k0 k_k / |k0 k_k|_head        rate = sigmoid(a_raw)        v = v0 + (v_first - v0) sigmoid(v_raw)
         k = k0 (1 + (rate - 1) k_a)           a = -kappa                   b = kappa rate
After:   out = (group_norm(y) + (sum_j r_j k_j r_k_j)_head v) g

Shapes: B batch, T time, C = H N channels, H heads, N head size. Source: Peng et al. 2025, arXiv:2503.14456.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import time_mix7_cpu
from kernels.choice import Form, Op, choose, direct, implementation
from kernels.operator import operator

FORMS: tuple[Form, ...] = ("cpu", "triton", "torch")
"""Fastest first. The first two are one pass over the inputs in float32, forward and backward, whatever the dtypes."""


def prepare(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int, *, op: Op = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the recurrence reads: k, v, a and b of `kernels.wkv7`.

    Args:
        k0: (B, T, C), what the key matrix gave.
        v0: (B, T, C), what the value matrix gave.
        v_first: (B, T, C), v0 of layer 0; None in layer 0, whose v is v0.
        a_raw: (B, T, C), the in-context learning rate before its sigmoid.
        v_raw: (B, T, C), the share of v_first before its sigmoid; None in layer 0.
        k_k: C values in any shape.
        k_a: C values in any shape.
        size: N.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        k, v, a, b, (B, T, H, N) each; v in the dtype of v0, the others in that of k0. Differentiable in all inputs.

    Raises:
        ValueError: the sizes disagree, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    if v_first is None or v_raw is None:
        v_first = v_raw = None
    activations = [x for x in (k0, v0, v_first, a_raw, v_raw) if x is not None]
    _check(activations, (k_k, k_a), k0.shape, size)
    if op in ("auto", "cpu") and direct("time_mix7", *activations, k_k, k_a):
        return time_mix7_cpu.prepare(k0, v0, v_first, a_raw, v_raw, k_k, k_a, size)
    form = choose("time_mix7", op, FORMS, k0)
    return apply_prepare(form, k0, v0, v_first, a_raw, v_raw, k_k, k_a, size)


def prepare_reference(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by torch, with gradients."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, size)

    rate = torch.sigmoid(a_raw)
    v = v0 if v_first is None or v_raw is None else v0 + (v_first - v0) * torch.sigmoid(v_raw)
    kappa = F.normalize(heads(k0 * k_k.view(-1)), dim=-1, eps=1e-12)
    k = k0 * (1 + (rate - 1) * k_a.view(-1))
    a, b = -kappa, kappa * heads(rate)
    return heads(k).to(k0.dtype), heads(v).to(v0.dtype), a.to(k0.dtype), b.to(k0.dtype)


def readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float,
    *, op: Op = "auto",
) -> Tensor:  # fmt: skip
    """What the output matrix reads.

    Args:
        y: (B, T, H, N), of `kernels.wkv7`, as are r, k and v.
        r: (B, T, H, N).
        k: (B, T, H, N).
        v: (B, T, H, N).
        g: (B, T, C), the gate.
        weight: (C,), of the norm over each head.
        bias: (C,)
        r_k: (H, N).
        eps: of the norm.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        (B, T, C) in the dtype of y. Differentiable in all inputs.

    Raises:
        ValueError: the sizes disagree, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    _check((y, r, k, v), (weight, bias, r_k), y.shape, y.shape[-1])
    if g.shape[:2] != y.shape[:2] or g.numel() != y.numel():
        raise ValueError(f"g is {tuple(g.shape)} but y is {tuple(y.shape)}; g must be (B, T, C); reshape it")
    if op in ("auto", "cpu") and direct("time_mix7", y, r, k, v, g, weight, bias, r_k):
        return time_mix7_cpu.readout(y, r, k, v, g, weight, bias, r_k, eps)
    form = choose("time_mix7", op, FORMS, y)
    return apply_readout(form, y, r, k, v, g, weight, bias, r_k, eps)


def readout_reference(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    """The same by torch, with gradients."""
    normed = F.group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight, bias, eps).view_as(g)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return ((normed + bonus.flatten(2)) * g).to(y.dtype)


def _check(activations: Sequence[Tensor], parameters: Sequence[Tensor], shape: torch.Size, size: int) -> None:
    """Raise unless all activations have the shape, whose channels N divides, and all parameters as many values as it has."""
    channels = shape[2:].numel()
    for x in activations:
        if x.shape != shape:
            raise ValueError(
                f"an activation is {tuple(x.shape)}; it must be {tuple(shape)} as the first; reshape or expand it"
            )
    for p in parameters:
        if p.numel() != channels:
            raise ValueError(
                f"a parameter is {tuple(p.shape)}; it must have {channels} values, one per channel; reshape it"
            )
    if size < 1 or channels % size:
        raise ValueError(f"N is {size}; it must divide the {channels} channels; check the head size")


def apply_prepare(
    form: Form, k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor,
    k_a: Tensor, size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`prepare` by the form of that name, which must be able to work on these: `prepare` has chosen and checked."""
    if form in ("torch", "reference"):
        return prepare_reference(k0, v0, v_first, a_raw, v_raw, k_k, k_a, size)
    k, v, a, b = _prepare(k0, v0, v_first, a_raw, v_raw, k_k, k_a, size, form)
    return k, v, a, b


def apply_readout(
    form: Form, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """`readout` by the form of that name, which must be able to work on these: `readout` has chosen and checked."""
    if form in ("torch", "reference"):
        return readout_reference(y, r, k, v, g, weight, bias, r_k, eps)
    out: Tensor = _readout(y, r, k, v, g, weight, bias, r_k, eps, form)
    return out


def _implementation(form: str) -> Any:
    """The module of a form: `prepare`, `readout`, and the `_backward` of each."""
    return implementation("time_mix7", form, FORMS)


@operator("rwkv::prepare7")
def _prepare(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    k, v, a, b = _implementation(form).prepare(k0, v0, v_first, a_raw, v_raw, k_k, k_a, size)
    return k, v, a, b


@_prepare.register_fake
def _(
    k0: Tensor, v0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, k_k: Tensor, k_a: Tensor,
    size: int, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*k0.shape[:-1], k0.shape[-1] // size, size)
    k, v, a, b = (x.new_empty(shape) for x in (k0, v0, k0, k0))
    return k, v, a, b


@operator("rwkv::prepare7_backward")
def _prepare_backward(
    k0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, v: Tensor | None, k_k: Tensor, k_a: Tensor,
    dk: Tensor, dv: Tensor, da: Tensor, db: Tensor, size: int, wanted: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k0, v0, v_first, a_raw, v_raw, k_k and k_a, in their shapes and dtypes.

    Empty are those of what is None, and those of k_k and k_a unless `wanted`. v is the one that the forward gave:
    v_first - v is (v_first - v0) sigmoid(-v_raw), and the recurrence keeps v anyway, so nobody need keep v0.
    """
    grads = _implementation(form).prepare_backward(k0, v_first, a_raw, v_raw, v, k_k, k_a, dk, dv, da, db, size, wanted)
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6]


@_prepare_backward.register_fake
def _(
    k0: Tensor, v_first: Tensor | None, a_raw: Tensor, v_raw: Tensor | None, v: Tensor | None, k_k: Tensor, k_a: Tensor,
    dk: Tensor, dv: Tensor, da: Tensor, db: Tensor, size: int, wanted: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = [k0.new_empty(0) if x is None else x.new_empty(k0.shape) for x in (k0, dv, v_first, a_raw, v_raw)]
    p = [x.new_empty(x.shape if wanted else 0) for x in (k_k, k_a)]
    return g[0], g[1], g[2], g[3], g[4], p[0], p[1]


def _save_prepare(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k0, _, v_first, a_raw, v_raw, k_k, k_a, ctx.size, ctx.form = inputs
    ctx.save_for_backward(k0, v_first, a_raw, v_raw, None if v_first is None else output[1], k_k, k_a)


def _prepare_grad(ctx: Any, dk: Tensor, dv: Tensor, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
    saved, wanted = ctx.saved_tensors, any(ctx.needs_input_grad[5:7])  # read once: checkpointing gives them once
    dk0, dv0, dv_first, da_raw, dv_raw, dk_k, dk_a = _prepare_backward(
        *saved, dk, dv, da, db, ctx.size, wanted, ctx.form
    )
    of_first = (dk0, dv0, None, da_raw, None) if saved[1] is None else (dk0, dv0, dv_first, da_raw, dv_raw)
    return *of_first, *((dk_k, dk_a) if wanted else (None, None)), None, None


_prepare.register_autograd(_prepare_grad, setup_context=_save_prepare)


@operator("rwkv::readout7")
def _readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float,
    form: str,
) -> Tensor:  # fmt: skip
    out: Tensor = _implementation(form).readout(y, r, k, v, g, weight, bias, r_k, eps)
    return out


@_readout.register_fake
def _(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float,
    form: str,
) -> Tensor:  # fmt: skip
    return y.new_empty(g.shape)


@operator("rwkv::readout7_backward")
def _readout_backward(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, dout: Tensor,
    eps: float, wanted: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y, r, k, v, g, weight, bias and r_k, in their shapes and dtypes; the last three empty unless `wanted`."""
    grads = _implementation(form).readout_backward(y, r, k, v, g, weight, bias, r_k, dout, eps, wanted)
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7]


@_readout_backward.register_fake
def _(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, dout: Tensor,
    eps: float, wanted: bool, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = [x.new_empty(x.shape) for x in (y, r, k, v, g)]
    p = [p.new_empty(p.shape if wanted else 0) for p in (weight, bias, r_k)]
    return x[0], x[1], x[2], x[3], x[4], p[0], p[1], p[2]


def _save_readout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _readout_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = any(ctx.needs_input_grad[5:8])
    grads: tuple[Tensor, ...] = _readout_backward(*ctx.saved_tensors, dout, ctx.eps, wanted, ctx.form)
    return *grads[:5], *(grads[5:] if wanted else (None, None, None)), None, None


_readout.register_autograd(_readout_grad, setup_context=_save_readout)
