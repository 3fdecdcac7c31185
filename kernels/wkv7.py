"""WKV-7, the recurrence of RWKV-7.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t' + v_t k_t'        d_t = exp(-exp(-1/2) sigmoid(w_raw_t))
    y_t = S_t r_t

Shapes: B batch, T time, H heads, N head size. S is (B, H, N, N): rows are values, columns are keys.
Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.choice import WKV, Form, Op, direct, implementation, recurrence
from kernels.operator import operator
from kernels.recurrence import differentiate

LOG_DECAY_MIN = -math.exp(-0.5)
"""Strongest log decay of one step: w_raw = +infinity."""


def wkv7(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, op: Op = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        r: (B, T, H, N) receptance.
        w_raw: (B, T, H, N) decay before squashing, any real: the decay is exp(-exp(-1/2) sigmoid(w_raw)).
        k: (B, T, H, N) key.
        v: (B, T, H, N) value.
        a: (B, T, H, N) direction to remove; RWKV-7 passes -kappa, |kappa| = 1.
        b: (B, T, H, N) direction to write back; RWKV-7 passes kappa * in-context learning rate.
        state: (B, H, N, N) float32 (or float64, to measure errors by), S before the first step.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, H, N) in the dtype of r, and S after the last step, in the dtype of `state`. Both are differentiable
        in all seven inputs.

    Raises:
        ValueError: the shapes disagree, T is 0, `state` is neither float32 nor float64, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    _check(r, w_raw, k, v, a, b, state)
    form = recurrence("wkv7", op, r if state.dtype == torch.float32 else state, r.shape[1])
    if form == "cpu" and direct("wkv7", r, w_raw, k, v, a, b, state):
        y, final, _ = _implementation(form).forward(r, w_raw, k, v, a, b, state, False)
        return y, final
    return apply(form, r, w_raw, k, v, a, b, state)


def wkv7_reference(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = r.dtype
    r, w_raw, k, v, a, b = (x.to(state.dtype) for x in (r, w_raw, k, v, a, b))
    decay = torch.exp(LOG_DECAY_MIN * torch.sigmoid(w_raw))
    ys = []
    for t in range(r.shape[1]):
        removed = state @ a[:, t, :, :, None]  # (B, H, N, 1)
        state = state * decay[:, t, :, None, :] + removed * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None]
        ys.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(ys, 1).to(dtype), state


def _check(r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> None:
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r is {tuple(r.shape)}; it must be (B, T, H, N) with T of 1 or more; reshape it")
    for name, x in (("w_raw", w_raw), ("k", k), ("v", v), ("a", a), ("b", b)):
        if x.shape != r.shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)} but r is {tuple(r.shape)}; all six share (B, T, H, N); reshape it"
            )
    batch, _, heads, size = r.shape
    if state.shape != (batch, heads, size, size):
        raise ValueError(
            f"state is {tuple(state.shape)}; it must be {(batch, heads, size, size)}; expand it over the batch"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


def apply(
    form: Form, r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The operator by the form of that name, which must be able to work on these: `wkv7` has chosen and checked."""
    with torch.autocast(state.device.type, enabled=False):  # it would turn the products of some forms to bfloat16
        if form == "reference":
            return wkv7_reference(r, w_raw, k, v, a, b, state)
        if form == "fla":
            from kernels import fla

            return fla.wkv7(r, w_raw, k, v, a, b, state)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, w_raw, k, v, a, b, state))
        y, final, _ = _forward(r, w_raw, k, v, a, b, state, form, keep)
        return y, final


def _implementation(form: str) -> Any:
    """The module of a form: `forward`, `backward`, and `kept`, which gives the memory that the one leaves to the other."""
    return implementation("wkv7", form, WKV)


@operator("rwkv::wkv7")
def _forward(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and if `keep`, what the backward needs beside the inputs."""
    y, final, kept = _implementation(form).forward(r, w_raw, k, v, a, b, state, keep)
    return y, final, kept


@_forward.register_fake
def _(
    r: Tensor, w_raw: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _implementation(form).kept(r.shape[1], state) if keep else state.new_empty(0)
    return r.new_empty(r.shape), torch.empty_like(state, memory_format=torch.contiguous_format), kept


@operator("rwkv::wkv7_backward")
def _backward(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w_raw, k, v, a, b and the first state, in their dtypes."""
    dr, dw_raw, dk, dv, da, db, dstate = _implementation(form).backward(r, w_raw, k, v, a, b, kept, dy, dfinal)
    return dr, dw_raw, dk, dv, da, db, dstate


@_backward.register_fake
def _(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dw_raw, dk, dv, da, db = (x.new_empty(x.shape) for x in (r, w_raw, k, v, a, b))
    return dr, dw_raw, dk, dv, da, db, dfinal.new_empty(dfinal.shape)


differentiate(_forward, _backward)
