"""WKV-6, the recurrence of RWKV-6, and that of RWKV-5, whose decay is the same in every step.

    y_t = S_{t-1} r_t + (sum_j r_tj u_j k_tj) v_t        d_t = exp(-exp(w_raw_t))
    S_t = S_{t-1} diag(d_t) + v_t k_t'

Shapes: B batch, T time, H heads, N head size. S is (B, H, N, N): rows are values, columns are keys.
Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.choice import WKV, Form, Op, implementation, recurrence
from kernels.operator import operator
from kernels.recurrence import differentiate


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, *, op: Op = "auto"
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T steps.

    Args:
        r: (B, T, H, N) receptance.
        k: (B, T, H, N) key.
        v: (B, T, H, N) value.
        w_raw: (B, T, H, N) decay before squashing: the decay is exp(-exp(w_raw)), anything from 1 to 0. RWKV-5 passes its
            (H, N) expanded. Below 88: where exp(w_raw) is infinite, its gradient is NaN.
        u: (H, N) bonus of the current step.
        state: (B, H, N, N) float32 (or float64, to measure errors by), S before the first step.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        y, (B, T, H, N) in the dtype of r, and S after the last step, in the dtype of `state`. Both are differentiable
        in all six inputs.

    Raises:
        ValueError: the shapes disagree, T is 0, `state` is neither float32 nor float64, or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    _check(r, k, v, w_raw, u, state)
    return apply(
        recurrence("wkv6", op, r if state.dtype == torch.float32 else state, r.shape[1]), r, k, v, w_raw, u, state
    )


def wkv6_reference(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations above, step by step, in the dtype of `state`. Slow, differentiable, and the truth."""
    dtype = r.dtype
    r, k, v, w_raw, u = (x.to(state.dtype) for x in (r, k, v, w_raw, u))
    decay = torch.exp(-torch.exp(w_raw))
    bonus = (r * u * k).sum(-1, keepdim=True) * v
    ys = []
    for t in range(r.shape[1]):
        ys.append((state @ r[:, t, :, :, None]).squeeze(-1) + bonus[:, t])
        state = state * decay[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(ys, 1).to(dtype), state


def _check(r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor) -> None:
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r is {tuple(r.shape)}; it must be (B, T, H, N) with T of 1 or more; reshape it")
    for name, x in (("k", k), ("v", v), ("w_raw", w_raw)):
        if x.shape != r.shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)} but r is {tuple(r.shape)}; all four share (B, T, H, N); reshape or expand it"
            )
    batch, _, heads, size = r.shape
    if u.shape != (heads, size):
        raise ValueError(f"u is {tuple(u.shape)}; it must be {(heads, size)}, one for all steps; reshape it")
    if state.shape != (batch, heads, size, size):
        raise ValueError(
            f"state is {tuple(state.shape)}; it must be {(batch, heads, size, size)}; expand it over the batch"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}; the recurrence loses too much below float32; pass state.float()")


def apply(
    form: Form, r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The operator by the form of that name, which must be able to work on these: `wkv6` has chosen and checked."""
    with torch.autocast(state.device.type, enabled=False):  # it would turn the products of some forms to bfloat16
        if form == "reference":
            return wkv6_reference(r, k, v, w_raw, u, state)
        if form == "fla":
            from kernels import fla

            return fla.wkv6(r, k, v, w_raw, u, state)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (r, k, v, w_raw, u, state))
        y, final, _ = _forward(r, k, v, w_raw, u, state, form, keep)
        return y, final


def _implementation(form: str) -> Any:
    """The module of a form: `forward`, `backward`, and `kept`, which gives the memory that the one leaves to the other."""
    return implementation("wkv6", form, WKV)


@operator("rwkv::wkv6")
def _forward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and if `keep`, what the backward needs beside the inputs."""
    y, final, kept = _implementation(form).forward(r, k, v, w_raw, u, state, keep)
    return y, final, kept


@_forward.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, form: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _implementation(form).kept(r.shape[1], state) if keep else state.new_empty(0)
    return r.new_empty(r.shape), torch.empty_like(state, memory_format=torch.contiguous_format), kept


@operator("rwkv::wkv6_backward")
def _backward(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w_raw, u and the first state, in their dtypes."""
    dr, dk, dv, dw_raw, du, dstate = _implementation(form).backward(r, k, v, w_raw, u, kept, dy, dfinal)
    return dr, dk, dv, dw_raw, du, dstate


@_backward.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, kept: Tensor, dy: Tensor, dfinal: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dk, dv, dw_raw, du = (x.new_empty(x.shape) for x in (r, k, v, w_raw, u))
    return dr, dk, dv, dw_raw, du, dfinal.new_empty(dfinal.shape)


differentiate(_forward, _backward)
